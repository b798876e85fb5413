"""Evaluation frames resized once: scoring and evaluation see the same view of a clip in every epoch.

Shapes: N clips of a part, B clips of a batch, T frames, c channels, H x W stored pixels, S x S fed pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dataset.augment import one_by_one, saves_traffic


class Resized(NamedTuple):
    """How the evaluation frames of a modality reach S x S pixels.

    asis: they are stored at that size. whole: resizing gives whole levels of 255, or a GPU rounds to them, so that
    uint8 keeps what the network is fed.
    """

    asis: bool
    whole: bool

    @classmethod
    def of(cls, stored: tuple[int, ...], size: int, device: torch.device, as_pil: bool) -> "Resized":
        """For frames of `stored` (H, W) pixels. The ways of `crop_resize` that give whole levels: PIL's, and the one of
        large frames on a CPU. A GPU rounds, as PIL does; small frames on a CPU stay as they are, unrounded."""
        whole = as_pil or one_by_one(device, stored) or saves_traffic(device)
        return cls(stored == (size, size), whole)


class FixedFrames:
    """The resized evaluation frames (N, T, c, S, S) uint8 of one modality, on the device, filled batch by batch."""

    def __init__(self, clips: int, shape: tuple[int, ...], device: torch.device):
        self.shape, self.device = (clips, *shape), device
        self.frames: Tensor | None = None
        self.done = torch.zeros(clips, dtype=torch.bool)  # on the host, which asks it in every batch

    def have(self, clips: Tensor) -> bool:
        """Whether the frames of all `clips` (B,), indices on the host, are there."""
        return bool(self.done[clips].all())

    def take(self, places: Tensor) -> Tensor:
        """The frames (B*T, c, S, S) uint8 of the clips `places` (B,), indices on the device."""
        assert self.frames is not None
        return self.frames[places].flatten(0, 1)

    def put(self, clips: Tensor, places: Tensor, pixels: Tensor) -> None:
        """Keep the frames (B*T, c, S, S) uint8 of the clips, given by their indices on the host and on the device."""
        if self.frames is None:
            with torch.inference_mode(False):  # or a pass with gradients could not fill it further
                self.frames = torch.empty(self.shape, dtype=torch.uint8, device=self.device)
        self.frames[places] = pixels.unflatten(0, (-1, self.shape[1]))
        self.done[clips] = True
