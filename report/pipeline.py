"""The figure of the method: difficulty -> decouple -> reassemble -> train, as SVG for light and dark pages.

    python -m report.pipeline                # writes docs/figures/pipeline-light.svg and pipeline-dark.svg

What the figure shows is computed by the functions that it explains: `remix.decouple` and `remix.reassemble`, on the
difficulties in `DIFFICULTY`. Coordinates are pixels.
"""

import re
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable
from math import log2
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import torch

import remix
from dataset.specs import AUDIO, VIDEO
from report.write import write_text
from utils.cli import Parser
from utils.errors import run_main

NAMES = (AUDIO, VIDEO)
CLASSES, BATCH = 6, 3
# KL from uniform in bits of 8 clips in 2 modalities: sound is mostly easy, as on the paper's datasets.
DIFFICULTY = torch.tensor([[2.41, 0.83], [1.97, 1.12], [0.64, 1.58], [2.22, 0.47],
                           [1.05, 1.90], [2.05, 1.36], [0.92, 2.10], [1.76, 0.59]])  # fmt: skip

THEMES = {
    "light": {"ink": "#1f2328", "muted": "#656d76", "line": "#c4cad1", "panel": "#f6f8fa", "paper": "#ffffff",
              "hard": "#d55e00", AUDIO: "#0072b2", VIDEO: "#009e73"},
    "dark": {"ink": "#e6edf3", "muted": "#9198a1", "line": "#484f58", "panel": "#161b22", "paper": "#0d1117",
             "hard": "#f0883e", AUDIO: "#58a6e8", VIDEO: "#3fc99b"},
}  # fmt: skip
WIDTH, HEIGHT = 1136, 456
TOP, ROW, CELL = 106, 35, (56, 27)  # y of the first clip, distance of two, size of a cell
SCORE, KEEP, BATCHES, TRAIN = 208, 368, 528, 780  # x of the columns
FONT = "-apple-system, 'Segoe UI', Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"


class Drawing:
    """SVG elements in the colours of a theme: a colour is a key of `THEMES[theme]`, or none."""

    def __init__(self, theme: str):
        self.colours, self.parts = THEMES[theme] | {"none": "none"}, []

    def rect(self, x: float, y: float, w: float, h: float, fill: str = "none", stroke: str = "none", r: float = 4,
             opacity: float = 1.0, dashed: bool = False) -> None:  # fmt: skip
        dash = ' stroke-dasharray="3 3"' if dashed else ""
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{r:g}" '
                          f'fill="{self.colours[fill]}" fill-opacity="{opacity:.2f}" '
                          f'stroke="{self.colours[stroke]}" stroke-width="1.2"{dash}/>')  # fmt: skip

    def text(self, x: float, y: float, text: str, size: float = 13, colour: str = "ink", anchor: str = "start",
             bold: bool = False) -> None:  # fmt: skip
        """One line. `_{...}` is a subscript, `*...*` italic."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{self.colours[colour]}" '
                          f'text-anchor="{anchor}"{weight}>{_spans(text, size)}</text>')  # fmt: skip

    def path(
        self,
        d: str,
        colour: str = "muted",
        fill: str = "none",
        width: float = 1.5,
        arrow: bool = False,
        dashed: bool = False,
    ) -> None:
        more = (' marker-end="url(#arrow)"' if arrow else "") + (' stroke-dasharray="4 3"' if dashed else "")
        self.parts.append(f'<path d="{d}" fill="{self.colours[fill]}" stroke="{self.colours[colour]}" '
                          f'stroke-width="{width:g}" stroke-linejoin="round"{more}/>')  # fmt: skip

    def svg(self, title: str) -> str:
        tip = f'<path d="M0 0.5L7 4L0 7.5z" fill="{self.colours["muted"]}"/>'
        arrow = (f'<marker id="arrow" viewBox="0 0 8 8" refX="6.5" refY="4" markerWidth="9" markerHeight="9" '
                 f'markerUnits="userSpaceOnUse" orient="auto">{tip}</marker>')  # fmt: skip
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
                f'height="{HEIGHT}" font-family="{FONT}" role="img">')  # fmt: skip
        return "\n".join([head, f"<title>{escape(title)}</title>", f"<defs>{arrow}</defs>", *self.parts, "</svg>\n"])


def _spans(text: str, size: float) -> str:
    """`text` with subscripts and italics as spans: shifted by dy, since not every browser has baseline-shift."""
    parts, back = [], ""
    for plain, sub, italic in re.findall(r"([^_*]+)|_\{([^}]*)\}|\*([^*]*)\*", text):
        if sub:
            parts.append(f'<tspan dy="{0.22 * size:.1f}" font-size="{0.72 * size:.1f}">{escape(sub)}</tspan>')
            back = f' dy="{-0.22 * size:.1f}"'
        else:
            style = ' font-style="italic"' if italic else ""
            parts.append(f"<tspan{back}{style}>{escape(italic or plain)}</tspan>")
            back = ""
    return "".join(parts)


# ------------------------------------------------------------------------------------------------------------- glyphs


def _glyph(d: Drawing, name: str, clip: int, x: float, y: float, w: float, h: float) -> None:
    """A clip in one modality: a waveform, or a picture of a scene."""
    rng = np.random.default_rng(17 * clip + len(name))
    if name == NAMES[0]:
        bars = np.convolve(rng.uniform(0.15, 1, 13), [0.25, 0.5, 0.25], "same") * np.hanning(15)[1:-1] ** 0.35
        step = (w - 10) / (len(bars) - 1)
        lines = (f"M{x + 5 + i * step:.1f} {y + h / 2 - high * (h / 2 - 3):.1f}v{high * (h - 6):.1f}"
                 for i, high in enumerate(bars))  # fmt: skip
        d.path("".join(lines), name, width=2)
        return
    peak, sun = rng.uniform(0.3, 0.55), rng.uniform(0.68, 0.85)
    d.path(f"M{x + 4:.1f} {y + h - 4:.1f}L{x + peak * w:.1f} {y + 7:.1f}L{x + (peak + 0.2) * w:.1f} {y + h - 9:.1f}"
           f"l{0.08 * w:.1f} -5L{x + w - 4:.1f} {y + h - 4:.1f}z", name, name)  # fmt: skip
    d.path(f"M{x + sun * w - 3:.1f} {y + 8:.1f}a3 3 0 1 0 6 0a3 3 0 1 0 -6 0", name, name)


def _tile(d: Drawing, name: str, clip: int, x: float, y: float, w: float = CELL[0], h: float = CELL[1]) -> None:
    d.rect(x, y, w, h, name, name, opacity=0.14)
    _glyph(d, name, clip, x, y, w, h)


def _box(
    d: Drawing, x: float, y: float, w: float, h: float, lines: Iterable[str], colour: str, on: bool = True
) -> None:
    """A block of the network; dashed if it is unused."""
    lines = list(lines)
    d.rect(x, y, w, h, colour if on else "none", colour, opacity=0.14, dashed=not on, r=6)
    for i, line in enumerate(lines):
        d.text(
            x + w / 2, y + h / 2 + 4.5 + 17 * (i - (len(lines) - 1) / 2), line, 14, "ink" if on else "muted", "middle"
        )


# ----------------------------------------------------------------------------------------------------------- columns


def _head(d: Drawing, x: float, number: str, name: str, words: str) -> None:
    if number:
        d.parts.append(f'<circle cx="{x + 11}" cy="26" r="11" fill="{d.colours["ink"]}"/>')
        d.text(x + 11, 31, number, 14, "paper", "middle", bold=True)
    d.text(x + (29 if number else 0), 32, name, 17, bold=True)
    d.text(x, 60, words, 14, "muted")


def _names(d: Drawing, x: float) -> None:
    for m, name in enumerate(NAMES):
        d.text(x + m * (CELL[0] + 4) + CELL[0] / 2, TOP - 10, name, 14, name, "middle", bold=True)


def _clips(d: Drawing) -> None:
    _head(d, 16, "", "Training clips", "after a joint warm-up")
    _names(d, 50)
    for i in range(len(DIFFICULTY)):
        y = TOP + i * ROW
        d.text(34, y + CELL[1] / 2 + 4.5, str(i + 1), 14, "muted", "middle")
        for m, name in enumerate(NAMES):
            _tile(d, name, i, 50 + m * (CELL[0] + 4), y)


def _shade(hard: float) -> float:
    """Opacity of a cell, from easy (0) to hard (1)."""
    return 0.06 + 0.6 * hard


def _scores(d: Drawing, keep: np.ndarray) -> None:
    _head(d, SCORE, "1", "Score", "KL from uniform, in bits")
    _names(d, SCORE)
    for i, row in enumerate(DIFFICULTY.tolist()):
        for m, value in enumerate(row):
            x, y = SCORE + m * (CELL[0] + 4), TOP + i * ROW
            d.rect(x, y, *CELL, "hard", "hard" if keep[i, m] else "none", opacity=_shade(1 - value / log2(CLASSES)))
            d.text(x + CELL[0] / 2, y + CELL[1] / 2 + 4.5, f"{value:.2f}", 14, anchor="middle")
    y = TOP + len(DIFFICULTY) * ROW + 8
    for i in range(6):
        d.rect(SCORE + 34 + 8 * i, y, 8, 8, "hard", opacity=_shade(1 - i / 5), r=0)
    d.text(SCORE + 28, y + 8, "hard", 13.5, "muted", "end")
    d.text(SCORE + 88, y + 8, "easy", 13.5, "muted")


def _kept(d: Drawing, keep: np.ndarray) -> None:
    _head(d, KEEP, "2", "Decouple", "each keeps its hardest")
    _names(d, KEEP)
    for i, m in np.ndindex(keep.shape):
        x, y = KEEP + m * (CELL[0] + 4), TOP + i * ROW
        if keep[i, m]:
            _tile(d, NAMES[m], i, x, y)
        else:
            d.rect(x, y, *CELL, stroke="line", dashed=True)
    d.text(KEEP + CELL[0] + 2, TOP + len(keep) * ROW + 16, "*k*_{i} = argmin_{m} *D*_{im}", 14, anchor="middle")


def _batches(d: Drawing, plan: list[remix.Batch]) -> None:
    _head(d, BATCHES, "3", "Reassemble", "batches of one modality")
    gap = 12
    high = (len(DIFFICULTY) * ROW - (ROW - CELL[1]) - (len(plan) - 1) * gap) / len(plan)
    for b, batch in enumerate(plan):
        y, (name,) = TOP + b * (high + gap), batch.fed
        d.rect(BATCHES, y, 210, high, "panel", name, r=8)
        d.text(BATCHES + 12, y + 21, f"batch {b + 1}: {name}", 14, name, bold=True)
        for i, clip in enumerate(batch.clips.tolist()):
            x = BATCHES + 12 + 64 * i
            _tile(d, name, clip, x, y + 31)
            d.text(x + CELL[0] / 2, y + 73, str(clip + 1), 13.5, "muted", "middle")
    d.text(BATCHES + 105, TOP + len(DIFFICULTY) * ROW + 16, "shuffled within a modality", 14, "muted", "middle")


def _network(d: Drawing, fed: str) -> None:
    """The step on the first batch: the other modality's feature is zero."""
    x, rest = TRAIN, next(name for name in NAMES if name != fed)
    _head(d, x, "", "Train", "the network is unchanged")
    top, low, wide = TOP + 46, TOP + 176, 84
    vector, head, end = x + wide + 24, x + 162, x + 162 + wide
    for y, name in ((top, rest), (low, fed)):
        on = name == fed
        _box(d, x, y, wide, 46, (name, "encoder"), name if on else "line", on)
        d.path(f"M{x + wide + 3} {y + 23}h17", arrow=True, dashed=not on, colour="muted" if on else "line")
        for k in range(4):
            d.rect(vector, y + 1 + 11 * k, 11, 11, fed if on else "none", fed if on else "line", r=0,
                   opacity=0.25 + 0.2 * k)  # fmt: skip
            if not on:
                d.text(vector + 5.5, y + 10 + 11 * k, "0", 9.5, "muted", "middle")
        middle = (vector + 15 + head) / 2
        d.path(f"M{vector + 15} {y + 23}C{middle + 8} {y + 23} {middle - 8} {top + 87} {head - 4} {top + 87}", arrow=on)
    d.path(f"M{vector + 15} {low + 23}H{head - 4}", arrow=True)
    _box(d, head, top + 64, wide, 46, ("joint", "head"), "ink")
    _box(d, head, low, wide, 46, (fed, "head"), fed)
    both = (top + 87 + low + 23) / 2
    for y in (top + 87, low + 23):
        d.path(f"M{end + 3} {y}h14", arrow=True)
        d.text(end + 32, y + 4.5, "CE", 14, anchor="middle")
        d.path(f"M{end + 46} {y}Q{end + 58} {y} {end + 58} {(y + both) / 2}T{end + 70} {both}")
    d.text(end + 74, both + 4.5, "loss", 14)
    y = TOP + len(DIFFICULTY) * ROW + 16
    d.text(x + 135, y, "loss = CE(*o*, *y*) + *γ*_{m} CE(*o*_{m}, *y*)", 14, anchor="middle")


# ---------------------------------------------------------------------------------------------------------- the figure


def pipeline(theme: str) -> str:
    """The figure as the text of an SVG file, for pages of the colour `theme`."""
    d = Drawing(theme)
    keep = remix.decouple(DIFFICULTY)  # (N, M)
    plan = remix.reassemble(keep, NAMES, BATCH, generator=torch.Generator().manual_seed(4))
    _clips(d)
    _scores(d, keep.numpy())
    _kept(d, keep.numpy())
    _batches(d, plan)
    _network(d, plan[0].fed[0])
    middle = TOP + len(keep) * ROW / 2 - 4
    for left, right in ((166, SCORE), (SCORE + 116, KEEP), (KEEP + 116, BATCHES), (BATCHES + 210, TRAIN)):
        d.path(f"M{left + 10} {middle}H{right - 10}", arrow=True)
    low, text = HEIGHT - 20, ((SCORE + 58 + TRAIN + 135) / 2, 104)  # return arrow with a centred label
    d.path(f"M{TRAIN + 135} {low - 18}V{low - 8}q0 8 -8 8H{text[0] + text[1]}")
    d.path(f"M{text[0] - text[1]} {low}H{SCORE + 66}q-8 0 -8 -8V{low - 18}", arrow=True)
    d.text(text[0], low + 4.5, "score again before every epoch", 14, "muted", "middle")
    return d.svg("Data Remixing: score every clip in each modality, keep its hardest modality, train on batches of one "
                 "modality")  # fmt: skip


def parse_args(argv: list[str] | None = None) -> Namespace:
    p = Parser(prog="python -m report.pipeline", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("docs/figures"), metavar="DIR",
                   help="folder of the figure (default: docs/figures)")  # fmt: skip
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    out = parse_args(argv).out
    for theme in THEMES:
        write_text(out / f"pipeline-{theme}.svg", pipeline(theme))
        print(out / f"pipeline-{theme}.svg")


if __name__ == "__main__":
    run_main(main)
