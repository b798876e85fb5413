"""ResNet-18 trunks: torchvision's ResNet without its classifier, one per modality.

Shapes: B images, c input channels, H x W pixels, D = 8 * width feature channels, h x w = H/32 x W/32.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet


class PickedConv(nn.Conv2d):
    """A strided 1 x 1 convolution as one of stride 1 on the pixels that it looks at: the same numbers.

    oneDNN's own (PyTorch 2.11, AVX-512, two threads or more) writes past its buffer in the backward pass of some shapes
    if the input channels are no multiple of 16: 8 to 16 channels, 6 maps of 16 x 12, channels last, ends in "corrupted
    size vs. prev_size".
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        down, right = self.stride
        return F.conv2d(x[:, :, ::down, ::right], weight, bias)


def normalised(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """`norm(conv(x))`; where statistics stand still and no gradient is asked for, as one convolution.

    There BatchNorm is a fixed factor and offset per channel, which go into the convolution's weights and bias: one pass
    over memory less for every convolution that scores or evaluates.
    """
    if norm.training or torch.is_grad_enabled():
        return norm(conv(x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()  # (channels out,)
    return conv._conv_forward(x, conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale)


class Block(BasicBlock):
    """torchvision's residual block under its parameter names, normalised as above."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, H, W) -> (B, c', H / stride, W / stride)."""
        out = self.relu(normalised(self.conv1, self.bn1, x))
        out = normalised(self.conv2, self.bn2, out)
        out += x if self.downsample is None else normalised(*self.downsample, x)
        return self.relu(out)


class Trunk(ResNet):
    """ResNet-18 up to its last feature map, under torchvision's parameter names.

    `width` is the number of channels of the first stage: 64 is the standard ResNet-18 (512 features), less is a thin
    one. Initialised as the official Data Remixing code does: convolutions kaiming-normal fan-out (torchvision's own
    default), BatchNorm weight ~ N(1, 0.02) and bias 0.
    """

    def __init__(self, in_channels: int, width: int = 64):
        super().__init__(Block, [2, 2, 2, 2], num_classes=1)
        if width != 64:
            self.inplanes = width
            self.bn1 = nn.BatchNorm2d(width)
            self.layer1 = self._make_layer(Block, width, 2)
            self.layer2 = self._make_layer(Block, 2 * width, 2, stride=2)
            self.layer3 = self._make_layer(Block, 4 * width, 2, stride=2)
            self.layer4 = self._make_layer(Block, 8 * width, 2, stride=2)
        for layer in (self.layer2, self.layer3, self.layer4):
            conv = layer[0].downsample[0]
            if conv.in_channels % 16:  # only in thin ones
                shape = conv.in_channels, conv.out_channels, 1, conv.stride
                layer[0].downsample[0] = nn.utils.skip_init(  # drawing no random numbers
                    PickedConv, *shape, bias=False, device=conv.weight.device
                )
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=7, stride=2, padding=3, bias=False)
        del self.avgpool, self.fc  # pooling is the classifier's: over frames too; the heads replace fc
        self.features = 8 * width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, H, W) -> (B, D, h, w)."""
        x = self.maxpool(self.relu(normalised(self.conv1, self.bn1, x)))  # (B, width, H/4, W/4)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, D, h, w)
