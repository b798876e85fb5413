"""Figures of a run: learning curves and confusion matrices."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.style import JOINT_COLOUR, caption, epoch_axis, label_ends, mark_warmup, modality_colours, panels, styled

VALUES = 40  # classes up to which a confusion matrix names classes and shows the value of each cell


@styled()
def plot_curves(history: list[dict], names: Sequence[str], title: str) -> Figure:
    """Test accuracy, training accuracy and training cross entropy per head, and after Remix the partition, over epochs.

    `history` has one dict per epoch (a run's metrics.jsonl), `names` are the dataset's modalities. Epochs count from 1.
    A dashed line ends the warm-up. Runs without `train_ce_<head>` show their weighted training loss instead.
    """
    epochs = [line["epoch"] + 1 for line in history]
    kinds = [("test accuracy", "test_acc", "test_acc_{}"), ("training accuracy", "train_acc_joint", "train_acc_{}"),
             ("training cross entropy", "train_ce_joint", "train_ce_{}")]  # fmt: skip
    kinds = [kind for kind in kinds if any(line.get(kind[1]) is not None for line in history)]
    if len(kinds) == 1:
        kinds.append(("training loss, weighted", "train_loss", ""))
    remixed = [line for line in history if line.get(f"n_{names[0]}") is not None]
    count = len(kinds) + bool(remixed)
    figure, axes = panels(2 if count == 4 else count, 2 if count == 4 else 1, width=2.9)
    caption(figure, title, "Training numbers are means over the clips that are fed to a head.")
    for axis, (name, joint, unimodal) in zip(axes.flat, kinds, strict=False):
        _plot_heads(axis, history, names, joint, unimodal)
        axis.set_title(name)
        axis.set_ylim(0, 1 if "accuracy" in name else 1.08 * max(axis.dataLim.y1, 1e-6))
    if remixed:
        _plot_shares(axes.flat[count - 1], remixed, names)
    for axis in axes.flat:
        epoch_axis(axis, epochs)
        if remixed and (first := remixed[0]["epoch"] + 1) > epochs[0]:
            mark_warmup(axis, first)
    ends = [(axis, _ends(history, names, *kind[1:])) for axis, kind in zip(axes.flat, kinds, strict=False)]
    label_ends([*ends, *([(axes.flat[count - 1], _share_ends(remixed, names))] if remixed else [])])
    return figure


def _heads(names: Sequence[str], joint: str, unimodal: str) -> dict[str, tuple[str, str]]:
    """Head -> (the key of its numbers, colour); only the joint one without a `unimodal` key."""
    heads = {"multimodal": (joint, JOINT_COLOUR)}
    own = {name: (unimodal.format(name), colour) for name, colour in modality_colours(names).items()}
    return heads | own if unimodal else heads


def _ends(history: list[dict], names: Sequence[str], joint: str, unimodal: str) -> list[tuple[str, str, float]]:
    """Name, colour and last number of each head that has numbers."""
    last = {head: (colour, [line[key] for line in history if line.get(key) is not None])
            for head, (key, colour) in _heads(names, joint, unimodal).items()}  # fmt: skip
    return [(head, colour, values[-1]) for head, (colour, values) in last.items() if values]


def _plot_heads(axis: Axes, history: list[dict], names: Sequence[str], joint: str, unimodal: str) -> None:
    """A line per head that has numbers. An epoch without a number is a gap, one between two gaps a dot."""
    for label, (key, colour) in _heads(names, joint, unimodal).items():
        values = np.array([line.get(key) for line in history], dtype=float)  # None becomes NaN
        if not np.isnan(values).all():
            width = 1.8 if label == "multimodal" else 1.2
            marker = "o" if len(history) <= 30 else None
            epochs = [line["epoch"] + 1 for line in history]
            axis.plot(epochs, values, color=colour, label=label, lw=width, marker=marker, ms=2.5)


def _shares(remixed: list[dict], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Share of the clips that keep each modality in each epoch of Remix, (M, epochs); the sum of those before it."""
    counts = np.array([[line[f"n_{name}"] for line in remixed] for name in names], dtype=float)  # (M, epochs)
    shares = counts / np.maximum(counts.sum(axis=0), 1)
    return shares, np.cumsum(shares, axis=0) - shares


def _share_ends(remixed: list[dict], names: Sequence[str]) -> list[tuple[str, str, float]]:
    """Name, colour and middle of each modality's last bar."""
    shares, below = _shares(remixed, names)
    return [
        (name, modality_colours(names)[name], y) for name, y in zip(names, (below + shares / 2)[:, -1], strict=True)
    ]


def _plot_shares(axis: Axes, remixed: list[dict], names: Sequence[str]) -> None:
    """Stacked bars of `_shares`."""
    steps = [line["epoch"] + 1 for line in remixed]
    for name, share, bottom in zip(names, *_shares(remixed, names), strict=True):
        axis.bar(steps, share, width=1.0 if len(steps) > 30 else 0.85, bottom=bottom,
                 color=modality_colours(names)[name], label=name)  # fmt: skip
    axis.set(title="share of clips that keep a modality", ylim=(0, 1))


@styled()
def plot_confusion(matrices: dict[str, np.ndarray], classes: list[str], title: str) -> Figure:
    """Confusion matrices (C, C), one for each head, with the accuracy of each.

    Rows are normalised: a cell is the percentage of a class's clips that were named as the column's class. Cells that
    round to 0 are empty. Above `VALUES` classes there are no names and no values.
    """
    count, written = len(classes), len(classes) <= VALUES
    side = min(max(0.24 * count if count <= 15 else 0.17 * count, 1.7), 7)
    columns = len(matrices) if side < 4 else min(2, len(matrices))
    rows = -(-len(matrices) // columns)
    figure, axes = panels(columns, rows, width=side + 0.5, height=side + 0.6)
    size = 5.5 if count <= 15 else 4
    for axis in axes.flat[len(matrices) :]:
        axis.set_axis_off()
    for axis, (name, counts) in zip(axes.flat, matrices.items(), strict=False):
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        right = np.trace(counts) / max(counts.sum(), 1)
        axis.set(title=f"{name}, accuracy {100 * right:.1f} %", xlabel="predicted", ylabel="label")
        axis.grid(False)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0, pad=2)
        axis.set_xticks(range(count) if written else [], classes if written else [])
        axis.set_yticks(range(count) if written else [], classes if written else [])
        long = max(map(len, classes)) > 3
        axis.tick_params(axis="x", labelrotation=90 if long else 0)
        axis.tick_params(labelsize=6.5 if count <= 15 else 5)
        for i, j in np.argwhere(shares >= 0.005) if written else ():
            axis.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", fontsize=size,
                      color="white" if shares[i, j] > 0.55 else JOINT_COLOUR)  # fmt: skip
    caption(figure, title, "Percentage of a class's clips (row) named as each class (column).")
    return figure
