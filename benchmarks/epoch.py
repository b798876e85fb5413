"""Time per epoch, and the speed-up of each technique. Runs the real functions, all settings in turn in one process.

    python -m benchmarks.epoch                                    # official against ours, 128 clips, for 2 CPU cores
    python -m benchmarks.epoch --settings all                     # each technique separately
    python -m benchmarks.epoch --preset gpu                       # CREMA-D's 6,698 clips, all settings, for a GPU
    python -m benchmarks.epoch --preset tiny                      # smoke test, takes seconds, saves nothing

Each round runs every setting once; results are medians over rounds. Phases:

    load      load the batches of a joint epoch, without a network
    score     plan a Remix epoch: predict all training clips, then difficulty, partition, batches
    forward   forward pass of the network only, on the same number of preloaded clips
    joint     a joint epoch
    remix     score, then an epoch over homogeneous batches
    refresh   re-estimate the BatchNorm statistics after an epoch (the default): at most 1,024 clips forward. No other
              phase includes it: it sees all of the benchmark's 128 clips, but only a part of a real dataset
    evaluate  the test part

The Remix epoch uses a fixed partition, with equal shares of clips per modality, so that every setting does the same
work. The data are generated; timings do not depend on them.
"""

import argparse
import ctypes
import os
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stderr
from pathlib import Path

import torch
from torch.nn import functional as F

import remix
import train
from benchmarks.common import (
    CREMAD_SHAPE,
    add_shape_flags,
    fed_in,
    flops_per_clip,
    generate_folder,
    machine,
    product_rate,
    save,
)
from dataset.build import Data, build_data
from models import MODELS
from models.batchnorm import CLIPS, reestimate
from models.inference import predict
from utils import distributed
from utils.acceleration import compiled, computed_in, set_precision
from utils.cli import Parser, number
from utils.console import lap
from utils.errors import UserError, run_main
from utils.graphs import graphed
from utils.run import Run
from utils.seeding import seed_everything

PR_SET_THP_DISABLE = 41  # of linux/prctl.h: disables huge pages for this process

PRESETS = {
    "cpu": {"clips": 128, "test_clips": 16, "settings": "ours,official"},
    "gpu": {"clips": 6698, "test_clips": 744, "settings": "all", "workers": 16},
    "tiny": {"clips": 16, "test_clips": 4, "settings": "ours,official", "batch_size": 8, "frame_size": (48, 36),
             "image_size": 32, "audio_shape": (33, 24), "encoder": "resnet18_thin"},
}  # fmt: skip
USUAL = CREMAD_SHAPE | {"batch_size": 64, "workers": 2}  # where a preset does not say
# What a setting changes of ours: resident clips, the masked encoder skipped, channels last, the default precision.
SETTINGS = {
    "ours": {},
    "official": {"cache": "none", "masked_encoder": "run", "channels_last": False},
    "files": {"cache": "none"},
    "ram": {"cache": "ram"},
    "run": {"masked_encoder": "run"},
    "default_layout": {"channels_last": False},
    "huge_pages": {"huge_pages": True},
    "fp32": {"precision": "fp32"},
    "tf32": {"precision": "tf32"},
    "bf16": {"precision": "bf16"},
    "compile": {"compile": "encoders"},
    "bf16_compile": {"precision": "bf16", "compile": "encoders"},
    "bf16_graphs": {"precision": "bf16", "compile": "all"},
}

PHASES = ("load", "score", "forward", "joint", "remix", "refresh", "evaluate")


def phase_list(text: str) -> tuple[str, ...]:
    """An argparse type: `joint,remix`."""
    unknown = [name for name in text.split(",") if name not in PHASES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: unknown; allowed: {', '.join(PHASES)}")
    return tuple(text.split(","))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = Parser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--preset", default="cpu", choices=PRESETS, help="set of clips, settings and shapes (default: cpu)")
    p.add_argument("--settings", metavar="A,B", help=f"settings: all, {', '.join(SETTINGS)} (default: the preset's)")
    p.add_argument(
        "--phases", type=phase_list, default=PHASES, metavar="A,B", help=f"phases: {', '.join(PHASES)} (default: all)"
    )
    p.add_argument("--clips", type=number(int, 4), help="training clips (default: the preset's)")
    p.add_argument("--test_clips", type=number(int, 1), help="test clips (default: the preset's)")
    add_shape_flags(p)
    p.set_defaults(**dict.fromkeys(CREMAD_SHAPE))  # the preset has a say before
    p.add_argument("--model", default="late", choices=MODELS, help="architecture (default: late)")
    p.add_argument("--batch_size", type=number(int, 2), help="batch size (default: 64)")
    p.add_argument("--classes", type=number(int, 2), default=6, help="number of classes (default: 6)")
    p.add_argument("--repeats", type=number(int, 1), default=5, help="rounds after the warm-up (default: 5)")
    p.add_argument("--threads", type=number(int, 1), help="CPU threads (default: PyTorch's)")
    p.add_argument("--workers", type=number(int, 0), help="worker processes that read files (default: 2; gpu: 16)")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: GPU if any (default: auto)")
    args = p.parse_args(argv)
    for name, value in (USUAL | PRESETS[args.preset]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


class Setting:
    """One way to train: a network, its optimizer and flags, on data that settings may share."""

    def __init__(
        self, name: str, choices: dict, args: argparse.Namespace, data: Data, device: torch.device, log_path: str
    ):
        self.name, self.args, self.data, self.device = name, args, data, device
        self.clips, self.fed = data.clips, data.spec.names
        self.huge_pages = choices.get("huge_pages", False)
        self.run = Run(log_path, name, resume=False)
        self.run.writes = False  # nor prints
        self.take_over()
        seed_everything(0)
        self.model = train.make_model(args, data, device)
        if not choices.get("channels_last", True):
            self.model = self.model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        self.run_step = graphed(train.train_step, args, device)
        self.optimizer = train.make_optimizer(self.model, args)
        self.ready = None

    def take_over(self) -> None:
        """Apply the process-wide options of this setting."""
        set_precision(self.args.precision, self.device)
        allow_huge_pages(self.huge_pages)

    def plan(self, epoch: int) -> list[remix.Batch]:
        """The plan of epoch 0 (joint) or 1 (Remix, with the current network), as in train.py."""
        return train.plan_epoch(self.model, self.data, self.fed, None, epoch, self.args, self.run)[0]

    def plans(self) -> dict[str, list[remix.Batch]]:
        """A joint epoch's and a Remix epoch's: equal shares of the clips keep each modality."""
        shares = torch.arange(len(self.clips["train"])) % len(self.fed)
        keep, order = F.one_hot(shares, len(self.fed)).bool(), torch.Generator().manual_seed(0)
        equal = remix.reassemble(keep, self.fed, self.args.batch_size, self.args.reassemble, order)
        return {"joint": self.plan(0), "remix": equal}

    def phases(self) -> dict:
        """Name -> function that runs the phase once."""
        plans = self.plans()
        return {
            "load": lambda: self.load(plans["joint"]),
            "score": lambda: self.plan(1),
            "forward": self.forward,
            "joint": lambda: self.train(plans["joint"]),
            "remix": lambda: (self.plan(1), self.train(plans["remix"])),
            "refresh": lambda: reestimate(self.model, self.clips["train"], self.fed, self.args.batch_size, 0, 0),
            "evaluate": self.evaluate,
        }

    def warm_up(self) -> None:
        """Every kind of batch and phase once, so that files are cached and code is compiled."""
        for batch in {batch.fed: batch for plan in self.plans().values() for batch in reversed(plan)}.values():
            self.train([batch])
        self.plan(1)
        self.forward()
        self.evaluate()

    def load(self, plan: list[remix.Batch]) -> None:
        for _ in self.clips["train"].epoch(plan, torch.Generator().manual_seed(0)):
            pass

    def train(self, plan: list[remix.Batch]) -> None:
        train.train_epoch(self.model, self.clips["train"], plan, self.optimizer, 0, self.args, run_step=self.run_step)

    @torch.inference_mode()
    def forward(self) -> None:
        """Forward passes on one preloaded batch, repeated for as many clips as scoring has."""
        self.model.eval()
        full, count = 4 * self.args.batch_size, len(self.clips["train"])
        if self.ready is None:
            (first, *_) = remix.batches_of(count, full, self.fed, None)
            (batch,) = self.clips["train"].epoch([first])
            self.ready = batch.inputs
        for start in range(0, count, full):
            size = min(full, count - start)
            with compiled(size == full):
                self.model({name: x[:size] for name, x in self.ready.items()}, self.fed)

    def evaluate(self) -> None:
        logits = predict(self.model, self.clips["test"], self.fed, 4 * self.args.batch_size, "test")
        train.evaluate(logits, self.clips["test"].labels, "test", self.args)

    def work(self, flops: dict) -> dict[str, float | None]:
        """FLOPs of each phase."""
        count, test = len(self.clips["train"]), len(self.clips["test"])
        forward, whole = flops["joint"]["forward"], self.args.masked_encoder == "run"
        homogeneous = sum(
            len(batch.clips) * flops["joint" if whole else batch.fed[0]]["train"] for batch in self.plans()["remix"]
        )
        return {
            "load": None,
            "score": count * forward,
            "forward": count * forward,
            "joint": count * flops["joint"]["train"],
            "remix": count * forward + homogeneous,
            "refresh": min(count, CLIPS) * forward,
            "evaluate": test * forward,
        }


def allow_huge_pages(allowed: bool) -> None:
    """For this process, and for those that it starts."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, int(not allowed), 0, 0, 0)


def measure(settings: list[Setting], phases: tuple[str, ...], repeats: int) -> dict[tuple[str, str], list[float]]:
    """(setting, phase) -> seconds in each round."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for setting in settings:
        setting.take_over()
        setting.warm_up()
    for repeat in range(repeats):
        for setting in settings:
            setting.take_over()
            functions = setting.phases()
            for phase in phases:
                clock = lap(0)[1]
                functions[phase]()
                seconds.setdefault((setting.name, phase), []).append(lap(clock)[0])
        print(f"round {repeat + 1} of {repeats} done", flush=True)
    return seconds


def median_rows(settings: list[Setting], seconds: dict, flops: dict, rates: dict[str, float]) -> list[dict]:
    rows = []
    for setting in settings:
        work = setting.work(flops)
        for phase, flop in work.items():
            if (setting.name, phase) not in seconds:
                continue
            times = seconds[setting.name, phase]
            middle = statistics.median(times)
            clips = len(setting.clips["test" if phase == "evaluate" else "train"])
            rows.append({
                "setting": setting.name, "phase": phase, "seconds": f"{middle:.4g}", "lowest": f"{min(times):.4g}",
                "highest": f"{max(times):.4g}", "clips/s": f"{clips / middle:.4g}",
                "TFLOP/s": f"{flop / middle / 1e12:.3g}" if flop else None,
                "of matrix product": f"{flop / middle / rates[setting.args.precision]:.0%}" if flop else None,
            })  # fmt: skip
    return rows


def ratio_rows(seconds: dict, names: list[str]) -> list[dict]:
    """Ratios within a round, so that what slows the machine for a while slows both; the median over the rounds."""
    pairs = [("Remix epoch, how much faster than " + name, (name, "remix"), ("ours", "remix")) for name in names[1:]]
    pairs += [("joint epoch, how much faster than " + name, (name, "joint"), ("ours", "joint")) for name in names[1:]]
    pairs += [(f"{name}: joint epoch / Remix epoch", (name, "joint"), (name, "remix")) for name in names]
    pairs += [(f"{name}: scoring / bare forward", (name, "score"), (name, "forward")) for name in names]
    rows = []
    for title, above, below in pairs:
        if above not in seconds or below not in seconds:
            continue
        ratios = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
        rows.append({"ratio of seconds": title, "median": f"{statistics.median(ratios):.3f}", "lowest":
                     f"{min(ratios):.3f}", "highest": f"{max(ratios):.3f}", "rounds": len(ratios)})  # fmt: skip
    return rows


def choose_settings(text: str, device: torch.device) -> list[str]:
    """Names asked for, ours first. `all` leaves out what is the same as another on this device."""
    same = {"cuda": ("huge_pages",), "cpu": ("ram", "fp32", "tf32")}[device.type]
    names = [name for name in SETTINGS if name not in same] if text == "all" else text.split(",")
    for name in names:
        if name not in SETTINGS:
            raise UserError(f"--settings {name}: unknown; allowed: all, {', '.join(SETTINGS)}")
    return ["ours", *(name for name in names if name != "ours")]


def flags_of(choices: dict, args: argparse.Namespace, data: str, device: str, cache: str) -> list[str]:
    """The words for train.py of a setting: epoch 0 is joint, epoch 1 Remix."""
    words = [
        "--train",
        "--dataset",
        "folder",
        "--data_root",
        data,
        "--device",
        device,
        "--warmup",
        "1",
        "--epochs",
        "2",
    ]
    words += ["--model", args.model, "--encoder", args.encoder]
    words += ["--image_size", str(args.image_size), "--batch_size", str(args.batch_size)]
    words += ["--num_workers", str(args.workers), "--learning_rate", "1e-5"]
    words += ["--cache", choices.get("cache", cache), "--masked_encoder", choices.get("masked_encoder", "skip")]
    words += ["--precision", choices["precision"]] if "precision" in choices else []
    return [*words, "--compile", choices["compile"]] if choices.get("compile") else words


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch asks for them, `allow_huge_pages` decides
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here")
    device = distributed.start(args.device, "0" if args.device != "cpu" and torch.cuda.is_available() else None)
    names, about = choose_settings(args.settings, device), machine(device)
    resident = "device" if device.type == "cuda" else "ram"
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        clock = time.perf_counter()
        data = generate_folder(Path(folder) / "data", args.clips, args.test_clips, args.frame_size, args.audio_shape,
                               args.classes)  # fmt: skip
        paths: dict[str, Data] = {}
        settings = []
        for name in names:
            own = train.parse_args(flags_of(SETTINGS[name], args, str(data), device.type, resident))
            if own.cache not in paths:
                paths[own.cache] = build_data(own, device)
            settings.append(Setting(name, SETTINGS[name], own, fed_in(paths[own.cache], own.precision), device, folder))
        print(f"{args.clips} clips made and packed in {time.perf_counter() - clock:.0f} s", flush=True)
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # progress bars
            try:
                seconds = measure(settings, args.phases, args.repeats)
            finally:
                allow_huge_pages(True)
        rates = {}
        for precision in {setting.args.precision for setting in settings}:
            set_precision(precision, device)
            rates[precision] = product_rate(device, computed_in(precision))
    flops = flops_per_clip(args.encoder, args.classes, args.image_size, args.audio_shape, model=args.model)
    about |= {f"matrix product {name} TFLOP/s": f"{rate / 1e12:.3g}" for name, rate in rates.items()}
    about |= {"clips": args.clips, "frame_size": args.frame_size, "image_size": args.image_size,
              "audio_shape": args.audio_shape, "encoder": args.encoder, "model": args.model,
              "batch_size": args.batch_size, "workers": args.workers,
              "load_after": round(os.getloadavg()[0], 2)}  # fmt: skip
    ratios = ratio_rows(seconds, names)
    work = [{"fed": fed, "GFLOP forward": f"{c['forward'] / 1e9:.4g}", "GFLOP forward and backward":
             f"{c['train'] / 1e9:.4g}"} for fed, c in flops.items()]  # fmt: skip
    save(
        None if args.preset == "tiny" else "epoch",
        about,
        {"Ratios": ratios, "Medians": median_rows(settings, seconds, flops, rates), "One clip": work},
    )


if __name__ == "__main__":
    run_main(main)
