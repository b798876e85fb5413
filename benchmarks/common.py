"""Common parts of the benchmarks: generated training folders, FLOPs per clip, machine description, saved tables."""

import argparse
import copy
import json
import os
import shlex
import statistics
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.saving import new_result
from dataset.build import Data
from dataset.prepare.video import JPEG_QUALITY
from dataset.specs import Modality, get_spec
from models import build_model
from models.encoders import encoder_list
from utils.acceleration import computed_in
from utils.cli import Parser, number
from utils.console import lap
from utils.run import environment

MODALITIES = get_spec("folder").modalities  # of the generated folders
PICTURES = 16  # different frames and spectrograms; the other files are hard links to them
CREMAD_SHAPE = {"frame_size": (480, 360), "image_size": 224, "audio_shape": (257, 188), "encoder": "resnet18"}


def pair(text: str) -> tuple[int, int]:
    """An argparse type: `480x360` -> (480, 360)."""
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text}: two numbers are wanted, such as 480x360")
    return int(sides[0]), int(sides[1])


def add_shape_flags(p: Parser, shape: dict | None = None) -> None:
    """What clips and network are like, with the defaults of `shape`: CREMA-D's, if not given."""
    shape = shape or CREMAD_SHAPE
    frames, spectrogram = ("x".join(map(str, shape[name])) for name in ("frame_size", "audio_shape"))
    p.add_argument("--frame_size", type=pair, metavar="WxH", help=f"size of the JPEGs, pixels (default: {frames})")
    p.add_argument(
        "--image_size",
        type=number(int, 8),
        metavar="S",
        help=f"side of the frames fed to the network, pixels (default: {shape['image_size']})",
    )
    p.add_argument("--audio_shape", type=pair, metavar="FxW", help=f"shape of the arrays (default: {spectrogram})")
    p.add_argument("--encoder", type=encoder_list, metavar="NAME", help=f"image encoder (default: {shape['encoder']})")
    p.set_defaults(**shape)


def command() -> str:
    """The command of the benchmark, without the path of the repository."""
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


# ------------------------------------------------------------------------------------------------------------- data


def generate_folder(
    root: Path,
    train_clips: int,
    test_clips: int,
    frame_size: tuple[int, int],
    audio_shape: tuple[int, int],
    classes: int = 6,
    stored_frames: int = 3,
) -> Path:
    """A training folder of JPEGs of `frame_size` (width, height) and arrays of `audio_shape`; labels go round.

    Files are links to a few: decoding costs the same, making thousands of clips takes seconds and little disk.
    """
    rng = np.random.default_rng(0)
    (root / "models").mkdir(parents=True)
    for i in range(PICTURES):
        image = picture(frame_size, rng)
        cv2.imwrite(str(root / "models" / f"{i}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        np.save(root / "models" / f"{i}.npy", rng.normal(-4, 3, audio_shape).astype(np.float32))
    for part, count in (("train", train_clips), ("test", test_clips)):
        names = [f"{part}_{i:06d}" for i in range(count)]
        for i, name in enumerate(names):
            for modality in MODALITIES:
                link_clip(root, modality, name, i, stored_frames)
        (root / f"{part}.csv").write_text("".join(f"{name},c{i % classes:04d}\n" for i, name in enumerate(names)))
    (root / "stat.csv").write_text("".join(f"c{i:04d}\n" for i in range(classes)))
    return root


def link_clip(root: Path, modality: Modality, name: str, number: int, stored_frames: int) -> None:
    """The files of clip `name` in one modality, as links to the models."""
    folder = root / modality.folder
    if modality.kind == "frames":
        (folder / name).mkdir(parents=True)
        for k in range(stored_frames):
            os.link(root / "models" / f"{(number + k) % PICTURES}.jpg", folder / name / f"frame_{k:05d}.jpg")
    else:
        folder.mkdir(exist_ok=True)
        os.link(root / "models" / f"{number % PICTURES}.npy", folder / f"{name}.npy")


def picture(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(height, width, 3) uint8: soft shapes in a little noise, which JPEG compresses about as it does a face."""
    width, height = size
    coarse = rng.integers(0, 256, (max(2, height // 24), max(2, width // 24), 3), dtype=np.uint8)
    soft = cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC).astype(np.float32)
    return np.clip(soft + rng.normal(0, 3, (height, width, 3)), 0, 255).astype(np.uint8)


def fed_in(data: Data, precision: str) -> Data:
    """`data` with its resident clips fed in the type that train.py feeds in this precision; the clips are shared."""
    clips = {part: copy.copy(own) for part, own in data.clips.items()}
    for own in clips.values():
        own.feed = own.feed._replace(dtype=computed_in(precision))
    return data._replace(clips=clips)


# ------------------------------------------------------------------------------------------------------------- work


def flops_per_clip(
    encoder: str,
    classes: int,
    image_size: int,
    audio_shape: tuple[int, int],
    modalities: tuple[Modality, ...] = MODALITIES,
    model: str = "late",
) -> dict[str, dict[str, float]]:
    """FLOPs (a multiply-add counts two) of one clip, `forward` and `train` (forward and backward), by what is fed.

    The keys are "joint" (all modalities are fed) and the name of each modality. PyTorch counts convolutions and matrix
    products on the network itself; nothing is computed for it.
    """
    batch, counted = 2, {}
    shapes = {modality.name: audio_shape for modality in modalities if modality.kind == "array"}
    with torch.device("meta"):
        network = build_model(modalities, shapes, classes, encoder, device="meta", image_size=image_size, model=model)
        inputs = {
            modality.name: torch.empty(batch, 1, *audio_shape)
            if modality.kind == "array"
            else torch.empty(batch, modality.frames, 3, image_size, image_size)
            for modality in modalities
        }
    for name, fed in {"joint": network.names, **{name: (name,) for name in network.names}}.items():
        with FlopCounterMode(display=False) as forward:
            output = network({own: inputs[own] for own in fed}, fed)
        with FlopCounterMode(display=False) as backward:
            torch.stack([logits.sum() for logits in output.heads.values()]).sum().backward()
        ahead, back = (counter.get_total_flops() / batch for counter in (forward, backward))
        counted[name] = {"forward": ahead, "train": ahead + back}
    return counted


def product_rate(
    device: torch.device, dtype: torch.dtype = torch.float32, repeats: int = 5, side: int | None = None
) -> float:
    """FLOP/s of a square matrix product as large as keeps the device busy: the rate to compare with. Median."""
    side = side or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    count = 10
    seconds = []
    for _ in range(repeats + 1):  # the first warms up
        clock = time.perf_counter()
        for _ in range(count):
            a @ b
        seconds.append(lap(clock)[0])
    return count * 2 * side**3 / statistics.median(seconds[1:])


# ----------------------------------------------------------------------------------------------------------- results


def machine(device: torch.device) -> dict:
    """Description of the machine and versions."""
    found = environment(device, 1)
    load = round(os.getloadavg()[0], 2)
    return {**found["hardware"], **found["versions"], "commit": found["git_commit"], "load_before": load,
            "command": command()}  # fmt: skip


def table(rows: list[dict]) -> str:
    """Rows of equal keys as Markdown."""
    names = list(rows[0])
    cells = [[str(name) for name in names], ["---"] * len(names)]
    cells += [["–" if row[name] is None else str(row[name]) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def save(name: str | None, about: dict, tables: dict[str, list[dict]]) -> None:
    """Print the tables; write them to benchmarks/results/<name>-<device>-<date>.json and, to read, .md.

    Without `name` nothing is written. Results of the same day get a number.
    """
    text = "\n\n".join(f"**{title}**\n\n{table(rows)}" for title, rows in tables.items() if rows)
    where = ", ".join(f"{key} {value}" for key, value in about.items())
    print(f"{text}\n\n{where}")
    if name is None:
        return
    path = new_result(name, about["cpu"] if about["device"] == "cpu" else about["device"])
    path.with_suffix(".json").write_text(json.dumps({"machine": about, **tables}, indent=2) + "\n")
    path.with_suffix(".md").write_text(f"{where}\n\n{text}\n")
    print(f"written: {path}.json and .md")
