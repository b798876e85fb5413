"""The doctor: each planted fault is reported under its kind and by its name, and only sound folders pass."""

import json
import os
import shutil
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import make_folder

from benchmarks.raw_samples import cremad_names, tone, write_video, write_wav
from dataset.check import MAX_SIDE, inspect_folder, jpeg_fault, npy_fault
from dataset.folder import load_folder
from dataset.prepare import main
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


@pytest.fixture
def jpeg(tmp_path):
    cv2.imwrite(str(tmp_path / "a.jpg"), np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    return tmp_path / "a.jpg"


def test_good_jpegs(jpeg):
    assert jpeg_fault(str(jpeg)) == ""
    cv2.imwrite(str(jpeg), np.zeros((48, 64, 3), np.uint8), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])
    assert jpeg_fault(str(jpeg)) == ""
    data = jpeg.read_bytes()
    jpeg.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", 60_002) + b"\0" * 60_000 + data[2:])
    assert jpeg_fault(str(jpeg)) == "", "a large EXIF segment before the dimensions"
    jpeg.write_bytes(data + b"\0" * 8)
    assert jpeg_fault(str(jpeg)) == "", "padding behind the end marker"


def test_bad_jpegs(jpeg):
    data = jpeg.read_bytes()
    at = data.index(b"\xff\xc0") + 5
    huge = data[:at] + struct.pack(">HH", MAX_SIDE + 1, 64) + data[at + 4 :]
    flat = data[:at] + struct.pack(">HH", 0, 64) + data[at + 4 :]
    cases = [
        (b"", "empty file"),
        (POINTER_TEXT, "git-lfs pointer"),
        (b"\x89PNG\r\n", "not a JPEG"),
        (data[: len(data) // 2], "truncated"),
        (b"\xff\xd8\xff\xd9", "without dimensions"),
        (b"\xff\xd8" + b"\xff\xe0\0\0" * 500 + b"\xff\xd9", "without dimensions"),
        (huge, f"{MAX_SIDE + 1} pixels"),
        (flat, "0 pixels"),
    ]
    for content, reason in cases:
        jpeg.write_bytes(content)
        assert reason in jpeg_fault(str(jpeg)), reason
    assert "cannot be read" in jpeg_fault(str(jpeg.parent / "nowhere.jpg"))


def test_spectrogram_files(tmp_path):
    path = tmp_path / "a.npy"
    good = np.ones((12, 20), np.float32)
    np.save(path, good)
    whole, headers = path.read_bytes(), {}
    assert npy_fault(str(path), headers) == npy_fault(str(path), headers) == ("", (12, 20))
    path.write_bytes(whole[:-1])
    assert "truncated" in npy_fault(str(path), headers)[0]
    path.write_bytes(whole + b"\0")
    assert "truncated" in npy_fault(str(path), {})[0]
    for array, reason in (
        (good.astype(np.float64), "float64"),
        (good[0], "shape (20,)"),
        (good[:0], "shape (0, 20)"),
        (np.asfortranarray(good), "column order"),
        (np.array([{}], dtype=object), "type object"),
    ):
        np.save(path, array)
        assert reason in npy_fault(str(path), headers)[0]
    for content, reason in ((b"", "empty"), (POINTER_TEXT, "git-lfs"), (b"\x93NUMPY\x01\0\xff\xff{", "not a .npy")):
        path.write_bytes(content)
        assert reason in npy_fault(str(path), headers)[0]
    huge = whole.replace(b"(12, 20)", b"(4294967296, 4294967296)")
    path.write_bytes(huge)
    assert npy_fault(str(path), {})[0]
    assert npy_fault(str(tmp_path / "b.npy"), {})[0] == "no such file"


# A training folder ----------------------------------------------------------------------------------------------------


def test_a_sound_folder_passes(tmp_path, capsys):
    root = make_folder(tmp_path / "data")
    assert main(["--check", str(root)]) == 0
    assert "training folder of folder: sound" in capsys.readouterr().out
    status, report = doctor(root, capsys)
    assert status == 0 and report["sound"] and report["numbers"]["clips"] == {"train": 24, "test": 12}
    assert report["numbers"]["per_class"]["train"] == {"a": 8, "b": 8, "c": 8}


def test_every_planted_fault_is_reported(tmp_path, capsys):
    root = make_folder(tmp_path / "data", train=40)
    sound = [root / "audio" / f"train_{i:04d}.npy" for i in range(40)]
    frames = [root / "visual" / f"train_{i:04d}" for i in range(40)]
    sound[0].unlink()
    sound[1].write_bytes(b"")
    np.save(sound[2], np.zeros((5, 5), np.float32))
    np.save(sound[3], np.zeros((33, 20), np.float64))
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
    assert status == 1 and not report["sound"]
    found = {(problem["kind"], problem["clip"]) for problem in report["problems"]}
    assert found == {
        ("missing_spectrogram", "train_0000"),
        ("bad_spectrogram", "train_0001"),
        ("bad_spectrogram", "train_0002"),
        ("bad_spectrogram", "train_0003"),
        ("bad_spectrogram", "train_0004"),
        ("bad_spectrogram", "train_0005"),
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
    assert [(warning["kind"], warning["clip"]) for warning in report["warnings"]] == [("silent", "train_0006")]
    assert main(["--check", str(root)]) == 1
    printed = capsys.readouterr().out
    assert "NOT sound, 16 problem(s)" in printed and "bad_spectrogram: 5" in printed and "train_0009" in printed


def test_what_only_a_decoder_sees_stops_the_doctor_and_not_the_start(tmp_path):
    root = make_folder(tmp_path / "data")
    np.save(root / "audio" / "test_0003.npy", np.full((33, 20), np.nan, np.float32))
    assert load_folder(root, get_spec("folder")).missing == []
    assert "NaN" in inspect_folder(root, get_spec("folder"), deep=True).problems[0].reason


def test_no_pickle_is_ever_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    root = make_folder(tmp_path / "data")
    np.save(root / "audio" / "test_0003.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    assert "object" in inspect_folder(root, get_spec("folder"), deep=True).problems[0].reason
    assert not (tmp_path / "trapped").exists()


def test_the_recorded_recipe_decides_the_shape(tmp_path):
    root = make_folder(tmp_path / "data", audio_shape=(1024, 128), train=3, test=3)
    (root / "prepare.json").write_text('{"audio_recipe": "logstft"}')
    assert set(kinds(inspect_folder(root, get_spec("folder"), deep=False))) == {"bad_spectrogram"}
    (root / "prepare.json").write_text('{"audio_recipe": "fbank"}')
    assert inspect_folder(root, get_spec("folder"), deep=False).audio_shape == (1024, 128)
    (root / "prepare.json").write_text('{"audio_recipe": ["fbank"]}')
    with pytest.raises(UserError, match=r"prepare\.json"):
        inspect_folder(root, get_spec("folder"), deep=False)


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
    report = inspect_folder(root, get_spec("CREMAD"), deep=False)
    assert report.problems == [] and [warning.kind for warning in report.warnings] == ["actor_overlap"]
    assert report.numbers["shared_actors"] == 91 and "91 actors" in report.warnings[0].reason
    assert report.numbers["per_class"]["train"] == get_spec("CREMAD").train_class_counts
    rows = (root / "train.csv").read_text().splitlines()
    (root / "train.csv").write_text("\n".join(rows[1:]))
    warnings = inspect_folder(root, get_spec("CREMAD"), deep=False).warnings
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
