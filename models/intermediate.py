"""Networks with intermediate fusion: MMTM and CentralNet (paper, Table 4), for ResNet encoders.

MMTM (Joze et al., CVPR 2020). After layer2, layer3 and layer4 the channels of each modality's maps are scaled by gates
that are computed from all modalities' maps: s_m the mean of the maps over all axes but the channels (B, C_m), e =
ReLU(W_s [s_1; ...; s_M] + b_s) of width 2 (C_1 + ... + C_M) / ratio, and x_m <- k sigmoid(W_m e + b_m) x_m. The mean is
over a clip's frames too, so the frames share a gate. On top of the encoders stand the usual heads.

CentralNet (Vielzeuf et al., ECCV 2018 workshops). A central network takes, after each of the four stages, a learned
weighted sum of itself and of the encoders' pooled maps, and its last layer gives the joint logits.

For Greedy (`balance`): the gates of a network are `model.mmtm["layer2"]`, `["layer3"]` and `["layer4"]`, each an `MMTM`
with the shared layer `squeeze` and a layer `gates[m]` per modality. While `record` is true, each training pass adds the
gates of the clips that are given m to their running mean, `mean_gate(m)`, over all processes. Where `replace[m]` is
true, the gates of m are that mean, without gradient. Both are set from outside, for one step, as tensors on the device
that the host does not read, and are off otherwise. The means are buffers, so they are in checkpoints.

Shapes: B clips of a batch, T frames of a clip, C_m channels of modality m at a stage, D_m its features, C classes.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.classifier import MultimodalClassifier, Output
from models.encoders import ENCODERS, Sequences
from utils.distributed import sum_over_ranks

Tensors = dict[str, Tensor]
STAGES = ("layer1", "layer2", "layer3", "layer4")
MOMENTUM = 0.1  # of the running mean of squeezes, BatchNorm's


class StagedNet(MultimodalClassifier):
    """A network that runs its encoders stage by stage.

    Raises `ValueError` for an encoder without stages, and for a fusion head that is not defined for these modalities.
    """

    late = False

    def __init__(self, inputs: dict[str, tuple[str, tuple[int, ...]]], *args: Any, **options: Any):
        for name, (encoder, _) in inputs.items():
            if encoder not in ENCODERS or not ENCODERS[encoder].stages:
                staged = ", ".join(known for known, kind in ENCODERS.items() if kind.stages)
                raise ValueError(f"encoder {encoder} of {name}: has no stages for the encoders to meet in; use --model "
                                 f"late, or encoders that have ({staged})")  # fmt: skip
        super().__init__(inputs, *args, **options)
        self.channels = {name: ENCODERS[encoder].stages for name, (encoder, _) in inputs.items()}

    def stem(self, name: str, x: Tensor | Sequences) -> Tensor:
        """Maps (B * T, C, h, w) before layer1 of images (B, c, H, W) or frames (B, T, c, H, W)."""
        assert isinstance(x, Tensor)
        maps = x.flatten(0, 1) if x.dim() == 5 else x
        for layer in ("conv1", "bn1", "relu", "maxpool"):
            maps = self.encoders[name].get_submodule(layer)(maps)
        return maps

    def stage(self, name: str, stage: str, maps: Tensor) -> Tensor:
        """The maps after a stage, from those before it."""
        return self.encoders[name].get_submodule(stage)(maps)

    def features(self, name: str, maps: Tensor, clips: int) -> Tensor:
        """The features (B, D_m) of maps after layer4 (B * T, D_m, h, w), as `encode` computes them."""
        net = self.encoders[name]
        features = net.get_submodule("fc")(net.get_submodule("avgpool")(maps))
        return features.to(torch.promote_types(features.dtype, torch.float32)).unflatten(0, (clips, -1)).mean(dim=1)


def squeezed(maps: Tensor, clips: int) -> Tensor:
    """The mean of maps (B * T, C, h, w) over frames and pixels (B, C), in float32 at least."""
    return maps.unflatten(0, (clips, -1)).mean(dim=(1, 3, 4), dtype=torch.promote_types(maps.dtype, torch.float32))


def given_to_clips(names: tuple[str, ...], fed: tuple[str, ...], mask: Tensor | None, like: Tensor) -> Tensors:
    """For each modality whether each clip is given it, (B, 1) bool. `like` (B, ...) is on the network's device."""
    if mask is not None:
        return dict(zip(names, mask.split(1, dim=1), strict=True))
    return {name: torch.full((len(like), 1), name in fed, device=like.device) for name in names}


# ------------------------------------------------------------------------------------------------------------ MMTM


class RunningMean(nn.Module):
    """The mean over clips of vectors (D,) that come batch by batch: of all clips, or of recent ones with `momentum`."""

    total: Tensor
    weight: Tensor

    def __init__(self, width: int, momentum: float | None = None):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("total", torch.zeros(width))
        self.register_buffer("weight", torch.zeros(1))

    @torch.no_grad()
    def forward(self, values: Tensor, chosen: Tensor) -> None:
        """Add the vectors (B, D) of the clips `chosen` (B, 1) bool, over all processes."""
        chosen = chosen.to(self.total.dtype)
        sums = sum_over_ranks(torch.cat([(values * chosen).sum(dim=0), chosen.sum(dim=0)]))
        total, clips = sums[:-1], sums[-1:]
        if self.momentum is None:
            self.total += total
            self.weight += clips
        else:
            rate = self.momentum * (clips > 0).to(clips.dtype)  # a batch without chosen clips changes nothing
            self.total.lerp_(total / clips.clamp(min=1), rate)
            self.weight.lerp_(torch.ones_like(clips), rate)


def mean_of(past: nn.Module) -> Tensor:
    """The mean (D,) of a `RunningMean`; zeros before the first vector."""
    return past.get_buffer("total") / past.get_buffer("weight").clamp(min=1e-12)


class MMTM(nn.Module):
    """Gates for the channels of M modalities from the squeezed maps of all of them.

    `widths` are the channels C_m. `k` is the factor on the gates: 1 in the official code, 2 in the paper. With 2 and
    zero weights W_m, b_m the gates are 1. Linear layers start from PyTorch's defaults, as in the official code.
    """

    def __init__(self, widths: dict[str, int], ratio: int = 4, k: float = 1.0):
        super().__init__()
        self.k = k
        self.record: bool | Tensor = False  # a tensor () bool: known to the device alone
        self.replace: Tensors | None = None  # () bool for each modality
        channels = sum(widths.values())
        self.squeeze = nn.Linear(channels, 2 * channels // ratio)
        self.gates = nn.ModuleDict({name: nn.Linear(2 * channels // ratio, own) for name, own in widths.items()})
        self.past_squeezes = nn.ModuleDict({name: RunningMean(own, MOMENTUM) for name, own in widths.items()})
        self.past_gates = nn.ModuleDict({name: RunningMean(own) for name, own in widths.items()})

    def mean_squeeze(self, name: str) -> Tensor:
        """The running mean (C_m) of a modality's squeezed maps in training; zeros before the first pass."""
        return mean_of(self.past_squeezes[name])

    def mean_gate(self, name: str) -> Tensor:
        """The mean (C_m) of a modality's recorded gates; zeros before the first recorded pass."""
        return mean_of(self.past_gates[name])

    def forward(self, squeezes: Tensors, given: Tensors, means: bool = False) -> Tensors:
        """Gates (B, C_m) of the modalities in `squeezes`, their squeezed maps (B, C_m).

        The squeeze of a modality that a clip is not given (`given` (B, 1) bool) is zero, and so is that of one without
        maps. With `means` the latter is its running mean, where the clip is given it.
        """
        some, joined = next(iter(squeezes.values())), []
        for name in self.gates:
            own = squeezes.get(name)
            if own is None:
                mean = self.mean_squeeze(name).to(some.dtype)
                own = (mean if means else torch.zeros_like(mean)).expand(len(some), -1)
            joined.append(own.masked_fill(~given[name], 0.0))
        hidden = F.relu(self.squeeze(torch.cat(joined, dim=1)))
        gates = {name: self.k * torch.sigmoid(self.gates[name](hidden)) for name in squeezes}
        for name in squeezes if self.training else ():
            self.past_squeezes[name](squeezes[name], given[name])
            if self.record is not False:
                self.past_gates[name](gates[name], given[name] & self.record)
        if self.replace is not None:
            means_of = {name: self.mean_gate(name).to(some.dtype) for name in gates}
            gates = {name: torch.where(self.replace[name], means_of[name], gate) for name, gate in gates.items()}
        return gates


class MMTMNet(StagedNet):
    """Encoders that gate each other by MMTM, with a fusion head and unimodal heads on the gated features.

    A masked modality's squeeze is zero and its encoder does not run (or runs without effect, `--masked_encoder run`):
    a homogeneous batch reaches the parameters of its own modality, and of the others the fusion head's alone.

    In training the unimodal head of m sees the features of the joint pass, which the other modalities gate. In
    evaluation its logits must be a prediction from m alone, so each encoder runs once more behind the first gate, with
    the running means of the other modalities' squeezes (as Greedy tests one modality, ICML 2022). With `unimodal`
    "masked" the other squeezes are zero, as in a homogeneous batch.
    """

    gated = STAGES[1:]

    def __init__(self, inputs: dict[str, tuple[str, tuple[int, ...]]], *args: Any, **options: Any):
        super().__init__(inputs, *args, **options)
        places = {stage: STAGES.index(stage) for stage in self.gated}
        self.mmtm = nn.ModuleDict({
            stage: MMTM({name: channels[i] for name, channels in self.channels.items()}) for stage, i in places.items()
        })  # fmt: skip

    def forward(
        self, inputs: Mapping[str, Tensor | Sequences], fed: tuple[str, ...], mask: Tensor | None = None
    ) -> Output:
        """As `MultimodalClassifier.forward`."""
        x = next(iter(inputs.values()))
        assert isinstance(x, Tensor)
        given = given_to_clips(self.names, fed, mask, x)
        with self.autocast(x):
            maps = {name: self.stem(name, own) for name, own in inputs.items()}
            for stage in STAGES[: STAGES.index(self.gated[0]) + 1]:
                maps = {name: self.stage(name, stage, own) for name, own in maps.items()}
        features = self.zeroed(self.behind_gates(maps, given), fed, mask)
        own = features
        if not self.training and len(fed) > 1:
            means = self.unimodal == "heads"
            alone = {name: self.behind_gates({name: maps[name]}, given, means)[name] for name in fed}
            own = self.zeroed(alone, fed, mask)
        return Output(self.head(features, fed, mask), self.unimodal_logits(own, fed), features)

    def behind_gates(self, maps: Tensors, given: Tensors, means: bool = False) -> Tensors:
        """Features (B, D_m) of maps (B * T, C_m, h, w) at the first gate. What has no maps: see `MMTM.forward`."""
        clips = len(next(iter(given.values())))
        for stage, mmtm in self.mmtm.items():
            if stage != self.gated[0]:
                with self.autocast(next(iter(maps.values()))):
                    maps = {name: self.stage(name, stage, own) for name, own in maps.items()}
            gates = mmtm({name: squeezed(own, clips) for name, own in maps.items()}, given, means)
            for name, own in maps.items():
                gate = gates[name].to(own.dtype).repeat_interleave(len(own) // clips, dim=0)  # (B * T, C_m)
                maps = maps | {name: own * gate[:, :, None, None]}
        return {name: self.features(name, own, clips) for name, own in maps.items()}


# ------------------------------------------------------------------------------------------------------- CentralNet


class Central(nn.Module):
    """The central network over the pooled maps of the encoders' stages, and its output layer.

    u_i = carry_i c_i + sum_m weights_m,i p_m,i at stage i, c_(i+1) = ReLU(Linear(u_i)), o = Linear(u_last); the first
    stage has no c. p_m,i (B, C) is padded with zeros to the widest modality's channels. The scalars start
    uniform in [0, 1). No BatchNorm: it would see one modality in homogeneous batches and all of them in evaluation.
    """

    def __init__(self, channels: dict[str, tuple[int, ...]], n_classes: int):
        super().__init__()
        self.sizes = [max(stage) for stage in zip(*channels.values(), strict=True)]
        self.weights = nn.ParameterDict({name: torch.rand(len(self.sizes)) for name in channels})
        self.carry = nn.Parameter(torch.rand(len(self.sizes) - 1))
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(self.sizes))
        self.out = nn.Linear(self.sizes[-1], n_classes)

    def forward(self, pooled: dict[str, list[Tensor]]) -> Tensor:
        """Joint logits (B, C) from the pooled maps (B, C_m,i) of each stage of the modalities that are there."""
        u = self.weighted(pooled, 0)
        for i, layer in enumerate(self.layers):
            u = self.carry[i] * F.relu(layer(u)) + self.weighted(pooled, i + 1)
        return self.out(u)  # (B, C)

    def weighted(self, pooled: dict[str, list[Tensor]], i: int) -> Tensor:
        """The weighted sum of the modalities' maps at a stage, (B, C_i)."""
        parts = [self.weights[name][i] * F.pad(p[i], (0, self.sizes[i] - p[i].shape[1])) for name, p in pooled.items()]
        return torch.stack(parts).sum(dim=0)


class CentralNet(StagedNet):
    """Encoders with a central network that takes their pooled maps after each stage, and unimodal heads.

    The central network takes the place of the fusion head. A masked modality contributes nothing to it at any stage.
    The unimodal heads see their own modality alone.
    """

    fuses = False

    def __init__(self, inputs: dict[str, tuple[str, tuple[int, ...]]], *args: Any, **options: Any):
        super().__init__(inputs, *args, **options)
        self.head = Central(self.channels, self.n_classes)  # pyright: ignore[reportAttributeAccessIssue]

    def forward(
        self, inputs: Mapping[str, Tensor | Sequences], fed: tuple[str, ...], mask: Tensor | None = None
    ) -> Output:
        """As `MultimodalClassifier.forward`."""
        x = next(iter(inputs.values()))
        assert isinstance(x, Tensor)
        given = given_to_clips(self.names, fed, mask, x)
        with self.autocast(x):
            stages = {name: self.pooled_stages(name, own) for name, own in inputs.items()}
        pooled = {name: [p.masked_fill(~given[name], 0.0) for p in own] for name, own in stages.items()}
        features = self.zeroed({name: own[-1] for name, own in pooled.items()}, fed, mask)
        if self.unimodal == "heads":
            logits = self.unimodal_logits(features, fed)
        else:
            logits = {} if self.training else {name: self.head({name: pooled[name]}) for name in fed}
        return Output(self.head(pooled), logits, features)

    def pooled_stages(self, name: str, x: Tensor | Sequences) -> list[Tensor]:
        """The maps after each stage as a vector per clip (B, C_i); the last is the modality's feature."""
        maps, found = self.stem(name, x), []
        for stage in STAGES:
            maps = self.stage(name, stage, maps)
            found.append(squeezed(maps, len(x)))
        return [*found[:-1], self.features(name, maps, len(x))]
