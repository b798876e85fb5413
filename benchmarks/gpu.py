"""Everything about one GPU in one command: correctness, speed, scoring, a whole run and memory, beside the prediction.

    python -m benchmarks.gpu                                   # CREMA-D's shape, at most ten minutes on one GPU
    python -m benchmarks.gpu --settings bf16                   # one setting
    python -m benchmarks.gpu --device cpu --small              # rehearsal with tiny shapes, saves nothing

The data are generated, 6,698 / 744 clips of CREMA-D's shape: timings do not depend on them. Parts, in this order:

    correctness   the GPU against the CPU in float32, from equal weights and inputs: one SGD step on a full batch of
                  each kind, then the logits of the test clips. Relative error: norm of the difference over norm of
                  the CPU's. `inputs`: those that the GPU crops and resizes, against the CPU's
    settings      median seconds of a joint and of a Remix epoch (scoring, training, BatchNorm, evaluation), and of 60
                  epochs made of them. `predicted` was counted for an H200 before any run on a GPU, from kernels, bytes
                  and FLOP, with convolutions at 50 % of peak and 85 % of the memory bandwidth
    phases        each phase's rate, and its share of that of a matrix product measured in the same precision
    steps         kernels and launches of a training step, by torch.profiler; without a GPU, operations
    whole run     seconds of `python train.py` from the prompt to summary.json, with start-up and checkpoints

A part that fails or finds no time left has a line that says so; the other parts are written all the same.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import remix
import train
from benchmarks.common import CREMAD_SHAPE, fed_in, flops_per_clip, generate_folder, machine, product_rate, save
from benchmarks.counting import Operations
from benchmarks.epoch import Setting, measure, median_rows
from dataset.build import Data, build_data
from dataset.clips import ClipBatch, Clips
from models.inference import predict
from utils import distributed
from utils.acceleration import computed_in, set_precision
from utils.cli import Parser, number
from utils.errors import UserError, run_main
from utils.graphs import graphed
from utils.seeding import seed_everything

REPO = Path(__file__).resolve().parents[1]


class Row(NamedTuple):
    """A way to train: flags of train.py, and what was predicted for an H200 in seconds.

    joint, remix: an epoch of 6,698 clips; run: 60 epochs with a warm-up of 10; limit: relative error that is allowed
    (of updates three times that: rounding adds up over the layers of a backward pass);
    steps: on the same batch before comparing, more than one where the first ones are run in another way.
    """

    flags: tuple[str, ...]
    joint: float | None = None
    remix: float | None = None
    run: float | None = None
    limit: float = 1e-3
    steps: int = 1


# Another setting is one line here.
ROWS = {
    "fp32": Row(("--precision", "fp32"), 6.19, 5.59, 341),
    "tf32": Row(("--precision", "tf32"), 2.08, 2.04, 123, limit=2e-2),
    "bf16": Row(("--precision", "bf16"), 1.25, 1.45, 85, limit=0.2),
    "bf16 + compile": Row(("--precision", "bf16", "--compile", "encoders"), 1.05, 1.21, 71, limit=0.2),
    "bf16 + compile + graphs": Row(("--precision", "bf16", "--compile", "all"), 0.91, 0.76, 47, limit=0.3, steps=5),
}
FULL = CREMAD_SHAPE | {"clips": 6698, "test_clips": 744, "batch_size": 64, "epochs": 60, "warmup": 10, "rounds": 3}
SMALL = {"clips": 16, "test_clips": 4, "batch_size": 8, "epochs": 2, "warmup": 1, "rounds": 1, "image_size": 32,
         "frame_size": (48, 36), "audio_shape": (33, 33), "encoder": "resnet18_thin"}  # fmt: skip
CLASSES = 6
PHASES = ("score", "forward", "joint", "remix", "refresh", "evaluate")
UPDATES = {"update": 3}  # factor on the limit. In bf16 on a CPU with SMALL the error is 0.31 to 0.37, of logits 0.11
MARGIN = 30  # seconds kept for writing the results


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = Parser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--settings", default="all", metavar="A,B", help=f"settings: all, {', '.join(ROWS)} (default: all)")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: GPU if any (default: auto)")
    p.add_argument("--small", action="store_true", help="tiny shapes, nothing is saved (default: CREMA-D's shape)")
    p.add_argument("--limit", type=number(int, 60), default=600, metavar="S", help="time limit, s (default: 600)")
    args = p.parse_args(argv)
    args.rows = {name: ROWS[name] for name in ROWS} if args.settings == "all" else {}
    for name in args.settings.split(",") if args.settings != "all" else ():
        if name not in ROWS:
            raise UserError(f"--settings {name}: unknown; allowed: all, {', '.join(ROWS)}")
        args.rows[name] = ROWS[name]
    vars(args).update(SMALL if args.small else FULL)
    return args


class Timer:
    """Seconds since the start of the command, and those that are left of its limit."""

    def __init__(self, limit: float):
        self.start, self.limit = time.perf_counter(), limit

    def left(self) -> float:
        return self.limit - MARGIN - (time.perf_counter() - self.start)

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.start:5.0f} s] {text}", flush=True)


def flags_of(row: Row, args: argparse.Namespace, root: Path, device: str) -> list[str]:
    """The words for train.py: epoch 0 is joint, the others are Remix's."""
    words = ["--train", "--dataset", "folder", "--data_root", root, "--device", device, "--encoder", args.encoder,
             "--image_size", args.image_size, "--batch_size", args.batch_size, "--learning_rate", 1e-5,
             "--warmup", 1, "--epochs", 2, "--random_seed", 0, *row.flags]  # fmt: skip
    return [str(word) for word in words]


# ------------------------------------------------------------------------------------------------------- correctness


class HostCopy:
    """The batches of `clips`, copied to the host: what the device is fed."""

    def __init__(self, clips: Clips):
        self.clips, self.names, self.modalities = clips, clips.names, clips.modalities

    def __len__(self) -> int:
        return len(self.clips)

    def epoch(self, *given: Any, **named: Any) -> Iterator[ClipBatch]:
        for batch in self.clips.epoch(*given, **named):
            inputs = {name: x.cpu().float() for name, x in batch.inputs.items() if isinstance(x, Tensor)}
            yield batch._replace(clips=batch.clips.cpu(), labels=batch.labels.cpu(), inputs=inputs)


def first_steps(
    args: argparse.Namespace, data: Data, clips: dict[str, Any], device: torch.device, fed: tuple[str, ...], steps: int
) -> dict[str, Tensor]:
    """From the seed's initial weights, SGD `steps` on the first full batch that feeds `fed`, by train.py's loop.

    Returns the mean `loss`, the `update` of all parameters (flat), and the joint `logits` of the test clips afterwards.
    """
    own = argparse.Namespace(**vars(args) | {"optimizer": "sgd", "learning_rate": 0.01})
    set_precision(own.precision, device)
    seed_everything(0)
    model = train.make_model(own, data, device)
    before = [p.detach().clone() for p in model.parameters()]
    plan = remix.batches_of(own.batch_size, own.batch_size, fed, generator=None) * steps
    optimizer, run_step = train.make_optimizer(model, own), graphed(train.train_step, own, device)
    numbers = train.train_epoch(model, clips["train"], plan, optimizer, 0, own, run_step=run_step)
    update = torch.cat([(p.detach() - old).flatten() for p, old in zip(model.parameters(), before, strict=True)])
    logits = predict(model, clips["test"], fed, 4 * own.batch_size, "test")
    return {"loss": torch.tensor([numbers["train_loss"]]), "update": update.cpu(), "logits": logits["joint"].cpu()}


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)).item()


def correctness_row(name: str, kind: str, errors: dict[str, float], limit: float) -> dict:
    shown = {key: f"{errors[key]:.1e}" if key in errors else None for key in ("inputs", "loss", "update", "logits")}
    passed = all(error <= limit * UPDATES.get(key, 1) for key, error in errors.items())  # False for NaN
    return {"setting": name, "batch": kind, **shown, "limit": f"{limit:g}", "within": "yes" if passed else "NO"}


def kinds(names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The kinds of batches that feed a plan of Remix: joint, and each modality's."""
    return {"joint": names, **{name: (name,) for name in names}}


# ------------------------------------------------------------------------------------------------------------- steps


def launches(function: Callable[[], None], device: torch.device) -> tuple[int, int | None]:
    """Kernels that `function` runs on a GPU and the host's launches of them; else operations, and None."""
    if device.type != "cuda":
        with Operations() as operations:
            function()
        return len(operations.done), None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        function()
        torch.cuda.synchronize()
    events = list(profiler.events() or ())
    kernels = [e for e in events if e.device_type.name == "CUDA"
               and not e.name.lower().startswith(("memcpy", "memset"))]  # fmt: skip
    started = [e for e in events if e.name.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch"))]
    return len(kernels), len(started)


def step_rows(name: str, setting: Setting) -> list[dict]:
    """Kernels and launches of one step of each kind: those of an epoch of two steps less those of one step."""
    args, rows = setting.args, []
    for kind, fed in kinds(setting.fed).items():
        size, counts = args.batch_size, []
        for steps in (1, 1, 2):  # the first makes what is made once
            clips = torch.arange(steps * size) % len(setting.clips["train"])
            plan = [remix.Batch(own, fed) for own in clips.split(size)]
            counts.append(launches(partial(setting.train, plan), setting.device))
        (_, few, many) = counts
        each = [None if a is None or b is None else b - a for a, b in zip(few, many, strict=True)]
        rows.append({"setting": name, "batch": kind, "kernels": each[0], "launches": each[1]})
    return rows


# ---------------------------------------------------------------------------------------------------------- settings


def epoch_seconds(seconds: dict[tuple[str, str], list[float]], name: str) -> dict[str, float]:
    """Median seconds of whole epochs: scoring, training, BatchNorm, evaluation."""
    middle = {phase: statistics.median(seconds[name, phase]) for phase in PHASES}
    rest = middle["refresh"] + middle["evaluate"]
    return {"joint": middle["joint"] + rest, "remix": middle["remix"] + rest}


def setting_row(
    name: str, row: Row, args: argparse.Namespace, epochs: dict[str, float] | None, memory: str | None
) -> dict:
    """The prediction, which is for the full shape, beside what was measured (None: nothing was)."""
    full = not args.small
    whole = epochs and args.warmup * epochs["joint"] + (args.epochs - args.warmup) * epochs["remix"]
    return {
        "setting": name,
        "joint epoch s": epochs and f"{epochs['joint']:.3g}", "predicted joint s": row.joint if full else None,
        "Remix epoch s": epochs and f"{epochs['remix']:.3g}", "predicted Remix s": row.remix if full else None,
        f"{args.epochs} epochs s": whole and f"{whole:.3g}", "predicted s": row.run if full else None,
        "peak memory GB": memory,
    }  # fmt: skip


def peak_memory(device: torch.device) -> str | None:
    return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f}" if device.type == "cuda" else None


# --------------------------------------------------------------------------------------------------------- whole run


def run_command(words: list[str], seconds: float) -> None:
    """`python train.py` with these flags, as at the prompt. Raises `RuntimeError` with the last line of its errors."""
    done = subprocess.run([sys.executable, "train.py", *words], cwd=REPO, capture_output=True, text=True,
                          timeout=seconds)  # fmt: skip
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])


def whole_run(
    name: str, row: Row, args: argparse.Namespace, root: Path, device: torch.device, epoch: dict, left: float
) -> dict:
    """A run of as many of the setting's epochs as there is time for, `epoch` being the seconds of one."""
    affordable = int((left - 60) / max(epoch.values()))  # a minute for start-up, compilation and checkpoints
    epochs = min(args.epochs, affordable)
    if epochs < 2:
        raise RuntimeError("no time left")
    warmup = max(1, args.warmup * epochs // args.epochs)
    words = flags_of(row, args, root, device.type)
    words += ["--epochs", str(epochs), "--warmup", str(warmup), "--log_path", str(root.parent), "--run_name", "whole"]
    clock = time.perf_counter()
    run_command(words, left)
    wall = time.perf_counter() - clock
    lines = [json.loads(line) for line in (root.parent / "whole" / "metrics.jsonl").read_text().splitlines()]
    inside = {key: sum(line.get(f"seconds_{key}") or 0 for line in lines) for key in ("score", "train", "eval")}
    share = epochs / args.epochs
    return {
        "setting": name, "epochs": epochs, "wall s": f"{wall:.1f}", **{f"{k} s": f"{v:.1f}" for k, v in inside.items()},
        "everything else s": f"{wall - sum(inside.values()):.1f}",
        "predicted score + train + eval s": f"{row.run * share:.0f}" if row.run and not args.small else None,
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- main


def choose_device(name: str) -> torch.device:
    if name != "cpu" and not torch.cuda.is_available():
        raise UserError("benchmarks.gpu: PyTorch sees no CUDA device here; rehearse with --device cpu --small")
    return distributed.start("cpu" if name == "cpu" else "cuda")


class Benchmark:
    """The parts, on one device and one folder. Each adds rows to `tables`."""

    def __init__(self, args: argparse.Namespace, device: torch.device, root: Path, timer: Timer):
        self.args, self.device, self.root, self.timer = args, device, root, timer
        self.tables: dict[str, list[dict]] = {title: [] for title in (
            "Settings", "Whole run", "Correctness against the CPU", "A training step", "Phases", "Notes")}  # fmt: skip
        self.notes = self.tables["Notes"]
        self.rates: dict[str, float] = {}
        self.epochs: dict[str, dict[str, float]] = {}
        self.flops = flops_per_clip(args.encoder, CLASSES, args.image_size, args.audio_shape)
        self.data: dict[str, Data] = {}

    def attempt(self, what: str, part: Callable[[], None]) -> None:
        """One part. On a machine nobody has seen yet, the failure of one must not lose the others."""
        if self.timer.left() <= 0:
            self.notes.append({"part": what, "note": "not measured: the time limit was reached"})
            return
        self.timer.say(what)
        try:
            with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # progress bars
                part()
        except Exception as error:  # whatever it is, it is one line of the result
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            self.notes.append({"part": what, "note": f"failed: {type(error).__name__}: {lines[0] if lines else ''}"})
            self.timer.say(self.notes[-1]["note"])

    def parsed(self, row: Row, device: str) -> argparse.Namespace:
        return train.parse_args(flags_of(row, self.args, self.root, device))

    def loaded(self, device: torch.device) -> Data:
        """The clips, on the device where they fit, else in memory."""
        if device.type not in self.data:
            row = Row(("--cache", "auto" if device.type == "cuda" else "ram"))
            self.data[device.type] = build_data(self.parsed(row, device.type), device)
        return self.data[device.type]

    def pack(self) -> None:
        clock = time.perf_counter()
        self.loaded(self.device)
        seconds = time.perf_counter() - clock
        self.notes.append({"part": "pack", "note": f"packed and loaded in {seconds:.1f} s, once for each dataset"})

    def check(self) -> None:
        host, data = torch.device("cpu"), fed_in(self.loaded(self.device), "fp32")
        names = data.spec.names
        own = self.parsed(Row(("--precision", "fp32")), "cpu")
        plan = remix.batches_of(own.batch_size, own.batch_size, names, generator=None)
        views = (torch.Generator().manual_seed(0) for _ in range(2))
        (there,) = HostCopy(data.clips["train"]).epoch(plan, next(views))
        (here,) = HostCopy(self.loaded(host).clips["train"]).epoch(plan, next(views))
        pairs = [(there.inputs[name], x) for name, x in here.inputs.items()]
        error = max(relative(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor))
        self.tables["Correctness against the CPU"].append(correctness_row("all", "joint", {"inputs": error}, 1e-2))
        clips = {part: HostCopy(own_clips) for part, own_clips in data.clips.items()}
        reference = {
            (kind, steps): first_steps(own, data, clips, host, fed, steps)
            for kind, fed in kinds(names).items()
            for steps in {row.steps for row in self.args.rows.values()}
        }
        for name, row in self.args.rows.items():
            self.attempt(f"correctness: {name}", partial(self.check_one, name, row, reference))

    def check_one(self, name: str, row: Row, reference: dict) -> None:
        own = self.parsed(row, self.device.type)
        data = fed_in(self.loaded(self.device), own.precision)
        for kind, fed in kinds(data.spec.names).items():
            found = first_steps(own, data, data.clips, self.device, fed, row.steps)
            errors = {key: relative(found[key], value) for key, value in reference[kind, row.steps].items()}
            self.tables["Correctness against the CPU"].append(correctness_row(name, kind, errors, row.limit))

    def measure(self, name: str, row: Row) -> None:
        own = self.parsed(row, self.device.type)
        if own.precision not in self.rates:
            set_precision(own.precision, self.device)
            side = 64 if self.args.small else None
            self.rates[own.precision] = product_rate(self.device, computed_in(own.precision), side=side)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        data = fed_in(self.loaded(self.device), own.precision)
        setting = Setting(name, {}, own, data, self.device, str(self.root.parent / "settings"))
        seconds = measure([setting], PHASES, self.args.rounds)
        memory = peak_memory(self.device)
        self.epochs[name] = epoch_seconds(seconds, name)
        self.tables["Settings"].append(setting_row(name, row, self.args, self.epochs[name], memory))
        self.tables["Phases"] += median_rows([setting], seconds, self.flops, self.rates)
        self.tables["A training step"] += step_rows(name, setting)

    def run(self) -> None:
        name = min(self.epochs, key=lambda name: self.epochs[name]["remix"])
        self.data.clear()  # the run has a GPU of its own
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        found = whole_run(name, self.args.rows[name], self.args, self.root, self.device, self.epochs[name],
                          self.timer.left())  # fmt: skip
        self.tables["Whole run"].append(found)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device, timer = choose_device(args.device), Timer(args.limit)
    about = machine(device)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        root = generate_folder(Path(folder) / "data", args.clips, args.test_clips, args.frame_size, args.audio_shape,
                               CLASSES)  # fmt: skip
        bench = Benchmark(args, device, root, timer)
        bench.attempt("pack", bench.pack)
        bench.attempt("correctness", bench.check)
        for name, row in args.rows.items():
            bench.attempt(f"setting {name}", partial(bench.measure, name, row))
            if name not in bench.epochs:
                bench.tables["Settings"].append(setting_row(name, row, args, None, None))
        bench.attempt("whole run", bench.run)
    about |= {f"matrix product {name} TFLOP/s": f"{rate / 1e12:.3g}" for name, rate in bench.rates.items()}
    about |= {key: getattr(args, key) for key in ("clips", "frame_size", "image_size", "audio_shape", "encoder",
                                                  "batch_size", "rounds")}  # fmt: skip
    about["seconds"] = round(time.perf_counter() - timer.start)
    save(None if args.small else "gpu", about, bench.tables)


if __name__ == "__main__":
    run_main(main)
