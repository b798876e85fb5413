"""One process or many (torchrun): who am I, how many are we, gather what each computed."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import Told, UserError

_hosts = None  # the group in which hosts talk past their GPUs: asking it waits for no kernel; None is the default group


def start(gpus: list[int]) -> torch.device:
    """Join the group torchrun describes in the environment, if any; returns this process's device.

    gpus: of this machine, for its processes in turn; without any the CPU is used. Raises `UserError` if there are more
    processes than GPUs.
    """
    here, local = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if gpus and here > len(gpus):
        raise UserError(f"torchrun: {here} processes for {len(gpus)} GPU(s); type --nproc_per_node={len(gpus)}")
    device = torch.device("cuda", gpus[local]) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if gpus else "gloo", timeout=timedelta(minutes=30))
        global _hosts
        _hosts = dist.new_group(backend="gloo") if gpus else None
    return device


def stop() -> None:
    """Leave the group, once every process is done.

    Gloo's thread takes Python's lock to let go of the last collective's tensors, and leaving joins that thread while
    holding the lock: without the pause the two wait for each other for ever (seen with torch 2.11).
    """
    if dist.is_initialized():
        dist.barrier()
        time.sleep(0.2)
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes: rank 0 does, alone."""
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add `values` up over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def lowest(value: int, device: torch.device) -> int:
    """The lowest of all processes' values: what they can all do."""
    if not dist.is_initialized():
        return value
    agreed = torch.tensor(value, device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return int(agreed)


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any process. Waits for the other hosts, not for the devices."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor([int(flag)])
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=_hosts)
    return bool(votes.item())


@contextmanager
def together() -> Iterator[None]:
    """A `UserError` of one process inside ends them all, in one line: the lowest rank's that has one.

    Every process has to come out of it, so nothing inside may wait for the others, but for another `together`.
    """
    mistake = None
    try:
        yield
    except UserError as error:
        mistake = error
    if dist.is_initialized():
        told: list[str | None] = [None] * world_size()
        dist.all_gather_object(told, mistake and str(mistake), group=_hosts)
        first = next((i for i, text in enumerate(told) if text is not None), None)
        if first not in (None, rank()):
            raise Told(told[first]) from None
    if mistake:
        raise mistake


def same(values: Tensor) -> Tensor:
    """Rank 0's `values` on every process, in place: what each works out by itself may differ in the last bit."""
    if dist.is_initialized():
        dist.broadcast(values, 0)
    return values


def same_buffers(model: nn.Module) -> None:
    """Give every process rank 0's buffers: BatchNorm statistics are each process's own until the next joint step."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def is_first_here() -> bool:
    """Whether this process is the first of its machine: with several machines, each has a disk of its own."""
    return not dist.is_initialized() or int(os.environ.get("LOCAL_RANK", rank())) == 0


def local_processes() -> int:
    """How many processes of the group run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1


def rows_of_ranks(values: Tensor) -> Tensor:
    """Every process's `values` (...,), exact: (world size, ...)."""
    rows = values.new_zeros((world_size(), *values.shape))
    rows[rank()] = values
    return sum_over_ranks(rows)
