"""What the headers of a training folder's files say, remembered between runs: files that did not change stay closed.

A file counts as unchanged if its size and its time of modification (in nanoseconds) are the ones that were noted. A
`stat` tells both without opening the file. Only a file replaced by another one of the same size, whose time was put
back by hand, is not noticed.
"""

import json
import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.files import atomic_path

FORMAT = 1  # of the record; raise it when older ones can no longer be read
NAME = "headers.npz"  # in <root>/.pack


class Header(NamedTuple):
    """Header of a .npy file; `start` is the offset of the data in bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    start: int

    @property
    def cast(self) -> str:
        """Difference between the array and what is fed, '' for row-major float32."""
        words = [] if self.dtype == np.dtype("<f4") else [self.dtype.name]
        return ", ".join([*words, "column order"] if self.fortran and len(self.shape) > 1 else words)


class FrameHeader(NamedTuple):
    """Name and size in pixels of a clip's first frame."""

    name: str
    height: int
    width: int


class Noted(NamedTuple):
    """The files of one folder: size in bytes, time of modification in ns and number of the header, (N,) each."""

    size: np.ndarray
    time: np.ndarray
    header: np.ndarray


class KnownHeaders:
    """One header per clip and folder of files, kept in `<root>/.pack/headers.npz`.

    Memory: about 200 bytes per clip while the folder is read; equal headers are stored once.
    """

    def __init__(self, root: Path | str):
        """Read the record; an unreadable one counts as none."""
        self.path = Path(root) / ".pack" / NAME
        self.clips: dict[str, int] = {}
        self.noted: dict[str, Noted] = {}
        self.headers: list[Header | FrameHeader] = []
        self.new: dict[tuple[str, str], tuple[int, int, int]] = {}
        with suppress(OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
            self._load()
        self.number = {header: i for i, header in enumerate(self.headers)}

    def _load(self) -> None:
        with np.load(self.path, allow_pickle=False) as found:
            about = json.loads(found["about"].tobytes())
            if about["format"] != FORMAT:
                return
            headers = [_header(fields) for fields in about["headers"]]
            names = found["clips"].tobytes().decode().split("\0")
            noted = {folder: Noted(*found[f"noted{i}"].T) for i, folder in enumerate(about["folders"])}
        if any(len(rows.size) != len(names) or rows.header.max(initial=-1) >= len(headers) for rows in noted.values()):
            raise ValueError("damaged")
        self.clips, self.noted, self.headers = {clip: i for i, clip in enumerate(names)}, noted, headers

    def find(self, folder: str, clip: str, status: os.stat_result) -> Header | FrameHeader | None:
        """The header noted for a clip's file in `folder`; None if there is none or the file has changed since."""
        rows, row = self.noted.get(folder), self.clips.get(clip)
        if rows is None or row is None or rows.header[row] < 0:
            return None
        same = rows.size[row] == status.st_size and rows.time[row] == status.st_mtime_ns
        return self.headers[rows.header[row]] if same else None

    def note(self, folder: str, clip: str, status: os.stat_result, header: Header | FrameHeader) -> None:
        """Note a header read from a file; `status` is that of the file before it was opened."""
        number = self.number.setdefault(header, len(self.headers))
        if number == len(self.headers):
            self.headers.append(header)
        self.new[folder, clip] = status.st_size, status.st_mtime_ns, number

    def save(self) -> None:
        """Write what is new; nothing where the folder cannot be written: the next run reads the headers again."""
        if not self.new:
            return
        clips = {clip: i for i, clip in enumerate(dict.fromkeys([*self.clips, *(clip for _, clip in self.new)]))}
        arrays = {}
        folders = list(dict.fromkeys([*self.noted, *(folder for folder, _ in self.new)]))
        for folder in folders:
            arrays[folder] = np.full((len(clips), 3), -1, np.int64)
            if folder in self.noted:
                arrays[folder][: len(self.clips)] = np.stack(self.noted[folder], axis=1)
        for (folder, clip), row in self.new.items():
            arrays[folder][clips[clip]] = row
        about = {"format": FORMAT, "folders": folders, "headers": [_fields(header) for header in self.headers]}
        texts = {"about": json.dumps(about).encode(), "clips": "\0".join(clips).encode()}
        packed = {name: np.frombuffer(text, np.uint8) for name, text in texts.items()}
        packed |= {f"noted{i}": arrays[folder] for i, folder in enumerate(folders)}
        with suppress(OSError), atomic_path(self.path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **packed)  # pyright: ignore[reportArgumentType]
        self.new = {}

    def forget(self) -> None:
        """Free the memory, when the folder has been read."""
        self.clips, self.noted, self.headers, self.number, self.new = {}, {}, [], {}, {}


def _fields(header: Header | FrameHeader) -> list:
    if isinstance(header, FrameHeader):
        return list(header)
    return [list(header.shape), header.dtype.str, header.fortran, header.start]


def _header(fields: list) -> Header | FrameHeader:
    """The inverse of `_fields`. Raises `ValueError` or `TypeError`."""
    if len(fields) == 3:
        name, height, width = fields
        return FrameHeader(str(name), int(height), int(width))
    shape, dtype, fortran, start = fields
    return Header(tuple(map(int, shape)), np.dtype(str(dtype)), bool(fortran), int(start))
