"""Fusion heads: features of all modalities in, joint logits out. Definitions as in OGM-GE (CVPR 2022).

Shapes: B batch, D_m features of modality m, C classes. `features` maps every modality to (B, D_m), in the dataset's
order; a modality that is not in `fed` is masked, and its feature is zero. In a mixed batch `mask` (B, M) bool says the
same of each clip; None: all clips are fed `fed`.

What masking means. In a homogeneous batch the masked features are zero, and what remains must be a classifier of the
fed modality, because that is what the batch trains:
- concat, sum: zeros add nothing but a bias, so zeroing is enough.
- film: audio modulates video as gamma(a) * v + beta(a). At a = 0 that leaves gamma = its bias, which starts near 0 and
  would all but silence the video. A masked audio therefore modulates by the identity: gamma = 1, beta = 0.
  A masked video leaves beta(a): audio alone, through the same output layer.
- gated: audio opens a gate on the video projection. A masked audio leaves the gate open (1). A masked video leaves its
  projection's bias behind the audio's gate.

Where the logits are a sum of one part per modality (concat, sum), `slices` returns the parts. Several balance methods
read from them which modality is ahead. In film and gated no such parts exist.
"""

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


class FiLM(nn.Module):
    """Audio gives gamma and beta that modulate video, then a linear map (Perez et al., AAAI 2018)."""

    needs = ("audio", "video")

    def __init__(self, widths: dict[str, int], n_classes: int):
        super().__init__()
        self.column = list(widths).index("audio")  # of a mask
        self.fc = nn.Linear(widths["audio"], 2 * widths["video"])
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
    """The sigmoid of the audio projection gates the video projection, then a linear map (Kiela et al., AAAI 2018)."""

    needs = ("audio", "video")

    def __init__(self, widths: dict[str, int], n_classes: int):
        super().__init__()
        self.column = list(widths).index("audio")  # of a mask
        self.fc_x = nn.Linear(widths["audio"], widths["audio"])
        self.fc_y = nn.Linear(widths["video"], widths["audio"])
        self.fc_out = nn.Linear(widths["audio"], n_classes)

    def forward(self, features: Features, fed: Fed = (), mask: Tensor | None = None) -> Tensor:
        a, v = features["audio"], features["video"]
        gate = 1 + a if fed == ("video",) else torch.sigmoid(self.fc_x(a))  # (B, D); a masked a is zero
        if mask is not None:
            gate = gate.where(mask[:, self.column, None], 1.0)
        return self.fc_out(gate * self.fc_y(v))  # (B, C)


Fusion = Concat | Sum | FiLM | Gated
FUSIONS: dict[str, type[Fusion]] = {"concat": Concat, "sum": Sum, "film": FiLM, "gated": Gated}
SLICED = ("concat", "sum")  # their logits are a sum of one part per modality


def make_fusion(name: str, widths: dict[str, int], n_classes: int) -> Fusion:
    """The fusion head called `name` for features of `widths`.

    Raises `ValueError` where the head is defined for other modalities than these.
    """
    head = FUSIONS[name]
    needs = getattr(head, "needs", tuple(widths))
    if set(needs) != set(widths):
        raise ValueError(f"--fusion_method {name}: defined for the modalities {' and '.join(needs)}, the dataset has "
                         f"{', '.join(widths)}; use {' or '.join(SLICED)}")  # fmt: skip
    return head(widths, n_classes)
