"""Whole steps replayed from graphs, on a stand-in for CUDA graphs: what is recorded runs again on the same tensors.

Like CUDA's, the stand-in's capture computes nothing, its replay runs the recorded kernels on the memory they were
recorded with, and no Python: numbers are those of the capture.
"""

from argparse import Namespace
from contextlib import contextmanager

import pytest
import torch
from helpers import numbers_of, run
from networks import network
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from balance import Balance, Step
from dataset.clips import ClipBatch
from utils import graphs
from utils.graphs import GraphedSteps, graphed

CPU = torch.device("cpu")
NAMES = ("audio", "video")
RATE = 2**-10  # exact in float32 too, in which graphs hold it


def storages(tree):
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Recorder(TorchDispatchMode):
    """Records every kernel in the block, and undoes what they did to tensors from before it."""

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for storage in storages((args, kwargs)):
            if storage._cdata not in self.made and storage._cdata not in self.before:
                self.before[storage._cdata] = storage, storage.clone()
        out = func(*args, **(kwargs or {}))
        self.made |= {storage._cdata for storage in storages(out) if storage._cdata not in self.before}
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def undo(self):
        for storage, values in self.before.values():
            storage.copy_(values)
        self.before = {}


class StandIn:
    """What `torch.cuda.CUDAGraph` is to the code: `replay`."""

    def __init__(self, calls):
        self.calls, self.replays = calls, 0

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            with torch._C._AutoDispatchBelowAutograd():
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                        old.copy_(new)


class StandInCapture:
    def __init__(self):
        self.graphs = []

    def warm_up(self, function):
        return function()

    def capture(self, function):
        recorder = Recorder()
        with recorder:
            outputs = function()
        recorder.undo()
        self.graphs.append(StandIn(recorder.calls))
        return self.graphs[-1], outputs


# --------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_from_graphs_equals_an_eager_one_to_the_last_bit(data, tmp_path, monkeypatch):
    """Joint and homogeneous epochs, a decay of the rate in each, odd last batches, and a resume without graphs."""
    flags = ("--warmup", "2", "--score", "random", "--learning_rate", str(RATE), "--lr_decay_step", "1",
             "--lr_decay_ratio", "0.5")  # fmt: skip
    plain = run(data, tmp_path, "plain", *flags, "--epochs", "6")
    captures = []

    def on_the_cpu(function, args, device):
        if args.compile != "graphs":
            return function
        captures.append(StandInCapture())
        return GraphedSteps(function, captures[-1])

    monkeypatch.setattr(train, "graphed", on_the_cpu)
    run(data, tmp_path, "graphs", *flags, "--epochs", "5", "--compile", "graphs")
    folder = run(data, tmp_path, "graphs", *flags, "--epochs", "6", "--resume", "auto")
    assert [graph.replays > 1 for graph in captures[0].graphs] == [True] * 3  # joint, video, audio
    states = [torch.load(path / "last.pth", weights_only=True) for path in (plain, folder)]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    assert numbers_of(plain) == numbers_of(folder)
    assert states[0]["optimizer"]["param_groups"] == states[1]["optimizer"]["param_groups"]  # plain numbers


# -------------------------------------------------------------------------------------------------------------- steps


def arguments(*more: str) -> Namespace:
    words = ["--train", "--dataset", "folder", "--device", "cpu", "--batch_size", "4", "--learning_rate", str(RATE)]
    return train.parse_args([*words, *more])


def twelve_steps(args, run_step, make_optimizer=train.make_optimizer, model="late"):
    """Weights, and what every step returned, after joint, video, audio batches in turn; the rate is halved twice."""
    torch.manual_seed(0)
    net = network(3, model=model).train()
    optimizer = make_optimizer(net, args)
    draw, found = torch.Generator().manual_seed(1), []
    for i in range(12):
        fed = (NAMES, ("video",), ("audio",))[i % 3] if i < 9 else NAMES
        clips = 4 if i != 7 else 3  # a last batch
        inputs = {"audio": torch.randn(clips, 1, 33, 20, generator=draw),
                  "video": torch.randn(clips, 2, 3, 32, 32, generator=draw)}  # fmt: skip
        labels = torch.randint(0, 3, (clips,), generator=draw)
        batch = ClipBatch(torch.arange(clips), fed, {name: inputs[name] for name in fed}, labels, clips, 1.0)
        found.append(run_step(net, optimizer, Balance(), args, Step(0, i, batch, len(fed) > 1)))
        for group in optimizer.param_groups:
            group["lr"] *= 0.5 if i in (6, 10) else 1
    return [*net.state_dict().values(), *tree_leaves(found)]


def same(ours, theirs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_steps_from_graphs_equal_eager_ones_for_each_optimizer(optimizer, monkeypatch):
    monkeypatch.setattr(graphs, "WARM_UP", 1)
    args, capture = arguments("--optimizer", optimizer), StandInCapture()
    assert same(twelve_steps(args, GraphedSteps(train.train_step, capture)), twelve_steps(args, train.train_step))
    assert [graph.replays for graph in capture.graphs] == [5, 1, 2]


@pytest.mark.parametrize("model", ["mmtm", "centralnet"])
def test_steps_of_staged_networks_from_graphs_equal_eager_ones(model, monkeypatch):
    monkeypatch.setattr(graphs, "WARM_UP", 1)
    args, capture = arguments("--model", model, "--compile", "graphs"), StandInCapture()
    ours = twelve_steps(args, GraphedSteps(train.train_step, capture), model=model)
    assert same(ours, twelve_steps(args, train.train_step, model=model))
    assert [graph.replays for graph in capture.graphs] == [5, 1, 2]


def without_copying_in(own, batch, optimizer):
    own.graph.replay()
    return graphs.tree_map(torch.clone, own.outputs)


def without_cloning(own, batch, optimizer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "tree_map", lambda function, tensors: tensors)
        return REPLAYED(own, batch, optimizer)


@contextmanager
def with_the_rate_of_the_capture(optimizer, device):
    yield [torch.tensor(group["lr"]) for group in optimizer.param_groups]


REPLAYED = graphs.replayed
FAULTS = {"stale input": ("replayed", without_copying_in), "output not cloned": ("replayed", without_cloning),
          "rate baked in": ("rates_in_tensors", with_the_rate_of_the_capture)}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_stand_in_shows_what_would_go_wrong_in_a_graph(fault, monkeypatch):
    args = arguments()
    monkeypatch.setattr(graphs, "WARM_UP", 1)
    monkeypatch.setattr(graphs, *FAULTS[fault])
    ours = twelve_steps(args, GraphedSteps(train.train_step, StandInCapture()))
    assert not same(ours, twelve_steps(args, train.train_step))


def test_what_cannot_be_captured_runs_eagerly_after_one_line(monkeypatch, capsys):
    class Refusing(StandInCapture):
        def capture(self, function):
            super().capture(function)
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setattr(graphs, "WARM_UP", 1)
    args, capture = arguments(), Refusing()
    assert same(twelve_steps(args, GraphedSteps(train.train_step, capture)), twelve_steps(args, train.train_step))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("--compile graphs: a step of audio+video cannot be captured (CUDA error") and "eager" in line
    assert len(capture.graphs) == 1  # and is not tried again


@pytest.mark.parametrize(("words", "why"), [
    ("--compile graphs", "needs a CUDA GPU, and this run uses cpu"),
    ("--compile all --balance pmr", "--balance pmr acts inside the step"),
    ("--compile graphs --balance reconboost", "--balance reconboost acts inside the step"),
])  # fmt: skip
def test_what_stands_against_graphs_is_one_line(words, why, capsys):
    device = CPU if "--balance" not in words else torch.device("cuda", 0)
    assert graphed(train.train_step, arguments(*words.split()), device) is train.train_step
    assert why in capsys.readouterr().out
    assert graphed(train.train_step, arguments("--compile"), CPU) is train.train_step
    assert capsys.readouterr().out == ""
