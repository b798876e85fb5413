"""Published split lists, from a local folder or from a fixed commit of OGM-GE's repository.

They cannot be redistributed here (GPL-3.0), so they are read or downloaded, and checked against their SHA-256.
"""

import hashlib
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from dataset.lists import check_clip_id, read_classes, read_clips, read_rows
from dataset.splits import describe
from utils.errors import UserError
from utils.files import atomic_path

BASE_URL = "https://raw.githubusercontent.com/GeWu-Lab/OGM-GE_CVPR2022/343dc1d95c9bda88f105c0da8d24f185e0e98b54/data"
SUMS = {
    "CREMAD": {
        "train.csv": "68d0d3fd253830328fc92c68f3cf2e215db8c5b86757ad9c5112d2c76ba68bde",
        "test.csv": "14866c99301fd56fb4a16f8a7048a8a6372a47069aee9f216443bc718be45f1f",
        "stat.csv": "827044c2e7dae878abf30db1a789dcedac2ae260df34d62e6c28c9f8ed82546c",
    },
    "KineticSound": {
        "my_train.txt": "e75bb596c30bf839adb3c2dc73b4a4617add66b36c2f416f96ac2e56a251751f",
        "my_test.txt": "3bb1fee2c9d30919cec6887a3e2fa27b7936cc3f46dff447d85ea21892a80a58",
    },
}
KINETICS_CLASSES = 31
MAX_BYTES = 2**24  # of a downloaded list; the longest has 483 kB


class Split(NamedTuple):
    """Classes, (clip, label) rows of each part, and a record of where they come from for split.json.

    `groups` are the (clip, group) rows of groups.csv, None where nothing is known of groups.
    """

    classes: list[str]
    parts: dict[str, list[tuple[str, str]]]
    record: dict
    groups: list[tuple[str, str]] | None = None


def published_split(dataset: str, folder: Path | str | None, cache: Path | str, url: str = BASE_URL) -> Split:
    """The published split of CREMAD or KineticSound, from `folder`, else downloaded from `url` and kept in `cache`.

    A downloaded list must have the published SHA-256; lists in `folder` may differ, and the record then calls the
    split "given" instead of "official". Raises `UserError` naming the file or URL and what to do.
    """
    names = SUMS[dataset]
    if folder is not None:
        paths = {name: _find(Path(folder), dataset, name) for name in names}
    else:
        paths = {
            name: _download(f"{url.rstrip('/')}/{dataset}/{name}", Path(cache) / name, names[name]) for name in names
        }
    sums = {name: _sum(path) for name, path in paths.items()}
    if dataset == "CREMAD":
        classes = read_classes(paths["stat.csv"])
        parts = {part: read_clips(paths[f"{part}.csv"], classes) for part in ("train", "test")}
    else:
        classes = [f"{index:02d}" for index in range(KINETICS_CLASSES)]
        parts = {part: read_kinetics_list(paths[f"my_{part}.txt"]) for part in ("train", "test")}
    _check_disjoint(parts, paths)
    record = {
        "name": "official" if sums == names else "given",
        "dataset": dataset,
        "source": f"{url.rstrip('/')}/{dataset}" if folder is None else "--split_dir",
        "sha256": sums,
        **describe(parts, by_actor=dataset == "CREMAD"),
    }
    return Split(classes, parts, record)


def read_kinetics_list(path: Path | str) -> list[tuple[str, str]]:
    """(clip, label) of an OGM-GE list of Kinetics-Sounds, rows `clip,seconds,class index`.

    The list names no classes: the label is the index with two digits, "00" to "30", so that its rank among the sorted
    labels is the index. Raises `UserError` with file and line.
    """
    rows, seen = [], set()
    for line, row in read_rows(Path(path)):
        if len(row) != 3 or not row[2].isdecimal() or int(row[2]) >= KINETICS_CLASSES:
            text = ",".join(row)[:80]
            raise UserError(
                f"{path}, line {line}: {text!r} is not clip,seconds,class index (0 to {KINETICS_CLASSES - 1})"
            )
        try:
            check_clip_id(row[0])
        except UserError as error:
            raise UserError(f"{path}, line {line}: {error}") from None
        if row[0] in seen:
            raise UserError(f"{path}, line {line}: clip {row[0]} is there twice; delete one line")
        seen.add(row[0])
        rows.append((row[0], f"{int(row[2]):02d}"))
    if not rows:
        raise UserError(f"{path}: no clips; each line is clip,seconds,class index")
    return rows


def find_list(folder: Path | str, dataset: str, name: str) -> Path:
    """The list called `name` in `folder` or a folder in it. Raises `UserError` naming what is missing."""
    folder = Path(folder)
    for path in (folder / name, *sorted(folder.glob(f"*/{name}"))):
        if path.is_file():
            return path
    raise UserError(f"{folder}: no {name} of {dataset} in it; put it there or give its folder with --split_dir")


def read_lines(path: Path) -> list[str]:
    """The lines of a list that is no CSV. Raises `UserError` where it is not UTF-8 text."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; get the list again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def name_kinetics(split: Split, paths: list[Path]) -> Split:
    """The split of Kinetics-Sounds with names: "07 playing accordion" for class 07, so that ranks stay the indices.

    `paths` are annotation files of Kinetics-400 (a header with `label` and `youtube_id`). A class is called what most
    of its clips are called there. Raises `UserError` for a file without these columns and for a class without a name.
    """
    label_of = {}
    for path in paths:
        rows = read_rows(path)
        _, header = next(rows, (0, []))
        if "label" not in header or "youtube_id" not in header:
            raise UserError(
                f"{path}: no columns label and youtube_id; give Kinetics-400's train.csv, validate.csv, ..."
            )
        for line, row in rows:
            if len(row) != len(header):
                raise UserError(f"{path}, line {line}: {len(row)} fields, the header has {len(header)}")
            label_of[row[header.index("youtube_id")]] = row[header.index("label")]
    votes = {index: Counter() for index in split.classes}
    for rows in split.parts.values():
        for clip, index in rows:
            if (label := label_of.get(clip[:11])) is not None:
                votes[index][label] += 1
    unnamed = [index for index, found in votes.items() if not found]
    if unnamed:
        raise UserError(f"--annotations: none of the clips of class {unnamed[0]} is in {paths[0]}; "
                        "give all of Kinetics-400's annotation files")  # fmt: skip
    name = {index: f"{index} {min(found, key=lambda label: (-found[label], label))}" for index, found in votes.items()}
    parts = {part: [(clip, name[index]) for clip, index in rows] for part, rows in split.parts.items()}
    record: dict = split.record | {"class_names": [str(path.name) for path in paths]}
    for part, percent in record.get("class_percent", {}).items():
        record["class_percent"][part] = {name[index]: share for index, share in percent.items()}
    return Split(sorted(name.values()), parts, record)


def _check_disjoint(parts: dict[str, list[tuple[str, str]]], paths: dict[str, Path]) -> None:
    both = {clip for clip, _ in parts["train"]} & {clip for clip, _ in parts["test"]}
    if both:
        folder = next(iter(paths.values())).parent
        raise UserError(f"{folder}: {len(both)} clip(s) in both lists, such as {min(both)}; delete them from one")


def _find(folder: Path, dataset: str, name: str) -> Path:
    for path in (folder / name, folder / dataset / name, folder / name.removeprefix("my_")):
        if path.is_file():
            return path
    raise UserError(f"--split_dir {folder}: no {name} in it; it needs {', '.join(SUMS[dataset])}")


def _download(url: str, path: Path, expected: str) -> Path:
    """Fetch `url` to `path` unless a file with the expected SHA-256 is there."""
    if path.is_file() and _sum(path) == expected:
        return path
    by_hand = f"download {path.name} by hand and give its folder with --split_dir"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            data = answer.read(MAX_BYTES)
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: the server answered {error.code} {error.reason}; {by_hand}") from None
    except (OSError, ValueError) as error:  # no network, a time-out, a URL that is none
        raise UserError(f"{url}: cannot be downloaded ({getattr(error, 'reason', error)}); {by_hand}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise UserError(f"{url}: SHA-256 is {found}, published is {expected}; {by_hand}")
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return path


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
