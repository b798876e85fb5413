"""ResNet-18 trunks: torchvision's ResNet without its classifier, one per modality.

Shapes: B images, c input channels, H x W pixels, D = 8 * width feature channels, h x w = H/32 x W/32.
"""

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet


class PickedConv(nn.Conv2d):
    """A strided 1 x 1 convolution as one of stride 1 on the pixels that it looks at: the same numbers.

    oneDNN's own (PyTorch 2.11, AVX-512, two threads or more) writes past its buffer in the backward pass of some shapes
    if the input channels are no multiple of 16: 8 to 16 channels, 6 maps of 16 x 12, channels last, ends in "corrupted
    size vs. prev_size".
    """

    def forward(self, x: Tensor) -> Tensor:
        down, right = self.stride
        return F.conv2d(x[:, :, ::down, ::right], self.weight, self.bias)


class Trunk(ResNet):
    """ResNet-18 up to its last feature map, under torchvision's parameter names.

    `width` is the number of channels of the first stage: 64 is the standard ResNet-18 (512 features), less is a thin
    one. Initialised as the official Data Remixing code does: convolutions kaiming-normal fan-out (torchvision's own
    default), BatchNorm weight ~ N(1, 0.02) and bias 0.
    """

    def __init__(self, in_channels: int, width: int = 64):
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=1)
        if width != 64:
            self.inplanes = width
            self.bn1 = nn.BatchNorm2d(width)
            self.layer1 = self._make_layer(BasicBlock, width, 2)
            self.layer2 = self._make_layer(BasicBlock, 2 * width, 2, stride=2)
            self.layer3 = self._make_layer(BasicBlock, 4 * width, 2, stride=2)
            self.layer4 = self._make_layer(BasicBlock, 8 * width, 2, stride=2)
        for layer in (self.layer2, self.layer3, self.layer4):
            conv = layer[0].downsample[0]
            if conv.in_channels % 16:  # only in thin ones
                layer[0].downsample[0] = nn.utils.skip_init(  # drawing no random numbers
                    PickedConv, conv.in_channels, conv.out_channels, 1, conv.stride, bias=False
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
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # (B, width, H/4, W/4)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, D, h, w)
