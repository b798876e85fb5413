"""Numbers from logits. Shapes: N clips, C classes."""

import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of clips whose highest logit is their label's, in [0, 1]. logits (N, C), labels (N,)."""
    return float(accuracy_score(labels.cpu().numpy(), logits.argmax(1).cpu().numpy()))


def f1_macro(logits: Tensor, labels: Tensor) -> float:
    """Mean of the per-class F1 over all C classes, 0 for a class that never appears. logits (N, C), labels (N,)."""
    classes = range(logits.shape[1])
    truth, predicted = labels.cpu().numpy(), logits.argmax(1).cpu().numpy()
    return float(f1_score(truth, predicted, labels=classes, average="macro", zero_division=0))


def confusion(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Counts (C, C): row the label, column the prediction."""
    classes = range(logits.shape[1])
    return confusion_matrix(labels.cpu().numpy(), logits.argmax(1).cpu().numpy(), labels=classes)
