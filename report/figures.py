"""Figures of a comparison: learning curves, differences with intervals, partitions, diagnostics.

`forest` draws any given rows; the `plot_` functions read groups of runs. `utils.style` defines the style of each label.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from report.runs import (
    Difference,
    Group,
    ablations,
    diagnoses,
    differing_flags,
    excludes_zero,
    mean_by_epoch,
    paired_difference,
    quantities,
    reference_of,
    short,
    spread,
    values,
)
from report.tables import UNLIKE, difference_text
from utils.style import (
    INK,
    MUTED,
    End,
    Look,
    caption,
    epoch_axis,
    label_ends,
    looks,
    mark_warmup,
    panels,
    save,
    styled,
)

CURVES = 5  # largest number of groups in one panel; with more, each has its own panel


def looks_of(groups: Iterable[Group]) -> dict[str, Look]:
    """Label -> colour, line and marker. The style of a method is the same in every figure."""
    groups = list(groups)
    return looks([group.label for group in groups], groups[0].modalities if groups else ())


# ------------------------------------------------------------------------------------------------------ differences


class Effect(NamedTuple):
    """A row of a forest plot: a mean difference with its interval, over n pairs.

    In the unit that the table prints, usually points of accuracy in percent. `low` and `high` are None where there is
    no interval. Rows of one `section` stand under its name. `mark` is put behind the number, as in the tables.
    """

    label: str
    mean: float
    low: float | None
    high: float | None
    n: int
    section: str = ""
    mark: str = ""


@styled()
def forest(
    rows: Sequence[Effect],
    path: Path | None = None,
    title: str = "",
    xlabel: str = "difference in test accuracy (points)",
    note: str = "",
    formats: Sequence[str] = ("png",),
    drawn: dict[str, Look] | None = None,
) -> Figure:
    """Forest plot: for each row a dot at the mean, a bar over the interval, and the numbers as the tables print them.

    Rows stand in the order given; a section's name stands above its first row. A filled dot is a difference whose
    interval excludes zero. An interval wider than the plot ends in an arrow. `drawn` are the looks of the labels
    (default: `utils.style.looks`). With `path` (no suffix) the figure is written there in `formats`.
    """
    drawn = looks(row.label for row in rows) | (drawn or {})
    places, heads, y = [], {}, 0.0
    for before, row in zip([None, *rows], rows, strict=False):
        if row.section and (before is None or before.section != row.section):
            heads[y + (0.35 if before is not None else 0)] = row.section
            y += 1.35 if before is not None else 1
        places.append(y)
        y += 1
    figure = Figure(figsize=(6.75, 0.95 + 0.19 * (y + 1)), layout="constrained")
    axis = figure.subplots()
    low, high = limits_of(rows)
    axis.axvline(0, color=INK, lw=0.8)
    for row, place in zip(rows, places, strict=True):
        draw_effect(axis, row, place, drawn[row.label], (low, high))
    axis.set(xlim=(low, high), ylim=(y - 0.3, -0.9), xlabel=xlabel)
    axis.grid(True, axis="x")
    axis.grid(False, axis="y")
    axis.spines["left"].set_visible(False)
    axis.set_yticks([*places, *heads], [*(row.label for row in rows), *heads.values()])
    for text in axis.get_yticklabels()[len(rows) :]:
        text.set_fontweight("bold")
    axis.tick_params(axis="y", length=0, labelsize=7.5)
    _beside(axis, -0.9, "mean [95 % interval]", "n", MUTED)
    for row, place in zip(rows, places, strict=True):
        _beside(axis, place, difference_text(row.mean, row.low, row.high, row.mark), str(row.n))
    _align_left(axis)
    words = "Filled: the interval excludes zero." if any(excludes_zero(row.low, row.high) for row in rows) else ""
    caption(figure, title, " ".join(text for text in (note, words) if text))
    if path:
        save(figure, path, formats)
    return figure


def limits_of(rows: Sequence[Effect]) -> tuple[float, float]:
    """Limits that show zero and every mean, and intervals up to twice that span beyond them."""
    means = [0.0, *(row.mean for row in rows)]
    span = max(max(means) - min(means), 0.1)
    low = max(min([*means, *(row.low for row in rows if row.low is not None)]), min(means) - 2 * span)
    high = min(max([*means, *(row.high for row in rows if row.high is not None)]), max(means) + 2 * span)
    room = 0.06 * max(high - low, 1)
    return low - room, high + room


def draw_effect(axis: Axes, row: Effect, y: float, look: Look, limits: tuple[float, float]) -> None:
    """Draw a mean with its interval at height y: filled where it excludes zero, with an arrow where it is cut off."""
    if row.low is not None and row.high is not None:
        ends = np.clip([row.low, row.high], *limits)
        axis.plot(ends, [y, y], color=look.colour, lw=1.4, solid_capstyle="butt")
        for end, wanted, marker in zip(ends, (row.low, row.high), ("<", ">"), strict=True):
            shown = "|" if end == wanted else marker
            axis.plot([end], [y], shown, color=look.colour, ms=4, clip_on=False)
    face = look.colour if excludes_zero(row.low, row.high) else "white"
    axis.plot([row.mean], [y], look.marker, color=look.colour, mfc=face, mew=1.2, ms=5, zorder=3)


def _beside(axis: Axes, y: float, numbers: str, n: str, colour: str = INK) -> None:
    """Write the two text columns to the right of the plot, in row y."""
    where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
    style = {"fontsize": 7, "va": "center_baseline", "color": colour}
    axis.annotate(numbers, (1, y), xytext=(10, 0), ha="left", **where, **style)
    axis.annotate(n, (1, y), xytext=(122, 0), ha="right", **where, **style)


def _align_left(axis: Axes) -> None:
    """Align the row labels at their left, as in a table."""
    figure = axis.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    texts = axis.get_yticklabels()
    width = max((text.get_window_extent().width for text in texts), default=0) / figure.dpi * 72
    axis.tick_params(axis="y", pad=width + 6)
    for text in texts:
        text.set(ha="left", va="center_baseline")


def effect(label: str, found: Difference, section: str = "", mark: str = "") -> Effect:
    """A row of a forest plot, in points, from a difference of accuracies in [0, 1]."""
    low, high = (None if end is None else 100 * end for end in (found.low, found.high))
    return Effect(label, 100 * found.mean, low, high, found.n, section, mark)


def differences(groups: list[Group]) -> list[Effect]:
    """Each group's paired difference to its baseline after the last epoch, a section for each head.

    They are the numbers of the tables. Above 8 groups only those of the joint head.
    """
    rows = []
    for quantity in ("multimodal", *(groups[0].modalities if len(groups) <= 8 else ())):
        for group in groups:
            reference = reference_of(group, groups)
            found = reference and paired_difference(values(group, quantity), values(reference, quantity))
            if reference and found:
                mark = UNLIKE if differing_flags(group, reference) else ""
                rows.append(effect(group.label, found, quantity, mark))
    return rows


def plot_differences(groups: list[Group], title: str, drawn: dict[str, Look]) -> Figure | None:
    """Forest plot of `differences`; None where no group has a baseline."""
    rows = differences(groups)
    note = "Last epoch, paired over seeds; bars are 95 % t intervals."
    return forest(rows, title=f"{title}: difference to the baseline", note=note, drawn=drawn) if rows else None


def plot_ablations(groups: list[Group], title: str, drawn: dict[str, Look]) -> Figure | None:
    """Forest plot of one flag at a time, joint head, a section for each centre; None without an ablation."""
    rows = []
    for group, centre, name in ablations(groups):
        if name == "balance":  # a method, which `plot_differences` shows
            continue
        found = paired_difference(values(group, "multimodal"), values(centre, "multimodal"))
        change = f"{name} {short(centre.flags.get(name, 'off'))} → {short(group.flags.get(name, 'off'))}"
        rows += [effect(change, found, f"against {centre.label}")] if found else []
    plain = dict.fromkeys((row.label for row in rows), Look(INK, "-", "o"))
    note = "Joint head, last epoch, paired over seeds; bars are 95 % t intervals."
    return forest(rows, title=f"{title}: one flag at a time", note=note, drawn=plain) if rows else None


# ------------------------------------------------------------------------------------------------------------ curves


def seeds_text(groups: Iterable[Group]) -> str:
    """`n = 3 seeds`, or the least and the largest number."""
    counts = sorted({len(group.runs) for group in groups})
    span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"n = {span} seed{'' if counts == [1] else 's'}"


@styled()
def plot_compared_curves(groups: list[Group], title: str, drawn: dict[str, Look]) -> Figure:
    """Test accuracy over epochs, a panel per head: mean of a group's seeds, band of one standard deviation.

    With multimodal methods in the figure, a network trained on one modality alone is a dashed horizontal line at its
    accuracy after the last epoch, as the ceiling of that modality. With more than `CURVES` groups, each group has its
    own panel, with the baseline in grey.
    """
    names = groups[0].modalities
    levels = [group for group in groups if group.method in names]
    levels = levels if len(levels) < len(groups) else []
    curves = [group for group in groups if group not in levels]
    note = f"Mean over {seeds_text(groups)}; bands are ± 1 standard deviation."
    if len(curves) > CURVES:
        note += " Grey: the baseline of each."
        return _plot_small_multiples(curves, title, note, drawn)
    note += " Dashed: a network of that modality alone, last epoch." if levels else ""
    figure, axes = _panels_with_labels(1 + len(names), groups)
    caption(figure, f"{title}: test accuracy", note)
    _plot_heads(axes, curves, levels, drawn)
    return figure


def _panels_with_labels(columns: int, groups: Iterable[Group]) -> tuple[Figure, list[Axes]]:
    """A row of panels with room for the groups' labels at their right."""
    letters = max(len(group.label) for group in groups)
    figure, axes = panels(columns, width=2.0 + 0.055 * max(letters, 12), height=2.2, sharey=True)
    return figure, list(axes.flat)


def _plot_heads(axes: list[Axes], curves: list[Group], levels: list[Group], drawn: dict[str, Look]) -> None:
    """Draw in each head's panel a curve for each group of `curves` and a horizontal line for each of `levels`."""
    names = curves[0].modalities
    ends: list[list[End]] = []  # of each panel
    for axis, head in zip(axes, ("multimodal", *names), strict=True):
        shown = [group for group in curves if values(group, head)]
        means = [(group, _plot_spread(axis, group, quantities(names)[head], drawn[group.label])) for group in shown]
        ends.append([(group.label, drawn[group.label].colour, mean[-1]) for group, mean in means])
        for group in levels:
            if level := spread(values(group, head).values()):
                axis.axhline(level.mean, color=drawn[group.label].colour, lw=1, ls=(0, (4, 2)))
                ends[-1].append((f"{group.label} alone", drawn[group.label].colour, level.mean))
        axis.set_title(f"{head} head" if head in names else head)
        epoch_axis(axis, _epochs(curves))
        _mark_starts(axis, shown)
    low, high = axes[0].get_ylim()
    axes[0].set(ylabel="test accuracy", ylim=(max(0, low), min(1, high)))
    label_ends(zip(axes, ends, strict=True))


def _epochs(groups: Iterable[Group]) -> list[int]:
    """The first and the last epoch of any run, counted from 1."""
    return [1, max(line["epoch"] + 1 for group in groups for run in group.runs.values() for line in run.history)]


def _plot_spread(axis: Axes, group: Group, key: str, look: Look) -> np.ndarray:
    """Draw a group's mean with its band; returns the mean of each epoch."""
    lines = [run.history for run in group.runs.values()]
    # (seeds, epochs); None, where a head was not trained yet, becomes NaN: a gap in the line
    table = np.array([[line[key] for line in history] for history in lines], dtype=float)
    epochs, mean = [line["epoch"] + 1 for line in lines[0]], table.mean(axis=0)
    axis.plot(epochs, mean, color=look.colour, ls=look.line, marker=look.marker, markevery=max(1, len(epochs) // 8),
              label=group.label)  # fmt: skip
    if len(table) > 1:
        std = table.std(axis=0, ddof=1)
        axis.fill_between(epochs, mean - std, mean + std, color=look.colour, alpha=0.15, lw=0)
        if len(epochs) == 1:  # a band without width
            axis.errorbar(epochs, mean, std, color=look.colour, capsize=3, lw=1)
    return mean


def plot_mean(axis: Axes, group: Group, key: str, label: str, colour: str, line: str = "-") -> End | None:
    """Draw the mean curve of a metric. Returns its name, colour and last value, or None if no epoch has it."""
    epochs, means = mean_by_epoch(group, key)
    marker = "o" if len(epochs) <= 30 else ""
    axis.plot([epoch + 1 for epoch in epochs], means, color=colour, ls=line, marker=marker, ms=2.5, label=label)
    return (label, colour, means[-1]) if means else None


def _plot_small_multiples(groups: list[Group], title: str, note: str, drawn: dict[str, Look]) -> Figure:
    """A small panel per group: its multimodal accuracy over that of its baseline."""
    columns = min(5, len(groups))
    figure, axes = panels(columns, -(-len(groups) // columns), 1.45, 1.35, sharex=True, sharey=True)
    caption(figure, f"{title}: multimodal test accuracy", note)
    for axis, group in zip(axes.flat, groups, strict=False):
        if reference := reference_of(group, groups):
            _plot_spread(axis, reference, "test_acc", Look(MUTED, "-", ""))
        _plot_spread(axis, group, "test_acc", drawn[group.label]._replace(marker="", line="-"))
        axis.set_title(group.label.replace(", ", ",\n"), fontsize=6.5)
        epoch_axis(axis, _epochs(groups))
        axis.set_xlabel("")
        _mark_starts(axis, [group], text=False)
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    for axis in axes.flat[max(0, len(groups) - columns) : len(groups)]:  # the lowest of each column
        axis.set_xlabel("epoch")
        axis.tick_params(labelbottom=True)
    return figure


def _mark_starts(axis: Axes, groups: list[Group], text: bool = True) -> None:
    """Draw a vertical line at the end of each warm-up in `groups`; none for runs that remix from the first epoch."""
    starts = {next((line["epoch"] for line in run.history if line["phase"] == "remix"), 0)
              for group in groups for run in group.runs.values()}  # fmt: skip
    for i, first in enumerate(sorted(starts - {0})):
        mark_warmup(axis, first + 1, text=text and i == 0)


@styled()
def plot_shares(groups: list[Group], title: str, drawn: dict[str, Look]) -> Figure | None:
    """Share of clips that keep a modality over epochs, a line per run; None if no group remixes.

    A panel per modality; with two modalities only the first, because the shares sum to 1.
    """
    names = groups[0].modalities
    shown = names if len(names) > 2 else names[:1]
    figure, axes = _panels_with_labels(len(shown), groups)
    caption(figure, f"{title}: kept modality", "A line for each seed. Dotted: equal shares.")
    labels: list[tuple[Axes, list[End]]] = []
    for axis, name in zip(axes, shown, strict=True):
        ends: dict[str, list[float]] = {}
        for group in groups:
            for run in group.runs.values():
                lines = [line for line in run.history if line.get(f"n_{name}") is not None]
                shares = [line[f"n_{name}"] / max(sum(line[f"n_{other}"] for other in names), 1) for line in lines]
                if lines:
                    look, epochs = drawn[group.label], [line["epoch"] + 1 for line in lines]
                    axis.plot(epochs, shares, color=look.colour, ls=look.line, lw=1, alpha=0.75,
                              marker=look.marker if len(lines) == 1 else "")  # fmt: skip
                    ends.setdefault(group.label, []).append(shares[-1])
        if not ends:
            return None
        axis.set(title=f"{name} kept", ylim=(0, 1))
        epoch_axis(axis, _epochs(groups))
        axis.axhline(1 / len(names), color=MUTED, lw=0.8, ls=":")
        _mark_starts(axis, [group for group in groups if group.label in ends])
        labels.append((axis, [(label, drawn[label].colour, float(np.mean(last))) for label, last in ends.items()]))
    label_ends(labels)
    axes[0].set_ylabel("share of the training clips")
    return figure


@styled()
def plot_diagnoses(groups: list[Group], title: str, drawn: dict[str, Look]) -> Figure | None:
    """Values of `--diagnose` over epochs, mean of a group's seeds; None if no run has them."""
    shown = {}  # key -> (title, [(group, epochs, means)])
    for key, name in diagnoses(groups[0].modalities).items():
        lines = [(group, *mean_by_epoch(group, f"diagnose/{key}")) for group in groups]
        if lines := [line for line in lines if line[1]]:
            shown[key] = name, lines
    if not shown:
        return None
    columns = min(3, len(shown))
    figure, axes = panels(columns, -(-len(shown) // columns), width=2.75, height=2.0)
    caption(figure, f"{title}: diagnostics", f"Mean over {seeds_text(groups)}.")
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, (name, lines) in zip(axes.flat, shown.values(), strict=False):
        for group, epochs, mean in lines:
            look = drawn[group.label]
            axis.plot([epoch + 1 for epoch in epochs], mean, color=look.colour, ls=look.line, marker=look.marker,
                      markevery=max(1, len(epochs) // 8))  # fmt: skip
        axis.set_title(name)
        epoch_axis(axis, _epochs(groups))
        _mark_starts(axis, [group for group, *_ in lines])
    label_ends((axis, [(group.label, drawn[group.label].colour, mean[-1]) for group, _, mean in lines])
               for axis, (_, lines) in zip(axes.flat, shown.values(), strict=False))  # fmt: skip
    return figure
