"""The pictures people look at first: a run's curves and its confusion matrices."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from utils.files import atomic_path
from utils.runs import QUANTITIES, Group, mean_by_epoch, values

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


# Groups of runs (`utils.runs.Group`) in a comparison: a colour each, the same from figure to figure.
GROUP_COLOURS = ("#6b6b6b", "#e08a00", "#1b7f5c", "#8a4fbf", "#d1495b", "#2e6fbb", "#a0522d", "#c2a000")
HEADS = ("multimodal", "audio", "video")


def plot_compared_curves(groups: list[Group], title: str) -> Figure:
    """Test accuracy over epochs, a panel for each head: mean of a group's seeds, band of one standard deviation."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, head in zip(axes, HEADS, strict=True):
        for i, group in enumerate(groups):
            if not values(group, head):
                continue
            lines = [run.history for run in group.runs.values()]
            table = np.array([[line[QUANTITIES[head]] for line in history] for history in lines])  # (seeds, epochs)
            epochs, mean = [line["epoch"] for line in lines[0]], table.mean(axis=0)
            axis.plot(epochs, mean, color=_colour(i), lw=1.8)
            if len(table) > 1:
                std = table.std(axis=0, ddof=1)
                axis.fill_between(epochs, mean - std, mean + std, color=_colour(i), alpha=0.18, lw=0)
        axis.set(title=f"{head}, test accuracy", xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0].set_ylim(top=min(1.02, axes[0].get_ylim()[1]))
    _legend_below(figure, groups)
    figure.suptitle(f"{title}: mean over seeds, band ± 1 standard deviation")
    return figure


def plot_compared_bars(groups: list[Group], title: str) -> Figure:
    """Accuracy after the last epoch per head: a bar for a group's mean, a dot for each seed."""
    figure = Figure(figsize=(max(8, 2 + 2 * len(groups)), 4.8), layout="constrained")
    axis = figure.subplots()
    width = 0.84 / len(groups)
    for i, group in enumerate(groups):
        for place, head in enumerate(HEADS):
            seeds = np.array(list(values(group, head).values()))
            if not len(seeds):
                continue
            x = place - 0.42 + (i + 0.5) * width
            axis.bar(x, seeds.mean(), 0.92 * width, color=_colour(i), alpha=0.5)
            spots = x + 0.5 * width * (np.arange(len(seeds)) - (len(seeds) - 1) / 2) / max(1, len(seeds) - 1)
            axis.plot(spots, seeds, "o", ms=4, color=_colour(i), mec="white", mew=0.6)
            axis.text(x, seeds.max() + 0.012, f"{100 * seeds.mean():.1f}", ha="center", fontsize=8)
    axis.set_xticks(range(len(HEADS)), HEADS)
    axis.set(ylabel="test accuracy, last epoch", ylim=(0, 1.05), title=f"{title}: bars are means, dots single seeds")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    _legend_below(figure, groups)
    return figure


def plot_shares(groups: list[Group], title: str) -> Figure | None:
    """Share of clips that keep audio over epochs, a line per run, for the groups that remix; None if none does."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axis = figure.subplots()
    for i, group in enumerate(groups):
        for run in group.runs.values():
            lines = [line for line in run.history if line.get("n_audio") is not None]
            shares = [line["n_audio"] / max(line["n_audio"] + line["n_video"], 1) for line in lines]
            if lines:
                axis.plot([line["epoch"] for line in lines], shares, color=_colour(i), lw=1.2, alpha=0.75)
    if not axis.lines:
        return None
    axis.axhline(0.5, color="0.5", lw=0.8, ls="--")
    axis.set(title=f"{title}: share of clips that keep audio, a line per seed", xlabel="epoch", ylim=(0, 1))
    axis.set_ylabel("audio kept (the rest keeps video)")
    axis.grid(alpha=0.3)
    _legend_below(figure, groups, [group.method == "remix" for group in groups])
    return figure


DIAGNOSES = {
    "clash_cosine_audio": "audio encoder: cosine of joint\nand unimodal gradient",
    "clash_cosine_video": "video encoder: cosine of joint\nand unimodal gradient",
    "unimodal_gap": "imbalance: accuracy of the audio\nhead minus the video head",
    "shapley_audio": "Shapley value of audio",
    "shapley_video": "Shapley value of video",
    "ece_joint": "calibration error, joint head",
    "kept_audio": "share of clips that keep audio",
    "moved": "share of clips that changed\nmodality since the last scoring",
}


def plot_diagnoses(groups: list[Group], title: str) -> Figure | None:
    """What `--diagnose` measured over epochs, mean of a group's seeds; None if no run has it. Dotted: Remix starts."""
    figure = Figure(figsize=(16, 7.4), layout="constrained")
    for axis, (key, name) in zip(figure.subplots(2, 4).flat, DIAGNOSES.items(), strict=True):
        for i, group in enumerate(groups):
            epochs, mean = mean_by_epoch(group, f"diagnose/{key}")
            axis.plot(epochs, mean, color=_colour(i), lw=1.5)
            starts = [line["epoch"] for run in group.runs.values() for line in run.history if line["phase"] == "remix"]
            if epochs and starts and min(starts) > epochs[0]:
                axis.axvline(min(starts), color=_colour(i), lw=1, ls=":")
        axis.set(xlabel="epoch")
        axis.set_title(name, fontsize=10)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    if not any(axis.lines and len(axis.lines[0].get_xdata()) for axis in figure.axes):
        return None
    _legend_below(figure, groups, [bool(mean_by_epoch(group, "diagnose/ece_joint")[0]) for group in groups])
    figure.suptitle(f"{title}: diagnostics, mean over seeds (dotted: Remix starts)")
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """As a PNG that is there whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _colour(i: int) -> str:
    return GROUP_COLOURS[i % len(GROUP_COLOURS)]


def _legend_below(figure: Figure, groups: list[Group], shown: list[bool] | None = None) -> None:
    handles = [Line2D([], [], color=_colour(i), lw=3, label=f"{group.label} (n={len(group.runs)})")
               for i, group in enumerate(groups) if shown is None or shown[i]]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize=9)
