"""Fusion heads: two features in, joint logits out. Definitions as in OGM-GE (CVPR 2022).

Shapes: B batch, D features per modality, C classes. `a` audio and `v` video features, each (B, D).

What masking means. In a homogeneous batch the other modality's feature is zero, and what remains must be a classifier
of the kept modality, because that is what the batch trains:
- concat, sum: zeros add nothing but a bias, so zeroing is enough.
- film: audio modulates video as gamma(a) * v + beta(a). At a = 0 that leaves gamma = its bias, which starts near 0 and
  would all but silence the video. A masked audio therefore modulates by the identity: gamma = 1, beta = 0.
  A masked video leaves beta(a): audio alone, through the same output layer.
- gated: audio opens a gate on the video projection. A masked audio leaves the gate open (1). A masked video leaves its
  projection's bias behind the audio's gate.

Where the logits are a sum of one part per modality (concat, sum), `slices` gives the parts: o_a + o_v = joint logits.
Several balance methods tell by them which modality is ahead. In film and gated no such parts exist.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Concat(nn.Linear):
    """One linear map of [a, v], audio first: the official head, its parameters named `weight` and `bias`."""

    def __init__(self, features: int, n_classes: int):
        super().__init__(2 * features, n_classes)

    def forward(self, a: Tensor, v: Tensor, kept: str = "both") -> Tensor:
        return super().forward(torch.cat([a, v], dim=1))  # (B, C)

    def slices(self, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Each modality's part of the logits, 2 x (B, C), with half of the bias each (as OGM-GE, CVPR 2022)."""
        audio, video = self.weight.chunk(2, dim=1)  # (C, D) each
        return F.linear(a, audio, self.bias / 2), F.linear(v, video, self.bias / 2)


class Sum(nn.Module):
    """A linear map per modality, added."""

    def __init__(self, features: int, n_classes: int):
        super().__init__()
        self.fc_x = nn.Linear(features, n_classes)
        self.fc_y = nn.Linear(features, n_classes)

    def forward(self, a: Tensor, v: Tensor, kept: str = "both") -> Tensor:
        return self.fc_x(a) + self.fc_y(v)  # (B, C)

    def slices(self, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Each modality's part of the logits, 2 x (B, C), with its own bias."""
        return self.fc_x(a), self.fc_y(v)


class FiLM(nn.Module):
    """Audio gives gamma and beta that modulate video, then a linear map (Perez et al., AAAI 2018)."""

    def __init__(self, features: int, n_classes: int):
        super().__init__()
        self.fc = nn.Linear(features, 2 * features)
        self.fc_out = nn.Linear(features, n_classes)

    def forward(self, a: Tensor, v: Tensor, kept: str = "both") -> Tensor:
        if kept == "video":
            return self.fc_out(v + a)  # gamma 1; beta is the zero feature, which keeps a running encoder in the graph
        gamma, beta = self.fc(a).chunk(2, dim=1)  # (B, D) each
        return self.fc_out(gamma * v + beta)  # (B, C)


class Gated(nn.Module):
    """The sigmoid of the audio projection gates the video projection, then a linear map (Kiela et al., AAAI 2018)."""

    def __init__(self, features: int, n_classes: int):
        super().__init__()
        self.fc_x = nn.Linear(features, features)
        self.fc_y = nn.Linear(features, features)
        self.fc_out = nn.Linear(features, n_classes)

    def forward(self, a: Tensor, v: Tensor, kept: str = "both") -> Tensor:
        gate = 1 + a if kept == "video" else torch.sigmoid(self.fc_x(a))  # (B, D); a masked a is zero
        return self.fc_out(gate * self.fc_y(v))  # (B, C)


FUSIONS = {"concat": Concat, "sum": Sum, "film": FiLM, "gated": Gated}
