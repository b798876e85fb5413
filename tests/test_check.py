"""The doctor: each planted fault is reported under its kind and by its name, and only valid folders pass."""

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import make_folder

from benchmarks.raw_samples import cremad_names, tone, write_video, write_wav
from dataset.folder import load_folder
from dataset.inspect import array_fault, inspect_folder
from dataset.pack import read_array
from dataset.prepare.__main__ import main
from dataset.prepare.check import inspect_deep
from dataset.specs import get_spec
from utils.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
POINTER_TEXT = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"1" * 64 + b"\nsize 265922\n"


def kinds(report):
    return {problem.kind: problem for problem in report.problems}


def doctor(root, capsys, *flags):
    """(exit status, report as JSON)"""
    capsys.readouterr()
    status = main(["--check", str(root), "--json", *flags])
    return status, json.loads(capsys.readouterr().out)


# One file -------------------------------------------------------------------------------------------------------------


def test_array_files(tmp_path):
    path = tmp_path / "a.npy"
    good = np.ones((12, 20), np.float32)
    np.save(path, good)
    whole, headers = path.read_bytes(), {}
    assert array_fault(str(path), headers) == array_fault(str(path), headers) == ("", (12, 20))
    others = [good.astype(kind) for kind in (np.float64, np.float16, np.int64, np.uint8, np.bool_, ">f4")]
    for array in (good[0], good[None], np.asfortranarray(good), *others):
        np.save(path, array)
        assert array_fault(str(path), headers) == ("", array.shape)
        assert np.array_equal(read_array(path, array.shape), array.astype(np.float32))
        path.write_bytes(path.read_bytes()[:-1])
        assert "truncated" in array_fault(str(path), headers)[0]
    path.write_bytes(whole[:-1])
    assert "truncated" in array_fault(str(path), headers)[0]
    path.write_bytes(whole + b"\0")
    assert "truncated" in array_fault(str(path), {})[0]
    for array, reason in (
        (good.astype(np.complex64), "type complex64"),
        (good.astype(np.longdouble), "type float128"),
        (np.array(["a"]), "type <U1"),
        (good[0, 0], "shape ()"),
        (good[:0], "shape (0, 20)"),
        (np.array([{}], dtype=object), "type object"),
    ):
        np.save(path, array)
        assert reason in array_fault(str(path), headers)[0]
    for content, reason in ((b"", "empty"), (POINTER_TEXT, "git-lfs"), (b"\x93NUMPY\x01\0\xff\xff{", "not a .npy")):
        path.write_bytes(content)
        assert reason in array_fault(str(path), headers)[0]
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (2**32, 2**32)})
    assert "truncated" in array_fault(str(path), {})[0]
    assert array_fault(str(tmp_path / "b.npy"), {})[0] == "no such file"


# A training folder ----------------------------------------------------------------------------------------------------


def test_a_valid_folder_passes(tmp_path, capsys):
    root = make_folder(tmp_path / "data")
    assert main(["--check", str(root)]) == 0
    assert "training folder of folder: valid" in capsys.readouterr().out
    status, report = doctor(root, capsys)
    assert status == 0 and report["valid"] and report["numbers"]["clips"] == {"train": 24, "test": 12}
    assert report["numbers"]["per_class"]["train"] == {"a": 8, "b": 8, "c": 8}


def test_every_planted_fault_is_reported(tmp_path, capsys):
    root = make_folder(tmp_path / "data", train=40)
    sound = [root / "audio" / f"train_{i:04d}.npy" for i in range(40)]
    frames = [root / "visual" / f"train_{i:04d}" for i in range(40)]
    sound[0].unlink()
    sound[1].write_bytes(b"")
    np.save(sound[2], np.zeros((5, 5), np.float32))
    np.save(sound[3], np.full((33, 20), 1e300))
    np.save(sound[4], np.full((33, 20), np.nan, np.float32))
    np.save(sound[5], np.full((33, 20), np.inf, np.float32))
    np.save(sound[6], np.zeros((33, 20), np.float32))
    shutil.rmtree(frames[7])
    for path in frames[8].iterdir():
        path.unlink()
    one = frames[9] / "frame_00002.jpg"
    one.write_bytes(one.read_bytes()[:-40])
    two = frames[10] / "frame_00002.jpg"
    data = two.read_bytes()
    two.write_bytes(data[: data.index(b"\xff\xc4")] + b"\xff\xd9")  # dimensions and end marker, nothing to decode
    (frames[11] / "frame_00001.jpg").write_bytes(POINTER_TEXT)
    with open(root / "train.csv", "a") as file:
        file.write("train_0012,a\nx1,nonsense\nonly one field\n../up,a\ntest_0000,a\n")
    status, report = doctor(root, capsys)
    assert status == 1 and not report["valid"]
    found = {(problem["kind"], problem["clip"]) for problem in report["problems"]}
    assert found == {
        ("missing_array", "train_0000"),
        ("bad_array", "train_0001"),
        ("bad_array", "train_0002"),
        ("bad_array", "train_0003"),
        ("bad_array", "train_0004"),
        ("bad_array", "train_0005"),
        ("missing_frames", "train_0007"),
        ("missing_frames", "train_0008"),
        ("bad_frame", "train_0009"),
        ("bad_frame", "train_0010"),
        ("bad_frame", "train_0011"),
        ("duplicate_clip", "train_0012"),
        ("unknown_label", "x1"),
        ("bad_row", ""),
        ("unsafe_clip", "../up"),
        ("clip_in_two_parts", "test_0000"),
    }
    assert [(warning["kind"], warning["clip"]) for warning in report["warnings"]] == [
        ("cast", ""),
        ("constant", "train_0006"),
    ]
    assert main(["--check", str(root)]) == 1
    printed = capsys.readouterr().out
    assert "NOT valid, 16 problem(s)" in printed and "bad_array: 5" in printed and "train_0009" in printed


def test_what_only_a_decoder_sees_stops_the_doctor_and_not_the_start(tmp_path):
    root = make_folder(tmp_path / "data")
    np.save(root / "audio" / "test_0003.npy", np.full((33, 20), np.nan, np.float32))
    frame = root / "visual" / "train_0001" / "frame_00002.jpg"
    frame.write_bytes(frame.read_bytes()[:-40])
    assert load_folder(root, get_spec("folder")).missing == []
    report = inspect_deep(root, get_spec("folder"))
    assert {problem.clip: problem.reason for problem in report.problems} == {
        "train_0001": "truncated JPEG (no end marker)",
        "test_0003": "NaN or infinity in it",
    }
    assert len(report.files) == 34 and "train_0001" not in report.files


def test_a_folder_that_describes_itself(tmp_path, capsys):
    """dataset.json names the modalities, which the doctor reads too."""
    root = make_folder(tmp_path / "data")
    shutil.copytree(root / "visual", root / "flow")
    (root / "text").mkdir()
    for path in (root / "audio").iterdir():
        np.save(root / "text" / path.name, np.arange(5, dtype=np.float32))
    shutil.rmtree(root / "audio")
    modalities = [
        {"name": "flow", "kind": "frames", "folder": "flow"},
        {"name": "video", "kind": "frames", "folder": "visual"},
        {"name": "text", "kind": "array", "folder": "text"},
    ]
    (root / "dataset.json").write_text(json.dumps({"modalities": modalities}))
    assert doctor(root, capsys)[0] == 0
    (root / "flow" / "test_0000" / "frame_00001.jpg").write_bytes(POINTER_TEXT)
    np.save(root / "text" / "test_0001.npy", np.full(5, np.inf, np.float32))
    status, report = doctor(root, capsys)
    assert status == 1 and {(problem["kind"], problem["clip"]) for problem in report["problems"]} == {
        ("bad_frame", "test_0000"),
        ("bad_array", "test_0001"),
    }
    modalities[2]["recipe"] = "mp3"
    (root / "dataset.json").write_text(json.dumps({"modalities": modalities}))
    with pytest.raises(UserError, match=r"dataset\.json: .*'mp3'"):
        main(["--check", str(root)])


def test_no_pickle_is_ever_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    root = make_folder(tmp_path / "data")
    np.save(root / "audio" / "test_0003.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    assert "object" in inspect_deep(root, get_spec("folder")).problems[0].reason
    assert not (tmp_path / "trapped").exists()


def test_the_recorded_recipe_decides_the_shape(tmp_path):
    root = make_folder(tmp_path / "data", audio_shape=(1024, 128), train=3, test=3)
    (root / "prepare.json").write_text('{"audio_recipe": "logstft"}')
    assert set(kinds(inspect_folder(root, get_spec("folder")))) == {"bad_array"}
    (root / "prepare.json").write_text('{"audio_recipe": "fbank"}')
    assert inspect_folder(root, get_spec("folder")).shapes == {"audio": (1024, 128)}
    (root / "prepare.json").write_text('{"audio_recipe": ["fbank"]}')
    with pytest.raises(UserError, match=r"prepare\.json"):
        inspect_folder(root, get_spec("folder"))


def link_folder(root: Path, lists: Path) -> None:
    """A whole CREMA-D of one picture and one spectrogram under 7,442 names."""
    (root / "audio").mkdir(parents=True)
    cv2.imwrite(str(root / "a.jpg"), np.zeros((8, 8, 3), np.uint8))
    np.save(root / "a.npy", np.arange(257 * 188, dtype=np.float32).reshape(257, 188))
    for name in ("train.csv", "test.csv", "stat.csv"):
        shutil.copyfile(lists / name, root / name)
    for part in ("train.csv", "test.csv"):
        for line in (root / part).read_text().splitlines():
            clip = line.split(",")[0]
            (root / "visual" / clip).mkdir(parents=True)
            os.link(root / "a.jpg", root / "visual" / clip / "frame_00001.jpg")
            os.link(root / "a.npy", root / "audio" / f"{clip}.npy")


@pytest.mark.skipif(not (SHARED / "cremad").is_dir(), reason="the published lists are not on this machine")
def test_the_official_split_passes_with_a_warning_about_91_actors(tmp_path, capsys):
    root = tmp_path / "data"
    link_folder(root, SHARED / "cremad")
    report = inspect_folder(root, get_spec("CREMAD"))
    assert report.problems == [] and [warning.kind for warning in report.warnings] == ["actor_overlap"]
    assert report.numbers["shared_actors"] == 91 and "91 actors" in report.warnings[0].reason
    assert report.numbers["per_class"]["train"] == get_spec("CREMAD").train_class_counts
    rows = (root / "train.csv").read_text().splitlines()
    (root / "train.csv").write_text("\n".join(rows[1:]))
    warnings = inspect_folder(root, get_spec("CREMAD")).warnings
    assert {warning.kind for warning in warnings} == {"actor_overlap", "clip_counts", "class_counts"}


# A raw folder ---------------------------------------------------------------------------------------------------------


def test_a_raw_cremad_folder(tmp_path, capsys):
    names, raw = cremad_names(8), tmp_path / "raw"
    flv = [write_video(raw / "VideoFlash" / f"{name}.flv", 4, size=(96, 64)) for name in names]
    wav = [write_wav(raw / "AudioWAV" / f"{name}.wav") for name in names]
    assert doctor(raw, capsys)[0] == 0
    flv[0].write_bytes(POINTER_TEXT)
    flv[1].write_bytes(b"")
    wav[2].unlink()
    flv[3].write_bytes(flv[4].read_bytes()[:30_000])
    wav[4].write_bytes(b"\0" * 5_000)
    write_wav(wav[5], 0.001)
    wav[6].write_bytes(wav[5].read_bytes()[:44] + b"\0" * 32)
    status, report = doctor(raw, capsys)
    assert status == 1 and report["kind"] == "raw" and report["dataset"] == "CREMAD"
    assert {(problem["kind"], problem["clip"]) for problem in report["problems"]} == {
        ("lfs_pointer", names[0]),
        ("empty_file", names[1]),
        ("missing_file", names[2]),
        ("broken_video", names[3]),
        ("broken_sound", names[4]),
    }
    assert {warning["kind"] for warning in report["warnings"]} == {"silent", "clip_counts"}


def test_a_raw_kinetics_folder(tmp_path, capsys):
    raw = tmp_path / "raw"
    write_video(raw / "good.mp4", 2, 25, (64, 48), tone(2, 44_100))
    write_video(raw / "drums" / "dumb.mp4", 2, 25, (64, 48))
    (raw / "drums" / "noise.mp4").write_bytes(b"\1" * 3_000)
    status, report = doctor(raw, capsys)
    assert status == 1 and report["dataset"] == "KineticSound"
    assert {(problem["kind"], problem["clip"]) for problem in report["problems"]} == {
        ("no_audio_track", "dumb"),
        ("broken_video", "noise"),
    }
    (tmp_path / "my_train.txt").write_text("good,10,3\nlost,10,3\n")
    (tmp_path / "my_test.txt").write_text("dumb,10,3\n")
    status, report = doctor(raw, capsys, "--dataset", "KineticSound", "--split_dir", str(tmp_path))
    assert {problem["clip"] for problem in report["problems"]} == {"lost", "dumb"}
