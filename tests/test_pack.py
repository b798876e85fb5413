"""Frames and arrays are read whole or named, and packs are never half or outdated, whoever is killed when."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import make_folder

import train
from dataset import pack as pack_module
from dataset.augment import pick_frames
from dataset.build import build_data
from dataset.clips import Feed, make_clips
from dataset.files import FrameFiles, fed_frames
from dataset.folder import Folder, load_folder
from dataset.pack import (
    common_size,
    frame_size,
    frame_sizes,
    is_packed,
    open_pack,
    pack_bytes,
    read_array,
    read_frame,
    room_for_packs,
    shrink,
    stored_size,
)
from dataset.specs import spec_of
from remix import batches_of
from utils.errors import UserError
from utils.files import Busy, locked

REPO = Path(__file__).resolve().parents[1]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
BOMB = b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xdc\xff\xdc\x03" + bytes(9) + b"\xff\xd9"
SIZES = {"video": (40, 48)}
SHAPES = {"audio": (33, 20), "text": (7,)}


def make_three(root: Path) -> Folder:
    """A folder of audio, video and vectors of 7 numbers."""
    make_folder(root)
    (root / "text").mkdir()
    for i, path in enumerate(sorted((root / "audio").iterdir())):
        np.save(root / "text" / path.name, np.full(7, i, np.float32))
    modalities = [
        {"name": "audio", "kind": "array", "folder": "audio"},
        {"name": "video", "kind": "frames", "folder": "visual"},
        {"name": "text", "kind": "array", "folder": "text"},
    ]
    (root / "dataset.json").write_text(json.dumps({"modalities": modalities}))
    return load_folder(root, spec_of("folder", root))


@pytest.fixture
def folder(tmp_path):
    return make_three(tmp_path / "data")


def packs(folder: Folder) -> list[str]:
    """What lies in .pack beside the lock and the record of headers."""
    return sorted(path.name for path in (folder.root / ".pack").iterdir() if path.name not in ("lock", "headers.npz"))


# One file -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def jpeg(tmp_path):
    path = tmp_path / "data set" / "visual" / "clip" / "a.jpg"
    path.parent.mkdir(parents=True)
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    return path


def test_whole_frames(jpeg):
    data, image = jpeg.read_bytes(), read_frame(jpeg)
    assert image.shape == (48, 64, 3) and image.dtype == np.uint8
    assert np.array_equal(image, cv2.imread(str(jpeg), cv2.IMREAD_COLOR_RGB))
    assert frame_size(jpeg) == (48, 64)
    jpeg.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", 60_002) + b"\0" * 60_000 + data[2:])
    assert np.array_equal(read_frame(jpeg), image), "a large EXIF segment before the dimensions"
    jpeg.write_bytes(data + b"\0" * 8)
    assert np.array_equal(read_frame(jpeg), image), "padding behind the end marker"
    cv2.imwrite(str(jpeg), image, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])
    assert read_frame(jpeg).shape == image.shape


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (POINTER, "git-lfs pointer; run git lfs pull"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "truncated PNG (no end marker)"),
        (b"GIF89a" + bytes(100), "not a JPEG or PNG file"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(100), "truncated JPEG"),
        (b"\xff\xd8\xff\xd9", "cannot be decoded"),
        (BOMB, "cannot be decoded"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_broken_frames_are_one_line_with_the_command_that_lists_all(jpeg, content, reason):
    jpeg.unlink()
    if content is not None:
        jpeg.write_bytes(content)
    for read in (read_frame, frame_size):
        with pytest.raises(UserError) as error:
            read(jpeg)
        text = str(error.value)
        assert text.startswith(f"{jpeg}: {reason}") and "\n" not in text
        assert f"python -m dataset.prepare --check '{jpeg.parents[2]}' lists all" in text and "--allow_missing" in text


def test_a_frame_cut_short_is_not_filled_with_grey(jpeg):
    data = jpeg.read_bytes()
    jpeg.write_bytes(data[: len(data) // 2])
    assert cv2.imread(str(jpeg)) is not None, "OpenCV says nothing"
    with pytest.raises(UserError, match="truncated JPEG"):
        read_frame(jpeg)
    jpeg.write_bytes(cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    assert read_frame(jpeg).shape == (8, 8, 3), "a PNG under another name is decoded as what it is"


def test_arrays(tmp_path):
    path = tmp_path / "audio" / "a.npy"
    path.parent.mkdir()
    for shape in ((7,), (3, 4), (2, 3, 4)):
        np.save(path, np.ones(shape, np.float32))
        assert read_array(path, shape).shape == shape
    doctor = f"--check {tmp_path} lists all"
    with pytest.raises(UserError, match=rf"shape \(2, 3, 4\), not \(7,\); .*{doctor}"):
        read_array(path, (7,))
    np.save(path, np.full(7, np.nan, np.float32))
    with pytest.raises(UserError, match="NaN"):
        read_array(path, (7,))
    np.save(path, np.array([{}], dtype=object))
    with pytest.raises(UserError, match="cannot be read"):
        read_array(path, (1,))
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        read_array(path, (1,))


def test_sizes(folder):
    files = folder.parts["train"].files["video"]
    cv2.imwrite(str(files[0][0]), np.zeros((90, 20, 3), np.uint8))
    first = frame_sizes(files)
    assert first.tolist() == [[90, 20]] + [[40, 48]] * 23 and frame_sizes(files) is first
    assert common_size(first) == (40, 48) and common_size(first, 20) == (20, 24) and common_size(first, 64) == (40, 48)
    assert stored_size([paths[0] for paths in files]) == (40, 48)
    assert shrink((90, 120), None) == (90, 120)


# A pack ---------------------------------------------------------------------------------------------------------------


def test_a_pack_holds_every_modality(folder):
    part = folder.parts["train"]
    pack = open_pack(folder.root, "train", part, SIZES, SHAPES)
    assert {name: (array.shape, array.dtype.name) for name, array in pack.arrays.items()} == {
        "video": ((72, 3, 40, 48), "uint8"),
        "audio": ((24, 33, 20), "float32"),
        "text": ((24, 7), "float32"),
    }
    assert list(pack.first) == list(pack.counts) == ["video"]
    for i in (0, 5, 23):
        rows = slice(pack.first["video"][i], pack.first["video"][i] + pack.counts["video"][i])
        frames = np.stack([read_frame(path) for path in part.files["video"][i]]).transpose(0, 3, 1, 2)
        assert np.array_equal(pack.arrays["video"][rows], frames)
        for name in SHAPES:
            assert np.array_equal(pack.arrays[name][i], np.load(part.files[name][i]))
    written = sum(path.stat().st_size for path in (folder.root / ".pack").rglob("*.npy"))
    assert written == pytest.approx(pack_bytes(part, SIZES, SHAPES), abs=3 * 128 + 1)
    assert sorted(p.name for p in (folder.root / ".pack" / packs(folder)[0]).iterdir()) == [
        "audio-00000.npy",
        "pack.json",
        "text-00000.npy",
        "video-00000.npy",
    ]


def test_a_pack_of_some_modalities(folder):
    pack = open_pack(folder.root, "train", folder.parts["train"], {}, {"text": (7,)})
    assert list(pack.arrays) == ["text"] and pack.first == {}
    (folder.root / "visual" / "train_0000" / "frame_00001.jpg").unlink()  # of no interest to this pack
    assert is_packed(folder.root, "train", folder.parts["train"], {}, {"text": (7,)})


def test_clips_of_different_numbers_of_frames_and_sizes(folder):
    frames = folder.parts["test"].files["video"]
    frames[1][-1].unlink()
    cv2.imwrite(str(frames[2][1]), np.zeros((90, 20, 3), np.uint8))
    folder = load_folder(folder.root, folder.spec)
    pack = open_pack(folder.root, "test", folder.parts["test"], {"video": (20, 24)}, {})
    assert pack.counts["video"][:4].tolist() == [3, 2, 3, 3] and pack.first["video"][:4].tolist() == [0, 3, 5, 8]
    assert pack.arrays["video"].shape == (35, 3, 20, 24) and not pack.arrays["video"][6].any()


def test_a_pack_is_made_once_and_again_when_a_source_changes(folder):
    part = folder.parts["train"]
    first = open_pack(folder.root, "train", part, SIZES, SHAPES)
    (made,) = packs(folder)
    stamp = (folder.root / ".pack" / made / "video-00000.npy").stat().st_mtime_ns
    open_pack(folder.root, "train", part, SIZES, SHAPES)
    assert (folder.root / ".pack" / made / "video-00000.npy").stat().st_mtime_ns == stamp
    np.save(folder.root / "text" / "train_0000.npy", np.full(7, 9, np.float32))
    assert not is_packed(folder.root, "train", part, SIZES, SHAPES)
    second = open_pack(folder.root, "train", part, SIZES, SHAPES)
    assert first.arrays["text"][0][0] != second.arrays["text"][0][0] == 9 and len(packs(folder)) == 2
    os.utime(folder.root / ".pack" / made / "pack.json", (0, 0))
    np.save(folder.root / "text" / "train_0000.npy", np.full(7, 10, np.float32))
    open_pack(folder.root, "train", part, SIZES, SHAPES)
    assert made not in packs(folder) and len(packs(folder)) == 2, "one that nobody opened for a day is deleted"


def test_a_damaged_pack_is_made_again(folder):
    asked = (folder.root, "train", folder.parts["train"], SIZES, SHAPES)
    open_pack(*asked)
    (made,) = packs(folder)
    for spoil in (lambda path: os.truncate(path, path.stat().st_size // 2), Path.unlink):
        spoil(folder.root / ".pack" / made / "video-00000.npy")
        assert not is_packed(*asked)
        assert np.asarray(open_pack(*asked).arrays["video"]).any() and packs(folder) == [made]


def test_nothing_is_left_of_a_pack_that_failed(folder):
    frame = folder.parts["train"].files["video"][20][1]
    frame.write_bytes(frame.read_bytes()[:-9])
    with pytest.raises(UserError, match="truncated"):
        open_pack(folder.root, "train", folder.parts["train"], SIZES, SHAPES)
    assert packs(folder) == []


CODE = """
import pathlib, sys, time
from dataset import pack
from dataset.folder import load_folder
from dataset.specs import spec_of
if sys.argv[2] == "slow":
    real, calls, go = pack.read_array, [], pathlib.Path(sys.argv[1], "go")
    def read(*args):
        calls.append(args)
        while len(calls) > 8 and not go.exists():
            time.sleep(0.01)
        return real(*args)
    pack.read_array = read
folder = load_folder(sys.argv[1], spec_of("folder", sys.argv[1]))
shapes = {"audio": (33, 20), "text": (7,)}
made = pack.open_pack(folder.root, "train", folder.parts["train"], {"video": (40, 48)}, shapes)
print(made.arrays["text"][:].sum())
"""


def start(folder: Folder, pace: str) -> subprocess.Popen:
    command = [sys.executable, "-c", CODE, str(folder.root), pace]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=REPO, **pipes)
    deadline = time.time() + 60
    while pace == "slow" and not list(folder.root.glob(".pack/.tmp-*/text-*.npy")) and time.time() < deadline:
        time.sleep(0.01)
    return process


def test_a_killed_process_leaves_no_pack_and_the_next_one_removes_its_leftovers(folder):
    asked = (folder.root, "train", folder.parts["train"], SIZES, SHAPES)
    for clean in (lambda: room_for_packs(folder.root), lambda: open_pack(*asked)):
        process = start(folder, "slow")
        (left,) = packs(folder)
        assert left.startswith(".tmp-") and not is_packed(*asked)
        assert room_for_packs(folder.root) and packs(folder) == [left], "somebody is at work in it"
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert packs(folder) == [left] and not is_packed(*asked)
        clean()
        assert left not in packs(folder)
    assert is_packed(*asked)


def test_another_process_waits_and_uses_the_pack_that_the_first_one_made(folder):
    first = start(folder, "slow")
    second = start(folder, "fast")
    assert "another process is making a pack" in second.stderr.readline()
    (folder.root / "go").write_text("")
    results = [process.communicate(timeout=60) for process in (first, second)]
    expected = str(open_pack(folder.root, "train", folder.parts["train"], SIZES, SHAPES).arrays["text"][:].sum())
    assert [out.strip() for out, _ in results] == [expected] * 2
    assert len(packs(folder)) == 1


def test_where_no_pack_can_be_written_the_clips_are_held_in_memory(folder, monkeypatch, capsys):
    asked = (folder.root, "train", folder.parts["train"], SIZES, SHAPES)
    usage = shutil.disk_usage(folder.root)
    with monkeypatch.context() as patch:
        patch.setattr(pack_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert open_pack(*asked).arrays["text"].shape == (24, 7) and packs(folder) == []
        assert "no pack written (not enough room on the disk)" in capsys.readouterr().out
    shutil.rmtree(folder.root / ".pack")
    (folder.root / ".pack").write_text("in the way")
    held = open_pack(*asked)
    assert held.arrays["video"].shape == (72, 3, 40, 48) and not isinstance(held.arrays["video"].shards[0], np.memmap)
    assert "no pack written" in capsys.readouterr().out
    monkeypatch.setattr(pack_module, "available_ram", lambda: 1000)
    with pytest.raises(UserError, match=r"no pack written .*--cache none"):
        open_pack(*asked)
    monkeypatch.setattr(pack_module.os, "access", lambda *_: False)
    assert room_for_packs(folder.root) == 0


# What is not opened, and not packed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pick", ["random", "first"])
@pytest.mark.parametrize("picks", [1, 2, 3, 5])
def test_fed_frames_are_those_that_are_picked(picks, pick):
    counts = torch.arange(1, 24).repeat_interleave(400)
    draws = [pick_frames(counts, picks, generator, pick) for generator in (None, torch.Generator().manual_seed(0))]
    for count in range(1, 24):
        fed = fed_frames(count, picks, pick)
        assert set(torch.cat([draw[counts == count].flatten() for draw in draws]).tolist()) == set(fed), count
    assert fed_frames(7, None) == range(7)


@pytest.mark.parametrize("pick", ["random", "first"])
def test_frames_that_no_epoch_feeds_are_not_packed_and_the_others_are_fed_the_same(tmp_path, pick):
    root = make_folder(tmp_path / "data", train=9, test=3, frames=7)
    video = {"name": "video", "kind": "frames", "folder": "visual", "frames": 3, "pick": pick}
    modalities = [{"name": "audio", "kind": "array", "folder": "audio"}, video]
    (root / "dataset.json").write_text(json.dumps({"modalities": modalities}))
    for number in (1, 4):
        (root / "visual" / "train_0000" / f"frame_{number:05d}.jpg").unlink()  # five are left, fewer than two segments
    folder = load_folder(root, spec_of("folder", root))
    part, found = folder.parts["train"], {}
    for cache in ("none", "ram"):
        feed = Feed(folder.spec.modalities, 32, torch.device("cpu"), cache)
        clips = make_clips(root, "train", part, folder.shapes, feed)
        plans = [None, torch.Generator().manual_seed(0)]
        found[cache] = [batch for draw in plans for batch in clips.epoch(batches_of(9, 4, ("video",), None), draw)]
    for a, b in zip(*found.values(), strict=True):
        assert (a.inputs["video"] - b.inputs["video"]).abs().max() < 1.5 / 255 / 0.224  # one level, as in test_clips.py
    rows = 3 + 8 * 3 if pick == "first" else 3 + 8 * 6
    assert clips.arrays["video"].shape == (rows, 3, 40, 48)
    last = part.files["video"][3][-1]
    last.write_bytes(b"no picture")  # nobody reads it
    assert is_packed(root, "train", part, SIZES, {"audio": (33, 20)})
    part.files["video"][3][0].write_bytes(b"no picture")
    assert not is_packed(root, "train", part, SIZES, {"audio": (33, 20)})


def test_another_rule_of_picking_is_another_pack(folder):
    part = folder.parts["test"]
    open_pack(folder.root, "test", part, SIZES, SHAPES)
    for picks, pick in ((2, "random"), (1, "first")):
        files = part.files["video"]
        other = FrameFiles(files.folder, files.clips, files.names, 3, picks, pick)
        assert not is_packed(folder.root, "test", part._replace(files=part.files | {"video": other}), SIZES, SHAPES)
    assert is_packed(folder.root, "test", part, SIZES, SHAPES)


OPENED: list[str] | None = None  # while a list, the paths that this process opens


def _note(event: str, args: tuple) -> None:
    if event == "open" and OPENED is not None and isinstance(args[0], (str, Path)):
        OPENED.append(str(args[0]))


sys.addaudithook(_note)  # for good: a hook cannot be removed


def opened(folder: Folder) -> list[str]:
    """The frames and arrays that a start opens, without those of the pack."""
    global OPENED
    OPENED = []
    try:
        words = ["--dataset", "folder", "--data_root", str(folder.root), "--cache", "ram", "--device", "cpu", "--train"]
        build_data(train.parse_args(words), torch.device("cpu"))
        paths = [Path(path) for path in OPENED if path.endswith((".jpg", ".npy"))]
        return sorted(f"{path.parent.name}/{path.name}" for path in paths if ".pack" not in path.parts)
    finally:
        OPENED = None


def test_with_a_valid_pack_no_file_is_opened_but_those_that_have_changed(folder):
    assert len(opened(folder)) >= 36 * 5  # a picture's size, three pictures, two arrays and their headers
    assert opened(folder) == []
    changed = folder.root / "text" / "train_0000.npy"
    status = changed.stat()
    np.save(changed, np.full(7, 9, np.float32))  # of the same size
    assert changed.stat().st_size == status.st_size
    again = opened(folder)
    assert again.count("text/train_0000.npy") == 2 and again.count("text/test_0000.npy") == 0  # header, then content
    picture = folder.root / "visual" / "test_0003" / "frame_00001.jpg"
    cv2.imwrite(str(picture), np.zeros((90, 20, 3), np.uint8))
    assert opened(folder).count("test_0003/frame_00001.jpg") == 2 and opened(folder) == []
    picture.rename(picture.with_name("frame_00000.jpg"))
    assert opened(folder).count("test_0003/frame_00000.jpg") == 2 and opened(folder) == []
    np.save(changed, np.full(8, 9, np.float32))
    with pytest.raises(UserError, match=r"array of shape \(8,\), not \(7,\)"):
        opened(folder)


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_damaged_record_of_headers_is_read_again(folder, content):
    record = folder.root / ".pack" / "headers.npz"
    opened(folder)
    whole = record.read_bytes()
    record.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert len(opened(folder)) == 36 * 3 and opened(folder) == []


def test_locks(tmp_path):
    with locked(tmp_path / "new" / "lock"):
        with pytest.raises(Busy), locked(tmp_path / "new" / "lock"):
            pass
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "new" / "lock"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), locked(tmp_path / "file" / "lock"):
        pass
