"""SIGTERM and Ctrl-C, checked between steps, so that a run stops with a message and the command to resume."""

import os
import signal
import threading

from utils.distributed import any_rank, world_size

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ASK_EVERY = 10  # steps between two agreements of several processes: a small message each


class Signals:
    """Notes signals between `listen()` and `restore()`. Outside of them a signal does what it always does."""

    def __init__(self) -> None:
        self.noted: str | None = None
        self.calls, self.before = 0, {}

    def listen(self) -> None:
        if threading.current_thread() is threading.main_thread():  # only the main thread can set handlers
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _note(self, number: int, _) -> None:
        if self.noted is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C stops at once
        if self.noted is None:
            # Not print: a handler may run in the middle of another print.
            os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")
        self.noted = signal.Signals(number).name

    def asked(self) -> bool:
        """Whether to stop now. Every process must ask equally often: they agree in every `ASK_EVERY`-th call, so
        that all of them stop at the same step, whichever of them got the signal."""
        if world_size() == 1:
            return self.noted is not None
        self.calls += 1
        return self.calls % ASK_EVERY == 0 and any_rank(self.noted is not None)
