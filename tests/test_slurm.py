"""scripts/slurm.sbatch under bash, with a scontrol that only notes what it is asked: signals, requeue, resume."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import REPO, TINY, make_folder, run

from utils.errors import INTERRUPTED

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1") or not shutil.which("bash"), reason="needs bash")

FLAGS = ["--epochs", "6", "--warmup", "1", "--device", "cpu"]


class Cluster:
    """Runs the script as Slurm does: a copy of it, in the folder where sbatch was called, with its job id."""

    def __init__(self, folder: Path, data: Path):
        self.folder, self.asked = folder, folder / "asked"
        self.script = folder / "slurm_script"
        shutil.copy(REPO / "scripts" / "slurm.sbatch", self.script)
        (folder / "bin").mkdir()
        scontrol = folder / "bin" / "scontrol"
        scontrol.write_text(f'#!/bin/sh\necho "$@" >>"{self.asked}"\n')
        scontrol.chmod(0o755)
        self.words = [*TINY, "--data_root", str(data), "--log_path", str(folder), "--run_name", "job", *FLAGS]
        self.run = folder / "job"

    def start(self, **env: str) -> subprocess.Popen:
        path = os.pathsep.join([str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        slurm = {"PATH": path, "SLURM_JOB_ID": "4242", "SLURM_SUBMIT_DIR": str(REPO)}
        return subprocess.Popen(["bash", self.script, *self.words], cwd=self.folder, env=os.environ | slurm | env,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip

    def stopped(self, number: signal.Signals, epochs: int, **env: str) -> tuple[int, str]:
        """Start, and send a signal to the script alone after so many epochs of the run; exit status and output."""
        job, metrics, deadline = self.start(**env), self.run / "metrics.jsonl", time.monotonic() + 120
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < epochs:
            assert job.poll() is None and time.monotonic() < deadline, "ended before the signal"
            time.sleep(0.005)
        job.send_signal(number)
        output, _ = job.communicate(timeout=120)
        return job.returncode, output

    def requests(self) -> list[str]:
        return self.asked.read_text().splitlines() if self.asked.exists() else []


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"), train=16, test=6)


@pytest.fixture
def cluster(tmp_path, data):
    return Cluster(tmp_path, data)


def test_stopped_by_the_time_limit_and_by_preemption_the_weights_are_bit_identical(cluster, data):
    whole = run(data, cluster.folder, "whole", *FLAGS)

    status, output = cluster.stopped(signal.SIGUSR1, 1)  # the time limit is near
    assert status == INTERRUPTED and "time limit: requeueing job 4242" in output, output
    assert cluster.requests() == ["requeue 4242"]

    status, output = cluster.stopped(signal.SIGTERM, 3)  # preempted: Slurm itself requeues
    assert status == INTERRUPTED and "resumed after epoch" in output, output
    assert cluster.requests() == ["requeue 4242"]

    job = cluster.start()
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0 and "resumed after epoch" in output, output
    assert cluster.requests() == ["requeue 4242"]
    for name in ("last.pth", "best.pth"):
        a, b = (torch.load(folder / name, weights_only=True)["model"] for folder in (whole, cluster.run))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name


def test_a_mistake_is_not_requeued(cluster):
    cluster.words += ["--epochs", "none"]
    job = cluster.start()
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 2 and "error: " in output and cluster.requests() == []


def test_a_run_that_never_finishes_an_epoch_is_not_requeued_for_ever(cluster):
    status, output = cluster.stopped(signal.SIGUSR1, 0, SLURM_RESTART_COUNT="50")
    assert status == 1 and "requeued 50 times" in output and cluster.requests() == []
