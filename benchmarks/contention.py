"""Training speed on a CPU, alone and beside other busy processes, for several ways in which OpenMP's threads wait.

    python -m benchmarks.contention                        # the settings below, beside 0, 1, 2 and 4 busy processes
    python -m benchmarks.contention --threads 1,2,4 --rounds 10

Between two parallel regions, the threads of OpenMP spin for a while before they sleep. libgomp, which comes with
PyTorch's wheels on Linux, spins 300,000 times by default (milliseconds). Beside other processes, a thread that spins
takes the core that the thread it waits for needs. Each setting and number of threads has a process of its own, started
once; in each round every one of them trains for a moment in random order, while the others sleep. `kept` is the speed
beside n busy processes over that of the same process alone in the same round; its fair value for t threads on c cores
is c / (t + n), at most 1.
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

import remix
import train
from benchmarks.common import generate_folder, machine, save
from benchmarks.scaling import numbers
from dataset.build import build_data
from utils.cli import Parser, number
from utils.errors import run_main
from utils.memory import usable_cores
from utils.threads import SPINS

SETTINGS = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    **{f"spin {spins}": {"GOMP_SPINCOUNT": spins} for spins in dict.fromkeys(("100", "1000", "10000", SPINS))},
}
FRAME, SPECTROGRAM = (32, 32), (64, 32)
BATCH = 64


class Done(Exception):
    """The time is up."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    cores, counts = usable_cores(), partial(numbers, least=1)
    p = Parser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--rounds", type=number(int, 1), default=5, help="rounds after the warm-up (default: 5)")
    p.add_argument("--seconds", type=number(float, 0), default=1.0, help="seconds of each measurement (default: 1)")
    p.add_argument("--threads", type=counts, default=sorted({1, cores}), help="CPU threads (default: 1 and all cores)")
    p.add_argument("--busy", type=counts, default=[1, 2, 4], help="busy processes, besides none (default: 1,2,4)")
    p.add_argument("--unsaved", action="store_true", help="write no file of results (default: off)")
    p.add_argument("--worker", help=argparse.SUPPRESS)  # the training folder: train as the other side asks
    return p.parse_args(argv)


# ----------------------------------------------------------------------------------------------- a process that trains


def work(root: str) -> None:
    """For each line of standard input, a number of seconds, train for so long and print clips per second."""
    words = ["--train", "--dataset", "folder", "--data_root", root, "--device", "cpu", "--cache", "ram"]
    words += ["--encoder", "resnet18_thin", "--image_size", "32", "--batch_size", str(BATCH)]
    args = train.parse_args(words)
    device = torch.device("cpu")
    data = build_data(args, device)
    model = train.make_model(args, data, device)
    optimizer, clips = train.make_optimizer(model, args), data.clips["train"]
    plan = remix.batches_of(len(clips), BATCH, model.names, torch.Generator().manual_seed(0))
    print(torch.get_num_threads(), flush=True)
    for line in sys.stdin:
        clock, steps, seconds = time.perf_counter(), [], float(line)

        def note(clock=clock, steps=steps, seconds=seconds) -> None:
            steps.append(time.perf_counter() - clock)
            if steps[-1] >= seconds:
                raise Done

        try:
            while True:
                train.train_epoch(model, clips, plan, optimizer, 0, args, after_step=note)
        except Done:
            print(BATCH * len(steps) / steps[-1], flush=True)


# -------------------------------------------------------------------------------------------------------- all of them


@contextmanager
def trainers(root: Path, settings: dict[str, dict], threads: list[int]) -> Iterator[dict]:
    """A process for each number of threads and setting, (threads, setting) -> process. One thread waits for none."""
    free = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    found: dict[tuple[int, str], subprocess.Popen] = {}
    try:
        for count in threads:
            for name, changes in settings.items() if count > 1 else [("default", {})]:
                # An empty value counts as given by the user, and libgomp ignores it.
                env = free | {"OMP_NUM_THREADS": str(count), "GOMP_SPINCOUNT": ""} | changes
                command = [sys.executable, "-m", "benchmarks.contention", "--worker", str(root)]
                found[count, name] = subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE,
                                                      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
                assert answer(found[count, name]) == count
        yield found
    finally:
        for process in found.values():
            process.kill()
            process.wait()


@contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen]]:
    """Stopped processes that compute for ever when they are continued."""
    found = []
    try:
        for _ in range(count):
            found.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            found[-1].send_signal(signal.SIGSTOP)
        yield found
    finally:
        for process in found:
            process.kill()
            process.wait()


def answer(process: subprocess.Popen) -> float:
    assert process.stdout is not None
    return float(process.stdout.readline())


def speed(process: subprocess.Popen, seconds: float, busy: list[subprocess.Popen]) -> float:
    """Clips per second of a trainer beside processes that are busy meanwhile."""
    assert process.stdin is not None
    for other in busy:
        other.send_signal(signal.SIGCONT)
    try:
        process.stdin.write(f"{seconds}\n")
        process.stdin.flush()
        return answer(process)
    finally:
        for other in busy:
            other.send_signal(signal.SIGSTOP)


def measure(args: argparse.Namespace, settings: dict[str, dict]) -> dict[tuple[int, str, int], list[float]]:
    """(threads, setting, busy processes) -> clips per second of each round."""
    found: dict[tuple[int, str, int], list[float]] = {}
    order = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        root = generate_folder(Path(folder) / "data", 8 * BATCH, 4, FRAME, SPECTROGRAM)
        with trainers(root, settings, args.threads) as processes, busy_processes(max(args.busy)) as others:
            for process in processes.values():
                speed(process, args.seconds, [])  # warm up
            for _ in range(args.rounds):
                for count in args.busy:
                    for key in order.sample(sorted(processes), len(processes)):
                        rate = speed(processes[key], args.seconds, others[:count])
                        found.setdefault((*key, count), []).append(rate)
                        print(f"{key[0]} threads, {key[1]}, beside {count}: {rate:.0f} clips/s", flush=True)
    return found


def fair_share(threads: int, busy: int, cores: int) -> float:
    """Of its speed alone, what `threads` keep beside `busy` processes if all of them get equal parts of `cores`."""
    return min(1.0, cores / (threads + busy) * threads / min(threads, cores))


def rows(found: dict[tuple[int, str, int], list[float]], args: argparse.Namespace, cores: int) -> list[dict]:
    """A row per number of threads and setting, after one of fair shares."""
    table = []
    for threads in args.threads:
        fair = {f"kept beside {n}": f"{fair_share(threads, n, cores):.2f}" for n in args.busy if n}
        table.append({"threads": threads, "setting": "(fair share)", "clips/s alone": None, "/ default": None, **fair})
        for setting in dict.fromkeys(name for count, name, _ in found if count == threads):
            alone = found[threads, setting, 0]
            usual = found[threads, "default", 0]
            row = {"threads": threads, "setting": setting, "clips/s alone": f"{statistics.median(alone):.0f}",
                   "/ default": spread([a / b for a, b in zip(alone, usual, strict=True)])}  # fmt: skip
            for n in args.busy:
                if n:
                    row[f"kept beside {n}"] = spread(
                        [a / b for a, b in zip(found[threads, setting, n], alone, strict=True)]
                    )
            table.append(row)
    return table


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.worker:
        work(args.worker)
        return
    args.busy = sorted({0, *args.busy})
    about, cores = machine(torch.device("cpu")), usable_cores()
    found = measure(args, SETTINGS)
    about |= {"cores": cores, "rounds": args.rounds, "seconds": args.seconds, "batch_size": BATCH,
              "encoder": "resnet18_thin", "load_after": round(os.getloadavg()[0], 2)}  # fmt: skip
    save(None if args.unsaved else "contention", about, {"Speed": rows(found, args, cores)})


if __name__ == "__main__":
    run_main(main)
