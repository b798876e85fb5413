"""Raw downloads to a verified training folder, and the doctor.

python -m dataset.prepare --dataset CREMAD --raw RAW --out OUT
python -m dataset.prepare --check DIR [--dataset NAME] [--json]
"""

import csv
import json
from pathlib import Path

from dataset.engine import Clip, Summary, prepare_clips
from dataset.lists import check_clip_id
from utils.errors import UserError
from utils.files import atomic_path

__all__ = ["Clip", "Summary", "prepare_clips", "write_lists"]


def write_lists(out: Path | str, classes: list[str], parts: dict[str, list[tuple[str, str]]], split: dict) -> None:
    """Write stat.csv, a list for each part (train, test and maybe val) and split.json into a training folder.

    `parts` maps a part to its (clip, label) rows, kept in order; `split` says how the parts came about. stat.csv is
    removed first and written last: a kill between two lists leaves a folder that training refuses. Raises `UserError`
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
            _write_csv(out / f"{part}.csv", parts[part])
        else:
            (out / f"{part}.csv").unlink(missing_ok=True)  # of an earlier split
    with atomic_path(out / "split.json") as temporary:
        temporary.write_text(json.dumps(split, indent=2) + "\n", encoding="utf-8")
    _write_csv(out / "stat.csv", [(name,) for name in sorted(classes)])


def _write_csv(path: Path, rows: list[tuple]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
