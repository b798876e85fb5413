"""A prepared folder, checked and ready to be read: clips, labels and files of each part."""

import hashlib
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.inspect import Problem, Report, inspect_folder
from dataset.lists import read_record
from dataset.specs import DatasetSpec
from dataset.splits import VALIDATION_SEED, actor_of, actor_test, hold_out, hold_out_groups
from utils.errors import UserError

# No list could be trusted with these, so --allow_missing does not pass over them.
LIST_KINDS = ("wrong_classes", "empty_list", "bad_row", "unsafe_clip", "unknown_label", "duplicate_clip")
LIST_KINDS += ("clip_in_two_parts", "no_group")


class Part(NamedTuple):
    """N clips: ids, class indices (N,) int64, the sorted frames of each, the spectrogram of each."""

    clips: list[str]
    labels: np.ndarray
    frames: list[list[Path]]
    spectrograms: list[Path]


class Folder(NamedTuple):
    """A training folder. `missing` are the problems of clips left out; `split` is what is known of how it was split.

    `groups` maps each clip to what it has in common with others (its actor, its speaker, its microphone) where a
    validation part has to be of other groups than training, else None.
    """

    root: Path
    classes: list[str]
    parts: dict[str, Part]
    audio_shape: tuple[int, int]
    missing: list[Problem]
    split: dict
    groups: dict[str, str] | None


def load_folder(
    root: Path | str, spec: DatasetSpec, allow_missing: bool = False, only: tuple[str, ...] | None = None
) -> Folder:
    """Inspect a training folder at header level (seconds for 15,000 clips) and list its files.

    Raises `UserError` with the number of problems, the first few and what to type. With `allow_missing`, clips
    without sound files are left out and listed in `Folder.missing`; a faulty list is an error all the same. With `only`
    the files of other parts do not matter, and those parts are not in the answer.
    """
    report = inspect_folder(root, spec, deep=False)
    if only is not None:
        problems = [problem for problem in report.problems if problem.part in only or problem.kind in LIST_KINDS]
        report = report._replace(problems=problems, parts={name: report.parts[name] for name in only})
    wrong_lists = [problem for problem in report.problems if problem.kind in LIST_KINDS]
    if wrong_lists or (report.problems and not allow_missing):
        raise UserError(_complaint(report, wrong_lists or report.problems, spec, only_files=not wrong_lists))
    parts = {name: _part(report, name) for name in report.parts}
    for name, part in parts.items():
        if not part.clips:
            raise UserError(f"{report.root}: no sound clip in {name}.csv; {_doctor(report.root, spec)} lists why")
    split = read_record(report.root, "split.json")
    groups = report.groups
    if groups is None and split.get("name") == "actor":
        groups = {clip: actor_of(clip) for part in parts.values() for clip in part.clips}
    return Folder(report.root, report.classes, parts, report.audio_shape, report.problems, split, groups)


def split_validation(part: Part, fraction: float, groups: dict[str, str] | None) -> tuple[Part, Part]:
    """(train, validation): `fraction` of the clips, of each class alike; with `groups`, of the groups, none in both.

    One split for all training seeds, so that a spread over seeds is training variance. The order of the clips is kept.
    Raises `UserError` where a part would be empty.
    """
    if groups is not None:
        held = hold_out_groups([groups[clip] for clip in part.clips], part.labels.tolist(), fraction, VALIDATION_SEED)
    else:
        held = hold_out(part.labels, fraction, VALIDATION_SEED)
    return _select(part, ~held), _select(part, held)


def split_by_actor(folder: Folder) -> Folder:
    """The folder with train and test cut anew as `prepare --split actor` would: no actor in both.

    Raises `UserError` where there is a val.csv, whose actors would be in train or test too.
    """
    parts = dict(folder.parts)
    if "val" in parts:
        raise UserError(
            f"--split actor: {folder.root}/val.csv would share actors; delete it and type --val_fraction 0.1"
        )
    both = Part(*(type(a)([*a, *b]) if isinstance(a, list) else np.concatenate([a, b])
                  for a, b in zip(parts["train"], parts["test"], strict=True)))  # fmt: skip
    test = actor_test(both.clips, both.labels.tolist())
    parts |= {"train": _select(both, ~test), "test": _select(both, test)}
    groups = {clip: actor_of(clip) for part in parts.values() for clip in part.clips}
    return folder._replace(parts=parts, split=folder.split | {"name": "actor"}, groups=groups)


def digest(part: Part) -> str:
    """A sum over the clips and labels of a part, wherever its files lie: the same data give the same."""
    total = hashlib.sha256()
    for clip, label in zip(part.clips, part.labels.tolist(), strict=True):
        total.update(f"{clip},{label}\n".encode())
    return total.hexdigest()


def _select(part: Part, mask: np.ndarray) -> Part:
    rows = np.flatnonzero(mask)
    return Part(
        [part.clips[i] for i in rows],
        part.labels[rows],
        [part.frames[i] for i in rows],
        [part.spectrograms[i] for i in rows],
    )


def _part(report: Report, name: str) -> Part:
    index = {label: i for i, label in enumerate(report.classes)}
    rows = [(clip, index[label], report.files[clip]) for clip, label in report.parts[name] if clip in report.files]
    return Part(
        [clip for clip, _, _ in rows],
        np.array([label for _, label, _ in rows], dtype=np.int64),
        [[Path(path) for path in files.frames] for _, _, files in rows],
        [Path(files.spectrogram) for _, _, files in rows],
    )


def _complaint(report: Report, problems: list[Problem], spec: DatasetSpec, only_files: bool) -> str:
    """One line: how many, the first few, what to type."""
    first = "; ".join(f"{problem.path or problem.clip}: {problem.reason}" for problem in problems[:3])
    more = f"; and {len(problems) - 3:,} more" if len(problems) > 3 else ""
    go_on = "; --allow_missing goes on without these clips" if only_files else ""
    return f"{report.root}: {len(problems):,} problem(s): {first}{more}. {_doctor(report.root, spec)} lists all{go_on}"


def _doctor(root: Path, spec: DatasetSpec) -> str:
    return shlex.join(["python", "-m", "dataset.prepare", "--check", str(root), "--dataset", spec.name])
