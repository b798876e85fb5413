"""Lists of a training folder: stat.csv (class names), train.csv, test.csv, val.csv (clip,label), groups.csv.

The lists are often written by spreadsheets, so byte-order marks, quotes and CRLF are accepted. Entries that would make
training wrong (unknown labels, duplicate clips, ids that leave the folder) raise errors with file and line.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError

MAX_ROWS = 2_000_000  # a hundred times the largest public set; beyond it the file is not a list of clips
MAX_LIST_BYTES = 256 * 2**20
MAX_CLIP_BYTES = 240  # file systems stop at 255; `.npy` and the prefix of a temporary name must still fit


class Fault(NamedTuple):
    """One bad row. `kind` is a short name for counting, `clip` is empty where the row names none."""

    kind: str
    clip: str
    line: int
    reason: str


def check_clip_id(clip: str) -> None:
    """Raise `UserError` unless `clip` is a plain file name, so that no list can point outside the data folder."""
    reason = ""
    if not clip:
        reason = "is empty"
    elif clip.startswith("."):
        reason = "starts with a dot (hidden and temporary names do)"
    elif any(bad in clip for bad in "/\\"):
        reason = "holds a slash; a clip id is a name inside visual/ and audio/, not a path"
    elif not clip.isprintable():
        reason = "holds a control character"
    elif len(clip.encode("utf-8", "surrogatepass")) > MAX_CLIP_BYTES:
        reason = f"is longer than {MAX_CLIP_BYTES} bytes"
    if reason:
        raise UserError(f"clip id {clip[:80]!r} {reason}; rename the clip")


def read_classes(path: Path | str) -> list[str]:
    """The class names in stat.csv, sorted: the index of a class is its rank. Raises `UserError`."""
    names = []
    for line, row in read_rows(Path(path)):
        if len(row) != 1 or not row[0]:
            raise UserError(
                f"{path}, line {line}: {','.join(row)[:80]!r} is not one class name; quote names with commas"
            )
        if row[0] in names:
            raise UserError(f"{path}, line {line}: class {row[0]!r} is there twice; delete one line")
        names.append(row[0])
        if len(names) > 100_000:
            raise UserError(f"{path}: more than 100,000 lines; this is no list of classes (one name per line)")
    if not names:
        raise UserError(f"{path}: no class names; write one per line")
    return sorted(names)


def read_clips(path: Path | str, classes: list[str] | None = None) -> list[tuple[str, str]]:
    """(clip, label) rows of a list, in file order. With `classes`, every label must be one of them.

    Raises `UserError` with file and line for the first bad row, unknown label, repeated clip or unsafe clip id.
    """
    rows, faults = scan_clips(path, classes, stop_at_first=True)
    if faults:
        raise UserError(f"{path}, line {faults[0].line}: {faults[0].reason}")
    if not rows:
        raise UserError(f"{path}: no clips; each line is clip,label")
    return rows


def read_record(root: Path | str, name: str) -> dict:
    """The JSON object in `root/name` (split.json, prepare.json: what prepare noted), {} where there is no such file."""
    path = Path(root) / name
    try:
        if path.stat().st_size > 2**20:
            raise UserError(f"{path}: larger than 1 MiB; delete it and prepare the folder again")
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path}: not readable as JSON; delete it and prepare the folder again") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}: not a JSON object; delete it and prepare the folder again")
    return record


def scan_clips(
    path: Path | str, classes: list[str] | None = None, stop_at_first: bool = False
) -> tuple[list[tuple[str, str]], list[Fault]]:
    """The good rows of a list and a `Fault` for each other one. Raises `UserError` only where there is no list."""
    known = None if classes is None else set(classes)
    rows, faults, first_line = [], [], {}
    for line, row in read_rows(Path(path)):
        fault = _fault(row, line, known, first_line)
        if fault is None:
            first_line[row[0]] = line
            rows.append((row[0], row[1]))
        else:
            faults.append(fault)
            if stop_at_first:
                break
        if len(rows) + len(faults) > MAX_ROWS:
            raise UserError(f"{path}: more than {MAX_ROWS:,} rows; this is no list of clips (each line is clip,label)")
    return rows, faults


def scan_groups(path: Path | str) -> tuple[list[tuple[str, str]], list[Fault]]:
    """The good (clip, group) rows of groups.csv and a `Fault` for each other one; clips of no part are welcome."""
    rows, faults = scan_clips(path)
    faults = [fault._replace(reason=fault.reason.replace("clip,label", "clip,group")) for fault in faults]
    return rows, faults


def _fault(row: list[str], line: int, known: set[str] | None, first_line: dict[str, int]) -> Fault | None:
    if line == 1 and row[:1] == ["clip"] and len(row) == 2 and known is not None and row[1] not in known:
        return Fault("bad_row", "", line, f"{','.join(row)} is a header; delete it, the lists have none")
    if len(row) != 2 or not row[1]:
        return Fault("bad_row", "", line, f"{','.join(row)[:80]!r} is not clip,label")
    clip, label = row
    try:
        check_clip_id(clip)
    except UserError as error:
        return Fault("unsafe_clip", clip, line, str(error))
    if known is not None and label not in known:
        return Fault(
            "unknown_label", clip, line, f"label {label[:80]!r} of clip {clip} is not in stat.csv; correct one"
        )
    if clip in first_line:
        return Fault(
            "duplicate_clip", clip, line, f"clip {clip} is also in line {first_line[clip]}; delete one of them"
        )
    return None


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, stripped fields) of every line that is not blank. Raises `UserError` where it is no CSV file."""
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise UserError(f"{path}: larger than {MAX_LIST_BYTES >> 20} MiB; this is no list")
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                fields = [field.strip() for field in row]
                if any(fields):
                    yield reader.line_num, fields
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; prepare the folder first (data/README.md says how)") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the list as UTF-8 text") from None
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV file ({error}); each line is clip,label") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
