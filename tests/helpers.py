"""Tiny training folders for tests, made in a second, and runs on them."""

import atexit
import contextlib
import functools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np

REPO = Path(__file__).resolve().parents[1]

# A run on such a folder: seconds on one core.
TINY = [
    "--dataset",
    "folder",
    "--encoder",
    "resnet18_thin",
    "--image_size",
    "32",
    "--batch_size",
    "8",
    "--cache",
    "ram",
]


def make_folder(
    root: Path,
    train: int = 24,
    test: int = 12,
    classes: tuple[str, ...] = ("a", "b", "c"),
    frames: int = 3,
    size: tuple[int, int] = (40, 48),
    audio_shape: tuple[int, int] = (33, 20),
    seed: int = 0,
) -> Path:
    """A sound training folder whose pictures and spectrograms tell the class, with noise. `size` is height, width."""
    rng = np.random.default_rng(seed)
    for name, count in (("train", train), ("test", test)):
        rows = []
        for i in range(count):
            label, clip = i % len(classes), f"{name}_{i:04d}"
            rows.append(f"{clip},{classes[label]}\n")
            folder = root / "visual" / clip
            folder.mkdir(parents=True)
            for k in range(frames):
                image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                image[:, :, label % 3] //= 3
                cv2.imwrite(str(folder / f"frame_{k + 1:05d}.jpg"), image)
            (root / "audio").mkdir(exist_ok=True)
            sound = rng.normal(size=audio_shape).astype(np.float32)
            sound[label :: len(classes)] += 1.0
            np.save(root / "audio" / f"{clip}.npy", sound)
        (root / f"{name}.csv").write_text("".join(rows))
    (root / "stat.csv").write_text("".join(f"{label}\n" for label in classes))
    return root


def run(data: Path, runs: Path, name: str, *flags: str) -> Path:
    """Train on `data` in this process; returns the run's folder, `runs/name`."""
    import train  # late: most tests want a folder and no PyTorch

    train.main([*TINY, "--train", "--data_root", str(data), "--log_path", str(runs), "--run_name", name, *flags])
    return runs / name


@contextlib.contextmanager
def bare_pictures():
    """Runs of this process end in empty pictures: drawing takes two thirds of so short a run. All files are there."""
    from matplotlib.figure import Figure

    from utils import summary  # late, as above

    drawn = summary.plot_curves, summary.plot_confusion
    summary.plot_curves = summary.plot_confusion = lambda *_: Figure(figsize=(1, 1))
    try:
        yield
    finally:
        summary.plot_curves, summary.plot_confusion = drawn


def numbers_of(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, without what depends on the speed of the machine."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(("seconds_", "clips_per_second"))}
            for line in found]  # fmt: skip


def shown_in_table(out: str) -> list[str]:
    """The numbers of the last row of the table that an evaluation prints."""
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:1] == ["multimodal"])
    return lines[head + 1].split()[1:]


@functools.cache
def _forks() -> subprocess.Popen:
    """tests/pairs.py, started once: it has to import PyTorch, and a fork of this process could meet its threads."""
    command = [sys.executable, str(REPO / "tests" / "pairs.py")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, cwd=REPO, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # the end of its input ends it
    return server


def in_processes(folder: Path, *commands: list[str], alone: bool = False) -> list[tuple[list[int], str, str]]:
    """Run each command, as two processes of one group if not `alone`; exit statuses, output and errors of each."""
    folder.mkdir(parents=True, exist_ok=True)
    server = _forks()
    if server.poll() is not None:  # a test before this one broke it
        _forks.cache_clear()
        server = _forks()
    late = threading.Timer(600, server.kill)
    late.start()
    try:
        print(json.dumps({"folder": str(folder), "commands": commands, "alone": alone}), file=server.stdin, flush=True)
        answer = server.stdout.readline()
    finally:
        late.cancel()
    assert answer, "tests/pairs.py ended, or took more than 600 s"
    return [(status, *((folder / f"{i}.{end}").read_text() for end in ("out", "err")))
            for i, status in enumerate(json.loads(answer))]  # fmt: skip


def in_two_processes(folder: Path, *commands: list[str]) -> list[tuple[list[int], str, str]]:
    """Run each command as two processes of one group; exit statuses, standard output and error of each."""
    return in_processes(folder, *commands)
