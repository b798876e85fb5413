"""Raw downloads: find the files of each clip and check them.

Folder names do not matter: files are found by their own names, up to four folders deep. So a clone of CREMA-D, a flat
folder of Kinetics clips, one folder per class, and the output of OGM-GE's scripts all work.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from dataset.inspect import Problem, Report
from dataset.lists import check_clip_id
from dataset.prepare import audio, video
from dataset.prepare.engine import SILENCE, Clip, source_fault
from dataset.specs import DatasetSpec
from dataset.splits import actor_of
from utils.errors import UserError
from utils.progress import over

VIDEO_TYPES = (".flv", ".mp4", ".mkv", ".webm", ".avi", ".mov", ".mpg", ".mpeg", ".m4v", ".ts", ".wmv", ".ogv", ".3gp")
DEPTH = 4  # depth of the search below the raw folder
CREMAD_CLIPS = 7442  # published clips, both parts together


class Index(NamedTuple):
    """Contents of a raw folder by clip id: videos, WAV files, existing spectrograms, folders of frames."""

    root: Path
    videos: dict[str, Path]
    sounds: dict[str, Path]
    spectrograms: dict[str, Path]
    frames: dict[str, Path]


def index_raw(root: Path | str, leave_out: Path | None = None) -> Index:
    """Find all files below `root`, except below `leave_out`. Of two with one name, the first in sorted order counts."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder of the raw download")
    index = Index(root, {}, {}, {}, {})
    skip = leave_out.resolve() if leave_out is not None else None
    kinds = {".wav": index.sounds, ".npy": index.spectrograms} | dict.fromkeys(VIDEO_TYPES, index.videos)
    for folder, folders, names in os.walk(root, followlinks=True):
        here = Path(folder)
        deep = len(here.relative_to(root).parts) >= DEPTH
        folders[:] = [] if deep else sorted(n for n in folders if n[0] != "." and (here / n).resolve() != skip)
        for name in sorted(names):
            stem, extension = os.path.splitext(name)
            extension = extension.lower()
            if extension in kinds and stem and stem[0] != ".":
                kinds[extension].setdefault(stem, here / name)
            elif extension == ".jpg" and here != root:
                stem, extension = os.path.splitext(here.name)  # OGM-GE's script for Kinetics names them <clip>.mp4
                index.frames.setdefault(stem if extension in VIDEO_TYPES else here.name, here)
    return index


def find_clips(index: Index, spec: DatasetSpec, names: Iterable[str]) -> list[Clip]:
    """The files of each clip of `names`; for a missing file, a path that does not exist.

    CREMA-D has its sound in a WAV file, Kinetics inside the video. What was prepared before (frames, spectrograms)
    serves where the raw file is missing, empty or a git-lfs pointer. Raises `UserError` where none of them is there.
    """
    clips = [_find(index, spec, name) for name in names]
    if not any(path.exists() for clip in clips for path in (clip.video, clip.audio) if path is not None):
        expected = f"VideoFlash/{clips[0].name}.flv" if spec.name == "CREMAD" else f"{clips[0].name}.mp4"
        raise UserError(
            f"{index.root}: none of the {len(clips):,} listed clips is there (such as {expected}); wrong folder?"
        )
    pointers = [clip for clip in clips if clip.video and source_fault(clip.video)[0] == "lfs_pointer"]
    if len(pointers) > len(clips) / 2:
        raise UserError(
            f"{index.root}: {len(pointers):,} of {len(clips):,} videos are git-lfs pointers, "
            f"such as {pointers[0].video}; "
            f"run: git -C {index.root} lfs pull"
        )
    return clips


def _find(index: Index, spec: DatasetSpec, name: str) -> Clip:
    cremad = spec.name == "CREMAD"
    raw = _lookup(index.videos, name)
    video = raw
    if raw is None or source_fault(raw)[0]:
        video = _lookup(index.frames, name) or raw
    if video is None:
        video = index.root / "VideoFlash" / f"{name}.flv" if cremad else index.root / f"{name}.mp4"
    sounds = [_lookup(index.sounds, name), _lookup(index.spectrograms, name)]
    if not cremad:
        sounds.insert(0, raw)
    there = [path for path in sounds if path is not None]
    whole = [path for path in there if not source_fault(path)[0]]
    missing = index.root / "AudioWAV" / f"{name}.wav" if cremad else video
    return Clip(name, video, (whole or there or [missing])[0])


def _lookup(files: dict[str, Path], name: str) -> Path | None:
    """Look up a file by the clip's own name, then by its name in the Kinetics archive.

    OGM-GE's test list shortens `ID_000042_000052` to `ID_42` (the start in seconds).
    """
    if name in files:
        return files[name]
    short = re.fullmatch(r"(.{11})_(\d{1,6})", name)
    if short is None:
        return None
    start = int(short[2])
    return files.get(f"{short[1]}_{start:06d}_{start + 10:06d}")


def seconds_of(path: Path) -> float | None:
    """Duration of a media file from its header; None if it has none or is not a media file."""
    import av
    from av.error import FFmpegError

    try:
        with av.open(os.path.abspath(path), metadata_errors="replace") as container:
            return container.duration / 1_000_000 if container.duration else None
    except (FFmpegError, OSError, ValueError):
        return None


def cremad_rows(index: Index, spec: DatasetSpec) -> list[tuple[str, str]]:
    """(clip, label) of every clip in a raw CREMA-D folder, sorted, from ids alone: `actor_sentence_EMOTION_level`."""
    names = sorted({*index.videos, *index.sounds, *index.frames, *index.spectrograms})
    fields = [(name, name.split("_")) for name in names]
    rows = [(name, f[2]) for name, f in fields if len(f) == 4 and f[0].isdecimal() and f[2] in (spec.classes or ())]
    if not rows:
        raise UserError(f"{index.root}: no file named like a CREMA-D clip (1001_DFA_ANG_XX.flv); wrong folder?")
    for clip, _ in rows:
        check_clip_id(clip)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Check of a raw folder


def inspect_raw(root: Path | str, spec: DatasetSpec, names: list[str] | None, quiet: bool = True) -> Report:
    """Check every raw file: missing, empty, git-lfs pointer, unreadable, truncated, without sound, silent.

    For videos, packets are counted and only one frame is decoded. `names` are the required clips (None: all clips
    found).
    """
    index = index_raw(root)
    if names is None:
        names = [c for c, _ in cremad_rows(index, spec)] if spec.name == "CREMAD" else sorted(index.videos)
    if not names:
        raise UserError(f"{root}: neither a training folder (no stat.csv) nor a raw one (no videos)")
    problems, warnings = [], []
    clips = [_find(index, spec, name) for name in names]
    for clip in over(clips, "reading", quiet=quiet, keep=True):
        _inspect_raw_clip(clip, problems, warnings)
    if spec.name == "CREMAD" and len(clips) != CREMAD_CLIPS:
        warnings.append(Problem("clip_counts", "", "", f"{len(clips):,} clips; CREMA-D has {CREMAD_CLIPS:,}", ""))
    numbers = {"clips": {"raw": len(clips)}}
    if spec.by_actor:
        numbers["actors"] = {"raw": len({actor_of(clip.name) for clip in clips})}
    return Report(Path(root), "raw", [], {}, {}, {}, problems, warnings, numbers)


def _inspect_raw_clip(clip: Clip, problems: list[Problem], warnings: list[Problem]) -> None:
    for path in dict.fromkeys(path for path in (clip.video, clip.audio) if path is not None):
        kind, reason = source_fault(path)
        if not kind and path.suffix.lower() in VIDEO_TYPES:
            kind, reason = video.packet_fault(path, needs_sound=path == clip.audio)
        elif not kind and path.suffix.lower() == ".wav":
            try:
                wave, _ = audio.load_wave(path)
                if abs(wave).max() < SILENCE:
                    warnings.append(Problem("silent", clip.name, str(path), "silent sound", ""))
            except UserError as error:
                kind, reason = "broken_sound", str(error).removeprefix(f"{path}: ")
        if kind:
            problems.append(Problem(kind, clip.name, str(path), reason, ""))
