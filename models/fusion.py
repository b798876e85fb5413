"""Fusion heads: map the features of all modalities to joint logits. Formulas and sources: docs/fusion.md.

Shapes: B batch, D_m features of modality m, C classes. `features` maps every modality to (B, D_m), in the dataset's
order; a modality that is not in `fed` is masked, and its feature is zero. In a mixed batch `mask` (B, M) bool says the
same of each clip; None: all clips are fed `fed`.

What masking means. In a homogeneous batch the masked features are zero, and what remains must be a classifier of the
fed modality, because that is what the batch trains:
- concat, sum: zeros add nothing but a bias, so zeroing is enough.
- decision: the mean over all modalities of their unimodal logits. A masked modality adds its head's bias, and the fed
  one's logits are still divided by M. decision_drop takes the mean over the modalities that are fed.
- film: audio modulates video as gamma(a) * v + beta(a). At a = 0 that leaves gamma = its bias, which starts near 0 and
  would all but silence the video. A masked audio therefore modulates by the identity: gamma = 1, beta = 0.
  A masked video leaves beta(a): audio alone, through the same output layer.
- gated: audio opens a gate on the video projection. A masked audio leaves the gate open (1). A masked video leaves its
  projection's bias behind the audio's gate.
- bigated: each modality gates the other. A masked modality leaves the fed one's gate half open (the sigmoid of a bias
  near 0), which is about its value with an average clip, so zeroing is enough.

The names ending in `_bias1` start a bias at 1 that the fed modality is multiplied by, so that it reaches the output
layer at the first step already: gamma's in film, those of the gated projections in gated and bigated.

Where the logits are a sum of one part per modality (`SLICED`), `slices` returns the parts. Several balance methods read
from them which modality is ahead. In film, gated and bigated no such parts exist.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Features = dict[str, Tensor]
Fed = tuple[str, ...]


class Concat(nn.Linear):
    """One linear map of the concatenated features: the official head, its parameters named `weight` and `bias`."""

    def __init__(self, widths: dict[str, int], n_classes: int):
        super().__init__(sum(widths.values()), n_classes)
        self.widths = dict(widths)

    def forward(self, features: Features, fed: Fed = (), mask: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return F.linear(torch.cat(list(features.values()), dim=1), self.weight, self.bias)  # (B, C)

    def weights(self) -> dict[str, Tensor]:
        """Each modality's columns of the weight, (C, D_m)."""
        return dict(zip(self.widths, self.weight.split(list(self.widths.values()), dim=1), strict=True))

    def slices(self, features: Features) -> dict[str, Tensor]:
        """Each modality's part of the logits (B, C), with an equal share of the bias (as OGM-GE, CVPR 2022)."""
        bias = self.bias / len(self.widths)
        return {name: F.linear(features[name], weight, bias) for name, weight in self.weights().items()}


class Sum(nn.Module):
    """A linear map per modality, added."""

    def __init__(self, widths: dict[str, int], n_classes: int):
        super().__init__()
        self.maps = nn.ModuleDict({name: nn.Linear(width, n_classes) for name, width in widths.items()})

    def forward(self, features: Features, fed: Fed = (), mask: Tensor | None = None) -> Tensor:
        first, *others = self.slices(features).values()
        return sum(others, first)  # (B, C)

    def weights(self) -> dict[str, Tensor]:
        """Each modality's weight, (C, D_m)."""
        return {name: layer.get_parameter("weight") for name, layer in self.maps.items()}

    def slices(self, features: Features) -> dict[str, Tensor]:
        """Each modality's part of the logits (B, C), with its own bias."""
        return {name: layer(features[name]) for name, layer in self.maps.items()}


class Decision(nn.Module):
    """The mean of the unimodal heads' logits: late fusion. It has no parameters of its own.

    The network puts its unimodal heads, a linear map per modality, into `shared`, so the losses of the joint head and
    of the unimodal heads train the same parameters. With `drop` the mean is over the fed modalities of each clip;
    without it a masked one counts too, with the logits of zero features.
    """

    def __init__(self, widths: dict[str, int], n_classes: int, drop: bool = False):
        super().__init__()
        self.drop = drop
        self.shared: list[nn.ModuleDict] = []  # a list, so that they are not registered here as well

    def logits(self, features: Features, names: Iterable[str]) -> Tensor:
        """The logits of each of `names`, (names, B, C)."""
        return torch.stack([self.shared[0][name](features[name]) for name in names])

    def forward(self, features: Features, fed: Fed = (), mask: Tensor | None = None) -> Tensor:
        names = tuple(features)
        if not self.drop:
            return self.logits(features, names).mean(dim=0)  # (B, C)
        fed = fed or names
        logits = self.logits(features, fed)  # (fed, B, C)
        if mask is not None:
            given = torch.stack([mask[:, names.index(name), None] for name in fed])  # (fed, B, 1)
            return (logits * given).sum(dim=0) / given.sum(dim=0)
        # Sums of zero features keep the encoder of a masked modality in the graph where it runs.
        masked = [features[name].sum(dim=1, keepdim=True) for name in names if name not in fed]
        return sum(masked, logits.mean(dim=0))

    def slices(self, features: Features) -> dict[str, Tensor]:
        """Each modality's part of the mean of all (B, C), with its own bias."""
        heads = self.shared[0]
        return {name: layer(features[name]) / len(heads) for name, layer in heads.items()}


class FiLM(nn.Module):
    """Audio gives gamma and beta that modulate video, then a linear map (Perez et al., AAAI 2018).

    `bias` is the initial value of gamma's bias (None: PyTorch's).
    """

    needs = ("audio", "video")

    def __init__(self, widths: dict[str, int], n_classes: int, bias: float | None = None):
        super().__init__()
        self.column = list(widths).index("audio")  # of a mask
        self.fc = nn.Linear(widths["audio"], 2 * widths["video"])
        if bias is not None:
            nn.init.constant_(self.fc.bias[: widths["video"]], bias)
        self.fc_out = nn.Linear(widths["video"], n_classes)

    def forward(self, features: Features, fed: Fed = (), mask: Tensor | None = None) -> Tensor:
        a, v = features["audio"], features["video"]
        if fed == ("video",):
            # gamma 1, beta 0: a sum of the zero feature, which keeps a running encoder in the graph
            return self.fc_out(v + a.sum(dim=1, keepdim=True))
        gamma, beta = self.fc(a).chunk(2, dim=1)  # (B, D) each
        if mask is not None:
            given = mask[:, self.column, None]  # (B, 1)
            gamma, beta = gamma.where(given, 1.0), beta.where(given, 0.0)
        return self.fc_out(gamma * v + beta)  # (B, C)


class Gated(nn.Module):
    """The sigmoid of the audio projection gates the video projection, then a linear map (Kiela et al., AAAI 2018).

    `bias` is the initial bias of the video projection (None: PyTorch's), all that a lone audio's gate acts on.
    """

    needs = ("audio", "video")

    def __init__(self, widths: dict[str, int], n_classes: int, bias: float | None = None):
        super().__init__()
        self.column = list(widths).index("audio")  # of a mask
        self.fc_x = nn.Linear(widths["audio"], widths["audio"])
        self.fc_y = nn.Linear(widths["video"], widths["audio"])
        if bias is not None:
            nn.init.constant_(self.fc_y.bias, bias)
        self.fc_out = nn.Linear(widths["audio"], n_classes)

    def forward(self, features: Features, fed: Fed = (), mask: Tensor | None = None) -> Tensor:
        a, v = features["audio"], features["video"]
        gate = 1 + a if fed == ("video",) else torch.sigmoid(self.fc_x(a))  # (B, D); a masked a is zero
        if mask is not None:
            gate = gate.where(mask[:, self.column, None], 1.0)
        return self.fc_out(gate * self.fc_y(v))  # (B, C)


class BiGated(nn.Module):
    """Projections of two modalities gate each other, then a linear map of both products (MMCosine, ICASSP 2023).

    p_m = P_m z_m + b_m; o = W [sig(p_2) * p_1; sig(p_1) * p_2] + b. `bias` is the initial b_m (None: PyTorch's).
    """

    needs = 2

    def __init__(self, widths: dict[str, int], n_classes: int, bias: float | None = None):
        super().__init__()
        width = next(iter(widths.values()))
        self.maps = nn.ModuleDict({name: nn.Linear(own, width) for name, own in widths.items()})
        self.fc_out = nn.Linear(2 * width, n_classes)
        if bias is not None:
            for layer in self.maps.values():
                nn.init.constant_(layer.get_parameter("bias"), bias)

    def forward(self, features: Features, fed: Fed = (), mask: Tensor | None = None) -> Tensor:
        first, second = (layer(features[name]) for name, layer in self.maps.items())  # (B, D) each
        gated = torch.sigmoid(second) * first, torch.sigmoid(first) * second
        return self.fc_out(torch.cat(gated, dim=1))  # (B, C)


Fusion = Concat | Sum | Decision | FiLM | Gated | BiGated


class Kind(NamedTuple):
    """A fusion head and the options it is made with."""

    head: type[Fusion]
    options: dict[str, Any] = {}  # noqa: RUF012  (never written to)


FUSIONS = {
    "concat": Kind(Concat),
    "sum": Kind(Sum),
    "decision": Kind(Decision),
    "decision_drop": Kind(Decision, {"drop": True}),
    "film": Kind(FiLM),
    "film_bias1": Kind(FiLM, {"bias": 1.0}),
    "gated": Kind(Gated),
    "gated_bias1": Kind(Gated, {"bias": 1.0}),
    "bigated": Kind(BiGated),
    "bigated_bias1": Kind(BiGated, {"bias": 1.0}),
}
SLICED = tuple(name for name, kind in FUSIONS.items() if hasattr(kind.head, "slices"))
SHARED_HEADS = tuple(name for name, kind in FUSIONS.items() if kind.head is Decision)  # the joint loss trains them too


def make_fusion(name: str, widths: dict[str, int], n_classes: int) -> Fusion:
    """The fusion head called `name` for features of `widths`.

    Raises `ValueError` where the head is defined for other modalities than these.
    """
    kind, options = FUSIONS[name]
    needs = getattr(kind, "needs", None)
    wanted = None
    if isinstance(needs, tuple) and set(needs) != set(widths):
        wanted = f"the modalities {' and '.join(needs)}"
    elif isinstance(needs, int) and needs != len(widths):
        wanted = f"{needs} modalities"
    if wanted:
        raise ValueError(f"--fusion_method {name}: defined for {wanted}, the dataset has {', '.join(widths)}; use "
                         f"{' or '.join(SLICED)}")  # fmt: skip
    return kind(widths, n_classes, **options)
