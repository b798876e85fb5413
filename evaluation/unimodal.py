"""Unimodal accuracy by its four definitions in the literature, which differ by many points.

Shapes: N clips, C classes, D_m features of modality m.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models import MultimodalClassifier

# Source of a unimodal accuracy, as printed -> its definition.
SOURCES = {
    "head": "the modality's own head on its features",
    "slice": "the modality's part of the joint logits: its weights and its share of the bias, as in OGM-GE",
    "masked": "the joint head with the features of the other modalities masked",
    "probe": "logistic regression on the frozen features, fitted on the training clips",
}
COSTS = (0.01, 0.1, 1.0, 10.0)  # C of the probe, of which validation chooses
COST = 1.0  # scikit-learn's default, where there is no validation part
TINY = float(np.finfo(np.float32).tiny)


def slices(model: MultimodalClassifier, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each modality's part of the joint logits (N, C); {} where the fusion head's logits are no sum of such parts."""
    return model.head.slices(features) if hasattr(model.head, "slices") else {}  # pyright: ignore[reportCallIssue]


def masked(model: MultimodalClassifier, features: dict[str, Tensor], fed: tuple[str, ...]) -> dict[str, Tensor]:
    """The joint head's logits (N, C) from each fed modality alone, the other features being masked.

    {} if modalities interact before their features: the features of one modality alone would need another forward pass.
    """
    return {} if not model.late else {name: model.masked(features, name) for name in fed}


# ----------------------------------------------------------------------------------------------------- linear probe


class Probe(NamedTuple):
    """Log-probabilities (N, C) of a linear probe on the test clips, and the inverse strength C of its penalty."""

    logits: Tensor
    cost: float


class Labelled(NamedTuple):
    """Features (N, D) and labels (N,) of one part."""

    features: Tensor
    labels: Tensor


def linear_probe(train: Labelled, test: Tensor, n_classes: int, val: Labelled | None = None) -> Probe | None:
    """Logistic regression on the standardised features of `train`, applied to `test` (N, D).

    L2 penalty. C is the value in `COSTS` with the best accuracy on `val` (the smallest one on a tie), or `COST` without
    a validation part. Returns None if all training clips have the same class.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = train.features.cpu().double().numpy(), train.labels.cpu().numpy()
    if len(np.unique(y)) < 2:
        return None
    fitted = {cost: make_pipeline(StandardScaler(), LogisticRegression(C=cost, max_iter=1000)).fit(x, y)
              for cost in (COSTS if val else (COST,))}  # fmt: skip
    hits = {cost: probe.score(val.features.cpu().numpy(), val.labels.cpu().numpy()) if val else 0.0
            for cost, probe in fitted.items()}  # fmt: skip
    cost = max(hits, key=lambda cost: (hits[cost], -cost))
    # A class without training clips has no column; its probability is as good as zero.
    logits = np.full((len(test), n_classes), np.log(TINY))
    logits[:, fitted[cost].classes_] = np.log(fitted[cost].predict_proba(test.cpu().double().numpy()).clip(TINY))
    return Probe(torch.from_numpy(logits), cost)


def has_head(model: MultimodalClassifier, name: str, trained: tuple[str, ...]) -> bool:
    """Whether the network's logits of the modality `name` are those of a unimodal head that was trained."""
    return name in trained and model.unimodal == "heads"
