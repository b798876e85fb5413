"""Batches of few sizes: the last batch of a modality is filled up with zeros, and BatchNorm does not see them.

cuDNN prepares its kernels for each new shape, which takes longer than a training step, and in Remix the last batch of
each modality has another size in every epoch. Convolutions, poolings and heads treat each clip for itself, so rows of
zeros change nothing in the others; BatchNorm is given the real rows alone. The loss is that of the real rows.

Shapes: b clips of a batch, B of a full one, T frames.
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.batchnorm import BatchNorm
from models.classifier import Output
from models.encoders import Sequences
from utils.distributed import world_size


class FilledUp(nn.Module):
    """`network`, whose training batches of 2 to B - 1 clips are computed as batches of B clips.

    Sequences and batches of a single clip, which has no statistics, are left as they are.
    """

    def __init__(self, network: nn.Module, full: int):
        super().__init__()
        self.network, self.full = network, full

    def forward(
        self, inputs: Mapping[str, Tensor | Sequences], fed: tuple[str, ...], mask: Tensor | None = None
    ) -> Output:
        tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
        clips = len(next(iter(inputs.values()))) if len(tensors) == len(inputs) else 0
        if not self.training or not 1 < clips < self.full:
            return self.network(inputs, fed, mask)
        with real_rows(self.network, clips, self.full):
            filled = {name: filled_up(x, self.full) for name, x in tensors.items()}
            output: Output = self.network(filled, fed, None if mask is None else filled_up(mask, self.full, True))
        return Output(output.joint[:clips], *({name: values[:clips] for name, values in own.items()}
                                              for own in (output.logits, output.features)))  # fmt: skip


def filled_up(x: Tensor, rows: int, value: float = 0) -> Tensor:
    """`x` (b, ...) with constant rows appended: (rows, ...), in the same memory layout."""
    out = torch.empty_strided((rows, *x.shape[1:]), x.stride(), dtype=x.dtype, device=x.device)
    out[: len(x)] = x
    out[len(x) :] = value
    return out


@contextmanager
def real_rows(network: nn.Module, clips: int, full: int) -> Iterator[None]:
    """Inside the block, layers of BatchNorm in training mode see the first `clips` of `full` clips; zeros follow."""
    hooks = []
    for norm in network.modules():
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


def few_sizes(network: nn.Module, args: Namespace, device: torch.device) -> nn.Module:
    """`network` for training on `device`: on a CUDA GPU with last batches filled up, unless the numbers must be those
    of the official code to the last bit, or the architecture averages over clips itself (the running means of MMTM)."""
    if device.type != "cuda" or args.precision == "official" or args.model != "late":
        return network
    return FilledUp(network, args.batch_size // world_size())
