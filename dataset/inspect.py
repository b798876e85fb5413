"""Header-level inspection of a training folder: what every training start needs to know, in seconds.

Lists, names, files that exist and are not empty, .npy headers. No file's content is decoded: `dataset.pack.read_frame`
and `read_array` check what they decode anyway, and the doctor (`python -m dataset.prepare --check`) reads everything.
"""

import os
from collections import Counter
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy
from tqdm import tqdm

from dataset.lists import Fault, read_classes, read_record, scan_clips, scan_groups
from dataset.specs import AUDIO, AUDIO_RECIPES, DESCRIPTION, DatasetSpec, Modality
from dataset.splits import actor_of
from utils.errors import UserError

LFS_HEADER = b"version https://git-lfs"  # what a file holds when git-lfs was not run
PARTS = ("train", "test", "val")


class Problem(NamedTuple):
    """One thing wrong. `kind` is a short name for counting, `path` the file, `part` the list it comes from or ''."""

    kind: str
    clip: str
    path: str
    reason: str
    part: str


class Files(NamedTuple):
    """The files of one clip by modality: `frames` in sorted order, `arrays`, and the `shapes` of the arrays."""

    frames: dict[str, list[str]]
    arrays: dict[str, str]
    shapes: dict[str, tuple[int, ...]]


class Report(NamedTuple):
    """The result of an inspection. `parts` holds the (clip, label) rows of each list, `files` the valid clips' files.

    `shapes` is the shape of each array modality; `groups` is the group of each clip as groups.csv says, None where
    there is no such file. A folder is valid exactly when `problems` is empty; `warnings` do not stop training.
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
    """Why `data` is not a whole JPEG file, '' if it looks like one. Its pixels are the decoder's to check."""
    if not data:
        return "empty file"
    if data.startswith(LFS_HEADER):
        return "git-lfs pointer; run git lfs pull"
    if not data.startswith(b"\xff\xd8"):
        return "not a JPEG file"
    # Decoders fill what is missing with grey and do not say so. Some cameras pad behind the end marker.
    return "" if b"\xff\xd9" in data[-64:] else "truncated JPEG (no end marker)"


def array_fault(path: str, headers: dict[bytes, tuple[int, ...]]) -> tuple[str, tuple[int, ...]]:
    """(reason, shape) of a .npy file: the reason is '' for a whole float32 array; header and size only, no pickles.

    `headers` caches parsed headers: 15,000 files share one, and parsing it takes longer than reading it.
    """
    head = b""
    try:
        with open(path, "rb") as file:
            head, start = file.read(128), 128
            shape = headers.get(head)
            if shape is None:
                if not head:
                    return "empty file", ()
                file.seek(0)
                shape, dtype, start = _npy_header(file)
                if dtype != np.dtype("<f4"):
                    return f"array of type {dtype}, not float32", ()
                if not shape or min(shape) < 1:
                    return f"array of shape {shape}; one or more dimensions of at least 1 are needed", ()
                if start == 128:
                    headers[head] = shape
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return "no such file", ()
    except OSError as error:
        return f"cannot be read ({error.strerror})", ()
    except (ValueError, SyntaxError, TypeError, EOFError, RecursionError, MemoryError) as error:
        pointer = head.startswith(LFS_HEADER)
        return "git-lfs pointer; run git lfs pull" if pointer else f"not a .npy file ({short(error)})", ()
    expected = start + 4 * int(np.prod(shape, dtype=object))
    return ("", shape) if size == expected else (f"truncated .npy file ({size} bytes, {expected} expected)", ())


def _npy_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, dtype, offset of the data) of an open .npy file. Raises ValueError."""
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version}")
    shape, fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)
    if fortran and len(shape) > 1:
        raise ValueError("column order; save it with numpy.ascontiguousarray")
    return shape, dtype, file.tell()


def list_frames(folder: str) -> list[tuple[str, int]]:
    """(name, bytes) of each .jpg in a clip's folder, sorted; hidden files are not frames. Raises OSError."""
    with os.scandir(folder) as entries:
        return sorted(
            (entry.name, entry.stat().st_size)
            for entry in entries
            if entry.name.lower().endswith(".jpg") and not entry.name.startswith(".")
        )


def short(error: BaseException) -> str:
    """An error's own words on one line, at most 100 characters."""
    return " ".join(str(error).split())[:100] or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# A training folder


def inspect_folder(root: Path | str, spec: DatasetSpec, quiet: bool = True) -> Report:
    """Inspect a training folder at header level; seconds for 15,000 clips.

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
    files, shapes = _inspect_clips(root, spec, parts, problems, quiet)
    numbers = _numbers(spec, read_record(root, "split.json"), classes, parts, groups, warnings)
    return Report(root, "training", classes, parts, files, shapes, problems, warnings, numbers, groups)


def part_of_clip(parts: dict[str, list[tuple[str, str]]]) -> dict[str, str]:
    """The part of each clip of the lists."""
    return {clip: part for part, rows in parts.items() for clip, _ in rows}


def inspect_clip(
    root: str, clip: str, modalities: tuple[Modality, ...], headers: dict[bytes, tuple[int, ...]]
) -> Files | Problem:
    """The files of one clip in every modality, or the first thing wrong with them. `headers` as in `array_fault`."""
    files = Files({}, {}, {})
    for modality in modalities:
        if modality.kind == "frames":
            folder = f"{root}/{modality.folder}/{clip}"
            try:
                frames = list_frames(folder)
            except OSError:
                return Problem("missing_frames", clip, folder, "no folder of frames", "")
            if not frames:
                return Problem("missing_frames", clip, folder, "no .jpg in it", "")
            for name, size in frames:
                if not size:
                    return Problem("bad_frame", clip, f"{folder}/{name}", "empty file", "")
            files.frames[modality.name] = [f"{folder}/{name}" for name, _ in frames]
        else:
            path = f"{root}/{modality.folder}/{clip}.npy"
            reason, shape = array_fault(path, headers)
            if reason:
                return Problem("missing_array" if reason == "no such file" else "bad_array", clip, path, reason, "")
            files.arrays[modality.name], files.shapes[modality.name] = path, shape
    return files


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
    root: Path, spec: DatasetSpec, parts: dict[str, list[tuple[str, str]]], problems: list[Problem], quiet: bool
) -> tuple[dict[str, Files], dict[str, tuple[int, ...]]]:
    """The valid clips' files and the shape of each array modality; adds the other clips to `problems`."""
    files: dict[str, Files] = {}
    headers: dict[bytes, tuple[int, ...]] = {}
    part_of = part_of_clip(parts)
    for clip in tqdm(part_of, desc="checking", unit="clip", disable=quiet, leave=False):
        found = inspect_clip(str(root), clip, spec.modalities, headers)
        if isinstance(found, Problem):
            problems.append(found._replace(part=part_of[clip]))
        else:
            files[clip] = found
    shapes = {m.name: _wanted_shape(root, m, files) for m in spec.modalities if m.kind == "array" and files}
    for clip, found in list(files.items()):
        for name, wanted in shapes.items():
            if found.shapes[name] != wanted:
                advice = "prepare the folder again with one --audio_recipe" if name == AUDIO else "make it again"
                reason = f"array of shape {found.shapes[name]}, not {wanted}; {advice}"
                problems.append(Problem("bad_array", clip, found.arrays[name], reason, part_of[clip]))
                files.pop(clip, None)
    return files, shapes


def _wanted_shape(root: Path, modality: Modality, files: dict[str, Files]) -> tuple[int, ...]:
    """The shape that every array of `modality` must have.

    For sound it is that of the recipe in prepare.json or else in the spec; without a recipe, the most common one.
    """
    recipe, source = modality.recipe, DESCRIPTION
    if modality.name == AUDIO and "audio_recipe" in (record := read_record(root, "prepare.json")):
        recipe, source = record["audio_recipe"], "prepare.json"
    if recipe is None:
        return Counter(found.shapes[modality.name] for found in files.values()).most_common(1)[0][0]
    if not isinstance(recipe, str) or recipe not in AUDIO_RECIPES:
        again = "prepare the folder again" if source != DESCRIPTION else f"allowed: {', '.join(AUDIO_RECIPES)}"
        raise UserError(f"{root / source}: audio_recipe {recipe!r} is unknown; {again}")
    return AUDIO_RECIPES[recipe].shape


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
