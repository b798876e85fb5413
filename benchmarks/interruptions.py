"""Kill a run at random moments, resume it, and compare it with an uninterrupted run.

    python -m benchmarks.interruptions [--kills 30] [--terms 10]

First, a short Remix run on a part of the demo (120 clips, 6 epochs, warm-up 2) is made without interruption. Then the
run is started repeatedly, ended by SIGKILL (every fifth time while a checkpoint is written) or SIGTERM, and resumed
with `--resume runs/NAME`, which repeats the interrupted epoch. If there is nothing to interrupt at the random moment,
another moment is drawn. These must be equal: summary.json except the seconds, the weights of last.pth and best.pth bit
for bit, metrics.jsonl except seconds and rates, partition.csv. Each run is forked from this process, so that PyTorch is
imported once. Writes benchmarks/results/interruptions-<cpu>-<date>.json and .md. Exit status 1 if a run differs. Needs
Linux or macOS.
"""

import contextlib
import csv
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import termios
import time
from collections import Counter
from pathlib import Path

import torch

import train
from benchmarks.common import command
from benchmarks.saving import new_result
from dataset.prepare.demo import ensure_demo
from dataset.specs import get_spec
from utils.checkpoint import load_checkpoint
from utils.cli import Parser, number
from utils.errors import INTERRUPTED, UserError, run_main
from utils.run import environment, read_metrics

EPOCHS, WARMUP = 6, 2
CHANGING = ("seconds", "clips_per_second")
PHASES = {"scoring": "scoring", "train": "training", "test": "evaluation"}  # by the names of progress bars


def part_of_demo(folder: Path, train_clips: int = 120, test_clips: int = 40) -> Path:
    """A training folder with some of the demo's clips of every class; pictures and sounds are links to the demo's."""
    spec = get_spec("demo")
    demo = spec.root.resolve()
    ensure_demo(spec.root)
    folder.mkdir()
    for modality in spec.modalities:
        (folder / modality.folder).symlink_to(demo / modality.folder)
    for name in ("stat.csv", "prepare.json"):
        (folder / name).write_bytes((demo / name).read_bytes())
    for name, count in (("train", train_clips), ("test", test_clips)):
        with open(demo / f"{name}.csv", newline="") as file:
            rows = list(csv.reader(file))
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows[:: len(rows) // count][:count])
    return folder


class Attempt:
    """train.py in a forked process on a terminal of its own, where it shows progress bars. They tell what it does."""

    def __init__(self, words: list[str]):
        self.started, self.output = time.monotonic(), bytearray()
        self.terminal, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (50, 200))
        os.set_blocking(self.terminal, False)
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.terminal)
            os.dup2(theirs, 1)
            os.dup2(theirs, 2)
            sys.argv = ["train.py", *words]
            try:
                run_main(train.main)
            except SystemExit as end:
                sys.stdout.flush()
                os._exit(end.code if isinstance(end.code, int) else 1)
            finally:
                os._exit(1)
        os.close(theirs)

    def read(self) -> None:
        """Take what is on the terminal, so that the process never waits for a reader."""
        with contextlib.suppress(OSError):  # nothing there, or the process has ended
            while part := os.read(self.terminal, 65536):
                self.output += part

    def poll(self) -> int | None:
        """The exit status, or minus the signal; None while it works."""
        self.read()
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return None
        self.read()
        os.close(self.terminal)
        return os.waitstatus_to_exitcode(status)

    def wait(self) -> int:
        while (status := self.poll()) is None:
            time.sleep(0.002)
        return status

    @property
    def said(self) -> str:
        return self.output.decode(errors="replace").replace("\r", "\n")

    def phase(self, run: Path) -> str:
        """The operation at which the run ended, from the last progress bar and unfinished files."""
        if any(run.glob(".tmp-*.pth")):
            return "saving"
        if "curves of all runs" in self.said:
            return "after the summary"
        bars = re.findall(rf"epoch \d+ ({'|'.join(PHASES)}):", self.said)
        if not bars:
            return "start" if not run.exists() else "before the first step"
        done = len(read_metrics(run)) == EPOCHS
        return "pictures" if done and bars[-1] == "test" else PHASES[bars[-1]]


def found_in(run: Path) -> str:
    """The files that a stopped run left to resume from."""
    if (run / "last.pth").is_file():
        return f"{load_checkpoint(run / 'last.pth')['epoch'] + 1} epochs"
    return "no checkpoint" if (run / "config.json").is_file() else "nothing"


def disturb(words: list[str], run: Path, number: int, kind: str, moment: float) -> dict:
    """Start, interrupt after `moment` seconds, resume until it is done. Returns what happened."""
    attempt, saves = Attempt([*words, "--run_name", run.name]), 0
    at_save = kind == "SIGKILL" and number % 5 == 4  # while the (moment-th) checkpoint is being written
    status, seen, due = None, "", False
    while status is None:
        if at_save:
            writing = "".join(str(path) for path in run.glob(".tmp-*.pth"))
            saves += bool(writing) and writing != seen
            seen = writing or seen
            due = bool(writing) and saves > number // 5 % 5
        else:
            due = time.monotonic() - attempt.started >= moment
        if due:
            os.kill(attempt.pid, signal.SIGKILL if kind == "SIGKILL" else signal.SIGTERM)
            seconds, status = time.monotonic() - attempt.started, attempt.wait()
            break
        time.sleep(0.0005 if at_save else 0.002)
        status = attempt.poll()
    else:
        seconds = time.monotonic() - attempt.started
    row = {"signal": kind, "seconds": round(seconds, 2), "status": status, "phase": attempt.phase(run)}
    row["interrupted"] = due and status == (-signal.SIGKILL if kind == "SIGKILL" else INTERRUPTED)
    if not row["interrupted"]:
        return row  # done before its time came, or, SIGTERM, not begun yet or drawing its pictures: nothing to resume
    row["had"] = found_in(run)
    # Killed before config.json there is no run to name: the same command again.
    again = [*words, "--run_name", run.name, "--resume", "auto"] if row["had"] == "nothing" else ["--resume", str(run)]
    resumed = Attempt(again)
    row["resumed_status"] = resumed.wait()
    if row["resumed_status"]:
        print(resumed.said[-1000:], file=sys.stderr)
    return row


def outcome(run: Path) -> dict:
    """The results that must not depend on interruptions."""
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = [torch.load(run / name, weights_only=True)["model"] for name in ("last.pth", "best.pth")]
    return {
        "summary": {name: value for name, value in summary.items() if name != "total_seconds"},
        "metrics": [{k: v for k, v in line.items() if not k.startswith(CHANGING)} for line in lines],
        "partition": (run / "partition.csv").read_bytes(),
        "weights": weights,
    }


def differences(found: dict, wanted: dict) -> list[str]:
    different = [name for name in ("summary", "metrics", "partition") if found[name] != wanted[name]]
    pairs = zip(found["weights"], wanted["weights"], strict=True)
    equal = all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)
    return different + ([] if equal else ["weights"])


def verdict(row: dict) -> str:
    return "equal" if not row["different"] else f"DIFFERENT: {', '.join(row['different'])}"


def measure(folder: Path, kills: int, terms: int) -> tuple[list[dict], float]:
    torch.set_num_threads(1)  # a fork copies no threads: the runs must not inherit a pool of them
    data, runs = part_of_demo(folder / "data"), folder / "runs"
    words = ["--train", "--dataset", "demo", "--data_root", str(data), "--log_path", str(runs), "--epochs", str(EPOCHS)]
    words += ["--warmup", str(WARMUP), "--device", "cpu", "--cache", "ram", "--batch_size", "24"]
    whole = 0.0
    for name in ("warm", "whole"):  # the first one makes the pack
        attempt = Attempt([*words, "--run_name", name])
        if status := attempt.wait():
            raise UserError(f"the undisturbed run ended with status {status}: {attempt.said[-500:]}")
        whole = time.monotonic() - attempt.started
    wanted, dice, rows, length = outcome(runs / "whole"), random.Random(0), [], whole
    for number_, kind in enumerate(["SIGKILL"] * kills + ["SIGTERM"] * terms):
        run = runs / f"run{number_}"
        while True:  # other programs on the machine stretch and shrink a run
            row = disturb(words, run, number_, kind, dice.uniform(0, 1) * length)
            if row["interrupted"]:
                break
            # SIGTERM before the run listens to it: it is slower than thought; else it was done before its moment.
            length *= 1.1 if row["status"] == -signal.SIGTERM else 0.9
            shutil.rmtree(run, ignore_errors=True)
        row["different"] = differences(outcome(run), wanted) if row["resumed_status"] == 0 else ["unfinished"]
        rows.append(row)
        shutil.rmtree(run)
        print(f"{number_ + 1:>3}/{kills + terms} {kind} {row['seconds']:>6.2f} s {row['phase']:<22} {row['had']:<14}"
              f"{verdict(row)}", flush=True)  # fmt: skip
    return rows, whole


def write(rows: list[dict], length: float) -> Path:
    about: dict = environment(torch.device("cpu"), 1) | {"command": command()}
    path = new_result("interruptions", about["hardware"]["cpu"]).with_suffix(".md")
    counts = {
        kind: Counter(not row["different"] for row in rows if row["signal"] == kind) for kind in ("SIGKILL", "SIGTERM")
    }
    lines = ["# Interrupted, resumed, compared", ""]
    same = "as the undisturbed run did (summary.json but for seconds, weights, metrics.jsonl, partition.csv)"
    lines += [f"{kind}: {count[True]} of {count.total()} end {same}.  " for kind, count in counts.items() if count]
    phases = Counter((row["signal"], row["phase"]) for row in rows)
    lines += [
        "",
        "Stopped in: " + ", ".join(f"{phase} {n} ({kind})" for (kind, phase), n in sorted(phases.items())) + ".",
    ]
    lines += ["", f"`{about['command']}`; a run of {length:.1f} s on {about['hardware']['cpu']}, "
              f"{about['hardware']['threads']} thread(s), Python {about['versions']['python']}, PyTorch "
              f"{torch.__version__}, commit {about['git_commit']}.", ""]  # fmt: skip
    lines += ["| # | signal | after, s | in | exit status | found there | resumed |", "|--:|---|--:|---|--:|---|---|"]
    for i, row in enumerate(rows, 1):
        cells = [row[name] for name in ("signal", "seconds", "phase", "status", "had")]
        lines.append("| " + " | ".join(map(str, [i, *cells, verdict(row)])) + " |")
    path.write_text("\n".join(lines) + "\n")
    path.with_suffix(".json").write_text(json.dumps(about | {"run_seconds": length, "rows": rows}, indent=1) + "\n")
    print("\n".join(lines[:7]))
    return path


def main() -> int:
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    runs = number(int, 0)
    parser.add_argument("--kills", type=runs, default=30, metavar="N", help="number of SIGKILLs (default: 30)")
    parser.add_argument("--terms", type=runs, default=10, metavar="N", help="number of SIGTERMs (default: 10)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, length = measure(Path(folder), args.kills, args.terms)
    print(write(rows, length))
    return 1 if any(row["different"] for row in rows) else 0


if __name__ == "__main__":
    run_main(main)
