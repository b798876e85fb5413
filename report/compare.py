"""Compare methods, seeds and flags: one train.py run per combination, then one report.

    bash scripts/run_compare.sh                                     # demo: baseline, Remix, each modality; 5 seeds
    bash scripts/run_compare.sh --methods baseline,remix --seeds 0,1 --grid warmup=5,10 --epochs 40

Run names are derived from the flags, so the same command resumes after an interruption: finished runs are reused,
unfinished runs are resumed, and runs made with other flags are refused. `--methods` takes train.py's methods and the
names in `report.runs.VARIANTS`.
"""

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

import train
from dataset.build import load_parts
from dataset.specs import spec_of
from report.runs import HOW, NOT_FLAGS, VARIANTS, quantities, read_run, unread
from utils.cli import Parser, format_list, number
from utils.errors import INTERRUPTED, UserError, run_main
from utils.memory import usable_cores
from utils.progress import Progress
from utils.run import BEGINNINGS, git_commit, read_metrics, write_json

TRAIN = "train.py"  # the working directory is the repository's
# Flags that this command sets for each run -> what to use instead.
OURS = {"method": "--methods", "random_seed": "--seeds", "run_name": "--log_path", "resume": "the same command again",
        "train": "nothing", "help": "nothing"}  # fmt: skip


class Planned(NamedTuple):
    """One run: its name, the command-line arguments of train.py, and the flags that train.py parses from them."""

    name: str
    argv: list[str]
    flags: dict


# ------------------------------------------------------------------------------------------------------------- plan


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, list[str]]:
    """Parse the flags of this command; return them and the remaining arguments, which go to train.py."""
    p = Parser(prog="run_compare.sh", description=__doc__,
               formatter_class=RawDescriptionHelpFormatter)  # fmt: skip
    p.add_argument("--methods", metavar="A,B",
                   help=f"methods to compare: {', '.join((*train.METHODS, *VARIANTS))}, or modalities, each trained "
                        "alone (default: baseline, remix and every modality)")  # fmt: skip
    p.add_argument("--seeds", default="0,1,2,3,4", metavar="A,B", help="seeds of each method (default: 0,1,2,3,4)")
    p.add_argument("--grid", action="append", default=[], metavar="FLAG=A,B",
                   help="values of a train.py flag; repeated flags form a grid (default: none)")  # fmt: skip
    p.add_argument("--jobs", type=number(int, 1), metavar="N",
                   help="concurrent runs (default: one per visible GPU; on a CPU one per core)")  # fmt: skip
    p.add_argument(
        "--log_path", default="runs/compare", metavar="DIR", help="folder of the runs (default: runs/compare)"
    )
    p.add_argument("--out", metavar="DIR", help="folder of the report (default: <log_path>/report)")
    p.add_argument("--format", type=format_list, default=("png",), metavar="A,B",
                   help="figure formats: png, pdf, svg (default: png)")  # fmt: skip
    p.epilog = "All other flags are passed to every run; see python train.py --help."
    return p.parse_known_args(argv)


def make_plan(args: Namespace, rest: list[str]) -> list[Planned]:
    """All runs in the order they start: every method of a seed before the next seed.

    With this order, an interrupted comparison is a complete comparison of fewer seeds. Raises `UserError` for anything
    that train.py refuses.
    """
    seeds, axes = seeds_of(args.seeds), [_axis(text) for text in args.grid]
    for flag in (word.split("=")[0].removeprefix("--") for word in rest if word.startswith("--")):
        if flag in OURS or flag in dict(axes):
            raise UserError(f"--{flag}: set for each run by this command; use {OURS.get(flag, '--grid alone')} instead")
    methods = _methods(args.methods, train.parse_args(["--train", "--method", "baseline", *rest]))
    plan: dict[str, Planned] = {}
    cells = list(itertools.product(*(values for _, values in axes)))  # one, empty, without --grid
    for seed, method, values in itertools.product(seeds, methods, cells):
        grid = [(flag, value) for (flag, _), value in zip(axes, values, strict=True)]
        run = planned(method, seed, grid, rest, args.log_path)
        plan.setdefault(run.name, run)  # a method that does not read a flag of the grid runs once
    return list(plan.values())


def _methods(text: str | None, asked: Namespace) -> list[str]:
    names = spec_of(asked.dataset, Path(asked.data_root)).names
    if text is None:
        return ["baseline", "remix", *names]
    allowed = (*train.METHODS, *VARIANTS, *names)
    for method in (methods := _items(text, "--methods")):
        if method not in allowed:
            raise UserError(f"--methods {method}: unknown; allowed: {', '.join(allowed)}")
    return methods


def planned(method: str, seed: int, grid: Sequence[tuple[str, str]], rest: list[str], log_path: str) -> Planned:
    """The run of a method (of train.py, or one of `VARIANTS`) and a seed; its name has the flags of `grid` in it.

    Flags of `grid` that the method does not read are left out. Raises `UserError` for anything that train.py refuses.
    """
    base, variant = VARIANTS.get(method, (method, {}))
    grid = [(flag, value) for flag, value in grid if flag not in unread(base)]
    chosen = [word for flag, value in [*variant.items(), *grid] for word in (f"--{flag}", str(value))]
    argv = ["--train", "--method", base, *chosen, *rest, "--random_seed", str(seed)]
    args = train.parse_args(argv)
    for flag, value in variant.items():
        if getattr(args, flag) != value:
            raise UserError(f"--{flag}: the method {method} sets it to {value}; omit the flag or the method")
    data = args.dataset if "data_root" in args.from_preset else f"{args.dataset}-{Path(args.data_root).name}"
    name = "_".join([data, method, *(_plain(f"{flag}-{value}") for flag, value in grid), f"seed{seed}"])
    argv += ["--log_path", log_path, "--run_name", name]
    args = train.parse_args(argv)
    flags = json.loads(json.dumps(train.flags(args) | {"from_preset": args.from_preset}))  # as config.json has them
    return Planned(name, [*argv, "--resume", "auto"], flags)


def _plain(text: str) -> str:
    return re.sub(r"[^\w.+-]", "-", text)


def _items(text: str, flag: str) -> list[str]:
    items = [item.strip() for item in text.split(",")]
    if "" in items or len(set(items)) < len(items):
        raise UserError(f"{flag} {text}: give comma separated values, each once")
    return items


def leading_words(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The arguments before the first flag, and the rest; `argv` None: those of this process.

    For commands whose other flags go to train.py: an argument after such a flag is read as that flag's value.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first], words[first:]


def seeds_of(text: str) -> list[int]:
    """The values of `--seeds`. Raises `UserError` unless they are distinct integers."""
    items = _items(text, "--seeds")
    if not all(item.isdecimal() for item in items):
        raise UserError(f"--seeds {text}: give whole numbers, such as 0,1,2")
    return [int(item) for item in items]


def _axis(text: str) -> tuple[str, list[str]]:
    flag, equals, values = text.removeprefix("--").partition("=")
    if not equals or not flag.isidentifier():
        raise UserError(f"--grid {text}: give FLAG=A,B, such as --grid warmup=5,10")
    if flag in OURS or flag == "log_path":
        raise UserError(f"--grid {flag}: cannot be varied; use {OURS.get(flag, 'another command')} instead")
    return flag, _items(values, f"--grid {flag}")


# ------------------------------------------------------------------------------------------------- what exists


def take_stock(run: Planned, log_path: Path) -> str:
    """The action for the folder of that name: "done", "resume" or "start".

    Raises `UserError` for a run made with other flags, and for files that are not of a run.
    """
    folder = log_path / run.name
    files = list(folder.iterdir()) if folder.exists() else []
    if not files:
        return "start"
    found = read_run(folder)
    if found.config:
        refuse_other_flags(run, found.config, folder)
        if not found.problem:
            return "done"
        if (folder / "last.pth").is_file():
            return "resume"
    foreign = [file.name for file in files if not any(file.match(pattern) for pattern in BEGINNINGS)]
    if foreign:
        raise UserError(f"{folder}: has {foreign[0]} but no run to resume; move it away, or choose another --log_path")
    return "start"  # train.py removes the files of a run that was stopped before its first checkpoint


def of_other_code(folder: Path) -> bool:
    """Whether a run was made by a commit other than the current one; False if either is unknown."""
    made, now = read_run(folder).config.get("git_commit"), git_commit()
    return None not in (made, now) and made != now


def refuse_other_flags(run: Planned, config: dict, folder: Path) -> None:
    """Raises `UserError` naming the flags in which the run in `folder` differs from the planned one."""
    skip = HOW | NOT_FLAGS | unread(run.flags["method"])
    skip -= {"diagnose"} if run.flags.get("diagnose") else set()  # required if it was requested
    before = defaults_of(config) | config
    changed = [name for name, value in run.flags.items() if name not in skip and before.get(name) != value]
    if changed:
        differences = ", ".join(f"--{name} {before.get(name)} (now {run.flags[name]})" for name in changed)
        raise UserError(f"{folder}: made with {differences}; give the same flags, or another --log_path")


def defaults_of(config: dict) -> dict:
    """The current defaults for a run's dataset. Runs that are older than a flag are assumed to have had its default."""
    where = [f"--{name}={config[name]}" for name in ("dataset", "data_root") if name in config]
    return json.loads(json.dumps(train.flags(train.parse_args(["--train", *where]))))


# -------------------------------------------------------------------------------------------------------------- run


class Worker:
    """One process of train.py. Its log is next to the run folder; its progress is read from metrics.jsonl."""

    def __init__(self, run: Planned, action: str, log_path: Path, env: dict):
        self.run, self.folder, self.log = run, log_path / run.name, log_path / f"{run.name}.log"
        self.before = self._epochs()
        with open(self.log, "a" if action == "resume" else "w") as file:
            self.process = subprocess.Popen([sys.executable, TRAIN, *run.argv], env=env, stdin=subprocess.DEVNULL,
                                            stdout=file, stderr=subprocess.STDOUT)  # fmt: skip

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
        """Send SIGTERM: it stops at once and can be resumed from its last epoch."""
        if not self.has_ended():
            self.process.terminate()

    def was_interrupted(self) -> bool:
        """Whether the run was stopped by a signal and can be resumed."""
        return self.process.returncode == INTERRUPTED

    def last_words(self) -> str:
        text = self.log.read_text(errors="replace").replace("\r", "\n")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else f"exit status {self.process.returncode}, no output"


def run_all(todo: list[tuple[Planned, str]], log_path: Path, envs: list[dict]) -> list[Worker]:
    """Run them, one at a time per environment; returns those that failed or were interrupted."""
    waiting, ended = list(todo), []
    slots: list[Worker | None] = [None] * len(envs)
    epochs = sum(run.flags["epochs"] - len(read_metrics(log_path / run.name)) for run, _ in todo)
    bar = Progress(f"run 0/{len(todo)}", epochs, "epoch", keep=True)
    # Raise an exception instead of exiting immediately, so that the runs are stopped too.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while waiting or any(slots):
            for slot, worker in enumerate(slots):
                if worker and worker.has_ended():
                    slots[slot] = None
                    ended.append(worker)
                    bar.write(f"[{len(ended)}/{len(todo)}] {verdict(worker)}")
                    bar.rename(f"run {len(ended)}/{len(todo)}")
                if not slots[slot] and waiting:
                    slots[slot] = Worker(*waiting.pop(0), log_path, envs[slot])
            bar.update(sum(worker.epochs_done() for worker in (*ended, *filter(None, slots))) - bar.done)
            time.sleep(0.5)
    finally:
        bar.close()
        for worker in filter(None, slots):  # signal all of them before waiting for any
            worker.ask_to_stop()
        for worker in filter(None, slots):
            worker.process.wait()
        signal.signal(signal.SIGTERM, before)
    return [worker for worker in ended if worker.process.returncode]


def timed_run(run: Planned, folder: Path, env: dict) -> Worker:
    """Train `run` in `folder`, to time it before a comparison. Raises `UserError` if it fails."""
    worker = Worker(run, "start", folder, env)
    try:
        worker.process.wait()
    finally:
        worker.ask_to_stop()
        worker.process.wait()
    if worker.process.returncode:
        raise UserError(f"the timed run failed: {worker.last_words().removeprefix('error: ')}")
    return worker


def verdict(worker: Worker) -> str:
    """One line on a run that ended: its accuracies, or the last line of its log."""
    run = read_run(worker.folder)
    if worker.was_interrupted():
        return f"{worker.run.name}: interrupted after {len(run.history)} epochs; the same command resumes it"
    if worker.process.returncode:
        return f"{worker.run.name}: FAILED: {worker.last_words()} (full log: {worker.log})"
    heads, last = list(quantities(run.modalities).items())[:-1], run.history[-1]
    shown = (f"{name} {last[key]:.3f}" for name, key in heads if last.get(key) is not None)
    return f"{worker.run.name}: {'  '.join(shown)}"


def environments(jobs: int | None, device: str, gpu_ids: str | None = None) -> list[dict]:
    """An environment per concurrent run: one visible GPU each, in turn, or on a CPU an equal share of the cores.

    By default there are as many runs at a time as visible GPUs, or on a CPU as cores. With `gpu_ids` every run uses
    those GPUs, so one runs at a time by default.
    """
    import torch

    gpus = torch.cuda.device_count() if device != "cpu" else 0
    cores = usable_cores()
    jobs = jobs or (1 if gpus and gpu_ids else gpus or cores)
    envs = []
    for slot in range(jobs):
        env = dict(os.environ)
        if not gpus:
            env.setdefault("OMP_NUM_THREADS", str(max(1, cores // jobs)))
        elif gpus > 1 and not gpu_ids:
            visible = env.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
            env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
        envs.append(env)
    return envs


@contextmanager
def alone_in(log_path: Path) -> Iterator[None]:
    """Lock `log_path` for this process. Raises `UserError` if another comparison has it.

    The operating system releases the lock when this process exits for any reason. SIGKILL cannot be handled, so the
    runs may still be training after it: stop them before running the same command again.
    """
    log_path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(log_path / ".compare.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        words = "another comparison is running here; wait for it, or choose another --log_path"
        raise UserError(f"{log_path}: {words}") from None
    try:
        yield
    finally:
        lock.release()


def check_data(flags: dict) -> None:
    """Make the demo once, and report broken data before any run starts."""
    load_parts(Namespace(**flags))


def main(argv: list[str] | None = None) -> int:
    args, rest = parse_args(argv)
    plan, log_path = make_plan(args, rest), Path(args.log_path)
    with alone_in(log_path):
        stock = [(run, take_stock(run, log_path)) for run in plan]
        words = sys.argv[1:] if argv is None else argv
        note_command(log_path, ["bash", "scripts/run_compare.sh", *words], plan)
        failures = train_missing(stock, log_path, args.jobs)
    report(args, plan, log_path)
    return exit_status(failures)


def train_missing(stock: list[tuple[Planned, str]], log_path: Path, jobs: int | None) -> list[Worker]:
    """Start or resume the runs that `take_stock` found unfinished; returns those that failed or were interrupted."""
    todo = [(run, action) for run, action in stock if action != "done"]
    counts = {action: sum(a == action for _, a in stock) for action in ("start", "resume", "done")}
    print(f"{len(stock)} runs in {log_path}: {counts['start']} to start, {counts['resume']} to resume, "
          f"{counts['done']} finished already", flush=True)  # fmt: skip
    others = [run.name for run, action in stock if action == "done" and of_other_code(log_path / run.name)]
    if others:
        print(f"note: {len(others)} finished runs were made by another commit of this code, such as {others[0]}; "
              "delete their folders to repeat them", flush=True)  # fmt: skip
    if not todo:
        return []
    for flags in {(run.flags["dataset"], run.flags["data_root"]): run.flags for run, _ in todo}.values():
        check_data(flags)
    envs = environments(jobs, todo[0][0].flags["device"], todo[0][0].flags["gpu_ids"])
    return run_all(todo, log_path, envs[: len(todo)])


def exit_status(failures: list[Worker]) -> int:
    """Print the outcome of each unfinished run. Returns 0 (none), `INTERRUPTED` if all can be resumed, else 1."""
    for worker in failures:
        print(f"{'' if worker.was_interrupted() else 'error: '}{verdict(worker)}", file=sys.stderr)
    if all(worker.was_interrupted() for worker in failures):
        return INTERRUPTED if failures else 0
    return 1


def note_command(log_path: Path, command: list[str], plan: list[Planned]) -> None:
    """Record in compare.json which command made which runs, for the report."""
    path = log_path / "compare.json"
    notes = json.loads(path.read_text()) if path.exists() else {}
    notes[shlex.join(command)] = [run.name for run in plan]
    write_json(path, notes)


def report(args: Namespace, plan: list[Planned], log_path: Path) -> None:
    """The report on the planned runs, if at least one is finished."""
    from report.write import make_report  # lazy import: matplotlib is only needed at the end

    runs = [read_run(log_path / run.name) for run in plan if (log_path / run.name / "config.json").exists()]
    if all(run.problem for run in runs):
        print("no run has finished: nothing to report")
        return
    make_report(runs, Path(args.out) if args.out else log_path / "report", formats=args.format)


if __name__ == "__main__":
    run_main(main)
