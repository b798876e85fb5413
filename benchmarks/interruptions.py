"""Kill a run at random moments, resume it, and hold it against the run that was left alone.

    python -m benchmarks.interruptions [--kills 30] [--terms 10]

A short Remix run on a part of the demo (120 clips, 6 epochs, warm-up 2) is made once undisturbed. Then it is started
again and again, ended by kill -9 (every fifth one while a checkpoint is being written, half of all with checkpoints
every 3 steps) or by SIGTERM, and resumed. A moment at which there is nothing to interrupt is drawn again. What must be
equal: summary.json but for the seconds, weights of last.pth and best.pth bit for bit, metrics.jsonl but for seconds and
rates, partition.csv. Each run is a process forked from this one, so that PyTorch is not imported a hundred times.
Writes benchmarks/results/interruptions-<cpu>-<date>.json and .md; exit status 1 if a run came out otherwise.
"""

import argparse
import csv
import json
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import train
from benchmarks.common import command
from benchmarks.saving import new_result
from dataset.demo import ensure_demo
from dataset.specs import get_spec
from utils.cli import number
from utils.errors import INTERRUPTED, UserError, run_main
from utils.logging import environment

EPOCHS, WARMUP = 6, 2
CHANGING = ("seconds", "clips_per_second")
PHASES = {"train predictions": "scoring", "test predictions": "evaluation", "train": "training"}


def part_of_demo(folder: Path, train_clips: int = 120, test_clips: int = 40) -> Path:
    """A training folder of the demo's first clips of every class; pictures and sounds are links to the demo's."""
    demo = get_spec("demo").root.resolve()
    ensure_demo(get_spec("demo").root)
    folder.mkdir()
    for name in ("visual", "audio"):
        (folder / name).symlink_to(demo / name)
    for name in ("stat.csv", "prepare.json"):
        (folder / name).write_bytes((demo / name).read_bytes())
    for name, count in (("train", train_clips), ("test", test_clips)):
        with open(demo / f"{name}.csv", newline="") as file:
            rows = list(csv.reader(file))
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows[:: len(rows) // count][:count])
    return folder


class Attempt:
    """train.py at work in a forked process, its output in a file."""

    def __init__(self, words: list[str], log: Path):
        self.log, self.started = log, time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.argv = ["train.py", *words]
            try:
                run_main(train.main)
            except SystemExit as end:
                sys.stdout.flush()
                os._exit(end.code)
            finally:
                os._exit(1)

    def poll(self) -> int | None:
        """The exit status, or minus the signal; None while it works."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def phase(self, run: Path) -> str:
        """What it was doing when it ended, by the last progress bar and by unfinished files."""
        if any(run.glob(".tmp-*.pth")):
            return "saving"
        said = self.log.read_text(errors="replace").replace("\r", "\n")
        if "curves of all runs" in said:
            return "after the summary"
        bars = re.findall(r"(?:epoch \d+,? )?(train predictions|test predictions|train):", said)
        if not bars:
            return "start" if not run.exists() else "before the first step"
        done = (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").exists() else 0
        return "pictures" if done == EPOCHS and bars[-1] == "test predictions" else PHASES[bars[-1]]


def disturb(words: list[str], run: Path, log: Path, number: int, kind: str, moment: float) -> dict:
    """Start, interrupt after `moment` seconds, resume until it is done. Returns what happened."""
    attempt, saves = Attempt(words, log), 0
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
    row = {"signal": kind, "save_every": words[-1], "seconds": round(seconds, 2), "status": status,
           "phase": attempt.phase(run)}  # fmt: skip
    if kind == "SIGTERM" and status == INTERRUPTED:
        row["said"] = log.read_text(errors="replace").strip().splitlines()[-1].split(";")[0].split("stopped by ")[-1]
    row["interrupted"] = due and (kind == "SIGKILL" or status == INTERRUPTED)
    if not row["interrupted"]:
        return row  # done before its time came, or, SIGTERM, not begun yet or drawing its pictures: nothing to resume
    row["had"] = "last.pth" if (run / "last.pth").exists() else "no checkpoint" if run.exists() else "nothing"
    again = [*words, "--resume"] if run.exists() and any(run.iterdir()) else words
    row["resumed_status"] = Attempt(again, log).wait()
    return row


def outcome(run: Path) -> dict:
    """What must not depend on interruptions."""
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
    data, runs = part_of_demo(folder / "data"), folder / "runs"
    words = ["--train", "--dataset", "demo", "--data_root", str(data), "--log_path", str(runs), "--epochs", str(EPOCHS)]
    words += ["--warmup", str(WARMUP), "--device", "cpu", "--cache", "ram", "--batch_size", "24"]
    for name in ("warm", "whole"):  # the first one makes the pack
        started = time.monotonic()
        status = Attempt([*words, "--run_name", name], folder / "log").wait()
        length = time.monotonic() - started
        if status:
            raise UserError(f"the undisturbed run ended with {status}: {(folder / 'log').read_text()[-500:]}")
    wanted, dice, rows = outcome(runs / "whole"), random.Random(0), []
    for number_, kind in enumerate(["SIGKILL"] * kills + ["SIGTERM"] * terms):
        name = f"run{number_}"
        flags = [*words, "--run_name", name, "--save_every", "3steps" if number_ % 2 else "1"]
        while True:  # other programs on the machine stretch and shrink a run
            row = disturb(flags, runs / name, folder / "log", number_, kind, dice.uniform(0, 1) * length)
            if row["interrupted"]:
                break
            length = min(length, max(row["seconds"], 0.9 * length))
            shutil.rmtree(runs / name, ignore_errors=True)
        row["different"] = differences(outcome(runs / name), wanted) if row["resumed_status"] == 0 else ["unfinished"]
        rows.append(row)
        print(f"{number_ + 1:>3}/{kills + terms} {kind} {row['seconds']:>6.2f} s {row['phase']:<22} {row['had']:<14}"
              f"{verdict(row)}", flush=True)  # fmt: skip
    return rows, length


def write(rows: list[dict], length: float) -> Path:
    about = environment(torch.device("cpu"), 1) | {"command": command()}
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
              f"{about['hardware']['threads']} thread(s), Python {platform.python_version()}, PyTorch "
              f"{torch.__version__}, commit {about['git_commit']}.", ""]  # fmt: skip
    lines += ["| # | signal | after, s | in | `--save_every` | exit status | found there | resumed |",
              "|--:|---|--:|---|---|--:|---|---|"]  # fmt: skip
    for i, row in enumerate(rows, 1):
        cells = [row[name] for name in ("signal", "seconds", "phase", "save_every", "status", "had")]
        lines.append("| " + " | ".join(map(str, [i, *cells, verdict(row)])) + " |")
    path.write_text("\n".join(lines) + "\n")
    path.with_suffix(".json").write_text(json.dumps(about | {"run_seconds": length, "rows": rows}, indent=1) + "\n")
    print("\n".join(lines[:7]))
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=number(int, 0), default=30, metavar="N", help="runs ended by kill -9 (30)")
    parser.add_argument("--terms", type=number(int, 0), default=10, metavar="N", help="runs ended by SIGTERM (10)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, length = measure(Path(folder), args.kills, args.terms)
    print(write(rows, length))
    return 1 if any(row["different"] for row in rows) else 0


if __name__ == "__main__":
    run_main(main)
