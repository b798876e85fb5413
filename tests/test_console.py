"""The first lines of a run, and the machine it finds: load of other processes, the cores it may use."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from dataset import pack
from dataset.folder import Part
from utils import console


class Asked(Exception):
    """Its argument is a number of threads."""


def pool_of(threads: int) -> None:
    raise Asked(threads)


def first_lines() -> list[str]:
    args = train.parse_args(["--train", "--epochs", "20"])
    return console.start_lines(args, {}, torch.device("cpu"), Path("runs/x"), 0)


@pytest.mark.parametrize(("load", "warned"), [(9.96, False), (10.1, True), (None, False)])
def test_a_busy_machine_is_told_in_one_line(monkeypatch, load, warned):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    if load is None:  # Windows
        monkeypatch.delattr(os, "getloadavg", raising=False)
    else:
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 99.0, 99.0), raising=False)
    warning = "warning: load average 10.1 on 8 cores: other processes slow this run down"
    assert [line for line in first_lines() if line.startswith("warning")] == [warning] * warned


def test_workers_and_threads_are_as_many_as_the_cores_this_process_may_use(monkeypatch):
    """A job that a cluster gives 3 of 64 cores does not start 8 processes and 16 threads on them."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 6, 7}, raising=False)
    assert train.make_parser().parse_args([]).num_workers == 3
    monkeypatch.setattr(pack, "ThreadPoolExecutor", pool_of)
    with pytest.raises(Asked) as asked:
        next(pack._decoded(Part([], np.zeros(0, np.int64), {}), {}, {}))
    assert asked.value.args == (3,)
