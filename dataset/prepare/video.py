"""Video files to frames and optical flow: frame selection, size, crop, orientation."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.prepare import decode, flow
from utils.errors import UserError
from utils.files import atomic_folder

JPEG_QUALITY = 95  # OpenCV's default, set explicitly so that other versions write the same files
FRAME_NAME = "frame_{:05d}.jpg"  # counted from 1, as in OGM-GE's folders
MAX_SIDE = 8192  # pixels; a larger one is a damaged header
MAX_FRAMES = 600 * 240  # ten minutes at 240 frames per second; more is no clip


class Choice(NamedTuple):
    """Selection of frames of a video, and their crop and size.

    `fps` frames a second by time stamps: at `start + k / fps` the frame then shown. None is the rule of the published
    datasets: the frames k * floor(frames per second). `start`, `end` in seconds cut a clip out of the file; at most
    `most` frames. `crop` (x, y, width, height) in pixels of the upright frame comes first; then the shorter side is
    reduced to `size`.
    """

    fps: float | None = None
    most: int | None = None
    start: float | None = None
    end: float | None = None
    size: int | None = None
    crop: tuple[int, int, int, int] | None = None


class Extracted(NamedTuple):
    """Result of one video: frames kept, frames decoded, frame count in its header (0: unknown), rate.

    `until` is the time at which the last decoded frame ends, in seconds.
    """

    kept: int
    decoded: int
    promised: int
    rate: float
    until: float = 0.0


class Kept(NamedTuple):
    """A frame that is kept, with its neighbours in the file (None at the ends)."""

    before: object
    frame: object
    after: object


def extract_frames(
    video: Path | str, folder: Path | str, choice: Choice | None = None, flow_folder: Path | str | None = None
) -> Extracted:
    """Write the frames of `video` that `choice` keeps as JPEG files into `folder`.

    With `flow_folder`, also a picture of the motion from each kept frame to the next frame of the file, under the same
    name (the last frame of a file: from the frame before it). A folder appears whole or not at all; one that is there
    is replaced. Raises `UserError` where the video cannot be decoded or breaks off (more than half and a second of it
    missing), or the choice has no frame in it.
    """
    stream = _Frames(Path(video), choice or Choice())
    if flow_folder is None:
        with atomic_folder(folder) as frames:
            return _write(stream, frames, None)
    with atomic_folder(folder) as frames, atomic_folder(flow_folder) as motions:
        return _write(stream, frames, motions)


def _write(stream: "_Frames", frames: Path, motions: Path | None) -> Extracted:
    for number, kept in enumerate(stream, start=1):
        name, picture = FRAME_NAME.format(number), stream.picture(kept.frame)
        _save(frames / name, picture)
        if motions is not None:
            _save(motions / name, flow.flow_picture(_motion(stream, kept, picture)), whole_chroma=True)
    return stream.result()


def _motion(stream: "_Frames", kept: Kept, picture: np.ndarray) -> np.ndarray:
    """(H, W, 2) pixels per frame."""
    if kept.after is not None:
        return flow.flow_between(picture, stream.picture(kept.after))
    if kept.before is not None:
        return flow.flow_between(stream.picture(kept.before), picture)
    return np.zeros((*picture.shape[:2], 2), dtype=np.float32)


def _save(path: Path, picture: np.ndarray, whole_chroma: bool = False) -> None:
    import cv2

    flags = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    if whole_chroma:
        flags += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    if not cv2.imwrite(str(path), picture, flags):
        raise OSError(f"{path}: cannot be written; is the disk full?")


class _Frames:
    """Iterate over the frames to keep; `picture` converts them to pixels, `result` has the outcome."""

    def __init__(self, path: Path, choice: Choice):
        self.path, self.choice = path, choice
        self.kept = self.decoded = self.promised = 0
        self.rate = self.until = self.seconds = 0.0
        self.next = 0  # of the frames decoded, none before this one is kept
        self.ended = False
        self.picture, self.tally = Pictures(path, choice), decode.Tally(path)

    def __iter__(self) -> Iterator[Kept]:
        with decode.opened(self.path, "video") as container:
            stream = decode.find_stream(container, self.path, "video")
            self._read_header(container, stream)
            frames, fps = _with_neighbours(self._timed(container, stream)), self.choice.fps
            for kept in self._by_index(frames) if fps is None else self._by_time(frames, fps):
                self.kept += 1
                yield kept
                if self.kept == self.choice.most:
                    return
            self.ended = True

    def _read_header(self, container, stream) -> None:
        self.rate = float(stream.guessed_rate or stream.average_rate or 0)
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise UserError(f"{self.path}: no frame rate in its header ({self.rate}); get the file again")
        self.promised, self.seconds = stream.frames or _promised(container, stream), (container.duration or 0) / 1e6
        width, height = stream.codec_context.width, stream.codec_context.height
        if max(width, height) > MAX_SIDE:
            raise UserError(f"{self.path}: frames of {width} x {height} pixels; the largest allowed side is {MAX_SIDE}")

    def _timed(self, container, stream) -> Iterator[tuple[float, object]]:
        """(seconds from the beginning of the file, frame); a frame without a time stamp follows the one before it."""
        begin, step = decode.beginning(container), 1 / self.rate
        start = self.choice.start or 0.0
        for frame in decode.decoded(container, stream, self.tally, start, lambda: self.next + 1 - self.decoded):
            time = self.until if frame.time is None else frame.time - begin
            lasts = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else step
            self.decoded, self.until = self.decoded + 1, time + lasts
            yield time, frame
            if self.decoded > MAX_FRAMES:
                raise UserError(f"{self.path}: more than {MAX_FRAMES:,} frames; cut it to the clip")
        self.decoded, self.until = self.decoded + self.tally.left, self.until + self.tally.left / self.rate

    def _by_index(self, frames: Iterable[tuple[float, Kept]]) -> Iterator[Kept]:
        start, end = self._span()
        step, index = max(1, math.floor(self.rate)), 0
        for time, kept in frames:
            if time >= end - decode.SLACK:
                return
            if time >= start - decode.SLACK:
                if index % step == 0:
                    self.next = self.decoded + step - (1 if kept.after is None else 2)
                    yield kept
                index += 1

    def _by_time(self, frames: Iterable[tuple[float, Kept]], fps: float) -> Iterator[Kept]:
        """The frame shown at each moment: the last one whose time stamp is not after it, else the first of all."""
        start, end = self._span()
        count, shown = 0, None
        for time, kept in frames:
            while shown is not None and (wanted := start + count / fps) < time - decode.SLACK:
                if wanted >= end - decode.SLACK:
                    return
                yield shown
                count += 1
            shown = kept
        while shown is not None and (wanted := start + count / fps) < min(end, self.until) - decode.SLACK:
            yield shown
            count += 1

    def _span(self) -> tuple[float, float]:
        return self.choice.start or 0.0, math.inf if self.choice.end is None else self.choice.end

    def result(self) -> Extracted:
        start, end = self._span()
        self.tally.check()
        if self.kept == 0:
            if self.decoded and start > 0:
                raise UserError(f"{self.path}: ends at {self.until:.2f} s, before the clip's start at {start:g} s")
            raise UserError(f"{self.path}: no frame can be decoded; get the file again")
        if self.ended and self.choice.end is None and not start and self._breaks_off():
            raise UserError(
                f"{self.path}: breaks off after {self.decoded} of {self.promised} frames; get the file again"
            )
        if self.ended and end < math.inf and end - self.until > max(1.0, (end - start) / 2):
            raise UserError(f"{self.path}: ends at {self.until:.2f} s; the clip is {start:g} to {end:g} s")
        return Extracted(self.kept, self.decoded, self.promised, self.rate, self.until)

    def _breaks_off(self) -> bool:
        """Whether the file is truncated: fewer frames and a shorter duration than in the header.

        The second part is for variable frame rates: fewer frames than the rate promises may fill the whole time.
        """
        late = self.seconds - self.until > max(1.0, self.seconds / 2) or not self.seconds
        return late and breaks_off(self.decoded, self.promised, self.rate)


def _with_neighbours(frames: Iterable[tuple[float, object]]) -> Iterator[tuple[float, Kept]]:
    """(time, (frame before, frame, frame after)) of each frame, one frame late."""
    before, now = None, None
    for time, frame in frames:
        if now is not None:
            yield now[0], Kept(before, now[1], frame)
            before = now[1]
        now = time, frame
    if now is not None:
        yield now[0], Kept(before, now[1], None)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


class Pictures:
    """Decoded frames of one video to (H, W, 3) uint8 in OpenCV's order: upright, cropped, the shorter side reduced.

    All are as large as the first one. The conversion is bicubic, as in OpenCV and ffmpeg: their frames, bit for bit.
    """

    def __init__(self, path: Path | str, choice: Choice):
        self.path, self.choice = Path(path), choice
        self.reformatter, self.sides = None, (0, 0)

    def __call__(self, frame) -> np.ndarray:
        import av
        from av.error import FFmpegError
        from av.video.reformatter import VideoReformatter

        one_thread = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}  # the clips run in parallel
        if self.reformatter is None:
            self.reformatter, self.sides = VideoReformatter(), (frame.width, frame.height)
        try:
            pixels = self.reformatter.reformat(frame, *self.sides, "bgr24", interpolation="BICUBIC", **one_thread)
        except (FFmpegError, ValueError) as error:
            raise UserError(f"{self.path}: frames cannot be converted ({decode.short(error)}); get it again") from None
        picture = upright(pixels.to_ndarray(), display_matrix(frame))
        return _resized(_cropped(picture, self.choice.crop, self.path), self.choice.size)


def display_matrix(frame) -> tuple[int, int, int, int]:
    """Display matrix (a, b, c, d) of a decoded frame: x' = a x + c y, y' = b x + d y. Each is -1, 0 or 1."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return 0, _sign(b), _sign(c), 0
    return _sign(a), 0, 0, _sign(d)  # an angle between two quarter turns counts as the nearer one


def _sign(value: int) -> int:
    return -1 if value < 0 else 1


def upright(picture: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Rotate (H, W, 3) by quarter turns and mirror it by the display matrix. Phones store upright videos sideways."""
    a, b, c, d = matrix
    if a == 0:
        picture = picture.swapaxes(0, 1)
    if (a or c) < 0:
        picture = picture[:, ::-1]
    if (d or b) < 0:
        picture = picture[::-1]
    return picture


def _cropped(picture: np.ndarray, crop: tuple[int, int, int, int] | None, path: Path) -> np.ndarray:
    if crop is None:
        return picture
    x, y, width, height = crop
    if min(x, y) < 0 or min(width, height) < 1 or x + width > picture.shape[1] or y + height > picture.shape[0]:
        sides = f"{picture.shape[1]} x {picture.shape[0]}"
        raise UserError(f"{path}: crop {x},{y},{width},{height} is not inside its frames of {sides} pixels")
    return picture[y : y + height, x : x + width]


def _resized(picture: np.ndarray, size: int | None) -> np.ndarray:
    """Reduce the shorter side to `size` by averaging. Smaller pictures are unchanged: enlarging adds no information."""
    import cv2

    shorter = min(picture.shape[:2])
    if size is None or shorter <= size:
        return np.ascontiguousarray(picture)
    height, width = (max(1, round(side * size / shorter)) for side in picture.shape[:2])
    return cv2.resize(np.ascontiguousarray(picture), (width, height), interpolation=cv2.INTER_AREA)


# ---------------------------------------------------------------------------------------------------------------------
# What is missing


def packet_fault(path: Path, needs_sound: bool) -> tuple[str, str]:
    """(kind, reason) why a video is unusable, ('', '') if it is usable. Counts packets and decodes one frame."""
    kind = "broken_video"
    try:
        with decode.opened(path, "video") as container:
            stream = decode.find_stream(container, path, "video")
            if needs_sound:
                kind = "no_audio_track"
                decode.find_stream(container, path, "audio")
                kind = "broken_video"
            rate = float(stream.guessed_rate or stream.average_rate or 0)
            promised = stream.frames or _promised(container, stream)
            packets = list(container.demux(stream))
            found = sum(1 for packet in packets if packet.size)
            if not any(packet.decode() for packet in packets[:30]):
                return kind, "no frame can be decoded; get the file again"
    except UserError as error:
        return kind, str(error).removeprefix(f"{path}: ")
    if breaks_off(found, promised, rate):
        return kind, f"breaks off after {found} of {promised} frames; get the file again"
    return "", ""


def _promised(container, stream) -> int:
    """Frames that the header promises by its duration, 0 where it does not say."""
    rates = [float(rate) for rate in (stream.guessed_rate, stream.average_rate) if rate]
    return int((container.duration or 0) / 1_000_000 * min(rates, default=0) + 0.5)


def breaks_off(found: int, promised: int, rate: float) -> bool:
    """Whether more is missing than rounding and late tracks explain: over a second, and over half of the video."""
    return promised - found > rate and promised - found > promised / 2
