"""Time and memory of whole train.py runs against the number of clips and classes, on generated data.

    python -m benchmarks.scaling                                     # 500 to 8,000 clips, files, memory, 2 processes
    python -m benchmarks.scaling --clips 100,200 --classes 3,6 --epochs 4 --warmup 2     # smoke test

Seconds are the median epoch of a phase, without the first epoch. `private` is unshared memory: its peak over the run,
for all processes together and for the largest one. `mapped` is the resident part of mapped files, such as the pack; the
system can reclaim these pages. A line is fitted to each quantity; R2 measures its linearity. Memory is read from
outside the runs and needs Linux (/proc/PID/smaps_rollup).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import add_shape_flags, generate_folder, machine, save
from utils.cli import Parser, number
from utils.errors import UserError, run_main

REPO = Path(__file__).resolve().parents[1]
WAYS = {"none": ("none", 1), "ram": ("ram", 1), "ram x 2 processes": ("ram", 2)}
STORED_FRAMES = 3
SHAPE = {"frame_size": (96, 72), "image_size": 32, "audio_shape": (64, 48), "encoder": "resnet18_thin"}
PHASES = {"joint": "seconds_train", "remix": "seconds_train", "score": "seconds_score", "evaluate": "seconds_eval"}


def numbers(text: str, least: int = 2) -> list[int]:
    """An argparse type: `500,1000` -> [500, 1000]."""
    if not all(part.isdecimal() and int(part) >= least for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text}: comma separated numbers are wanted, such as 500,1000")
    return [int(part) for part in text.split(",")]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = Parser(description=(__doc__ or "").split("\n")[0])
    p.add_argument(
        "--clips",
        type=numbers,
        default=[500, 1000, 2000, 4000, 8000],
        help="training clips of each run (default: 500,1000,2000,4000,8000)",
    )
    p.add_argument(
        "--classes",
        type=numbers,
        default=[6, 31, 100, 300],
        help="classes of each run over classes (default: 6,31,100,300)",
    )
    p.add_argument(
        "--class_clips", type=number(int, 8), default=1000, help="clips of the runs over classes (default: 1000)"
    )
    add_shape_flags(p, SHAPE)
    p.add_argument("--batch_size", type=number(int, 2), default=64, help="batch size (default: 64)")
    p.add_argument("--epochs", type=number(int, 3), default=11, help="epochs of each run (default: 11)")
    p.add_argument("--warmup", type=number(int, 2), default=6, help="joint epochs, the first is not timed (default: 6)")
    p.add_argument("--workers", type=number(int, 0), default=2, help="worker processes that read files (default: 2)")
    args = p.parse_args(argv)
    if args.warmup >= args.epochs:
        raise UserError(f"--warmup {args.warmup}: must be less than --epochs {args.epochs}")
    return args


# ------------------------------------------------------------------------------------------------------------ memory


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            children = [int(child) for child in file.read().split()]
    except OSError:
        children = []
    return [pid, *(p for child in children for p in tree(child))]


def memory(pid: int) -> dict[str, int] | None:
    """Bytes that are a process's own (anonymous and shared memory) and its share of mapped files; None if it is gone.

    What several processes hold together, after a fork too, is divided among them.
    """
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file if line.startswith("Pss_")}
        return {"private": fields["Pss_Anon"] + fields["Pss_Shmem"], "mapped": fields["Pss_File"]}
    except (OSError, KeyError, ValueError):  # it ended meanwhile
        return None


def watch(command: list[str], log: Path) -> dict[str, float]:
    """Run `command` to its end; peaks in bytes over time. Raises `RuntimeError` with the log's end if it fails."""
    peak = {"private": 0.0, "mapped": 0.0, "largest_private": 0.0}
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=REPO, stdout=file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                found = [m for m in map(memory, tree(process.pid)) if m]
                if found:
                    for name in ("private", "mapped"):
                        peak[name] = max(peak[name], sum(m[name] for m in found))
                    peak["largest_private"] = max(peak["largest_private"], *(m["private"] for m in found))
                time.sleep(0.1)
        finally:
            process.kill()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{log.read_text()[-2000:]}")
    return peak


# -------------------------------------------------------------------------------------------------------------- runs


def one_run(folder: Path, way: str, clips: int, classes: int, args: argparse.Namespace) -> dict:
    """One run of train.py on data of its own: clips, pack, seconds by phase, memory."""
    data, (cache, processes) = folder / "data", WAYS[way]
    test = max(2, clips // 9)
    shapes = args.frame_size, args.audio_shape
    generate_folder(data, clips, test, *shapes, classes, STORED_FRAMES)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "train.py", "--train", "--dataset", "folder", "--data_root", str(data)]
    command += ["--cache", cache, "--device", "cpu", "--encoder", args.encoder, "--image_size", str(args.image_size)]
    command += ["--batch_size", str(args.batch_size), "--epochs", str(args.epochs), "--warmup", str(args.warmup)]
    command += ["--num_workers", str(args.workers), "--log_path", str(folder), "--run_name", "run"]
    command += ["--learning_rate", "1e-4"]
    peak = watch(command, folder / "log.txt")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    width, height = args.frame_size
    pack = (clips + test) * (STORED_FRAMES * 3 * width * height + 4 * args.audio_shape[0] * args.audio_shape[1])
    row = {"way": way, "clips": clips, "classes": classes, "pack MB": round(pack / 1e6, 1)}
    for phase, key in PHASES.items():
        kind = {"joint": ("joint",), "evaluate": ("joint", "remix")}.get(phase, ("remix",))
        row[f"{phase} s"] = round(statistics.median(line[key] for line in lines if line["phase"] in kind), 4)
    return row | {f"{name.replace('_', ' ')} MB": round(value / 1e6, 1) for name, value in peak.items()}


def fit_rows(rows: list[dict], over: str) -> list[dict]:
    """A straight line through each quantity, by least squares: what one more clip or class costs."""
    fits = []
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        x = np.array([row[over] for row in own], dtype=float)
        for name in (key for key in own[0] if key not in ("way", "clips", "classes")):
            y = np.array([row[name] for row in own])
            slope, start = np.polyfit(x, y, 1)
            spread = ((y - y.mean()) ** 2).sum()
            residual = ((y - start - slope * x) ** 2).sum()
            fits.append({"way": way, "quantity": name, "over": over, "at 0": f"{start:.4g}",
                         f"per 1000 {over}": f"{1000 * slope:.4g}",
                         "R2": f"{1 - residual / spread:.4f}" if spread else None})  # fmt: skip
    return fits


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not Path("/proc/self/smaps_rollup").exists():
        raise UserError("benchmarks.scaling: reads memory from /proc, which only Linux has")
    about = machine(torch.device("cpu"))
    plan = [("clips", way, clips, 6) for way in WAYS for clips in args.clips]
    plan += [("classes", "ram", args.class_clips, classes) for classes in args.classes]
    tables: dict[str, list[dict]] = {"clips": [], "classes": []}
    for over, way, clips, classes in plan:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            row = one_run(Path(folder), way, clips, classes, args)
        tables[over].append(row)
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    about |= {"frame_size": args.frame_size, "image_size": args.image_size, "audio_shape": args.audio_shape,
              "encoder": args.encoder, "batch_size": args.batch_size, "epochs": args.epochs, "warmup": args.warmup,
              "workers": args.workers, "load_after": round(os.getloadavg()[0], 2)}  # fmt: skip
    found = {}
    for over, rows in tables.items():
        fits = fit_rows(rows, over) if len({row[over] for row in rows}) > 1 else []
        found |= {f"Over {over}": rows, f"Over {over}, fitted": fits}
    save("scaling", about, found)


if __name__ == "__main__":
    run_main(main)
