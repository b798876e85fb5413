"""Own clips: what a table may look like, what is refused and how, folders per class, splits by seed and group."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.raw_samples import tone, write_video, write_wav
from dataset.folder import load_folder
from dataset.prepare.__main__ import main
from dataset.prepare.arrays import kind_of
from dataset.prepare.flags import recipe_flag
from dataset.prepare.table import Row, class_folders, read_table, split_rows
from dataset.specs import spec_of
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SIZE = (64, 48)


def table(folder: Path, text: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "clips.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def records(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "file,label\na.mp4,cat\nd/b.mp4,dog\n",
    "\ufefffile,label\r\na.mp4,cat\r\nd/b.mp4,dog\r\n",
    '"file","label"\n\n"a.mp4","cat"\n"d/b.mp4","dog"',
    "LABEL, File\ncat,a.mp4\ndog,d/b.mp4\n",
])  # fmt: skip
def test_a_table_in_any_dialect(tmp_path, text):
    rows = read_table(table(tmp_path, text))
    assert rows == [Row("a", "cat", "a.mp4"), Row("b", "dog", "d/b.mp4")]


def test_every_column(tmp_path):
    text = "file,label,clip,audio,start,end,part,group\nx.mp4,a,one,x.wav,0.5,1,train,s1\nx.mp4,b,two,,1,,test,s2\n"
    assert read_table(table(tmp_path, text)) == [
        Row("one", "a", "x.mp4", "x.wav", 0.5, 1.0, "train", "s1"),
        Row("two", "b", "x.mp4", None, 1.0, None, "test", "s2"),
    ]


def test_clip_ids_come_from_files_and_times(tmp_path):
    text = "file,label,start,end\na.mp4,x,0.5,1.25\na.mp4,y,1.25,3\nd/b.mp4,x,,\nc/b.mp4,y,,\nz.tar.mp4,x,,\n"
    ids = [row.clip for row in read_table(table(tmp_path, text))]
    assert ids == ["a_0.5_1.25", "a_1.25_3", "d_b", "c_b", "z.tar"]


@pytest.mark.parametrize(("text", "words"), [
    ("", "empty; the first line names the columns"),
    ("file,label\n", "no clips under the header"),
    ("a.mp4,cat\n", "line 1: no column 'file'"),
    ("file,class\na.mp4,x\n", "line 1: no column 'label'"),
    ("file;label\na.mp4;x\n", "line 1: columns are not separated by commas"),
    ("file,label,strat\na,x,1\n", "line 1: unknown column 'strat'; did you mean 'start'?"),
    ("file,label,notes\na,x,1\n", "line 1: unknown column 'notes'; allowed: file, label"),
    ("file,label,label\na,x,1\n", "line 1: column 'label' is there twice"),
    ("file,label\na.mp4\n", "line 2: 1 fields, the header has 2"),
    ("file,label\na.mp4,x,y\n", "line 2: 3 fields"),
    ("file,label\na.mp4,\n", "line 2: label is empty"),
    ("file,label\n,x\n", "line 2: file is empty"),
    ("file,label,clip\na,x,one\nb,y,\n", "line 3: clip is empty"),
    ("file,label\na.mp4,x\na.mp4,y\n", "line 3: clip a is also in line 2"),
    ("file,label,clip\na.mp4,x,b/a\n", "line 2: clip id 'b/a' holds a slash"),
    ("file,label\n.hidden,x\n", "line 2: clip id '.hidden' starts with a dot"),
    ("file,label,start\na.mp4,x,one\n", "line 2: start 'one' is not a number of seconds"),
    ("file,label,start\na.mp4,x,-1\n", "line 2: start '-1' must be 0 seconds or more"),
    ("file,label,start\na.mp4,x,nan\n", "line 2: start 'nan'"),
    ("file,label,start,end\na.mp4,x,2,2\n", "line 2: end 2 is not after start 2"),
    ("file,label,end\na.mp4,x,0\n", "line 2: end 0 is not after start 0"),
    ("file,label,part\na.mp4,x,dev\n", "line 2: part 'dev'; allowed: train, val, test"),
    ("file,label,part\na.mp4,x,train\nb.mp4,x,\n", "line 3: no part"),
    ("file,label,group\na.mp4,x,\nb.mp4,x,s1\n", "line 2: no group"),
    (b"file,label\na.mp4,\xff\n", "UTF-8"),
    ("file,label\na\x07.mp4,x\n", "line 2: a control character"),
    ('file,label\n"a.mp4", "x"\n', "line 2: a quote after a space"),
])  # fmt: skip
def test_mistakes_are_named_by_file_and_line(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        read_table(table(tmp_path, text))
    assert words in str(error.value) and "clips.csv" in str(error.value) and "\n" not in str(error.value)


FIELDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(st.lists(st.lists(FIELDS, min_size=1, max_size=4), max_size=6))
def test_any_table_is_rows_or_one_line(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("t") / "clips.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["file", "label", "start"], *rows])
    try:
        found = read_table(path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert len({row.clip for row in found}) == len(found)
        assert all((Path("/out") / row.clip).parent == Path("/out") and row.label for row in found)


# Folders --------------------------------------------------------------------------------------------------------------


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def test_a_folder_per_class(tmp_path):
    names = ["dog/b.mp4", "cat/a.MP4", "cat/deep/b.avi", "dog/b.wav", "dog/c.wav", "cat/notes.txt", "x.csv"]
    raw = touch(tmp_path, *names, ".git/y.mp4", "out/visual/z.mp4")
    rows, left_out = class_folders(raw, tmp_path / "out")
    assert rows == [
        Row("a", "cat", "cat/a.MP4"),
        Row("cat_deep_b", "cat", "cat/deep/b.avi"),
        Row("dog_b", "dog", "dog/b.mp4", "dog/b.wav"),  # the sound beside it is its sound
        Row("c", "dog", "dog/c.wav"),
    ]
    assert left_out == {".txt": 1, ".csv": 1}


def test_folders_of_parts(tmp_path):
    rows, _ = class_folders(touch(tmp_path, "train/cat/a.mp4", "train/dog/b.mp4", "Test/cat/c.mp4"))
    assert [(row.part, row.label) for row in rows] == [("test", "cat"), ("train", "cat"), ("train", "dog")]


@pytest.mark.parametrize(("names", "words"), [
    (["cat/a.txt"], "no videos or sounds in folders of classes"),
    (["a.mp4", "b.mp4"], "no videos or sounds in folders of classes"),
    (["cat/a.mp4"], "at least two classes are needed"),
    (["train/a.mp4", "test/cat/a.mp4"], "not in a folder of a class"),
    (["cat/a.mp4", "cat/a.avi", "dog/b.mp4"], "clip cat_a is also in"),
])  # fmt: skip
def test_bad_folders(tmp_path, names, words):
    with pytest.raises(UserError, match=words) as error:
        class_folders(touch(tmp_path, *names))
    assert "\n" not in str(error.value)


# Splits ---------------------------------------------------------------------------------------------------------------


def made_up(count: int, classes: int, groups: int = 0) -> list[Row]:
    group = (lambda i: f"g{i % groups}") if groups else (lambda i: None)
    return [Row(f"c{i:03d}", f"class {i % classes}", f"{i}.mp4", group=group(i // classes)) for i in range(count)]


def parts_of(split) -> dict[str, set[str]]:
    return {part: {clip for clip, _ in rows} for part, rows in split.parts.items()}


def test_a_stratified_split_is_even_and_does_not_depend_on_the_order_of_rows():
    rows = made_up(100, 4)
    split = split_rows(rows, {"test": 0.2, "val": 0.2}, {})
    shares = {part: Counter(label for _, label in found) for part, found in split.parts.items()}
    assert {part: set(count.values()) for part, count in shares.items()} == {"train": {15}, "val": {5}, "test": {5}}
    assert set.union(*parts_of(split).values()) == {row.clip for row in rows}
    assert parts_of(split_rows(rows[::-1], {"test": 0.2, "val": 0.2}, {})) == parts_of(split)
    assert split.record["name"] == "stratified" and split.groups is None
    order = [row.clip for row in rows]
    assert all([clip for clip, _ in found] == sorted((clip for clip, _ in found), key=order.index)
               for found in split.parts.values())  # fmt: skip


def test_no_group_is_in_two_parts():
    rows = made_up(200, 4, groups=10)
    split = split_rows(rows, {"test": 0.2, "val": 0.1}, {})
    group_of = {row.clip: row.group for row in rows}
    found = {part: {group_of[clip] for clip in clips} for part, clips in parts_of(split).items()}
    assert {part: len(names) for part, names in found.items()} == {"train": 7, "val": 1, "test": 2}
    assert sum(map(len, found.values())) == len(set.union(*found.values())) == 10
    assert split.record["shared_groups"] == 0 and dict(split.groups) == group_of


def test_given_parts_are_kept():
    rows = [row._replace(part=("train", "test", "val")[i % 3]) for i, row in enumerate(made_up(30, 2))]
    split = split_rows(rows, {"test": 0.5}, {})
    assert {part: len(found) for part, found in split.parts.items()} == {"train": 10, "val": 10, "test": 10}
    assert split.record["name"] == "given"


@pytest.mark.parametrize(("rows", "words"), [
    (made_up(10, 1), "clips have the label 'class 0'"),
    (made_up(5, 5), "each of 5 labels has one clip"),
    (made_up(20, 2, groups=1), "1 group, g0"),
    ([row._replace(part="train") for row in made_up(4, 2)], "no clip in part test"),
])  # fmt: skip
def test_splits_that_cannot_be(rows, words):
    with pytest.raises(UserError, match=words) as error:
        split_rows(rows, {"test": 0.2}, {})
    assert "\n" not in str(error.value)


# Flags ----------------------------------------------------------------------------------------------------------------


def test_recipes_with_parameters():
    recipe = recipe_flag("logmel:rate=8000:seconds=1.5:bands=40").recipe(9)
    assert (recipe.rate, recipe.shape, recipe.samples, recipe.hop) == (8000, (40, 150), 12_000, 80)
    assert recipe_flag("logmel").recipe(2.0).shape == (64, 200) and recipe_flag("none").recipe(1) is None
    assert recipe_flag("fbank").recipe(1).shape == (1024, 128)


@pytest.mark.parametrize(("flags", "words"), [
    (["--audio_recipe", "mfcc"], "'mfcc' is unknown; allowed: logstft"),
    (["--audio_recipe", "logmel:rte=1"], "'rte=1' is no parameter of logmel"),
    (["--audio_recipe", "logmel:rate=x"], "rate 'x' is no number"),
    (["--audio_recipe", "logmel:rate=5"], "rate 5; allowed"),
    (["--audio_recipe", "fbank:bands=3"], "'bands=3' is no parameter of fbank"),
    (["--crop", "1,2,3"], "not x,y,width,height"),
    (["--crop", "1,2,3,-4"], "not x,y,width,height"),
    (["--crop", "1,2,3,4"], "at least 8 pixels"),
    (["--arrays", "text"], "is not NAME=DIR"),
    (["--arrays", "train=x"], "is not NAME=DIR"),
    (["--arrays", "text=nowhere"], "--arrays text=nowhere: no such folder"),
    (["--arrays", "audio={raw}"], "the modality audio already exists"),
    (["--fps", "0"], "--fps"),
    (["--frames", "-1"], "--frames"),
    (["--frames", "0", "--flow"], "--flow: needs frames"),
    (["--frames", "0"], "modalities: audio; two or more are needed"),
    (["--audio_recipe", "none"], "modalities: video; two or more"),
    (["--test_fraction", "0.6", "--val_fraction", "0.5"], "no clips to train on"),
    (["--role", "digit"], "--role: only valid with GRID"),
    (["--split", "actor"], "--split: only valid with CREMAD, KineticSound, UCF101"),
    (["--dataset", "GRID"], "needs --raw DIR, without --table"),
    (["--raw", "nowhere"], "no such folder"),
    (["--raw", "{empty}"], "none of the 2 files is there (such as a.mp4)"),
])  # fmt: skip
def test_mistakes_in_flags_are_one_line(tmp_path, flags, words):
    raw = touch(tmp_path / "raw", "a.mp4", "b.mp4")
    (tmp_path / "empty").mkdir()
    path = table(raw, "file,label\na.mp4,x\nb.mp4,y\n")
    places = {"raw": raw, "empty": tmp_path / "empty"}
    words_typed = [flag.format(**places) for flag in flags]
    with pytest.raises(UserError) as error:
        main(["--table", str(path), "--out", str(tmp_path / "out"), *words_typed])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_fraction_beside_given_parts_is_refused(tmp_path):
    touch(tmp_path / "raw", "train/a/1.mp4", "train/b/2.mp4", "test/a/3.mp4", "test/b/4.mp4")
    with pytest.raises(UserError, match="--val_fraction: the clips already have parts"):
        main(["--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--val_fraction", "0.2"])


def test_own_clips_need_an_out(tmp_path):
    with pytest.raises(UserError, match="--out: missing"):
        main(["--raw", str(tmp_path)])


# From raw clips to a trained network ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    """Four films of 6 s with sound, each of two labels: three seconds of one, three of the other."""
    raw = tmp_path_factory.mktemp("films")
    for i in range(4):
        write_video(raw / "deep" / f"f{i}.mp4", 6, 25, SIZE, tone(6, 44_100, 1), seed=i)
    rows = ["file,label,start,end,group"]
    rows += [f"deep/f{i}.mp4,{'first' if k < 3 else 'second'},{k},{k + 1},film {i}" for i in range(4) for k in range(6)]
    (raw / "clips.csv").write_text("\n".join(rows) + "\n")
    return raw


def test_two_commands(films, tmp_path, capsys):
    """A table and its clips by the script, then training with nothing but the folder; a second run makes nothing."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(ROOT / "scripts" / "prepare.sh"), "--table", "clips.csv", "--out", str(tmp_path / "out"),
               "--fps", "5", "--frames", "3", "--size", "32", "--audio_recipe=logmel:bands=16",
               "--workers", "1"]  # fmt: skip
    done = subprocess.run(
        command, cwd=films, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "24 of 24 clips ready" in done.stdout and "groups in two parts: 0" in done.stdout
    assert f"next: python train.py --train --dataset folder --data_root {tmp_path / 'out'}" in done.stdout
    out = tmp_path / "out"
    spec = spec_of("folder", out)
    assert spec.names == ("audio", "video") and spec.image_size == 32 and spec.modality("video").frames == 3
    assert spec.modality("audio").recipe.shape == (16, 100), "as long as the clips, 1 s"
    folder = load_folder(out, spec)
    assert folder.classes == ["first", "second"] and folder.shapes["audio"] == (16, 100)
    assert {len(frames) for part in folder.parts.values() for frames in part.files["video"]} == {5}
    assert len(folder.parts["test"].clips) == 6 and {folder.groups[c] for c in folder.parts["test"].clips} < {
        f"film {i}" for i in range(4)
    }
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.suffix in (".jpg", ".npy")}
    flags = command[2:]
    assert main([flag if flag != "clips.csv" else str(films / "clips.csv") for flag in flags]) == 0
    assert "(0 made now, 24 found finished)" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}

    import train

    train.main(["--train", "--dataset", "folder", "--data_root", str(out), "--log_path", str(tmp_path),
                "--run_name", "r", "--epochs", "2", "--warmup", "1", "--batch_size", "6", "--num_workers", "0",
                "--encoder", "resnet18_thin", "--device", "cpu"])  # fmt: skip
    rows = records(tmp_path / "r" / "partition.csv")
    assert len(rows) == 18 and {row["label"] for row in rows} == {"first", "second"}, "labels as names"


def test_sounds_and_arrays_in_folders_of_classes(tmp_path, capsys):
    """No table, no videos: spectrograms and vectors; a clip whose array is broken is named and not made."""
    raw, vectors = tmp_path / "raw", tmp_path / "vectors"
    vectors.mkdir()
    for i in range(12):
        write_wav(raw / ("low" if i % 2 else "high") / f"s{i}.wav", 0.6, seed=i)
        np.save(vectors / f"s{i}.npy", np.arange(5) + i)  # int64
    np.save(vectors / "s3.npy", np.full(5, np.nan))
    (vectors / "s4.npy").unlink()
    flags = ["--raw", str(raw), "--out", str(tmp_path / "out"), "--arrays", f"text={vectors}", "--workers", "1"]
    assert main(flags) == 1
    printed = capsys.readouterr().out
    assert "10 of 12 clips ready" in printed and "--allow_missing" in printed
    skipped = {row["clip"]: row["kind"] for row in records(tmp_path / "out" / "skipped.csv")}
    assert skipped == {"s3": "bad_array", "s4": "missing_array"}
    assert not (tmp_path / "out" / "audio" / "s3.npy").exists()
    for i in (3, 4):
        np.save(vectors / f"s{i}.npy", np.arange(5) + i)
    assert main(flags) == 0
    spec = spec_of("folder", tmp_path / "out")
    assert spec.names == ("audio", "text") and spec.modality("audio").recipe.shape == (64, 60)
    folder = load_folder(tmp_path / "out", spec)
    assert folder.classes == ["high", "low"] and folder.shapes["text"] == (5,)
    stored = np.load(tmp_path / "out" / "text" / "s3.npy")
    assert stored.dtype == np.float32 and stored.tolist() == [3, 4, 5, 6, 7]


def test_the_kind_of_arrays(tmp_path):
    rng = np.random.default_rng(0)
    assert kind_of({"a": rng.random((3, 4)), "b": rng.random((3, 4))}) == "array"
    assert kind_of({"a": rng.random((3, 4)), "b": rng.random((9, 4))}) == "sequence"
    assert kind_of({"a": rng.random(4), "b": rng.random(5)}) == "array", "the check names them"


def test_dataset_json_follows_the_flags(films, tmp_path, capsys):
    flags = ["--table", str(films / "clips.csv"), "--out", str(tmp_path / "out"), "--workers", "1", "--fps", "2"]
    assert main([*flags, "--frames", "2", "--crop", "8,8,40,32", "--no_mirror", "--flow"]) == 0
    found = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert found["image_size"] == 32 and found["mirror"] is False
    assert [modality["name"] for modality in found["modalities"]] == ["audio", "video", "flow"]
    folder = load_folder(tmp_path / "out", spec_of("folder", tmp_path / "out"))
    assert {len(frames) for part in folder.parts.values() for frames in part.files["flow"]} == {2}
    capsys.readouterr()
    assert main([*flags, "--frames", "4"]) == 0
    assert "dataset.json was different and is written again" in capsys.readouterr().out
    assert spec_of("folder", tmp_path / "out").names == ("audio", "video")
