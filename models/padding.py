"""Batches of few sizes: the last batch of a modality is filled up with zeros, and BatchNorm does not see them.

cuDNN prepares its kernels for each new shape, which takes longer than a training step, and in Remix the last batch of
each modality has another size in every epoch. Convolutions and poolings treat each clip for itself, so rows of zeros
change nothing in the others; BatchNorm is given the real rows alone. Heads and losses see the features of real rows.

Shapes: b clips of a batch, B of a full one, T frames.
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.batchnorm import BatchNorm
from models.classifier import MultimodalClassifier, Output
from models.encoders import Sequences
from utils.distributed import world_size


class FilledUp(nn.Module):
    """`network`, whose encoders compute training batches of 2 to B - 1 clips as batches of B clips.

    Sequences and batches of a single clip, which has no statistics, are left as they are.
    """

    def __init__(self, network: MultimodalClassifier, full: int):
        super().__init__()
        self.network, self.full = network, full

    def forward(
        self, inputs: Mapping[str, Tensor | Sequences], fed: tuple[str, ...], mask: Tensor | None = None
    ) -> Output:
        clips = len(next(iter(inputs.values())))
        few = self.training and 1 < clips < self.full and all(isinstance(x, Tensor) for x in inputs.values())
        with filled_encoders(self.network, clips, self.full) if few else nullcontext():
            return self.network(inputs, fed, mask)


def filled_up(x: Tensor, rows: int) -> Tensor:
    """`x` (b, ...) with rows of zeros appended: (rows, ...), in the same memory layout."""
    out = torch.empty_strided((rows, *x.shape[1:]), x.stride(), dtype=x.dtype, device=x.device)
    out[: len(x)] = x
    out[len(x) :] = 0
    return out


@contextmanager
def filled_encoders(network: MultimodalClassifier, clips: int, full: int) -> Iterator[None]:
    """Inside the block, encoders compute `full` clips, of which the first `clips` are real and zeros follow.

    Layers of BatchNorm in training mode see the real ones alone, and so does what uses the features.
    """
    hooks = []
    for encoder in network.encoders.values():
        hooks.append(
            encoder.register_forward_pre_hook(lambda _, args: (filled_up(args[0], len(args[0]) * full // clips),))
        )
        hooks.append(encoder.register_forward_hook(lambda *seen: seen[-1][: len(seen[-1]) * clips // full]))
    for norm in network.encoders.modules():
        if isinstance(norm, BatchNorm) and norm.training:
            hooks.append(norm.register_forward_pre_hook(lambda _, args: (args[0][: len(args[0]) * clips // full],)))
            hooks.append(norm.register_forward_hook(lambda *seen: appended(seen[-1], len(seen[-1]) * full // clips)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def appended(x: Tensor, rows: int) -> Tensor:
    """`x` (b, ...) with rows of zeros behind: (rows, ...), with gradient."""
    return F.pad(x, (*(0, 0) * (x.dim() - 1), 0, rows - len(x)))


def few_sizes(network: MultimodalClassifier, args: Namespace, device: torch.device) -> nn.Module:
    """`network` for training on `device`: on a CUDA GPU with last batches filled up, unless the numbers must be those
    of the official code to the last bit. Networks that run their encoders stage by stage stay as they are: an encoder
    is never called as a whole, and the running means of MMTM would count the zeros."""
    if device.type != "cuda" or args.precision == "official" or not network.late:
        return network
    return FilledUp(network, args.batch_size // world_size())
