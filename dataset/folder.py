"""A training folder after header-level inspection: clips, labels and files of each part."""

import hashlib
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset.files import ArrayFiles, FrameFiles
from dataset.headers import KnownHeaders
from dataset.inspect import Problem, Report, inspect_folder
from dataset.lists import read_record
from dataset.specs import DatasetSpec, Modality
from dataset.splits import VALIDATION_SEED, actor_of, actor_test, hold_out, hold_out_groups
from utils.errors import UserError

# Problems of a list itself: --allow_missing does not accept them.
LIST_KINDS = ("wrong_classes", "empty_list", "bad_row", "unsafe_clip", "unknown_label", "duplicate_clip")
LIST_KINDS += ("clip_in_two_parts", "no_group")


class Part(NamedTuple):
    """N clips: ids, class indices (N,) int64, and `files[modality][i]`, the files of clip i in each modality.

    Those are a list of paths for frames (`FrameFiles`), one path for an array or a sequence (`ArrayFiles`).
    """

    clips: list[str]
    labels: np.ndarray
    files: dict[str, Any]


class Folder(NamedTuple):
    """A training folder. `shapes` is the shape of each array modality, `split` the content of split.json or {}.

    For sequences it is (steps of the longest, D). `notes` are lines for the user, such as on arrays that are cast.
    `missing` are the problems of the clips left out. `groups` maps each clip to its group (its actor, its speaker, its
    recorder) where no group may be both in train and in validation, else it is None. `known` are the headers of its
    files.
    """

    root: Path
    spec: DatasetSpec
    classes: list[str]
    parts: dict[str, Part]
    shapes: dict[str, tuple[int, ...]]
    missing: list[Problem]
    split: dict
    groups: dict[str, str] | None
    notes: tuple[str, ...] = ()
    known: KnownHeaders | None = None


def load_folder(
    root: Path | str, spec: DatasetSpec, allow_missing: bool = False, only: tuple[str, ...] | None = None
) -> Folder:
    """Inspect a training folder at header level (seconds for 15,000 clips) and list its files.

    `spec` is `spec_of(name, root)`. Raises `UserError` with the number of problems, the first few and the command that
    lists all. With `allow_missing`, clips with invalid files are left out and listed in `Folder.missing`; an invalid
    list is an error all the same. With `only`, the other parts' files are not checked and those parts are left out.
    """
    known = KnownHeaders(root)
    report = inspect_folder(root, spec, known=known)
    if only is not None:
        problems = [problem for problem in report.problems if problem.part in only or problem.kind in LIST_KINDS]
        report = report._replace(problems=problems, parts={name: report.parts[name] for name in only})
    wrong_lists = [problem for problem in report.problems if problem.kind in LIST_KINDS]
    if wrong_lists or (report.problems and not allow_missing):
        raise UserError(_complaint(report, wrong_lists or report.problems, spec, only_files=not wrong_lists))
    parts = {name: _part(report, spec, name, known) for name in report.parts}
    for name, part in parts.items():
        if not part.clips:
            raise UserError(f"{report.root}: no valid clip in {name}.csv; {_doctor(report.root, spec)} lists why")
    split = read_record(report.root, "split.json")
    groups = report.groups
    if groups is None and split.get("name") == "actor":
        groups = {clip: actor_of(clip) for part in parts.values() for clip in part.clips}
    notes = tuple(f"{warning.path}: {warning.reason}" for warning in report.warnings if warning.kind == "cast")
    return Folder(report.root, spec, report.classes, parts, report.shapes, report.problems, split, groups, notes, known)


def split_validation(part: Part, fraction: float, groups: dict[str, str] | None) -> tuple[Part, Part]:
    """(train, validation) by `fraction`: of each class's clips, or with `groups` of the groups, none in both parts.

    One split for all training seeds, so that a spread over seeds is training variance. The order of the clips is kept.
    Raises `UserError` where a part would be empty.
    """
    if groups is not None:
        held = hold_out_groups([groups[clip] for clip in part.clips], part.labels.tolist(), fraction, VALIDATION_SEED)
    else:
        held = hold_out(part.labels, fraction, VALIDATION_SEED)
    return _select(part, ~held), _select(part, held)


def split_by_actor(folder: Folder) -> Folder:
    """The folder with train and test split again as `prepare --split actor` does: no actor in both.

    Raises `UserError` where there is a val.csv, whose actors would be in train or test too.
    """
    parts = dict(folder.parts)
    if "val" in parts:
        raise UserError(
            f"--split actor: {folder.root}/val.csv would share actors; delete it and pass --val_fraction 0.1"
        )
    train, test = parts["train"], parts["test"]
    files = {name: train.files[name] + test.files[name] for name in train.files}
    whole = Part(train.clips + test.clips, np.concatenate([train.labels, test.labels]), files)
    held = actor_test(whole.clips, whole.labels.tolist())
    parts |= {"train": _select(whole, ~held), "test": _select(whole, held)}
    groups = {clip: actor_of(clip) for part in parts.values() for clip in part.clips}
    return folder._replace(parts=parts, split=folder.split | {"name": "actor"}, groups=groups)


def digest(part: Part) -> str:
    """SHA-256 over the clips and labels of a part; it does not depend on where the files are."""
    total = hashlib.sha256()
    for clip, label in zip(part.clips, part.labels.tolist(), strict=True):
        total.update(f"{clip},{label}\n".encode())
    return total.hexdigest()


def _select(part: Part, mask: np.ndarray) -> Part:
    rows = np.flatnonzero(mask)
    files = {name: own.select(rows) for name, own in part.files.items()}
    return Part([part.clips[i] for i in rows], part.labels[rows], files)


def _part(report: Report, spec: DatasetSpec, name: str, known: KnownHeaders) -> Part:
    index = {label: i for i, label in enumerate(report.classes)}
    rows = [(clip, index[label]) for clip, label in report.parts[name] if clip in report.files]
    clips = [clip for clip, _ in rows]
    files = {modality.name: _files(report, modality, clips, known) for modality in spec.modalities}
    return Part(clips, np.array([label for _, label in rows], dtype=np.int64), files)


def _files(report: Report, modality: Modality, clips: list[str], known: KnownHeaders) -> FrameFiles | ArrayFiles:
    folder, name = f"{report.root}/{modality.folder}", modality.name
    if modality.kind == "frames":
        names = [report.files[clip].frames[name] for clip in clips]
        return FrameFiles(folder, clips, names, modality.channels, modality.frames, modality.pick, known)
    lengths = None
    if modality.kind == "sequence":
        lengths = np.array([report.files[clip].shapes[name][0] for clip in clips], dtype=np.int64)
    return ArrayFiles(folder, clips, lengths)


def _complaint(report: Report, problems: list[Problem], spec: DatasetSpec, only_files: bool) -> str:
    """One line: how many problems, the first few, the command that lists all."""
    first = "; ".join(f"{problem.path or problem.clip}: {problem.reason}" for problem in problems[:3])
    more = f"; and {len(problems) - 3:,} more" if len(problems) > 3 else ""
    leave_out = "; --allow_missing leaves these clips out" if only_files else ""
    doctor = _doctor(report.root, spec)
    return f"{report.root}: {len(problems):,} problem(s): {first}{more}. {doctor} lists all{leave_out}"


def _doctor(root: Path, spec: DatasetSpec) -> str:
    return shlex.join(["python", "-m", "dataset.prepare", "--check", str(root), "--dataset", spec.name])
