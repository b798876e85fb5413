"""Whole training steps as CUDA graphs: one launch replays all kernels of forward, loss, backward and optimizer.

A graph repeats the same kernels on the same addresses. So each kind of batch (fed modalities, shapes) has a graph of
its own, batches are copied into its static inputs, and what the loop reads is cloned out of its static outputs. Only
full batches have graphs; the last batch of each modality runs eagerly. Python does not run in a replay: what changes
from step to step must be in tensors. Here that is the learning rate of each parameter group; the optimizer keeps plain
numbers, which checkpoints and schedulers see, and a graph has tensors of its own that they are written to.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from utils.distributed import is_main, world_size

COMPILE = ("encoders", "graphs", "all")
GRAPHS = COMPILE[1:]  # the values that ask for graphs of steps
WARM_UP = 3  # eager steps of each kind first: cuDNN chooses kernels, the optimizer makes its state


def compiles_encoders(value: str | bool) -> bool:
    """Whether a value of `--compile` asks for compiled encoders. Runs of earlier versions have True."""
    return bool(value) and value != "graphs"


class Replayable(Protocol):
    """The attributes used of a captured `torch.cuda.CUDAGraph`."""

    def replay(self) -> None: ...


class Capture(Protocol):
    """How to run steps on the way to a graph, and how to capture one."""

    def warm_up(self, function: Callable[[], Any]) -> Any: ...
    def capture(self, function: Callable[[], Any]) -> tuple[Replayable, Any]: ...


class CudaCapture:
    """CUDA graphs on a stream of their own, as PyTorch requires of warm-up and capture; they share their memory.

    Sharing is safe: graphs never run at the same time, and nothing in their memory is needed after a replay but static
    outputs, which stay referenced.
    """

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], Any]) -> Any:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            found = function()
        torch.cuda.current_stream().wait_stream(self.stream)
        return found

    def capture(self, function: Callable[[], Any]) -> tuple[Replayable, Any]:
        """The graph and its static outputs, whose values are those of the last replay. Nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: threads that load the next batches may pin memory meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            outputs = function()
        return graph, outputs


class Captured(NamedTuple):
    """A graph, its static inputs and outputs, and the learning rates (tensors without dimensions) that it reads."""

    graph: Replayable
    inputs: dict[str, Tensor]
    labels: Tensor
    outputs: Any
    rates: list[Tensor]


class GraphedSteps:
    """`function(network, optimizer, balance, args, step)`, train.py's step, replayed from a graph where it can be.

    `step` is a `balance.Step`. The function must return detached tensors in dicts and tuples, and read nothing of the
    step but inputs, labels and what is equal in all batches of its kind. It must not be given balance methods.
    """

    def __init__(self, function: Callable[..., Any], capture: Capture):
        self.function, self.capture = function, capture
        self.seen: dict[tuple, int] = {}
        self.captured: dict[tuple, Captured] = {}
        self.stopped = False

    def __call__(self, network: Any, optimizer: torch.optim.Optimizer, balance: Any, args: Namespace, step: Any) -> Any:
        batch = step.source
        fits = batch.total == args.batch_size and batch.mask is None and not self.stopped
        if not fits or not all(isinstance(x, Tensor) for x in batch.inputs.values()):
            return self.function(network, optimizer, balance, args, step)
        key = kind_of(batch)
        if self.seen.setdefault(key, 0) < WARM_UP:
            self.seen[key] += 1
            return self.capture.warm_up(lambda: self.function(network, optimizer, balance, args, step))
        if key not in self.captured:
            try:
                self.captured[key] = self._captured(network, optimizer, balance, args, step)
            except RuntimeError as error:  # of CUDA: something in this network cannot be captured
                self.stopped = True
                told(f"a step of {'+'.join(batch.fed)} cannot be captured ({str(error).splitlines()[0]})")
                return self.function(network, optimizer, balance, args, step)
        return replayed(self.captured[key], batch, optimizer)

    def _captured(
        self, network: Any, optimizer: torch.optim.Optimizer, balance: Any, args: Namespace, step: Any
    ) -> Captured:
        batch = step.source
        inputs = {name: torch.empty_like(x).copy_(x) for name, x in batch.inputs.items()}
        labels = batch.labels.clone()
        static = step._replace(source=batch._replace(inputs=inputs, labels=labels))
        with rates_in_tensors(optimizer, labels.device) as rates:
            graph, outputs = self.capture.capture(lambda: self.function(network, optimizer, balance, args, static))
        return Captured(graph, inputs, labels, outputs, rates)


def detached(tensors: Any) -> Any:
    """Tensors in dicts and tuples, without gradients. What keeps a graph of gradients alive would also keep its nodes
    on the stream they were made on, which a capture on another stream must not wait for."""
    return tree_map(torch.detach, tensors)


def kind_of(batch: Any) -> tuple:
    """What one graph has in common: fed modalities, and shape, layout and type of each input."""
    inputs: Mapping[str, Tensor] = batch.inputs
    return batch.fed, *((name, x.shape, x.stride(), x.dtype) for name, x in inputs.items())


def replayed(own: Captured, batch: Any, optimizer: torch.optim.Optimizer) -> Any:
    """Take the step on `batch`: copy in, replay, clone out."""
    for name, static in own.inputs.items():
        static.copy_(batch.inputs[name], non_blocking=True)
    own.labels.copy_(batch.labels, non_blocking=True)
    for rate, group in zip(own.rates, optimizer.param_groups, strict=True):
        rate.fill_(group["lr"])
    own.graph.replay()
    return tree_map(torch.clone, own.outputs)


@contextmanager
def rates_in_tensors(optimizer: torch.optim.Optimizer, device: torch.device) -> Iterator[list[Tensor]]:
    """Inside the block the optimizer's learning rates are tensors on `device`, and Adam knows that it is captured."""
    before = [{key: group[key] for key in ("lr", "capturable") if key in group} for group in optimizer.param_groups]
    rates = [torch.tensor(group["lr"], dtype=torch.float32, device=device) for group in before]
    try:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
            if "capturable" in group:
                group["capturable"] = True
        yield rates
    finally:
        for group, values in zip(optimizer.param_groups, before, strict=True):
            group.update(values)


def told(why: str) -> None:
    """One line about steps that run eagerly."""
    if is_main():
        print(f"--compile graphs: {why}; training steps run eagerly", flush=True)


def graphed(function: Callable[..., Any], args: Namespace, device: torch.device) -> Callable[..., Any]:
    """`function` replayed from CUDA graphs where the flags ask for it and nothing stands against it, else itself."""
    if args.compile not in GRAPHS:
        return function
    why = None
    if device.type != "cuda":
        why = f"needs a CUDA GPU, and this run uses {device.type}"
    elif world_size() > 1:
        why = "is for one process"
    elif args.balance != "none":
        why = f"--balance {args.balance} acts inside the step"
    if why is not None:
        told(why)
        return function
    return GraphedSteps(function, CudaCapture())
