"""Video files to frames: one a second, by OpenCV."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import UserError
from utils.files import atomic_folder

JPEG_QUALITY = 95  # OpenCV's own default, written down so that no other version changes the files
FRAME_NAME = "frame_{:05d}.jpg"  # counted from 1, as in OGM-GE's folders
MAX_SIDE = 8192  # pixels; a larger one is a damaged header
MAX_FRAMES = 600 * 240  # ten minutes at 240 frames per second; more is no clip


class Extracted(NamedTuple):
    """What came of one video: frames kept, frames decoded, frames that its header promises (0: unknown), rate."""

    kept: int
    decoded: int
    promised: int
    rate: float


def extract_frames(video: Path | str, folder: Path | str, most: int | None = None) -> Extracted:
    """Write the frames k * floor(frames per second), k = 0, 1, 2, ... of `video` as JPEG files into `folder`.

    At most `most` of them (None: all). The folder appears whole or not at all; one that is there is replaced. Raises
    `UserError` where the video cannot be decoded or breaks off (more than half and a second of it missing).
    """
    import cv2

    with atomic_folder(folder) as unfinished:
        stream = _Frames(Path(video), most)
        for number, frame in enumerate(stream, start=1):
            target = str(unfinished / FRAME_NAME.format(number))
            if not cv2.imwrite(target, frame, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]):
                raise OSError(f"{target}: cannot be written; is the disk full?")
        return stream.result()


class _Frames:
    """Iterate over the frames to keep, (height, width, 3) uint8 in OpenCV's order; then `result` says how it went."""

    def __init__(self, path: Path, most: int | None):
        self.path, self.most = path, most
        self.kept = self.decoded = self.promised = 0
        self.rate, self.ended = 0.0, False

    def __iter__(self) -> Iterator[np.ndarray]:
        import cv2

        # An absolute path: FFmpeg takes "name:..." for a protocol. One thread: the clips are what runs in parallel.
        source = os.path.abspath(self.path)
        capture = cv2.VideoCapture(source, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        try:
            self._open(capture, cv2)
            step = max(1, math.floor(self.rate))
            while self.most is None or self.kept < self.most:
                if not capture.grab():
                    self.ended = True
                    return
                if self.decoded % step == 0:
                    good, frame = capture.retrieve()
                    if not good:
                        self.ended = True
                        return
                    self.kept += 1
                    yield frame
                self.decoded += 1
                if self.decoded > MAX_FRAMES:
                    raise UserError(f"{self.path}: more than {MAX_FRAMES:,} frames; cut it to the clip")
        finally:
            capture.release()

    def _open(self, capture, cv2) -> None:
        if not capture.isOpened():
            raise UserError(f"{self.path}: not a video that OpenCV can open; get the file again")
        self.rate = capture.get(cv2.CAP_PROP_FPS)
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise UserError(f"{self.path}: no frame rate in its header ({self.rate}); get the file again")
        promised = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.promised = int(promised) if math.isfinite(promised) and promised > 0 else 0
        sides = [int(capture.get(prop)) for prop in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)]
        if max(sides) > MAX_SIDE:
            raise UserError(f"{self.path}: frames of {sides[0]} x {sides[1]} pixels; sides may be {MAX_SIDE}")

    def result(self) -> Extracted:
        if self.kept == 0:
            raise UserError(f"{self.path}: no frame can be decoded; get the file again")
        if self.ended and breaks_off(self.decoded, self.promised, self.rate):
            raise UserError(
                f"{self.path}: breaks off after {self.decoded} of {self.promised} frames; get the file again"
            )
        return Extracted(self.kept, self.decoded, self.promised, self.rate)


def packet_fault(path: Path, needs_sound: bool) -> tuple[str, str]:
    """(kind, reason) why a video will not do, ('', '') if it may: packets are counted, one frame is decoded."""
    import av
    from av.error import FFmpegError

    try:
        with av.open(os.path.abspath(path), metadata_errors="replace") as container:
            if not container.streams.video:
                return "broken_video", "no video track"
            if needs_sound and not container.streams.audio:
                return "no_audio_track", "no audio track"
            stream = container.streams.video[0]
            promised = stream.frames or _promised(container, stream)
            packets = list(container.demux(stream))
            found = sum(1 for packet in packets if packet.size)
            if not any(packet.decode() for packet in packets[:30]):
                return "broken_video", "no frame can be decoded; get the file again"
    except (FFmpegError, OSError, ValueError) as error:
        why = " ".join(str(getattr(error, "strerror", None) or error).split())[:120]
        return "broken_video", f"not a readable video ({why}); get the file again"
    if breaks_off(found, promised, float(stream.average_rate or 0)):
        return "broken_video", f"breaks off after {found} of {promised} frames; get the file again"
    return "", ""


def _promised(container, stream) -> int:
    """Frames that the header promises by its duration, 0 where it does not say."""
    seconds = (container.duration or 0) / 1_000_000
    return int(seconds * float(stream.average_rate or 0))


def breaks_off(found: int, promised: int, rate: float) -> bool:
    """Is more missing than rounding and late tracks explain: a second, and half of the video?"""
    return promised - found > rate and promised - found > promised / 2
