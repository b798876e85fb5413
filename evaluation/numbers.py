"""Metrics of one part of the data from logits: a few flat numbers per epoch, all metrics for a checkpoint.

Shapes: N clips, C classes.
"""

from argparse import Namespace
from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from balance.diagnostics import calibration_error
from models import SHARED_HEADS
from utils.metrics import accuracy, confusion, f1_macro


def fed_to(args: Namespace, names: tuple[str, ...]) -> tuple[str, ...]:
    """The modalities that joint batches and predictions of a run feed: all, or the one that `--method` names."""
    return (args.method,) if args.method in names else names


def trained_heads(args: Namespace) -> tuple[str, ...]:
    """Modalities whose unimodal head is trained by a loss in some epoch; other heads keep their initial weights."""
    if args.unimodal == "masked" or args.fusion_method in SHARED_HEADS:  # the joint loss trains what gives the logits
        return fed_to(args, tuple(args.joint_weights))
    alone = [name for name, weight in args.alone_weights.items() if weight > 0]
    if args.method in args.alone_weights:
        return (args.method,) if args.method in alone else ()
    remixed = alone if args.method == "remix" else []
    return tuple(name for name, weight in args.joint_weights.items() if weight > 0 or name in remixed)


def evaluate(logits: dict[str, Tensor], labels: Tensor, part: str, args: Namespace) -> dict[str, float | None]:
    """Flat numbers of one part ("test" or "val"): accuracies are fractions in [0, 1], None for a head not trained.

    `logits` can also contain `slice_<modality>` (`models.inference.collect`).
    """
    trained = trained_heads(args)
    numbers: dict[str, float | None] = {f"{part}_acc": accuracy(logits["joint"], labels)}
    for name in args.joint_weights:
        numbers[f"{part}_acc_{name}"] = accuracy(logits[name], labels) if name in trained else None
        if f"slice_{name}" in logits:
            numbers[f"{part}_slice_{name}"] = accuracy(logits[f"slice_{name}"], labels)
    numbers[f"{part}_f1_macro"] = f1_macro(logits["joint"], labels)
    numbers[f"{part}_loss"] = F.cross_entropy(logits["joint"], labels).item()
    return numbers


def measure(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> dict:
    """All numbers of logits (N, C) with labels (N,), as plain values.

    `accuracy` and `f1_macro` in [0, 1]; `nll`, the mean negative log-likelihood in nats; `ece`, the expected
    calibration error in [0, 1] over 15 equal bins of confidence (Guo et al., ICML 2017); `per_class`, by class:
    `clips`, and in [0, 1] `precision` (0 for a class that is never predicted), `recall` (None without clips) and `f1`;
    `confusion`, counts (C, C): row the label, column the prediction.
    """
    counts = confusion(logits, labels)
    hits, clips, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    precision, recall = hits / np.maximum(predicted, 1), hits / np.maximum(clips, 1)
    f1 = 2 * hits / np.maximum(clips + predicted, 1)
    per_class = {
        name: {"clips": int(clips[i]), "precision": float(precision[i]),
               "recall": float(recall[i]) if clips[i] else None, "f1": float(f1[i])}
        for i, name in enumerate(classes)
    }  # fmt: skip
    logits, labels = logits.cpu().double(), labels.cpu()  # on the host: not every device computes in float64
    return {
        "accuracy": accuracy(logits, labels),
        "f1_macro": f1_macro(logits, labels),
        "nll": F.cross_entropy(logits, labels).item(),
        "ece": calibration_error(logits, labels),
        "per_class": per_class,
        "confusion": counts.tolist(),
    }
