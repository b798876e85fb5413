"""SIGTERM and Ctrl-C as a question asked after each step, so that a run ends at a step and not in the middle of one."""

import os
import signal
import threading
from contextlib import ContextDecorator

from utils.distributed import any_rank, world_size

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ASK_EVERY = 10  # steps between two agreements of several processes: a small message each


class Interrupt(ContextDecorator):
    """Notes signals between `listen()` and the end of the block (or decorated function), which puts handlers back.

    Before `listen()` a signal does what it always does: there is nothing yet that could be lost.
    """

    def __enter__(self) -> "Interrupt":
        self.noted, self.calls, self.before = None, 0, {}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def listen(self) -> None:
        if threading.current_thread() is threading.main_thread():  # nobody else may set handlers
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, _) -> None:
        if self.noted is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C: now, whatever is lost
        if self.noted is None:
            # Not print: a handler may run in the middle of another print.
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")
        self.noted = signal.Signals(number).name

    def asked(self) -> bool:
        """Whether to stop now. Every process must ask equally often: they agree in every `ASK_EVERY`-th call, so
        that all of them stop at the same step, whichever of them got the signal."""
        if world_size() == 1:
            return self.noted is not None
        self.calls += 1
        return self.calls % ASK_EVERY == 0 and any_rank(self.noted is not None)
