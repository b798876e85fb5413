"""Reproduce CREMA-D or Kinetics-Sounds from the raw download: prepare, check, train every run, report.

    bash scripts/reproduce.sh cremad RAW --gpu_ids 0
    bash scripts/reproduce.sh ks RAW --gpu_ids 0
    bash scripts/reproduce.sh cremad RAW --estimate                    # hours and disk, nothing else
    bash scripts/reproduce.sh cremad RAW --epochs 2 --image_size 32    # other flags go to every run: train.py --help

Baseline and Remix, with the presets fair and official, three seeds; CREMA-D with the official and the actor-disjoint
split. An estimate of hours and disk is printed first: a few raw clips are prepared, and a few batches of them are
trained with the flags of each preset. Run the same command again to resume: finished preparation and finished runs are
not repeated. `python -m report --share LOG_PATH` prints the result for an issue.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

import train
from dataset.clips import SHARE_OF_RAM, Feed, stored_sizes
from dataset.folder import load_folder
from dataset.lists import read_classes, read_clips
from dataset.pack import pack_bytes
from dataset.prepare.__main__ import main as prepare
from dataset.prepare.__main__ import parse_args as prepare_args
from dataset.prepare.check import inspect_deep
from dataset.prepare.datasets import ENTRIES, Job
from dataset.prepare.engine import prepare_clips, source_fault
from dataset.prepare.lists import write_lists
from dataset.specs import SPECS, DatasetSpec
from report.compare import (
    OURS,
    Planned,
    alone_in,
    environments,
    exit_status,
    leading_words,
    note_command,
    planned,
    report,
    seeds_of,
    take_stock,
    timed_run,
    train_missing,
)
from utils.cli import Parser, number, path_name
from utils.errors import UserError, run_main
from utils.files import remove_leftovers
from utils.memory import available_ram, gigabytes, usable_cores
from utils.run import read_config, read_metrics, write_json

NAMES = {"cremad": "CREMAD", "ks": "KineticSound"}
METHODS = ("baseline", "remix")
SPLITS = ("official", "actor")  # the second where clip ids name the actor
FIXED = OURS | {"method": "nothing (baseline and Remix are compared)", "preset": "--presets", "split": "--splits",
                "dataset": "the first word", "checkpoint": "nothing"}  # fmt: skip
SAMPLE = 24  # raw clips that are prepared for the estimate
# Batches and epochs of each phase that are timed; on a CPU a batch takes tens of seconds and varies less.
BATCHES, REPEATS = {"gpu": 16, "cpu": 2}, {"gpu": 2, "cpu": 1}


# --------------------------------------------------------------------------------------------------------------- plan


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, list[str]]:
    """Parse the flags of this command; return them and the remaining arguments, which go to train.py.

    The dataset and RAW must come first: an argument after a flag of train.py is read as that flag's value.
    """
    leading, words = leading_words(argv)
    usage = "reproduce.sh cremad|ks RAW [flags]"
    p = Parser(prog="reproduce.sh", usage=usage, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--seeds", default="0,1,2", metavar="A,B", help="seeds (default: 0,1,2)")
    p.add_argument("--presets", default="fair,official", metavar="A,B", help="presets (default: fair,official)")
    p.add_argument("--splits", metavar="A,B", help="official, actor (default: both for cremad; ks has no actors)")
    p.add_argument("--jobs", type=number(int, 1), default=1, metavar="N", help="concurrent runs (default: 1)")
    p.add_argument("--data_root", type=path_name, metavar="DIR", help="training folder (default: data/<dataset>)")
    p.add_argument("--log_path", type=path_name, metavar="DIR", help="runs (default: runs/reproduce-<dataset>)")
    p.add_argument("--split_dir", type=path_name, metavar="DIR", help="published lists (default: download them)")
    p.add_argument("--workers", type=number(int, 1, 1024), metavar="N", help="processes that prepare clips (default: "
                   "one per core)")  # fmt: skip
    p.add_argument("--estimate", action="store_true", help="print the estimate and stop (default: off)")
    p.epilog = "All other flags are passed to every run; see python train.py --help."
    args, rest = p.parse_known_args(words)
    if len(leading) != 2 or leading[0] not in NAMES:
        raise UserError(f"usage: bash scripts/{usage}; RAW is the folder of the raw download")
    args.name, args.raw, args.dataset = leading[0], Path(leading[1]), NAMES[leading[0]]
    args.given = words
    args.log_path = args.log_path or f"runs/reproduce-{args.name}"
    spec = SPECS[args.dataset]
    splits = SPLITS if spec.by_actor else SPLITS[:1]
    args.splits = _choice("--splits", args.splits or ",".join(splits), splits)
    args.presets = _choice("--presets", args.presets, tuple(train.PRESETS))
    args.out, args.format = None, ("png",)  # of `report`
    return args, rest


def _choice(flag: str, text: str, allowed: Sequence[str]) -> list[str]:
    chosen = text.split(",")
    if len(set(chosen)) < len(chosen) or not set(chosen) <= set(allowed):
        raise UserError(f"{flag} {text}: give one or more of {', '.join(allowed)}, separated by commas, each once")
    return chosen


def make_plan(args: Namespace, rest: list[str]) -> list[Planned]:
    """All runs in the order they start: every setting of a seed before the next seed.

    With this order, an interrupted reproduction is a complete one of fewer seeds. Raises `UserError` for anything that
    train.py refuses.
    """
    for flag in (word.split("=")[0].removeprefix("--") for word in rest if word.startswith("--")):
        if flag in FIXED:
            raise UserError(f"--{flag}: set for each run by this command; use {FIXED[flag]} instead")
    words = ["--dataset", args.dataset, *(["--data_root", args.data_root] if args.data_root else []), *rest]
    grids = [[("preset", preset)] + ([("split", split)] if split != SPLITS[0] else [])
             for split, preset in product(args.splits, args.presets)]  # fmt: skip
    return [planned(method, seed, grid, words, args.log_path)
            for seed in seeds_of(args.seeds) for grid in grids for method in METHODS]  # fmt: skip


# --------------------------------------------------------------------------------------------------- prepare and check


class Record:
    """`<training folder>/.prepare/checked.json`: the command that prepared the folder, and what the check found.

    It is valid only while the lists and the journal of finished clips are unchanged.
    """

    def __init__(self, root: Path, words: list[str]):
        self.root, self.words, self.path = root, words, root / ".prepare" / "checked.json"

    def state(self) -> dict:
        files = (self.root / ".prepare" / "clips.jsonl", *(self.root / f"{n}.csv" for n in ("train", "test", "stat")))
        sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}
        return {"command": self.words, "sha256": sums}

    def holds(self, allow_missing: bool) -> bool:
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return False
        valid = found.pop("valid", False)
        return found == self.state() and (valid or allow_missing)

    def write(self, valid: bool) -> None:
        write_json(self.path, self.state() | {"valid": valid})


def prepare_words(args: Namespace, root: Path) -> list[str]:
    words = ["--dataset", args.dataset, "--raw", str(args.raw), "--out", str(root)]
    words += ["--split_dir", args.split_dir] if args.split_dir else []
    return words + (["--workers", str(args.workers)] if args.workers else [])


def find_raw(args: Namespace, root: Path) -> Job:
    """The clips of RAW and their split. Raises `UserError` if RAW is not the raw download, or lists are missing."""
    if args.raw.resolve() == root.resolve():
        raise UserError(f"{args.raw}: is the training folder itself; give the raw download, or another --data_root")
    return ENTRIES[args.dataset].job(prepare_args(prepare_words(args, root)), args.raw, root)


def prepare_and_check(args: Namespace, root: Path, record: Record, allow_missing: bool) -> None:
    """Prepare, then decode everything. Raises `UserError` for missing clips, unless --allow_missing is given."""
    print(f"\npreparation: {args.raw} -> {root}", flush=True)
    status = prepare(prepare_words(args, root))
    if status == 130:
        raise KeyboardInterrupt
    if not status or allow_missing:
        print(f"\ncheck: {root}", flush=True)
        status = prepare(["--check", str(root), "--dataset", args.dataset])
    if status and not allow_missing:
        raise UserError(f"{root}: clips are missing or broken (above, and in skipped.csv); get their files and run the "
                        "same command again, or add --allow_missing to train without them")  # fmt: skip
    record.write(valid=not status)


# ----------------------------------------------------------------------------------------------------------- estimate


class Prepared(NamedTuple):
    """Measured: seconds that preparation takes to start; for one clip, seconds and bytes of preparation, seconds of the
    check, and bytes in a pack.
    """

    start: float
    seconds: float
    bytes: float
    check: float
    packed: float


class Cost(NamedTuple):
    """Measured for one preset: seconds per training clip of a joint and of a Remix epoch, scoring included; seconds per
    test clip of evaluation; seconds of a checkpoint, and of a run's start and end; bytes of a run's folder.

    `machine` is the processor it was measured on.
    """

    joint: float
    remix: float
    evaluate: float
    save: float
    run: float
    size: int
    machine: str


class Clips(NamedTuple):
    """Numbers of clips: of train and test, and how many of them are not prepared yet."""

    train: int
    test: int
    left: int


def count_clips(job: Job | None, root: Path, spec: DatasetSpec) -> Clips:
    if job is None:
        return Clips(len(read_clips(root / "train.csv")), len(read_clips(root / "test.csv")), 0)
    left = sum(not _is_there(root, spec, clip.name) for clip in job.clips)
    return Clips(len(job.split.parts["train"]), len(job.split.parts["test"]), left)


def seconds_of(cost: Cost, run: Planned, done: int, clips: Clips) -> float:
    """Estimated seconds of a run of which `done` epochs are finished."""
    epochs = run.flags["epochs"]
    warmup = run.flags["warmup"] if run.flags["method"] == "remix" else epochs
    joint, left = max(0, warmup - done), epochs - done
    training = clips.train * (joint * cost.joint + (left - joint) * cost.remix)
    return training + left * (clips.test * cost.evaluate + cost.save) + cost.run


def measure(args: Namespace, job: Job | None, root: Path, plan: list[Planned]) -> tuple[Prepared, dict[str, Cost]]:
    """Prepare a sample of the raw clips (without `job`: take prepared ones) and train on it with each preset.

    Raises `UserError` where no clip of the sample can be prepared, or where training fails.
    """
    spec, flags = SPECS[args.dataset], plan[0].flags
    kind = "gpu" if flags["device"] != "cpu" and torch.cuda.is_available() else "cpu"
    sizes = {"train": BATCHES[kind] * flags["batch_size"], "test": flags["batch_size"]}
    with tempfile.TemporaryDirectory(prefix=".tmp-estimate-", dir=args.log_path) as temporary:
        folder, made, preparation = Path(temporary), root, (0.0, 0.0, 0.0)
        if job is not None:
            made = folder / "clips"
            preparation = _time_preparation(job, made)
            names, classes = [clip.name for clip in job.clips], job.split.classes
        else:
            names, classes = [clip for clip, _ in read_clips(root / "train.csv")], read_classes(root / "stat.csv")
        names = [name for name in names if _is_there(made, spec, name)][:SAMPLE]
        if not names:
            doctor = f"python -m dataset.prepare --check {args.raw} --dataset {args.dataset}"
            raise UserError(f"{args.raw}: no clip of the sample can be prepared; {doctor} lists why")
        sample = _make_sample(made, names, folder / "data", spec, classes, sizes)
        clock = time.perf_counter()
        inspect_deep(sample, spec)
        check = (time.perf_counter() - clock) / sum(sizes.values())
        prepared = Prepared(*preparation, check, _packed_bytes(flags, sample, spec))
        words = ["--data_root", str(sample), "--warmup", str(REPEATS[kind]), "--epochs", str(2 * REPEATS[kind])]
        clips = count_clips(job, root, spec)
        if flags["cache"] == "auto" and not fits_in_memory(prepared, clips):
            words += ["--cache", "none"]
        costs = {}
        for preset in args.presets:
            words_of_run = ["--dataset", args.dataset, *args.rest, *words]
            run = planned("remix", flags["random_seed"], [("preset", preset)], words_of_run, str(folder))
            costs[preset] = _time_run(run, folder, sizes, environments(args.jobs, flags["device"], flags["gpu_ids"]))
    return prepared, costs


def fits_in_memory(prepared: Prepared, clips: Clips) -> bool:
    """Whether `--cache auto` holds the clips in memory, as `dataset.clips.choose_cache` decides."""
    return prepared.packed * (clips.train + clips.test) < SHARE_OF_RAM * available_ram()


def _time_preparation(job: Job, out: Path) -> tuple[float, float, float]:
    """Seconds of the start, seconds that one clip takes on all workers, and its bytes. The first clip is made alone."""
    whole = [clip for clip in job.clips if not any(source_fault(path)[0] for path in (clip.video, clip.audio) if path)]
    sample = whole[:: max(1, len(whole) // SAMPLE)][:SAMPLE]
    options = job.options._replace(workers=1)
    first, others = (prepare_clips(clips, out, options, quiet=True) for clips in (sample[:1], sample[1:]))
    each = max(0.0, others.seconds - first.seconds) / max(1, others.made - 1)
    workers = job.options.workers or usable_cores()
    return first.seconds, each / workers, (first.bytes + others.bytes) / max(1, first.made + others.made)


def _places(root: Path, spec: DatasetSpec, clip: str) -> list[Path]:
    """The folder or the array of a clip in each modality."""
    return [root / m.folder / (clip if m.kind == "frames" else f"{clip}.npy") for m in spec.modalities]


def _is_there(root: Path, spec: DatasetSpec, clip: str) -> bool:
    return all(place.exists() for place in _places(root, spec, clip))


def _make_sample(
    made: Path, names: list[str], out: Path, spec: DatasetSpec, classes: list[str], sizes: dict[str, int]
) -> Path:
    """A training folder of `sizes` clips in each part, which are links to those of `names` in `made`."""
    parts, count = {}, 0
    for part, size in sizes.items():
        parts[part] = [(f"{i:05d}", classes[i % len(classes)]) for i in range(count, count + size)]
        count += size
    for i, (clip, _) in enumerate(row for rows in parts.values() for row in rows):
        for source, target in zip(_places(made, spec, names[i % len(names)]), _places(out, spec, clip), strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, copy_function=_link)
            else:
                _link(source, target)
    write_lists(out, classes, parts, {"name": "official"})
    return out


def _link(source: Path | str, target: Path | str) -> None:
    try:
        os.link(source, target)  # no second copy on the same disk
    except OSError:
        shutil.copyfile(source, target)


def _packed_bytes(flags: dict, sample: Path, spec: DatasetSpec) -> float:
    """Bytes of a clip in a pack."""
    folder = load_folder(sample, spec)
    part = folder.parts["test"]
    feed = Feed(spec.modalities, flags["image_size"], torch.device("cpu"), "ram", pack_size=flags["pack_size"])
    return pack_bytes(part, stored_sizes(part, feed), folder.shapes) / len(part.clips)


def _time_run(run: Planned, folder: Path, sizes: dict[str, int], envs: list[dict]) -> Cost:
    """Train on the sample, a few epochs of each phase; the last one of each phase is measured."""
    clock = time.perf_counter()
    worker = timed_run(run, folder, envs[0])
    wall = time.perf_counter() - clock
    lines, hardware = read_metrics(worker.folder), read_config(worker.folder)["hardware"]
    size = sum(path.stat().st_size for path in worker.folder.iterdir())
    joint, remix = (lines[end - 1] for end in (len(lines) // 2, len(lines)))
    every = run.flags["rescore_every"]
    score = (remix if every == 1 else lines[len(lines) // 2])["seconds_score"] / every
    evaluation = remix["seconds_eval"] + remix.get("seconds_diagnose", 0)
    known = sum(value for line in lines for key, value in line.items() if key.startswith("seconds_"))
    clock = time.perf_counter()
    with open(worker.folder / "last.pth", "rb") as source, open(folder / "copy", "wb") as target:
        shutil.copyfileobj(source, target)
        os.fsync(target.fileno())
    save = time.perf_counter() - clock
    machine = hardware["device"] if hardware["device"] != "cpu" else f"{hardware['cpu']}, {hardware['threads']} threads"
    return Cost(joint["seconds_train"] / sizes["train"], (score + remix["seconds_train"]) / sizes["train"],
                evaluation / sizes["test"], save, max(0.0, wall - known), size, machine)  # fmt: skip


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def estimate_lines(
    args: Namespace, stock: list[tuple[Planned, str]], clips: Clips, prepared: Prepared, costs: dict[str, Cost],
    ready: bool,
) -> list[str]:  # fmt: skip
    """The estimate of what is left to do, for the user. `ready`: the training folder is prepared and checked."""
    todo, log_path = [run for run, action in stock if action != "done"], Path(args.log_path)
    lines, total, disk = [], 0.0, 0.0
    if not ready:
        total = prepared.start + clips.left * prepared.seconds + (clips.train + clips.test) * prepared.check
        disk = clips.left * prepared.bytes
        lines.append(f"  preparation and check: {clips.left:,} clips, {duration(total)}, {gigabytes(disk)}")
    for preset, cost in costs.items():
        own = [run for run in todo if run.flags["preset"] == preset]
        done = [len(read_metrics(log_path / run.name)) for run in own]
        seconds = sum(seconds_of(cost, run, epochs, clips) for run, epochs in zip(own, done, strict=True)) / args.jobs
        whole = {run.flags["method"]: duration(seconds_of(cost, run, 0, clips)) for run in own}
        each = ", ".join(f"{method} {text}" for method, text in whole.items())
        size = cost.size * len(own)
        if own:
            lines.append(
                f"  training, preset {preset}: {len(own)} runs ({each} each), {duration(seconds)}, {gigabytes(size)}"
            )
        total, disk = total + seconds, disk + size
    if fits_in_memory(prepared, clips):
        packs = len(args.splits) * (clips.train + clips.test) * prepared.packed
        lines.append(f"  decoded clips (.pack in the training folder): {gigabytes(packs)}, if the disk has room")
    else:
        lines.append("  decoded clips do not fit in memory: every epoch reads files (--pack_size 224 takes less)")
    return [*lines, f"  in all: {duration(total)}, {gigabytes(disk)} without decoded clips"]


def check_disk(needs: dict[Path, float]) -> None:
    """Raise `UserError` if files of these sizes (bytes) do not fit on the disks of these folders."""
    disks: dict[int, list[Path]] = {}
    there = {path: next(p for p in (path, *path.absolute().parents) if p.exists()) for path in needs}
    for path, place in there.items():
        disks.setdefault(place.stat().st_dev, []).append(path)
    for paths in disks.values():
        needed, free = sum(needs[path] for path in paths), shutil.disk_usage(there[paths[0]]).free
        if needed > free:
            raise UserError(f"{paths[0]}: needs about {gigabytes(needed)}, the disk has {gigabytes(free)} free; free "
                            "some, or choose another --data_root or --log_path")  # fmt: skip


def estimate(args: Namespace, job: Job | None, root: Path, stock: list[tuple[Planned, str]]) -> None:
    """Print the time and disk space of the remaining work. Raises `UserError` if the disk is too full for it.

    The measurements are saved in `<log_path>/estimate.json`, so that resuming does not repeat them.
    """
    print(f"{args.dataset}: {len(stock)} runs: {', '.join(METHODS)}; presets {', '.join(args.presets)}; "
          f"splits {', '.join(args.splits)}; seeds {args.seeds}", flush=True)  # fmt: skip
    log_path, clips = Path(args.log_path), count_clips(job, root, SPECS[args.dataset])
    path, key = log_path / "estimate.json", [args.dataset, args.presets, args.jobs, args.workers, args.rest]
    found = json.loads(path.read_text()) if path.is_file() else {}
    if found.get("key") == key:
        prepared = Prepared(**found["prepared"])
        costs = {preset: Cost(**cost) for preset, cost in found["costs"].items()}
        when = f"by an earlier start; delete {path} to measure again"
    else:
        print("measuring this machine on a few clips ...", flush=True)
        prepared, costs = measure(args, job, root, [run for run, _ in stock])
        as_json = {preset: cost._asdict() for preset, cost in costs.items()}
        write_json(path, {"key": key, "prepared": prepared._asdict(), "costs": as_json})
        when = "just now"
    new = [costs[run.flags["preset"]].size for run, action in stock if action == "start"]
    check_disk({root: clips.left * prepared.bytes, log_path: float(sum(new))})
    print(f"estimate, measured on {next(iter(costs.values())).machine} ({when}):")
    print("\n".join(estimate_lines(args, stock, clips, prepared, costs, job is None)), flush=True)


# --------------------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> int:
    args, args.rest = parse_args(argv)
    plan = make_plan(args, args.rest)
    root, log_path, allow_missing = (
        Path(plan[0].flags["data_root"]),
        Path(args.log_path),
        "--allow_missing" in args.rest,
    )
    record = Record(root, prepare_words(args, root))
    ready = record.holds(allow_missing)
    job = None if ready else find_raw(args, root)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # raise, to stop child processes
    try:
        with alone_in(log_path):
            remove_leftovers(log_path)
            stock = [(run, take_stock(run, log_path)) for run in plan]
            note_command(log_path, ["bash", "scripts/reproduce.sh", args.name, "RAW", *args.given], plan)
            if not ready or any(action != "done" for _, action in stock):
                estimate(args, job, root, stock)
            if args.estimate:
                return 0
            if ready:
                print(f"\npreparation: {root} is prepared and checked", flush=True)
            else:
                prepare_and_check(args, root, record, allow_missing)
            print("\ntraining", flush=True)
            failures = train_missing(stock, log_path, args.jobs)
    finally:
        signal.signal(signal.SIGTERM, before)
    report(args, plan, log_path)
    status = exit_status(failures)
    if not status:
        print(f"to share these numbers: python -m report --share {log_path}")
    return status


if __name__ == "__main__":
    run_main(main)
