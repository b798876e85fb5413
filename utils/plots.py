"""The pictures people look at first: a run's curves and its confusion matrices."""

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib.figure import Figure

COLOURS = {"multimodal": "#1b1b1b", "audio": "#d1495b", "video": "#2e6fbb"}


def plot_curves(history: list[dict], title: str) -> Figure:
    """Accuracy on test, training loss and, where there was one, the partition over epochs; the warm-up is shaded."""
    epochs = [line["epoch"] for line in history]
    remixed = [line for line in history if line.get("n_audio") is not None]
    figure = Figure(figsize=(15 if remixed else 10, 4), layout="constrained")
    axes = figure.subplots(1, 3 if remixed else 2)
    for name, key in (("multimodal", "test_acc"), ("audio", "test_acc_audio"), ("video", "test_acc_video")):
        values = [line.get(key) for line in history]
        if any(value is not None for value in values):
            values = [np.nan if value is None else value for value in values]
            axes[0].plot(epochs, values, color=COLOURS[name], label=name, lw=2 if name == "multimodal" else 1.3)
    axes[0].set(title="test accuracy", xlabel="epoch", ylim=(0, 1))
    axes[0].legend(loc="lower right")
    axes[1].plot(epochs, [line["train_loss"] for line in history], color="#1b1b1b")
    axes[1].set(title="training loss", xlabel="epoch")
    if remixed:
        steps = [line["epoch"] for line in remixed]
        shares = [[line[key] for line in remixed] for key in ("n_audio", "n_video")]
        axes[2].stackplot(steps, *shares, labels=["audio", "video"], colors=[COLOURS["audio"], COLOURS["video"]])
        axes[2].set(title="clips kept per modality", xlabel="epoch")
        axes[2].legend(loc="lower right")
        for axis in axes[:2]:
            axis.axvspan(epochs[0], min(steps), color="0.92", zorder=0, label="warm-up")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    return figure


def plot_confusion(matrices: dict[str, np.ndarray], classes: list[str], title: str) -> Figure:
    """Confusion matrices (C, C) side by side, rows normalised: of the clips of a class, the share named each class."""
    figure = Figure(figsize=(4.6 * len(matrices), 4.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(matrices)))
    for axis, (name, counts) in zip(axes, matrices.items(), strict=True):
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="viridis")
        axis.set(title=f"{name}: {np.trace(counts) / max(counts.sum(), 1):.3f}", xlabel="predicted", ylabel="label")
        if len(classes) <= 40:
            axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
            axis.set_yticks(range(len(classes)), classes, fontsize=7)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the class")
    figure.suptitle(title)
    return figure
