"""Contact sheets of clips: frames over time with the spectrogram below.

    python -m report --clips data/demo

Works on any training folder with any modalities. Shapes: T frames, H x W pixels, F rows (frequencies, features), L
steps, D values.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure

from dataset.folder import Part, load_folder
from dataset.lists import read_record
from dataset.pack import read_frame
from dataset.specs import AUDIO, Modality, recipe_of, spec_of
from utils.style import INK, MODALITY_COLOURS, MUTED, save, styled

CLIPS = 12  # of a sheet, about
FRAMES = 4  # of a clip at most
# Inches of a sheet: page width, margins, gap between clips, heights of frames, an array, a line of text, a heading.
PAGE, LEFT, RIGHT, GAP, STRIP, ARRAY, LINE, HEAD = 6.75, 0.3, 0.08, 0.12, 0.5, 0.36, 0.115, 0.22


class Example(NamedTuple):
    """One clip to show: a title and remarks above, then `shown[modality]`, as `stored` returns it."""

    title: str
    remarks: str
    shown: dict[str, np.ndarray]


def clips_sheet(root: Path, out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Write a sheet of training clips of every class, drawn at random, to `<out>/<folder>-clips.<format>`.

    Raises `UserError` for a folder that cannot be trained on; clips with missing files are left out.
    """
    folder = load_folder(root, spec_of("folder", root), allow_missing=True)
    part, rng = folder.parts["train"], np.random.default_rng(0)
    chosen = rng.permutation(len(folder.classes))[:CLIPS]
    examples, modalities = [], recorded(folder.root, folder.spec.modalities)
    for label in sorted(chosen):
        own = rng.permutation(np.flatnonzero(part.labels == label))[: max(1, CLIPS // len(folder.classes))]
        examples += [example(part, modalities, i, folder.classes[label]) for i in own]
    title = f"{folder.root.resolve().name}: {len(part.clips)} training clips of {len(folder.classes)} classes"
    figure = plot_clips({"": examples}, title, note_of(folder.spec.modalities))
    return save(figure, out / f"{folder.root.resolve().name}-clips", formats)


def recorded(root: Path, modalities: Sequence[Modality]) -> tuple[Modality, ...]:
    """The modalities, with the audio recipe from prepare.json, which determines the time axis."""
    recipe = read_record(root, "prepare.json").get("audio_recipe")
    return tuple(replace(m, recipe=recipe_of(recipe)) if recipe and m.name == AUDIO else m for m in modalities)


def example(part: Part, modalities: Sequence[Modality], i: int, title: str, remarks: str = "") -> Example:
    """Clip i of a part, as stored in its training folder; the remarks are its name unless given."""
    shown = {modality.name: stored(modality, part.files[modality.name][i]) for modality in modalities}
    return Example(title, remarks or part.clips[i], shown)


def note_of(modalities: Sequence[Modality]) -> str:
    """The rows of a sheet for these modalities."""
    kinds = {modality.kind for modality in modalities}
    words = [f"{FRAMES} frames at most, evenly over the clip"] if "frames" in kinds else []
    words += ["arrays with time to the right"] if kinds - {"frames"} else []
    return f"{'; '.join(words).capitalize()}."


def stored(modality: Modality, files: Sequence[Path] | Path) -> np.ndarray:
    """A clip in one modality, to be shown: frames (T, H, W, 3) in [0, 1], arrays (F, time) or (D,), sequences (D, L).

    At most `FRAMES` frames, evenly over the clip. Optical flow is coloured: hue is direction, saturation is speed.
    """
    if modality.kind == "frames":
        assert not isinstance(files, Path)
        picks = np.linspace(0, len(files) - 1, min(FRAMES, len(files))).round().astype(int)
        frames = [read_frame(files[k]) / 255 for k in picks]
        height, width = np.min([frame.shape[:2] for frame in frames], axis=0)
        clip = np.stack([frame[:height, :width] for frame in frames])  # (T, H, W, 3)
        return flow_colours(clip[..., :2]) if modality.channels == 2 else clip
    assert isinstance(files, Path)
    array = np.load(files, allow_pickle=False)
    turned = modality.kind == "sequence" or (modality.recipe is not None and modality.recipe.name == "fbank")
    return array.T if turned else array  # sequences are (L, D), and that recipe stores (time, mel)


def flow_colours(flow: np.ndarray) -> np.ndarray:
    """Optical flow (..., 2) in [0, 1], 0.5 for no motion -> RGB (..., 3): white is no motion."""
    x, y = np.moveaxis(flow - 127.5 / 255, -1, 0)
    speed = np.hypot(x, y)
    hue = (np.arctan2(y, x) / (2 * np.pi)) % 1
    return hsv_to_rgb(np.stack([hue, np.clip(speed / max(speed.max(), 1 / 255), 0, 1), np.ones_like(hue)], axis=-1))


@styled()
def plot_clips(sections: dict[str, list[Example]], title: str, note: str) -> Figure:
    """Clips in a grid, sections below one another under their names. A clip's modalities are stacked, frames first."""
    examples = [one for own in sections.values() for one in own]
    aspect = max((_aspect(values) for one in examples for values in one.shown.values()), default=0.0)
    room = PAGE - LEFT - RIGHT + GAP
    columns = round(room / (np.clip(aspect * STRIP, 0.95, 2.05) + GAP if aspect else 2.05))
    width = room / columns - GAP
    strip = min(width / aspect, 2 * STRIP) if aspect else 0
    names = sorted(examples[0].shown, key=lambda name: examples[0].shown[name].ndim < 4)
    heights = [strip if examples[0].shown[name].ndim == 4 else ARRAY for name in names]
    lines = 1 + max(one.remarks.count("\n") + 1 for one in examples)
    cell = lines * LINE + 0.05 + sum(heights) + 0.03 * len(names) + GAP
    rows = sum(-(-len(own) // columns) for own in sections.values())
    total = 0.4 + rows * cell + HEAD * sum(map(bool, sections)) + 0.2
    figure = Figure(figsize=(PAGE, total))
    figure.text(0.01, 1 - 0.17 / total, title, fontsize=9, fontweight="bold", va="center")
    figure.text(0.01, 0.1 / total, note, fontsize=6.5, color=MUTED, va="center")
    top = total - 0.4
    for name, own in sections.items():
        if name:
            figure.text(0.01, (top - 0.07) / total, name, fontweight="bold", va="center")
            top -= HEAD
        for i, one in enumerate(own):
            left, y = LEFT + (i % columns) * (width + GAP), top - (i // columns) * cell
            _write(figure, left, y, width, one)
            y -= lines * LINE + 0.05
            for modality, height in zip(names, heights, strict=True):
                y -= height
                axis = figure.add_axes((left / PAGE, y / total, width / PAGE, height / total))
                _draw(axis, one.shown[modality])
                if i % columns == 0:
                    axis.annotate(modality, (0, 0.5), xycoords="axes fraction", xytext=(-8, 0), rotation=90, fontsize=6,
                                  textcoords="offset points", ha="center", va="center", color=MUTED)  # fmt: skip
                y -= 0.03
        top -= -(-len(own) // columns) * cell
    return figure


def _write(figure: Figure, left: float, top: float, width: float, one: Example) -> None:
    """A clip's title and remarks, cut to the width of the clip, all in inches."""
    size, page = (6.5, 5.5), figure.get_figheight()
    for i, line in enumerate((one.title, *one.remarks.split("\n"))):
        points = size[i > 0]
        letters = int(width * 72 / ((0.56 if i else 0.66) * points))  # 0.56, 0.66: mean width of a letter
        shown = line if len(line) <= letters else f"{line[: letters - 1]}…"
        figure.text(left / PAGE, (top - (i + 0.5) * LINE) / page, shown, fontsize=points, va="center",
                    fontweight="normal" if i else "bold", color=MUTED if i else INK)  # fmt: skip


def _aspect(values: np.ndarray) -> float:
    """Aspect ratio (width / height) of a strip of frames (T, H, W, 3); 0 for other arrays."""
    if values.ndim < 4:
        return 0.0
    count, height, width = values.shape[:3]
    return (count * width + (count - 1) * _gap(width)) / height


def _gap(width: int) -> int:
    """Pixels between two frames."""
    return max(1, round(0.03 * width))


def _draw(axis: Axes, values: np.ndarray) -> None:
    """Frames side by side, an image of an array, lines for arrays of few rows, bars for a vector."""
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)
    if values.ndim == 4:
        count, height, width = values.shape[:3]
        gap = _gap(width)
        strip = np.ones((height, count * (width + gap) - gap, 3))
        for k, frame in enumerate(values):
            strip[:, k * (width + gap) : k * (width + gap) + width] = frame
        axis.imshow(strip, interpolation="nearest" if height < 64 else "antialiased")
        axis.set_anchor("W")
    elif values.ndim == 1:
        axis.vlines(np.arange(len(values)), 0, values, color=MODALITY_COLOURS[0], lw=0.8)
        axis.axhline(0, color=INK, lw=0.5)
    elif len(values) <= len(MODALITY_COLOURS):
        for row, colour in zip(values, MODALITY_COLOURS, strict=False):
            axis.plot(row, color=colour, lw=0.8)
        axis.margins(x=0)
    else:
        low, high = np.percentile(values, [2, 99.5])  # otherwise a recipe's lowest value dominates the scale
        axis.imshow(values, origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=max(high, low + 1e-6),
                    interpolation="nearest")  # fmt: skip
