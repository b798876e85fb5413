"""Memory of packing and training against the number of clips: private memory must not grow with the dataset.

    python -m benchmarks.packing [--clips 20000] [--shard_mb 64]

Clips are generated: three JPEGs of 64 x 48 pixels and an array of 32 x 32. For an eighth, a quarter, half and all of
the clips, it builds the pack and loads the batches of one training epoch, from the pack (--cache ram) and from the
files (--cache none). The network is trained on the first batches only, since its memory does not depend on their
number. Each stage runs in its own process. Reported are the peaks of private memory (RssAnon: arrays, tables, PyTorch)
and of mapped files (RssFile: pages of the pack, which the system can reclaim). Writes
benchmarks/results/packing-<cpu>-<date>.json and .md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from benchmarks.common import generate_folder, machine, save
from dataset import pack
from dataset.clips import Feed, make_clips
from dataset.folder import load_folder
from dataset.specs import AUDIO, VIDEO, get_spec
from models import build_model
from remix import batches_of
from utils.cli import number
from utils.errors import UserError, run_main

TEST_CLIPS, BATCH = 200, 64
TRAINED = 3  # batches that go through the network
STAGES = ("pack", "train, --cache ram", "train, --cache none")
FIELDS = ("RssAnon", "RssFile")


class Peaks(threading.Thread):
    """The highest values of `FIELDS` of this process in MB, sampled every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest, self.done = dict.fromkeys(FIELDS, 0.0), threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.02):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in self.highest:
                    self.highest[name] = max(self.highest[name], int(value.split()[0]) / 1024)


def stage(root: Path, name: str, shard: int) -> dict:
    """Run one stage in this process: seconds and peaks."""
    pack.SHARD = shard
    spec = get_spec("folder")
    watch, clock = Peaks(), time.monotonic()
    watch.start()
    folder = load_folder(root, spec)
    if name == STAGES[0]:
        for part, clips in folder.parts.items():
            pack.open_pack(root, part, clips, {VIDEO: (48, 64)}, folder.shapes)
    else:
        feed = Feed(spec.modalities, 32, torch.device("cpu"), name.split()[-1])
        clips = make_clips(root, "train", folder.parts["train"], folder.shapes, feed)
        model = build_model(spec.modalities, folder.shapes, len(folder.classes), "resnet18_thin")
        plan = batches_of(len(clips), BATCH, spec.names, torch.Generator().manual_seed(0))
        for i, batch in enumerate(clips.epoch(plan, torch.Generator().manual_seed(0))):
            if i < TRAINED:
                cross_entropy(model(batch.inputs, batch.fed).joint, batch.labels).backward()
    watch.done.set()
    watch.join()
    return {"seconds": round(time.monotonic() - clock, 1)} | {k: round(v, 1) for k, v in watch.highest.items()}


def measure(folder: Path, clips: int, shard_mb: int) -> list[dict]:
    """A row for each number of clips and stage."""
    whole = generate_folder(folder / "whole", clips, TEST_CLIPS, (64, 48), (32, 32))
    lines, rows = (whole / "train.csv").read_text().splitlines(keepends=True), []
    for count in (clips // 8, clips // 4, clips // 2, clips):
        root = folder / str(count)
        root.mkdir()
        for name in ("visual", AUDIO, "test.csv", "stat.csv"):
            (root / name).symlink_to(whole / name)
        (root / "train.csv").write_text("".join(lines[:count]))
        for name in STAGES:
            words = ["-m", "benchmarks.packing", "--stage", name, "--root", str(root), "--shard_mb", str(shard_mb)]
            done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"stage {name} of {count} clips failed: {done.stderr.strip().splitlines()[-1:]}")
            found = json.loads(done.stdout.splitlines()[-1])
            shards = sorted(path.stat().st_size for path in root.rglob(".pack/*/*.npy"))
            rows.append({"clips": count, "stage": name, "seconds": found["seconds"], "private MB": found["RssAnon"],
                         "mapped MB": found["RssFile"], "pack MB": round(sum(shards) / 1e6),
                         "files": len(shards), "largest MB": round(shards[-1] / 1e6)})  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return rows


def growth(rows: list[dict]) -> list[dict]:
    """Private bytes for each further clip, from the smallest to the largest number of clips."""
    found = []
    for name in STAGES:
        own = [row for row in rows if row["stage"] == name]
        more = own[-1]["clips"] - own[0]["clips"]
        private = own[-1]["private MB"] - own[0]["private MB"]
        packed = own[-1]["pack MB"] - own[0]["pack MB"]
        found.append({"stage": name, "private bytes per clip": round(private * 2**20 / more),
                      "packed bytes per clip": round(packed * 1e6 / more)})  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--clips", type=number(int, 80), default=20_000, metavar="N", help="clips to pack (default: 20000)"
    )
    parser.add_argument("--shard_mb", type=number(int, 1), default=64, metavar="MB",
                        help="shard size in MB; the usual 2 GB would give a single shard (default: 64)")  # fmt: skip
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(stage(args.root, args.stage, args.shard_mb * 10**6)))
        return
    if not os.path.exists("/proc/self/status"):
        raise UserError("memory is read from /proc, which this system does not have")
    about = machine(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args.clips, args.shard_mb)
    save("packing", about, {"Peak memory": rows, "Growth": growth(rows)})


if __name__ == "__main__":
    run_main(main)
