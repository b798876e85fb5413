"""Decoder for frames and audio: PyAV, which includes its own FFmpeg.

Streams are selected by type, not by index: real CREMA-D files begin with a data stream. Times are in seconds from the
start of the file, as in `ffmpeg -ss`. PyAV is imported only when a file is opened.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UserError

SEEK, EARLY = 20.0, 5.0  # seconds: a later start than SEEK is sought, EARLY before it
SLACK = 0.0025  # seconds; breaks ties, since Matroska and Flash round time stamps to 1 ms
NO_PICTURE, NO_TRACK = "no video track", "no audio track"

_watcher: Callable[[], None] | None = None


def watch(callback: Callable[[], None] | None) -> None:
    """Call `callback` for every packet read from now on, as a sign that the decoder is still working."""
    global _watcher
    _watcher = callback


@contextmanager
def opened(path: Path | str, what: str) -> Iterator:
    """The PyAV container of `path`. Raises `UserError` ("no readable `what`") for what FFmpeg cannot read."""
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise UserError(f"{path}: PyAV is needed to read it; pip install av") from None
    try:
        # An absolute path, because FFmpeg reads "name:..." as a protocol. Titles in Latin-1 must not make a clip fail.
        with av.open(os.path.abspath(path), metadata_errors="replace") as container:
            yield container
    except (FFmpegError, OSError, ValueError, MemoryError) as error:
        raise UserError(f"{path}: no readable {what} ({short(error)}); get the file again") from None


def short(error: BaseException) -> str:
    """Short description of an error, without the path, which the message already contains."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:120]


def find_stream(container, path: Path | str, kind: str):
    """The first stream of `kind` ("video" or "audio") that can be decoded; cover pictures do not count.

    Raises `UserError` where there is none (`NO_PICTURE`, `NO_TRACK`) or where FFmpeg has no decoder for it.
    """
    from av.stream import Disposition

    found = [s for s in container.streams if s.type == kind and not s.disposition & Disposition.attached_pic]
    for stream in found:
        if stream.codec_context is not None:  # None: no decoder for its codec
            return stream
    if found:
        raise UserError(f"{path}: no decoder for its {kind} track; convert it with ffmpeg")
    raise UserError(f"{path}: {NO_PICTURE if kind == 'video' else NO_TRACK}")


class Tally:
    """Counts of a stream's decoding: good frames, damaged packets and frames, skipped frames."""

    def __init__(self, path: Path | str):
        self.path, self.good, self.bad, self.left, self.why = path, 0, 0, 0, "damaged"

    def check(self) -> None:
        """Raise `UserError` if most of the stream is damaged: encrypted, or a codec other than in the header."""
        if self.bad > self.good:
            count = f"{self.bad} of {self.bad + self.good} packets"
            raise UserError(f"{self.path}: {count} cannot be decoded ({self.why}); get the file again")


def decoded(container, stream, tally: Tally, start: float = 0.0, needed: Callable[[], int] = lambda: 0) -> Iterator:
    """Yield the frames of `stream`. For a late `start` the decoder seeks, so the first frame is a little before it.

    Damaged packets are skipped, as video players do, because the packets around them are good; `tally` counts them.
    `needed()` returns the number of frames until the next useful one. If fewer are left in the file, the rest is not
    decoded but counted in `tally.left`.
    """
    from av.error import EOFError as EndOfFile
    from av.error import FFmpegError

    stream.codec_context.thread_count = 1  # clips are processed in parallel, so one thread per clip
    if start > SEEK:
        seek(container, stream, start - EARLY)
    packets, ahead, inside = container.demux(stream), deque(), 0  # `inside` the decoder: its delay
    while True:
        useless = max(0, needed())
        while len(ahead) <= useless and (packet := next(packets, None)) is not None:
            if _watcher is not None:
                _watcher()
            ahead.append(packet)
        if len(ahead) <= useless:  # the file ends here
            rest = inside + sum(packet.size > 0 for packet in ahead)
            if not ahead or rest < useless:
                tally.left = rest if ahead else 0
                return
        packet = ahead.popleft()
        inside += packet.size > 0
        try:
            frames = packet.decode()
        except EndOfFile:
            return
        except FFmpegError as error:
            tally.bad, tally.why = tally.bad + 1, short(error)
            continue
        inside -= len(frames)
        for frame in frames:
            if frame.is_corrupt:
                tally.bad += 1
            else:
                tally.good += 1
            yield frame


def seek(container, stream, time: float) -> None:
    """Seek to the key frame at or before `time`; stay at the beginning if the file is not seekable."""
    from av.error import FFmpegError

    try:
        container.seek(math.floor((time + beginning(container)) / stream.time_base), stream=stream)
    except (FFmpegError, OSError):
        container.seek(0, any_frame=True)


def beginning(container) -> float:
    """The time stamp, in seconds, at which the file begins."""
    return (container.start_time or 0) / 1_000_000
