"""Write the lists of a training folder; CREMA-D's split by actor."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path

from dataset.lists import check_clip_id
from dataset.prepare.published import Split
from dataset.prepare.raw import CREMAD_CLIPS
from dataset.specs import DatasetSpec
from dataset.splits import ACTOR_SEED, actor_of, actor_test, describe
from utils.errors import UserError
from utils.files import atomic_path


def write_lists(
    out: Path | str,
    classes: list[str],
    parts: dict[str, list[tuple[str, str]]],
    split: dict,
    groups: list[tuple[str, str]] | None = None,
) -> None:
    """Write stat.csv, a list for each part (train, test and maybe val) and split.json into a training folder.

    `parts` maps a part to its (clip, label) rows, kept in order; `split` says how the parts were made; `groups` are the
    (clip, group) rows of groups.csv (None leaves a file that is there as it is). stat.csv is removed first and written
    last: a kill between two lists leaves a folder that training refuses. Raises `UserError`
    for an unsafe clip id or a label that is no class.
    """
    out = Path(out)
    for part, rows in parts.items():
        for clip, label in rows:
            check_clip_id(clip)
            if label not in classes:
                raise UserError(f"{part}.csv: label {label!r} of clip {clip} is not among the classes")
    (out / "stat.csv").unlink(missing_ok=True)
    for part in ("train", "test", "val"):
        if part in parts:
            write_csv(out / f"{part}.csv", parts[part])
        else:
            (out / f"{part}.csv").unlink(missing_ok=True)  # of an earlier split
    with atomic_path(out / "split.json") as temporary:
        temporary.write_text(json.dumps(split, indent=2) + "\n", encoding="utf-8")
    if groups is not None:
        write_csv(out / "groups.csv", groups)
    write_csv(out / "stat.csv", [(name,) for name in sorted(classes)])


def write_csv(path: Path, rows: Iterable[tuple]) -> None:
    """Write `rows` as CSV, atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def actor_split(rows: list[tuple[str, str]], spec: DatasetSpec) -> Split:
    """Split (clip, label) rows about 90/10 into train and test: no actor is in both, and classes are stratified."""
    rows = sorted(rows)
    if len({actor_of(clip) for clip, _ in rows}) < 2:
        raise UserError("clips of 1 actor cannot be split by actor; use --split official")
    held = actor_test([clip for clip, _ in rows], [label for _, label in rows])
    parts = {
        "train": [row for row, test in zip(rows, held, strict=True) if not test],
        "test": [row for row, test in zip(rows, held, strict=True) if test],
    }
    record = {"name": "actor", "dataset": spec.name, "source": "clip ids", "seed": ACTOR_SEED}
    record |= {"complete": len(rows) == CREMAD_CLIPS, **describe(parts, by_actor=True)}
    return Split(list(spec.classes or ()), parts, record)
