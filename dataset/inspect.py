"""Is a folder sound? Header-level inspection at every training start, and the doctor behind `prepare --check`.

Nothing here imports librosa or PyAV at the top: training imports this module.
"""

import os
import struct
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy
from tqdm import tqdm

from dataset.lists import Fault, read_classes, read_record, scan_clips, scan_groups
from dataset.specs import AUDIO_RECIPES, DatasetSpec
from dataset.splits import actor_of
from utils.errors import UserError

LFS_HEADER = b"version https://git-lfs"  # what a file holds when git-lfs was not run
MAX_SIDE = 8192  # pixels; a larger JPEG is a decompression bomb or not a video frame
MAX_SPECTROGRAM = 2**26  # numbers in one spectrogram: 256 MiB of float32
PARTS = ("train", "test", "val")


class Problem(NamedTuple):
    """One thing wrong. `kind` is a short name for counting, `path` the file, `part` the list it comes from or ''."""

    kind: str
    clip: str
    path: str
    reason: str
    part: str


class Files(NamedTuple):
    """What lies on disk for one clip: its frames in sorted order, its spectrogram and that one's (rows, columns)."""

    frames: list[str]
    spectrogram: str
    shape: tuple[int, int]


class Report(NamedTuple):
    """What an inspection found. `parts` holds the (clip, label) rows of each list, `files` the sound clips.

    `groups` is the group of each clip as groups.csv says, None where there is no such file.
    Training would be sound exactly when `problems` is empty; `warnings` are worth knowing and stop nothing.
    """

    root: Path
    kind: str
    classes: list[str]
    parts: dict[str, list[tuple[str, str]]]
    files: dict[str, Files]
    audio_shape: tuple[int, int] | None
    problems: list[Problem]
    warnings: list[Problem]
    numbers: dict
    groups: dict[str, str] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# One file


def jpeg_fault(path: str) -> str:
    """Why the JPEG at `path` cannot be trusted, '' if it can: markers and dimensions only, nothing is decoded."""
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(2048)
            if not head:
                return "empty file"
            if not head.startswith(b"\xff\xd8"):
                return "git-lfs pointer; run git lfs pull" if head.startswith(LFS_HEADER) else "not a JPEG file"
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 64))
            if b"\xff\xd9" not in file.read():
                return "truncated JPEG (no end marker)"
            sides = _jpeg_sides(file, head)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if sides is None:
        return "JPEG without dimensions"
    if not 0 < min(sides) <= max(sides) <= MAX_SIDE:
        return f"JPEG of {sides[1]} x {sides[0]} pixels; sides must be 1 to {MAX_SIDE}"
    return ""


def _jpeg_sides(file, head: bytes) -> tuple[int, int] | None:
    """(height, width) from the start-of-frame segment (ITU-T T.81, B.2.2)."""
    position = 2
    for _ in range(256):
        if position + 9 > len(head):
            file.seek(position)
            more = file.read(16)
            segment = more
        else:
            segment = head[position : position + 9]
        if len(segment) < 9 or segment[0] != 0xFF:
            return None
        marker, length = segment[1], struct.unpack(">H", segment[2:4])[0]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return struct.unpack(">HH", segment[5:9])
        position += 2 + length
    return None


def npy_fault(path: str, headers: dict[bytes, tuple[int, int]]) -> tuple[str, tuple[int, int]]:
    """(why the spectrogram cannot be trusted or '', its shape): header and file size only, pickles never.

    `headers` remembers parsed headers: 15,000 files share one, and parsing it takes longer than reading it.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(128)
            shape = headers.get(head)
            if shape is None or len(head) < 128:
                if not head:
                    return "empty file", (0, 0)
                file.seek(0)
                shape, dtype, start = _npy_header(file)
                if dtype != np.dtype("<f4"):
                    return f"spectrogram of type {dtype}, not float32", (0, 0)
                if len(shape) != 2 or min(shape) < 1 or shape[0] * shape[1] > MAX_SPECTROGRAM:
                    return f"spectrogram of shape {shape}; two sides are needed, {MAX_SPECTROGRAM:,} numbers at most", (
                        0,
                        0,
                    )
                if start == 128:
                    headers[head] = shape
            else:
                start = 128
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return "no such file", (0, 0)
    except OSError as error:
        return f"cannot be read ({error.strerror})", (0, 0)
    except (ValueError, SyntaxError, TypeError, EOFError, RecursionError, MemoryError) as error:
        pointer = head.startswith(LFS_HEADER)
        return "git-lfs pointer; run git lfs pull" if pointer else f"not a .npy file ({_short(error)})", (0, 0)
    if size != start + 4 * shape[0] * shape[1]:
        return f"truncated .npy file ({size} bytes, {start + 4 * shape[0] * shape[1]} expected)", (0, 0)
    return "", shape


def _npy_header(file) -> tuple[tuple, np.dtype, int]:
    """(shape, dtype, offset of the data) of an open .npy file. Raises ValueError."""
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version}")
    shape, fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)
    if fortran and len(shape) > 1:
        raise ValueError("column order; save it with numpy.ascontiguousarray")
    return shape, dtype, file.tell()


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


def frame_names(folder: str) -> list[str]:
    """The .jpg names in a clip's folder, sorted; hidden files are not frames. Raises OSError."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.name for entry in entries if entry.name.lower().endswith(".jpg") and not entry.name.startswith(".")
        )


# ---------------------------------------------------------------------------------------------------------------------
# A training folder


def inspect_folder(root: Path | str, spec: DatasetSpec, deep: bool, quiet: bool = True) -> Report:
    """Inspect a training folder (DESIGN section 2).

    Header level: lists, names, sizes, JPEG markers and dimensions, .npy headers; seconds for 15,000 clips. `deep`
    also decodes every frame and reads every spectrogram. Raises `UserError` where there is no folder or no list.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; prepare it first (data/README.md) or name another with --data_root")
    problems, warnings = [], []
    classes = read_classes(root / "stat.csv")
    if spec.classes is not None and tuple(classes) != spec.classes:
        reason = f"classes {', '.join(classes)[:80]}; {spec.name} has {', '.join(spec.classes)[:80]}"
        problems.append(Problem("wrong_classes", "", str(root / "stat.csv"), reason, ""))
    parts = {}
    for name in PARTS:
        if name != "val" or (root / "val.csv").exists():
            parts[name], faults = scan_clips(root / f"{name}.csv", classes)
            problems += [_list_problem(root, name, fault) for fault in faults]
            if not parts[name]:
                problems.append(Problem("empty_list", "", str(root / f"{name}.csv"), "no clips; prepare again", name))
    problems += _in_two_parts(root, parts)
    groups = _groups(root, parts, problems)
    files, shape = _inspect_clips(root, spec, parts, problems, quiet)
    numbers = _numbers(spec, read_record(root, "split.json"), classes, parts, groups, warnings)
    if deep:
        _inspect_content(files, parts, problems, warnings, quiet)
    return Report(root, "training", classes, parts, files, shape, problems, warnings, numbers, groups)


def _list_problem(root: Path, part: str, fault: Fault) -> Problem:
    return Problem(fault.kind, fault.clip, str(root / f"{part}.csv"), f"line {fault.line}: {fault.reason}", part)


def _in_two_parts(root: Path, parts: dict[str, list[tuple[str, str]]]) -> list[Problem]:
    first, found = {}, []
    for part, rows in parts.items():
        for clip, _ in rows:
            if first.setdefault(clip, part) != part:
                reason = f"also in {first[clip]}.csv; delete it from one"
                found.append(Problem("clip_in_two_parts", clip, str(root / f"{part}.csv"), reason, part))
    return found


def _groups(root: Path, parts: dict[str, list[tuple[str, str]]], problems: list[Problem]) -> dict[str, str] | None:
    """The group of each clip as groups.csv says, None without that file; adds clips without one to `problems`."""
    path = root / "groups.csv"
    if not path.exists():
        return None
    rows, faults = scan_groups(path)
    problems += [_list_problem(root, "groups", fault) for fault in faults]
    groups = dict(rows)
    for clip in [clip for clips in parts.values() for clip, _ in clips if clip not in groups]:
        reason = f"no group for clip {clip}; add a line clip,group, or delete the file"
        problems.append(Problem("no_group", clip, str(path), reason, "groups"))
    return groups


def _inspect_clips(
    root: Path, spec: DatasetSpec, parts: dict, problems: list[Problem], quiet: bool
) -> tuple[dict[str, Files], tuple[int, int] | None]:
    """Look at every clip's files. Returns the sound ones and the shape of their spectrograms; adds to `problems`."""
    files, headers, part_of = {}, {}, {clip: part for part, rows in parts.items() for clip, _ in rows}
    for clip in tqdm(part_of, desc="checking", unit="clip", disable=quiet, leave=False):
        found = inspect_clip(str(root), clip, headers)
        if isinstance(found, Problem):
            problems.append(found._replace(part=part_of[clip]))
        else:
            files[clip] = found
    wanted = _wanted_shape(root, spec, files)
    for clip in [clip for clip, found in files.items() if found.shape != wanted]:
        found = files.pop(clip)
        reason = f"spectrogram of shape {found.shape}, not {wanted}; prepare the folder again with one --audio_recipe"
        problems.append(Problem("bad_spectrogram", clip, found.spectrogram, reason, part_of[clip]))
    return files, wanted


def inspect_clip(root: str, clip: str, headers: dict[bytes, tuple[int, int]]) -> Files | Problem:
    """The files of one clip, or the first thing wrong with them."""
    folder, spectrogram = f"{root}/visual/{clip}", f"{root}/audio/{clip}.npy"
    try:
        frames = [f"{folder}/{name}" for name in frame_names(folder)]
    except OSError:
        return Problem("missing_frames", clip, folder, "no folder of frames", "")
    if not frames:
        return Problem("missing_frames", clip, folder, "no .jpg in it", "")
    for path in frames:
        if reason := jpeg_fault(path):
            return Problem("bad_frame", clip, path, reason, "")
    reason, shape = npy_fault(spectrogram, headers)
    if reason:
        kind = "missing_spectrogram" if reason == "no such file" else "bad_spectrogram"
        return Problem(kind, clip, spectrogram, reason, "")
    return Files(frames, spectrogram, shape)


def _wanted_shape(root: Path, spec: DatasetSpec, files: dict[str, Files]) -> tuple[int, int] | None:
    """The shape every spectrogram must have: what prepare recorded, else the spec's, else what most files have."""
    name = read_record(root, "prepare.json").get("audio_recipe", spec.audio_recipe)
    if name is not None:
        if name not in tuple(AUDIO_RECIPES):
            raise UserError(f"{root / 'prepare.json'}: audio_recipe {name!r} is unknown; prepare the folder again")
        return AUDIO_RECIPES[name].shape
    shapes = Counter(found.shape for found in files.values())
    return shapes.most_common(1)[0][0] if shapes else None


def _numbers(
    spec: DatasetSpec,
    split: dict,
    classes: list[str],
    parts: dict,
    groups: dict[str, str] | None,
    warnings: list[Problem],
) -> dict:
    """Counts per part and class; compares them with the published ones and looks for shared actors and groups."""
    numbers = {"clips": {part: len(rows) for part, rows in parts.items()}}
    numbers["per_class"] = {
        part: {name: count[name] for name in classes}
        for part, rows in parts.items()
        for count in [Counter(label for _, label in rows)]
    }
    published = split.get("name", "official") == "official" and "val" not in parts
    if published and spec.counts is not None:
        found = (len(parts["train"]), len(parts["test"]))
        if found != spec.counts:
            reason = f"{found[0]} / {found[1]} clips in train / test; published are {spec.counts[0]} / {spec.counts[1]}"
            warnings.append(Problem("clip_counts", "", "", reason, ""))
    if published and spec.train_class_counts is not None:
        for name, count in spec.train_class_counts.items():
            if (found := numbers["per_class"]["train"].get(name, 0)) != count:
                warnings.append(
                    Problem("class_counts", "", "", f"{found} train clips of {name}; published {count}", "")
                )
    if spec.by_actor:
        actors = {part: {actor_of(clip) for clip, _ in rows} for part, rows in parts.items()}
        shared = actors["train"] & actors["test"]
        numbers["actors"] = {part: len(names) for part, names in actors.items()}
        numbers["shared_actors"] = len(shared)
        if shared:
            reason = f"{len(shared)} actors are in both train and test; --split actor makes a split that shares none"
            warnings.append(Problem("actor_overlap", "", "", reason, ""))
    if groups is not None:
        found = {part: {groups[clip] for clip, _ in rows if clip in groups} for part, rows in parts.items()}
        numbers["groups"] = {part: len(names) for part, names in found.items()}
        numbers["groups_in_train_and_test"] = len(found["train"] & found["test"])
    return numbers


def _inspect_content(
    files: dict[str, Files], parts: dict, problems: list[Problem], warnings: list[Problem], quiet: bool
) -> None:
    """Decode every frame and read every spectrogram; unsound clips leave `files`."""
    part_of = {clip: part for part, rows in parts.items() for clip, _ in rows}
    clips = list(files)
    with ThreadPoolExecutor() as pool:  # decoders and reads let other threads run
        contents = pool.map(lambda clip: _inspect_one(clip, files[clip], part_of[clip]), clips)
        for clip, (bad, silent) in zip(
            clips, tqdm(contents, "reading", len(clips), unit="clip", disable=quiet), strict=True
        ):
            problems += bad
            warnings += silent
            if bad:
                del files[clip]


def _inspect_one(clip: str, found: Files, part: str) -> tuple[list[Problem], list[Problem]]:
    """(problems, warnings) of one clip's content."""
    bad = [Problem("bad_frame", clip, path, reason, part) for path in found.frames if (reason := _decoding_fault(path))]
    values, silent = np.load(found.spectrogram, allow_pickle=False), []
    if not np.isfinite(values).all():
        bad.append(Problem("bad_spectrogram", clip, found.spectrogram, "NaN or infinity in it", part))
    elif np.ptp(values) < 1e-6:
        silent.append(Problem("silent", clip, found.spectrogram, "silent: one value everywhere", part))
    return bad, silent


def _decoding_fault(path: str) -> str:
    """Why Pillow cannot decode the frame, '' if it can. OpenCV would fill what is missing with grey and say nothing."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"cannot be decoded ({_short(error)})"
    return ""


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__
