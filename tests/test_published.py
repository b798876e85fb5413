"""Published datasets through the one path of preparation: made-up downloads in their layouts, and the real features."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.raw_samples import tone, write_video
from dataset.folder import load_folder
from dataset.prepare.__main__ import main, parse_args
from dataset.prepare.datasets import ENTRIES, fitting_seconds
from dataset.prepare.engine import Clip
from dataset.prepare.grid import aligned_word
from dataset.prepare.published import Split, name_kinetics, published_split
from dataset.specs import SPECS, spec_of
from utils.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SIZE = (64, 48)


def needs(folder: str):
    return pytest.mark.skipif(not (SHARED / folder).is_dir(), reason=f"{folder} is not on this machine")


def film(path: Path, seconds: float = 2, sound: bool = True) -> Path:
    return write_video(path, seconds, 25, SIZE, tone(seconds, 44_100, 1) if sound else None)


def job(dataset: str, raw: Path, out: Path, *flags: str):
    """What the entry would make, without making it."""
    args = parse_args(["--dataset", dataset, "--raw", str(raw), "--out", str(out), *flags])
    return ENTRIES[dataset].job(args, raw, out)


def prepare(dataset: str, raw: Path, out: Path, *flags: str) -> int:
    return main(["--dataset", dataset, "--raw", str(raw), "--out", str(out), "--workers", "1", *flags])


def clips_of(folder) -> dict[str, dict[str, str]]:
    return {part: {clip: folder.classes[y] for clip, y in zip(found.clips, found.labels, strict=True)}
            for part, found in folder.parts.items()}  # fmt: skip


# AVE and VGGSound -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ave(tmp_path) -> Path:
    raw = tmp_path / "AVE_Dataset"
    first = film(raw / "AVE" / "aaaaaaaaaaa.mp4", 3)
    for name in ("bbbbbbbbbbb", "ccccccccccc", "-dddddddddd"):
        shutil.copy(first, raw / "AVE" / f"{name}.mp4")
    (raw / "trainSet.txt").write_text("Church bell&aaaaaaaaaaa&good&0&2\nDog&bbbbbbbbbbb&good&1&3\n")
    (raw / "valSet.txt").write_text("Dog&ccccccccccc&good&0&0\n")
    (raw / "testSet.txt").write_text("Church bell&-dddddddddd&good&0&1\nDog&bbbbbbbbbbb&good&0&1\n\n")
    (raw / "Annotations.txt").write_text("Category&VideoID&Quality&StartTime&EndTime\n")
    return raw


def test_ave_is_cut_to_its_events(ave, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare("AVE", ave, out, "--audio_recipe", "logmel:seconds=1") == 0
    printed = capsys.readouterr().out
    assert (
        "lists: train 2, val 1, test 2, classes 2; published are train 3,339, val 402, test 402, classes 28" in printed
    )
    assert "1 events without a length" in printed and "groups in two parts: 1" in printed
    folder = load_folder(out, spec_of("folder", out))
    assert clips_of(folder) == {
        "train": {"aaaaaaaaaaa": "Church bell", "bbbbbbbbbbb_1_3": "Dog"},
        "val": {"ccccccccccc": "Dog"},
        "test": {"-dddddddddd": "Church bell", "bbbbbbbbbbb_0_1": "Dog"},
    }
    frames = {clip: len(files) for part in folder.parts.values()
              for clip, files in zip(part.clips, part.files["video"], strict=True)}  # fmt: skip
    assert frames == {"aaaaaaaaaaa": 2, "bbbbbbbbbbb_1_3": 2, "ccccccccccc": 3, "-dddddddddd": 1, "bbbbbbbbbbb_0_1": 1}


def test_vggsound_finds_cut_and_whole_videos(tmp_path):
    raw = tmp_path / "raw"
    for name in ("vid_one____.mp4", "b/vid_two_____000030.mp4", "vid_three___000001_000011.mp4"):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_bytes(b"x")
    rows = ['vid_one____,30,"rain, heavy",train', "vid_two____,30,drums,test", "vid_three__,1,drums,train",
            "vid_lost___,5,drums,train"]  # fmt: skip
    (raw / "vggsound.csv").write_text("\n".join(rows) + "\n")
    made = job("VGGSound", raw, tmp_path / "out")
    found = {clip.name: (clip.video.name, clip.start, clip.end) for clip in made.clips}
    assert found == {
        "vid_one_____000030": ("vid_one____.mp4", 30.0, 40.0),
        "vid_two_____000030": ("vid_two_____000030.mp4", None, None),
        "vid_three___000001": ("vid_three___000001_000011.mp4", None, None),
        "vid_lost____000005": ("vid_lost____000005.mp4", None, None),
    }
    assert made.split.classes == ["drums", "rain, heavy"] and len(made.split.parts["train"]) == 3
    assert made.notes == ["lists: classes 2; published are classes 309"]
    assert made.spec.modality("audio").recipe.name == "fbank"


# UCF-101 --------------------------------------------------------------------------------------------------------------


def test_ucf101_has_frames_and_flow(tmp_path, capsys):
    raw, lists, out = tmp_path / "UCF-101", tmp_path / "ucfTrainTestlist", tmp_path / "out"
    names = [f"{c}/v_{c}_g{g:02d}_c01.avi" for c in ("Archery", "Diving") for g in (1, 8, 9)]
    for name in names:
        film(raw / name, 1, sound=False)
    lists.mkdir()
    (lists / "trainlist02.txt").write_text("".join(f"{n} {1 + (n[0] == 'D')}\r\n" for n in names if "g01" not in n))
    (lists / "testlist02.txt").write_text("".join(f"{n}\r\n" for n in names if "g01" in n))
    assert prepare("UCF101", raw, out, "--split_dir", str(lists), "--split", "2", "--fps", "4") == 0
    assert "train 4, test 2, classes 2; published are train 9,586, test 3,734, classes 101" in capsys.readouterr().out
    spec = spec_of("folder", out)
    folder = load_folder(out, spec)
    assert spec.names == ("video", "flow") and spec.modality("flow").channels == 2
    assert {len(files) for name in spec.names for files in folder.parts["train"].files[name]} == {4}
    assert folder.groups["v_Diving_g08_c01"] == "Diving_g08"
    assert json.loads((out / "split.json").read_text())["shared_groups"] == 0
    with pytest.raises(UserError, match=r"no trainlist01\.txt of UCF-101"):
        job("UCF101", raw, out, "--split_dir", str(lists))
    with pytest.raises(UserError, match="splits 1, 2 and 3"):
        job("UCF101", raw, out, "--split", "actor")


# GRID -----------------------------------------------------------------------------------------------------------------

WORDS = {"bin": 0.4, "blue": 0.7, "at": 0.9, "f": 1.0, "two": 1.2, "now": 1.5}  # and when each begins


def align(path: Path, words: dict[str, float]) -> Path:
    """An alignment as GRID publishes it: ticks of 1/25,000 s, silences around and a pause in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    starts = [round(25_000 * start) for start in words.values()]
    ends = [*starts[1:], 45_000]
    rows = [(0, starts[0], "sil"), *zip(starts, ends, words, strict=True), (45_000, 50_000, "sil")]
    rows.insert(3, (starts[2], starts[2], "sp"))
    path.write_text("".join(f"{start} {end} {word}\n" for start, end, word in rows))
    return path


def test_grid_words_are_cut_by_alignments(tmp_path, capsys):
    """Two speakers, whose sentences have the same names: clips and groups carry the speaker."""
    raw, out = tmp_path / "grid", tmp_path / "out"
    one = film(raw / "s1" / "video" / "bbaf2n.mp4", 2)
    for speaker in ("s1", "s2"):
        for name in ("bbaf2n", "bbaf3s"):
            target = raw / speaker / "video" / f"{name}.mp4"
            target.parent.mkdir(parents=True, exist_ok=True)
            if target != one:
                shutil.copy(one, target)
            word = "two" if name == "bbaf2n" else "three"
            align(raw / "align" / speaker / f"{name}.align", {word if w == "two" else w: t for w, t in WORDS.items()})
    assert aligned_word(raw / "align" / "s1" / "bbaf2n.align", "digit") == ("two", 1.2, 1.5)
    assert aligned_word(raw / "align" / "s1" / "bbaf2n.align", "preposition") == ("at", 0.9, 1.0)
    (raw / "align" / "s2" / "bbaf3s.align").write_text("0 25000 sil\n25000 30000 bin\n")
    shutil.copy(one, raw / "s2" / "video" / "bbaf4p.mp4")
    made = job("GRID", raw, out, "--role", "digit")
    assert next((clip.name, clip.start, clip.end) for clip in made.clips) == ("s1_bbaf2n", 1.14, 1.56)
    assert {clip.video.parent.parent.name for clip in made.clips if clip.name.startswith("s2_")} == {"s2"}
    assert made.faults[0].clip == "s2_bbaf3s" and "words in it: 1; a sentence of GRID has 6" in made.faults[0].reason
    assert any("2 videos have no times" in note for note in made.notes)
    assert dict(made.split.groups)["s2_bbaf2n"] == "s2"
    prepare("GRID", raw, out, "--role", "digit", "--crop", "8,8,48,32", "--size", "32", "--test_fraction", "0.5")
    assert "split: by group" in capsys.readouterr().out
    spec = spec_of("folder", out)
    assert (spec.image_size, spec.crop_area, spec.encoder) == (32, (0.6, 1.0), "resnet18_thin")
    frames = list((out / "visual" / "s1_bbaf2n").iterdir())
    assert 10 <= len(frames) <= 11, "0.42 s at 25 frames per second"
    with pytest.raises(UserError, match="needs --role"):
        job("GRID", raw, out)
    with pytest.raises(UserError, match=r"neither words\.csv nor \*\.align"):
        job("GRID", tmp_path / "grid" / "s1", out, "--role", "digit")


@needs("grid_s1")
@pytest.mark.parametrize(("role", "classes"), [("digit", 10), ("letter", 25), ("colour", 4), ("command", 4)])
def test_the_words_of_speaker_1(tmp_path, role, classes):
    """Every word of words.csv is a clip, the classes are balanced as the corpus is, and train and test cover them."""
    made = job("GRID", SHARED / "grid_s1", tmp_path, "--role", role)
    with open(SHARED / "grid_s1" / "words.csv", encoding="utf-8") as file:
        wanted = {row["clip"]: row for row in csv.DictReader(file) if row["role"] == role}
    assert len(made.clips) == len(wanted) == 1000 and len(made.split.classes) == classes
    labels = dict(row for rows in made.split.parts.values() for row in rows)
    assert labels == {clip: row["word"] for clip, row in wanted.items()}
    for clip in made.clips[::50]:
        assert clip.video.exists() and clip.video == clip.audio
        assert clip.start == pytest.approx(float(wanted[clip.name]["start"]) - 0.06, abs=1e-6)
        assert clip.end == pytest.approx(float(wanted[clip.name]["end"]) + 0.06, abs=1e-6)
    shares = {part: Counter(label for _, label in rows) for part, rows in made.split.parts.items()}
    for label, count in Counter(labels.values()).items():
        assert shares["test"][label] == round(0.2 * count)


@needs("grid_s1")
def test_mouths_of_speaker_1(tmp_path):
    """Ten words end to end: frames of the mouth, at the right moment."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    (raw / "video").mkdir(parents=True)
    with open(SHARED / "grid_s1" / "words.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    seen = Counter()
    kept = []
    for row in rows:
        if row["role"] == "colour" and seen[row["word"]] < 3:
            seen[row["word"]] += 1
            kept.append(row)
            name = f"{row['clip']}.mp4"
            shutil.copy(SHARED / "grid_s1" / "video" / name, raw / "video" / name)
    with open(raw / "words.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(kept)
    assert prepare("GRID", raw, out, "--role", "colour", "--flow") == 0
    spec = spec_of("folder", out)
    folder = load_folder(out, spec)
    assert folder.classes == ["blue", "green", "red", "white"] and folder.shapes["audio"] == (64, 64)
    import cv2

    row = kept[0]
    capture = cv2.VideoCapture(str(raw / "video" / f"{row['clip']}.mp4"))
    source = [capture.read()[1] for _ in range(75)]
    first = sorted((out / "visual" / row["clip"]).iterdir())[0]
    mouth = cv2.imread(str(first)).astype(float)
    assert mouth.shape == (64, 96, 3)
    wanted = [cv2.resize(frame[165:245, 100:220], (96, 64), interpolation=cv2.INTER_AREA) for frame in source]
    distance = [np.abs(mouth - frame).mean() for frame in wanted]
    assert abs(int(np.argmin(distance)) - 25 * (float(row["start"]) - 0.06)) <= 1 and min(distance) < 6


# Features -------------------------------------------------------------------------------------------------------------


@needs("mosi")
def test_mosi(tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare("MOSI", SHARED / "mosi", out) == 0
    printed = capsys.readouterr().out
    assert "lists: train 1,447, test 752, as published" in printed and "groups in two parts: 0" in printed
    assert "2,199 of 2,199 clips ready" in printed and "(2,199 made now" in printed
    folder = load_folder(out, spec_of("folder", out))
    assert folder.shapes == {"text": (100,), "audio": (73,), "video": (100,)}
    transcripts = {row[0]: row for row in csv.reader(open(SHARED / "mosi" / "transcripts.csv", encoding="utf-8"))}  # noqa: SIM115
    for part, found in folder.parts.items():
        for name in folder.shapes:
            table = np.loadtxt(SHARED / "mosi" / f"{name}_{part}.csv", delimiter=",", quotechar='"')
            for i in range(0, len(table), 97):
                np.testing.assert_array_equal(np.load(found.files[name][i]), table[i, :-1].astype(np.float32))
        assert [folder.classes[y] == "positive" for y in found.labels] == [
            transcripts[clip][3] == "1" for clip in found.clips
        ]
    assert prepare("MOSI", SHARED / "mosi", out) == 0
    assert "(0 made now, 2,199 found finished)" in capsys.readouterr().out


def make_mosi(raw: Path, labels=(0, 1, 1)) -> Path:
    raw.mkdir(exist_ok=True)
    for part in ("train", "test"):
        for m, name in enumerate(("text", "audio", "video")):
            rows = [[f"{m + i / 10:.2f}"] * (m + 2) + [str(label)] for i, label in enumerate(labels)]
            with open(raw / f"{name}_{part}.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
    return raw


def test_mosi_without_transcripts_and_with_faults(tmp_path):
    raw = make_mosi(tmp_path / "raw")
    made = job("MOSI", raw, tmp_path / "out")
    assert made.split.parts["train"] == [
        ("train_0000", "negative"),
        ("train_0001", "positive"),
        ("train_0002", "positive"),
    ]
    assert made.arrays["video"]["test_0002"].tolist() == pytest.approx([2.2] * 4) and made.split.groups is None
    (raw / "audio_test.csv").write_text("1,2,3,0\n1,2,3,1\n1,2,3,0\n")
    with pytest.raises(UserError, match=r"audio_test\.csv: labels differ from text_test\.csv"):
        job("MOSI", raw, tmp_path / "out")
    (raw / "audio_test.csv").write_text("1,2,3,0\n1,x,3,1\n")
    with pytest.raises(UserError, match=r"audio_test\.csv, line 2: not only numbers"):
        job("MOSI", raw, tmp_path / "out")
    (raw / "audio_test.csv").unlink()
    with pytest.raises(UserError, match=r"no audio_test\.csv of MOSI"):
        job("MOSI", raw, tmp_path / "out")


@needs("multiview_digits")
def test_digits_in_six_views(tmp_path, capsys):
    from scipy.io import loadmat

    out = tmp_path / "out"
    assert prepare("MVDigits", SHARED / "multiview_digits", out) == 0
    assert "lists: train 1,600, test 400, as published" in capsys.readouterr().out
    folder = load_folder(out, spec_of("folder", out))
    views = {"pixels": 240, "fourier": 76, "profile": 216, "zernike": 47, "karhunen": 64, "shape": 6}
    assert folder.shapes == {name: (length,) for name, length in views.items()}
    assert folder.classes == list("0123456789")
    content = loadmat(SHARED / "multiview_digits" / "handwritten_6views.mat")
    part = folder.parts["test"]
    for i in range(0, 400, 37):
        for number, name in enumerate(views, start=1):
            np.testing.assert_array_equal(
                np.load(part.files[name][i]), content[f"x{number}_test"][i].astype(np.float32)
            )
        assert part.labels[i] == content["gt_test"][i, 0] - 1
    # A zero is a ring: its middle is empty and its left and right are not. 15 x 16 pixels, 0 to 6.
    pictures = [np.load(path) for path, y in zip(part.files["pixels"], part.labels, strict=True) if y == 0]
    zero = np.mean(pictures, 0).reshape(16, 15)
    assert zero[7, 7] < 1.5 < 4 < zero[7, 2] and zero[7, 12] > 4


# CREMA-D and Kinetics-Sounds ------------------------------------------------------------------------------------------


def test_kinetics_classes_get_names(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("label,youtube_id,time_start,time_end,split\nplaying drums,abcdefghijk,0,10,train\n"
                    "singing,bbcdefghijk,0,10,train\nsinging,cbcdefghijk,0,10,train\n")  # fmt: skip
    parts = {"train": [("abcdefghijk_000000_000010", "00"), ("bbcdefghijk_000000_000010", "01")],
             "test": [("cbcdefghijk_0", "01"), ("unknown____0", "00")]}  # fmt: skip
    named = name_kinetics(Split(["00", "01"], parts, {}), [path])
    assert named.classes == ["00 playing drums", "01 singing"]
    assert named.parts["test"] == [("cbcdefghijk_0", "01 singing"), ("unknown____0", "00 playing drums")]
    with pytest.raises(UserError, match="none of the clips of class 02"):
        name_kinetics(Split(["00", "01", "02"], parts, {}), [path])
    path.write_text("a,b\n")
    with pytest.raises(UserError, match="no columns label and youtube_id"):
        name_kinetics(Split(["00", "01"], parts, {}), [path])


@needs("kinetics_sounds")
def test_the_ranks_of_named_classes_are_the_published_indices(tmp_path):
    split = published_split("KineticSound", SHARED / "kinetics_sounds", tmp_path)
    path = tmp_path / "k400.csv"
    rows = [f"name of {30 - int(index):02d},{clip[:11]}" for clip, index in split.parts["train"]]
    path.write_text("label,youtube_id\n" + "\n".join(rows) + "\n")
    named = name_kinetics(split, [path])
    assert [name[:2] for name in named.classes] == [f"{i:02d}" for i in range(31)]
    assert named.classes[0] == "00 name of 30" and len(named.parts["test"]) == 2597


@needs("cremad/raw_sample")
def test_cremad_is_an_entry_of_the_same_path(tmp_path, capsys):
    lists = tmp_path / "lists"
    lists.mkdir()
    clips = sorted(path.stem for path in (SHARED / "cremad" / "raw_sample" / "VideoFlash").iterdir())
    (lists / "train.csv").write_text("".join(f"{clip},{clip.split('_')[2]}\n" for clip in clips[:4]))
    (lists / "test.csv").write_text("".join(f"{clip},{clip.split('_')[2]}\n" for clip in clips[4:]))
    shutil.copy(SHARED / "cremad" / "stat.csv", lists)
    raw, flags = SHARED / "cremad" / "raw_sample", ["--split_dir", str(lists)]
    assert prepare("CREMAD", raw, tmp_path / "out", *flags) == 0
    assert f"--dataset CREMAD --data_root {tmp_path / 'out'}" in capsys.readouterr().out
    own, published = spec_of("folder", tmp_path / "out"), SPECS["CREMAD"]
    assert own.modalities == published.modalities and own.image_size == 224, "--dataset folder feeds it alike"
    assert load_folder(tmp_path / "out", published).shapes == {"audio": (257, 188)}
    more = ["--frames", "4", "--flow", "--fps", "5", "--size", "64"]
    assert prepare("CREMAD", raw, tmp_path / "more", *flags, *more) == 0
    assert "--dataset folder --data_root" in capsys.readouterr().out
    assert spec_of("folder", tmp_path / "more").names == ("audio", "video", "flow")


def test_the_length_of_sound(tmp_path):
    path = film(tmp_path / "a.mp4", 2)
    assert fitting_seconds([Clip("a", path, path, 1.0, 1.25), Clip("b", path, path, 0.0, 0.3)]) == 0.3
    assert fitting_seconds([Clip("a", path, path)]) == pytest.approx(2, abs=0.11)
    assert fitting_seconds([Clip("a", path, path, 1.0, None)]) == pytest.approx(1, abs=0.11)
    cut = [Clip("a", path, path, 0.0, 0.5)] * 20  # how long its file is does not count
    assert fitting_seconds([*cut, Clip("b", path, path, 1.5, None)]) == pytest.approx(0.55, abs=0.11)
    assert (
        fitting_seconds([Clip("a", path, path, 0.0, 99.0)]) == 10 == fitting_seconds([Clip("a", None, tmp_path / "x")])
    )
