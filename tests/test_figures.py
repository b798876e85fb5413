"""Figures: what is drawn equals the numbers in the tables, looks are fixed, epochs are whole and count from 1."""

import itertools
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest
from helpers import REPO, make_folder
from matplotlib.colors import to_hex, to_rgb
from run_folders import by_label, edit_metrics, groups_of, make_run
from scipy import stats
from test_report import add_text

from dataset.folder import load_folder
from dataset.specs import Modality, spec_of
from report import pipeline
from report.__main__ import main
from report.clips import Example, flow_colours, plot_clips, stored
from report.compare import parse_args
from report.figures import Effect, differences, forest, looks_of, plot_ablations, plot_compared_curves
from report.tables import maintable
from utils.errors import UserError
from utils.plots import plot_confusion, plot_curves
from utils.style import (
    BALANCE_METHODS,
    JOINT_COLOUR,
    METHOD_COLOURS,
    MODALITY_COLOURS,
    label_ends,
    label_points,
    looks,
    panels,
    readable,
    save,
    styled,
)

NAMES = ("audio", "video", "text")


# ----------------------------------------------------------------------------------------------------------- looks


def test_a_method_has_one_look_whatever_else_is_shown() -> None:
    labels = [
        "baseline",
        "remix",
        "remix_random",
        "audio",
        "remix + pmr",
        "baseline + pmr",
        "baseline + midas",
        "other",
    ]
    whole = looks(labels, NAMES)
    assert whole == looks(labels[::-1], NAMES)
    for label in labels:
        assert looks([label], NAMES)[label] == whole[label]
    assert (whole["remix"].colour, whole["baseline"].colour, whole["audio"].colour) == ("#d55e00", "#6e6e6e", "#0072b2")
    assert whole["remix + pmr"].colour == whole["baseline + pmr"].colour == "#882255"
    assert whole["remix + pmr"].line != whole["baseline + pmr"].line


def test_no_two_methods_look_alike() -> None:
    labels = [*METHOD_COLOURS, *NAMES, *(f"{base} + {name}" for base in ("baseline", "remix")
                                         for name in BALANCE_METHODS)]  # fmt: skip
    found = looks(labels, NAMES)
    alone = [label for label in labels if not label.startswith("remix + ")]
    assert len({found[label] for label in alone}) == len(alone)
    for base in ("baseline", "remix"):  # in one comparison a method stands beside at most one other of its colour
        colours = [found[label].colour for label in labels if label.startswith(f"{base} + ")]
        assert max(colours.count(colour) for colour in colours) <= 2


def test_settings_of_a_method_are_shades_in_the_order_of_their_values() -> None:
    found = looks(["remix, warmup 10", "remix", "remix, warmup 5", "baseline"])
    light = [sum(to_rgb(found[label].colour)) for label in ("remix", "remix, warmup 5", "remix, warmup 10")]
    assert found["remix"].colour == METHOD_COLOURS["remix"] and light == sorted(light) and len(set(light)) == 3
    assert len({look.marker for label, look in found.items() if label != "baseline"}) == 3


# Machado, Oliveira and Fernandes, IEEE TVCG 2009, severity 1.0, on linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                            [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                              [-0.011820, 0.042940, 0.968881]]),
}  # fmt: skip


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colour_blind_readers_can_tell_the_main_colours(kind: str) -> None:
    """CIE76 differences, by OpenCV's conversion, of the methods and of the first three modalities: 2.3 is just seen."""
    for group in (METHOD_COLOURS.values(), (*MODALITY_COLOURS[:3], JOINT_COLOUR), ("#d55e00", *MODALITY_COLOURS[:2])):
        srgb = np.array([to_rgb(colour) for colour in group])
        linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
        seen = np.clip(linear @ BLINDNESS[kind].T, 0, 1)
        seen = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
        lab = cv2.cvtColor(seen[None].astype(np.float32), cv2.COLOR_RGB2LAB)[0]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)) > 12


@pytest.mark.parametrize("colour", ["#ffffff", "#ddcc77", "#88ccee", *METHOD_COLOURS.values()])
def test_text_of_every_colour_is_readable(colour: str) -> None:
    rgb = np.array(to_rgb(readable(colour)))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    assert 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05) > 2.97
    assert readable("#333333") == "#333333"


@pytest.mark.parametrize("values", [[0.5, 0.5, 0.5], [0.1, 0.9], [0.995, 1.0, 0.2, 0.21, 0.22]])
def test_labels_at_line_ends_do_not_overlap_and_keep_the_order(values: list[float]) -> None:
    with styled():
        figure, axes = panels(1)
        axes[0, 0].set_ylim(0, 1)
        label_ends([(axes[0, 0], [(str(i), "#000000", value) for i, value in enumerate(values)])])
        figure.draw_without_rendering()
        boxes = [(float(text.get_text()), text.get_window_extent()) for text in axes[0, 0].texts]
    boxes.sort(key=lambda item: item[1].y0)
    assert [values[int(name)] for name, _ in boxes] == sorted(values)
    for (_, low), (_, high) in itertools.pairwise(boxes):
        assert high.y0 >= low.y1 - 1


def test_names_of_points_stay_inside_and_apart() -> None:
    """Points at the right edge and close together, one under a horizontal line, one beside another's bar."""
    points = [("the first of two", 9.0, 0.0), ("the second of two", 9.1, 0.1), ("under the line", 1.0, 0.9),
              ("beside a bar", 4.0, 0.5), ("the bar", 4.6, 0.4)]  # fmt: skip
    with styled():
        figure, axes = panels(1, width=4.0, height=2.0)
        axis = axes[0, 0]
        axis.axhline(0.95)
        axis.plot([4.6, 4.6], [0.2, 0.7])
        axis.set(xlim=(-0.5, 10), ylim=(-0.3, 1.3))
        for _, x, y in points:
            axis.plot([x], [y], "o")
        label_points(axis, points)
        figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axis.texts]
    assert [text.get_text() for text in axis.texts] == [name for name, *_ in points]
    assert all(axis.bbox.containsx(box.x0) and axis.bbox.containsx(box.x1) for box in boxes)
    for i, box in enumerate(boxes):
        others = [*boxes[:i], *boxes[i + 1 :], *(line.get_window_extent() for line in axis.lines)]
        assert box.count_overlaps(others) == 0, points[i]


# ----------------------------------------------------------------------------------------------------- differences


@pytest.fixture
def compared(tmp_path: Path) -> dict:
    last = {"baseline": [0.70, 0.72, 0.68], "remix": [0.75, 0.80, 0.70]}
    for method, accuracies in last.items():
        for seed, accuracy in enumerate(accuracies):
            make_run(tmp_path, method, seed, (0.5, 0.6, 0.9, accuracy))
    return {name: np.array(values) for name, values in last.items()}


def test_the_forest_plot_draws_and_prints_the_numbers_of_the_table(tmp_path: Path, compared: dict) -> None:
    groups = groups_of(tmp_path)
    rows = differences(groups)
    assert [(row.section, row.label, row.n) for row in rows] == [
        (name, "remix", 3) for name in ("multimodal", *NAMES[:2])
    ]
    axis = forest(rows, title="t").axes[0]
    test = stats.ttest_rel(compared["remix"], compared["baseline"])
    interval = test.confidence_interval(0.95)
    expected = [100 * interval.low, 100 * interval.high]
    for place in [tick for tick, text in zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)
                  if text.get_text() == "remix"]:  # fmt: skip
        bar, *_, dot = [line for line in axis.lines if set(line.get_ydata()) == {place}]
        assert np.allclose(bar.get_xdata(), expected)
        assert dot.get_xdata() == pytest.approx([100 * (compared["remix"] - compared["baseline"]).mean()])
        assert dot.get_markerfacecolor() == "white"  # the interval holds zero
        assert to_hex(dot.get_color()) == METHOD_COLOURS["remix"]
    table = maintable(groups)
    texts = [text.get_text() for text in axis.texts]
    assert texts[2:4] == ["+5.0 [-2.5, +12.5]", "3"] and "+5.0 [-2.5, +12.5]" in table.replace("\xa0", " ")


def test_a_forest_plot_of_given_rows(tmp_path: Path) -> None:
    rows = [Effect("remix", 3.0, 1.0, 5.0, 5), Effect("baseline + pmr", -1.0, None, None, 1, mark="†"),
            Effect("wide", 1.0, -80.0, 80.0, 2, "section")]  # fmt: skip
    axis = forest(rows, tmp_path / "f", formats=("png", "svg")).axes[0]
    assert {path.name for path in tmp_path.iterdir()} == {"f.png", "f.svg"}
    texts = [text.get_text() for text in axis.texts]
    assert texts == ["mean [95 % interval]", "n", "+3.0 [+1.0, +5.0]", "5", "-1.0†", "1", "+1.0 [-80.0, +80.0]", "2"]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["remix", "baseline + pmr", "wide", "section"]
    assert -12 < axis.get_xlim()[0] < 0 and 5 < axis.get_xlim()[1] < 15  # the wide one does not squeeze the others
    markers = {line.get_marker() for line in axis.lines}
    assert {"<", ">", "|"} <= markers
    filled = {to_hex(line.get_markerfacecolor()) for line in axis.lines if line.get_marker() == "o"}
    assert METHOD_COLOURS["remix"] in filled and axis.get_yticks()[0] < axis.get_yticks()[1]


def test_one_flag_at_a_time_is_compared_with_its_centre(tmp_path: Path) -> None:
    for seed in range(2):
        make_run(tmp_path, "remix", seed, [0.5] * 3 + [0.7 + 0.01 * seed])
        make_run(tmp_path, "remix", seed, [0.5] * 3 + [0.8 + 0.03 * seed], warmup=2)
        make_run(tmp_path, "remix", seed, [0.5] * 3 + [0.6], score="loss")
    axis = plot_ablations(groups_of(tmp_path), "t", {}).axes[0]
    labels = [text.get_text() for text in axis.get_yticklabels()]
    assert sorted(labels[:2]) == ["score kl → loss", "warmup 1 → 2"] and labels[2].startswith("against remix")
    shown = {label: axis.texts[2 + 2 * i].get_text() for i, label in enumerate(labels[:2])}
    interval = stats.ttest_rel([80, 83], [70, 71]).confidence_interval(0.95)
    assert shown["warmup 1 → 2"] == f"+11.0 [{interval.low:+.1f}, {interval.high:+.1f}]"


# ------------------------------------------------------------------------------------------------------------ curves


def history(epochs: int, warmup: int) -> list[dict]:
    return [{"epoch": i, "train_loss": 1.0, "test_acc": 0.5 + 0.01 * i, **{f"test_acc_{name}": 0.4 for name in NAMES},
             "train_ce_joint": 0.9, "train_ce_audio": 0.8, "train_ce_video": None, "train_ce_text": 0.7,
             "train_acc_joint": 0.6, "train_acc_audio": 0.6, "train_acc_video": None, "train_acc_text": 0.3,
             **{f"n_{name}": None if i < warmup else 10 for name in NAMES}} for i in range(epochs)]  # fmt: skip


def whole_ticks(axis: matplotlib.axes.Axes) -> list[float]:
    low, high = axis.get_xlim()
    return [tick for tick in axis.get_xticks() if low <= tick <= high]


def test_curves_of_a_run_with_any_number_of_modalities() -> None:
    accuracy, trained, entropy, shares = plot_curves(history(4, 2), NAMES, "t").axes
    titles = [axis.get_title(loc="left") for axis in (accuracy, trained, entropy, shares)]
    assert titles == ["test accuracy", "training accuracy", "training cross entropy",
                      "share of clips that keep a modality"]  # fmt: skip
    heads = accuracy.lines[:4]
    assert [line.get_label() for line in heads] == ["multimodal", *NAMES]
    assert [line.get_color() for line in heads[:3]] == [JOINT_COLOUR, *MODALITY_COLOURS[:2]]
    assert [line.get_label() for line in entropy.lines[:3]] == ["multimodal", "audio", "text"]
    assert heads[0].get_xdata().tolist() == [1, 2, 3, 4] and heads[0].get_ydata() == pytest.approx(
        [0.5, 0.51, 0.52, 0.53]
    )
    assert np.allclose([[bar.get_height() for bar in bars] for bars in shares.containers], 1 / 3)
    assert [bar.get_x() + bar.get_width() / 2 for bar in shares.containers[0]] == pytest.approx([3, 4])
    for axis in (accuracy, trained, entropy, shares):
        assert [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == "--"] == [2.5]  # ends the warm-up
        assert "warm-up" in {text.get_text() for text in axis.texts}
        assert whole_ticks(axis) and all(tick == int(tick) for tick in whole_ticks(axis))
    assert {text.get_text() for text in accuracy.texts} >= {"multimodal", *NAMES}


def test_older_runs_show_their_training_loss() -> None:
    old = [{key: value for key, value in line.items() if not key.startswith("train_")} | {"train_loss": 2.0}
           for line in history(2, 2)]  # fmt: skip
    accuracy, loss = plot_curves(old, NAMES, "t").axes
    assert loss.get_title(loc="left") == "training loss, weighted" and len(loss.lines) == 1
    assert len(accuracy.lines) == 4


def test_curves_of_one_epoch_are_dots_at_epoch_1() -> None:
    axes = plot_curves(history(1, 5), NAMES, "t").axes
    assert len(axes) == 3
    for axis in axes:
        assert whole_ticks(axis) == [1]
        for line in axis.lines:
            assert line.get_marker() == "o" and line.get_xdata().tolist() == [1]
            assert axis.get_ylim()[0] < line.get_ydata()[0] < axis.get_ylim()[1]


def test_compared_curves_show_means_bands_and_unimodal_levels(tmp_path: Path) -> None:
    for seed, shift in enumerate((0.0, 0.02, 0.07)):
        for method in ("baseline", "remix"):
            make_run(tmp_path, method, seed, tuple(value + shift for value in (0.5, 0.6, 0.8, 0.7)))
        make_run(tmp_path, "audio", seed, tuple(value - shift for value in (0.3, 0.4, 0.5, 0.6)))
        folder = next(tmp_path.glob(f"audio_{seed}_*"))
        edit_metrics(folder, lambda line: line | {"test_acc_video": None})
    groups = groups_of(tmp_path)
    joint, audio, video = plot_compared_curves(groups, "t", looks_of(groups)).axes
    lines = {line.get_label(): line for line in joint.lines}
    values = np.array([[value + shift for value in (0.5, 0.6, 0.8, 0.7)] for shift in (0.0, 0.02, 0.07)])
    assert lines["remix"].get_xdata().tolist() == [1, 2, 3, 4] and lines["remix"].get_ydata() == pytest.approx(
        values.mean(axis=0)
    )
    band = next(iter(joint.collections)).get_paths()[0].vertices[:, 1]
    std = values.std(axis=0, ddof=1)
    assert (band.min(), band.max()) == pytest.approx((values.mean(0)[0] - std[0], values.mean(0)[2] + std[2]))
    level = [
        line.get_ydata()[0] for line in audio.lines if len(set(line.get_ydata())) == 1 and line.get_xdata()[0] == 0
    ]
    assert level == pytest.approx([0.6 - 0.03 - 0.1])
    assert "audio alone" in {text.get_text() for text in audio.texts}
    assert "audio alone" not in {text.get_text() for text in video.texts}
    assert all(tick == int(tick) for tick in whole_ticks(joint))


def test_many_groups_have_a_panel_each(tmp_path: Path) -> None:
    names = ("ogm_ge", "agm", "pmr", "mmpareto", "gblend", "opm")
    make_run(tmp_path, "baseline", 0)
    for name in names:
        make_run(tmp_path, "baseline", 0, balance=name)
    groups = groups_of(tmp_path)
    figure = plot_compared_curves(groups, "t", looks_of(groups))
    titles = {axis.get_title(loc="left") for axis in figure.axes if axis.lines}
    assert titles == set(by_label(tmp_path)) and len(titles) == 7
    panel = next(axis for axis in figure.axes if axis.get_title(loc="left") == "baseline + pmr")
    assert [to_hex(line.get_color()) for line in panel.lines] == ["#6e6e6e", "#882255"]  # over its baseline


# --------------------------------------------------------------------------------------------------------- confusion


@pytest.mark.parametrize(("classes", "named"), [(3, True), (31, True), (41, False)])
def test_confusion_matrices_show_their_values(classes: int, named: bool) -> None:
    counts = np.random.default_rng(0).integers(0, 20, (classes, classes))
    figure = plot_confusion({"multimodal": counts, "audio": counts.T}, [f"c{i}" for i in range(classes)], "t")
    axis = figure.axes[0]
    assert axis.get_title(loc="left") == f"multimodal, accuracy {100 * counts.trace() / counts.sum():.1f} %"
    shares = 100 * counts / counts.sum(axis=1, keepdims=True)
    assert np.allclose(axis.images[0].get_array(), shares / 100)
    shown = {text.get_position(): float(text.get_text()) for text in axis.texts}
    expected = {(j, i): round(shares[i, j]) for i in range(classes) for j in range(classes) if shares[i, j] >= 0.5}
    assert shown == pytest.approx(expected if named else {})
    assert len(axis.get_yticklabels()) == (classes if named else 0)


# ----------------------------------------------------------------------------------------------------------- formats


def test_figures_come_in_the_formats_asked_for(tmp_path: Path, compared: dict) -> None:
    main([str(tmp_path), "--out", str(tmp_path / "out"), "--format", "svg,pdf"])
    names = {path.name for path in (tmp_path / "out").iterdir() if path.suffix in (".png", ".pdf", ".svg")}
    assert names == {f"demo-{kind}.{end}" for kind in ("curves", "differences", "shares") for end in ("pdf", "svg")}
    assert "demo-curves.svg" in (tmp_path / "out" / "report.md").read_text()
    ET.parse(tmp_path / "out" / "demo-curves.svg")
    assert (tmp_path / "out" / "demo-curves.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(UserError, match="unknown format 'gif'; allowed: png, pdf, svg"):
        main([str(tmp_path), "--format", "png,gif"])
    assert parse_args(["--format", "pdf"])[0].format == ("pdf",)


def test_equal_figures_are_equal_files(tmp_path: Path) -> None:
    for name in "ab":
        save(forest([Effect("remix", 1.0, 0.5, 1.5, 3)]), tmp_path / name, ("png", "pdf", "svg"))
    for end in ("png", "pdf", "svg"):
        assert (tmp_path / f"a.{end}").read_bytes() == (tmp_path / f"b.{end}").read_bytes()


# ------------------------------------------------------------------------------------------------------------- clips


def test_a_contact_sheet_shows_the_stored_clips(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "data", train=9, test=3, frames=6)
    add_text(data)
    main(["--clips", str(data), "--out", str(tmp_path / "out"), "--format", "png,pdf"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"data-clips.png", "data-clips.pdf"}
    folder = load_folder(data, spec_of("folder", data))
    part, shown = folder.parts["train"], {}
    for modality in folder.spec.modalities:
        shown[modality.name] = stored(modality, part.files[modality.name][2])
    assert shown["video"].shape == (4, 40, 48, 3)  # at most four frames, the first and the last among them
    for k, frame in ((0, "00001"), (3, "00006")):
        image = cv2.imread(str(data / "visual" / "train_0002" / f"frame_{frame}.jpg"))
        assert np.allclose(shown["video"][k], image[:, :, ::-1] / 255, atol=0.02)
    figure = plot_clips({"one": [Example("a", "b", shown)], "two": [Example("c", "d", shown)]}, "t", "n")
    frames, audio, text = figure.axes[:3]
    assert len(figure.axes) == 6
    tops = [axis.get_position().y1 for axis in (frames, audio, text)]
    assert tops == sorted(tops, reverse=True)  # frames first, the arrays beneath
    assert np.array_equal(frames.images[0].get_array()[:, :48], shown["video"][0])
    assert np.array_equal(audio.images[0].get_array(), np.load(data / "audio" / "train_0002.npy"))
    segments = text.collections[0].get_segments()
    assert [segment[1, 1] for segment in segments] == pytest.approx(np.load(data / "text" / "train_0002.npy"))
    inside = [axis.get_position() for axis in figure.axes]
    assert all(0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for box in inside)


def test_sequences_and_flow_have_their_own_pictures(tmp_path: Path) -> None:
    steps = np.arange(12.0).reshape(4, 3)  # (L, D)
    np.save(tmp_path / "s.npy", steps)
    found = stored(Modality("imu", "sequence", "imu"), tmp_path / "s.npy")
    assert np.array_equal(found, steps.T)
    axis = plot_clips({"": [Example("a", "b", {"imu": found})]}, "t", "n").axes[0]
    assert [line.get_ydata().tolist() for line in axis.lines] == steps.T.tolist()  # few rows are lines over time
    still, right, up = flow_colours(np.array([[0.5, 0.5], [1.0, 0.5], [0.5, 1.0]]))
    assert still == pytest.approx([1, 1, 1], abs=0.01)  # no motion is white
    assert right == pytest.approx([1, 0, 0], abs=0.02) and up == pytest.approx([0.5, 1, 0], abs=0.02)


def test_clips_of_no_folder_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent"):
        main(["--clips", str(tmp_path / "absent")])
    with pytest.raises(UserError, match="give runs"):
        main(["--clips", str(tmp_path), "--model", str(tmp_path)])


# ---------------------------------------------------------------------------------------------------------- pipeline


@pytest.mark.parametrize("theme", pipeline.THEMES)
def test_the_pipeline_figure_shows_what_the_method_does(theme: str, tmp_path: Path) -> None:
    text = pipeline.pipeline(theme)
    committed = REPO / "docs" / "figures" / f"pipeline-{theme}.svg"
    assert committed.read_text(encoding="utf-8") == text, "run: python -m report.pipeline"
    root = ET.fromstring(text)
    words = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    values = np.array([float(word) for word in words if re.fullmatch(r"\d\.\d\d", word)]).reshape(-1, 2)
    kept = values.argmin(axis=1)
    batches, rest = {}, iter(words[words.index("batch 1: video") :])
    for word in rest:
        if match := re.fullmatch(r"batch (\d): (audio|video)", word):
            batches[int(match[1])] = own = (match[2], [])
        elif word.isdecimal() and word != "0":
            own[1].append(int(word) - 1)
    names = ("audio", "video")
    assert sorted(clip for _, clips in batches.values() for clip in clips) == list(range(len(values)))
    for name, clips in batches.values():
        assert {names[kept[clip]] for clip in clips} == {name}
    assert [batches[b][0] for b in sorted(batches)] == [
        "video",
        "video",
        "audio",
    ]  # all of one modality, then the other
