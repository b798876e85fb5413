"""partitions.npz: all scorings of a run, to follow its partitions over the epochs.

Shapes: E scorings, N training clips, M modalities.
"""

import zipfile
from pathlib import Path

import numpy as np

from utils.files import atomic_path


class Partitions:
    """The scorings of a run, in memory and in `path`.

    The file has `epochs` (E,), the epoch of each scoring, counted from 0; `clips` (N,) and `modalities` (M,), their
    names; `kl` (E, N, M) float32, the KL from uniform in bits; `keep` (E, N, M) bool, which modalities each clip keeps.
    It is written whole at each scoring: a killed run leaves that of the scoring before.
    """

    def __init__(self, path: Path):
        self.path = path
        self.epochs: list[int] = []
        self.kl: list[np.ndarray] = []
        self.keep: list[np.ndarray] = []

    def load(self, before: int) -> None:
        """Read the scorings of the epochs before `before`; none where the file is missing or damaged."""
        self.epochs, self.kl, self.keep = [], [], []
        if not before:
            return
        try:
            with np.load(self.path, allow_pickle=False) as found:
                epochs, kl, keep = (found[name] for name in ("epochs", "kl", "keep"))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return  # from an earlier version, or damaged: later scorings are still saved
        rows = np.flatnonzero(epochs < before).tolist()
        self.epochs, self.kl, self.keep = epochs[rows].tolist(), list(kl[rows]), list(keep[rows])

    def add(self, epoch: int, clips: list[str], modalities: list[str], kl: np.ndarray, keep: np.ndarray) -> None:
        """Add a scoring and write the file. kl (N, M), keep (N, M)."""
        self.epochs.append(epoch)
        self.kl.append(kl.astype(np.float32))
        self.keep.append(keep)
        with atomic_path(self.path) as temporary, open(temporary, "wb") as file:
            np.savez(file, epochs=np.array(self.epochs), clips=np.array(clips), modalities=np.array(modalities),
                     kl=np.stack(self.kl), keep=np.stack(self.keep))  # fmt: skip
