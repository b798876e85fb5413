"""Devices and processes: start one process or several (torchrun), ranks, gathering of results."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from utils.acceleration import chosen_gpus, gpu_count, limit_threads
from utils.errors import Told, UserError

DEVICES = ("auto", "cpu", "cuda", "mps")

_hosts = None  # the group in which hosts talk past their GPUs: asking it waits for no kernel; None is the default group


def start(device: str = "cpu", gpu_ids: str | None = None, relaunch: bool = False) -> torch.device:
    """Join the group that torchrun describes in the environment, if any; returns this process's device.

    `device` is one of `DEVICES`; "auto" is a CUDA GPU if there is one, else the CPU. `gpu_ids` names CUDA GPUs of this
    machine, one for each of its processes; by default a single process takes the first visible one. With several of
    them and `relaunch`, the program is re-executed under torchrun, one process per GPU. Raises `UserError` for GPUs
    that are not there or too few for the processes, and for a driver that PyTorch cannot use.
    """
    if device == "mps":
        return _mps(gpu_ids)
    limit_threads()
    available = gpu_count(device)
    if device == "cuda" and not available:
        raise UserError("--device cuda: PyTorch sees no CUDA device here; use --device cpu, or leave the flag out")
    here, local = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    gpus: list[int] = []
    if available:
        gpus = chosen_gpus(gpu_ids, available)
        if max(gpus) >= available:
            raise UserError(f"--gpu_ids {gpu_ids}: this machine has {available} GPU(s), numbered from 0")
        if relaunch and len(gpus) > 1 and "WORLD_SIZE" not in os.environ:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={len(gpus)}"]
            os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])
        if here > len(gpus):
            raise UserError(f"torchrun: {here} processes for {len(gpus)} GPU(s); use --nproc_per_node={len(gpus)}")
    elif gpu_ids is not None and is_main():
        print(f"no CUDA device in use: --gpu_ids {gpu_ids} has no effect, running on the CPU")
    found = torch.device("cuda", gpus[local]) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(found)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # With its GPU named, NCCL connects at once, and barriers need not guess the GPU from the rank.
        backend, own = ("nccl", found) if gpus else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(minutes=30), device_id=own)
        global _hosts
        _hosts = dist.new_group(backend="gloo") if gpus else None
    return found


def _mps(gpu_ids: str | None) -> torch.device:
    """Apple's GPU, for one process. Raises `UserError` where there is none."""
    if not torch.backends.mps.is_available():
        raise UserError("--device mps: PyTorch sees no Apple GPU here; use --device cpu, or leave the flag out")
    if gpu_ids is not None or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--device mps: one GPU, one process; leave --gpu_ids and torchrun out")
    return torch.device("mps")


def launcher() -> list[str]:
    """The words that start this program again with as many processes: `python`, or torchrun with its count."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return ["python"] if local == "1" else ["torchrun", f"--nproc_per_node={local}"]


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
    """Whether this process is rank 0, the only one that writes."""
    return rank() == 0


def parallel(model: nn.Module, apart: Iterable[nn.Module] = ()) -> None:
    """Have `backward` average the gradients of `model` over the processes, where there are several.

    After each `backward`, the gradients that it computed go through one flat all-reduce for each module of `apart` and
    one for the rest. Parameters that it did not reach (those of masked encoders) are not communicated, and their
    gradients stay as they are. DistributedDataParallel with `find_unused_parameters` would search the graph in every
    step, send zeros for them and wait for the device. All processes must reach the same parameters.
    `torch.autograd.grad` averages nothing. Broadcasts rank 0's parameters and buffers first.
    """
    if dist.is_initialized():
        for values in (*model.parameters(), *model.buffers()):
            dist.broadcast(values.detach(), 0)
        _Average(model, apart)


class _Average:
    """Average gradients over processes: hooks on the parameters collect them, a callback reduces them."""

    def __init__(self, model: nn.Module, apart: Iterable[nn.Module]):
        self.reached: dict[int, Tensor] = {}  # gradients of the backward pass that runs, by the parameter's number
        own = {id(p): place for place, module in enumerate(apart, 1) for p in module.parameters()}
        self.places = [own.get(id(p), 0) for p in model.parameters()]  # module that each parameter is reduced with
        for number, parameter in enumerate(model.parameters()):
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self.collect, number))

    def collect(self, number: int, parameter: Tensor) -> None:
        """Called by autograd for each parameter whose `.grad` is complete."""
        assert parameter.grad is not None
        if not self.reached:
            torch.autograd.Variable._execution_engine.queue_callback(self.reduce)  # at the end of this pass
        self.reached[number] = parameter.grad

    @torch.no_grad()
    def reduce(self) -> None:
        """Replace the collected gradients by their means. The host does not wait for the device."""
        groups: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        for number, gradient in sorted(self.reached.items()):  # the same order on every process
            groups.setdefault((self.places[number], gradient.dtype), []).append(gradient)
        self.reached = {}
        works = []
        for own in groups.values():
            flat = own[0].new_empty(sum(gradient.numel() for gradient in own))
            torch._foreach_copy_(_views(flat, own), own)  # pyright: ignore[reportPrivateImportUsage]
            works.append((flat, dist.all_reduce(flat, async_op=True)))
        for own, (flat, work) in zip(groups.values(), works, strict=True):
            work.wait()
            means = _views(flat.div_(world_size()), own)
            torch._foreach_copy_(own, means)  # pyright: ignore[reportPrivateImportUsage]


def _views(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Consecutive parts of `flat` with the shapes and strides of dense tensors: a copy is then one kernel for all."""
    parts = flat.split([values.numel() for values in like])
    return [part.as_strided(values.shape, values.stride()) for part, values in zip(parts, like, strict=True)]


def fill_gradients(network: nn.Module) -> None:
    """Give each trainable parameter that got no gradient one of zeros, so that the optimizer steps it too.

    That is what DataParallel does on several GPUs: its `Broadcast` is differentiated as a whole and returns zeros for
    parameters that no loss reaches. Adam's momentum and weight decay then move them. On one GPU DataParallel calls the
    module itself, and `parallel` leaves unused parameters alone, as DistributedDataParallel does: their gradients stay
    None.
    """
    for parameter in network.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add `values` up over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_in_order(values: Tensor, total: int) -> Tensor:
    """Rows of all processes as one batch of `total`, where process r holds rows r, r + world_size, ...; with gradient.

    With fewer rows than processes each of them holds all, and gets them back. A loss that every process computes from
    the result has the right gradient after the average over processes (`parallel`): the backward pass adds up the
    processes' gradients, which are equal.
    """
    if world_size() == 1 or total < world_size():
        return values
    rows = values.new_zeros(total, *values.shape[1:])
    rows[rank() :: world_size()] = values
    return all_reduce(rows)


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
    """Broadcast rank 0's `values` in place: ranks can differ in the last bit."""
    if dist.is_initialized():
        dist.broadcast(values, 0)
    return values


def same_buffers(model: nn.Module) -> None:
    """Broadcast rank 0's buffers: BatchNorm statistics of ranks can differ in the last bit."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def is_first_here() -> bool:
    """Whether this process is the first of its machine: with several machines, each has a disk of its own."""
    return not dist.is_initialized() or int(os.environ.get("LOCAL_RANK", rank())) == 0


def local_processes() -> int:
    """Number of processes of the group on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1
