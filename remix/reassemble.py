"""Step 3, reassemble: mini-batches that feed one modality only.

Shapes: N clips, M modalities, b <= batch_size clips in a batch. A plan is the list of batches of one epoch, in order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ORDERS = ("sequential", "shuffled", "alternate")
ABLATIONS = ("off", "unmasked")


class Batch(NamedTuple):
    """Clip indices (b,), int64 on the CPU, and the names of the modalities that are fed to the network.

    mask (b, M) bool on the CPU: the modalities that each clip of a mixed batch is fed, which differ between its clips.
    None: every clip is fed `fed`.
    """

    clips: Tensor
    fed: tuple[str, ...]
    mask: Tensor | None = None


def batches_of(
    clips: int | Tensor, batch_size: int, fed: tuple[str, ...], generator: torch.Generator | None
) -> list[Batch]:
    """All `clips` (a count or indices) in batches that feed the same modalities.

    Shuffled by `generator`; with None the clips keep their order.
    """
    clips = torch.arange(clips) if isinstance(clips, int) else clips
    if generator is not None:
        clips = clips[torch.randperm(len(clips), generator=generator)]
    return [Batch(part, fed) for part in clips.split(batch_size)] if len(clips) else []


def reassemble(
    keep: Tensor,
    names: Sequence[str],
    batch_size: int,
    order: str = "sequential",
    generator: torch.Generator | None = None,
) -> list[Batch]:
    """Homogeneous batches from the partition `keep` (N, M) bool over the modalities `names`.

    A clip enters one batch for each modality that it keeps. `keep` can also be integers (only for the orders in
    `ORDERS`): how many times the clip enters the batches of each modality.

    sequential  all batches of the last modality, then those of the one before it, down to the first (the official
                code's order: video, then audio).
    shuffled    the same batches in random order.
    alternate   the lists of batches interleaved evenly, so that each modality is spread over the whole epoch.
    off         mixed batches of all clips in random order, with a mask per clip: decouple only (paper Table 5).
    unmasked    the batches of "sequential", fed all modalities: reassemble only (paper Table 5).

    Raises `ValueError` for another `order`.
    """
    if order not in (*ORDERS, *ABLATIONS):
        raise ValueError(f"order {order!r}: allowed are {', '.join((*ORDERS, *ABLATIONS))}")
    keep = keep.cpu()
    if order == "off":
        mixed = batches_of(len(keep), batch_size, tuple(names), generator)
        return [batch._replace(mask=keep[batch.clips]) for batch in mixed]
    groups = [
        batches_of(torch.arange(len(keep)).repeat_interleave(keep[:, m].long()), batch_size, (names[m],), generator)
        for m in reversed(range(len(names)))
    ]
    plan = [batch for group in groups for batch in group]
    if order == "sequential":
        return plan
    if order == "shuffled":
        return [plan[i] for i in torch.randperm(len(plan), generator=generator).tolist()]
    if order == "unmasked":
        return [batch._replace(fed=tuple(names)) for batch in plan]
    # alternate: the i-th of n batches belongs at (i + 1/2) / n of the epoch; ties: the last modality first.
    slots = [((i + 0.5) / len(group), batch) for group in groups for i, batch in enumerate(group)]
    return [batch for _, batch in sorted(slots, key=lambda slot: slot[0])]
