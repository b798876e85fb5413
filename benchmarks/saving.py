"""Paths and names of benchmark results."""

import datetime
import itertools
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def new_result(name: str, device: str) -> Path:
    """results/<name>-<device>-<date>, to be given a suffix; numbered where a result of that name is there already."""
    RESULTS.mkdir(exist_ok=True)
    words = "".join(c if c.isalnum() else " " for c in device).split()
    stem = "-".join([name, *words, datetime.date.today().isoformat()])
    taken = {path.stem for path in RESULTS.iterdir()}
    numbered = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
    return RESULTS / next(free for free in numbered if free not in taken)
