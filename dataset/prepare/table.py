"""A user's own clips, from a table of files and labels or a folder per class, and their split into parts.

A table is CSV with a header. `file` and `label` are required; `clip`, `audio`, `start`, `end`, `part` and `group` are
optional. Errors are one line that names the table and the line in it.
"""

import difflib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dataset.inspect import PARTS
from dataset.lists import MAX_ROWS, check_clip_id, read_rows
from dataset.prepare.engine import Clip
from dataset.prepare.published import Split
from dataset.prepare.raw import VIDEO_TYPES
from dataset.splits import hold_out, hold_out_groups
from utils.errors import UserError

REQUIRED = ("file", "label")
COLUMNS = (*REQUIRED, "clip", "audio", "start", "end", "part", "group")
SOUND_TYPES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".wma", ".aif", ".aiff")
SPLIT_SEED = 0  # fixed, so that a table has the same split on every machine


class Row(NamedTuple):
    """One clip of a table: `file` and `audio` (None: the sound of `file`) as written there, times in seconds.

    `part` and `group` are None where the table has no such column.
    """

    clip: str
    label: str
    file: str
    audio: str | None = None
    start: float | None = None
    end: float | None = None
    part: str | None = None
    group: str | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_table(path: Path | str) -> list[Row]:
    """The rows of a table, in file order. A byte-order mark, quotes and CRLF are accepted.

    Without a `clip` column the clip id is the file's name without extension, followed by start and end where there are
    any; files of one name in several folders get their folders' names in front. Raises `UserError` naming file and
    line for an unknown column, an empty or repeated entry, a time that is no number, a part that is none.
    """
    path = Path(path)
    lines = read_rows(path)
    first = next(lines, None)
    if first is None:
        raise UserError(f"{path}: empty; the first line names the columns: file,label")
    columns = _columns(path, *first)
    rows, numbers = [], []
    for line, fields in lines:
        if len(fields) != len(columns):
            raise UserError(f"{path}, line {line}: {len(fields)} fields, the header has {len(columns)}; "
                            "quote fields with commas")  # fmt: skip
        rows.append(_row(f"{path}, line {line}", dict(zip(columns, fields, strict=True))))
        numbers.append(line)
        if len(rows) > MAX_ROWS:
            raise UserError(f"{path}: more than {MAX_ROWS:,} rows; not a table of clips")
    if not rows:
        raise UserError(f"{path}: no clips under the header")
    for column in ("part", "group"):
        rows = _all_or_none(path, rows, numbers, column)
    return _named(rows, [f"{path}, line {line}" for line in numbers])


def _columns(path: Path, line: int, header: list[str]) -> list[str]:
    names = [name.lower() for name in header]
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        raise UserError(f"{path}, line {line}: columns are not separated by commas; save the table as comma separated")
    for name in REQUIRED:
        if name not in names:
            raise UserError(f"{path}, line {line}: no column {name!r} in the header {','.join(header)[:80]!r}; "
                            f"file,label are required, {','.join(COLUMNS[2:])} optional")  # fmt: skip
    for name in names:
        if name not in COLUMNS:
            near = next(iter(difflib.get_close_matches(name, COLUMNS)), None)
            advice = f"did you mean {near!r}?" if near else f"allowed: {', '.join(COLUMNS)}; delete it"
            raise UserError(f"{path}, line {line}: unknown column {name[:80]!r}; {advice}")
        if names.count(name) > 1:
            raise UserError(f"{path}, line {line}: column {name!r} is there twice; delete one")
    return names


def _row(where: str, fields: dict[str, str]) -> Row:
    for name in (*REQUIRED, "clip"):
        if not fields.get(name, "-"):
            raise UserError(f"{where}: {name} is empty")
    if not fields["label"].isprintable() or any(not fields.get(name, "").isprintable() for name in ("file", "audio")):
        raise UserError(f"{where}: a control character in {','.join(fields.values())[:80]!r}; delete it")
    if any(value.startswith('"') for value in fields.values()):
        raise UserError(f"{where}: a quote after a space; write no space between comma and quote")
    start, end = (_seconds(where, name, fields.get(name, "")) for name in ("start", "end"))
    if end is not None and end <= (start or 0):
        raise UserError(f"{where}: end {end:g} is not after start {start or 0:g}; both are seconds")
    part = fields.get("part", "").lower() or None
    if part is not None and part not in PARTS:
        raise UserError(f"{where}: part {fields['part'][:80]!r}; allowed: train, val, test")
    return Row(fields.get("clip", ""), fields["label"], fields["file"], fields.get("audio") or None, start, end, part,
               fields.get("group") or None)  # fmt: skip


def _seconds(where: str, name: str, text: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{where}: {name} {text[:80]!r} is not a number of seconds") from None
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{where}: {name} {text[:80]!r} must be 0 seconds or more")
    return value


def _all_or_none(path: Path, rows: list[Row], numbers: list[int], column: str) -> list[Row]:
    """Refuse a column that is filled in for some rows only."""
    empty = [line for row, line in zip(rows, numbers, strict=True) if getattr(row, column) is None]
    if empty and len(empty) < len(rows):
        raise UserError(f"{path}, line {empty[0]}: no {column}; give every row one, or leave the column out")
    return rows


def _named(rows: list[Row], places: list[str]) -> list[Row]:
    """Give each row a unique clip id. `places` are the origins of the rows."""
    stems = defaultdict(set)
    for row in rows:
        stems[Path(row.file).stem].add(row.file)
    named, seen = [], {}
    for row, place in zip(rows, places, strict=True):
        clip = row.clip
        if not clip:
            file = Path(row.file)
            parts = file.with_suffix("").parts if len(stems[file.stem]) > 1 else (file.stem,)
            times = [f"{time:g}" for time in (row.start, row.end) if time is not None]
            clip = "_".join([*(part for part in parts if part not in (file.anchor, "..", ".")), *times])
        try:
            check_clip_id(clip)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        if clip in seen:
            other = seen[clip].rpartition(", ")[2]
            raise UserError(f"{place}: clip {clip} is also in {other}; delete one, or name both in a column 'clip'")
        seen[clip] = place
        named.append(row._replace(clip=clip))
    return named


# ---------------------------------------------------------------------------------------------------------------------
# A folder per class


def class_folders(raw: Path | str, leave_out: Path | None = None) -> tuple[list[Row], Counter]:
    """(rows, files left out by extension) of `raw/<class>/**/*` or of `raw/<part>/<class>/**/*`, sorted by path.

    Where all folders in `raw` are called train, test or val, they are the parts. A sound beside a video of the same
    name is its sound. `leave_out` is a folder below `raw` that is not looked into. Raises `UserError` where there is no
    file of a known type, or fewer than two classes.
    """
    raw = Path(raw)
    if not raw.is_dir():
        raise UserError(f"{raw}: no such folder; give the folder of the raw clips")
    skip = leave_out.resolve() if leave_out is not None else None
    films, sounds, left_out = [], [], Counter()
    for folder, folders, names in os.walk(raw, followlinks=True):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if name[0] != "." and (here / name).resolve() != skip)
        for name in sorted(name for name in names if name[0] != "."):
            kind = os.path.splitext(name)[1].lower()
            if here == raw or kind not in VIDEO_TYPES + SOUND_TYPES:
                left_out[kind or name] += 1
            else:
                (films if kind in VIDEO_TYPES else sounds).append((here / name).relative_to(raw))
    beside = {path.with_suffix(""): path for path in reversed(sounds)}
    filmed = {path.with_suffix("") for path in films}
    files = sorted([*films, *(path for path in sounds if path.with_suffix("") not in filmed)])
    if not files:
        kinds = f"; found {', '.join(sorted(left_out)[:5])}" if left_out else ""
        raise UserError(f"{raw}: no videos or sounds in folders of classes (<class>/*.mp4){kinds}; or give --table")
    parted = {path.parts[0].lower() for path in files} <= set(PARTS)
    rows = []
    for path in files:
        if parted and len(path.parts) < 3:
            raise UserError(f"{raw / path}: not in a folder of a class; move it to {path.parts[0]}/<class>/")
        part, label = (path.parts[0].lower(), path.parts[1]) if parted else (None, path.parts[0])
        audio = beside.get(path.with_suffix("")) if path.suffix.lower() in VIDEO_TYPES else None
        rows.append(Row("", label, path.as_posix(), audio.as_posix() if audio else None, part=part))
    if len({row.label for row in rows}) < 2:
        raise UserError(f"{raw}: only one class folder, {rows[0].label}; at least two classes are needed")
    return _named(rows, [str(raw / row.file) for row in rows]), left_out


# ---------------------------------------------------------------------------------------------------------------------
# Files and parts


def find_sources(rows: Sequence[Row], raw: Path, sound: bool = True, frames: bool = True) -> list[Clip]:
    """The sources of each clip below `raw`. Without `sound` or `frames`, clips have none of them.

    Raises `UserError` if none of the files exists. Single missing files are reported by the engine.
    """
    clips = []
    for row in rows:
        file = raw / row.file
        audio = (raw / row.audio if row.audio else file) if sound else None
        clips.append(Clip(row.clip, file if frames else None, audio, row.start, row.end))
    if not any((raw / row.file).exists() for row in rows):
        raise UserError(f"{raw}: none of the {len(rows):,} files is there (such as {rows[0].file}); wrong --raw?")
    return clips


def only_sounds(rows: Sequence[Row]) -> bool:
    """Whether all files are audio files by their names, so that there are no frames."""
    return all(os.path.splitext(row.file)[1].lower() in SOUND_TYPES for row in rows)


def split_rows(rows: Sequence[Row], fractions: dict[str, float], record: dict) -> Split:
    """Classes and parts of the rows: from their `part`, else a split with a fixed seed.

    `fractions` maps "test" and maybe "val" to their share of all clips. With groups, no group is in two parts and the
    class shares are as even as whole groups allow; without, every class is cut in the same shares. The split depends
    on ids, labels and groups, not on the order of rows. Parts keep the order of the rows. `record` is completed for
    split.json. Raises `UserError` where a part would be empty.
    """
    classes = sorted({row.label for row in rows})
    if len(classes) < 2:
        raise UserError(f"all {len(rows):,} clips have the label {classes[0]!r}; at least two classes are needed")
    grouped = rows[0].group is not None
    if rows[0].part is not None:
        part_of = {row.clip: row.part for row in rows}
        record = record | {"name": "given"}
    else:
        part_of = _drawn(rows, fractions, grouped)
        record = record | {"name": "by group" if grouped else "stratified", "seed": SPLIT_SEED, "fractions": fractions}
    parts = {part: [(row.clip, row.label) for row in rows if part_of[row.clip] == part] for part in PARTS}
    for part in ("train", "test"):
        if not parts[part]:
            raise UserError(f"no clip in part {part}; train and test need at least one clip each")
    if not parts["val"]:
        del parts["val"]
    groups = [(row.clip, row.group or "") for row in rows] if grouped else None
    record["clips"] = {part: len(found) for part, found in parts.items()}
    if groups is not None:
        record["groups"] = {part: len({row.group for row in rows if part_of[row.clip] == part}) for part in parts}
        group_parts = defaultdict(set)
        for row in rows:
            group_parts[row.group].add(part_of[row.clip])
        record["shared_groups"] = sum(len(found) > 1 for found in group_parts.values())
    return Split(classes, parts, record, groups)


def _drawn(rows: Sequence[Row], fractions: dict[str, float], grouped: bool) -> dict[str, str]:
    """The part of each clip. Parts are drawn one after the other from the remaining clips."""
    left = sorted(rows)
    part_of, share = {}, 1.0
    for part, fraction in fractions.items():
        if fraction <= 0:
            continue
        if grouped and len({row.group for row in left}) < 2:
            raise UserError(f"--{part}_fraction {fraction:g}: the clips left are of 1 group, {left[0].group}, and none "
                            "may be in two parts; give a column 'part', or leave 'group' out")  # fmt: skip
        labels = [row.label for row in left]
        cut = fraction / share
        if grouped:
            held = hold_out_groups([row.group or "" for row in left], labels, cut, SPLIT_SEED)
        else:
            if max(Counter(labels).values()) < 2:
                raise UserError(f"each of {len(labels):,} labels has one clip; a split needs two clips of a label")
            index = {label: i for i, label in enumerate(sorted(set(labels)))}
            held = hold_out([index[label] for label in labels], cut, SPLIT_SEED)
        part_of |= {row.clip: part for row, taken in zip(left, held, strict=True) if taken}
        left = [row for row, taken in zip(left, held, strict=True) if not taken]
        share -= fraction
    return part_of | {row.clip: "train" for row in left}
