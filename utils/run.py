"""A run: its folder, its records, its checkpoints, and how it stops.

config.json contains the flags, metrics.jsonl one line per epoch, summary.json the results. The folder also contains
partition.csv, the TensorBoard events, figures, best.pth and last.pth. Only rank 0 writes.
"""

import csv
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from utils import distributed
from utils.acceleration import device_name
from utils.background import HostCopy, Writer
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import Interrupted, UserError
from utils.files import atomic_path, remove_leftovers, writing
from utils.partitions import Partitions
from utils.seeding import rng_state, set_rng_state
from utils.signals import Signals

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

CONTINUE = "continue with --resume"
FORMAT = 2  # of last.pth; raise it when a run of an earlier version can no longer be resumed
# A folder that holds nothing but these is a run stopped before its first checkpoint: nothing is lost with it.
BEGINNINGS = ("config.json", "metrics.jsonl", "partition.csv", "partitions.npz", "events.out.tfevents.*", ".tmp-*")

# Flags that change where and how a run is made but not its result.
HOW = {"run_name", "log_path", "num_workers", "cache", "device", "gpu_ids", "resume", "train", "preset", "diagnose",
       "save_every", "compile"}  # fmt: skip


def board_tag(key: str) -> str:
    """The TensorBoard tag of a key of metrics.jsonl: accuracy/multimodal, loss/ce_joint, remix/n_audio, ..."""
    if key in ("test_acc", "val_acc"):
        return {"test_acc": "accuracy/multimodal", "val_acc": "accuracy_val/multimodal"}[key]
    for start, tag in (("test_acc_", "accuracy/"), ("val_acc_", "accuracy_val/"), ("train_acc_", "train_accuracy/"),
                       ("test_slice_", "accuracy/slice_"), ("val_slice_", "accuracy_val/slice_"),
                       ("train_ce_", "loss/ce_"), ("n_", "remix/n_"), ("seconds_", "speed/seconds_")):  # fmt: skip
        if key.startswith(start):
            return tag + key.removeprefix(start)
    return {"train_loss": "loss/train", "test_loss": "loss/test", "val_loss": "loss/val",
            "clips_per_second": "speed/clips_per_second"}.get(key, key)  # fmt: skip


def wait_for_next_second(folder: Path) -> None:
    """Wait until an event file that starts now is named after the run's others.

    TensorBoard reads event files in the order of their names, which hold the start in whole seconds. Within one second
    a resumed run's file may sort before its predecessor's, whose last epochs would then be dropped.
    """
    started = {path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")}
    while str(int(time.time())) in started:
        time.sleep(0.02)


def describe_run(board: "SummaryWriter", config: dict) -> None:
    """Charts with all heads (Custom Scalars), and flags with the test accuracies (HParams).

    Those flags are the given ones and a few that always tell runs apart. HParams reads its metrics from the scalars of
    the same tags, so a run in progress is listed too.
    """
    from torch.utils.tensorboard.summary import hparams

    modalities, writer = config.get("data", {}).get("modalities", ()), board.file_writer
    tested = [board_tag("test_acc"), *(board_tag(f"test_acc_{name}") for name in modalities)]
    charts = {"test accuracy": tested}
    for title, key in (("training accuracy", "train_acc"), ("training cross entropy", "train_ce")):
        charts[title] = [board_tag(f"{key}_{head}") for head in ("joint", *modalities)]
    board.add_custom_scalars({"heads": {title: ["Multiline", tags] for title, tags in charts.items()}})
    given = (key for key in config if key not in config.get("from_preset", {}))
    names = {"method", "balance", "dataset", "epochs", "random_seed", "learning_rate", *given} - HOW
    names -= {"command", "git_commit", "allow_missing"}
    flags = {key: config[key] for key in sorted(names) if isinstance(config.get(key), (float, int, str))}
    if writer is not None:
        for part in hparams(flags, dict.fromkeys(tested))[:2]:  # the third one says that the run has ended
            writer.add_summary(part)


class Run:
    """One run's folder. As a context manager it waits for the checkpoint, puts signal handlers back, closes records.

    The checkpoint of an epoch is copied to host memory (`snapshot`) and written by a thread (`epoch`) while the next
    epoch trains. Never two are written at once, and the line of an epoch in metrics.jsonl is written after the
    checkpoint of the epoch before and before its own: last.pth is at most one epoch behind.
    """

    def __init__(self, log_path: str, name: str, resume: bool):
        """Claim `<log_path>/<name>`; raises `UserError` where it exists and `resume` is false."""
        self.folder, self.writes = Path(log_path) / name, distributed.is_main()
        self.signals, self.board, self.history = Signals(), None, []
        self.partitions = Partitions(self.folder / "partitions.npz")
        self.writer, self.host, self.unwritten = Writer(), HostCopy(), None
        with distributed.together():
            if self.writes:
                claim_folder(log_path, name, resume)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        try:
            if kind is None:
                self.writer.wait()
            elif not issubclass(kind, KeyboardInterrupt):  # a second Ctrl-C: stop at once, last.pth is whole
                with suppress(BaseException):  # the error that ends the run is the one to report
                    self.writer.wait()
        finally:
            self.signals.restore()
            if self.board:
                self.board.close()

    @property
    def last(self) -> Path:
        return self.folder / "last.pth"

    # ---- records

    def begin(self, config: dict, first_epoch: int = 0) -> None:
        """Write config.json and open the records; later epochs of an earlier attempt are dropped.

        From here on a signal ends the run with a message (`check`).
        """
        self.signals.listen()
        if not self.writes:
            return
        from torch.utils.tensorboard import SummaryWriter  # late: importing it takes seconds

        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
            if first_epoch:  # keep the command that started the run, from which a report tells how to repeat it
                config = config | {"command": read_config(self.folder).get("command", config.get("command"))}
            write_json(self.folder / "config.json", config)
            self.history = [line for line in read_metrics(self.folder) if line["epoch"] < first_epoch]
            with atomic_path(self.folder / "metrics.jsonl") as path:
                path.write_text("".join(json.dumps(line) + "\n" for line in self.history))
            self.partitions.load(first_epoch)
            wait_for_next_second(self.folder)
            self.board = SummaryWriter(str(self.folder), purge_step=first_epoch)
            describe_run(self.board, config)

    def epoch(self, metrics: dict, last: bool = False) -> None:
        """One epoch's numbers, `epoch` among them, to metrics.jsonl and TensorBoard; then its checkpoint, in a thread.

        Of the `last` epoch the checkpoint is on disk when this returns.
        """
        if not self.writes or self.board is None:
            return
        self.history.append(metrics)
        with writing(self.folder / "metrics.jsonl", CONTINUE), open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        with writing(self.folder, CONTINUE):
            for name, value in metrics.items():
                if isinstance(value, (int, float)) and name != "epoch":
                    self.board.add_scalar(board_tag(name), value, metrics["epoch"])
            self.board.flush()
        if self.unwritten is not None:
            self.writer.start(self.unwritten)
            self.unwritten = None
        if last:
            self.writer.wait()

    def partition(self, epoch: int, clips: list[str], labels: list[str], kl: dict[str, Tensor], kept: Tensor) -> None:
        """A scoring to partition.csv, which holds the last one, partitions.npz, which holds all, and TensorBoard.

        `kl` holds the KL from uniform in bits (N,) for each modality, `kept` (N, M) which of them a clip keeps.
        """
        if not self.writes or self.board is None:
            return
        with writing(self.folder, CONTINUE):
            for name, values in kl.items():
                self.board.add_histogram(f"remix/kl_{name}", values, epoch)
        with writing(self.partitions.path, CONTINUE):
            values = torch.stack(list(kl.values()), dim=1)  # (N, M)
            self.partitions.add(epoch, clips, list(kl), values.cpu().numpy(), kept.cpu().numpy())
        table = self.folder / "partition.csv"
        with writing(table, CONTINUE), atomic_path(table) as path, open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["clip", "label", *(f"kl_{name}" for name in kl), "kept"])
            columns = zip(*(values.tolist() for values in kl.values()), strict=True)
            for clip, label, bits, keeps in zip(clips, labels, columns, kept.tolist(), strict=True):
                names = "+".join(name for name, keep in zip(kl, keeps, strict=True) if keep)
                writer.writerow([clip, label, *(f"{value:.6f}" for value in bits), names])

    def figure(self, name: str, figure: "Figure", epoch: int) -> None:
        """A matplotlib figure as `<name>.png` and in TensorBoard."""
        if not self.writes or self.board is None:
            return
        from utils.style import save  # late: matplotlib is not needed before the end

        with writing(self.folder / f"{name}.png", CONTINUE):
            save(figure, self.folder / name)
        with writing(self.folder, CONTINUE):
            self.board.add_figure(name, figure, epoch)

    def summary(self, summary: dict) -> None:
        """The last file of a run: a folder that has it is finished."""
        if not self.writes or self.board is None:
            return
        from torch.utils.tensorboard.summary import hparams  # late, as above

        with writing(self.folder, CONTINUE):
            if self.board.file_writer is not None:
                self.board.file_writer.add_summary(hparams({}, {})[2])
            self.board.close()
        write_json(self.folder / "summary.json", summary)

    # ---- checkpoints

    def snapshot(self, weights: dict[str, Tensor], about: dict, state: dict, improved: bool) -> dict[str, float | None]:
        """Copy an epoch's checkpoint to host memory, for `epoch` to write, and return the seconds for its line.

        last.pth has `weights`, `about` and everything in `state`; best.pth the first two, if `improved`. Training waits
        `seconds_save` for the checkpoint before and for the copy; `seconds_write` is what the thread took for the
        checkpoint before, None in the first epoch. Raises `UserError` where a weight is not finite or the checkpoint
        before could not be written; last.pth is then that of an earlier epoch.
        """
        clock = time.perf_counter()
        self.writer.wait()
        if not torch.stack([value.isfinite().all() for value in weights.values()]).all():
            raise UserError(f"{self.folder}: weights are not finite after epoch {state['epoch']}; last.pth is that of "
                            "the epoch before; try a lower --learning_rate")  # fmt: skip
        if not self.writes:
            return {}
        about = about | {"model": weights, "epoch": state["epoch"]}
        whole, arrived = self.host.take(about | state | {"rng": rng_state(), "format": FORMAT})
        best = {name: whole[name] for name in about} if improved else None
        self.unwritten = partial(write_checkpoints, self.folder, best, whole, arrived)
        return {"seconds_save": time.perf_counter() - clock, "seconds_write": self.writer.seconds}

    def state(self) -> dict | None:
        """Load last.pth and restore the random generators; None if there is no file.

        Raises `UserError` for a run of an earlier version, which can be evaluated but not resumed.
        """
        if not self.last.is_file():  # the run was stopped before its first checkpoint
            return None
        state = load_checkpoint(self.last)
        if state.get("format") != FORMAT:
            raise UserError(f"--resume: {self.last} was written by an earlier version of this project, whose runs "
                            "cannot be resumed; evaluate it with --checkpoint, or start a new run")  # fmt: skip
        set_rng_state(state["rng"])
        return state

    # ---- stopping

    def check(self) -> None:
        """Raise `Interrupted` if a signal asked the run to stop, or the `UserError` of a checkpoint not written.

        To be called by all processes alike. After a signal the checkpoint is written first.
        """
        self.writer.check()
        if not self.signals.asked():
            return
        self.writer.wait()
        distributed.stop()
        done = f"{self.last} holds {len(self.history)} epochs" if self.last.is_file() else "no epoch was completed"
        command = shlex.join([*distributed.launcher(), "train.py", "--resume", str(self.folder)])
        raise Interrupted(f"stopped by {self.signals.noted or 'another process'}; {done}; continue with: {command}")


def write_checkpoints(folder: Path, best: dict | None, whole: dict, arrived: Callable[[], object]) -> None:
    """best.pth, if there is one, then last.pth, once their tensors have `arrived` in host memory."""
    arrived()
    # best.pth first: a run killed between the two repeats this epoch, and best.pth with it.
    if best is not None:
        save_checkpoint(folder / "best.pth", best, sync=False)
    save_checkpoint(folder / "last.pth", whole)


def take_flags_of_run(args: Namespace, typed: dict) -> None:
    """Take every flag that was not given from the config.json of the run that `--resume` names."""
    folder = Path(args.resume)
    config = read_config(folder)
    own = {name: value for name, value in config.items() if hasattr(args, name) and name not in typed}
    vars(args).update(own | {"log_path": str(folder.parent), "run_name": folder.name, "train": True, "resume": "auto"})
    args.from_preset = {name: config[name] for name in config.get("from_preset", {}) if name not in typed}


def continues(args: Namespace) -> bool:
    """Whether the run is resumed from its own last.pth, so that `--checkpoint`, where it started from, is not read."""
    return bool(args.resume) and (Path(args.log_path) / args.run_name / "last.pth").is_file()


def check_same_run(now: dict, before: dict, data: dict[str, str], seen: dict[str, str], may_change: set[str]) -> None:
    """Raise `UserError` unless a run is resumed with the flags and the data that it was started with.

    `now` and `before` hold flags, `data` and `seen` a digest of each part.
    """
    changed = [f"--{name} {before[name]} (now {value})" for name, value in now.items()
               if name in before and name not in may_change and value != before[name]]  # fmt: skip
    if changed:
        raise UserError(f"--resume: the run was started with {', '.join(changed)}; only these may change: "
                        f"{', '.join(sorted(may_change - {'resume'}))}")  # fmt: skip
    parts = [name for name in {**seen, **data} if seen.get(name) != data.get(name)]
    if parts:
        raise UserError(f"--resume: {now['data_root']} has other clips or labels in {' and '.join(parts)} than when "
                        "the run was started; restore them, or start a new run")  # fmt: skip


def update_best(best: dict, numbers: dict) -> bool:
    """Note the best epochs in `best`; True if this one is to be best.pth: by validation if there is one, else test."""
    better = {part: numbers[f"{part}_acc"] > best.get(f"best_{part}_acc", -1)
              for part in ("test", "val") if f"{part}_acc" in numbers}  # fmt: skip
    for part, is_better in better.items():
        if is_better:
            best |= {f"best_{part}_acc": numbers[f"{part}_acc"], f"best_{part}_epoch": numbers["epoch"]}
            best[f"at_best_{part}"] = {name: value for name, value in numbers.items() if name.startswith("test_")}
    return better.get("val", better["test"])


def claim_folder(log_path: str, run_name: str, resume: bool) -> Path:
    """The run's folder. Raises `UserError` when it exists and is not to be resumed.

    A run that was stopped before its first checkpoint is started again: its folder is emptied.
    """
    if run_name in ("", ".", "..") or Path(run_name).name != run_name or not run_name.isprintable():
        shown = run_name if run_name.isprintable() else ascii(run_name)
        raise UserError(f"--run_name {shown}: must be a plain folder name")
    if len(os.fsencode(run_name)) > 200:
        raise UserError(f"--run_name {run_name[:40]}...: longer than 200 bytes; choose a shorter one")
    if Path(log_path).exists() and not Path(log_path).is_dir():
        raise UserError(f"--log_path {log_path}: not a folder; choose one")
    folder = Path(log_path) / run_name
    try:
        files = list(folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise UserError(f"{folder}: cannot be a run's folder ({error.strerror}); choose another --log_path or "
                        "--run_name") from None  # fmt: skip
    if files and not resume:
        raise UserError(f"{folder}: this run exists already; choose another --run_name, or pass --resume {folder}")
    if files and not (folder / "last.pth").is_file():
        # best.pth is written before last.pth: a kill between the two in the first epoch leaves best.pth alone.
        begun = (*BEGINNINGS, "best.pth") if len(read_metrics(folder)) <= 1 else BEGINNINGS
        foreign = [file.name for file in files if not any(file.match(pattern) for pattern in begun)]
        if foreign:
            raise UserError(f"--resume: {folder} holds {foreign[0]} but no last.pth; choose another --run_name")
        print(f"{folder}: stopped before its first checkpoint; starting again")
        for file in files:
            file.unlink()
    return folder


def write_json(path: Path, value: dict) -> None:
    with writing(path, CONTINUE), atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_config(folder: Path) -> dict:
    """The config.json of a run. Raises `UserError` where there is none that can be read."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"--resume {folder}: no run (it has no readable config.json); give a run's folder, runs/NAME")
    return config


def modern(config: dict) -> dict:
    """A run's config with the current names of all flags, for any version that wrote it."""
    former = {"batch_order": "reassemble"}
    if config.get("model") in ("resnet18", "resnet18_thin"):  # --model was the encoder before there were architectures
        former["model"] = "encoder"
    return {former.get(name, name): value for name, value in config.items()}


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


PACKAGES = ("torch", "torchvision", "torchaudio", "numpy", "scikit-learn", "opencv-python-headless")


def git_commit() -> str | None:
    """The commit of this code, with -dirty behind it where files differ from it; None outside git."""
    here = Path(__file__).resolve().parent
    describe = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of `packages` that are installed: training needs none that only prepares data."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def environment(device: torch.device, processes: int) -> dict:
    """Environment of a run: versions, the commit of this code (None outside git), hardware and command."""
    cuda = {"cuda": torch.version.cuda} if torch.version.cuda else {}
    return {
        "versions": {"python": platform.python_version()} | installed(PACKAGES) | cuda,
        "git_commit": git_commit(),
        "hardware": {
            "device": device_name(device) if device.type == "cuda" else device.type,
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
