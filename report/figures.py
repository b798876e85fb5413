"""Figures of a comparison: groups of runs side by side, each label with one colour in every figure."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from report.runs import Group, diagnoses, mean_by_epoch, quantities, values
from utils.files import atomic_path
from utils.plots import modality_colours

COLOURS = {"baseline": "#6b6b6b", "joint_only": "#b0b0b0", "remix": "#e08a00", "remix_random": "#f2b880"}
# Labels not named above take these in sorted order; unimodal networks have their modality's colour.
OTHERS = ("#8a4fbf", "#a0522d", "#c2a000", "#17a2b8", "#e377c2", "#4b7a1f", "#274690", "#ff6f59", "#00857c", "#9a8fd0",
          "#5c1a33", "#8fb339")  # fmt: skip


def colours_of(groups: list[Group]) -> dict[str, str]:
    """Label -> colour. Known methods, variants and modalities have fixed colours, whatever else is shown.

    Other labels take the colours in `OTHERS` in sorted order, so the order of `groups` does not matter.
    """
    known = dict(COLOURS)
    for group in groups:
        known |= modality_colours(group.modalities)
    labels = sorted({group.label for group in groups})
    others = [label for label in labels if label not in known]
    found = {label: known[label] for label in labels if label in known}
    return found | {label: OTHERS[i % len(OTHERS)] for i, label in enumerate(others)}


def plot_compared_curves(groups: list[Group], title: str, colours: dict[str, str]) -> Figure:
    """Test accuracy over epochs, a panel per head: mean of a group's seeds, band of one standard deviation."""
    heads = ("multimodal", *groups[0].modalities)
    figure = Figure(figsize=(5 * len(heads), 4.6), layout="constrained")
    axes = figure.subplots(1, len(heads), sharey=True)
    for axis, head in zip(axes, heads, strict=True):
        for group in groups:
            if values(group, head):
                _plot_spread(axis, group, quantities(group.modalities)[head], colours[group.label])
        axis.set(title=f"{head}, test accuracy", xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
    axes[0].set_ylim(top=min(1.02, axes[0].get_ylim()[1]))
    _legend_below(figure, groups, colours)
    figure.suptitle(f"{title}: mean over seeds, band ± 1 standard deviation")
    return figure


def _plot_spread(axis: Axes, group: Group, key: str, colour: str) -> None:
    lines = [run.history for run in group.runs.values()]
    # (seeds, epochs); None, where a head was not trained yet, becomes NaN: a gap in the line
    table = np.array([[line[key] for line in history] for history in lines], dtype=float)
    epochs, mean = [line["epoch"] for line in lines[0]], table.mean(axis=0)
    axis.plot(epochs, mean, color=colour, lw=1.8)
    if len(table) > 1:
        std = table.std(axis=0, ddof=1)
        axis.fill_between(epochs, mean - std, mean + std, color=colour, alpha=0.18, lw=0)


def plot_compared_bars(groups: list[Group], title: str, colours: dict[str, str]) -> Figure:
    """Accuracy after the last epoch per head: a bar for a group's mean, a dot for each seed."""
    heads = ("multimodal", *groups[0].modalities)
    figure = Figure(figsize=(max(8, 2 + 2 * len(groups)), 4.8), layout="constrained")
    axis = figure.subplots()
    width = 0.84 / len(groups)
    for i, group in enumerate(groups):
        for place, head in enumerate(heads):
            seeds = np.array(list(values(group, head).values()))
            if not len(seeds):
                continue
            colour, x = colours[group.label], place - 0.42 + (i + 0.5) * width
            axis.bar(x, seeds.mean(), 0.92 * width, color=colour, alpha=0.5)
            spots = x + 0.5 * width * (np.arange(len(seeds)) - (len(seeds) - 1) / 2) / max(1, len(seeds) - 1)
            axis.plot(spots, seeds, "o", ms=4, color=colour, mec="white", mew=0.6)
            axis.text(x, seeds.max() + 0.012, f"{100 * seeds.mean():.1f}", ha="center", fontsize=8)
    axis.set_xticks(range(len(heads)), heads)
    axis.set(ylabel="test accuracy, last epoch", ylim=(0, 1.05), title=f"{title}: bars are means, dots single seeds")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    _legend_below(figure, groups, colours)
    return figure


def plot_shares(groups: list[Group], title: str, colours: dict[str, str]) -> Figure | None:
    """Share of clips that keep a modality over epochs, a line per run; None if no group remixes.

    A panel per modality; of two the first, since the other one is the rest.
    """
    names = groups[0].modalities
    shown = names if len(names) > 2 else names[:1]
    figure = Figure(figsize=(max(8, 5 * len(shown)), 4.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(shown), sharey=True))
    for axis, name in zip(axes, shown, strict=True):
        for group in groups:
            for run in group.runs.values():
                lines = [line for line in run.history if line.get(f"n_{name}") is not None]
                shares = [line[f"n_{name}"] / max(sum(line[f"n_{other}"] for other in names), 1) for line in lines]
                if lines:
                    epochs = [line["epoch"] for line in lines]
                    axis.plot(epochs, shares, color=colours[group.label], lw=1.2, alpha=0.75)
        if not axis.lines:
            return None
        axis.axhline(1 / len(names), color="0.5", lw=0.8, ls="--")
        axis.set(title=f"{name} kept", xlabel="epoch", ylim=(0, 1))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of the training clips")
    _legend_below(figure, [group for group in groups if group.method == "remix"], colours)
    figure.suptitle(f"{title}: share of clips that keep a modality, a line per seed")
    return figure


def plot_diagnoses(groups: list[Group], title: str, colours: dict[str, str]) -> Figure | None:
    """What `--diagnose` measured over epochs, mean of a group's seeds; None if no run has it. Dotted: Remix starts."""
    shown = {}  # key -> (title, [(group, epochs, means)])
    for key, name in diagnoses(groups[0].modalities).items():
        lines = [(group, *mean_by_epoch(group, f"diagnose/{key}")) for group in groups]
        if lines := [line for line in lines if line[1]]:
            shown[key] = name, lines
    if not shown:
        return None
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(max(8, 4 * columns), 0.6 + 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (name, lines) in zip(axes, shown.values(), strict=False):
        for group, epochs, mean in lines:
            axis.plot(epochs, mean, color=colours[group.label], lw=1.5)
            starts = [line["epoch"] for run in group.runs.values() for line in run.history if line["phase"] == "remix"]
            if starts and min(starts) > epochs[0]:
                axis.axvline(min(starts), color=colours[group.label], lw=1, ls=":")
        axis.set(xlabel="epoch")
        axis.set_title(name, fontsize=10)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    measured = {group.label for _, lines in shown.values() for group, *_ in lines}
    _legend_below(figure, [group for group in groups if group.label in measured], colours)
    figure.suptitle(f"{title}: diagnostics, mean over seeds (dotted: Remix starts)")
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG completely or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _legend_below(figure: Figure, groups: list[Group], colours: dict[str, str]) -> None:
    handles = [Line2D([], [], color=colours[group.label], lw=3, label=f"{group.label} (n={len(group.runs)})")
               for group in groups]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize=9)
