"""Time of a full training run on generated data of CREMA-D's shape.

    python -m benchmarks.full                                       # 6,698 / 744 clips, 60 epochs, warm-up 10, batch 64
    python -m benchmarks.full -- --precision bf16 --compile         # arguments after -- go to train.py
    torchrun is used if there are several GPUs; select GPUs with: -- --gpu_ids 0

Two 224 x 224 frames from 480 x 360 JPEGs, 257 x 188 spectrograms, ResNet-18. Only the seconds are meaningful, not the
accuracies. Needs 14 GB of disk in the temporary folder (set it with TMPDIR=DIR).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import MODALITIES, add_shape_flags, flops_per_clip, generate_folder, machine, save
from utils.cli import Parser, number
from utils.errors import UserError, run_main

REPO = Path(__file__).resolve().parents[1]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = Parser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--clips", type=number(int, 8), default=6698, help="training clips (default: 6698)")
    p.add_argument("--test_clips", type=number(int, 2), default=744, help="test clips (default: 744)")
    add_shape_flags(p)
    p.add_argument("--epochs", type=number(int, 1), default=60, help="epochs, warm-up included (default: 60)")
    p.add_argument("--warmup", type=number(int, 0), default=10, help="joint epochs before Remix (default: 10)")
    p.add_argument("rest", nargs="*", help="flags of train.py, after -- (default: none)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    about = machine(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        data, clock = Path(folder) / "data", time.perf_counter()
        generate_folder(data, args.clips, args.test_clips, args.frame_size, args.audio_shape)
        made = time.perf_counter() - clock
        command = [sys.executable, "train.py", "--train", "--dataset", "folder", "--data_root", str(data)]
        command += ["--encoder", args.encoder, "--image_size", str(args.image_size), "--epochs", str(args.epochs)]
        command += ["--warmup", str(args.warmup), "--log_path", folder, "--run_name", "run", *args.rest]
        clock = time.perf_counter()
        if subprocess.run(command, cwd=REPO).returncode:
            raise UserError(f"benchmarks.full: train.py failed, see above; it was started with {' '.join(args.rest)}")
        wall = time.perf_counter() - clock
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        config = json.loads((Path(folder) / "run" / "config.json").read_text())
    about |= config["hardware"]  # of the run, which may have had several processes
    flops = flops_per_clip(args.encoder, 6, args.image_size, args.audio_shape)
    rows = []
    for phase in dict.fromkeys(line["phase"] for line in lines):
        own = [line for line in lines if line["phase"] == phase]
        seconds = {key: sum(line[f"seconds_{key}"] for line in own) for key in ("score", "train", "eval")}
        if phase == "remix":
            work = sum(line[f"n_{m.name}"] * flops[m.name]["train"] for line in own for m in MODALITIES)
            work += len(own) * args.clips * flops["joint"]["forward"]
        else:
            work = len(own) * args.clips * flops["joint"]["train"]
        total = seconds["score"] + seconds["train"]
        rows.append({"phase": phase, "epochs": len(own), **{f"{k} s": f"{v:.1f}" for k, v in seconds.items()},
                     "s/epoch": f"{(total + seconds['eval']) / len(own):.2f}",
                     "clips/s": f"{len(own) * args.clips / total:.0f}",
                     "TFLOP/s": f"{work / total / 1e12:.2f}"})  # fmt: skip
    training = sum(line[f"seconds_{key}"] for line in lines for key in ("score", "train", "eval"))
    summary = [{"training s": f"{training:.1f}", "whole command s": f"{wall:.1f}", "making data s": f"{made:.1f}",
                "precision": config["precision"], "compile": config["compile"], "clips": args.clips,
                "flags": " ".join(args.rest) or None}]  # fmt: skip
    save("full", about, {"Whole run": summary, "By phase": rows})


if __name__ == "__main__":
    run_main(main)
