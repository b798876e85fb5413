"""Compact table of the files of a part: one name per clip instead of one path per file.

200,000 clips of ten frames have 2 million paths, more than a gigabyte as `Path` objects, but file names repeat from
clip to clip.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np


class FrameFiles(Sequence[list[Path]]):
    """The frames of N clips: item i is the list of paths of clip i, in order.

    `names[i]` are the names of the files in `<folder>/<clips[i]>/`, one tuple for all clips with the same names.
    `channels` is 3 for RGB, 2 for optical flow.
    """

    def __init__(self, folder: str, clips: list[str], names: list[tuple[str, ...]], channels: int = 3):
        self.folder, self.clips, self.names, self.channels = folder, clips, names, channels
        self.counts = np.fromiter(map(len, names), np.int64, len(names))  # (N,) frames of each clip
        self.sizes: np.ndarray | None = None  # (N, 2) pixels, filled by `dataset.pack.frame_sizes`

    def __len__(self) -> int:
        return len(self.clips)

    @overload
    def __getitem__(self, index: int) -> list[Path]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[Path]]: ...
    def __getitem__(self, index: int | slice) -> list[Path] | list[list[Path]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return [Path(path) for path in self.paths(index)]

    def __iter__(self) -> Iterator[list[Path]]:
        return (self[i] for i in range(len(self)))

    def __add__(self, other: "FrameFiles") -> "FrameFiles":
        return FrameFiles(self.folder, self.clips + other.clips, self.names + other.names, self.channels)

    def paths(self, index: int) -> list[str]:
        """The paths of one clip as text."""
        start = f"{self.folder}/{self.clips[index]}/"
        return [start + name for name in self.names[index]]

    def select(self, rows: Sequence[int] | np.ndarray) -> "FrameFiles":
        """The clips at `rows`."""
        return FrameFiles(self.folder, [self.clips[i] for i in rows], [self.names[i] for i in rows], self.channels)


class ArrayFiles(Sequence[Path]):
    """The arrays of N clips: item i is the path of clip i. `lengths` (N,) are the steps of sequences, else None."""

    def __init__(self, folder: str, clips: list[str], lengths: np.ndarray | None = None):
        self.folder, self.clips, self.lengths = folder, clips, lengths

    def __len__(self) -> int:
        return len(self.clips)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Path(self.paths(index)[0])

    def __iter__(self) -> Iterator[Path]:
        return (self[i] for i in range(len(self)))

    def __add__(self, other: "ArrayFiles") -> "ArrayFiles":
        both = [files.lengths for files in (self, other) if files.lengths is not None]
        lengths = np.concatenate(both) if len(both) == 2 else None
        return ArrayFiles(self.folder, self.clips + other.clips, lengths)

    def paths(self, index: int) -> list[str]:
        """The path of one clip as text, in a list."""
        return [f"{self.folder}/{self.clips[index]}.npy"]

    def select(self, rows: Sequence[int] | np.ndarray) -> "ArrayFiles":
        """The clips at `rows`."""
        lengths = None if self.lengths is None else self.lengths[np.asarray(rows, dtype=np.int64)]
        return ArrayFiles(self.folder, [self.clips[i] for i in rows], lengths)
