"""Compact table of the files of a part: one name per clip instead of one path per file.

200,000 clips of ten frames have 2 million paths, more than a gigabyte as `Path` objects, but file names repeat from
clip to clip.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from dataset.headers import KnownHeaders


def fed_frames(count: int, picks: int | None, pick: str = "random") -> range:
    """The numbers of those of `count` frames that `dataset.augment.pick_frames` can return, in training or evaluation.

    `picks` segments of floor(count / picks) frames leave out the last count mod picks frames; "first" feeds the first
    frame of each segment only. All of them for a clip of fewer frames than picks, and for `picks` None.
    """
    if picks is None or count < picks:
        return range(count)
    segment = count // picks
    return range(0, picks * segment, segment if pick == "first" else 1)


class FrameFiles(Sequence[list[Path]]):
    """The frames of N clips: item i is the list of paths of clip i, in order.

    `names[i]` are the names of the files in `<folder>/<clips[i]>/`, one tuple for all clips with the same names.
    `channels` is 3 for RGB, 2 for optical flow. `picks` and `pick` are the number of frames that are fed and the rule
    of `fed_frames`. `known` remembers the sizes of the first frames.
    """

    def __init__(
        self,
        folder: str,
        clips: list[str],
        names: list[tuple[str, ...]],
        channels: int = 3,
        picks: int | None = None,
        pick: str = "random",
        known: KnownHeaders | None = None,
    ):
        self.folder, self.clips, self.names, self.channels = folder, clips, names, channels
        self.picks, self.pick, self.known = picks, pick, known
        self.counts = np.fromiter(map(len, names), np.int64, len(names))  # (N,) frames of each clip
        fed = {count: fed_frames(count, picks, pick) for count in np.unique(self.counts).tolist()}
        # (N,) frames of each clip that can be fed, and the distance between two of them
        self.rows = np.array([len(fed[count]) for count in self.counts.tolist()], dtype=np.int64)
        self.strides = np.array([fed[count].step for count in self.counts.tolist()], dtype=np.int64)
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
        return [Path(f"{self.folder}/{self.clips[index]}/{name}") for name in self.names[index]]

    def __iter__(self) -> Iterator[list[Path]]:
        return (self[i] for i in range(len(self)))

    def __add__(self, other: "FrameFiles") -> "FrameFiles":
        return self._of(self.clips + other.clips, self.names + other.names)

    def paths(self, index: int) -> list[str]:
        """The paths of those frames of one clip that can be fed, as text."""
        start, names = f"{self.folder}/{self.clips[index]}/", self.names[index]
        return [start + names[k] for k in fed_frames(len(names), self.picks, self.pick)]

    def select(self, rows: Sequence[int] | np.ndarray) -> "FrameFiles":
        """The clips at `rows`."""
        return self._of([self.clips[i] for i in rows], [self.names[i] for i in rows])

    def _of(self, clips: list[str], names: list[tuple[str, ...]]) -> "FrameFiles":
        return FrameFiles(self.folder, clips, names, self.channels, self.picks, self.pick, self.known)


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
