"""Step 3, reassemble: mini-batches that hold one modality only.

Shapes: N clips, b <= batch_size clips in a batch. A plan is a list of batches: what one epoch trains on, in order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from remix.decouple import AUDIO, BOTH, NAMES, VIDEO

ORDERS = ("sequential", "shuffled", "alternate")


class Batch(NamedTuple):
    """Clip indices (b,), int64 on the CPU, and the modality they are fed in: audio, video or both."""

    clips: Tensor
    kept: str


def batches_of(clips: int | Tensor, batch_size: int, kept: str, generator: torch.Generator | None) -> list[Batch]:
    """All `clips` (a count or indices), shuffled, in batches of one kind; `generator` None keeps their order."""
    clips = torch.arange(clips) if isinstance(clips, int) else clips
    if generator is not None:
        clips = clips[torch.randperm(len(clips), generator=generator)]
    return [Batch(part, kept) for part in clips.split(batch_size)] if len(clips) else []


def reassemble(
    kept: Tensor, batch_size: int, order: str = "sequential", generator: torch.Generator | None = None
) -> list[Batch]:
    """Homogeneous batches from the partition `kept` (N,): every clip once (twice if BOTH), no modality mixed.

    sequential  all video batches, then all audio batches (the official code's order).
    shuffled    the same batches in random order.
    alternate   the two lists interleaved evenly, so that either modality is spread over the whole epoch.
    """
    kept = kept.cpu()
    video, audio = (
        batches_of(torch.nonzero((kept == m) | (kept == BOTH)).flatten(), batch_size, NAMES[m], generator)
        for m in (VIDEO, AUDIO)
    )
    if order == "sequential":
        return video + audio
    if order == "shuffled":
        plan = video + audio
        return [plan[i] for i in torch.randperm(len(plan), generator=generator).tolist()]
    if order == "alternate":
        # The i-th of n batches belongs at (i + 1/2) / n of the epoch; video first where two fall together.
        slots = [((i + 0.5) / len(group), batch) for group in (video, audio) for i, batch in enumerate(group)]
        return [batch for _, batch in sorted(slots, key=lambda slot: slot[0])]
    raise ValueError(f"order {order!r}: allowed are {', '.join(ORDERS)}")
