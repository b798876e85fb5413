"""What a dataset of VGGSound's size asks for: 200,000 clips of 309 classes, on a CPU and, by calculation, on GPUs.

    python -m benchmarks.scale                   # about three minutes on one core, 4 GB of memory; writes a result
    python -m benchmarks.scale --clips 20000     # a tenth of it

Measured here: the real functions that handle all clips at once (scoring, partition, plan of an epoch, its files, F1)
for an eighth, a quarter, half and all of the clips, each in its own process, with the exponent of their growth; and the
start of a run on generated files, with and without the record of headers.

Calculated: one training step of each kind and a scoring batch are run on PyTorch's meta device, which computes nothing,
and their operators counted: number, bytes read and written, floating-point operations. An operator takes the longest of
bytes / (85 % of the memory bandwidth), operations / (50 % of the peak) and the time between two launches. These shares
are assumptions, not measurements. No GPU is used. The same calculation for CREMA-D on an H200 stands beside predictions
made from counted CUDA kernels, which contain casts, evaluation and the refresh of BatchNorm too: it is too low by the
ratio in that table, and so may be the others.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import remix
from benchmarks.common import generate_folder, machine, save
from benchmarks.counting import Operation, Operations
from benchmarks.packing import Peaks
from dataset.augment import draw_views
from dataset.files import fed_frames
from dataset.folder import load_folder
from dataset.headers import KnownHeaders
from dataset.pack import frame_sizes, is_packed
from dataset.specs import VIDEO, Modality, get_spec
from models import build_model
from models.encoders import encoder_list
from utils.cli import Parser, number
from utils.errors import UserError, run_main
from utils.metrics import confusion, f1_macro
from utils.partitions import Partitions
from utils.run import Run


class Shape(NamedTuple):
    """A dataset: clips, classes, stored frames and their size (height, width), array, frames fed, and side fed."""

    clips: int
    classes: int
    stored: int
    frame: tuple[int, int]
    array: tuple[int, int]
    fed: int
    side: int = 224


class Gpu(NamedTuple):
    """Data-sheet values of a GPU: dense operations/s by precision, bytes/s of memory, and bytes of memory."""

    tf32: float
    bf16: float
    memory: float
    size: float


CREMAD = Shape(6698, 6, 3, (360, 480), (257, 188), 2)
VGGSOUND = Shape(200_000, 309, 10, (256, 341), (1024, 128), 3)  # fed as Kinetics-Sounds is
GPUS = {"H100 SXM": Gpu(495e12, 989e12, 3.35e12, 80e9), "H200 SXM": Gpu(495e12, 989e12, 4.8e12, 141e9)}
PEAK, BANDWIDTH = 0.5, 0.85  # shares of the data sheet that operators are assumed to reach
LAUNCH = 5e-6  # seconds between two operators launched one by one; none inside a CUDA graph
LINK = 0.8 * 450e9  # bytes/s that a ring of NVLink 4 carries per direction
LATENCY = 20e-6  # seconds of a small collective among eight GPUs
PCIE = 50e9  # bytes/s from the host to one GPU
GATHER = 8e9  # bytes/s that one core copies from the pack to pinned memory
AUGMENT = 28e6 / (480 * 360)  # bytes of traffic of the augmentation per stored pixel of a frame: 3.5 GB for 64 clips
PREDICTED = {("tf32", False): (2.08, 2.04), ("bf16", False): (1.25, 1.45)}  # joint, Remix epoch of CREMA-D on an H200

# ---------------------------------------------------------------------------------------------------- measured here


def everything(clips: int, classes: int, folder: Path) -> dict[str, Callable[[], object]]:
    """Every function that handles all clips at once, as train.py calls it, on random logits of two modalities."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(clips, classes, generator=generator) for _ in range(2)]
    labels = torch.randint(0, classes, (clips,), generator=generator)
    names, fed = [f"clip_{i:011d}_{i % 1000:06d}" for i in range(clips)], get_spec("folder").names
    keep = remix.decouple(torch.rand(clips, 2, generator=generator))
    counts, sizes = torch.full((clips,), VGGSOUND.stored), torch.tensor([VGGSOUND.frame]).expand(clips, 2)
    run = Run(str(folder), "run", resume=False)
    run.begin({})
    partitions = Partitions(folder / "partitions.npz")
    partitions.epochs = list(range(49))
    kl = torch.rand(clips, 2, generator=generator)
    partitions.kl, partitions.keep = [kl.numpy()] * 49, [keep.numpy()] * 49
    texts = [str(label) for label in labels.tolist()]
    table = dict(zip(fed, kl.unbind(1), strict=True))
    return {
        "difficulty": lambda: remix.difficulty(logits),
        "decouple": lambda: remix.decouple(kl),
        "reassemble": lambda: [remix.reassemble(keep, fed, 64, order, generator) for order in remix.ORDERS],
        "views of an epoch": lambda: draw_views(counts, sizes, VGGSOUND.fed, generator),
        "F1 and confusion": lambda: (f1_macro(logits[0], labels), confusion(logits[0], labels)),
        "files of a scoring": lambda: run.partition(0, names, texts, table, keep),
        "partitions.npz, scoring 50": lambda: partitions.add(49, names, list(fed), kl.numpy(), keep.numpy()),
    }


def private_mb() -> float:
    """Private memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def all_functions(clips: int, classes: int) -> dict[str, dict[str, float]]:
    """CPU seconds of each function of `everything`, and the peak of private memory beyond what there was before."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, function in everything(clips, classes, Path(folder)).items():
            peaks, before, clock = Peaks(), private_mb(), time.process_time()
            peaks.start()
            function()
            seconds = time.process_time() - clock
            peaks.done.set()
            peaks.join()
            found[name] = {"seconds": seconds, "memory": max(0.0, peaks.highest["RssAnon"] - before)}
    return found


def bookkeeping(clips: int, classes: int) -> list[dict]:
    """Seconds and memory of every function for several numbers of clips, and the exponent of its growth."""
    found, counts = {}, [clips // 8, clips // 4, clips // 2, clips]
    for count in counts:
        words = ["--functions", "--clips", str(count), "--classes", str(classes)]
        done = subprocess.run([sys.executable, "-m", "benchmarks.scale", *words], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{count} clips failed: {done.stderr.strip().splitlines()[-1:]}")
        found[count] = json.loads(done.stdout.splitlines()[-1])
    rows = []
    for name in found[clips]:
        seconds = [found[count][name]["seconds"] for count in counts]
        slope = np.polyfit(np.log(counts), np.log(np.maximum(seconds, 1e-6)), 1)[0]
        times = {f"{count:,} clips, s": f"{value:.3g}" for count, value in zip(counts, seconds, strict=True)}
        memory = f"{found[clips][name]['memory']:.0f}"
        rows.append({"function": name} | times | {"grows as N to the": f"{slope:.2f}", "memory, MB": memory})
    return rows


def start_up(files: int, clips: int) -> list[dict]:
    """CPU seconds of reading a folder of `files` clips of ten frames: first start, later starts; scaled to `clips`."""
    found_in: dict[str, list[float]] = {"first start": [], "later starts": []}
    with tempfile.TemporaryDirectory() as folder:
        root = generate_folder(Path(folder) / "data", files, 10, (48, 36), (32, 32), stored_frames=VGGSOUND.stored)
        for name in ("first start", *["later starts"] * 3):
            clock = time.process_time()
            found = load_folder(root, get_spec("folder"))
            part = found.parts["train"]
            frame_sizes(part.files[VIDEO])
            is_packed(root, "train", part, {VIDEO: (36, 48)}, found.shapes)  # the key: a stat of every packed file
            if isinstance(found.known, KnownHeaders):
                found.known.save()
            found_in[name].append(time.process_time() - clock)
    return [
        {"start": name, f"{files:,} clips, CPU s": f"{(middle := statistics.median(seconds)):.2f}",
         f"scaled to {clips:,} clips": f"{middle * clips / files:.0f}", "n": len(seconds)}
        for name, seconds in found_in.items()
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------------- calculated


def seconds(operations: list[Operation], gpu: Gpu, precision: str, graphs: bool) -> float:
    """Predicted seconds of counted operations. bf16 halves the bytes: activations are most of them."""
    peak, share = (gpu.bf16, 0.5) if precision == "bf16" else (gpu.tf32, 1.0)
    least = 0.0 if graphs else LAUNCH
    return sum(max(least, share * one.bytes / (BANDWIDTH * gpu.memory), one.flops / (PEAK * peak))
               for one in operations)  # fmt: skip


class Steps(NamedTuple):
    """Counted work of a training step by what is fed, of a scoring batch (four times the clips); parameters."""

    train: dict[str, list[Operation]]
    score: list[Operation]
    parameters: dict[str, int]
    batch: int


def count_steps(shape: Shape, batch: int, encoder: str) -> Steps:
    """Count the operators of a step of `batch` clips per kind of batch, on the meta device."""
    with torch.device("meta"):
        modalities = tuple(replace(m, frames=shape.fed) for m in get_spec("folder").modalities)
        shapes = {m.name: shape.array for m in modalities if m.kind == "array"}
        network = build_model(modalities, shapes, shape.classes, encoder, device="meta", image_size=shape.side)
        train = {}
        for name, fed in {"joint": network.names, **{name: (name,) for name in network.names}}.items():
            with Operations() as counted:
                losses_of(network, inputs_of(shape, batch, fed, modalities), fed).backward()
            stepped = sum(p.numel() for p in network.parameters() if p.grad is not None)
            # Fused Adam in float32: weight, gradient and two moments are read, all but the gradient written.
            counted.done.append(Operation("optimizer", 28 * stepped, 0))
            if len(fed) > 1 or any(m.kind == "frames" for m in modalities if m.name in fed):
                counted.done.append(augmentation(shape, batch))
            network.zero_grad(set_to_none=True)
            train[name] = counted.done
        network.eval()
        with torch.no_grad(), Operations() as score:
            network(inputs_of(shape, 4 * batch, network.names, modalities), network.names)
        score.done.append(augmentation(shape, 4 * batch))
    parameters = {name: sum(p.numel() for p in own.parameters()) for name, own in network.encoders.items()}
    parameters["heads"] = sum(p.numel() for p in network.parameters()) - sum(parameters.values())
    return Steps(train, score.done, parameters, batch)


def augmentation(shape: Shape, batch: int) -> Operation:
    """Resizing the frames of a batch."""
    return Operation("augmentation", AUGMENT * math.prod(shape.frame) * shape.fed * batch, 0)


def inputs_of(shape: Shape, batch: int, fed: tuple[str, ...], modalities: tuple[Modality, ...]) -> dict[str, Tensor]:
    sizes = {m.name: (batch, 1, *shape.array) if m.kind == "array" else (batch, shape.fed, 3, shape.side, shape.side)
             for m in modalities}  # fmt: skip
    return {name: torch.empty(*sizes[name], device="meta") for name in fed}


def losses_of(network: nn.Module, inputs: dict[str, Tensor], fed: tuple[str, ...]) -> Tensor:
    """The sum of the losses of train.py, for one backward pass."""
    output = network(inputs, fed)
    labels = torch.zeros(len(output.joint), dtype=torch.long, device="meta")
    return torch.stack([F.cross_entropy(logits, labels) for logits in output.heads.values()]).sum()


class Epoch(NamedTuple):
    """Predicted seconds of an epoch and of its parts."""

    step: float
    reduce: float
    score: float
    gather: float
    whole: float


def epoch(
    shape: Shape, steps: Steps, gpu: Gpu, precision: str, graphs: bool, gpus: int, remixed: bool, serial: float
) -> Epoch:
    """One epoch on `gpus` GPUs, each with `steps.batch` clips a step; half of the clips keep each modality.

    `serial` seconds of bookkeeping come on top, which every process does for all clips.
    """
    rounds = shape.clips / (steps.batch * gpus)
    kinds = [name for name in steps.train if (name == "joint") != remixed]
    step = statistics.mean(seconds(steps.train[name], gpu, precision, graphs) for name in kinds)
    reduce = 0.0
    if gpus > 1:
        sent = 4 * statistics.mean(steps.parameters["heads"] + sum(
            count for own, count in steps.parameters.items() if own != "heads" and name in ("joint", own))
            for name in kinds)  # fmt: skip
        layers = 20 * (1 if remixed else 2)  # BatchNorm layers: statistics forward, gradients backward
        reduce = 2 * (gpus - 1) / gpus * sent / LINK + (1 + 2 * layers) * LATENCY
    score = (seconds(steps.score, gpu, precision, graphs) * rounds / 4 + serial) if remixed else 0.0
    if remixed and gpus > 1:
        score += 2 * 4 * 3 * shape.clips * shape.classes / LINK  # logits of three heads, summed over processes
    frames, array = shape.fed * 3 * math.prod(shape.frame), 4 * math.prod(shape.array)
    fed = shape.clips * ((frames + array) * (1.5 if remixed else 1.0))  # scoring both, training one or both
    gather = max(fed / gpus / PCIE, fed / GATHER / 8)  # eight cores of the host gather for all GPUs
    return Epoch(step, reduce, score, gather, max(rounds * (step + reduce) + score, gather))


def calibration(encoder: str) -> list[dict]:
    """The calculation for CREMA-D on an H200 beside the predictions from counted kernels."""
    steps, gpu, rows = count_steps(CREMAD, 64, encoder), GPUS["H200 SXM"], []
    for (precision, graphs), predicted in PREDICTED.items():
        found = [epoch(CREMAD, steps, gpu, precision, graphs, 1, remixed, 0.0) for remixed in (False, True)]
        for kind, one, other in zip(("joint", "Remix"), found, predicted, strict=True):
            rows.append({"epoch": kind, "precision": precision, "this calculation, s": f"{one.whole:.2f}",
                         "from counted kernels, s": other, "ratio": f"{other / one.whole:.2f}"})  # fmt: skip
    return rows


def scaling(shape: Shape, encoder: str, serial: float) -> list[dict]:
    """Epochs on 1 to 8 GPUs, with the global batch of 64 kept and with 64 clips on each GPU."""
    rows, by_batch = [], {batch: count_steps(shape, batch, encoder) for batch in (64, 32, 16, 8)}
    for name, gpu in GPUS.items():
        for gpus in (1, 2, 4, 8):
            for batch in dict.fromkeys((64 // gpus, 64)):
                steps = by_batch[batch]
                found = {(kind, graphs): epoch(shape, steps, gpu, "bf16", graphs, gpus, kind == "Remix", serial)
                         for kind in ("joint", "Remix") for graphs in (False, True)}  # fmt: skip
                plain, best = found["Remix", False], found["Remix", True]
                rows.append({
                    "GPU": name, "GPUs": gpus, "global batch": batch * gpus,
                    "joint epoch, s": f"{found['joint', False].whole:.0f}", "Remix epoch, s": f"{plain.whole:.0f}",
                    "Remix, CUDA graphs, s": f"{best.whole:.0f}", "step, ms": f"{1e3 * plain.step:.1f}",
                    "all-reduce, ms": f"{1e3 * plain.reduce:.1f}", "scoring, s": f"{plain.score:.0f}",
                    "data path, s": f"{plain.gather:.0f}",
                    "60 epochs, h": f"{(10 * found['joint', False].whole + 50 * plain.whole) / 3600:.1f}",
                })  # fmt: skip
    return rows


def memory(shape: Shape, encoder: str) -> list[dict]:
    """Bytes that a run needs, by what and where."""
    steps = count_steps(shape, 64, encoder)
    weights, frames = sum(steps.parameters.values()), len(fed_frames(shape.stored, shape.fed))
    largest = max(sum(one.bytes for one in done) for done in steps.train.values())
    arrays, rows = 4 * math.prod(shape.array) * shape.clips, []
    for side in (None, 256, 128):
        scale = 1 if side is None else min(1, side / min(shape.frame))
        pixels = math.prod(round(length * scale) for length in shape.frame)
        rows.append((f"pack, --pack_size {side or 'as stored'}: {frames} of {shape.stored} frames, arrays",
                     "disk, page cache of the host", shape.clips * frames * 3 * pixels + arrays))  # fmt: skip
    rows += [
        ("arrays alone", "", arrays),
        ("weights, gradients, two moments of Adam", "GPU", 16 * weights),
        ("copy of the checkpoint for the thread that writes it", "host, page-locked", 12 * weights),
        ("logits of a scoring, three heads", "GPU", 3 * 4 * shape.clips * shape.classes),
        ("traffic of a joint step of 64 clips (float32)", "GPU", largest),
        ("partitions.npz after 50 scorings", "disk, host", 50 * shape.clips * 2 * 5),
    ]
    return [{"what": what, "where": where, "GB": f"{size / 1e9:.2g}"} for what, where, size in rows]


def parse_args() -> Namespace:
    p = Parser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--clips", type=number(int, 80), default=VGGSOUND.clips, help="number of clips (default: 200000)")
    p.add_argument("--classes", type=number(int, 2), default=VGGSOUND.classes, help="classes (default: 309)")
    p.add_argument("--encoder", type=encoder_list, default="resnet18", metavar="NAME", help="(default: resnet18)")
    p.add_argument("--files", type=number(int, 10), default=2000, help="clips of the generated folder (default: 2000)")
    p.add_argument("--functions", action="store_true", help=argparse.SUPPRESS)
    return p.parse_args()


def main() -> None:
    args = parse_args()
    if args.functions:
        print(json.dumps(all_functions(args.clips, args.classes)))
        return
    about = machine(torch.device("cpu"))
    shape = VGGSOUND._replace(clips=args.clips, classes=args.classes)
    handled = bookkeeping(args.clips, args.classes)
    # Every epoch: all of them; train.py computes the KL twice, for the choice and for the files.
    serial = sum(float(row[f"{args.clips:,} clips, s"]) * (1 + (row["function"] == "difficulty")) for row in handled)
    tables = {
        "Functions that handle all clips at once, CPU seconds, and their peak of memory": handled,
        "Start on generated files": start_up(args.files, args.clips),
        "Memory": memory(shape, args.encoder),
        "Calculation for CREMA-D on an H200, batch 64": calibration(args.encoder),
        "Calculated epochs, bf16": scaling(shape, args.encoder, serial),
    }
    about |= {"clips": args.clips, "classes": args.classes, "encoder": args.encoder, "peak_share": PEAK,
              "bandwidth_share": BANDWIDTH, "launch_us": 1e6 * LAUNCH, "load_after": round(os.getloadavg()[0], 2),
              "max_rss_MB": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024}  # fmt: skip
    save("scale", about, tables)


if __name__ == "__main__":
    run_main(main)
