"""Console output of a run: formats plain numbers as lines and tables."""

import os
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from utils.acceleration import device_name, synchronise
from utils.distributed import world_size
from utils.memory import load_average
from utils.progress import Progress, clock

BUSY = 1.25  # load per core above which a run starts with a warning; a comparison's own runs make about 1


def progress(name: str, clips: int, shown: bool) -> Progress:
    """Progress over `clips`: a bar that is removed when done, or a line now and then in a log file."""
    return Progress(name, clips, quiet=not shown)


def some(names: Sequence[str], most: int = 16) -> str:
    """Names for one line."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def epoch_line(numbers: dict, names: Sequence[str], epochs: int, history: list[dict]) -> str:
    """One epoch's numbers in a line: loss and test accuracy per head, the partition, speed and time left.

    `history` holds the epochs so far, this one included; the time left is counted from the last few of this phase.
    """
    epoch = numbers["epoch"] + 1
    shown = [("test", numbers["test_acc"]), *((name, numbers[f"test_acc_{name}"]) for name in names)]
    shown += [("val", numbers.get("val_acc"))] if "val_acc" in numbers else []
    accuracies = "  ".join(f"{name} {decimal(value, '.3f')}" for name, value in shown)
    losses = "/".join(decimal(numbers.get(f"train_ce_{head}"), ".3f") for head in ("joint", *names))
    counts = [numbers.get(f"n_{name}") for name in names]
    kept = f"  kept {'/'.join(map(str, counts))}" if None not in counts else ""
    recent = [line for line in history[-5:] if line["phase"] == numbers["phase"]]
    seconds = sum(seconds_of(line) for line in recent) / max(1, len(recent))
    speed = f"{numbers['clips_per_second']:.0f} clips/s  {seconds:.1f} s  ETA {clock((epochs - epoch) * seconds)}"
    return f"epoch {epoch:>3}/{epochs} {numbers['phase']:<5}  CE {losses}  acc {accuracies}{kept}  {speed}"


def seconds_of(line: dict) -> float:
    """Seconds of an epoch: scoring, training, evaluation, diagnostics, waiting for checkpoints.

    Not `seconds_write`, in which a thread wrote the checkpoint of the epoch before.
    """
    own = (key for key in line if key.startswith("seconds_") and key != "seconds_write")
    return sum(line[key] or 0 for key in own)


def decimal(value: float | None, form: str) -> str:
    """A number, or "–" for what was not trained or measured."""
    return "–" if value is None else format(value, form)


def result_table(rows: dict[str, dict], names: Sequence[str]) -> str:
    """A line per protocol: test accuracy of the joint head and each modality's, and macro F1; "–" if not trained."""
    heads = {"multimodal": "test_acc"} | {name: f"test_acc_{name}" for name in names} | {"macro F1": "test_f1_macro"}
    width, cell = max(map(len, rows)) + 2, max(12, max(map(len, heads)) + 2)
    lines = [f"{'':{width}}" + "".join(f"{name:>{cell}}" for name in heads)]
    for row, numbers in rows.items():
        values = (decimal(numbers[key], ".4f") for key in heads.values())
        lines.append(f"{row:{width}}" + "".join(f"{value:>{cell}}" for value in values))
    return "\n".join(lines)


def slice_lines(numbers: dict, names: Sequence[str]) -> list[str]:
    """The accuracies of the joint head's slices, where a modality's own head was not trained."""
    found = [f"{name} {numbers[key]:.4f}" for name in names
             if numbers[f"test_acc_{name}"] is None and (key := f"test_slice_{name}") in numbers]  # fmt: skip
    return [f"slices of the joint head, last epoch: {', '.join(found)}"] if found else []


def start_lines(args: Namespace, usual: dict, device: torch.device, folder: Path, first: int) -> list[str]:
    """First lines of a run: changes of the preset from `usual`; device, precision, threads and seed."""
    filled = args.from_preset
    changed = [f"{name} {filled[name]}" for name, value in usual.items() if filled.get(name, value) != value]
    lines = [f"preset {args.preset}: {', '.join(changed)}"] if changed else []
    if args.method == "remix" and args.warmup == args.epochs:
        lines.append(f"warning: all {args.epochs} epochs are warm-up, so Remix never starts")
    load, cores = load_average() or 0, os.cpu_count() or 1
    if load > BUSY * cores:
        lines.append(f"warning: load average {load:.1f} on {cores} cores: other processes slow this run down")
    name = device_name(device)
    many = f" x {world_size()}" if world_size() > 1 else ""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    method = args.method if args.balance == "none" else f"{args.method} with {args.balance}"
    lines.append(f"{method}: {args.epochs} epochs on {name}{many}, {args.precision}{threads}, learning rate "
                 f"{args.learning_rate:g}, seed {args.random_seed}; {folder}")  # fmt: skip
    return [*lines, f"resumed after epoch {first}"] if first else lines


def lap(clock: float) -> tuple[float, float]:
    """Seconds since `clock`, the device having finished, and the time now."""
    synchronise()
    now = time.perf_counter()
    return now - clock, now
