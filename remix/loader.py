"""Data Remixing for other training loops: one call plans an epoch, and a batch sampler yields its batches.

Shapes: N clips, C classes, M modalities.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from remix.decouple import decouple
from remix.difficulty import difficulty
from remix.reassemble import Batch, batches_of, reassemble


def plan(
    logits: Mapping[str, Tensor],
    batch_size: int,
    score: str = "kl",
    keep: str = "hard",
    order: str = "sequential",
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> list[Batch]:
    """Homogeneous batches of one epoch from the unimodal logits (N, C) of every training clip, by modality.

    Difficulty, decouple and reassemble in one call; `generator` (on the CPU) shuffles the clips of each modality, None
    keeps their order. Raises `ValueError` for an unknown `score`, `keep` or `order`.

    >>> sure, unsure = torch.tensor([[9.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [9.0, 0.0]])
    >>> for batch in plan({"audio": sure, "video": unsure}, batch_size=8):
    ...     print(batch.fed, batch.clips.tolist())
    ('video',) [0]
    ('audio',) [1]
    """
    hard = difficulty(list(logits.values()), score, labels, generator)
    return reassemble(decouple(hard, keep), list(logits), batch_size, order, generator)


class RemixBatchSampler(Sampler[list[int]]):
    """The `batch_sampler` of a `DataLoader`: joint batches until `remix` is called, then homogeneous ones.

    Call `set_epoch` before each epoch, and in the epochs of Data Remixing `remix` with fresh logits. `fed` lists, batch
    by batch, the modalities to give to the network. Under DistributedDataParallel pass `rank` and `world_size`: every
    process gets its share of each batch and all of them feed the same modalities at the same time. A batch of fewer
    clips than processes is left out. Call `set_epoch` and `remix` with the same arguments on every process.

    >>> sampler = RemixBatchSampler(5, batch_size=2, names=("audio", "video"))
    >>> sampler.set_epoch(0)
    >>> [len(batch) for batch in sampler], sampler.fed[0]
    ([2, 2, 1], ('audio', 'video'))
    """

    def __init__(
        self, clips: int, batch_size: int, names: Sequence[str], seed: int = 0, rank: int = 0, world_size: int = 1
    ):
        if batch_size < world_size:
            raise ValueError(f"batch_size {batch_size}: less than one clip for each of {world_size} processes")
        self.clips, self.batch_size, self.names = clips, batch_size, tuple(names)
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch, self.batches = 0, []
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Reshuffle for `epoch`, in joint batches."""
        self.epoch = epoch
        self._serve(batches_of(self.clips, self.batch_size, self.names, self._generator()))

    def remix(self, logits: Mapping[str, Tensor], score: str = "kl", keep: str = "hard", order: str = "sequential",
              labels: Tensor | None = None) -> None:  # fmt: skip
        """Serve homogeneous batches in this epoch, from the unimodal logits (N, C) of all clips in their order."""
        if tuple(logits) != self.names or any(len(values) != self.clips for values in logits.values()):
            raise ValueError(f"logits of {self.clips} clips are needed for {', '.join(self.names)}, in this order")
        self._serve(plan(logits, self.batch_size, score, keep, order, labels, self._generator()))

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed << 32) + self.epoch)

    def _serve(self, batches: list[Batch]) -> None:
        self.batches = [batch for batch in batches if len(batch.clips) >= self.world_size]

    @property
    def fed(self) -> list[tuple[str, ...]]:
        """The modalities fed in each batch of this epoch, in the order in which batches are served."""
        return [batch.fed for batch in self.batches]

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield batch.clips[self.rank :: self.world_size].tolist()

    def __len__(self) -> int:
        return len(self.batches)
