"""Interruptions: a run stopped anywhere, by signal or kill, goes on to the same weights, files and numbers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import TINY, make_folder, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from dataset.clips import Feed, make_clips
from dataset.folder import load_folder
from dataset.specs import get_spec
from remix import batches_of
from utils.cli import interval, interval_of, resume_command
from utils.errors import INTERRUPTED, Interrupted, UserError, run_main

REPO = Path(__file__).resolve().parents[1]
FLAGS = ["--epochs", "4", "--warmup", "1", "--rescore_every", "2", "--val_fraction", "0.2"]
SECONDS = ("seconds", "clips_per_second")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"), train=30, test=9)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(data, runs):
    return run(data, runs, "whole", *FLAGS)


def numbers(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(SECONDS)} for line in lines]


def scalars(folder):
    """Every scalar and histogram of TensorBoard as (step, value), as TensorBoard itself reads the folder."""
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0, "images": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith((*SECONDS, "speed/"))]
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}
    found |= {tag: [(e.step, e.histogram_value.sum) for e in events.Histograms(tag)]
              for tag in events.Tags()["histograms"]}  # fmt: skip
    return found | {tag: [e.step for e in events.Images(tag)] for tag in events.Tags()["images"]}


def same(a, b):
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a, b):
    for name in ("last.pth", "best.pth"):
        states = [torch.load(folder / name, weights_only=True) for folder in (a, b)]
        for key in ("model", "optimizer", "scheduler", "epoch", "kept", "rng"):
            assert same(*(state[key] for state in states)), (name, key)
    assert numbers(a) == numbers(b)
    assert (a / "partition.csv").read_bytes() == (b / "partition.csv").read_bytes()
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (a, b)]
    assert [s.pop("total_seconds") > 0 for s in summaries] == [True, True] and summaries[0] == summaries[1]
    assert scalars(a) == scalars(b)


@pytest.fixture
def stop_at(monkeypatch):
    """Makes the run find itself asked to stop when it asks for the n-th time."""

    def set_stop(n):
        calls = iter(range(1, 10**9))
        monkeypatch.setattr(train.interrupt, "asked", lambda: next(calls) == n)

    return set_stop


def test_stopped_again_and_again_is_bit_identical(data, runs, whole, stop_at):
    """Every third time it may, it stops: in scoring, at steps, in either evaluation, before the summary."""
    places, attempts = set(), 0
    while True:
        stop_at(3)
        resume = ["--resume"] if attempts else []
        attempts += 1
        try:
            run(data, runs, "stopped", *FLAGS, *resume)
            break
        except Interrupted:
            state = torch.load(runs / "stopped" / "last.pth", weights_only=True)
            position = state["position"]
            places.add(position["batches"] if position else "end")
        assert attempts < 40
    assert attempts > 5 and {0, 3} <= places  # before a step (scoring), after all of them (evaluation)
    assert len(places) > 2  # and in between
    assert_same_run(whole, runs / "stopped")


class Killed(BaseException):
    """As kill -9 does: nothing is tidied up after it."""


@pytest.mark.parametrize("every", ["2", "2steps"])
def test_killed_between_saves_is_bit_identical(data, runs, whole, monkeypatch, every):
    name, saves = f"killed{every}", []
    step = torch.optim.Adam.step

    def die(*args, **kwargs):
        saves.append((runs / name / "last.pth").exists())
        if len(saves) == 11:
            raise Killed
        return step(*args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", die)
    with pytest.raises(Killed):
        run(data, runs, name, *FLAGS, "--save_every", every)
    monkeypatch.undo()
    assert saves.index(True) == {"2": 6, "2steps": 2}[every]  # three batches an epoch
    (runs / name / ".tmp-left.pth").write_bytes(b"half a checkpoint")
    with open(runs / name / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 9, "test_')
    run(data, runs, name, *FLAGS, "--save_every", "1", "--resume")
    assert_same_run(whole, runs / name)
    assert not list((runs / name).glob(".tmp-*"))


def test_a_signal_ends_the_run_with_its_own_status_and_the_command_that_goes_on(data, runs, monkeypatch, capsys):
    flags = ["--train", "--epochs", "2", "--method", "audio", "--data_root", str(data), "--log_path", str(runs)]
    terms, steps = train.loss_terms, []

    def signalled(*args):
        steps.append(len(steps))
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return terms(*args)

    monkeypatch.setattr(train, "loss_terms", signalled)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: train.main([*TINY, *flags, "--run_name", "term"]))
    assert stop.value.code == INTERRUPTED == 75 and len(steps) == 2
    assert signal.getsignal(signal.SIGTERM) is before
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "SIGTERM" in said and "epoch 0, batch 2" in said and "--run_name term --resume" in said
    words = said.split("go on: python train.py ")[1].split()
    train.main(words)
    assert len(steps) == 8 and "resumed in epoch 0 after batch 2" in capsys.readouterr().out
    assert [line["epoch"] for line in numbers(runs / "term")] == [0, 1]


def test_a_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGINT)  # of a job in the background: that it is ignored
    with train.interrupt:
        train.interrupt.listen()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)  # a bytecode for the handler to run in
        assert train.interrupt.asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


# Two processes as torchrun would start them, forked, so that PyTorch is imported once for six of them. argv: the runs'
# folder and train.py's words; the last line says with which statuses the stopped two ended.
PAIRS = """
import os, signal, sys, time
from pathlib import Path
import train
from utils.errors import run_main
runs, words = Path(sys.argv[1]), sys.argv[2:]
def start(port, *more):
    pids = []
    for rank in range(2):
        pids.append(os.fork())
        if pids[-1] == 0:
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in group.items()}, MASTER_ADDR="127.0.0.1")
            sys.argv = ["train.py", *words, *more]
            try:
                run_main(train.main)
            except SystemExit as end:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(end.code)
            finally:
                os._exit(99)
    return pids
def end(pids):
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
port = int(os.environ["PAIRS_PORT"])
whole = end(start(port, "--run_name", "two-whole"))
pids, metrics = start(port + 1, "--run_name", "two"), runs / "two" / "metrics.jsonl"
while not (metrics.exists() and metrics.read_text()):
    time.sleep(0.005)
os.kill(pids[1], signal.SIGTERM)
stopped = end(pids)
print(whole, stopped, end(start(port + 2, "--run_name", "two", "--resume")))
"""


def test_all_processes_stop_at_the_same_step_and_go_on(data, runs):
    """SIGTERM to one of two; stopped and resumed, they end as two that were never stopped."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [*TINY, "--train", "--data_root", str(data), "--log_path", str(runs), "--warmup", "1", "--epochs", "3"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PAIRS_PORT": str(min(port, 65000)), "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", PAIRS, str(runs), *words, "--batch_size", "2", "--device", "cpu"]
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[0, 0] [75, 75] [0, 0]", done.stderr[-3000:]
    assert done.stderr.count("go on: torchrun --nproc_per_node=2 train.py") == 1
    assert "resumed in epoch" in done.stdout
    assert_same_run(runs / "two-whole", runs / "two")


def test_resuming_with_other_flags_or_data_is_told(data, runs, whole, tmp_path, capsys):
    base = ["--log_path", str(runs), "--run_name", "whole", "--train", "--resume", *TINY, *FLAGS]
    with pytest.raises(UserError, match=r"--alpha 0\.5 \(now 0\.7\).*only these may change: .*epochs.*save_every"):
        train.main([*base, "--data_root", str(data), "--alpha", "0.7"])
    train.main([*base, "--data_root", str(data), "--save_every", "3"])
    assert "changed: --save_every 1epochs (now 3epochs)" in capsys.readouterr().out
    other = make_folder(tmp_path / "other", train=30, test=12)
    with pytest.raises(UserError, match="other clips or labels in test than the run had"):
        train.main([*base, "--data_root", str(other)])


def test_a_run_killed_before_its_first_checkpoint_starts_anew(data, runs, capsys):
    folder = runs / "early"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="exists already"):
        run(data, runs, "early", "--epochs", "1", "--method", "audio")
    run(data, runs, "early", "--epochs", "1", "--method", "audio", "--resume")
    assert "starting anew" in capsys.readouterr().out and len(numbers(folder)) == 1
    with pytest.raises(UserError, match=r"has no last\.pth"):
        run(data, runs, "never-there", "--epochs", "1", "--method", "audio", "--resume")


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_an_epoch_from_its_middle_is_the_rest_of_it(data, cache):
    spec = get_spec("folder")
    folder = load_folder(data, spec)
    feed = Feed(2, 32, torch.device("cpu"), cache, 1)
    clips = make_clips(folder.root, "train", folder.parts["train"], folder.audio_shape, feed)
    plan = batches_of(30, 8, "both", torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    all_of_it, rest = (list(clips.epoch(plan, torch.Generator().manual_seed(2), first=first)) for first in (0, 2))
    assert torch.equal(state, torch.get_rng_state())  # starting workers draws nothing
    assert len(all_of_it) == 4 and len(rest) == 2
    for a, b in zip(all_of_it[2:], rest, strict=True):
        assert torch.equal(a.clips, b.clips) and torch.equal(a.video, b.video) and torch.equal(a.audio, b.audio)


def test_save_every_and_the_command_to_go_on():
    assert [interval_of(interval(text)) for text in ("5", "1epoch", "200steps", "1step")] == [
        (5, "epochs"), (1, "epochs"), (200, "steps"), (1, "steps")]  # fmt: skip
    words = ["--train", "--checkpoint", "x.pth", "--epochs", "3"]
    assert resume_command(words, "a b", False) == "python train.py --train --epochs 3 --run_name 'a b' --resume"
    words = ["--run_name=r", "--resume", "--checkpoint=x.pth"]
    assert resume_command(words, "r", True) == "python train.py --run_name=r --resume"
