"""A run's folder: what was asked, what happened in each epoch, what came out. Only the main process has one.

DESIGN section 4 lists the files; this module writes config.json, metrics.jsonl, summary.json, partition.csv and the
TensorBoard events, without knowing which numbers an epoch has.
"""

import csv
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from utils.errors import UserError
from utils.files import atomic_path, remove_leftovers, writing

GO_ON = "go on with --resume"
# A folder that holds nothing but these is a run stopped before its first checkpoint: nothing is lost with it.
BEGINNINGS = ("config.json", "metrics.jsonl", "partition.csv", "events.out.tfevents.*", ".tmp-*")

# metrics.jsonl key -> TensorBoard tag; keys not named here go under their own name.
TAGS = {
    "test_acc": "accuracy/multimodal",
    "test_acc_audio": "accuracy/audio",
    "test_acc_video": "accuracy/video",
    "val_acc": "accuracy_val/multimodal",
    "val_acc_audio": "accuracy_val/audio",
    "val_acc_video": "accuracy_val/video",
    "train_loss": "loss/train",
    "train_loss_joint": "loss/train_joint",
    "train_loss_audio": "loss/train_audio",
    "train_loss_video": "loss/train_video",
    "test_loss": "loss/test",
    "val_loss": "loss/val",
    "n_audio": "remix/n_audio",
    "n_video": "remix/n_video",
    "clips_per_second": "speed/clips_per_second",
}


class RunLog:
    """Writes one run's folder. `start_epoch` > 0 continues it: later lines of an earlier attempt are dropped."""

    def __init__(self, folder: Path, config: dict, start_epoch: int = 0):
        self.folder = folder
        threading.excepthook = _hide_disk_errors
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            write_json(folder / "config.json", config)
            self.history = [line for line in read_metrics(folder) if line["epoch"] < start_epoch]
            with atomic_path(folder / "metrics.jsonl") as path:
                path.write_text("".join(json.dumps(line) + "\n" for line in self.history))
            self.board = SummaryWriter(str(folder), purge_step=start_epoch)
        self.events = Path(self.board.file_writer.event_writer._file_name)

    def epoch(self, metrics: dict) -> None:
        """One epoch's numbers, `epoch` and `phase` among them, to metrics.jsonl and TensorBoard."""
        self.history.append(metrics)
        with writing(self.folder / "metrics.jsonl", GO_ON), open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        with writing(self.events, GO_ON):
            for name, value in metrics.items():
                if isinstance(value, (int, float)) and name != "epoch":
                    self.board.add_scalar(TAGS.get(name, name), value, metrics["epoch"])
            self.board.flush()

    def partition(self, epoch: int, names: list[str], labels: list[str], kl: Tensor, kept: list[str]) -> None:
        """The last scoring: kl (N, 2) in bits for audio and video, and what each clip keeps."""
        with writing(self.events, GO_ON):
            for column, modality in enumerate(("audio", "video")):
                self.board.add_histogram(f"remix/kl_{modality}", kl[:, column], epoch)
        table = self.folder / "partition.csv"
        with writing(table, GO_ON), atomic_path(table) as path, open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["clip", "label", "kl_audio", "kl_video", "kept"])
            rows = zip(names, labels, kl.tolist(), kept, strict=True)
            writer.writerows([clip, label, f"{a:.6f}", f"{v:.6f}", keeps] for clip, label, (a, v), keeps in rows)

    def figure(self, name: str, figure, epoch: int) -> None:
        """A matplotlib figure as `<name>.png` and in TensorBoard."""
        picture = self.folder / f"{name}.png"
        with writing(picture, GO_ON), atomic_path(picture) as path:
            figure.savefig(path, dpi=120)
        with writing(self.events, GO_ON):
            self.board.add_figure(name, figure, epoch)

    def summary(self, summary: dict) -> None:
        """The last file of a run: a folder that has it is finished."""
        with writing(self.events, GO_ON):
            self.board.close()
        write_json(self.folder / "summary.json", summary)


def _hide_disk_errors(args: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread and raises there first; the same error comes to us at the next flush."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def write_json(path: Path, value: dict) -> None:
    with writing(path, GO_ON), atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; a last line torn by a kill is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def claim_folder(log_path: str, run_name: str, resume: bool) -> Path:
    """The run's folder. Raises `UserError` when it exists and is not to be resumed, or the other way round.

    A run that was killed before its first checkpoint is resumed by starting it anew: its folder is emptied.
    """
    if run_name in ("", ".", "..") or Path(run_name).name != run_name or not run_name.isprintable():
        raise UserError(
            f"--run_name {run_name if run_name.isprintable() else ascii(run_name)}: a plain folder name is wanted"
        )
    if len(os.fsencode(run_name)) > 200:
        raise UserError(f"--run_name {run_name[:40]}...: longer than 200 bytes; choose a shorter one")
    if Path(log_path).exists() and not Path(log_path).is_dir():
        raise UserError(f"--log_path {log_path}: not a folder; choose one")
    folder = Path(log_path) / run_name
    try:
        files = list(folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be a run's folder ({error.strerror}); choose another --log_path or --run_name"
        ) from None
    if files and not resume:
        raise UserError(f"{folder}: this run exists already; choose another --run_name, or go on with it by --resume")
    if resume and not (folder / "last.pth").is_file():
        foreign = [file for file in files if not any(file.match(pattern) for pattern in BEGINNINGS)]
        if not files or foreign:
            raise UserError(
                f"--resume: {folder} has no last.pth to go on from; leave --resume out to start the run anew"
            )
        print(f"{folder}: stopped before its first checkpoint; starting anew")
        for file in files:
            file.unlink()
    return folder


PACKAGES = ("torch", "torchvision", "torchaudio", "numpy", "scikit-learn", "opencv-python-headless")


def git_commit() -> str | None:
    """The commit of this code, with -dirty behind it where files differ from it; None outside git."""
    here = Path(__file__).resolve().parent
    describe = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def environment(device: torch.device, processes: int) -> dict:
    """What a run ran on: versions, the commit of this code (None outside git), hardware and command."""
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "git_commit": git_commit(),
        "hardware": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "processes": processes,
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "command": shlex.join(sys.argv),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
