"""What a checkpoint costs a training run: written by a thread while the next epoch trains, against waiting for it.

    python -m benchmarks.checkpoints                 # two ResNet-18 with Adam's state, 268 MB; writes a result
    python -m benchmarks.checkpoints --rounds 3 --steps 5 --encoder resnet18_thin    # smoke test

Rounds of four epochs, in turn: no checkpoint at all; waiting for each, as before the thread; written by the thread;
and the copy alone, never written. An epoch is a number of real training steps on small inputs, then `Run.snapshot` and
`Run.epoch`. Wall and CPU seconds of an epoch, medians over rounds, and ratios within rounds. best.pth is not written.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.common import machine, save
from dataset.specs import get_spec
from models import build_model
from models.checkpoint import model_weights
from models.encoders import encoder_list
from utils.cli import Parser, number
from utils.errors import run_main
from utils.run import Run

WAYS = ("none", "waiting", "thread", "copy only")


class Trainer:
    """A network that trains on small random inputs, and a run that saves it."""

    def __init__(self, encoder: str, steps: int, folder: str):
        modalities = get_spec("folder").modalities
        shapes = {m.name: (64, 64) for m in modalities if m.kind == "array"}
        self.network = build_model(modalities, shapes, 6, encoder)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-4, fused=True)
        self.steps, self.run, self.epochs = steps, Run(folder, "run", resume=False), 0
        self.run.begin({})
        self.inputs = {
            name: torch.randn(4, 1, 64, 64) if modality.kind == "array" else torch.randn(4, 1, 3, 64, 64)
            for name, modality in zip(self.network.names, modalities, strict=True)
        }

    def epoch(self, way: str) -> tuple[float, float, float]:
        """Wall seconds and CPU seconds of an epoch, and the wall seconds that saving held it up."""
        self.run.writer.wait()
        if way == "thread":
            self.save(way)  # the checkpoint of the epoch before, written during this one
        clock, cpu = time.perf_counter(), time.process_time()
        for _ in range(self.steps):
            output = self.network(self.inputs, self.network.names)
            loss = torch.stack([F.cross_entropy(x, torch.arange(4)) for x in output.heads.values()]).sum()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.run.check()
        before = time.perf_counter()
        if way != "none":
            self.save(way)
        now = time.perf_counter()
        return now - clock, time.process_time() - cpu, now - before

    def save(self, way: str) -> None:
        self.epochs += 1
        state = {"optimizer": self.optimizer.state_dict(), "epoch": self.epochs}
        seconds = self.run.snapshot(model_weights(self.network), {}, state, improved=False)
        if way == "copy only":
            self.run.unwritten = None
        self.run.epoch({"epoch": self.epochs} | seconds, last=way == "waiting")


def main() -> None:
    p = Parser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--encoder", type=encoder_list, default="resnet18", metavar="NAME", help="(default: resnet18)")
    p.add_argument("--rounds", type=number(int, 1), default=6, help="rounds after a warm-up (default: 6)")
    p.add_argument("--steps", type=number(int, 1), default=20, help="steps of an epoch (default: 20)")
    args = p.parse_args()
    about, found = machine(torch.device("cpu")), {way: [] for way in WAYS}
    Path("runs").mkdir(exist_ok=True)  # on the disk that runs are on, and ignored by git
    with tempfile.TemporaryDirectory(dir="runs") as folder:
        trainer = Trainer(args.encoder, args.steps, folder)
        for way in WAYS:  # the first steps, buffers and pages
            trainer.epoch(way)
        for _ in range(args.rounds):
            for way in WAYS:
                found[way].append(trainer.epoch(way))
        trainer.run.writer.wait()
        size = trainer.run.last.stat().st_size
        trainer.run.__exit__(None)
    rows = []
    for way, seconds in found.items():
        wall, cpu, held = (statistics.median(values) for values in zip(*seconds, strict=True))
        ratio = statistics.median(a[0] / b[0] for a, b in zip(seconds, found["none"], strict=True))
        over = statistics.median(a[2] / b[2] for a, b in zip(seconds, found["waiting"], strict=True) if b[2])
        rows.append({
            "checkpoint": way, "epoch, wall s": f"{wall:.2f}", "epoch, CPU s": f"{cpu:.2f}",
            "epoch / none": f"{ratio:.3f}", "training waits, s": f"{held:.3f}", "waits / waiting": f"{over:.3f}",
            "rounds": args.rounds,
        })  # fmt: skip
    about |= {"checkpoint_MB": round(size / 1e6), "steps": args.steps, "load_after": round(os.getloadavg()[0], 2)}
    save("checkpoints", about, {"Wall and CPU seconds of an epoch and of saving": rows})


if __name__ == "__main__":
    run_main(main)
