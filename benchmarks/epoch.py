"""What an epoch costs and what each choice saves: the product's own functions, all settings in turn in one process.

    python -m benchmarks.epoch                                    # official against ours, 128 clips, for 2 CPU cores
    python -m benchmarks.epoch --settings all                     # every choice by itself
    python -m benchmarks.epoch --preset gpu                       # CREMA-D's 6,698 clips, all settings, for a GPU
    python -m benchmarks.epoch --preset tiny                      # seconds, to see that it works; saves nothing

Each round runs every setting once; medians over the rounds. Phases: `load` feeds a joint epoch to nobody; `score` is
one prediction of all training clips with both encoders; `forward` the network alone on as many clips that lie ready;
`joint` a joint epoch; `remix` scoring and a Remix epoch; `evaluate` the test part. The partition is fixed, half of the
clips video and half audio, so that every setting has the same work. Data are generated; numbers do not depend on them.
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

import remix
import train
from benchmarks.common import (
    CREMAD_SHAPE,
    add_shape_flags,
    flops_per_clip,
    generate_folder,
    load_clips,
    machine,
    product_rate,
    save,
)
from dataset.clips import Clips
from dataset.specs import get_spec
from models import AVClassifier
from utils import distributed
from utils.acceleration import compile_in_place, compiled, default_precision, set_precision, use_huge_pages
from utils.cli import Parser, number
from utils.errors import UserError, run_main
from utils.seeding import seed_everything

PR_SET_THP_DISABLE = 41  # of linux/prctl.h: no huge pages for this process, whatever it asks for

PRESETS = {
    "cpu": {"clips": 128, "test_clips": 16, "settings": "ours,official"},
    "gpu": {"clips": 6698, "test_clips": 744, "settings": "all", "workers": 16},
    "tiny": {"clips": 16, "test_clips": 4, "settings": "ours,official", "batch_size": 8, "frame_size": (48, 36),
             "image_size": 32, "audio_shape": (33, 24), "model": "resnet18_thin"},
}  # fmt: skip
USUAL = CREMAD_SHAPE | {"batch_size": 64, "workers": 2}  # where a preset does not say
# What a setting changes of ours: resident clips, the masked encoder skipped, channels last, the default precision,
# BatchNorm folded into the convolutions that score, on a CPU huge pages.
SETTINGS = {
    "ours": {},
    "official": {"cache": "none", "masked_encoder": "run", "channels_last": False, "huge_pages": False},
    "files": {"cache": "none"},
    "ram": {"cache": "ram"},
    "run": {"masked_encoder": "run"},
    "default_layout": {"channels_last": False},
    "small_pages": {"huge_pages": False},
    "fp32": {"precision": "fp32"},
    "tf32": {"precision": "tf32"},
    "bf16": {"precision": "bf16"},
    "compile": {"compile": True},
    "bf16_compile": {"precision": "bf16", "compile": True},
}

PHASES = ("load", "score", "forward", "joint", "remix", "evaluate")


def phase_list(text: str) -> tuple[str, ...]:
    """An argparse type: `joint,remix`."""
    unknown = [name for name in text.split(",") if name not in PHASES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: unknown; allowed: {', '.join(PHASES)}")
    return tuple(text.split(","))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--preset", default="cpu", choices=PRESETS, help="clips, settings, shapes (cpu)")
    p.add_argument("--settings", metavar="A,B", help=f"all, or of {', '.join(SETTINGS)} (preset's)")
    p.add_argument("--phases", type=phase_list, default=PHASES, metavar="A,B", help=f"of {', '.join(PHASES)} (all)")
    p.add_argument("--clips", type=number(int, 4), help="training clips (preset's)")
    p.add_argument("--test_clips", type=number(int, 1), help="test clips (preset's)")
    add_shape_flags(p)
    p.set_defaults(**dict.fromkeys(CREMAD_SHAPE))  # the preset has a say before
    p.add_argument("--batch_size", type=number(int, 2), help="clips a step (64)")
    p.add_argument("--classes", type=number(int, 2), default=6, help="classes (6)")
    p.add_argument("--repeats", type=number(int, 1), default=5, help="rounds, after one that is not counted (5)")
    p.add_argument("--threads", type=number(int, 1), help="CPU threads (as PyTorch chooses)")
    p.add_argument("--workers", type=number(int, 0), help="processes that read files (2; gpu: 16)")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="CUDA where there is one (auto)")
    args = p.parse_args(argv)
    for name, value in (USUAL | PRESETS[args.preset]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


class Setting:
    """One way to train: a network, its optimizer and flags, on clips that settings may share."""

    def __init__(self, name: str, choices: dict, argv: list[str], device: torch.device, clips: dict[str, Clips]):
        self.name, self.clips, self.device = name, clips, device
        self.args = train.parse_args([*argv, "--masked_encoder", choices.get("masked_encoder", "skip")])
        self.precision = choices.get("precision", default_precision(device.type))
        self.huge_pages = choices.get("huge_pages", True)
        self.take_over()
        seed_everything(0)
        classes = int(clips["train"].labels.max()) + 1
        self.model = AVClassifier(classes, self.args.model, bf16=self.precision == "bf16").to(device)
        if choices.get("channels_last", True):
            self.model = self.model.to(memory_format=torch.channels_last)
        if choices.get("compile"):
            compile_in_place([self.model.audio_net, self.model.visual_net], device)
        self.optimizer = train.make_optimizer(self.model, self.args)
        self.ready = None

    def take_over(self) -> None:
        """Put what holds for the whole process as this setting has it."""
        set_precision(self.precision, self.device)
        allow_huge_pages(self.huge_pages)

    def plans(self) -> dict[str, list[remix.Batch]]:
        """A joint epoch's and a Remix epoch's: half of the clips keep audio."""
        count, order = len(self.clips["train"]), torch.Generator().manual_seed(0)
        half = torch.arange(count) % 2
        return {
            "joint": remix.batches_of(count, self.args.batch_size, "both", order),
            "remix": remix.reassemble(half, self.args.batch_size, "sequential", order),
        }

    def phases(self) -> dict:
        """Name -> function that runs the phase once."""
        plans = self.plans()
        return {
            "load": lambda: self.load(plans["joint"]),
            "score": self.score,
            "forward": self.forward,
            "joint": lambda: self.train(plans["joint"]),
            "remix": lambda: (self.score(), self.train(plans["remix"])),
            "evaluate": self.evaluate,
        }

    def warm_up(self) -> None:
        """Every kind of batch and phase once, so that files are cached and code is compiled."""
        plans = self.plans()
        for kept in ("both", "video", "audio"):
            self.train(next([batch] for plan in plans.values() for batch in plan if batch.kept == kept))
        self.score()
        self.forward()
        self.evaluate()

    def load(self, plan: list[remix.Batch]) -> None:
        for _ in self.clips["train"].epoch(plan, torch.Generator().manual_seed(0)):
            pass

    def train(self, plan: list[remix.Batch]) -> None:
        train.train_epoch(self.model, self.clips["train"], plan, self.optimizer, 0, self.args)

    def score(self) -> torch.Tensor:
        logits = train.predict(self.model, self.clips["train"], "both", 4 * self.args.batch_size, "score")
        return remix.decouple(remix.difficulty(logits["audio"], logits["video"])).cpu()

    @torch.inference_mode()
    def forward(self) -> None:
        """The network on one batch that lies ready, again and again, for as many clips as scoring has."""
        self.model.eval()
        full, count = 4 * self.args.batch_size, len(self.clips["train"])
        if self.ready is None:
            (first, *_) = remix.batches_of(count, full, "both", None)
            (batch,) = self.clips["train"].epoch([first])
            self.ready = batch.audio, batch.video
        for start in range(0, count, full):
            inputs = [x[: count - start] for x in self.ready]
            with compiled(len(inputs[0]) == full):
                self.model(*inputs)

    def evaluate(self) -> None:
        logits = train.predict(self.model, self.clips["test"], "both", 4 * self.args.batch_size, "test")
        train.evaluate(logits, self.clips["test"].labels, "test")

    def work(self, flops: dict) -> dict[str, float | None]:
        """FLOPs of each phase."""
        count, test = len(self.clips["train"]), len(self.clips["test"])
        forward = count * flops["both"]["forward"]
        plan = self.plans()["remix"]
        masked = {kept: "both" if self.args.masked_encoder == "run" else kept for kept in ("audio", "video")}
        return {
            "load": None,
            "score": forward,
            "forward": forward,
            "joint": count * flops["both"]["train"],
            "remix": forward + sum(len(batch.clips) * flops[masked[batch.kept]]["train"] for batch in plan),
            "evaluate": test * flops["both"]["forward"],
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
                clock = train.lap(0)[1]
                functions[phase]()
                seconds.setdefault((setting.name, phase), []).append(train.lap(clock)[0])
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
                "of matrix product": f"{flop / middle / rates[setting.precision]:.0%}" if flop else None,
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
    same = {"cuda": ("small_pages",), "cpu": ("ram", "fp32", "tf32")}[device.type]
    names = [name for name in SETTINGS if name not in same] if text == "all" else text.split(",")
    for name in names:
        if name not in SETTINGS:
            raise UserError(f"--settings {name}: unknown; allowed: all, {', '.join(SETTINGS)}")
    return ["ours", *(name for name in names if name != "ours")]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    use_huge_pages()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here")
    device = distributed.start([0] if args.device != "cpu" and torch.cuda.is_available() else [])
    names, about = choose_settings(args.settings, device), machine(device)
    resident = "device" if device.type == "cuda" else "ram"
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        clock = time.perf_counter()
        data = generate_folder(Path(folder) / "data", args.clips, args.test_clips, args.frame_size, args.audio_shape,
                               args.classes)  # fmt: skip
        argv = ["--train", "--dataset", "folder", "--data_root", str(data), "--device", device.type]
        argv += ["--model", args.model, "--image_size", str(args.image_size), "--batch_size", str(args.batch_size)]
        argv += ["--num_workers", str(args.workers), "--learning_rate", "1e-5"]
        paths: dict[str, dict[str, Clips]] = {}
        settings = []
        for name in names:
            cache = SETTINGS[name].get("cache", resident)
            if cache not in paths:
                paths[cache] = load_clips(train.parse_args(argv), cache, device)[1]
            settings.append(Setting(name, SETTINGS[name], argv, device, paths[cache]))
        print(f"{args.clips} clips made and packed in {time.perf_counter() - clock:.0f} s", flush=True)
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # progress bars
            try:
                seconds = measure(settings, args.phases, args.repeats)
            finally:
                allow_huge_pages(True)
        rates = {}
        for precision in {setting.precision for setting in settings}:
            set_precision(precision, device)
            rates[precision] = product_rate(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    flops = flops_per_clip(args.model, args.classes, get_spec("folder").frames, args.image_size, args.audio_shape)
    about |= {f"matrix product {name} TFLOP/s": f"{rate / 1e12:.3g}" for name, rate in rates.items()}
    about |= {"clips": args.clips, "frame_size": args.frame_size, "image_size": args.image_size,
              "audio_shape": args.audio_shape, "model": args.model, "batch_size": args.batch_size,
              "workers": args.workers, "load_after": round(os.getloadavg()[0], 2)}  # fmt: skip
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
