"""Header-level inspection of a training folder, in seconds, at the start of every training run.

Checks lists, names, existence and size of files, and .npy headers. File contents are not decoded here:
`dataset.pack.read_frame` and `read_array` check what they decode, and `python -m dataset.prepare --check` reads all.
"""

import os
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from dataset.headers import Header, KnownHeaders
from dataset.lists import Fault, read_classes, read_record, scan_clips, scan_groups
from dataset.specs import AUDIO, DatasetSpec, Modality, recipe_of
from dataset.splits import actor_of
from utils.errors import UserError
from utils.progress import over

LFS_HEADER = b"version https://git-lfs"  # what a file holds when git-lfs was not run
PARTS = ("train", "test", "val")
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


class Problem(NamedTuple):
    """One thing wrong. `kind` is a short name for counting, `path` the file, `part` the list it comes from or ''."""

    kind: str
    clip: str
    path: str
    reason: str
    part: str


class Files(NamedTuple):
    """Contents of a clip in each modality; clips with equal contents share one object.

    `frames` are the names of the frames, in order, `shapes` those of the arrays; `casts` says in words how the file of
    an array differs from row-ordered float32, where it does. `dataset.folder` makes paths of them.
    """

    frames: dict[str, tuple[str, ...]]
    shapes: dict[str, tuple[int, ...]]
    casts: dict[str, str]


Headers = dict[bytes, Header]  # parsed headers by their bytes: 15,000 files share one


class Report(NamedTuple):
    """The result of an inspection. `parts` holds the (clip, label) rows of each list, `files` the valid clips' files.

    `shapes` is the shape of each array modality, (steps of the longest, D) for sequences; `groups` is the group of each
    clip as groups.csv says, None where there is no such file. A folder is valid exactly when `problems` is empty;
    `warnings` do not stop training.
    """

    root: Path
    kind: str
    classes: list[str]
    parts: dict[str, list[tuple[str, str]]]
    files: dict[str, Files]
    shapes: dict[str, tuple[int, ...]]
    problems: list[Problem]
    warnings: list[Problem]
    numbers: dict
    groups: dict[str, str] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# One file


def frame_fault(data: bytes) -> str:
    """Reason why `data` is not a complete JPEG or PNG file, '' if it looks valid. Pixels are not decoded."""
    if not data:
        return "empty file"
    if data.startswith(LFS_HEADER):
        return "git-lfs pointer; run git lfs pull"
    # Decoders fill what is missing with grey and do not say so. Some cameras pad behind the end marker.
    if data.startswith(b"\xff\xd8"):
        return "" if b"\xff\xd9" in data[-64:] else "truncated JPEG (no end marker)"
    if data.startswith(PNG_START):
        return "" if PNG_END in data[-64:] else "truncated PNG (no end marker)"
    return "not a JPEG or PNG file"


def array_fault(path: str, headers: Headers) -> tuple[str, tuple[int, ...]]:
    """(reason, shape) of a .npy file: the reason is '' for a whole array of real numbers; header and size only.

    `headers` caches parsed headers: parsing one takes longer than reading it.
    """
    try:
        return "", array_header(path, headers).shape
    except ValueError as error:
        return str(error), ()


def array_header(path: str, headers: Headers) -> Header:
    """The header of a .npy file of real numbers. Raises `ValueError` with the reason where it is not a whole one."""
    head = b""
    try:
        with open(path, "rb") as file:
            head = file.read(128)
            header = headers.get(head)
            if header is None:
                if not head:
                    raise _Fault("empty file")
                file.seek(0)
                header = _npy_header(file)
                shape, dtype = header.shape, header.dtype
                if dtype.kind not in "fiub" or dtype.itemsize > 8:
                    raise _Fault(f"array of type {dtype}; real numbers of 64 bits at most are needed")
                if not shape or min(shape) < 1:
                    raise _Fault(f"array of shape {shape}; one or more dimensions of at least 1 are needed")
                if header.start == 128:
                    headers[head] = header
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise _Fault("no such file") from None
    except OSError as error:
        raise _Fault(f"cannot be read ({error.strerror})") from None
    except _Fault:
        raise
    except (ValueError, SyntaxError, TypeError, EOFError, RecursionError, MemoryError) as error:
        pointer = head.startswith(LFS_HEADER)
        reason = "git-lfs pointer; run git lfs pull" if pointer else f"not a .npy file ({short(error)})"
        raise _Fault(reason) from None
    expected = header.start + header.dtype.itemsize * int(np.prod(header.shape, dtype=object))
    if size != expected:
        raise _Fault(f"truncated .npy file ({size} bytes, {expected} expected)")
    return header


class _Fault(ValueError):
    """Describe the problem of an array file."""


def _npy_header(file: BinaryIO) -> Header:
    """The header of an open .npy file. Raises ValueError."""
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version}")
    shape, fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)
    return Header(shape, dtype, fortran, file.tell())


def list_frames(folder: str) -> list[tuple[str, int]]:
    """(name, bytes) of each frame in a clip's folder, in the order of their numbers. Raises OSError.

    Frames end in .jpg, .jpeg or .png; hidden files are none.
    """
    with os.scandir(folder) as entries:
        found = [
            (entry.name, entry.stat().st_size)
            for entry in entries
            if entry.name.lower().endswith(FRAME_SUFFIXES) and not entry.name.startswith(".")
        ]
    return sorted(found, key=lambda frame: frame_order(frame[0]))


@lru_cache(maxsize=65_536)  # names repeat from clip to clip
def frame_order(name: str) -> tuple:
    """The key by which frames are sorted: numbers in a name count as numbers, so `frame_9` precedes `frame_10`."""
    words = re.split(r"([0-9]+)", name)
    return tuple(int(word) if i % 2 else word for i, word in enumerate(words)), name


def short(error: BaseException) -> str:
    """An error's own words on one line, at most 100 characters."""
    return " ".join(str(error).split())[:100] or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# A training folder


def inspect_folder(
    root: Path | str, spec: DatasetSpec, quiet: bool = True, known: KnownHeaders | None = None
) -> Report:
    """Inspect a training folder at header level; seconds for 15,000 clips. Arrays whose header is `known` stay closed.

    Raises `UserError` where there is no folder or no list.
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
    files, shapes = _inspect_clips(root, spec, parts, problems, quiet, known)
    warnings += _casts(root, spec, files)
    numbers = _numbers(spec, read_record(root, "split.json"), classes, parts, groups, warnings)
    return Report(root, "training", classes, parts, files, shapes, problems, warnings, numbers, groups)


def part_of_clip(parts: dict[str, list[tuple[str, str]]]) -> dict[str, str]:
    """The part of each clip of the lists."""
    return {clip: part for part, rows in parts.items() for clip, _ in rows}


def inspect_clip(
    root: str, clip: str, modalities: tuple[Modality, ...], headers: Headers, known: KnownHeaders | None = None
) -> Files | Problem:
    """The files of one clip in every modality, or the first thing wrong with them. `headers` as in `array_fault`."""
    files = Files({}, {}, {})
    for modality in modalities:
        if modality.kind == "frames":
            names = _clip_frames(f"{root}/{modality.folder}/{clip}", clip)
            if isinstance(names, Problem):
                return names
            files.frames[modality.name] = names
        else:
            path = f"{root}/{modality.folder}/{clip}.npy"
            try:
                header = _known_header(path, modality, clip, headers, known)
            except ValueError as error:
                kind = "missing_array" if str(error) == "no such file" else "bad_array"
                return Problem(kind, clip, path, str(error), "")
            files.shapes[modality.name] = header.shape
            if header.cast:
                files.casts[modality.name] = header.cast
    for modality in modalities:
        if modality.like is not None and modality.like in files.frames:
            own, other = (len(files.frames[name]) for name in (modality.name, modality.like))
            if own != other:
                reason = f"{own} frames; {modality.like} has {other}, and both are picked together"
                return Problem("frame_counts", clip, f"{root}/{modality.folder}/{clip}", reason, "")
    return files


def _known_header(path: str, modality: Modality, clip: str, headers: Headers, known: KnownHeaders | None) -> Header:
    """`array_header` of a file that is opened only if it is new or has changed."""
    if known is None:
        return array_header(path, headers)
    try:
        status = os.stat(path)
    except OSError:
        return array_header(path, headers)  # which says why
    header = known.find(modality.folder, clip, status)
    if not isinstance(header, Header):
        header = array_header(path, headers)
        known.note(modality.folder, clip, status, header)
    return header


def _clip_frames(folder: str, clip: str) -> tuple[str, ...] | Problem:
    """The names of a clip's frames, in order, or what is wrong with them."""
    try:
        frames = list_frames(folder)
    except OSError:
        return Problem("missing_frames", clip, folder, "no folder of frames", "")
    if not frames:
        return Problem("missing_frames", clip, folder, "no .jpg or .png in it", "")
    for name, size in frames:
        if not size:
            return Problem("bad_frame", clip, f"{folder}/{name}", "empty file", "")
    stems = Counter(name.rpartition(".")[0] for name, _ in frames)
    if len(stems) < len(frames):
        twice = next(stem for stem, count in stems.items() if count > 1)
        return Problem("bad_frame", clip, f"{folder}/{twice}", "there with two endings; delete one of the files", "")
    return tuple(name for name, _ in frames)


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
    root: Path,
    spec: DatasetSpec,
    parts: dict[str, list[tuple[str, str]]],
    problems: list[Problem],
    quiet: bool,
    known: KnownHeaders | None,
) -> tuple[dict[str, Files], dict[str, tuple[int, ...]]]:
    """The valid clips' files and the shape of each array modality; adds the other clips to `problems`."""
    files: dict[str, Files] = {}
    same: dict = {}  # one object for equal names of frames, and for equal files
    headers: Headers = {}
    part_of = part_of_clip(parts)
    for clip in over(part_of, "checking", quiet=quiet):
        found = inspect_clip(str(root), clip, spec.modalities, headers, known)
        if isinstance(found, Problem):
            problems.append(found._replace(part=part_of[clip]))
        else:
            for name, frames in found.frames.items():
                found.frames[name] = same.setdefault(frames, frames)
            files[clip] = same.setdefault(tuple(tuple(field.items()) for field in found), found)
    arrays = [modality for modality in spec.modalities if modality.kind != "frames"] if files else []
    wanted = {modality.name: _wanted_shape(root, modality, files) for modality in arrays}
    for clip, found in list(files.items()):
        for modality in arrays:
            reason = _shape_fault(modality, found.shapes[modality.name], wanted[modality.name])
            if reason:
                path = f"{root}/{modality.folder}/{clip}.npy"
                problems.append(Problem("bad_array", clip, path, reason, part_of[clip]))
                files.pop(clip, None)
                break
    for modality in arrays:
        if modality.kind == "sequence":
            longest = max((found.shapes[modality.name][0] for found in files.values()), default=1)
            wanted[modality.name] = (longest, *wanted[modality.name][1:])
    return files, wanted


def _shape_fault(modality: Modality, shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """Reason why an array of `shape` does not fit `wanted`, '' if it does. Sequences can have any length."""
    if modality.kind == "sequence":
        if len(shape) != 2:
            return f"array of shape {shape}; a sequence has two dimensions (steps, numbers)"
        return "" if shape[1:] == wanted[1:] else f"steps of {shape[1]} numbers, not {wanted[1]}; make it again"
    if shape == wanted:
        return ""
    advice = "prepare the folder again with one --audio_recipe" if modality.name == AUDIO else "make it again"
    if len(shape) == len(wanted) == 2 and shape[1] == wanted[1] and modality.recipe is None:
        advice += ', or give this modality the kind "sequence" in dataset.json'
    return f"array of shape {shape}, not {wanted}; {advice}"


def _wanted_shape(root: Path, modality: Modality, files: dict[str, Files]) -> tuple[int, ...]:
    """The shape that every array of `modality` must have; of sequences only the second number counts.

    For sound it is that of the recipe in prepare.json or else in the spec; without a recipe, the most common one.
    """
    recipe = modality.recipe
    if modality.name == AUDIO and "audio_recipe" in (record := read_record(root, "prepare.json")):
        try:
            recipe = recipe_of(record["audio_recipe"])
        except ValueError as error:
            raise UserError(f"{root / 'prepare.json'}: audio_{error}; prepare the folder again") from None
    if recipe is not None and modality.kind == "array":
        return recipe.shape
    shapes = Counter(found.shapes[modality.name] for found in files.values())
    if modality.kind == "sequence":
        widths = Counter()
        for shape, count in shapes.items():
            widths[shape[1] if len(shape) == 2 else 0] += count
        return (1, max((width for width in widths if width), key=lambda width: widths[width], default=0))
    return shapes.most_common(1)[0][0]


def _casts(root: Path, spec: DatasetSpec, files: dict[str, Files]) -> list[Problem]:
    """A warning for each modality whose arrays are cast, or read in another order."""
    found = Counter(cast for own in files.values() for cast in own.casts.items())
    folders = {modality.name: root / modality.folder for modality in spec.modalities}
    return [
        Problem("cast", "", str(folders[name]), f"{count:,} arrays are {cast}; they are read as float32", "")
        for (name, cast), count in found.items()
    ]


def _numbers(
    spec: DatasetSpec,
    split: dict,
    classes: list[str],
    parts: dict[str, list[tuple[str, str]]],
    groups: dict[str, str] | None,
    warnings: list[Problem],
) -> dict:
    """Counts per part and class; compares them with the published ones and looks for shared actors and groups."""
    numbers: dict = {"clips": {part: len(rows) for part, rows in parts.items()}}
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
