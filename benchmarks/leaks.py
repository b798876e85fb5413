"""Leak test: memory, open files and threads of one process over 2,000 Remix epochs on very little data.

    python -m benchmarks.leaks [--epochs 2000]

Runs train.py in this process on 24 training and 10 test clips of the demo: within minutes, as many checkpoints, log
lines and evaluations as in 8 hours of a real run. Writes benchmarks/results/leaks-<cpu>-<date>.json and .png. Exit
status 1 if the number of handles or threads grew, or memory grew by more than 5 % over the second half.
"""

import json
import os
import re
import tempfile
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

import train
from benchmarks.common import command
from benchmarks.interruptions import part_of_demo
from benchmarks.saving import new_result
from utils.cli import Parser, number
from utils.errors import run_main
from utils.run import Run, environment

SAMPLES = 200
GROWTH = 1.05  # of the mean memory of the last tenth over that of the tenth after the middle


def usage() -> dict:
    """Resident memory in MB, open file descriptors and threads of this process."""
    status = Path("/proc/self/status").read_text()
    return {
        "memory_mb": int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024,
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": int(re.findall(r"Threads:\s+(\d+)", status)[0]),
    }


def measure(folder: Path, epochs: int) -> list[dict]:
    rows, begin, every = [], time.monotonic(), max(1, epochs // SAMPLES)

    class Watched(Run):
        def epoch(self, metrics: dict, last: bool = False) -> None:
            super().epoch(metrics, last)
            if metrics["epoch"] % every == 0 or metrics["epoch"] + 1 == epochs:
                rows.append({"epoch": metrics["epoch"], "seconds": time.monotonic() - begin} | usage())

    train.Run = Watched
    data = part_of_demo(folder / "data", 24, 10)
    words = ["--train", "--dataset", "demo", "--data_root", str(data), "--device", "cpu"]
    words += ["--log_path", str(folder / "runs"), "--run_name", "long", "--epochs", str(epochs), "--cache", "ram"]
    train.main([*words, "--warmup", str(epochs // 4), "--lr_decay_step", str(max(1, epochs // 10))])
    return rows


def verdict(rows: list[dict]) -> tuple[float, bool]:
    """Growth of memory over the second half (1: none), and whether all is well."""
    half, tenth = len(rows) // 2, max(1, len(rows) // 10)
    early, late = rows[half : half + tenth], rows[-tenth:]
    growth = sum(row["memory_mb"] for row in late) / len(late) / (sum(row["memory_mb"] for row in early) / len(early))
    steady = all(max(r[name] for r in late) <= max(r[name] for r in early) for name in ("handles", "threads"))
    return growth, steady and growth <= GROWTH


def draw(rows: list[dict], path: Path, title: str) -> None:
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    names = {"memory_mb": "resident memory, MB", "handles": "open files", "threads": "threads"}
    for axis, (name, label) in zip(figure.subplots(1, 3), names.items(), strict=True):
        axis.plot([row["epoch"] for row in rows], [row[name] for row in rows], lw=1.5)
        axis.set(xlabel="epoch", title=label, ylim=(0, 1.2 * max(row[name] for row in rows)))
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=number(int, 20), default=2000, metavar="N", help="epochs (default: 2000)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args.epochs)
    growth, good = verdict(rows)
    about = environment(torch.device("cpu"), 1)
    about["command"] = command()
    cpu = about["hardware"]["cpu"]
    path = new_result("leaks", cpu).with_suffix(".json")
    path.write_text(json.dumps(about | {"growth_second_half": growth, "good": good, "rows": rows}, indent=1) + "\n")
    draw(rows, path.with_suffix(".png"), f"{args.epochs} epochs of Remix, PyTorch {torch.__version__}, {cpu}")
    first, last = rows[0], rows[-1]
    print(f"{args.epochs} epochs in {last['seconds']:.0f} s; memory of the last tenth {growth:.3f} times that "
          f"after the middle; first to last: {first['memory_mb']:.0f} -> {last['memory_mb']:.0f} MB, files "
          f"{first['handles']} -> {last['handles']}, threads {first['threads']} -> {last['threads']}")  # fmt: skip
    print(path)
    return 0 if good else 1


if __name__ == "__main__":
    run_main(main)
