"""Interruptions: a run stopped anywhere, by signal or kill, is resumed to the same weights, files and numbers.

Checkpoints are of whole epochs: what is stopped or killed inside of one repeats it.
"""

import errno
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers import REPO, TINY, make_folder, run, shown_in_table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from utils import run as run_module
from utils.errors import INTERRUPTED, Interrupted, UserError, run_main
from utils.files import writing
from utils.run import FORMAT
from utils.signals import Signals

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
    for name, keys in (("last.pth", ("optimizer", "scheduler", "balance", "keep", "rng", "best")), ("best.pth", ())):
        states = [torch.load(folder / name, weights_only=True) for folder in (a, b)]
        for key in ("model", "epoch", "classes", *keys):
            assert same(*(state[key] for state in states)), (name, key)
    assert numbers(a) == numbers(b)
    assert (a / "partition.csv").read_bytes() == (b / "partition.csv").read_bytes()
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (a, b)]
    assert [s.pop("total_seconds") > 0 for s in summaries] == [True, True] and summaries[0] == summaries[1]
    assert scalars(a) == scalars(b)


def place() -> str:
    """Where in train.py a run asks whether to stop: at a step, or in which predictions."""
    frame = sys._getframe()
    while frame.f_code.co_name not in ("train_epoch", "predict"):
        frame = frame.f_back
    return "step" if frame.f_code.co_name == "train_epoch" else frame.f_locals["name"].split()[-1]


def test_stopped_again_and_again_is_bit_identical(data, runs, whole, monkeypatch):
    """At steps, in either evaluation, in scoring; in an epoch's repetition too."""
    stops, ends = [("step", 2), ("test", 1), ("val", 2), ("scoring", 1), ("step", 6), ("test", 2), ("scoring", 1),
                   ("val", 1), ("step", 99)], []  # fmt: skip
    for where, n in stops:  # the n-th time that an attempt asks there
        calls = itertools.count(1)
        monkeypatch.setattr(
            Signals, "asked", lambda self, where=where, n=n, calls=calls: place() == where and next(calls) == n
        )
        try:
            run(data, runs, "stopped", *FLAGS, "--resume", "auto")
        except Interrupted:
            last = runs / "stopped" / "last.pth"
            ends.append(torch.load(last, weights_only=True)["epoch"] if last.exists() else None)
    assert ends == [None, None, 0, 0, 1, 2, 2, 2]
    assert_same_run(whole, runs / "stopped")


class Killed(BaseException):
    """As kill -9 does: nothing is tidied up after it."""


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_at_a_random_step_is_bit_identical(data, runs, whole, monkeypatch, seed):
    """Nothing of the epoch in which it was killed is left, and half-written files do not matter."""
    name, steps = f"killed{seed}", []
    fatal = random.Random(seed).randint(4 * seed + 1, 4 * seed + 4)  # three or four batches an epoch
    step = torch.optim.Adam.step

    def die(*args, **kwargs):
        steps.append(bool(numbers(runs / name)))
        if len(steps) == fatal:
            raise Killed
        return step(*args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", die)
    with pytest.raises(Killed):
        run(data, runs, name, *FLAGS)
    monkeypatch.undo()
    assert (runs / name / "last.pth").exists() == (fatal > 3) and steps.count(False) == min(fatal, 3)
    (runs / name / ".tmp-left.pth").write_bytes(b"half a checkpoint")
    with open(runs / name / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 9, "test_')
    if fatal > 3:
        train.main(["--resume", str(runs / name)])
    else:
        run(data, runs, name, *FLAGS, "--resume", "auto")
    assert_same_run(whole, runs / name)
    assert not list((runs / name).glob(".tmp-*"))


def test_killed_between_the_numbers_of_an_epoch_and_its_checkpoint_is_bit_identical(data, runs, whole, monkeypatch):
    """metrics.jsonl and best.pth know of an epoch that last.pth does not: it is repeated, and told of once."""
    save, seen = run_module.save_checkpoint, []
    step, steps, late = torch.optim.Adam.step, itertools.count(1), threading.Event()

    def count(*args, **kwargs):
        if next(steps) == 6:  # the last but one of the second epoch
            late.set()
        return step(*args, **kwargs)

    def die(path, *args, **kwargs):
        """The first checkpoint is written when the second epoch has changed the weights, the second one never."""
        seen.append(path.name)
        if seen.count("last.pth") == 2:
            raise Killed
        assert late.wait(60)
        return save(path, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", count)
    monkeypatch.setattr(run_module, "save_checkpoint", die)
    with pytest.raises(Killed):
        run(data, runs, "unsaved", *FLAGS)
    monkeypatch.undo()
    assert len(numbers(runs / "unsaved")) == 2
    assert torch.load(runs / "unsaved" / "last.pth", weights_only=True)["epoch"] == 0
    train.main(["--resume", str(runs / "unsaved")])
    assert_same_run(whole, runs / "unsaved")


@pytest.mark.parametrize("epochs", ["1", "3"])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(data, tmp_path, monkeypatch, capsys, epochs):
    """At a step of the next epoch; in the last epoch before the summary."""
    step, steps = torch.optim.Adam.step, []

    def full(path, state, sync=True):
        with writing(path, "continue with --resume"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def count(*args, **kwargs):
        steps.append(len(numbers(tmp_path / "full")) if (tmp_path / "full" / "metrics.jsonl").exists() else 0)
        time.sleep(0.05)  # so that the thread has failed by the next one
        return step(*args, **kwargs)

    monkeypatch.setattr(run_module, "save_checkpoint", full)
    monkeypatch.setattr(torch.optim.Adam, "step", count)
    with pytest.raises(SystemExit) as end:
        run_main(lambda: run(data, tmp_path, "full", "--method", "baseline", "--epochs", epochs))
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ") and "No space left" in err and err.count("\n") == 1
    assert not (tmp_path / "full" / "summary.json").exists() and len(numbers(tmp_path / "full")) == 1
    assert steps.count(0) == 4 and steps.count(1) <= 2


def test_two_checkpoints_are_never_written_at_once(data, tmp_path, monkeypatch):
    """Nor is an epoch's line written before the checkpoint of the epoch before."""
    save, inside, most, lines = run_module.save_checkpoint, [], [], []

    def slow(path, state, sync=True):
        inside.append(path)
        most.append(len(inside))
        time.sleep(0.2)
        lines.append((state["epoch"], len(numbers(tmp_path / "slow"))))
        save(path, state, sync)
        inside.pop()

    monkeypatch.setattr(run_module, "save_checkpoint", slow)
    run(data, tmp_path, "slow", "--method", "audio", "--epochs", "3")
    assert set(most) == {1} and len(most) >= 4 and all(written == epoch + 1 for epoch, written in lines)
    found = [json.loads(line) for line in (tmp_path / "slow" / "metrics.jsonl").read_text().splitlines()]
    assert [line["seconds_write"] is None for line in found] == [True, False, False]
    assert found[1]["seconds_write"] > 0.4 and 0 < found[0]["seconds_save"] < 0.2


@pytest.mark.parametrize("fatal", [2, 4])  # in the first epoch, in the scoring's epoch
def test_a_signal_ends_the_run_with_its_own_status_and_the_command_that_resumes_it(
    data, runs, whole, monkeypatch, capsys, fatal
):
    terms, steps = train.loss_terms, []

    def signalled(*args):
        steps.append(len(steps))
        if len(steps) == fatal:
            os.kill(os.getpid(), signal.SIGTERM)
        return terms(*args)

    monkeypatch.setattr(train, "loss_terms", signalled)
    save = run_module.save_checkpoint  # slow: the signal comes while it writes
    monkeypatch.setattr(run_module, "save_checkpoint", lambda *args, **kwargs: (time.sleep(0.3), save(*args, **kwargs)))
    before, name = signal.getsignal(signal.SIGTERM), f"a term {fatal}"  # a name that a shell would take apart
    flags = ["--train", "--data_root", str(data), "--log_path", str(runs), "--run_name", name]
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: train.main([*TINY, *flags, *FLAGS]))
    assert stop.value.code == INTERRUPTED == 75 and len(steps) == fatal
    assert signal.getsignal(signal.SIGTERM) is before
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "SIGTERM" in said and ("no epoch was completed" if fatal == 2 else "holds 1 epochs") in said
    assert (runs / name / "last.pth").exists() == (fatal == 4)
    words = shlex.split(said.split("continue with: python train.py ")[1])
    assert words == ["--resume", str(runs / name)]
    train.main(words)
    assert ("resumed after epoch 1" in capsys.readouterr().out) == (fatal == 4)
    assert_same_run(whole, runs / name)


def test_a_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGINT)  # of a job in the background: that it is ignored
    signals = Signals()
    signals.listen()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)  # a bytecode for the handler to run in
        assert signals.asked() and signals.noted == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        signals.restore()
    assert signal.getsignal(signal.SIGINT) is before


# Two processes that are never stopped, two of which one gets a signal, and what resumes those. argv: the runs' folder
# and train.py's words; the last line says with which statuses they ended.
STOPPED = """
import os, signal, sys, time
from pathlib import Path
from pairs import end, start
runs, words = Path(sys.argv[1]), ["train.py", *sys.argv[2:]]
whole = end(start(*words, "--run_name", "two-whole"))
pids, metrics = start(*words, "--run_name", "two"), runs / "two" / "metrics.jsonl"
while not (metrics.exists() and metrics.read_text()):
    time.sleep(0.005)
os.kill(pids[1], signal.SIGTERM)
stopped = end(pids)
print(whole, stopped, end(start("train.py", "--resume", str(runs / "two"))))
"""


def test_all_processes_stop_at_the_same_step_and_are_resumed(data, runs):
    """SIGTERM to one of two; stopped and resumed, they end as two that were never stopped."""
    words = [*TINY, "--train", "--data_root", str(data), "--log_path", str(runs), "--warmup", "1", "--epochs", "3"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests")])}
    command = [sys.executable, "-c", STOPPED, str(runs), *words, "--batch_size", "4", "--device", "cpu"]
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[0, 0] [75, 75] [0, 0]", done.stderr[-3000:]
    said = f"continue with: torchrun --nproc_per_node=2 train.py --resume {runs / 'two'}\n"
    assert done.stderr.count("continue with: ") == done.stderr.count(said) == 1
    assert "resumed after epoch" in done.stdout
    assert_same_run(runs / "two-whole", runs / "two")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder whose dataset has defaults of its own, and a run of two epochs on it."""
    root = make_folder(tmp_path_factory.mktemp("own") / "data", train=12, test=6)
    description = {"modalities": [{"name": "audio", "kind": "array", "folder": "audio"},
                                  {"name": "video", "kind": "frames", "folder": "visual", "frames": 2}],
                   "image_size": 24, "learning_rate": 0.004, "encoder": "resnet18_thin"}  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(description))
    flags = ["--train", "--dataset", "folder", "--data_root", str(root), "--log_path", str(root.parent / "runs")]
    train.main([*flags, "--run_name", "own", *OWN])
    return root.parent / "runs" / "own"


OWN = ["--batch_size", "4", "--cache", "ram", "--epochs", "2", "--warmup", "1", "--alpha", "0.3", "--score", "loss",
       "--random_seed", "7", "--lr_decay_step", "1", "--balance", "ogm_ge:alpha=0.4"]  # fmt: skip


@pytest.fixture
def copied(own, tmp_path):
    """A copy of that run in another place, as a run that was moved."""
    return shutil.copytree(own, tmp_path / "moved" / "own")


def test_a_run_s_folder_is_all_that_resuming_needs(copied, capsys):
    """Every flag is that of its config.json, in its own dataset; what may change does."""
    before = json.loads((copied / "config.json").read_text())
    assert (before["image_size"], before["learning_rate"], before["random_seed"]) == (24, 0.004, 7)
    args = train.parse_args(["--resume", str(copied)])
    kept = {name: value for name, value in before.items() if hasattr(args, name)} | {
        "resume": "auto", "log_path": str(copied.parent)}  # fmt: skip
    assert {name: getattr(args, name) for name in kept} == kept and args.dataset == "folder"
    train.main(["--resume", str(copied), "--epochs", "3", "--num_workers", "0", "--cache", "none"])
    assert "resumed after epoch 2" in capsys.readouterr().out and len(numbers(copied)) == 3
    after = json.loads((copied / "config.json").read_text())
    changed = {"epochs": 3, "num_workers": 0, "cache": "none", "resume": "auto", "log_path": str(copied.parent)}
    differs = {name for name in before if before[name] != after[name]} - {"command", "git_commit"}
    assert {name: after[name] for name in differs} == {name: value for name, value in changed.items()
                                                       if before[name] != value}  # fmt: skip
    assert {"epochs", "num_workers", "cache", "resume", "log_path"} == set(changed) >= differs >= {"epochs", "cache"}
    # The learning rate is still decayed from the rate it was started with.
    assert [line["lr"] for line in numbers(copied)] == pytest.approx([0.004, 0.0004, 0.00004])


@pytest.mark.parametrize(("flags", "named"), [
    (["--alpha", "0.7"], "--alpha 0.3 (now 0.7)"),
    (["--random_seed", "8"], "--random_seed 7 (now 8)"),
    (["--learning_rate", "0.1"], "--learning_rate 0.004 (now 0.1)"),
    (["--method", "baseline"], "--method remix (now baseline)"),
    (["--balance", "none"], "--balance ogm_ge:alpha=0.4 (now none)"),
    (["--image_size", "32"], "--image_size 24 (now 32)"),
    (["--precision", "bf16"], "--precision fp32 (now bf16)"),
    (["--dataset", "CREMAD"], ""),  # its classes are others: refused where the data is read
])  # fmt: skip
def test_a_flag_that_makes_another_run_is_refused_in_one_line(own, flags, named, capsys):
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    with pytest.raises(SystemExit) as end:
        run_main(lambda: train.main(["--resume", str(own), "--epochs", "3", *flags]))
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and err.startswith("error: ") and named in err
    if named:
        assert "only these may change: " in err and "epochs" in err
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before


def test_a_flag_that_an_older_run_does_not_know_gets_its_dataset_s_default(copied):
    config = json.loads((copied / "config.json").read_text())
    for name in ("image_size", "learning_rate", "encoder", "rescore_every", "val_fraction", "score"):
        del config[name]
        config["from_preset"].pop(name, None)
    (copied / "config.json").write_text(json.dumps(config))
    args = train.parse_args(["--resume", str(copied)])
    assert (args.image_size, args.learning_rate, args.encoder) == (24, 0.004, "resnet18_thin")
    assert (args.rescore_every, args.val_fraction, args.score) == (1, 0.0, "kl")


def test_resume_auto_starts_a_run_and_continues_it(data, runs, capsys):
    """One command for a scheduler that repeats it: also where the run is finished."""
    flags = ("--method", "audio", "--resume", "auto", "--epochs")
    for epochs, said in (("1", ""), ("2", "resumed after epoch 1"), ("2", "resumed after epoch 2")):
        run(data, runs, "auto", *flags, epochs)
        out = capsys.readouterr().out
        assert ("resumed after" in out) == bool(said) and said in out and "best on test" in out
        assert len(numbers(runs / "auto")) == int(epochs)


def test_a_run_of_an_earlier_format_is_evaluated_and_not_resumed(copied, capsys):
    state = torch.load(copied / "last.pth", weights_only=True)
    assert state.pop("format") == FORMAT == 2
    torch.save(state, copied / "last.pth")
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    with pytest.raises(SystemExit) as end:
        run_main(lambda: train.main(["--resume", str(copied), "--epochs", "3"]))
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and err.startswith("error: --resume: ")
    assert "earlier version" in err and "--checkpoint" in err
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
    train.main(["--checkpoint", str(copied / "last.pth")])
    shown = shown_in_table(capsys.readouterr().out)
    assert float(shown[0]) == pytest.approx(numbers(copied)[-1]["test_acc"], abs=5e-5)


def test_resuming_with_other_data_is_told(data, runs, whole, tmp_path):
    other = make_folder(tmp_path / "other", train=30, test=12)
    with pytest.raises(UserError, match=r"has other clips or labels in test than when the run was started"):
        train.main(["--resume", str(whole), "--data_root", str(other)])


def test_a_run_killed_before_its_first_checkpoint_starts_again(data, runs, capsys):
    folder = runs / "early"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    flags = ("--epochs", "1", "--method", "audio")
    with pytest.raises(UserError, match="exists already"):
        run(data, runs, "early", *flags)
    with pytest.raises(UserError, match=r"early: no run \(it has no readable config\.json\)"):
        train.main(["--resume", str(folder)])
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt but no last\.pth"):
        run(data, runs, "early", *flags, "--resume", "auto")
    (folder / "notes.txt").unlink()
    run(data, runs, "early", *flags, "--resume", "auto")
    assert "starting again" in capsys.readouterr().out and len(numbers(folder)) == 1
