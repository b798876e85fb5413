"""partition.csv: the kept modality and the difficulties of each clip at the last scoring of a run."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError


class Clip(NamedTuple):
    """A line of partition.csv: the class, the KL from uniform in bits by modality (low is hard), the modalities kept.

    `kept` is one modality, or all of them under `--keep all`.
    """

    label: str
    kl: dict[str, float]
    kept: tuple[str, ...]


def read_partition(path: Path, modalities: Sequence[str] = ()) -> dict[str, Clip]:
    """{clip: Clip} of a run's partition.csv, or of the one in the folder `path`.

    Raises `UserError` if the file is no partition.csv, or lacks a column of one of `modalities`.
    """
    path = path / "partition.csv" if path.is_dir() else path
    rows = read_csv(path, ["clip", "label", *(f"kl_{name}" for name in modalities), "kept"])
    names = [column.removeprefix("kl_") for column in rows[0][1] if column and column.startswith("kl_")]
    clips = {}
    for line, row in rows:
        try:
            kl = {name: float(row[f"kl_{name}"]) for name in names}
        except (TypeError, ValueError):
            raise UserError(f"{path}, line {line}: a KL that is not a number; give a run's partition.csv") from None
        kept = tuple((row["kept"] or "").split("+"))
        known = all(name in names for name in kept)  # older runs write one word for all of them
        clips[row["clip"]] = Clip(row["label"], kl, kept if known else tuple(names))
    return clips


def read_csv(path: Path, columns: list[str]) -> list[tuple[int, dict[str, str]]]:
    """(line number, row) for each row of a CSV file. Raises `UserError` for no rows or a missing column."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not text'})") from None
    missing = [name for name in columns if name not in (reader.fieldnames or [])]
    if missing or not rows:
        what = f"no column {missing[0]}" if missing else "no rows"
        raise UserError(f"{path}: {what}; expected a table with {', '.join(columns)}")
    return rows
