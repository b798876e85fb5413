"""Methods x seeds x flags as separate runs of train.py, then one report: the fair comparison as one command.

    bash scripts/run_compare.sh                                                # demo, 4 methods, 5 seeds
    bash scripts/run_compare.sh --methods baseline,remix --seeds 0,1 --grid warmup=5,10 --epochs 40

Runs have names that follow from their flags, so the same command goes on after an interruption: a finished run is
reused, an unfinished one resumed, one made with other flags is refused. Besides train.py's methods, `--methods` takes
the names in `utils.runs.VARIANTS`.
"""

import fcntl
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from utils.cli import Parser, number
from utils.console import HEADS
from utils.errors import INTERRUPTED, UserError, run_main
from utils.logging import BEGINNINGS, git_commit, read_metrics, write_json
from utils.runs import HOW, NOT_FLAGS, UNREAD, VARIANTS, read_run

TRAIN = "train.py"  # as `python -m utils.compare` is started where it lies
OURS = {"method": "--methods", "random_seed": "--seeds", "run_name": "--log_path", "resume": "the same command again",
        "train": "nothing", "help": "nothing"}  # fmt: skip


class Planned(NamedTuple):
    """One run: its name, what is typed after `train.py`, and the flags train.py makes of that."""

    name: str
    argv: list[str]
    flags: dict


# ------------------------------------------------------------------------------------------------------------- plan


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, list[str]]:
    """Our flags, and the rest for train.py."""
    p = Parser(prog="run_compare.sh", description=__doc__, allow_abbrev=False,
               formatter_class=RawDescriptionHelpFormatter)  # fmt: skip
    p.add_argument("--methods", default="baseline,remix,audio,video", metavar="A,B",
                   help=f"of remix, baseline, audio, video, {', '.join(VARIANTS)} (the first four)")  # fmt: skip
    p.add_argument("--seeds", default="0,1,2,3,4", metavar="A,B", help="seeds of every method (0,1,2,3,4)")
    p.add_argument("--grid", action="append", default=[], metavar="FLAG=A,B",
                   help="every value of a train.py flag with every other; may be given again (none)")  # fmt: skip
    p.add_argument("--jobs", type=number(int, 1), metavar="N", help="runs at a time (a CPU core each; on GPUs 1)")
    p.add_argument("--log_path", default="runs/compare", metavar="DIR", help="folder of the runs (runs/compare)")
    p.add_argument("--out", metavar="DIR", help="folder of the report (<log_path>/report)")
    p.epilog = "All other flags go to every run: python train.py --help"
    return p.parse_known_args(argv)


def make_plan(args: Namespace, rest: list[str], train) -> list[Planned]:
    """Every run to be had, in the order they start: all methods of a seed before the next seed, so that an
    interrupted comparison is one of fewer seeds. Raises `UserError` for whatever train.py would refuse."""
    methods, seeds = _items(args.methods, "--methods"), [_seed(text) for text in _items(args.seeds, "--seeds")]
    axes = [_axis(text) for text in args.grid]
    for flag in (word.split("=")[0].removeprefix("--") for word in rest if word.startswith("--")):
        if flag in OURS or flag in dict(axes):
            raise UserError(f"--{flag}: set for each run by this command; use {OURS.get(flag, '--grid alone')} instead")
    allowed = (*train.METHODS, *VARIANTS)
    for method in methods:
        if method not in allowed:
            raise UserError(f"--methods {method}: unknown; allowed: {', '.join(allowed)}")
    plan: dict[str, Planned] = {}
    for seed, method, *values in itertools.product(seeds, methods, *(values for _, values in axes)):
        grid = [(flag, value) for (flag, _), value in zip(axes, values, strict=True)]
        run = _planned(method, seed, grid, rest, args.log_path, train)
        plan.setdefault(run.name, run)  # a method that does not read a flag of the grid runs once
    return list(plan.values())


def _planned(method: str, seed: int, grid: list[tuple[str, str]], rest: list[str], log_path: str, train) -> Planned:
    base, variant = VARIANTS.get(method, (method, {}))
    unread = UNREAD.get(base, set())
    if "balance" in dict(grid):  # nor does it read the flags of methods it does not have
        names = train.balances.chosen("none" if "balance" in unread else dict(grid)["balance"])
        unread = unread | {flag for flag, owner in train.balances.flag_owners().items() if owner not in names}
        rest = _without(rest, unread - UNREAD.get(base, set()))
    grid = [(flag, value) for flag, value in grid if flag not in unread]
    chosen = [word for flag, value in [("method", base), *variant.items(), *grid] for word in (f"--{flag}", str(value))]
    argv = ["--train", *chosen, *rest, "--random_seed", str(seed), "--log_path", log_path]
    args = train.parse_args([*argv, "--run_name", "x"])
    for flag, value in variant.items():
        if getattr(args, flag) != value:
            raise UserError(f"--{flag}: the method {method} sets it to {value}; leave the flag out, or the method")
    data = args.dataset if "data_root" in args.from_preset else f"{args.dataset}-{Path(args.data_root).name}"
    name = "_".join([data, method, *(_plain(f"{flag}-{value}") for flag, value in grid), f"seed{seed}"])
    args.run_name = name
    return Planned(name, [*argv, "--run_name", name], train.flags(args) | {"from_preset": args.from_preset})


def _without(words: list[str], flags: set[str]) -> list[str]:
    """What was typed, without these flags and their values."""
    kept, skip = [], False
    for word in words:
        skip = word.split("=")[0].removeprefix("--") in flags if word.startswith("--") else skip
        if not skip:
            kept.append(word)
    return kept


def _plain(text: str) -> str:
    return re.sub(r"[^\w.+-]", "-", text)


def _items(text: str, flag: str) -> list[str]:
    items = [item.strip() for item in text.split(",")]
    if "" in items or len(set(items)) < len(items):
        raise UserError(f"{flag} {text}: comma separated values are wanted, each once")
    return items


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"--seeds {text}: whole numbers are wanted, such as 0,1,2")
    return int(text)


def _axis(text: str) -> tuple[str, list[str]]:
    flag, equals, values = text.removeprefix("--").partition("=")
    if not equals or not flag.isidentifier():
        raise UserError(f"--grid {text}: FLAG=A,B is wanted, such as --grid warmup=5,10")
    if flag in OURS or flag == "log_path":
        raise UserError(f"--grid {flag}: not a flag to vary here; use {OURS.get(flag, 'another command')} instead")
    return flag, _items(values, f"--grid {flag}")


# ------------------------------------------------------------------------------------------- what is there already


def take_stock(run: Planned, log_path: Path, defaults: dict) -> str:
    """What to do with the folder of that name: "done", "resume" or "start". Raises `UserError` for foreign content."""
    folder = log_path / run.name
    files = list(folder.iterdir()) if folder.exists() else []
    if not files:
        return "start"
    found = read_run(folder)
    if found.config:
        refuse_other_flags(run, found.config, folder, defaults)
        if not found.problem:
            return "done"
        if (folder / "last.pth").is_file():
            return "resume"
    foreign = [file.name for file in files if not any(file.match(pattern) for pattern in BEGINNINGS)]
    if foreign:
        raise UserError(f"{folder}: holds {foreign[0]} but no run that can go on; move it away, or choose a --log_path")
    shutil.rmtree(folder)
    return "start"


def of_other_code(folder: Path) -> bool:
    """Whether a run was made by another commit than this one's, as far as is known."""
    made, now = read_run(folder).config.get("git_commit"), git_commit()
    return None not in (made, now) and made != now


def refuse_other_flags(run: Planned, config: dict, folder: Path, defaults: dict) -> None:
    """Raises `UserError` naming the flags in which the run in `folder` differs from the one planned."""
    skip = HOW | NOT_FLAGS | UNREAD.get(run.flags["method"], set())
    skip -= {"diagnose"} if run.flags.get("diagnose") else set()  # asked for, it must be there
    now = {name: value for name, value in run.flags.items() if name not in skip}
    # An older run may not know a flag: it did then what the flag's default does now.
    changed = [name for name, value in now.items() if config.get(name, defaults.get(name)) != value]
    if changed:
        differences = ", ".join(f"--{name} {config.get(name)} (now {now[name]})" for name in changed)
        raise UserError(f"{folder}: made with {differences}; type the same flags, or another --log_path")


# -------------------------------------------------------------------------------------------------------------- run


class Worker:
    """One train.py at work: its log stands beside the run's folder, its progress is read off metrics.jsonl."""

    def __init__(self, run: Planned, action: str, log_path: Path, env: dict, lock: int):
        self.run, self.folder, self.log = run, log_path / run.name, log_path / f"{run.name}.log"
        self.before = self._epochs()
        command = [sys.executable, TRAIN, *run.argv, *(["--resume"] if action == "resume" else [])]
        with open(self.log, "a" if action == "resume" else "w") as file:
            # It inherits the lock: should we be killed and it live on, nobody starts the same run beside it.
            self.process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=file,
                                            stderr=subprocess.STDOUT, pass_fds=(lock,))  # fmt: skip

    def _epochs(self) -> int:
        try:
            return (self.folder / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def epochs_done(self) -> int:
        """Epochs since this process started."""
        return max(0, self._epochs() - self.before)

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def ask_to_stop(self) -> None:
        """It finishes its step, saves, and leaves."""
        if not self.has_ended():
            self.process.terminate()

    def was_interrupted(self) -> bool:
        """Whether it saved itself and left at a signal, to be resumed."""
        return self.process.returncode == INTERRUPTED

    def last_words(self) -> str:
        text = self.log.read_text(errors="replace").replace("\r", "\n")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else f"exit status {self.process.returncode}, no output"


def run_all(todo: list[tuple[Planned, str]], log_path: Path, envs: list[dict], lock: int) -> list[Worker]:
    """Run them, as many at a time as there are environments; returns those that failed or were interrupted."""
    waiting, slots, ended = list(todo), [None] * len(envs), []
    epochs = sum(run.flags["epochs"] - len(read_metrics(log_path / run.name)) for run, _ in todo)
    bar = tqdm(total=epochs, unit="epoch", desc=f"run 0/{len(todo)}", mininterval=1, smoothing=0.05)
    # An exception instead of a quiet end, so that the runs are stopped with us.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while waiting or any(slots):
            for slot, worker in enumerate(slots):
                if worker and worker.has_ended():
                    slots[slot] = None
                    ended.append(worker)
                    bar.write(f"[{len(ended)}/{len(todo)}] {verdict(worker)}")
                    bar.set_description(f"run {len(ended)}/{len(todo)}")
                if not slots[slot] and waiting:
                    slots[slot] = Worker(*waiting.pop(0), log_path, envs[slot], lock)
            bar.update(sum(worker.epochs_done() for worker in (*ended, *filter(None, slots))) - bar.n)
            time.sleep(0.5)
    finally:
        bar.close()
        for worker in filter(None, slots):  # all first, so that they save at the same time
            worker.ask_to_stop()
        for worker in filter(None, slots):
            worker.process.wait()
        signal.signal(signal.SIGTERM, before)
    return [worker for worker in ended if worker.process.returncode]


def verdict(worker: Worker) -> str:
    """One line on a run that ended: its accuracies, or its last words."""
    if worker.was_interrupted():
        done = len(read_metrics(worker.folder))
        return f"{worker.run.name}: interrupted after {done} epochs; the same command goes on with it"
    if worker.process.returncode:
        return f"{worker.run.name}: FAILED: {worker.last_words()} (all of it: {worker.log})"
    last = read_metrics(worker.folder)[-1]
    shown = (f"{name} {last[key]:.3f}" for name, key in HEADS.items() if last.get(key) is not None)
    return f"{worker.run.name}: {'  '.join(shown)}"


def environments(jobs: int | None, device: str) -> list[dict]:
    """An environment for each run at a time: a fair share of the cores, and of the GPUs one each."""
    import torch

    gpus = torch.cuda.device_count() if device != "cpu" else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = jobs or (1 if gpus else cores)
    envs = []
    for slot in range(jobs):
        env = dict(os.environ)
        if not gpus:
            env.setdefault("OMP_NUM_THREADS", str(max(1, cores // jobs)))
        elif jobs > 1:
            visible = env.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
            env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
        envs.append(env)
    return envs


@contextmanager
def alone_in(log_path: Path):
    """Hold `log_path` for this command and the runs it starts. Raises `UserError` if another one does."""
    log_path.mkdir(parents=True, exist_ok=True)
    with open(log_path / ".compare.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{log_path}: another comparison, or a run that outlived one, is at work in it; "
                            "wait for it, or choose another --log_path") from None  # fmt: skip
        yield lock.fileno()


def main(argv: list[str] | None = None) -> int:
    args, rest = parse_args(argv)
    # Not at the top: this command stands on train.py, while everything else here stands below it. Its own parser is
    # asked, so that a mistyped flag is told now and not by twenty failed runs.
    import train

    plan, log_path = make_plan(args, rest, train), Path(args.log_path)
    defaults = train.flags(train.parse_args(["--train"]))
    with alone_in(log_path) as lock:
        stock = [(run, take_stock(run, log_path, defaults)) for run in plan]
        note_command(log_path, sys.argv[1:] if argv is None else argv, plan)
        todo = [(run, action) for run, action in stock if action != "done"]
        counts = {action: sum(a == action for _, a in stock) for action in ("start", "resume", "done")}
        print(f"{len(plan)} runs in {log_path}: {counts['start']} to start, {counts['resume']} to go on with, "
              f"{counts['done']} finished already", flush=True)  # fmt: skip
        others = [run.name for run, action in stock if action == "done" and of_other_code(log_path / run.name)]
        if others:
            print(f"note: {len(others)} of the finished ones are of another commit of this code, {others[0]} for one; "
                  "delete their folders to run them again", flush=True)  # fmt: skip
        failures = []
        if todo:
            for flags in {(run.flags["dataset"], run.flags["data_root"]): run.flags for run, _ in todo}.values():
                train.load_parts(Namespace(**flags))  # makes the demo once, and tells of broken data before any run
            envs = environments(args.jobs, todo[0][0].flags["device"])
            failures = run_all(todo, log_path, envs[: len(todo)], lock)
    report(args, plan, log_path)
    for worker in failures:
        print(f"{'' if worker.was_interrupted() else 'error: '}{verdict(worker)}", file=sys.stderr)
    if all(worker.was_interrupted() for worker in failures):
        return INTERRUPTED if failures else 0
    return 1


def note_command(log_path: Path, argv: list[str], plan: list[Planned]) -> None:
    """compare.json: which command made which runs, for the report."""
    path = log_path / "compare.json"
    notes = json.loads(path.read_text()) if path.exists() else {}
    notes[shlex.join(["bash", "scripts/run_compare.sh", *argv])] = [run.name for run in plan]
    write_json(path, notes)


def report(args: Namespace, plan: list[Planned], log_path: Path) -> None:
    """The report on the runs planned here; without a finished one there is nothing to report."""
    from utils.report import make_report  # late: matplotlib and SciPy are of no use before the end

    runs = [read_run(log_path / run.name) for run in plan if (log_path / run.name / "config.json").exists()]
    if all(run.problem for run in runs):
        print("no run has finished: nothing to report")
        return
    make_report(runs, Path(args.out) if args.out else log_path / "report")


if __name__ == "__main__":
    try:
        run_main(main)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
