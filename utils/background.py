"""A copy of a run's state in host memory, and a thread that writes it while training continues."""

import copy
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """Copies nested dicts and lists with their tensors to host memory, each time into the same buffers.

    Memory: one buffer per tensor, page-locked for tensors of a CUDA device. A copy is valid until the next one.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple, Tensor] = {}

    def take(self, state: Any) -> tuple[Any, Callable[[], object]]:
        """A copy of `state`, and a function that waits until its tensors have arrived, for any thread to call.

        The host does not wait for a CUDA device here: the copies are queued behind the work that the device has, and
        before what it is given next.
        """
        before, self.buffers = self.buffers, {}
        on_gpu: list[torch.device] = []
        copied = self._copy(state, (), before, on_gpu)
        if not on_gpu:
            return copied, _nothing
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(on_gpu[0]))
        return copied, event.synchronize

    def _copy(self, value: Any, place: tuple, before: dict[tuple, Tensor], on_gpu: list[torch.device]) -> Any:
        if isinstance(value, dict):
            copied = copy.copy(value)  # an OrderedDict keeps its type and attributes
            copied.update((key, self._copy(inner, (*place, key), before, on_gpu)) for key, inner in value.items())
            return copied
        if isinstance(value, list):
            return [self._copy(inner, (*place, i), before, on_gpu) for i, inner in enumerate(value)]
        if not isinstance(value, Tensor):
            return value
        value, buffer = value.detach(), before.get(place)
        if value.is_cuda:
            on_gpu.append(value.device)
        layout = value.shape, value.stride(), value.dtype
        if buffer is None or (buffer.shape, buffer.stride(), buffer.dtype) != layout:
            buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        self.buffers[place] = buffer.copy_(value, non_blocking=True)
        return buffer


def _nothing() -> None:
    pass


class Writer:
    """Runs one function at a time in a thread. What it raises is raised by the next `check`, `wait` or `start`."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.seconds: float | None = None  # that the last function took

    def start(self, job: Callable[[], None]) -> None:
        """Run `job` in the thread, after the one before it has finished."""
        self.wait()
        # A daemon: after a second Ctrl-C the process ends at once.
        self.thread = threading.Thread(target=self._run, args=(job,), name="writer", daemon=True)
        self.thread.start()

    def _run(self, job: Callable[[], None]) -> None:
        clock = time.perf_counter()
        try:
            job()
        except BaseException as error:  # for the main thread to raise
            self.error = error
        self.seconds = time.perf_counter() - clock

    def check(self) -> None:
        """Raise the error of the function, if it has failed. Does not wait."""
        if self.error is not None:
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written. Raises the error of the function once."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        error, self.error = self.error, None
        if error is not None:
            raise error
