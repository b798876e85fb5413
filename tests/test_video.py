"""Frames: those of the rule, equal to OpenCV's own decode, whole or not at all."""

from fractions import Fraction

import cv2
import numpy as np
import pytest

from benchmarks.raw_samples import write_video
from dataset.prepare import video
from dataset.prepare.video import Choice, Extracted, breaks_off, extract_frames, packet_fault
from utils.errors import UserError


def decode_all(path):
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(read[1])
    return frames


@pytest.mark.parametrize(
    ("name", "seconds", "rate", "expected"),
    [
        ("a.flv", 2.5, 30, [0, 30, 60]),
        ("a.flv", 2.5, Fraction(30_000, 1_001), [0, 29, 58]),
        ("a.flv", 0.4, 30, [0]),
        ("a.mp4", 3.0, 25, [0, 25, 50]),
        ("a.mp4", 2.0, Fraction(12, 1), [0, 12]),
    ],
)
def test_frames_equal_opencv_at_the_indices_of_the_rule(tmp_path, name, seconds, rate, expected):
    path = write_video(tmp_path / name, seconds, rate, (96, 64))
    result = extract_frames(path, tmp_path / "out")
    every = decode_all(path)
    assert result.kept == len(expected) and result.decoded == len(every)
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == [f"frame_{k:05d}.jpg" for k in range(1, len(expected) + 1)]
    for file, index in zip(files, expected, strict=True):
        assert file.read_bytes() == cv2.imencode(".jpg", every[index], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
        assert np.abs(cv2.imread(str(file)).astype(int) - every[index]).mean() < 4


def test_flv_is_flv1(tmp_path):
    capture = cv2.VideoCapture(str(write_video(tmp_path / "a.flv", 0.5, 30, (96, 64))))
    code = int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little").decode()
    assert code.upper() == "FLV1"


def test_no_more_frames_than_asked_for(tmp_path):
    path = write_video(tmp_path / "a.mp4", 4, 10, (64, 48))
    assert extract_frames(path, tmp_path / "out", Choice(most=3)).kept == 3
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_folder_is_replaced_whole(tmp_path):
    path = write_video(tmp_path / "a.mp4", 1, 10, (64, 48))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "frame_00007.jpg").write_bytes(b"old")
    extract_frames(path, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["frame_00001.jpg"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.mp4", "out"]


def test_nothing_is_left_of_a_failed_extraction(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 3, 10, (64, 48))
    write, calls = cv2.imwrite, []

    def fail_second(*args):
        calls.append(args)
        return len(calls) < 2 and write(*args)

    monkeypatch.setattr(cv2, "imwrite", fail_second)
    with pytest.raises(OSError, match="disk full"):
        extract_frames(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("data", [b"", b"version https://git-lfs", b"FLV\x01\x05\0\0\0\x09", b"\xff" * 4_000])
def test_broken_videos_are_one_line_errors(tmp_path, data):
    path = tmp_path / "a.flv"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        extract_frames(path, tmp_path / "out")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert packet_fault(path, needs_sound=False)[0] == "broken_video"


def test_a_video_that_breaks_off(tmp_path):
    path = write_video(tmp_path / "a.flv", 4, 30, (96, 64))
    whole = path.read_bytes()
    assert packet_fault(path, needs_sound=False) == ("", "")
    assert packet_fault(path, needs_sound=True)[0] == "no_audio_track"
    path.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(UserError, match="breaks off after"):
        extract_frames(path, tmp_path / "out")
    assert "breaks off after" in packet_fault(path, needs_sound=False)[1]
    path.write_bytes(whole[: len(whole) * 9 // 10])
    assert extract_frames(path, tmp_path / "out").kept >= 3, "a lost tail is no reason to lose the clip"


def test_breaking_off():
    assert breaks_off(20, 75, 30) and not breaks_off(50, 75, 30)
    assert not breaks_off(5, 12, 30), "less than a second may be rounding of the header"
    assert not breaks_off(75, 0, 30), "a header that promises nothing"


def test_headers_that_lie(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 1, 10, (64, 48))
    monkeypatch.setattr(video, "MAX_SIDE", 50)
    with pytest.raises(UserError, match="64 x 48"):
        extract_frames(path, tmp_path / "out")
    monkeypatch.setattr(video, "MAX_SIDE", 8192)
    monkeypatch.setattr(video, "MAX_FRAMES", 5)
    with pytest.raises(UserError, match="more than 5 frames"):
        extract_frames(path, tmp_path / "out", Choice(fps=10))
    assert Extracted(1, 10, 10, 10.0).rate == 10
