"""The engine of preparation: raw clips to frames and spectrograms, on all cores, resumable at any moment.

A clip is finished when its files are in place *and* a line in `.prepare/clips.jsonl` says from what and how they were
made. Files appear by renaming, the line comes after them, so a kill loses only the clips in work.
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
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dataset import specs
from dataset.inspect import LFS_HEADER, Problem, array_fault, frame_fault, inspect_clip, list_frames
from dataset.lists import check_clip_id
from dataset.prepare import audio, video
from dataset.specs import AUDIO_RECIPES, AudioRecipe
from utils.errors import UserError
from utils.files import Busy, atomic_folder, atomic_path, locked, remove_leftovers

RULES = 1  # raise when the same source and settings give other files: every clip is then made again
# Where the files lie in a training folder; how many frames are fed does not matter here.
SOUND, FRAMES = specs.audio(None), specs.video(frames=1)
SILENCE = 1e-6  # largest sample of a sound that is reported as silent


class Clip(NamedTuple):
    """One clip to prepare. `audio` may be the video itself (the track inside it).

    A `video` that is a folder of .jpg and an `audio` that is a .npy are taken over instead of decoded.
    """

    name: str
    video: Path
    audio: Path


class Summary(NamedTuple):
    """What a run did: clips made, found finished, skipped (with reasons) and used with a remark; bytes on disk."""

    made: int
    kept: int
    skipped: list[Problem]
    remarks: list[Problem]
    bytes: int
    seconds: float


class Settings(NamedTuple):
    """What besides the source decides what the files of a clip are."""

    recipe: str
    channels: str
    stored_frames: int | None
    jpeg_quality: int = video.JPEG_QUALITY
    rules: int = RULES


class Outcome(NamedTuple):
    """How one clip went: remarks where it was made, else the fault."""

    fault: Problem | None
    remarks: list[str]


def prepare_clips(
    clips: list[Clip],
    out: Path | str,
    recipe: AudioRecipe,
    workers: int | None = None,
    channels: str | None = None,
    quiet: bool = False,
    stored_frames: int | None = None,
) -> Summary:
    """Make `out/visual/<clip>/*.jpg` and `out/audio/<clip>.npy` of every clip that is not there already.

    `workers` processes (None: one per core; 1: none besides this one); `channels` "mean" or "first" (None: as the
    recipe says); at most `stored_frames` frames a clip. A clip that cannot be made is in `Summary.skipped` and has no
    files. Raises `UserError` for unsafe or repeated names, a folder in use by another run, a full disk.
    """
    begin, out = time.monotonic(), Path(out)
    settings = Settings(recipe.name, channels or recipe.channels, stored_frames)
    _check_names(clips)
    with _locked(out):
        _remove_leftovers(out)
        _write_json(out / "prepare.json", _record_of(settings))
        journal = _Journal(out / ".prepare" / "clips.jsonl")
        todo = _unfinished(clips, out, settings, journal, quiet)
        try:
            skipped = _make_all(todo, len(clips), out, settings, journal, workers, quiet)
            journal.finish()
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error}); fix that and run the same command again") from None
    remarks = [
        Problem(remark.split(" (")[0], clip.name, "", remark, "")
        for clip in clips
        for remark in journal.records.get(clip.name, {}).get("remarks", [])
    ]
    size = sum(
        record["spectrogram"] + sum(record["frames"])
        for clip in clips
        if (record := journal.records.get(clip.name)) is not None
    )
    made = len(todo) - len(skipped)
    return Summary(made, len(clips) - len(todo), skipped, remarks, size, time.monotonic() - begin)


def _check_names(clips: list[Clip]) -> None:
    seen = set()
    for clip in clips:
        check_clip_id(clip.name)
        if clip.name in seen:
            raise UserError(f"clip {clip.name}: listed twice; delete one of them")
        seen.add(clip.name)


def _record_of(settings: Settings) -> dict:
    return {
        "audio_recipe": settings.recipe,
        "channels": settings.channels,
        "frames": "k * floor(frames per second)",
        "stored_frames": settings.stored_frames,
        "jpeg_quality": settings.jpeg_quality,
        "rules": settings.rules,
    }


def _make_all(
    todo: list[Clip], total: int, out: Path, settings: Settings, journal: "_Journal", workers: int | None, quiet: bool
) -> list[Problem]:
    """Make every clip, note it in the journal as soon as its files are in place. Returns the skipped ones."""
    skipped = []
    faults = {clip.name: fault for clip in todo if (fault := _source_fault(clip)) is not None}
    for name, fault in faults.items():
        _forget(out, name, journal)
        skipped.append(fault)
    sound = [clip for clip in todo if clip.name not in faults]
    with tqdm(total=total, initial=total - len(sound), desc="preparing", unit="clip", disable=quiet) as bar:
        for clip, outcome in _outcomes(sound, out, settings, workers):
            if outcome.fault is None:
                journal.add(clip.name, _describe(out, clip, settings, outcome.remarks))
            else:
                _forget(out, clip.name, journal)
                skipped.append(outcome.fault)
                bar.set_postfix(skipped=len(skipped))
            bar.update()
    return sorted(skipped, key=lambda fault: fault.clip)


def _source_fault(clip: Clip) -> Problem | None:
    for path in (clip.video, clip.audio):
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


def _places(out: Path, name: str) -> tuple[Path, Path]:
    """The folder of frames and the array of a clip in a training folder."""
    return out / FRAMES.folder / name, out / SOUND.folder / f"{name}.npy"


def _forget(out: Path, name: str, journal: "_Journal") -> None:
    """Remove files made of another source or with other settings: they would pass for what was asked for."""
    journal.records.pop(name, None)
    frames, array = _places(out, name)
    shutil.rmtree(frames, ignore_errors=True)
    array.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# One clip


def make_clip(clip: Clip, out: Path, settings: Settings) -> Outcome:
    """Make the files of one clip; runs in a worker. Only an error of the output side (a full disk) is raised."""
    kind, path = "broken_sound", clip.audio
    try:
        values, remarks = _spectrogram(clip.audio, settings)
        kind, path = "broken_video", clip.video
        frames, array = _places(out, clip.name)
        with atomic_path(array, sync=False) as temporary:
            np.save(temporary, values)
            remarks += _frames(clip.video, frames, settings.stored_frames)
    except OSError:
        raise
    except UserError as error:
        reason = str(error).removeprefix(f"{path}: ")
    except Exception as error:  # a decoder's surprise at one file must not end the work on 15,000 others; it is named
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    else:
        return Outcome(None, remarks)
    return Outcome(
        Problem("no_audio_track" if reason == audio.NO_TRACK else kind, clip.name, str(path), reason, ""), []
    )


def _spectrogram(path: Path, settings: Settings) -> tuple[np.ndarray, list[str]]:
    recipe = AUDIO_RECIPES[settings.recipe]
    if path.suffix == ".npy":
        return _taken_spectrogram(path, recipe), []
    wave, rate = audio.load_wave(path, channels=settings.channels)
    remarks = ["silent sound"] if np.abs(wave).max() < SILENCE else []
    return audio.spectrogram(wave, rate, recipe), remarks


def _taken_spectrogram(path: Path, recipe: AudioRecipe) -> np.ndarray:
    """A spectrogram that somebody else made, as it is. Raises `UserError` unless it has the recipe's shape and type."""
    reason, shape = array_fault(str(path), {})
    if not reason and shape != recipe.shape:
        reason = f"spectrogram of shape {shape}; {recipe.name} makes {recipe.shape}, see --audio_recipe"
    if reason:
        raise UserError(f"{path}: {reason}")
    values = np.load(path, allow_pickle=False)
    if not np.isfinite(values).all():
        raise UserError(f"{path}: NaN or infinity in it; make it again")
    return values


def _frames(path: Path, folder: Path, most: int | None) -> list[str]:
    """Put the frames into place; returns remarks."""
    if path.is_dir():
        _take_frames(path, folder)
        return []
    result = video.extract_frames(path, folder, most)
    remarks = []
    if most is not None and result.kept < most:
        remarks.append(f"shorter than {most} s ({result.kept} frames)")
    elif result.decoded < result.rate:
        remarks.append(f"shorter than 1 s ({result.decoded} frames at {result.rate:.4g} per second)")
    if result.rate > 240:
        remarks.append(f"odd frame rate ({result.rate:.4g} per second in its header, so frames may be far apart)")
    return remarks


def _take_frames(source: Path, folder: Path) -> None:
    """Link (or copy) every frame of a folder that somebody else made; nothing is decoded."""
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


def _outcomes(clips: list[Clip], out: Path, settings: Settings, workers: int | None) -> Iterator[tuple[Clip, Outcome]]:
    """(clip, outcome) in the order they are done."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, len(clips) // 8)  # starting a process takes longer than a few clips
    if workers <= 1:
        with _one_thread(settings):
            for clip in clips:
                yield clip, make_clip(clip, out, settings)
    else:
        yield from _pooled(clips, out, settings, workers)


def _pooled(clips: list[Clip], out: Path, settings: Settings, workers: int) -> Iterator[tuple[Clip, Outcome]]:
    """The same on `workers` processes. A clip that kills its process (decoders do crash) is a fault of that clip."""
    waiting, running = deque(clips), {}
    while waiting:
        pool = _pool(workers, settings)
        try:
            while waiting or running:
                while waiting and len(running) < 4 * workers:
                    future = pool.submit(make_clip, waiting[0], out, settings)
                    running[future] = waiting.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    outcome = future.result()
                    yield running.pop(future), outcome
        except BrokenProcessPool:
            suspects, running = list(running.values()), {}
            yield from _suspects(suspects, out, settings)
        finally:
            pool.shutdown(cancel_futures=True)


def _suspects(clips: list[Clip], out: Path, settings: Settings) -> Iterator[tuple[Clip, Outcome]]:
    """The same in one process, clip by clip, so that the clip that kills it is known."""
    waiting = deque(clips)
    while waiting:
        with _pool(1, settings) as pool:
            try:
                pool.submit(os.getpid).result()
            except BrokenProcessPool:
                raise RuntimeError("worker processes do not start; a script must call main() under __main__") from None
            try:
                while waiting:
                    outcome = pool.submit(make_clip, waiting[0], out, settings).result()
                    yield waiting.popleft(), outcome
            except BrokenProcessPool:
                clip = waiting.popleft()
                reason = "the decoder crashed on it; get the file again"
                yield clip, Outcome(Problem("broken_video", clip.name, str(clip.video), reason, ""), [])


def _pool(workers: int, settings: Settings) -> ProcessPoolExecutor:
    # Spawned, not forked: a fork copies the locks of PyTorch's and OpenCV's threads in whatever state they are.
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker, initargs=(settings,))


def _start_worker(settings: Settings) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _enter_one_thread(settings)


def _end_with_parent() -> None:
    """End this worker when its parent is killed: it must not write beside the next run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _enter_one_thread(settings: Settings) -> Callable[[], None]:
    """Let every library use one thread: the processes are the parallelism. Returns what undoes it."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # faults come by name in the summary
    import cv2

    level, threads = cv2.utils.logging.getLogLevel(), cv2.getNumThreads()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    cv2.setNumThreads(1)
    undo: list[Callable] = [lambda: cv2.utils.logging.setLogLevel(level), lambda: cv2.setNumThreads(threads)]
    if settings.recipe in ("fbank", "logmel") or "torch" in sys.modules:
        import torch

        torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        undo.append(lambda: torch.set_num_threads(torch_threads))

    def restore() -> None:
        for step in undo:
            step()

    return restore


@contextlib.contextmanager
def _one_thread(settings: Settings) -> Iterator[None]:
    undo = _enter_one_thread(settings)
    try:
        yield
    finally:
        undo()


# ---------------------------------------------------------------------------------------------------------------------
# What is finished


class _Journal:
    """`.prepare/clips.jsonl`: one line for each finished clip, appended as it is finished, sorted at the end."""

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
        """Rewrite the file: sorted, one line a clip, whatever the order of the run was."""
        self.file.close()
        with atomic_path(self.path) as temporary:
            lines = [json.dumps({"clip": clip, **self.records[clip]}) + "\n" for clip in sorted(self.records)]
            temporary.write_text("".join(lines), encoding="utf-8")


def _unfinished(clips: list[Clip], out: Path, settings: Settings, journal: _Journal, quiet: bool) -> list[Clip]:
    """The clips whose files are not there as the journal says, or were made of another source or otherwise."""
    if not journal.records:
        return list(clips)
    headers = {}
    looking = tqdm(clips, desc="looking", unit="clip", disable=quiet, leave=False)
    return [clip for clip in looking if not _finished(clip, out, settings, journal.records.get(clip.name), headers)]


def _finished(clip: Clip, out: Path, settings: Settings, record: dict | None, headers: dict) -> bool:
    if record is None or record.get("settings") != list(settings):
        return False
    source = _stamps(clip)
    if None not in source and record.get("source") != source:  # a raw file removed after preparation is no change
        return False
    if isinstance(inspect_clip(str(out), clip.name, (SOUND, FRAMES), headers), Problem):
        return False
    return _sizes(out, clip) == (record.get("frames"), record.get("spectrogram"))


def _describe(out: Path, clip: Clip, settings: Settings, remarks: list[str]) -> dict:
    frames, spectrogram = _sizes(out, clip)
    return {
        "settings": list(settings),
        "source": _stamps(clip),
        "frames": frames,
        "spectrogram": spectrogram,
        "remarks": remarks,
    }


def _sizes(out: Path, clip: Clip) -> tuple[list[int], int]:
    """Bytes of each frame and of the array of a prepared clip."""
    frames, array = _places(out, clip.name)
    return [size for _, size in list_frames(str(frames))], os.stat(array).st_size


def _stamps(clip: Clip) -> list:
    """[bytes, modification time] of the sources, None for one that is not there; a folder stands for its listing."""
    stamps = []
    for path in (clip.video, clip.audio):
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
            raise UserError(f"{out}: another preparation is at work there; wait for it or name another --out") from None
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror}); name another folder with --out") from None
        yield


def _remove_leftovers(out: Path) -> None:
    """Delete what killed runs left under temporary names."""
    for folder in (out, out / FRAMES.folder, out / SOUND.folder, out / ".prepare"):
        remove_leftovers(folder)


def _write_json(path: Path, value: dict) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
