"""Preparation engine: raw clips to frames, optical flow and spectrograms, on all cores, resumable at any time.

A clip is finished when its files are in place *and* a line in `.prepare/clips.jsonl` records their source and settings.
Files are renamed into place before the line is written, so a kill loses only the clips in progress. Decoders run in
separate processes: if one crashes or hangs, only its clip is affected.
"""

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset import specs
from dataset.inspect import LFS_HEADER, Problem, array_fault, frame_fault, inspect_clip, list_frames
from dataset.lists import check_clip_id
from dataset.prepare import audio, decode, video
from dataset.specs import AUDIO_RECIPES, AudioRecipe, Modality
from utils.errors import UserError
from utils.files import Busy, atomic_folder, atomic_path, locked, remove_leftovers
from utils.memory import usable_cores
from utils.progress import Progress, over

RULES = 2  # increase when the same source and options give other files: all clips are then prepared again
# Location of the files in a training folder; the number of fed frames does not matter here.
SOUND, FRAMES, MOTION = specs.audio(None), specs.video(frames=1), specs.flow(frames=1)
BY_INDEX, PER_SECOND = "k * floor(frames per second)", " per second"  # which frames are kept, in prepare.json
SILENCE = 1e-6  # largest sample of a sound that is reported as silent
HANG = 20.0  # seconds without a packet read or a clip finished, after which a decoder counts as hanging
IN_THIS_PROCESS = 0  # number of workers: no process besides this one, and no protection from crashes


class Clip(NamedTuple):
    """One clip to prepare: `start` to `end` seconds of its files (None: from the beginning, to the end).

    `video` and `audio` may be the same file, and either may be None. A `video` that is a folder of .jpg and an `audio`
    that is a .npy are taken over instead of decoded.
    """

    name: str
    video: Path | None
    audio: Path | None
    start: float | None = None
    end: float | None = None


class Options(NamedTuple):
    """Settings for all clips.

    `fps`, `size`, `crop` and `stored_frames` (the most frames of a clip) are those of `video.Choice`; `audio` is the
    recipe of the spectrograms (None: no sound), `channels` "mean" or "first" (None: as the recipe says); `flow` adds
    optical flow. `workers` processes make them (None: one per core; 0: this one, without protection from crashes).
    """

    fps: float | None = None
    stored_frames: int | None = None
    size: int | None = None
    crop: tuple[int, int, int, int] | None = None
    audio: AudioRecipe | None = None
    flow: bool = False
    workers: int | None = None
    channels: str | None = None


class Summary(NamedTuple):
    """Result of a run: clips made, already finished, skipped (with reasons), made with a remark; bytes on disk."""

    made: int
    kept: int
    skipped: list[Problem]
    remarks: list[Problem]
    bytes: int
    seconds: float


class Outcome(NamedTuple):
    """Result of one clip: remarks if it was made, else the error."""

    fault: Problem | None
    remarks: list[str]


def prepare_clips(clips: list[Clip], out: Path | str, options: Options, quiet: bool = False) -> Summary:
    """Make `out/visual/<clip>/*.jpg`, `out/flow/<clip>/*.jpg` and `out/audio/<clip>.npy` of every clip not there yet.

    A clip that cannot be made is in `Summary.skipped` and has no files. Raises `UserError` for unsafe or repeated
    names, a clip that ends before it starts, options that make nothing, a folder in use by another run, a full disk.
    """
    begin, out = time.monotonic(), Path(out)
    _check(clips, options)
    with _locked(out):
        _remove_leftovers(out)
        _write_json(out / "prepare.json", record_of(options))
        journal = _Journal(out / ".prepare" / "clips.jsonl")
        todo = _unfinished(clips, out, options, journal, quiet)
        try:
            skipped = _make_all(todo, len(clips), out, options, journal, quiet)
            journal.finish()
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error}); fix that and run the same command again") from None
    records = [(clip, journal.records[clip.name]) for clip in clips if clip.name in journal.records]
    remarks = [
        Problem(remark.split(" (")[0], clip.name, "", remark, "")
        for clip, record in records
        for remark in record["remarks"]
    ]
    size = sum(sum(sizes) for _, record in records for sizes in record["files"].values())
    made = len(todo) - len(skipped)
    return Summary(made, len(clips) - len(todo), skipped, remarks, size, time.monotonic() - begin)


def record_of(options: Options) -> dict:
    """The options as stored in prepare.json and the journal: all that affect the files."""
    recipe = options.audio
    return {
        "audio_recipe": None if recipe is None else _recipe_field(recipe),
        "channels": None if recipe is None else options.channels or recipe.channels,
        "frames": BY_INDEX if options.fps is None else f"{options.fps:g}{PER_SECOND}",
        "stored_frames": options.stored_frames,
        "size": options.size,
        "crop": None if options.crop is None else list(options.crop),
        "flow": options.flow,
        "jpeg_quality": video.JPEG_QUALITY,
        "rules": RULES,
    }


def options_of(record: dict) -> Options:
    """The options stored in `record`, a prepare.json written by `record_of`. Raises ValueError or TypeError."""
    recipe, frames, crop = record.get("audio_recipe"), record.get("frames", BY_INDEX), record.get("crop")
    return Options(
        None if frames == BY_INDEX else float(frames.removesuffix(PER_SECOND)),
        record.get("stored_frames"),
        record.get("size"),
        None if crop is None else tuple(crop),
        None if recipe is None else specs.recipe_of(recipe),
        record.get("flow", False),
        channels=record.get("channels"),
    )


def _recipe_field(recipe: AudioRecipe) -> str | dict:
    return recipe.name if recipe == AUDIO_RECIPES.get(recipe.name) else recipe.fields


def _modalities(clip: Clip, options: Options) -> tuple[Modality, ...]:
    """Products of a clip."""
    sound = (SOUND,) if clip.audio is not None and options.audio is not None else ()
    pictures = (FRAMES, MOTION) if options.flow else (FRAMES,)
    return sound + (pictures if clip.video is not None else ())


def _check(clips: list[Clip], options: Options) -> None:
    seen = set()
    for clip in clips:
        check_clip_id(clip.name)
        if clip.name in seen:
            raise UserError(f"clip {clip.name}: listed twice; delete one of them")
        seen.add(clip.name)
        start, end = clip.start or 0.0, clip.end
        if not 0 <= start < float("inf") or (end is not None and not start < end < float("inf")):
            raise UserError(
                f"clip {clip.name}: start {start}, end {end}; the end must be after the start, both in seconds from 0"
            )
        if not _modalities(clip, options):
            raise UserError(
                f"clip {clip.name}: neither frames nor sound to make of it; name a file, or an audio recipe"
            )
    for name, value in (("fps", options.fps), ("size", options.size), ("stored_frames", options.stored_frames)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name} {value:g}: a number above 0 is needed")


def _make_all(
    todo: list[Clip], total: int, out: Path, options: Options, journal: "_Journal", quiet: bool
) -> list[Problem]:
    """Make every clip, note it in the journal as soon as its files are in place. Returns the skipped ones."""
    skipped = []
    faults = {clip.name: fault for clip in todo if (fault := _source_fault(clip)) is not None}
    for clip in todo:
        if clip.name in faults:
            _forget(out, clip, options, journal)
            skipped.append(faults[clip.name])
    sound = [clip for clip in todo if clip.name not in faults]
    with Progress("preparing", total, done=total - len(sound), quiet=quiet, keep=True) as bar:
        for clip, outcome in _outcomes(sound, out, options):
            if outcome.fault is None:
                _remove(out, clip.name, _former(journal, clip) - _folders(clip, options))
                journal.add(clip.name, _describe(out, clip, options, outcome.remarks))
            else:
                _forget(out, clip, options, journal)
                skipped.append(outcome.fault)
                bar.note(skipped=len(skipped))
            bar.update()
    return sorted(skipped, key=lambda fault: fault.clip)


def _source_fault(clip: Clip) -> Problem | None:
    for path in _sources(clip):
        kind, reason = source_fault(path)
        if reason:
            return Problem(kind, clip.name, str(path), reason, "")
    return None


def source_fault(path: Path | str) -> tuple[str, str]:
    """(kind, reason) why a raw file cannot be prepared, ('', '') if it may: missing, empty, or a git-lfs pointer."""
    try:
        size = os.stat(path).st_size
        if size == 0:
            return "empty_file", "empty file; get it again"
        if size < 1024 and not os.path.isdir(path):
            with open(path, "rb") as file:
                if file.read(len(LFS_HEADER)) == LFS_HEADER:
                    return "lfs_pointer", "git-lfs pointer, not the file itself; run git lfs pull in the raw folder"
    except FileNotFoundError:
        return "missing_file", "no such file"
    except OSError as error:
        return "unreadable_file", f"cannot be read ({error.strerror})"
    return "", ""


def _sources(clip: Clip) -> list[Path]:
    return list(dict.fromkeys(path for path in (clip.video, clip.audio) if path is not None))


def _folders(clip: Clip, options: Options) -> set[str]:
    return {modality.folder for modality in _modalities(clip, options)}


def _place(out: Path, folder: str, name: str) -> Path:
    """The array or the folder of frames of a clip in a training folder."""
    return out / folder / (f"{name}.npy" if folder == SOUND.folder else name)


def _former(journal: "_Journal", clip: Clip) -> set[str]:
    """The folders in which an earlier run made files of the clip."""
    return set(journal.records.get(clip.name, {}).get("files", ()))


def _forget(out: Path, clip: Clip, options: Options, journal: "_Journal") -> None:
    """Remove files made from another source or with other options; they could be mistaken for the requested ones."""
    _remove(out, clip.name, _former(journal, clip) | _folders(clip, options))
    journal.records.pop(clip.name, None)


def _remove(out: Path, name: str, folders: set[str]) -> None:
    for folder in folders:
        place = _place(out, folder, name)
        if folder == SOUND.folder:
            place.unlink(missing_ok=True)
        else:
            shutil.rmtree(place, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# One clip


def make_clip(clip: Clip, out: Path, options: Options, at: Callable[[Path], None] = lambda path: None) -> Outcome:
    """Make the files of one clip; runs in a worker. Only an error of the output side (a full disk) is raised.

    `at` is called with each file before it is read.
    """
    kind, path = "broken_sound", clip.audio
    try:
        with contextlib.ExitStack() as stack:
            remarks = []
            if clip.audio is not None and options.audio is not None:
                at(clip.audio)
                values, remarks = _spectrogram(clip, options.audio, options.channels or options.audio.channels)
                array = stack.enter_context(atomic_path(_place(out, SOUND.folder, clip.name), sync=False))
                np.save(array, values)
            if clip.video is not None:
                kind, path = "broken_video", clip.video
                at(clip.video)
                remarks = remarks + _frames(clip, out, options)
    except OSError:
        raise
    except UserError as error:
        reason = str(error).removeprefix(f"{path}: ")
    except Exception as error:  # an unexpected error in one file is reported and must not stop the other 15,000
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    else:
        return Outcome(None, remarks)
    kind = "no_audio_track" if reason == decode.NO_TRACK else kind
    return Outcome(Problem(kind, clip.name, str(path), reason, ""), [])


def _spectrogram(clip: Clip, recipe: AudioRecipe, channels: str) -> tuple[np.ndarray, list[str]]:
    assert clip.audio is not None
    if clip.audio.suffix == ".npy":
        return _taken_spectrogram(clip.audio, recipe), []
    wave, rate = audio.load_wave(clip.audio, channels=channels, start=clip.start, end=clip.end)
    remarks = ["silent sound"] if np.abs(wave).max() < SILENCE else []
    return audio.spectrogram(wave, rate, recipe), remarks


def _taken_spectrogram(path: Path, recipe: AudioRecipe) -> np.ndarray:
    """An existing spectrogram, unchanged. Raises `UserError` unless it has the recipe's shape and type."""
    reason, shape = array_fault(str(path), {})
    if not reason and shape != recipe.shape:
        reason = f"spectrogram of shape {shape}; {recipe.name} makes {recipe.shape}, see --audio_recipe"
    if reason:
        raise UserError(f"{path}: {reason}")
    values = np.load(path, allow_pickle=False)
    if not np.isfinite(values).all():
        raise UserError(f"{path}: NaN or infinity in it; make it again")
    return values


def _frames(clip: Clip, out: Path, options: Options) -> list[str]:
    """Move the frames and their flow into place; returns remarks."""
    assert clip.video is not None
    folder, motion = (_place(out, modality.folder, clip.name) for modality in (FRAMES, MOTION))
    if clip.video.is_dir():
        if options.flow or options.fps or options.size or options.crop or clip.start or clip.end:
            raise UserError(
                f"{clip.video}: existing frames are used unchanged; flow, fps, size, crop and cuts need the video"
            )
        _take_frames(clip.video, folder)
        return []
    most = options.stored_frames
    choice = video.Choice(options.fps, most, clip.start, clip.end, options.size, options.crop)
    result = video.extract_frames(clip.video, folder, choice, motion if options.flow else None)
    remarks = []
    if clip.end is not None:
        if clip.end - result.until > max(0.1, 1 / result.rate) and (most is None or result.kept < most):
            remarks.append(f"ends early (at {result.until:.2f} s of the file; the clip ends at {clip.end:g} s)")
    elif most is not None and result.kept < most:
        remarks.append(f"shorter than {most / (options.fps or 1):g} s ({result.kept} frames)")
    elif options.fps is None and result.decoded < result.rate:
        remarks.append(f"shorter than 1 s ({result.decoded} frames at {result.rate:.4g} per second)")
    if options.fps is None and result.rate > 240:
        remarks.append(f"odd frame rate ({result.rate:.4g} per second in its header, so frames may be far apart)")
    return remarks


def _take_frames(source: Path, folder: Path) -> None:
    """Link (or copy) every frame of an existing folder, without decoding."""
    names = [name for name, _ in list_frames(str(source))]
    if not names:
        raise UserError(f"{source}: no .jpg in it")
    with atomic_folder(folder) as unfinished:
        for name in names:
            if reason := frame_fault((source / name).read_bytes()):
                raise UserError(f"{source}: {name}: {reason}")
            try:
                os.link(source / name, unfinished / name)  # no second copy on the same disk
            except OSError:
                shutil.copyfile(source / name, unfinished / name)


# ---------------------------------------------------------------------------------------------------------------------
# Many clips


def _outcomes(clips: list[Clip], out: Path, options: Options) -> Iterator[tuple[Clip, Outcome]]:
    """(clip, outcome) in the order they are done."""
    if options.workers == IN_THIS_PROCESS or not clips:
        with _one_thread(options):
            for clip in clips:
                yield clip, make_clip(clip, out, options)
    else:  # starting a process takes longer than a few clips
        yield from _pooled(clips, out, options, min(options.workers or usable_cores(), max(1, len(clips) // 8)))


def _pooled(clips: list[Clip], out: Path, options: Options, workers: int) -> Iterator[tuple[Clip, Outcome]]:
    """The same on `workers` processes, each with one clip at a time, so that a crash or a hang identifies its clip."""
    waiting, staff = deque(clips), [_Worker(out, options) for _ in range(workers)]
    try:
        while waiting or any(worker.clip is not None for worker in staff):
            for worker in staff:
                if worker.ready and worker.clip is None and waiting:
                    worker.give(waiting.popleft())
            heard = multiprocessing.connection.wait([worker.pipe for worker in staff], timeout=1)
            for worker in staff:
                clip, outcome = worker.clip, None
                if worker.pipe in heard:
                    outcome = worker.listen()
                elif clip is not None and worker.hangs():
                    outcome = worker.fault("decoder_hang", f"the decoder hangs on it (nothing for {HANG:g} s)")
                if outcome is not None and clip is not None:
                    yield clip, outcome
                if worker.ended:
                    worker.end()
            staff = [worker for worker in staff if not worker.ended]
            missing = min(workers, len(staff) + len(waiting)) - len(staff)
            staff += [_Worker(out, options) for _ in range(missing)]
    finally:
        for worker in staff:
            worker.end()


class _Worker:
    """A process that makes clips, seen from the process that hands them out."""

    def __init__(self, out: Path, options: Options):
        # Spawned, not forked: a fork copies the locks of PyTorch's and OpenCV's threads in their current state.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, out, options), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = self.ended = False
        self.clip: Clip | None = None
        self.path: Path | None = None  # the file it reads
        self.heard = time.monotonic()

    def give(self, clip: Clip) -> None:
        self.clip, self.path, self.heard = clip, None, time.monotonic()
        with contextlib.suppress(OSError):  # it is dead; listening finds out
            self.pipe.send(clip)

    def hangs(self) -> bool:
        """Whether the worker has sent no message for `HANG` seconds and none is waiting in the pipe."""
        return time.monotonic() - self.heard > HANG and not self.pipe.poll()

    def listen(self) -> Outcome | None:
        """Read one message. Returns the current clip's outcome if it is finished or its decoder crashed, else None."""
        try:
            kind, value = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            if not self.ready:
                raise RuntimeError("worker processes do not start; a script needs if __name__ == '__main__'") from None
            return self.fault("decoder_crash", f"the decoder crashed on it ({_cause(self.process.exitcode)})")
        self.heard = time.monotonic()
        if kind == "ready":
            self.ready = True
        elif kind == "reads":
            self.path = value
        elif kind == "done":
            self.clip = None
            return value
        elif kind == "failed":
            raise value
        return None

    def fault(self, kind: str, reason: str) -> Outcome:
        clip, self.clip, self.ended = self.clip, None, True
        name, path = ("", "") if clip is None else (clip.name, str(self.path or clip.video or clip.audio))
        return Outcome(Problem(kind, name, path, f"{reason}; get the file again, or convert it with ffmpeg", ""), [])

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _cause(status: int | None) -> str:
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-status).name
    return f"exit status {status}"


def _work(pipe, out: Path, options: Options) -> None:
    """The loop of a worker: clips come through the pipe, messages (kind, value) go back."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _enter_one_thread(options)
    _import_all(options)
    told = time.monotonic()

    def alive() -> None:
        nonlocal told
        if time.monotonic() - told > HANG / 20:
            told = time.monotonic()
            pipe.send(("alive", None))

    decode.watch(alive)
    pipe.send(("ready", None))
    with contextlib.suppress(EOFError):
        while True:
            clip = pipe.recv()
            try:
                message = "done", make_clip(clip, out, options, lambda path: pipe.send(("reads", path)))
            except OSError as error:
                message = "failed", OSError(error.errno, error.strerror or str(error), str(error.filename or out))
            except BaseException:
                message = "failed", RuntimeError(f"in a worker, at {clip}:\n{traceback.format_exc()}")
            pipe.send(message)


def _import_all(options: Options) -> None:
    """Import the decoder packages now: the import takes seconds and would later be mistaken for a hang."""
    with contextlib.suppress(Exception):  # a missing package is reported where it is needed
        import av  # noqa: F401

        if options.audio is not None:
            audio.spectrogram(np.zeros(16_000, np.float32), 16_000, options.audio)


def _end_with_parent() -> None:
    """End this worker when its parent is killed, so that it does not write during the next run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _enter_one_thread(options: Options) -> Callable[[], None]:
    """Limit every library to one thread, because processes run in parallel. Returns a function that undoes it."""
    import cv2

    level, threads = cv2.utils.logging.getLogLevel(), cv2.getNumThreads()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # the summary reports the errors
    cv2.setNumThreads(1)
    undo: list[Callable] = [lambda: cv2.utils.logging.setLogLevel(level), lambda: cv2.setNumThreads(threads)]
    if (options.audio is not None and options.audio.name in ("fbank", "logmel")) or "torch" in sys.modules:
        import torch

        torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        undo.append(lambda: torch.set_num_threads(torch_threads))

    def restore() -> None:
        for step in undo:
            step()

    return restore


@contextlib.contextmanager
def _one_thread(options: Options) -> Iterator[None]:
    undo = _enter_one_thread(options)
    try:
        yield
    finally:
        undo()


# ---------------------------------------------------------------------------------------------------------------------
# What is finished


class _Journal:
    """`.prepare/clips.jsonl`: one line per finished clip, appended when it is finished, sorted at the end."""

    def __init__(self, path: Path):
        self.path, self.records = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut by a kill is no record
                    record = json.loads(line)
                    self.records[record.pop("clip")] = record
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (open as long as the run)
        self.file.write("\n")  # ends a line that a kill cut

    def add(self, clip: str, record: dict) -> None:
        self.records[clip] = record
        self.file.write(json.dumps({"clip": clip, **record}) + "\n")

    def finish(self) -> None:
        """Rewrite the file: sorted, one line per clip, independent of the order of the run."""
        self.file.close()
        with atomic_path(self.path) as temporary:
            lines = [json.dumps({"clip": clip, **self.records[clip]}) + "\n" for clip in sorted(self.records)]
            temporary.write_text("".join(lines), encoding="utf-8")


def _unfinished(clips: list[Clip], out: Path, options: Options, journal: _Journal, quiet: bool) -> list[Clip]:
    """Clips whose files do not match the journal, or were made from another source or with other settings."""
    if not journal.records:
        return list(clips)
    headers = {}
    looked = over(clips, "looking", quiet=quiet)
    return [clip for clip in looked if not _finished(clip, out, options, journal.records.get(clip.name), headers)]


def _finished(clip: Clip, out: Path, options: Options, record: dict | None, headers: dict) -> bool:
    if record is None or record.get("settings") != _settings(clip, options):
        return False
    source = _stamps(clip)
    if None not in source and record.get("source") != source:  # a raw file removed after preparation is no change
        return False
    if isinstance(inspect_clip(str(out), clip.name, _modalities(clip, options), headers), Problem):
        return False
    return _sizes(out, clip, options) == record.get("files")


def _settings(clip: Clip, options: Options) -> dict:
    return record_of(options) | {"start": clip.start, "end": clip.end}


def _describe(out: Path, clip: Clip, options: Options, remarks: list[str]) -> dict:
    return {
        "settings": _settings(clip, options),
        "source": _stamps(clip),
        "files": _sizes(out, clip, options),
        "remarks": remarks,
    }


def _sizes(out: Path, clip: Clip, options: Options) -> dict[str, list[int]]:
    """Bytes of each file of a prepared clip, by folder."""
    sizes = {}
    for folder in sorted(_folders(clip, options)):
        place = _place(out, folder, clip.name)
        array = folder == SOUND.folder
        sizes[folder] = [os.stat(place).st_size] if array else [size for _, size in list_frames(str(place))]
    return sizes


def _stamps(clip: Clip) -> list:
    """[bytes, modification time] of the sources, None for one that is not there; a folder stands for its listing."""
    stamps = []
    for path in _sources(clip):
        try:
            found = os.stat(path)
            stamps.append([found.st_size, found.st_mtime_ns])
        except OSError:
            stamps.append(None)
    return stamps


# ---------------------------------------------------------------------------------------------------------------------
# The folder


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep a second run out of the folder."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(out / ".prepare" / "lock"))
        except Busy:
            raise UserError(f"{out}: another preparation is running; wait for it, or choose another --out") from None
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror}); name another folder with --out") from None
        yield


def _remove_leftovers(out: Path) -> None:
    """Delete what killed runs left under temporary names."""
    for folder in (out, *(out / m.folder for m in (FRAMES, MOTION, SOUND)), out / ".prepare"):
        remove_leftovers(folder)


def _write_json(path: Path, value: dict) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
