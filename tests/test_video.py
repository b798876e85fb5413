"""Frames: those of the rule, equal to OpenCV's own decode, whole or not at all."""

import shutil
import struct
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from benchmarks.raw_samples import write_video, write_wav
from dataset.prepare import video
from dataset.prepare.video import Choice, Extracted, breaks_off, extract_frames, packet_fault
from utils.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


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


# Time -----------------------------------------------------------------------------------------------------------------


def write_grey(path, times, size=(64, 48), codec="ffv1"):
    """Frame i, at `times[i]` seconds, is of one grey: 10 * i + 5. Lossless."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "bgr0"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 10 * i + 5, np.uint8), format="bgr24")
            frame = frame.reformat(format="bgr0")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def kept_indices(folder):
    return [round((cv2.imread(str(path)).mean() - 5) / 10) for path in sorted(folder.iterdir())]


VARIABLE = [0, 0.1, 0.2, 1.5, 1.6, 1.7, 3.0, 3.05, 4.9]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (Choice(fps=1), [0, 2, 5, 6, 7]),
        (Choice(fps=2), [0, 2, 2, 3, 5, 5, 6, 7, 7, 7]),
        (Choice(fps=0.5), [0, 5, 7]),
        (Choice(fps=2, most=3), [0, 2, 2]),
        (Choice(fps=1, start=1.55), [3, 5, 7, 7]),
        (Choice(fps=2, start=1.6, end=3.1), [4, 5, 5]),
        (Choice(fps=10, start=1.5, end=1.71), [3, 4, 5]),
        (Choice(fps=10, start=1.5, end=1.70), [3, 4]),
    ],
)
def test_variable_frame_rates_go_by_time_stamps(tmp_path, choice, expected):
    """At every moment the frame that a player shows then."""
    extract_frames(write_grey(tmp_path / "a.mkv", VARIABLE), tmp_path / "out", choice)
    assert kept_indices(tmp_path / "out")[: len(expected)] == expected
    assert len(expected) <= len(kept_indices(tmp_path / "out")) <= len(expected) + (choice.end is None)


@pytest.mark.parametrize(("fps", "step"), [(25, 1), (12.5, 2), (5, 5), (2.5, 10)])
def test_fractions_of_the_rate_and_cuts(tmp_path, fps, step):
    path = write_video(tmp_path / "a.mp4", 4, 25, (96, 64))
    every = decode_all(path)
    for start, end, first, last in ((None, None, 0, 100), (1.0, 2.2, 25, 55), (0.4, None, 10, 100), (None, 1.0, 0, 25)):
        result = extract_frames(path, tmp_path / "out", Choice(fps=fps, start=start, end=end))
        files = sorted((tmp_path / "out").iterdir())
        assert result.kept == len(files) == len(range(first, last, step))
        for file, index in zip(files, range(first, last, step), strict=True):
            assert file.read_bytes() == cv2.imencode(".jpg", every[index], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def test_the_published_rule_within_a_cut(tmp_path):
    path = write_video(tmp_path / "a.mp4", 4, 10, (64, 48))
    extract_frames(path, tmp_path / "out", Choice(start=0.5, end=3.6))
    whole = [cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes() for frame in decode_all(path)]
    assert [whole.index(file.read_bytes()) for file in sorted((tmp_path / "out").iterdir())] == [5, 15, 25, 35]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.flv", "a.avi"])
def test_a_late_start_is_sought_and_gives_the_same_frames(tmp_path, name):
    path = write_video(tmp_path / name, 40, 10, (64, 48))
    extract_frames(path, tmp_path / "all", Choice(fps=10))
    whole = [file.read_bytes() for file in sorted((tmp_path / "all").iterdir())]
    result = extract_frames(path, tmp_path / "out", Choice(fps=10, start=31.3, end=32.5))
    assert [file.read_bytes() for file in sorted((tmp_path / "out").iterdir())] == whole[313:325]
    assert result.decoded < 100, "the beginning is not decoded"


def test_cuts_outside_the_file_are_one_line_errors(tmp_path):
    path = write_video(tmp_path / "a.mp4", 2, 10, (64, 48))
    with pytest.raises(UserError, match=r"ends at 2\.00 s, before the clip's start at 5 s"):
        extract_frames(path, tmp_path / "out", Choice(fps=1, start=5, end=6))
    with pytest.raises(UserError, match=r"ends at 2\.00 s; the clip is 0 to 10 s"):
        extract_frames(path, tmp_path / "out", Choice(fps=1, end=10))
    assert extract_frames(path, tmp_path / "out", Choice(fps=10, start=1.5, end=2.2)).kept == 5
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.mp4", "out"]


# Pictures -------------------------------------------------------------------------------------------------------------


def put_matrix(path, a, b, c, d):
    """Write a display matrix into the track header of an mp4."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    assert data[place : place + 36] == struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    numbers = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    data[place : place + 36] = struct.pack(">9i", *numbers)
    path.write_bytes(data)


def shown(picture, a, b, c, d):
    """By definition: the pixel at (x, y) is shown at (a x + c y, b x + d y), moved so that all are positive."""
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]]
    right, down = a * x + c * y, b * x + d * y
    right, down = right - right.min(), down - down.min()
    result = np.zeros((down.max() + 1, right.max() + 1, 3), np.uint8)
    result[down, right] = picture[y, x]
    return result


@pytest.mark.parametrize(
    "matrix",
    [
        (1, 0, 0, 1),
        (0, 1, -1, 0),
        (-1, 0, 0, -1),
        (0, -1, 1, 0),
        (-1, 0, 0, 1),
        (1, 0, 0, -1),
        (0, 1, 1, 0),
        (0, -1, -1, 0),
    ],
)
def test_rotation_and_reflection_are_applied(tmp_path, matrix):
    path = write_video(tmp_path / "a.mp4", 0.5, 10, (96, 64), seed=3)
    lying = decode_all(path)[0]
    put_matrix(path, *matrix)
    extract_frames(path, tmp_path / "out")
    stored = sorted((tmp_path / "out").iterdir())[0].read_bytes()
    upright = shown(lying, *matrix)
    assert stored == cv2.imencode(".jpg", upright, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    if shutil.which("ffmpeg"):
        command = [
            "ffmpeg",
            "-v",
            "quiet",
            "-i",
            str(path),
            "-frames:v",
            "1",
            "-f",
            "rawvideo",
            "-pix_fmt",
            "bgr24",
            "-",
        ]
        raw = subprocess.run(command, capture_output=True, check=True).stdout
        assert np.array_equal(np.frombuffer(raw, np.uint8).reshape(upright.shape), upright)


def test_crop_comes_first_then_the_shorter_side(tmp_path):
    path = write_video(tmp_path / "a.mp4", 0.5, 10, (96, 64))
    frame = decode_all(path)[0]

    def first(**choice):
        extract_frames(path, tmp_path / "out", Choice(**choice))
        return sorted((tmp_path / "out").iterdir())[0].read_bytes()

    def jpeg(picture):
        return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()

    assert first(crop=(10, 20, 40, 30)) == jpeg(frame[20:50, 10:50])
    assert first(crop=(0, 0, 96, 64)) == first() == first(size=64) == first(size=500) == jpeg(frame)
    halves = frame.reshape(32, 2, 48, 2, 3).mean((1, 3))
    assert np.abs(cv2.imdecode(np.frombuffer(first(size=32), np.uint8), 1) - halves).mean() < 4
    assert first(size=32) == jpeg(cv2.resize(frame, (48, 32), interpolation=cv2.INTER_AREA))
    assert first(crop=(10, 20, 40, 30), size=15) == jpeg(
        cv2.resize(np.ascontiguousarray(frame[20:50, 10:50]), (20, 15), interpolation=cv2.INTER_AREA)
    )
    for crop in ((60, 0, 40, 30), (0, 50, 10, 15), (-1, 0, 10, 10), (0, 0, 0, 5)):
        with pytest.raises(UserError, match="not inside its frames of 96 x 64 pixels"):
            first(crop=crop)


# Streams and codecs ---------------------------------------------------------------------------------------------------


def test_a_cover_picture_is_no_video(tmp_path):
    if shutil.which("ffmpeg") is None:
        pytest.skip("needs the ffmpeg command to attach a picture")
    write_wav(tmp_path / "a.wav", 1)
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((20, 20, 3), np.uint8))
    command = ["ffmpeg", "-v", "quiet", "-i", "a.wav", "-i", "a.png", "-map", "0", "-map", "1", "-c:v", "png"]
    subprocess.run([*command, "-disposition:v", "attached_pic", "a.m4a"], cwd=tmp_path, check=True)
    with pytest.raises(UserError, match="no video track"):
        extract_frames(tmp_path / "a.m4a", tmp_path / "out")


def test_a_stream_whose_frames_are_mostly_damaged(tmp_path):
    path = write_video(tmp_path / "a.avi", 3, 10, (96, 64))
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for position, size in places[: len(places) * 3 // 4]:
        data[position : position + size + 8] = bytes(size + 8)
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        extract_frames(path, tmp_path / "out", Choice(fps=10))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not on this machine")
def test_real_cremad_frames_are_those_of_opencv(tmp_path):
    """VP6F behind a data stream: the JPEGs of the earlier preparation, byte for byte."""
    paths = sorted((SHARED / "cremad" / "raw_sample" / "VideoFlash").glob("*.flv"))
    assert len(paths) == 6
    for path in paths:
        every = decode_all(path)
        result = extract_frames(path, tmp_path / "out")
        files = sorted((tmp_path / "out").iterdir())
        assert result.decoded == len(every) and len(files) == len(every[::29])
        for file, frame in zip(files, every[::29], strict=True):
            assert file.read_bytes() == cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not on this machine")
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("sample_av1.mp4", (720, 1080)),
        ("sample_with_av1c.mp4", (1280, 720)),
        ("sample_rotate_and_reflect.mp4", (1080, 720)),
        ("h265_with_metadata_track.mp4", (1920, 1080)),
        ("bear-vp9-odd-dimensions.webm", (121, 161)),
    ],
)
def test_odd_real_files(tmp_path, name, shape):
    """AV1, rotated, mirrored, a data stream first, odd sides."""
    extract_frames(SHARED / "media" / name, tmp_path / "out", Choice(fps=1))
    assert cv2.imread(str(tmp_path / "out" / "frame_00001.jpg")).shape[:2] == shape
