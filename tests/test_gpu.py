"""GPU correctness without a GPU, on the pretended one (`pretended_gpu`).

Whole runs of train.py, chosen so that every data path, kind of batch and balance method is in one of them, give the
weights and numbers of the CPU's bit for bit; within a training step or a batch of scoring the host never waits; every
convolution is fed channels-last; operations per step are held to a budget.

Faults planted in the code, each caught (`FAULTS` and the tests after it):

    a loss, labels or a constant left on the host; a balance method's state left there by a resume    raises
    a generator of the host for noise of the device; a device tensor given to NumPy                   raises
    .item(), a mask as an index, nonzero, synchronize in a step                                       a wait
    a list as an index, new_tensor, torch.tensor(device=...) in a step                                a wait
    a mixed batch's mask sent without pinned memory, or without non_blocking                          a wait
    maps brought to contiguous memory between two stages                                              a layout
    BatchNorm's statistics read from the device for every batch of an epoch                           a wait
    an operation more for each parameter of a step                                                    the budget
    no wait for the copy of a batch; one pinned buffer used again for the next batch                  raises
    no record_stream for a batch; a batch copied on the stream of the step                            noted
    frames mirrored the other way by the code for the GPU                                             the comparison

What a real GPU alone can show is the task of `python -m benchmarks.gpu`.
"""

import contextlib
import io
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TINY, make_folder, numbers_of, shown_in_table
from pretended_gpu import CUDA, PretendedGPU, Stream
from test_modalities import make_five

import balance as balances
import remix
import train
from balance import AGM, METHODS, Context, Method
from balance.mla import SharedHead
from dataset import augment, fixed
from dataset import clips as dataset_clips
from dataset.build import build_data
from models import MultimodalClassifier
from models.batchnorm import reestimate
from models.inference import predict
from utils.metrics import Tally
from utils.run import Run

CPU = torch.device("cpu")
SEED = 42
KINDS = {"joint": ("audio", "video"), "audio": ("audio",), "video": ("video",)}
VALIDATION = ["--val_fraction", "0.3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """19 training clips: batches of 8, 8 and 3. Spectrograms are square: oneDNN (docs/performance.md)."""
    return make_folder(tmp_path_factory.mktemp("data"), train=19, test=7, audio_shape=(33, 33))


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """Flow, audio, video, sequences and vectors."""
    return make_five(tmp_path_factory.mktemp("five") / "data", train=11, test=4)


# ---------------------------------------------------------------------------------------------- the pretended GPU


def test_it_refuses_what_cuda_refuses():
    with PretendedGPU():
        x = torch.arange(6.0, device=CUDA).view(2, 3)
        assert x.device == torch.zeros_like(x).device == torch.nn.Parameter(x).device == CUDA and x.is_cuda
        assert x.cpu().device == torch.ones(2).device == CPU
        for wrong in (
            lambda: x + torch.ones(2, 3),
            lambda: torch.cat([x, torch.ones(2, 3)]),
            lambda: torch.nn.functional.cross_entropy(x, torch.zeros(2, dtype=torch.long)),
            lambda: torch.ones(2, 3)[x[:, 0].long()],
            lambda: torch.randn(3, generator=torch.Generator(), device=CUDA),
            lambda: torch.randn(3, generator=torch.Generator(CUDA)),
            lambda: torch.nn.Linear(3, 2)(x),
            lambda: np.asarray(x),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
        assert (x * torch.tensor(2.0)).tolist() == [[0, 2, 4], [6, 8, 10]]  # a host tensor of no dimensions may


def test_it_notes_every_wait_and_no_other():
    with PretendedGPU() as gpu:
        x = torch.arange(6.0, device=CUDA).view(2, 3)
        for waits in (
            lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.cpu(), lambda: x.tolist(), lambda: x.nonzero(),
            lambda: x[x > 2], lambda: x[torch.tensor([1, 0])], lambda: x[[1, 0]], lambda: x.new_tensor([2.0]),
            lambda: torch.tensor([1.0], device=CUDA), lambda: torch.as_tensor([1.0], device=CUDA),
            lambda: torch.ones(3).to(CUDA), lambda: torch.ones(3).to(CUDA, non_blocking=True),
            lambda: torch.ones(3).pin_memory().to(CUDA), lambda: x.copy_(torch.ones(2, 3)), torch.cuda.synchronize,
        ):  # fmt: skip
            before = len(gpu.waits)
            waits()
            assert len(gpu.waits) == before + 1
            assert gpu.waits[-1].where.startswith("tests/test_gpu.py:")
        before = len(gpu.waits)
        torch.ones(3).pin_memory().to(CUDA, non_blocking=True), torch.empty(3, pin_memory=True)
        x[x[:, 0].long() % 2], torch.zeros(3, device=CUDA), x.mean(), x.new_ones(2), x[1], x.double().to(x)
        torch.randn(3, generator=torch.Generator(CUDA), device=CUDA)
        assert len(gpu.waits) == before
    assert torch.ones(2).device == CPU and not torch.cuda.is_available()


def test_it_refuses_what_streams_may_reorder():
    with PretendedGPU() as gpu:
        copies, done = torch.cuda.Stream(), torch.cuda.Event()
        host = torch.ones(3).pin_memory()
        with torch.cuda.stream(copies):
            there = host.to(CUDA, non_blocking=True)
            done.record(copies)
        with pytest.raises(RuntimeError, match="reads memory"):
            there.mul(2)
        torch.cuda.current_stream().wait_event(done)
        there.mul(2)
        with pytest.raises(RuntimeError, match="writes memory"):
            host.fill_(0)  # the copy may not have begun
        done.synchronize()
        host.fill_(0)
        with torch.cuda.stream(copies), pytest.raises(RuntimeError, match="writes memory"):
            there.fill_(1)  # the default stream may not have read it yet
        back = torch.empty(3, pin_memory=True).copy_(there, non_blocking=True)
        with pytest.raises(RuntimeError, match="reads memory"):
            back.sum()
        torch.cuda.synchronize()
        assert back.sum() == 3
        for waits in (True, False):
            del there  # without record_stream; its memory can be that of the next copy
            if waits:
                copies.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(copies):
                there = host.to(CUDA, non_blocking=True)
            assert len(gpu.races) == (not waits)
            torch.cuda.current_stream().wait_stream(copies)
            there.mul(2)


# ----------------------------------------------------------------------------------------------------- whole runs


class Steps:
    """Waits between the ends of two batches of one epoch or pass, and how many such steps there were of each kind."""

    def __init__(self, monkeypatch, gpu: PretendedGPU):
        self.gpu, self.frame, self.before = gpu, None, 0
        self.waits, self.kinds = [], Counter()
        monkeypatch.setattr(Run, "check", lambda run: self.check(sys._getframe(1)))

    def check(self, frame=None) -> None:
        """Called after each batch, by the loop whose `frame` this is."""
        frame = frame or sys._getframe(1)
        if frame is self.frame:
            step = frame.f_locals.get("step")
            self.kinds[step.kind if step else "predicted"] += 1
            self.waits += self.gpu.waits[self.before :]
        self.frame, self.before = frame, len(self.gpu.waits)


@contextlib.contextmanager
def choices_of_a_gpu():
    """On the CPU, what train.py does on a GPU alone and what changes last bits: last batches are filled up, crops take
    the way of fewest bytes, evaluation frames are rounded to whole levels."""
    own = train.few_sizes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "few_sizes", lambda network, args, _: own(network, args, CUDA))
        for module in (augment, fixed):
            patch.setattr(module, "saves_traffic", lambda _: True)
        yield


def run(data, runs, name: str, *flags: str, gpu: PretendedGPU | None = None):
    words = [*TINY, "--train", "--data_root", str(data), "--log_path", str(runs), "--run_name", name, "--epochs", "2",
             "--warmup", "1", "--precision", "fp32", "--cache", "device" if gpu else "ram", *flags]  # fmt: skip
    with gpu or choices_of_a_gpu(), contextlib.redirect_stdout(io.StringIO()):
        train.main([*words, "--device", "cuda" if gpu else "cpu"])
    return runs / name


def assert_same_runs(a, b) -> None:
    first, second = (torch.load(folder / "last.pth", weights_only=True) for folder in (a, b))
    assert list(first["model"]) == list(second["model"])
    assert [name for name, value in first["model"].items() if not torch.equal(value, second["model"][name])] == []
    assert numbers_of(a) == numbers_of(b)


class Case(SimpleNamespace):
    """Flags of a run on the pretended GPU, and the kinds of batches whose steps are seen in it."""


JOINT, BOTH = ("joint",), ("joint", "homogeneous")
RUNS = {
    "ram": Case(flags=["--cache", "ram", "--precision", "bf16", "--balance", "agm"], kinds=BOTH),
    "graphs": Case(flags=["--cache", "ram", "--compile", "graphs"], kinds=BOTH),  # warm-up: on a stream of its own
    "files": Case(flags=["--cache", "none", "--num_workers", "0", "--masked_encoder", "run", "--batchnorm", "running",
                         "--diagnose"], kinds=BOTH),
    "official": Case(flags=["--preset", "official", "--precision", "official"], kinds=BOTH),
    "many": Case(flags=["--balance", "mmcosine,opm:starts=0:p=1,pmr,gblend:probe=1,mmpareto,ogm_ge", *VALIDATION,
                        "--optimizer", "sgd"], kinds=BOTH),
    "dr": Case(flags=["--balance", "dr:every=1", "--epochs", "3", "--method", "baseline", *VALIDATION], kinds=JOINT),
    "resample": Case(flags=["--balance", "resample:warmup=1", "--method", "baseline"], kinds=("joint", "mixed")),
    "mla": Case(flags=["--balance", "mla:projection=paper:fusion=fixed", "--method", "baseline"],
                kinds=("homogeneous",)),
    "greedy": Case(flags=["--balance", "greedy:alpha=0:steps=1", "--model", "mmtm", "--method", "baseline"],
                   kinds=JOINT),
    "reconboost": Case(flags=["--balance", "reconboost:phase1=1:phase2=1", "--model", "late"], kinds=JOINT),
    "mixed": Case(flags=["--reassemble", "off", "--balance", "umt:epochs=1,dgl", "--fusion_method", "gated"],
                  kinds=("joint", "mixed")),
    "lfm": Case(flags=["--balance", "lfm:weight=learned:align=reverse_js,cml:rule=code,midas:starts=0,inforeg",
                       "--method", "baseline", *VALIDATION], kinds=JOINT),
    "centralnet": Case(flags=["--model", "centralnet", "--warmup", "0", "--epochs", "1"], kinds=("homogeneous",)),
    "five": Case(flags=["--warmup", "0", "--epochs", "1", "--encoder", "text=transformer"], kinds=("homogeneous",)),
    "five ram": Case(flags=["--cache", "ram", "--method", "baseline", "--epochs", "1"], kinds=JOINT),
}  # fmt: skip


def test_the_runs_have_every_method_and_data_path():
    text = " ".join(word for case in RUNS.values() for word in case.flags)
    assert [name for name in METHODS if name not in text] == []
    assert all(f"--cache {name}" in text for name in ("ram", "none"))  # the others are on the device
    assert {kind for case in RUNS.values() for kind in case.kinds} == {"joint", "homogeneous", "mixed"}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_the_cpu_and_no_step_waits(name, data, five, tmp_path, monkeypatch):
    folder, case = five if name.startswith("five") else data, RUNS[name]
    cached = ["--cache", "ram"] if "none" not in case.flags else []
    expected = run(folder, tmp_path, "cpu", *case.flags, *cached)
    gpu = PretendedGPU()
    steps = Steps(monkeypatch, gpu)
    found = run(folder, tmp_path, "gpu", *case.flags, gpu=gpu)
    assert_same_runs(expected, found)
    assert steps.waits == gpu.races == []
    assert set(case.kinds) <= set(steps.kinds)
    assert gpu.layouts == []


def test_a_run_resumes_and_is_evaluated_on_the_gpu_as_on_the_cpu(data, tmp_path, capsys):
    flags = ["--balance", "agm,pmr"]
    expected = run(data, tmp_path, "cpu", *flags)
    run(data, tmp_path, "gpu", *flags, "--epochs", "1", gpu=PretendedGPU())
    found = run(data, tmp_path, "gpu", *flags, "--resume", "auto", gpu=PretendedGPU())
    assert_same_runs(expected, found)
    capsys.readouterr()
    shown = []
    for device, path in (("cpu", expected), ("cuda", found)):
        with PretendedGPU() if device == "cuda" else choices_of_a_gpu():
            train.main([*TINY, "--data_root", str(data), "--checkpoint", str(path / "best.pth"), "--device", device])
        shown.append(shown_in_table(capsys.readouterr().out))
    assert shown[0] == shown[1]


# ------------------------------------------------------------------------------------------------- parts of a run


class Parts:
    """Data, network, optimizer and balance methods of a run, made as train.py makes them."""

    def __init__(self, data, *flags: str):
        words = [*TINY, "--train", "--data_root", str(data), "--epochs", "60", "--warmup", "30", "--precision", "fp32"]
        self.args = train.parse_args([*words, "--cache", "device", "--device", "cuda", *flags])
        self.data = build_data(self.args, CUDA)
        self.clips = self.data.clips["train"]
        self.model = train.make_model(self.args, self.data, CUDA)
        self.optimizer = train.make_optimizer(self.model, self.args)
        context = Context(self.model, self.data.clips, self.args, self.optimizer, train.train_epoch, lambda: None)
        self.balance = balances.make_balance(context)

    def epoch(self, plan, after_step=lambda: None) -> dict:
        return train.train_epoch(self.model, self.clips, plan, self.optimizer, 7, self.args, self.balance, after_step)

    def step(self, gpu: PretendedGPU, fed=("audio", "video"), mixed: bool = False) -> list:
        """The waits of one training step, the second of an epoch."""
        mask = torch.arange(8)[:, None] % 2 == torch.arange(2) if mixed else None
        ends: list[int] = []
        self.epoch([remix.Batch(torch.arange(8), fed, mask)] * 2, lambda: ends.append(len(gpu.waits)))
        return gpu.waits[ends[0] : ends[1]]


@pytest.fixture(scope="module")
def made(data):
    """Flags -> `Parts`, made once."""
    found = {}

    def make(*flags: str) -> Parts:
        if flags not in found:
            found[flags] = Parts(data, *flags)
        return found[flags]

    return make


FILLS = {"ones", "zeros", "full", "ones_like", "zeros_like", "full_like", "new_zeros", "new_ones", "new_full", "fill_"}


@pytest.mark.parametrize("kind", KINDS)
def test_counting_a_batch_fills_no_memory(kind, made, monkeypatch):
    counts, add = [], Tally.add

    def counted(*given):
        before = Counter(gpu.kernels)
        add(*given)
        counts.append(gpu.kernels - before)

    monkeypatch.setattr(Tally, "add", counted)
    with PretendedGPU() as gpu:
        made().epoch([remix.Batch(torch.arange(8), KINDS[kind])] * 3)
    assert FILLS & set(counts[0]) == {"zeros", "ones"}  # made once in an epoch
    assert counts[1] == counts[2] and not FILLS & set(counts[2]) and counts[2].total() <= 9


# Operations that launch a kernel, counted on this network in each kind of step. Raise a number knowingly.
BUDGET = {"joint": 425, "audio": 195, "video": 260}
SCORING = 215  # and in a batch of scoring


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_launches_no_more_than_its_budget(kind, made):
    with PretendedGPU() as gpu:
        counts = []
        plan = [remix.Batch(torch.arange(8), KINDS[kind])] * 3
        made().epoch(plan, lambda: counts.append(sum(gpu.kernels.values())))
        assert counts[2] - counts[1] == counts[1] - counts[0] <= BUDGET[kind]


def test_no_pass_waits_for_each_of_its_batches(made):
    with PretendedGPU() as gpu:
        parts, waits, kernels, counts = made(), [], [], []

        def check():
            waits.append(len(gpu.waits))
            kernels.append(sum(gpu.kernels.values()))

        predict(parts.model, parts.clips, KINDS["joint"], 4, check=check)
        assert len(waits) == 5 and waits[0] == waits[-1]
        assert kernels[2] - kernels[1] <= SCORING
        for size in (8, 4):
            before = len(gpu.waits)
            reestimate(parts.model, parts.clips, KINDS["joint"], size, SEED, 0)
            counts.append(len(gpu.waits) - before)
        assert counts[0] == counts[1] <= 6
        for plan in (2, 4):
            before = len(gpu.waits)
            parts.epoch([remix.Batch(torch.arange(4), KINDS["joint"])] * plan)
            counts.append(len(gpu.waits) - before)
        assert counts[2] == counts[3] <= 10


def test_copies_that_a_method_trains_have_few_sizes_of_batches_too(made, monkeypatch):
    sizes, forward = set(), torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, x: (
        sizes.add(len(x)) if x.requires_grad else None, forward(self, x))[1])  # fmt: skip
    with PretendedGPU():
        parts = made("--balance", "gblend:probe=1", *VALIDATION)
        assert len(parts.clips) % 8 > 1
        parts.balance.start_epoch(0)
    assert sizes == {8, 16}  # spectrograms, two frames of each clip


def test_clips_of_the_host_are_uploaded_beside_the_step_before(made):
    with PretendedGPU() as gpu:
        parts, ends = made("--cache", "ram"), []
        for fed in KINDS.values():
            parts.epoch([remix.Batch(torch.arange(8), fed)] * 3, lambda: ends.append(len(gpu.uploads)))
            assert gpu.uploads[ends[-3] : ends[-1]] == [False] * 2 * len(fed)
        assert gpu.races == []


# -------------------------------------------------------------------------------------------------- planted faults


def after_terms(patch, fault) -> None:
    """Plant `fault(terms)` where the loss is put together."""
    terms = train.loss_terms
    patch.setattr(train, "loss_terms", lambda *given: fault(terms(*given)))


def and_then(terms: dict, do) -> dict:
    do(terms["joint"])
    return terms


def host_labels(patch, parts):
    epoch = parts.clips.epoch
    patch.setattr(parts.clips, "epoch", lambda *given: (b._replace(labels=b.labels.cpu()) for b in epoch(*given)))


def send(pin: bool, non_blocking: bool):
    def sent(values, device):
        return (values.pin_memory() if pin else values).to(device, non_blocking=non_blocking)

    return lambda patch, parts: patch.setattr(dataset_clips, "_send", sent)


def contiguous(patch, parts):
    stage = parts.model.encoders["video"].layer2
    patch.setattr(stage, "forward", lambda x, own=stage.forward: own(x.contiguous()))


def host_index(patch, parts):
    patch.setattr(SharedHead, "forward", lambda self, features, fed=(), mask=None: features["audio"][[0, 1]])


def in_loss(do):
    return lambda patch, parts: after_terms(patch, lambda terms: and_then(terms, do))


def host_generator(patch, parts):
    own = Method.generator
    patch.setattr(Method, "generator", lambda self, step, device="cpu": own(self, step))


def host_means(patch, parts):
    (method,) = parts.balance.methods
    patch.setattr(method, "means", method.means)  # to be put back
    patch.setattr(AGM, "load_state_dict", lambda self, state: setattr(self, "means", state["means"]))
    method.load_state_dict({"means": method.means.cpu()})


def without_wait(patch, parts):
    patch.setattr(Stream, "wait_stream", lambda self, other: None)


def one_pinned_buffer(patch, parts):
    buffers, empty = {}, torch.empty

    def reused(shape, *rest, pin_memory=False, **named):
        if not pin_memory:
            return empty(shape, *rest, **named)
        if shape not in buffers:
            buffers[shape] = empty(shape, *rest, pin_memory=True, **named)
        return buffers[shape]

    patch.setattr(torch, "empty", reused)


RAISES = {
    "labels on the host": ([], host_labels),
    "a constant on the host": ([], in_loss(lambda loss: loss * torch.ones(3))),
    "a generator of the host": (["--balance", "ogm_ge"], host_generator),
    "state left on the host by a resume": (["--balance", "agm"], host_means),
    "a device tensor as an array": ([], in_loss(lambda loss: np.asarray(loss.detach()))),
    "a step that does not wait for its clips": (["--cache", "ram"], without_wait),
    "a pinned buffer that a copy still reads": (["--cache", "ram"], one_pinned_buffer),
}
WAITS = {
    "item": in_loss(lambda loss: loss.item()),
    "a test of a value": in_loss(lambda loss: bool(loss > 0)),
    "a mask as an index": in_loss(lambda loss: loss.new_zeros(3)[loss.new_zeros(3) == 0]),
    "nonzero": in_loss(lambda loss: loss.detach()[None].nonzero()),
    "synchronize": in_loss(lambda loss: torch.cuda.synchronize()),
    "a list as an index": in_loss(lambda loss: loss.new_zeros(3)[[0, 2]]),
    "new_tensor": in_loss(lambda loss: loss.new_tensor(2.0)),
    "a tensor made on the host": in_loss(lambda loss: torch.tensor([1.0], device=loss.device)),
    "a mask sent without pinned memory": send(False, True),
    "a mask sent without non_blocking": send(True, False),
}


@pytest.mark.parametrize("name", RAISES)
def test_a_planted_fault_raises(name, made, monkeypatch):
    flags, plant = RAISES[name]
    with PretendedGPU() as gpu:
        parts = made(*flags)
        assert parts.step(gpu) == []
        with monkeypatch.context() as patch, pytest.raises((RuntimeError, TypeError), match=r"device|numpy|memory"):
            plant(patch, parts)
            parts.step(gpu)


@pytest.mark.parametrize("name", WAITS)
def test_a_planted_wait_is_noted(name, made, monkeypatch):
    mixed = name.startswith("a mask sent")
    with PretendedGPU() as gpu:
        parts = made()
        WAITS[name](monkeypatch, parts)
        assert len(parts.step(gpu, mixed=mixed)) == 1
        monkeypatch.undo()
        assert parts.step(gpu, mixed=mixed) == []


def test_planted_reuse_of_memory_that_a_step_reads_is_noted(made, monkeypatch):
    with PretendedGPU() as gpu:
        parts = made("--cache", "ram")
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        parts.step(gpu)
        assert gpu.races


def test_planted_uploads_on_the_stream_of_the_step_are_noted(made, monkeypatch):
    monkeypatch.setattr(dataset_clips.Clips, "_upload", lambda self, values: values.to(CUDA, non_blocking=True))
    with pytest.raises(AssertionError):
        test_clips_of_the_host_are_uploaded_beside_the_step_before(made)


def test_a_planted_layout_is_noted(made, monkeypatch):
    with PretendedGPU() as gpu:
        parts = made()
        contiguous(monkeypatch, parts)
        parts.step(gpu)
        assert {shape[1] for _, shape in gpu.layouts} == {16}


def test_a_planted_read_for_every_batch_of_a_pass_is_noted(made, monkeypatch):
    forward = MultimodalClassifier.forward
    monkeypatch.setattr(MultimodalClassifier, "forward", lambda self, *given: (
        int(self.encoders["audio"].bn1.num_batches_tracked), forward(self, *given))[1])  # fmt: skip
    with pytest.raises(AssertionError):
        test_no_pass_waits_for_each_of_its_batches(made)


def test_planted_operations_exceed_the_budget(made, monkeypatch):
    in_loss(lambda loss: [p * 2 for p in made().model.parameters()])(monkeypatch, None)
    for kind in KINDS:
        with pytest.raises(AssertionError):
            test_a_step_launches_no_more_than_its_budget(kind, made)


def test_a_planted_difference_of_the_code_for_the_gpu_is_seen(data, tmp_path, monkeypatch):
    """Only the device's frames are drawn by it: the run on the CPU reads files."""
    flags = ["--epochs", "1", "--method", "baseline"]
    expected = run(data, tmp_path, "cpu", *flags)
    own = dataset_clips.crop_resize
    monkeypatch.setattr(dataset_clips, "crop_resize", lambda frames, boxes, flips, *rest: own(
        frames, boxes, ~flips if frames.is_cuda else flips, *rest))  # fmt: skip
    with pytest.raises(AssertionError):
        assert_same_runs(expected, run(data, tmp_path, "gpu", *flags, gpu=PretendedGPU()))
