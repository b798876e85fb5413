"""Encoders map an input to a feature vector; by name in `ENCODERS`, or `timm:NAME` (`models.timm_encoders`).

torchvision is imported lazily: importing it takes as long as importing torch.

Shapes: B clips or images, c input channels, H x W pixels, D features (or numbers of a step), L steps of the longest
sequence of a batch, R steps of all of them.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.timm_encoders import TIMM, make_timm
from utils.cli import per_modality


class Sequences(NamedTuple):
    """A batch of B sequences of different lengths, without padding.

    rows (R, D): the steps of the first sequence, of the second, ...; lengths (B,); slots (R,): the place of each row in
    the padded batch (B * L, D); longest: L.
    """

    rows: Tensor
    lengths: Tensor
    slots: Tensor
    longest: int

    @classmethod
    def of(cls, rows: Tensor, lengths: Tensor) -> "Sequences":
        """From rows (R, D) and lengths (B,) on the CPU."""
        inside, longest = steps_of(lengths), int(lengths.max())
        start = torch.arange(len(lengths)) * longest
        return cls(rows, lengths, start.repeat_interleave(lengths) + inside, longest)

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def padded(self, rows: Tensor) -> Tensor:
        """Rows (R, D) of these sequences as (B, L, D), zeros behind the last step of each."""
        slots = rows.new_zeros(len(self.lengths) * self.longest, rows.shape[1])
        return slots.index_copy(0, self.slots, rows).unflatten(0, (-1, self.longest))

    def mean(self, padded: Tensor) -> Tensor:
        """The mean over the valid steps of (B, L, D): (B, D)."""
        valid = torch.arange(self.longest, device=padded.device) < self.lengths[:, None]  # (B, L)
        return torch.where(valid[..., None], padded, 0.0).sum(dim=1) / self.lengths[:, None]


def steps_of(lengths: Tensor) -> Tensor:
    """0 ... length - 1 for each of `lengths` (B,), one after another: (R,)."""
    ends = lengths.cumsum(0)
    return torch.arange(int(ends[-1])) - (ends - lengths).repeat_interleave(lengths)


class MeanPool(nn.Module):
    """Global average pooling in at least float32, for any input precision: (B, D, h, w) -> (B, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3), dtype=torch.promote_types(x.dtype, torch.float32))


class ThinResNet(nn.Module):
    """ResNet-18 at a quarter of its width, under torchvision's parameter names: for small images on a CPU.

    Every width is a multiple of 16. With fewer channels oneDNN's strided 1 x 1 convolution (PyTorch 2.11, AVX-512) can
    write past its buffer in the backward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1, self.layer2 = _stage(16, 16, stride=1), _stage(16, 32, stride=2)
        self.layer3, self.layer4 = _stage(32, 64, stride=2), _stage(64, 128, stride=2)
        self.avgpool, self.fc = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, H, W) -> (B, 128)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # (B, 16, H/4, W/4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, 128, H/32, W/32)
        return self.fc(self.avgpool(x))


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Two residual blocks; the first changes channels and resolution."""
    from torchvision.models.resnet import BasicBlock

    downsample = None
    if stride != 1 or inputs != outputs:
        downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return nn.Sequential(BasicBlock(inputs, outputs, stride, downsample), BasicBlock(outputs, outputs))


def _as_encoder(net: nn.Module, in_channels: int) -> nn.Module:
    """A ResNet with another input layer and no classifier, initialised as the official Data Remixing code does.

    Convolutions kaiming-normal fan-out (torchvision's default too), BatchNorm weight ~ N(1, 0.02), bias 0.
    """
    first = net.conv1
    assert isinstance(first, nn.Conv2d)
    net.conv1 = nn.Conv2d(in_channels, first.out_channels, kernel_size=7, stride=2, padding=3, bias=False)
    net.avgpool, net.fc = MeanPool(), nn.Identity()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)
    return net


def _mlp(inputs: int) -> nn.Module:
    """Two layers for vectors (B, D), which need no scaling: the first layer normalises them."""
    return nn.Sequential(nn.BatchNorm1d(inputs), nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())


class MeanSteps(nn.Module):
    """The mean over a sequence's steps, through the two layers of `mlp`."""

    def __init__(self, inputs: int):
        super().__init__()
        self.mlp = _mlp(inputs)

    def forward(self, x: Sequences) -> Tensor:
        """B sequences of steps (D,) -> (B, 128)."""
        return self.mlp(x.mean(x.padded(x.rows)))


class GRU(nn.Module):
    """A GRU over normalised steps; its outputs are averaged over the valid ones.

    BatchNorm sees the steps without padding. Steps behind the end of a sequence come after all of its own, so they
    change none of the outputs that are averaged.
    """

    def __init__(self, inputs: int, width: int = 128):
        super().__init__()
        self.norm = nn.BatchNorm1d(inputs)
        self.gru = nn.GRU(inputs, width, batch_first=True)

    def forward(self, x: Sequences) -> Tensor:
        """B sequences of steps (D,) -> (B, 128), in float32 also under autocast: recurrence adds rounding up."""
        with torch.autocast(x.device.type, enabled=False):
            outputs, _ = self.gru(x.padded(self.norm(x.rows)))  # (B, L, 128)
            return x.mean(outputs)


class Transformer(nn.Module):
    """Two pre-norm Transformer layers over normalised steps with sinusoidal positions; the valid steps are averaged.

    Four heads, 256 units between, no dropout (Vaswani et al., NeurIPS 2017). BatchNorm sees the steps without padding,
    and no step attends to padding.
    """

    def __init__(self, inputs: int, width: int = 128, layers: int = 2):
        super().__init__()
        self.norm, self.embed, self.width = nn.BatchNorm1d(inputs), nn.Linear(inputs, width), width
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, x: Sequences) -> Tensor:
        """B sequences of steps (D,) -> (B, 128)."""
        steps = x.padded(self.embed(self.norm(x.rows)))  # (B, L, 128)
        steps = steps + positions(x.longest, self.width, steps.device).to(steps.dtype)
        padding = torch.arange(x.longest, device=steps.device) >= x.lengths[:, None]  # (B, L)
        return x.mean(self.layers(steps, src_key_padding_mask=padding).float())


def positions(length: int, width: int, device: torch.device) -> Tensor:
    """Sinusoidal positions (length, width): sines of falling frequency in even columns, cosines in odd ones."""
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000) / width))  # (width / 2,)
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def _resnet(name: str, channels: int) -> nn.Module:
    from torchvision import models

    return _as_encoder(getattr(models, name)(num_classes=1), channels)


class Encoder(NamedTuple):
    """How to make an encoder: `make(n)` for n input channels (`takes` "image") or n numbers ("vector", "sequence").

    stages: channels after layer1, layer2, layer3 and layer4 of an encoder with the module names of torchvision's
    ResNets, which `models.intermediate` runs stage by stage; none for every other encoder.
    """

    make: Callable[[int], nn.Module]
    features: int
    takes: str = "image"
    stages: tuple[int, ...] = ()


ENCODERS = {
    "resnet18": Encoder(partial(_resnet, "resnet18"), 512, stages=(64, 128, 256, 512)),
    "resnet18_thin": Encoder(lambda channels: _as_encoder(ThinResNet(), channels), 128, stages=(16, 32, 64, 128)),
    "resnet34": Encoder(partial(_resnet, "resnet34"), 512, stages=(64, 128, 256, 512)),
    "resnet50": Encoder(partial(_resnet, "resnet50"), 2048, stages=(256, 512, 1024, 2048)),
    "mlp": Encoder(_mlp, 128, "vector"),
    "gru": Encoder(GRU, 128, "sequence"),
    "mean": Encoder(MeanSteps, 128, "sequence"),
    "transformer": Encoder(Transformer, 128, "sequence"),
}
IMAGE_ENCODERS = tuple(name for name, encoder in ENCODERS.items() if encoder.takes == "image")


def takes(name: str) -> str | None:
    """Input kind of the encoder `name`: "image", "vector" or "sequence"; None if it does not exist."""
    if name.startswith(TIMM):
        return "image" if name != TIMM else None
    return ENCODERS[name].takes if name in ENCODERS else None


def make_encoder(name: str, shape: tuple[int, ...]) -> tuple[nn.Module, int]:
    """The encoder `name` and its number of features.

    `shape` is that of its input without the batch: (c, H, W) for images, (D,) for vectors and for steps of sequences.
    Raises `UserError` for a timm model that does not exist or does not take such images.
    """
    if name.startswith(TIMM):
        return make_timm(name.removeprefix(TIMM), shape)
    encoder = ENCODERS[name]
    return encoder.make(shape[0]), encoder.features


def encoder_list(text: str) -> str:
    """An argparse type: an encoder of all images, encoders of modalities, or both: `resnet18,text=transformer`."""
    for modality, name in per_modality(text).items():
        wanted = takes(name)
        if wanted is None:
            allowed = ", ".join(ENCODERS if modality else IMAGE_ENCODERS)
            raise argparse.ArgumentTypeError(f"{name!r} is unknown; allowed: {allowed}, {TIMM}NAME")
        if not modality and wanted != "image":
            raise argparse.ArgumentTypeError(f"{name} takes {wanted}s; name their modality, as in text={name}")
    return text
