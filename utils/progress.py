"""Progress of long operations: a bar on a terminal, occasional lines in a log file. Does not import PyTorch."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

FIRST, LONGEST = 60.0, 600.0  # seconds until a log file's first line, and at most between two of them


class Progress:
    """Context manager that shows on standard error how many of `total` items are done.

    On a terminal it is a tqdm bar. A bar would fill a log file or a pipe, so there it writes whole lines: one after a
    minute, then one whenever the time has grown by a quarter (by ten minutes at most).
    """

    def __init__(
        self, name: str, total: int, unit: str = "clip", done: int = 0, quiet: bool = False, keep: bool = False
    ) -> None:
        """`done` items were done before, `quiet` shows nothing, `keep` leaves the finished bar on the terminal."""
        self.name, self.total, self.unit, self.quiet = name, total, unit, quiet
        self.done = self.first = done
        self.notes: dict[str, object] = {}
        self.started, self.due = time.monotonic(), FIRST  # `due`: seconds after the start
        self.bar: tqdm | None = None
        if not quiet and sys.stderr.isatty():
            self.bar = tqdm(
                desc=name, total=total, initial=done, unit=unit, leave=keep, mininterval=0.5, smoothing=0.05
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, count: int = 1) -> None:
        """`count` more items are done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif not self.quiet and (elapsed := time.monotonic() - self.started) >= self.due:
            self.due = elapsed + min(max(FIRST, elapsed / 4), LONGEST)
            print(self.line(elapsed), file=sys.stderr, flush=True)

    def note(self, **notes: object) -> None:
        """Show `name=value` behind the numbers from now on."""
        self.notes |= notes
        if self.bar is not None:
            self.bar.set_postfix(self.notes)

    def rename(self, name: str) -> None:
        self.name = name
        if self.bar is not None:
            self.bar.set_description(name)

    def write(self, text: str) -> None:
        """Print a line to standard output, above the bar where there is one."""
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def line(self, elapsed: float) -> str:
        """The line in a log file after `elapsed` seconds."""
        text = f"{self.name}: {self.done}/{self.total} {self.unit}s ({100 * self.done // max(1, self.total)} %)"
        if self.done > self.first:
            rate = (self.done - self.first) / elapsed
            text += f", {rate:.0f} {self.unit}s/s" if rate >= 1 else f", {1 / rate:.1f} s/{self.unit}"
            text += f", {clock((self.total - self.done) / rate)} left"
        return text + "".join(f", {name}={value}" for name, value in self.notes.items())


def over(
    items: Iterable[T], name: str, total: int | None = None, quiet: bool = False, keep: bool = False
) -> Iterator[T]:
    """The `items`, clips, with their progress shown. `total` is needed where `items` has no length."""
    if total is None:
        assert isinstance(items, Sized)
        total = len(items)
    with Progress(name, total, quiet=quiet, keep=keep) as progress:
        for item in items:
            yield item
            progress.update()


def clock(seconds: float) -> str:
    """75 -> 1:15, 3675 -> 1:01:15."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
