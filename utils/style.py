"""Common style of all figures: font, sizes, fixed colours, epochs counted from 1, direct labels, file formats.

Figures are made under `styled()` and written by `save`. Colours are from two palettes for colour-blind readers:
Okabe and Ito, "Color Universal Design" (2008), for the heads and the paper's methods; "muted" of Paul Tol, "Colour
Schemes" (SRON/EPS/TN/09-002, 2021), for balance methods. Line styles, markers and direct labels are redundant, so that
no method is identified by its colour alone.
"""

import itertools
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import BboxBase, blended_transform_factory

from utils.files import atomic_path

INK, MUTED, RULE = "#222222", "#6e6e6e", "#dddddd"  # text and the joint head, remarks, grid
# Text of 8 points: a figure of two panels fills a page's width in print without being scaled. DejaVu Sans comes with
# matplotlib, so a figure is the same on every machine.
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 8, "mathtext.fontset": "dejavusans", "text.color": INK,
    "axes.titlesize": 8, "axes.titlelocation": "left", "axes.labelsize": 8, "axes.labelcolor": INK,
    "axes.edgecolor": MUTED, "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": RULE, "grid.linewidth": 0.5,
    "xtick.labelsize": 7, "ytick.labelsize": 7, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "xtick.major.size": 2.5, "ytick.major.size": 2.5, "lines.linewidth": 1.4, "lines.markersize": 3.5,
    "figure.titlesize": 9, "figure.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.06, "figure.constrained_layout.w_pad": 0.06,
    "figure.facecolor": "white", "savefig.facecolor": "white", "savefig.dpi": 200,
    "pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "figure",
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------- colours

JOINT_COLOUR = INK
MODALITY_COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#b59f00", "#7f4f24")  # by place in the dataset's order
# The paper's methods and their controls.
METHOD_COLOURS = {"baseline": "#6e6e6e", "joint_only": "#b0b0b0", "remix": "#d55e00", "remix_random": "#e69f00"}
MUTED_PALETTE = ("#332288", "#44aa99", "#882255", "#999933", "#88ccee", "#aa4499", "#117733", "#cc6677", "#ddcc77")
STROKES = (("-", "o"), ("--", "s"), ("-.", "^"))  # line style and marker of each round through the palette
# Append only: a method's place is its colour, line style and marker.
BALANCE_METHODS = ("ogm_ge", "agm", "pmr", "mmpareto", "gblend", "opm", "mmcosine", "dr", "mla", "resample", "greedy",
                   "lfm", "umt", "cml", "reconboost", "dgl", "inforeg", "midas")  # fmt: skip


class Look(NamedTuple):
    """Style of a method: colour, line style, marker."""

    colour: str
    line: str
    marker: str


def modality_colours(names: Sequence[str]) -> dict[str, str]:
    """Colour of each modality by its place: audio and video of the paper's datasets are the first two."""
    return {name: MODALITY_COLOURS[i % len(MODALITY_COLOURS)] for i, name in enumerate(names)}


def looks(labels: Iterable[str], modalities: Sequence[str] = ()) -> dict[str, Look]:
    """Style of each label of a comparison, independent of the order of `labels`.

    A label is `method[ + balance method ...][, flag value ...]`, as in the rows of a report. Method and balance method
    have one look in every figure: known ones from the tables above, others from a checksum of their name. Labels that
    differ in flags only are shades of it, in the order of the flags' values.
    """
    siblings: dict[str, list[str]] = {}
    for label in sorted(set(labels), key=_natural):
        siblings.setdefault(label.split(", ")[0], []).append(label)
    found = {}
    for base, own in siblings.items():
        look = _look_of(base, modality_colours(modalities))
        markers = itertools.cycle(dict.fromkeys((look.marker, "o", "s", "^", "D", "v", "P")))
        for i, label in enumerate(own):  # the one without flags sorts first
            shade = 0.55 * i / max(1, len(own) - 1)
            found[label] = look._replace(colour=_lighter(look.colour, shade), marker=next(markers))
    return found


def _look_of(base: str, modalities: dict[str, str]) -> Look:
    method, *balance = base.split(" + ")
    if not balance and (colour := (METHOD_COLOURS | modalities).get(method)):
        return Look(colour, "--" if method in modalities else "-", "o")
    name = "+".join(balance) or method
    known = name in BALANCE_METHODS
    place = BALANCE_METHODS.index(name) if known else zlib.crc32(name.encode())
    line, marker = STROKES[place // len(MUTED_PALETTE)] if known else (":", "v")
    # Together with Remix a balance method keeps its colour and is told by line and marker.
    return Look(MUTED_PALETTE[place % len(MUTED_PALETTE)], *((":", "D") if method == "remix" else (line, marker)))


def _lighter(colour: str, share: float) -> str:
    """`colour` mixed with a share of white."""
    return to_hex(tuple((1 - share) * np.array(to_rgb(colour)) + share))


def readable(colour: str) -> str:
    """`colour`, darkened as far as text of it on white needs for a contrast of 3 : 1 (WCAG 2.1, 1.4.11)."""
    rgb = np.array(to_rgb(colour))
    while 1.05 / (_luminance(rgb) + 0.05) < 3:
        rgb *= 0.97
    return to_hex(tuple(rgb))


def _luminance(rgb: np.ndarray) -> float:
    """Relative luminance of an sRGB colour (3,) in [0, 1], as WCAG defines it."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def _natural(text: str) -> list:
    """A key that sorts numbers in a text by value: warmup 5 before warmup 10."""
    return [(0, float(part), "") if _is_number(part) else (1, 0.0, part) for part in re.split(r"[ ,]+", text)]


def _is_number(text: str) -> bool:
    try:
        return np.isfinite(float(text))
    except ValueError:
        return False


# ------------------------------------------------------------------------------------------------- parts of a figure


def styled() -> Any:
    """The style, as a context or as a decorator of the function that makes a figure."""
    return matplotlib.rc_context(STYLE)


def panels(
    columns: int, rows: int = 1, width: float = 2.3, height: float = 1.9, **shared: Any
) -> tuple[Figure, np.ndarray]:
    """A figure of rows x columns axes (array of that shape), each `width` x `height` inches, titles apart."""
    figure = Figure(figsize=(columns * width, rows * height + 0.45), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def caption(figure: Figure, title: str, note: str = "") -> None:
    """The title above, and below what lines, bands, bars and points are."""
    figure.suptitle(title, x=0.01, ha="left")
    if note:
        figure.supxlabel(note, x=0.01, ha="left", fontsize=6.5, color=MUTED)


def epoch_axis(axis: Axes, epochs: Sequence[int]) -> None:
    """Integer ticks over `epochs`, which count from 1; one epoch has a tick and room on both sides."""
    axis.set(xlabel="epoch", xlim=(min(epochs) - 0.5, max(epochs) + 0.5))
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))


def mark_warmup(axis: Axes, first: int, text: bool = True) -> None:
    """A dashed line before `first`, the first epoch of Remix counted from 1, with a label next to it if there is space.

    To be called after `epoch_axis`.
    """
    axis.axvline(first - 0.5, color=MUTED, lw=0.8, ls=(0, (4, 2)), zorder=1)
    low, high = axis.get_xlim()
    left = first - 0.5 - low > 0.28 * (high - low)
    where = blended_transform_factory(axis.transData, axis.transAxes)
    axis.annotate("" if not text else "warm-up" if left else "warm-up ends", (first - 0.5, 1), xycoords=where,
                  xytext=(-2 if left else 2, -1), textcoords="offset points", ha="right" if left else "left", va="top",
                  fontsize=6.5, color=MUTED, path_effects=[withStroke(linewidth=2, foreground="white")],
                  zorder=5)  # fmt: skip


End = tuple[str, str, float]  # of a line: its name, colour and last y


def label_ends(panels: Iterable[tuple[Axes, Iterable[End]]]) -> None:
    """Name the lines of each axes at its right edge. To be called when limits and caption are final.

    Texts that would overlap are moved apart, and stay in the order of their lines.
    """
    panels = [(axis, sorted(ends, key=lambda end: end[2])) for axis, ends in panels]
    figure = panels[0][0].get_figure(root=True) if panels else None
    if figure is None:
        return
    figure.draw_without_rendering()  # the layout is not known before
    for axis, ends in panels:
        pixels = [axis.transData.transform((1, y))[1] for _, _, y in ends]  # on any scale
        wanted = np.array(pixels) / figure.dpi * 72  # points
        where = blended_transform_factory(axis.transAxes, axis.transData)
        for (text, colour, y), at, place in zip(ends, wanted, _apart(wanted, 8.5), strict=True):
            axis.annotate(text, (1, y), xycoords=where, xytext=(3, place - at), textcoords="offset points", fontsize=7,
                          color=readable(colour), va="center", annotation_clip=False)  # fmt: skip


def _apart(wanted: np.ndarray, gap: float) -> np.ndarray:
    """The sorted places (n,) moved as little as possible (least squares) to be `gap` apart."""
    from scipy.optimize import isotonic_regression  # late: not every command draws

    least = gap * np.arange(len(wanted))
    return isotonic_regression(wanted - least).x + least


def label_points(axis: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Name points (name, x, y) at their side: inside the axes, clear of its lines and of other names where possible.

    Lines are single points, or parallel to an axis. To be called when limits and caption are final.
    """
    figure = axis.get_figure(root=True)
    if figure is None:
        return
    figure.draw_without_rendering()  # the layout is not known before
    taken: list[BboxBase] = [line.get_window_extent() for line in axis.lines]
    for name, x, y in points:
        text = axis.annotate(name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=6.5, color=MUTED,
                             va="center_baseline")  # fmt: skip
        costs = {}
        for height, side in itertools.product((4, -6, 12, -14, 20, -22, 0), ("left", "right")):
            text.set(ha=side, position=(5 if side == "left" else -5, height))
            box = text.get_window_extent()
            outside = box.x0 < axis.bbox.x0 or box.x1 > axis.bbox.x1 or not axis.bbox.y0 < box.y0 < axis.bbox.y1
            costs[height, side] = 10 * outside + box.count_overlaps(taken), box
        height, side = min(costs, key=lambda key: costs[key][0])  # the first of equals: close, at the right
        text.set(ha=side, position=(5 if side == "left" else -5, height))
        taken.append(costs[height, side][1])


# ------------------------------------------------------------------------------------------------------------ files


def save(figure: Figure, stem: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Write `<stem>.<format>` for each format, each completely or not at all; returns the paths.

    Equal figures are equal files: no dates are written.
    """
    dates = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    paths = [stem.with_name(f"{stem.name}.{name}") for name in formats]
    for name, path in zip(formats, paths, strict=True):
        with styled(), atomic_path(path) as temporary:
            figure.savefig(temporary, metadata=dates.get(name, {}))
    return paths
