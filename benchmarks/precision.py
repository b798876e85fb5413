"""Effect of bfloat16 on scoring: the share of clips that keep another modality than in float32.

    python -m benchmarks.precision                                            # demo, 3 seeds, scored after 2, 4, ... 20
    python -m benchmarks.precision --seeds 0 --after 10,20 -- --dataset CREMAD      # arguments after -- go to train.py
    python -m benchmarks.precision --checkpoints 'runs/*/last.pth'                  # finished runs, without training

Trains with train.py in float32, in steps with --resume. After each step, the same weights score all training clips in
both precisions; a CPU without bfloat16 instructions emulates them with the same rounding. `margin` is the difference of
a clip's two lowest KLs (bits; median over all clips, and over clips that changed), `KL difference` that of a clip's KL
in the two precisions (bits; median over clips and modalities).
"""

import argparse
import contextlib
import glob
import os
import statistics
import tempfile
from pathlib import Path

import torch

import remix
import train
from benchmarks.common import machine, save
from benchmarks.scaling import numbers
from dataset.build import Data, build_data
from models.inference import predict
from utils.cli import Parser
from utils.errors import UserError, run_main


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = Parser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--seeds", default="0,1,2", help="seeds (default: 0,1,2)")
    p.add_argument(
        "--after", type=numbers, default=[2, 4, 8, 12, 16, 20], help="epochs to score (default: 2,4,8,12,16,20)"
    )
    p.add_argument("--checkpoints", metavar="GLOB", help="score these instead of training (default: none)")
    p.add_argument("rest", nargs="*", help="flags of train.py, after -- (default: --warmup 2)")
    return p.parse_args(argv)


def compare(checkpoint: Path, args: argparse.Namespace, data: Data, device: torch.device) -> dict:
    """Score all training clips with the weights of `checkpoint` in both precisions."""
    low_is_hard = {}
    for precision in ("fp32", "bf16"):
        own = argparse.Namespace(**vars(args) | {"precision": precision, "checkpoint": str(checkpoint)})
        model = train.make_model(own, data, device)
        logits = predict(model, data.clips["train"], data.spec.names, 4 * args.batch_size, "score")
        low_is_hard[precision] = remix.difficulty([logits[name] for name in data.spec.names]).cpu()  # (N, M)
    kept = {precision: remix.decouple(values) for precision, values in low_is_hard.items()}
    changed = (kept["fp32"] != kept["bf16"]).any(dim=1)
    lowest = low_is_hard["fp32"].sort(dim=1).values
    margin = lowest[:, 1] - lowest[:, 0]
    return {
        "changed": int(changed.sum()),
        "clips": len(changed),
        "share": f"{changed.float().mean().item():.3%}",
        "KL difference": f"{(low_is_hard['fp32'] - low_is_hard['bf16']).abs().median().item():.2g}",
        "margin of all": f"{margin.median().item():.3g}",
        "margin of changed": f"{margin[changed].median().item():.3g}" if changed.any() else None,
    }


def compare_finished(pattern: str, device: torch.device) -> tuple[list[dict], list[argparse.Namespace]]:
    """A row for each checkpoint, by its training set, and the flags of each. Raises `UserError` without any."""
    rows, flags = [], []
    for path in sorted(glob.glob(pattern)):
        args = train.parse_args(["--checkpoint", path, "--device", device.type])
        flags.append(args)
        found = compare(Path(path), args, build_data(args, device), device)
        rows.append({"data": Path(args.data_root).name, "epochs": args.trained["epoch"] + 1, **found})
        print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    if not rows:
        raise UserError(f"--checkpoints {pattern}: no such file")
    return rows, flags


def train_and_compare(ours: argparse.Namespace, device: torch.device) -> tuple[list[dict], list[argparse.Namespace]]:
    """A row for each scoring of each seed, and the flags of training."""
    rows, rest = [], ours.rest or ["--warmup", "2"]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        flags = ["--train", *rest, "--precision", "fp32", "--log_path", folder,
                 "--cache", "device" if device.type == "cuda" else "ram"]  # fmt: skip
        args = train.parse_args([*flags, "--epochs", str(ours.after[-1])])
        data = build_data(args, device)
        for seed in ours.seeds.split(","):
            run = Path(folder) / f"seed{seed}"
            for epochs in ours.after:
                with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                    train.main([*flags, "--random_seed", seed, "--run_name", run.name, "--epochs", str(epochs),
                                "--resume", "auto"])  # fmt: skip
                rows.append({"seed": seed, "after epochs": epochs, **compare(run / "last.pth", args, data, device)})
                print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows, [args]


def main(argv: list[str] | None = None) -> None:
    ours = parse_args(argv)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    about = machine(device)
    rows, flags = compare_finished(ours.checkpoints, device) if ours.checkpoints else train_and_compare(ours, device)
    shares = [row["changed"] / row["clips"] for row in rows]
    used = {name: ", ".join(sorted({str(vars(own)[name]) for own in flags})) for name in ("dataset", "encoder")}
    summary = [{"median share": f"{statistics.median(shares):.3%}", "highest": f"{max(shares):.3%}",
                "scorings": len(shares), **used}]  # fmt: skip
    save("precision", about, {"Clips whose kept modality is another in bf16": summary, "Each scoring": rows})


if __name__ == "__main__":
    run_main(main)
