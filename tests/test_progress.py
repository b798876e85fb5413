"""Progress of long work: a bar on a terminal, a few whole lines in a log file, and none in short work."""

import os
import subprocess
import sys
from itertools import pairwise

import pytest
from helpers import REPO

from utils import progress
from utils.progress import Progress, over

WORK = "from utils.progress import over\nfor _ in over(range(40), 'reading'):\n    pass\nprint('end')\n"


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_file_gets_nothing_of_short_work():
    done = subprocess.run([sys.executable, "-c", WORK], cwd=REPO, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("end\n", "")


def test_a_terminal_gets_a_bar_that_is_removed():
    termios = pytest.importorskip("termios", reason="Windows has no pseudo-terminals")
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    termios.tcsetwinsize(theirs, (50, 100))  # tqdm shows nothing on a terminal without a size
    done = subprocess.run([sys.executable, "-c", WORK], cwd=REPO, stdout=subprocess.PIPE, stderr=theirs, check=True)
    shown = os.read(ours, 65536).decode()  # before the last writer closes it
    os.close(theirs), os.close(ours)
    assert done.stdout == b"end\n" and "reading:" in shown and "/40" in shown and "clip/s" in shown
    assert shown.endswith("\r") and "\n" not in shown


def test_a_log_file_gets_lines_at_a_falling_rate(clock, capsys):
    """Ten hours of one clip a second. Whole lines, the first after a minute, the gaps a quarter of the time so far,
    but one to ten minutes."""
    with Progress("preparing", 36_000) as bar:
        for _ in range(36_000):
            clock.now += 1
            bar.update()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and "\r" not in err
    assert lines[0] == "preparing: 60/36000 clips (0 %), 1 clips/s, 9:59:00 left"
    times = [int(line.split()[1].split("/")[0]) for line in lines]
    gaps = [b - a for a, b in pairwise(times)]
    assert times[:5] == [60, 120, 180, 240, 300] and gaps == sorted(gaps) and gaps[-1] == 600
    assert 60 < len(lines) < 80


@pytest.mark.parametrize(("done", "seconds", "updates", "text"), [
    (0, 100, 50, "reading: 50/200 clips (25 %), 2.0 s/clip, 5:00 left, skipped=3"),
    (100, 100, 50, "reading: 150/200 clips (75 %), 2.0 s/clip, 1:40 left, skipped=3"),  # the rate is of this process
    (100, 100, 0, "reading: 100/200 clips (50 %), skipped=3"),
    (0, 10, 200, "reading: 200/200 clips (100 %), 20 clips/s, 0:00 left, skipped=3"),
])  # fmt: skip
def test_a_line_tells_rate_and_time_left(done, seconds, updates, text):
    bar = Progress("reading", 200, done=done)
    bar.note(skipped=3)
    bar.update(updates)
    assert bar.line(seconds) == text


def test_quiet_work_writes_nothing(clock, capsys):
    for _ in over(iter(range(5)), "reading", 5, quiet=True):
        clock.now += 100
    assert capsys.readouterr() == ("", "")


def test_a_generator_that_is_left_early_leaves_no_bar(monkeypatch):
    closed = []
    monkeypatch.setattr(Progress, "close", lambda self: closed.append(self.done))
    items = over(range(9), "reading")
    next(items), next(items)
    items.close()
    assert closed == [1]


def test_what_is_written_beside_progress_is_whole_lines(capsys):
    with Progress("runs", 2, "epoch") as bar:
        bar.write("[1/2] done")
    assert capsys.readouterr().out == "[1/2] done\n"
