"""The two figures of one run: its curves and its confusion matrices."""

from collections.abc import Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

JOINT_COLOUR = "#1b1b1b"
MODALITY_COLOURS = ("#d1495b", "#2e6fbb", "#1b9e77", "#b8860b", "#7b52ab", "#5f6b73")  # by place in the dataset's order


def modality_colours(names: Sequence[str]) -> dict[str, str]:
    """Colour of each modality: audio and video of the paper's datasets are the first two."""
    return {name: MODALITY_COLOURS[i % len(MODALITY_COLOURS)] for i, name in enumerate(names)}


def plot_curves(history: list[dict], names: Sequence[str], title: str) -> Figure:
    """Test accuracy and training cross entropy per head and, after Remix, the partition over epochs.

    `history` has one dict per epoch (a run's metrics.jsonl), `names` are the dataset's modalities. The warm-up is
    shaded. Runs without `train_ce_<head>` show their weighted training loss instead.
    """
    epochs = [line["epoch"] for line in history]
    remixed = [line for line in history if line.get(f"n_{names[0]}") is not None]
    figure = Figure(figsize=(15 if remixed else 10, 4), layout="constrained")
    axes = figure.subplots(1, 3 if remixed else 2)
    _plot_heads(axes[0], history, names, "test_acc", "test_acc_{}")
    axes[0].set(title="test accuracy", ylim=(0, 1))
    if any(line.get("train_ce_joint") is not None for line in history):
        _plot_heads(axes[1], history, names, "train_ce_joint", "train_ce_{}")
        axes[1].set(title="training cross entropy")
    else:
        axes[1].plot(epochs, [line["train_loss"] for line in history], color=JOINT_COLOUR)
        axes[1].set(title="training loss")
    if remixed:
        steps = [line["epoch"] for line in remixed]
        counts = np.array([[line[f"n_{name}"] for line in remixed] for name in names], dtype=float)  # (M, epochs)
        shares = counts / np.maximum(counts.sum(axis=0), 1)
        below = np.cumsum(shares, axis=0) - shares
        for name, share, bottom in zip(names, shares, below, strict=True):
            axes[2].bar(steps, share, width=1.0, bottom=bottom, color=modality_colours(names)[name], label=name)
        axes[2].set(title="share of clips that keep a modality", ylim=(0, 1))
        for axis in axes[:2]:
            axis.axvspan(epochs[0], min(steps), color="0.92", zorder=0)
    for axis in axes:
        axis.set(xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="best")
    figure.suptitle(title)
    return figure


def _plot_heads(axis: Axes, history: list[dict], names: Sequence[str], joint: str, unimodal: str) -> None:
    """A line per head that has numbers: the joint head's metric `joint`, each modality's `unimodal`."""
    heads = {"multimodal": (joint, JOINT_COLOUR, 2.0)}
    heads |= {name: (unimodal.format(name), colour, 1.3) for name, colour in modality_colours(names).items()}
    for label, (key, colour, width) in heads.items():
        values = np.array([line.get(key) for line in history], dtype=float)  # None becomes NaN: a gap in the line
        if not np.isnan(values).all():
            axis.plot(
                [line["epoch"] for line in history], values, color=colour, label=label, lw=width, marker=".", ms=3
            )


def plot_confusion(matrices: dict[str, np.ndarray], classes: list[str], title: str) -> Figure:
    """Confusion matrices (C, C) side by side, rows normalised: of the clips of a class, the share named each class."""
    figure = Figure(figsize=(4.6 * len(matrices), 4.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(matrices)))
    images = []
    for axis, (name, counts) in zip(axes, matrices.items(), strict=True):
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        images.append(axis.imshow(shares, vmin=0, vmax=1, cmap="viridis"))
        axis.set(title=f"{name}: {np.trace(counts) / max(counts.sum(), 1):.3f}", xlabel="predicted", ylabel="label")
        if len(classes) <= 40:
            axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
            axis.set_yticks(range(len(classes)), classes, fontsize=7)
    figure.colorbar(images[-1], ax=axes, shrink=0.8, label="share of the class")
    figure.suptitle(title)
    return figure
