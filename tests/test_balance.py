"""Balance methods: each against its formula in NumPy or by hand, and the contract that all of them keep.

The contract: a method in its neutral setting leaves training bit for bit as it is; in a homogeneous batch nothing
touches the masked encoder; what cannot go together is refused in one line.
"""

import contextlib
import io
import json
import math
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from helpers import REPO, make_folder, run, shown_in_table
from networks import network
from sklearn.cluster import KMeans
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

import balance
import remix
import train
from balance import METHODS, Context, Step, make_balance, notes, replace_heads
from balance.agm import clip_if_large, modulation
from balance.gblend import blend
from balance.mmpareto import joint_weight
from balance.ogm_ge import damping
from balance.opm import drop_chances
from balance.pmr import class_means, coefficients, subset
from balance.relearn import purity, reset_weight
from dataset.clips import ClipBatch, Feed, make_clips
from dataset.folder import load_folder
from dataset.specs import get_spec
from models.batchnorm import batchnorm_of_one_clip, reestimate
from models.checkpoint import official_name
from utils.errors import UserError
from utils.seeding import epoch_generator, step_generator

CLASSES, BATCH = 3, 12
TINY = ["--dataset", "folder", "--encoder", "resnet18_thin", "--image_size", "32", "--batch_size", str(BATCH)]
AUDIO, VIDEO, BOTH = ("audio",), ("video",), ("audio", "video")
# What makes a method do nothing; MMCosine and MLA have no such setting.
NEUTRAL = {
    "ogm_ge": ":alpha=0:noise=off",
    "agm": ":alpha=0:clip=0",
    "mmpareto": ":gamma=1 --alpha 0 --beta 0",
    "pmr": ":alpha=0:mu=0",
    "gblend": ":weights=0.5/0.5/1",
    "opm": ":q=0",
    "dr": ":lambda=0:every=7",
    "resample": ":level=modality:alpha=0",
}
ACTIVE = {"dr": ":every=7", "gblend": ":weights=1/2/3", "umt": ":epochs=1"}
OTHER_NETWORKS = ("greedy",)  # needs one: tests/test_greedy.py
EPOCHS = (7, 8)  # late enough for all of them


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"), train=25, test=9)  # 12 + 12 + 1 clips


@pytest.fixture(scope="module")
def clips(data):
    """train, and the test clips as val: no method may look for a test part."""
    folder = load_folder(data, get_spec("folder"))
    feed = Feed(folder.spec.modalities, 32, torch.device("cpu"), "ram")
    return {name: make_clips(folder.root, part, folder.parts[part], folder.shapes, feed)
            for name, part in (("train", "train"), ("val", "test"))}  # fmt: skip


def flags_of(text: str = "") -> Namespace:
    words = ["--train", *TINY, "--optimizer", "sgd", "--learning_rate", "0.01", "--val_fraction", "0.2"]
    return train.parse_args([*words, *text.split()])


def step(epoch: int, index: int, clips: int = 1) -> Step:
    """A joint batch of which only the numbers matter."""
    return Step(epoch, index, ClipBatch(torch.arange(clips), BOTH, {}, torch.zeros(clips), clips, 1.0), True)


class Trained:
    """A network with the methods of some flags, and its optimizer, seeded alike."""

    def __init__(self, clips, text: str = "", dtype: torch.dtype = torch.float32):
        self.clips, self.args, self.dtype = clips, flags_of(text), dtype
        torch.manual_seed(0)
        self.net = network(CLASSES, fusion=self.args.fusion_method, model=self.args.model).to(dtype)
        replace_heads(self.net, self.args)
        self.optimizer = train.make_optimizer(self.net, self.args)
        tools = train.train_epoch, lambda: None
        self.balance = make_balance(Context(self.net, clips, self.args, self.optimizer, *tools))

    def epochs(self, fed: tuple[str, ...] = BOTH, epochs=EPOCHS) -> "Trained":
        for epoch in epochs:
            self.balance.start_epoch(epoch)
            plan = remix.batches_of(25, BATCH, fed, epoch_generator(42, epoch, "plan"))
            plan = self.balance.plan(plan, epoch)
            self.numbers = train.train_epoch(
                self.net, self.clips["train"], plan, self.optimizer, epoch, self.args, self.balance
            )
        return self

    def batch(self, fed: tuple[str, ...] = BOTH, clips: int = BATCH, epoch: int = EPOCHS[0], index: int = 0):
        """Forward and backward of one batch of fixed views, without a step; leaves output, batch and `.grad`."""
        self.net.train()
        (given,) = self.clips["train"].epoch([remix.Batch(torch.arange(clips), fed)])
        self.fed = given._replace(inputs={name: x.to(self.dtype) for name, x in given.inputs.items()})
        step = Step(epoch, index, self.fed, len(fed) > 1)
        self.balance.before_forward(step)
        self.output = self.balance.outputs(self.net(self.fed.inputs, fed), step)
        self.terms = self.balance.losses(self.plain_terms(self.output), self.output, step)
        self.net.zero_grad()
        self.balance.backward(sum(self.terms.values()), self.terms, self.output, step)
        return self

    def plain_terms(self, output) -> dict[str, torch.Tensor]:
        weights = self.args.joint_weights if len(output.logits) > 1 else self.args.alone_weights
        return train.loss_terms(train.cross_entropies(output, self.fed.labels), weights)

    def grads(self) -> dict[str, np.ndarray]:
        """By the official names."""
        found = self.net.named_parameters()
        return {official_name(k): p.grad.numpy().copy() for k, p in found if p.grad is not None}

    def state(self) -> dict[str, torch.Tensor]:
        """By the official names; the network's own tensors."""
        return {official_name(k): v for k, v in self.net.state_dict().items()}


def same(a: dict, b: dict, start: str = "") -> bool:
    return all(torch.equal(a[name], b[name]) for name in a if name.startswith(start))


@pytest.fixture(scope="module")
def plain(clips):
    return Trained(clips).epochs()


def np_softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def np_slices(t: Trained) -> list[np.ndarray]:
    """W_m z_m + b / 2, from the parameters."""
    weight, bias = (p.detach().double().numpy() for p in (t.net.head.weight, t.net.head.bias))
    parts = zip(np.split(weight, 2, axis=1), t.output.features.values(), strict=True)
    return [z.detach().double().numpy() @ w.T + bias / 2 for w, z in parts]


def np_scores(t: Trained) -> list[float]:
    rows = np.arange(len(t.fed.labels))
    return [np_softmax(o)[rows, t.fed.labels.numpy()].sum() for o in np_slices(t)]


# ------------------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_setting_changes_no_bit(name, clips, plain):
    text = NEUTRAL[name]
    reference = Trained(clips, "--alpha 0 --beta 0").epochs() if "--alpha" in text else plain
    neutral = Trained(clips, f"--balance {name}{text}").epochs()
    assert same(neutral.state(), reference.state())
    assert {k: v for k, v in neutral.numbers.items() if "balance/" not in k} == reference.numbers


# In batches of one modality the weights that a method replaces are the gammas: (its flags, flags of either run).
HOMOGENEOUS = {"gblend": (":weights=1/1/1", ""), "mmpareto": (":gamma=1", "--gamma1 0 --gamma2 0")}


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_setting_changes_no_bit_of_remix(name, clips):
    own, either = HOMOGENEOUS.get(name, (NEUTRAL[name], ""))
    states = []
    for text in (f"--balance {name}{own}", ""):
        trained = Trained(clips, f"--warmup 9 {either} {text}")
        for fed in (AUDIO, VIDEO):
            trained.epochs(fed, EPOCHS[1:])
        states.append(trained.state())
    assert same(*states)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OTHER_NETWORKS])
def test_the_defaults_do_act(name, clips, plain):
    assert not same(Trained(clips, f"--balance {name}{ACTIVE.get(name, '')}").epochs().state(), plain.state())


@pytest.mark.parametrize("masked_encoder", ["skip", "run"])
@pytest.mark.parametrize(("fed", "masked"), [(AUDIO, "visual_net"), (VIDEO, "audio_net")])
def test_a_homogeneous_batch_leaves_the_masked_encoder_alone(fed, masked, masked_encoder, clips):
    """With `skip` nothing moves it; with `run` the methods move it no further than Remix alone does."""
    everything = "mmcosine,opm,pmr,gblend:weights=1/2/3,mmpareto,ogm_ge,dr:every=15"
    for names in (everything, "agm"):
        text = f"--masked_encoder {masked_encoder} --warmup 9"
        balanced = Trained(clips, f"{text} --balance {names}")
        alone = Trained(clips, text)
        before = {k: v.clone() for k, v in balanced.state().items()}
        states = [t.epochs(fed, EPOCHS[:1]).state() for t in (balanced, alone)]
        assert same(states[0], states[1], masked)
        assert same(states[0], before, masked) == (masked_encoder == "skip")
        trained = {AUDIO: "audio_net", VIDEO: "visual_net"}[fed]
        assert same(states[0], states[1], trained) == (names == "agm")  # which does not act here


def test_random_numbers_depend_on_the_step_and_the_method_alone(clips):
    ogm, opm = (Trained(clips, f"--balance {name}").balance.methods[0] for name in ("ogm_ge", "opm"))

    def draw(method, epoch, index) -> list[float]:
        return torch.rand(4, generator=method.generator(step(epoch, index))).tolist()

    drawn = [draw(ogm, 3, 5), draw(ogm, 3, 6), draw(ogm, 4, 5), draw(opm, 3, 5)]
    assert len({tuple(values) for values in drawn}) == 4
    assert draw(Trained(clips, "--balance ogm_ge").epochs().balance.methods[0], 3, 5) == drawn[0]


@pytest.mark.parametrize(("flags", "message"), [
    ("--balance magic", "--balance magic: unknown; allowed: none, .*dr.*ogm_ge"),
    ("--balance none,agm", "--balance none,agm: none cannot be combined"),
    ("--balance none:alpha=1", "--balance none: 'alpha=1' must be OPTION=VALUE; it has no options"),
    ("--balance ogm_ge,agm", "--balance agm,ogm_ge: both damp"),
    ("--balance agm,opm", "--balance opm,agm: .*drops"),
    ("--balance agm:noise=on", "--balance agm: 'noise=on' must be OPTION=VALUE; its options: alpha, clip "),
    ("--balance ogm_ge:alpha", "--balance ogm_ge: 'alpha' must be OPTION=VALUE; its options: alpha, noise, starts, e"),
    ("--balance ogm_ge --method audio", "--balance ogm_ge: .*nothing to balance in --method audio"),
    ("--balance pmr --method video", "--balance pmr: .*nothing to balance in --method video"),
    *((f"--balance {name} --fusion_method {fusion}", f"--balance {name}: needs.*--fusion_method {fusion}")
      for name, fusion in zip(("ogm_ge", "agm", "mmcosine", "opm"), ("film", "gated", "bigated", "film"), strict=True)),
    ("--balance gblend --val_fraction 0", "--balance gblend: .*validation.*--val_fraction"),
    ("--balance dr --val_fraction 0", "--balance dr: .*test is never used.*--val_fraction"),
    ("--balance gblend --alpha 1", "--balance gblend: sets the weights.*leave --alpha out"),
    ("--balance gblend:weights=1/2", "--balance gblend: weights: 2 given; audio, video and joint need one each"),
    ("--balance gblend:weights=0/0/0", "--balance gblend:weights=0/0/0: .*all weights are 0"),
    ("--balance gblend:weights=a/2/3", "--balance gblend:weights=a/2/3: 'a' is not a number"),
    ("--balance opm --warmup 6", r"from epoch 6 \(starts=6\) .*--warmup 6 there are none"),
    ("--balance agm --warmup 0", "--warmup 0 there are none"),
    ("--balance ogm_ge:starts=9:ends=8", "--balance ogm_ge: starts=9 is later"),
    ("--balance dr:every=29", "--balance dr: would never reset: every=29"),
    ("--balance ogm_ge:noise=maybe", "--balance ogm_ge:noise=maybe: unknown; allowed: on, off"),
    ("--balance ogm_ge:alpha=-1", "--balance ogm_ge:alpha=-1: .*at least 0"),
    ("--balance ogm_ge:alpha=", "--balance ogm_ge:alpha=: '' is not a number"),
    ("--balance ogm_ge:ends=1.5", "--balance ogm_ge:ends=1.5: '1.5' is not a whole number"),
    ("--balance opm:q=1.1", "--balance opm:q=1.1: .*1 at most"),
])  # fmt: skip
def test_mistakes_are_one_line(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        flags_of(flags)
    assert "\n" not in str(caught.value)


def test_the_grammar_of_balance():
    assert balance.parse("none") == {}
    assert balance.parse("ogm_ge:alpha=0.8:noise=off,pmr") == {"pmr": {}, "ogm_ge": {"alpha": "0.8", "noise": "off"}}
    assert list(balance.parse("pmr+agm,dr")) == ["dr", "agm", "pmr"]  # in the order in which they act
    assert balance.parse("pmr,pmr:mu=0,pmr:alpha=2") == {"pmr": {"mu": "0", "alpha": "2"}}
    assert balance.parse("gblend:weights=1/2/5") == {"gblend": {"weights": "1/2/5"}}


def test_flags_hold_the_canonical_words_and_every_option():
    args = flags_of("--balance ogm_ge:noise=off:alpha=0.80+pmr")
    assert args.balance == "pmr,ogm_ge:noise=off:alpha=0.80"
    assert args.balance_options == {
        "pmr": {"alpha": 1.0, "mu": 0.01, "entropy_epochs": 10, "momentum": 0.0, "rule": "paper", "ends": 70},
        "ogm_ge": {"alpha": 0.8, "noise": "off", "starts": 0, "ends": 50},
    }
    assert flags_of(f"--balance {args.balance}").balance_options == args.balance_options
    assert flags_of(f"--balance {args.balance}").balance == args.balance
    gblend = flags_of("--balance gblend:weights=1/2/5").balance_options["gblend"]
    assert gblend == {"every": 10, "probe": None, "weights": (1.0, 2.0, 5.0), "sum": None}
    none = flags_of()
    assert (none.balance, none.balance_options) == ("none", {})
    for values in (args.balance_options, gblend):
        assert json.loads(json.dumps(values)) == {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def test_python_m_balance_lists_every_method_and_option():
    done = subprocess.run([sys.executable, "-m", "balance"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, *blocks = done.stdout.split("\n\n")
    assert "--balance NAME[:OPTION=VALUE...][,NAME...]" in head
    assert [block.split(":")[0] for block in blocks] == list(METHODS)
    for block, method in zip(blocks, METHODS.values(), strict=True):
        lines = block.splitlines()[1:]
        assert [line.split()[0] for line in lines] == [option.name for option in method.options]
        for line, option in zip(lines, method.options, strict=True):
            assert option.help in line and (option.default is None or f"(default: {option.default}" in line)
            assert all(choice in line for choice in option.choices)
            assert all(f"{dataset}: {value}" in line for dataset, value in option.by_dataset.items())


@pytest.mark.parametrize("name", ["mmpareto", "opm"])
def test_what_cannot_be_compiled_is_refused(name):
    with pytest.raises(UserError, match=f"--balance {name}: cannot act in a compiled network.*--compile"):
        flags_of(f"--balance {name} --compile")


def test_two_owners_of_one_thing_are_refused(monkeypatch):
    """Whatever they are called: no pair of today's methods owns the same and is not refused by name."""

    class Other(METHODS["mmcosine"]):
        name, options = "other", ()

    monkeypatch.setitem(METHODS, "other", Other)
    with pytest.raises(UserError, match=r"--balance mmcosine,other: both replace the head; choose one"):
        flags_of("--balance other,mmcosine")


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("name", ["ogm_ge", "agm", "mmpareto"])
def test_scaling_gradients_under_adam_is_noted(name, optimizer):
    (line,) = notes(flags_of(f"--balance {name} --optimizer {optimizer}"))
    assert line.startswith(f"note: {name} scales gradients, and {optimizer} divides")
    assert notes(flags_of(f"--balance {name}")) == notes(flags_of("--balance pmr --optimizer adam")) == []


def test_what_is_measured_before_an_epoch_is_measured_on_reset_encoders(clips, monkeypatch):
    t = Trained(clips, "--balance pmr,gblend:every=1,dr:every=7")
    seen = {}
    for method in t.balance.methods:
        if method.name in ("pmr", "gblend"):
            look = lambda epoch, name=method.name: seen.update(  # noqa: E731
                {name: {k: v.clone() for k, v in t.net.named_parameters()}}
            )
            monkeypatch.setattr(method, "start_epoch", look)
        else:
            monkeypatch.setattr(method, "diagnose", lambda epoch: torch.tensor([0.6, 0.3]))
            for start in method.initial.values():
                for p in start:
                    p.add_(1)
    before = {k: v.clone() for k, v in t.net.named_parameters()}
    t.balance.start_epoch(8)
    now = dict(t.net.named_parameters())
    assert not same(now, before, "encoders.audio") and not same(now, before, "encoders.video")
    assert same(now, seen["pmr"]) and same(now, seen["gblend"])


def test_a_reset_encoder_s_statistics_are_its_own(clips, monkeypatch):
    t = Trained(clips, "--balance dr:every=7").epochs(epochs=(6, 7))
    (method,) = t.balance.methods
    for start in method.initial.values():
        for p in start:
            p.mul_(3)
    monkeypatch.setattr(method, "diagnose", lambda epoch: torch.tensor([1.0, 1.0]))
    t.balance.start_epoch(8)
    found = {k: v.clone() for k, v in t.state().items() if "running" in k}
    reestimate(t.net, clips["train"], BOTH, BATCH, 42, 7)
    assert same(found, t.state())


def test_defaults_by_data_set_and_the_warning_about_adam(data, tmp_path, capsys):
    for dataset, ends in (("folder", 50), ("CREMAD", 50), ("KineticSound", 60)):
        args = train.parse_args(["--train", "--balance", "ogm_ge", "--dataset", dataset])
        assert args.balance_options["ogm_ge"] == {"alpha": 0.8, "noise": "on", "starts": 0, "ends": ends}
    warned = {}
    for optimizer in ("adam", "sgd"):
        train.main([*TINY, "--train", "--data_root", str(data), "--epochs", "1", "--method", "baseline",
                    "--balance", "ogm_ge", "--optimizer", optimizer,
                    "--log_path", str(tmp_path), "--run_name", optimizer])  # fmt: skip
        warned[optimizer] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ogm_ge")]
    assert len(warned["adam"]) == 1 and not warned["sgd"]


# ------------------------------------------------------------------------------------------------------------- OGM-GE


def test_ogm_damps_the_convolutions_of_the_encoder_that_is_ahead(clips):
    assert damping(torch.tensor([3.0, 3.0]), 0.8).tolist() == [1, 1]
    assert damping(torch.tensor([4.0, 2.0]), 0.3).tolist() == pytest.approx([1 - math.tanh(0.6), 1])
    assert damping(torch.tensor([2.0, 4.0]), 0.3).tolist() == pytest.approx([1, 1 - math.tanh(0.6)])
    ours = Trained(clips, "--balance ogm_ge:noise=off:alpha=0.4").batch()
    theirs = Trained(clips).batch().grads()
    audio, video = np_scores(ours)
    ahead, ratio = ("audio_net", audio / video) if audio > video else ("visual_net", video / audio)
    for name, grad in ours.grads().items():
        if name.startswith(ahead) and grad.ndim == 4:
            np.testing.assert_allclose(grad, (1 - math.tanh(0.4 * ratio)) * theirs[name], rtol=1e-4, atol=1e-9)
        else:
            assert np.array_equal(grad, theirs[name]), name


def test_ge_adds_noise_as_wide_as_the_raw_gradient_to_every_convolution(clips):
    ours, again, later = (Trained(clips, "--balance ogm_ge:alpha=0").batch(index=i).grads() for i in (0, 0, 1))
    theirs = Trained(clips).batch().grads()
    for name, grad in theirs.items():
        assert np.array_equal(ours[name], again[name])
        if grad.ndim == 4:
            assert not np.array_equal(ours[name], later[name])
        else:
            assert np.array_equal(ours[name], grad), name
    for name in ("audio_net.layer4.1.conv2.weight", "visual_net.layer4.1.conv2.weight"):  # 36,864 draws
        noise = (ours[name] - theirs[name]) / theirs[name].std(ddof=1)
        assert abs(noise.mean()) < 0.03 and noise.std() == pytest.approx(1, abs=0.02)
        assert abs(np.corrcoef(noise.ravel(), theirs[name].ravel())[0, 1]) < 0.03


def test_ogm_acts_within_its_window(clips):
    late = Trained(clips, "--balance ogm_ge:starts=2:ends=7")
    reference = Trained(clips).batch().grads()
    acts = [not np.array_equal(late.batch(epoch=e).grads()["audio_net.conv1.weight"],
                               reference["audio_net.conv1.weight"]) for e in (1, 2, 7, 8)]  # fmt: skip
    assert acts == [False, True, True, False]


# ---------------------------------------------------------------------------------------------------------------- AGM


def test_agm_scales_what_flows_into_each_slice(clips):
    assert modulation(torch.tensor([1.5, 1.5]), torch.tensor([0.7, 0.7]), 1.5).tolist() == [1, 1]
    audio, video = modulation(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 1.0]), 1.5).tolist()
    assert audio == pytest.approx(math.exp(1.5 * (1 - math.exp(0.5)))) and audio < 1 < video
    assert modulation(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 5.0]), 1.0)[0].item() == pytest.approx(math.exp(10))

    ours, theirs = (Trained(clips, f"--alpha 0 --beta 0 {text}") for text in ("--balance agm:alpha=0.9:clip=0", ""))
    means = np.zeros(2)  # which the first batch is modulated with
    for i, clip_count in enumerate((BATCH, 8)):
        ours.batch(clips=clip_count)
        rows = np.arange(clip_count)
        s = np.array([-np.log(np_softmax(o)[rows, ours.fed.labels.numpy()]).mean() for o in np_slices(ours)])
        kappa = np.exp(0.9 * np.minimum(np.exp(means[::-1] - means) - np.exp(s[::-1] - s), 10))
        assert abs(kappa[0] - kappa[1]) > 1e-3
        # running statistics of BatchNorm differ, batch statistics and so the gradients do not
        torch.testing.assert_close(ours.output.joint, theirs.batch(clips=clip_count).output.joint, rtol=0, atol=0)
        agm_scales(ours, theirs.grads(), kappa)
        means = (i * means + s) / (i + 1)


def agm_scales(ours: Trained, expected: dict[str, np.ndarray], kappa: np.ndarray) -> None:
    for name, grad in ours.grads().items():
        if name.startswith(("audio_net", "visual_net")):
            factor = kappa[int(name.startswith("visual_net"))]
        elif name == "head.weight":
            factor = np.repeat(kappa, grad.shape[1] // 2)
        else:
            factor = kappa.mean() if name == "head.bias" else 0
        np.testing.assert_allclose(grad, factor * expected[name], rtol=2e-3, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("size", [1.01, 0.99])
def test_agm_clips_all_gradients_where_an_element_of_the_head_s_is_large(size, clips, monkeypatch):
    """Against PyTorch's clip_grad_norm_, whose host waits."""
    t = Trained(clips, "--balance agm:clip=0.3").batch()
    torch.manual_seed(1)
    for p in t.net.parameters():
        p.grad = 0.5 * torch.randn_like(p)
    t.net.head.weight.grad.clamp_(-0.9, 0.9)[1, 3] = -size
    t.net.head.bias.grad.clamp_(-0.9, 0.9)
    t.net.heads["audio"].weight.grad = None  # nothing reached it
    t.balance.methods[0].sums = {}
    t.balance.methods[0].after_backward(t.output, None)
    found = t.grads()
    torch.manual_seed(1)
    for p in t.net.parameters():
        p.grad = 0.5 * torch.randn_like(p)
    t.net.head.weight.grad.clamp_(-0.9, 0.9)[1, 3] = -size
    t.net.head.bias.grad.clamp_(-0.9, 0.9)
    t.net.heads["audio"].weight.grad = None
    if size > 1:
        assert torch.nn.utils.clip_grad_norm_(t.net.parameters(), 0.3) > 100
    assert same({k: torch.tensor(v) for k, v in found.items()}, {k: torch.tensor(v) for k, v in t.grads().items()})
    assert t.balance.numbers() == {"balance/agm_clipped": float(size > 1)}


def test_agm_clips_by_the_shared_heads_where_the_joint_head_is_their_mean(clips):
    t = Trained(clips, "--balance agm:clip=0.3 --fusion_method decision").batch()
    t.net.heads["video"].bias.grad.fill_(7.0)
    t.balance.methods[0].after_backward(t.output, None)
    assert torch.nn.utils.get_total_norm([p.grad for p in t.net.parameters()]).item() == pytest.approx(0.3, rel=1e-4)


def test_what_agm_and_opm_decide_is_decided_on_the_device():
    """A tensor without values raises where the host would read one."""
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.zeros(3, 4))
        p.grad = torch.zeros(3, 4)
        clip_if_large([p], [p], 1.0)
        drop_chances(torch.zeros(2), 0.5, 0.5)
        with pytest.raises(DataDependentOutputException):
            p.sum().item()


def test_agm_leaves_the_unimodal_losses_gradient_alone(clips):
    ours, theirs = (Trained(clips, text) for text in ("--balance agm:clip=0", ""))
    for t in (ours, theirs):
        t.batch().batch(clips=8)
    for name in ("head_audio.weight", "head_video.bias"):
        assert np.array_equal(ours.grads()[name], theirs.grads()[name])


# ----------------------------------------------------------------------------------------------------------- MMPareto


def test_pareto_weights():
    weight = joint_weight(torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])).item()
    direction = weight * np.array([1, 0]) + (1 - weight) * np.array([-1, 1])
    assert weight == pytest.approx(0.6) and direction @ [1, 0] >= 0 and direction @ [-1, 1] >= 0
    assert joint_weight(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])).item() == 0.5  # they agree
    assert joint_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.0, -5.0])).item() == pytest.approx(0.5)  # equal norms
    assert joint_weight(torch.tensor([3.0, 4.0]), torch.zeros(2)).item() == 0.5


@pytest.mark.parametrize("fed", [BOTH, VIDEO])
@pytest.mark.parametrize("norm", ["tensor", "encoder"])
def test_mmpareto_merges_the_gradients_of_separate_passes(norm, fed, clips):
    # With the audio labels turned round the unimodal loss of audio pulls against the joint one. In float64: where the
    # two nearly cancel, float32 leaves errors of 1e-5 that differ between processors.
    text = f"--alpha 4 --beta 0.5 --balance mmpareto:norm={norm}"
    ours = Trained(clips, text, torch.float64)
    against_joint(ours)
    ours.batch(fed)
    grads = {}
    for term in ("joint", "other"):
        t = Trained(clips, text.split(" --balance")[0], torch.float64)
        against_joint(t)
        t.batch(fed)
        t.net.zero_grad()
        t.net.train()
        terms = t.plain_terms(t.net(t.fed.inputs, fed))
        part = terms["joint"] if term == "joint" else sum(v for k, v in terms.items() if k != "joint")
        part.backward()
        grads[term] = t.grads()
    weights = {}
    for prefix in ("audio_net", "visual_net"):
        names = [n for n in grads["joint"] if n.startswith(prefix)]
        if not names:
            continue
        j, u = (np.concatenate([g[n].ravel() for n in names]) for g in grads.values())
        k = 0.5 if j @ u > 0 else (u @ u - j @ u) / ((j - u) @ (j - u))
        weights[prefix] = k
        merged = {n: 2 * k * grads["joint"][n] + 2 * (1 - k) * grads["other"][n] for n in names}
        whole = max(1, np.linalg.norm(j + u) / np.linalg.norm(2 * k * j + 2 * (1 - k) * u))
        for n in names:
            before, after = (np.linalg.norm(g) for g in (grads["joint"][n] + grads["other"][n], merged[n]))
            scale = whole if norm == "encoder" else max(1, before / after)
            np.testing.assert_allclose(ours.grads()[n], 1.5 * scale * merged[n], rtol=1e-6, atol=1e-9, err_msg=n)
    assert weights["visual_net"] != 0.5 if fed == VIDEO else weights["audio_net"] != 0.5
    for name in ("head.weight", "head_video.weight"):
        total = grads["joint"].get(name, 0) + grads["other"].get(name, 0)
        np.testing.assert_allclose(ours.grads()[name], total, rtol=1e-9, atol=1e-12)


def against_joint(t: Trained) -> None:
    """Make each unimodal head the opposite of the joint head's slice: its loss pulls the other way."""
    with torch.no_grad():
        for head, slice_ in zip(t.net.heads.values(), t.net.head.weight.chunk(2, dim=1), strict=True):
            head.weight.copy_(-slice_)


# ---------------------------------------------------------------------------------------------------------------- PMR


def test_pmr_coefficients_subset_and_prototypes():
    table = {0.25: (1, 0), 0.8: (0.25, 0), 1.0: (0, 0), 1.4: (0, 0.4), 7.0: (0, 1)}
    for ratio, expected in table.items():
        assert [c.item() for c in coefficients(torch.tensor(ratio), "paper")] == pytest.approx(expected)
    assert [c.item() for c in coefficients(torch.tensor(0.9), "hard")] == [1, 0]
    labels = torch.tensor([0] * 95 + [1] * 4 + [3])
    for seed in range(5):
        chosen = subset(labels, torch.Generator().manual_seed(seed))
        assert 10 <= len(chosen) <= 12 and set(labels[chosen].tolist()) == {0, 1, 3}
        assert len(set(chosen.tolist())) == len(chosen)
    features = torch.randn(2, 6, 4)
    means, present = class_means(features, torch.tensor([0, 0, 2, 2, 2, 0]), 4)
    np.testing.assert_allclose(means[1, 2], features[1, 2:5].numpy().mean(0), rtol=1e-5)
    assert present.tolist() == [True, False, True, False] and (means[:, [1, 3]] == 0).all()


@pytest.mark.parametrize("rule", ["paper", "hard"])
@pytest.mark.parametrize("fed", [BOTH, AUDIO, VIDEO])
def test_pmr_adds_prototype_loss_and_entropy(fed, rule, clips):
    t = Trained(clips, f"--balance pmr:alpha=1.7:mu=0.3:rule={rule}")
    (method,) = t.balance.methods
    t.balance.start_epoch(EPOCHS[0])
    rng = np.random.default_rng(1)
    method.prototypes = torch.tensor(rng.normal(size=(2, CLASSES, 128)) * [[[0.5]], [[3.0]]], dtype=torch.float32)
    method.ratio = torch.tensor(0.7)
    t.batch(fed)
    labels, q = t.fed.labels.numpy(), {}
    for m, name in enumerate(("audio", "video")):
        if name in fed:
            z = t.output.features[name].detach().double().numpy()
            distances = [[np.linalg.norm(z_i - c) for c in method.prototypes[m].double().numpy()] for z_i in z]
            q[name] = np_softmax(-np.array(distances))
    rows = np.arange(len(labels))
    rho = q["audio"][rows, labels].sum() / q["video"][rows, labels].sum() if fed == BOTH else 0.7
    beta, gamma = (float(rho < 1), float(rho > 1)) if rule == "hard" else (
        float(np.clip(1 / rho - 1, 0, 1)), float(np.clip(rho - 1, 0, 1)))  # fmt: skip
    expected = 0
    for name, p in q.items():
        lag, lead = (beta, gamma) if name == "audio" else (gamma, beta)
        expected += 1.7 * lag * -np.log(p[rows, labels]).mean() - 0.3 * lead * -(p * np.log(p)).sum(1).mean()
    assert expected != 0 and t.terms["pmr"].item() == pytest.approx(expected, rel=1e-4)
    grads = t.grads()
    assert all(np.isfinite(g).all() for g in grads.values())
    theirs = Trained(clips).batch(fed).grads()  # the heads learn from cross entropy alone
    assert all(np.allclose(grads[n], theirs[n], atol=1e-6) for n in grads if n.startswith("head"))


def test_features_on_their_prototypes_cost_nothing_and_have_a_gradient(clips):
    (method,) = Trained(clips, "--balance pmr").balance.methods
    method.prototypes, method.present = 1000 * torch.eye(3).repeat(2, 1, 1), torch.tensor([True, True, False])
    z = method.prototypes[0, :2].clone().requires_grad_()
    log_q, q = method.similarity("audio", z)
    loss = F.nll_loss(log_q, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and torch.isfinite(z.grad).all() and (q[:, 2] == 0).all()


def test_pmr_prototypes_are_class_means_of_plain_features_with_momentum(clips):
    t = Trained(clips, "--balance pmr:momentum=0.25")
    (method,) = t.balance.methods
    (everything,) = clips["train"].epoch(remix.batches_of(25, 25, BOTH, None))
    labels = everything.labels.numpy()
    expected = None
    for epoch in (3, 4, 5):
        t.net.eval()
        with torch.no_grad():
            z = t.net(everything.inputs, BOTH).features["video"].numpy()
        chosen = subset(everything.labels, step_generator(42, epoch, 0, "balance", "pmr")).numpy()
        means = np.stack([z[chosen][labels[chosen] == k].mean(0) for k in range(CLASSES)])
        expected = 0.25 * expected + 0.75 * means if epoch == 5 else means  # averaged from the third set on
        t.net.train()
        t.balance.start_epoch(epoch)
        np.testing.assert_allclose(method.prototypes[1], expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            t.net.encoders["video"].layer4[1].bn2.weight.mul_(2.0)  # other features in the next epoch
    assert t.net.training


# ------------------------------------------------------------------------------------------------------------- G-Blend


def test_blend_weighs_gain_over_squared_overfitting():
    before = np.array([[1.8, 1.8, 1.8], [1.8, 1.8, 1.8]])
    after = np.array([[1.0, 0.6, 0.9], [1.2, 1.4, 1.0]])
    gain, growth = before[1] - after[1], (after[1] - after[0]) - (before[1] - before[0])
    raw = gain / growth**2
    weights = blend(torch.tensor(before), torch.tensor(after))
    np.testing.assert_allclose(weights, raw / raw.sum(), rtol=1e-6)
    np.testing.assert_allclose(blend(torch.tensor(5 * before), torch.tensor(5 * after)), weights, rtol=1e-6)
    # the growth of overfitting doubled, the gain left: a quarter of the weight, before normalising
    doubled = after.copy()
    doubled[0, 0] -= growth[0]
    np.testing.assert_allclose(blend(torch.tensor(before), torch.tensor(doubled)),
                               (raw * [0.25, 1, 1]) / (raw * [0.25, 1, 1]).sum(), rtol=1e-6)  # fmt: skip
    alike = torch.tensor([[1.0] * 3, [1.3] * 3])
    np.testing.assert_allclose(blend(torch.tensor(before), alike), [1 / 3] * 3, rtol=1e-6)
    worse = after.copy()
    worse[1, 2] = 2.5
    assert blend(torch.tensor(before), torch.tensor(worse))[2] == 0
    np.testing.assert_allclose(blend(torch.tensor(after), torch.tensor(before)), [1 / 3] * 3)  # all rose
    assert torch.isfinite(blend(torch.tensor(before), torch.tensor(before - 0.1))).all()  # no growth at all


def test_gblend_estimates_from_copies_trained_alone(clips, monkeypatch):
    """Mean losses are made up by logits that give them; the estimate must find the weights they imply."""
    losses = {
        ("model", "audio"): (1.1, 1.1), ("audio", "audio"): (0.5, 0.9), ("model", "video"): (1.2, 1.2),
        ("video", "video"): (0.3, 0.8), ("model", "joint"): (1.0, 1.0), ("joint", "joint"): (0.2, 0.7),
    }  # fmt: skip
    asked = []

    def predict(network, part, fed, size, name, check):
        head = "joint" if fed == BOTH else fed[0]
        loss = losses[network or "model", head][part is clips["val"]]
        labels, other = part.labels, (CLASSES - 1) * math.exp(-loss) / (1 - math.exp(-loss))
        return {head: math.log(other) * F.one_hot(labels, CLASSES).float()}

    def train_copy(head, fed, epoch, epochs):
        asked.append((head, fed, epoch, epochs))
        return head if epochs else None

    (method,) = Trained(clips, "--balance gblend:every=4 --epochs 10 --warmup 0").balance.methods
    monkeypatch.setattr("balance.gblend.predict", predict)
    monkeypatch.setattr(method, "train_copy", train_copy)
    for epoch in range(10):
        method.start_epoch(epoch)
    expected = [("audio", AUDIO), ("video", VIDEO), ("joint", BOTH)]
    assert asked == [(*kind, epoch, epochs) for epoch in (0, 4, 8) for kind in expected for epochs in (0, 4)]
    raw = np.array([0.2 / 0.4**2, 0.4 / 0.5**2, 0.3 / 0.5**2])
    np.testing.assert_allclose(method.weights, raw / raw.sum(), rtol=1e-4)


def test_a_probe_of_gblend_is_the_run_s_training_with_one_loss_and_leaves_the_network_alone(clips):
    t = Trained(clips, "--balance gblend:every=1:probe=2 --batchnorm running")
    (method,) = t.balance.methods
    before = {name: value.clone() for name, value in t.net.state_dict().items()}
    for head, fed in (("video", VIDEO), ("joint", BOTH)):
        copied = method.train_copy(head, fed, 3, 2)
        other = Trained(clips)
        for epoch in (3, 4):
            order, views = (epoch_generator(42, epoch, what) for what in ("plan", "views"))
            for batch in clips["train"].epoch(remix.batches_of(25, BATCH, fed, order), views):
                other.net.train()
                # the odd clip has its own statistics, as --batchnorm running says
                with batchnorm_of_one_clip(other.net, True) if batch.total == 1 else contextlib.nullcontext():
                    output = other.net(batch.inputs, fed)
                other.optimizer.zero_grad()
                F.cross_entropy(output.joint if head == "joint" else output.logits[head], batch.labels).backward()
                other.optimizer.step()
        for name, value in other.net.named_parameters():
            torch.testing.assert_close(dict(copied.named_parameters())[name], value, rtol=1e-5, atol=1e-6, msg=name)
        assert not same(dict(copied.named_parameters()), before)
    assert same(t.net.state_dict(), before)


def test_gblend_replaces_the_weights_and_keeps_their_sum(clips):
    t = Trained(clips, "--balance gblend:weights=1/2/5 --gamma1 3").batch()
    ce = {n: F.cross_entropy(t.output.heads[n], t.fed.labels).item() for n in ("audio", "video", "joint")}
    for name, share in (("audio", 1 / 8), ("video", 2 / 8), ("joint", 5 / 8)):
        assert t.terms[name].item() == pytest.approx(2 * share * ce[name], rel=1e-5)
    t.batch(VIDEO)
    ce = {n: F.cross_entropy(t.output.heads[n], t.fed.labels).item() for n in ("video", "joint")}
    assert {n: v.item() for n, v in t.terms.items()} == pytest.approx(
        {"joint": 4 * 5 / 7 * ce["joint"], "video": 4 * 2 / 7 * ce["video"]}, rel=1e-5)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ MMCosine


@pytest.mark.parametrize("fusion", ["concat", "sum", "decision"])
def test_mmcosine_logits_are_scaled_cosines_in_training_and_inference(fusion, clips):
    t = Trained(clips, f"--balance mmcosine:scale=10 --fusion_method {fusion}")
    fresh = network(CLASSES, fusion=fusion)
    assert t.net.state_dict().keys() == fresh.state_dict().keys()
    head, (a, v) = t.net.head, torch.randn(2, 5, 128)
    maps = {"sum": lambda: head.maps, "decision": lambda: t.net.heads}.get(fusion, lambda: None)()
    weights = (maps["audio"].weight, maps["video"].weight) if maps else head.weight.chunk(2, dim=1)

    def cosine(z, w) -> np.ndarray:
        return np.array([[z_i @ w_k / np.linalg.norm(z_i) / np.linalg.norm(w_k) for w_k in w] for z_i in z])

    def joint(a, v, fed=BOTH) -> torch.Tensor:
        return head({"audio": a, "video": v}, fed).detach()

    factor = 5 if fusion == "decision" else 10  # the mean of two
    parts = [factor * cosine(z.numpy(), w.detach().numpy()) for z, w in zip((a, v), weights, strict=True)]
    for mode in (True, False):
        t.net.train(mode)
        np.testing.assert_allclose(joint(a, v), sum(parts), atol=1e-4)
    np.testing.assert_allclose(head.slices({"audio": a, "video": v})["video"].detach(), parts[1], atol=1e-4)
    unimodal = 10 * cosine(a.numpy(), t.net.heads["audio"].weight.detach().numpy())
    np.testing.assert_allclose(t.net.heads["audio"](a).detach(), unimodal, atol=1e-4)
    assert joint(a, v).abs().max() <= 20
    np.testing.assert_allclose(joint(7 * a, 0.01 * v), sum(parts), atol=1e-4)
    np.testing.assert_allclose(joint(a, torch.zeros_like(v), AUDIO), parts[0], atol=1e-4)
    with torch.no_grad():
        weights[0].mul_(3.0)
    np.testing.assert_allclose(joint(a, v), sum(parts), atol=1e-4)


@pytest.fixture(scope="module")
def cosine_run(data, tmp_path_factory):
    """A run of MMCosine with a scale of its own, and the last line of what it printed."""
    root, out = tmp_path_factory.mktemp("cosine"), io.StringIO()
    with contextlib.redirect_stdout(out):
        run(data, root, "r", "--epochs", "2", "--warmup", "1", "--balance", "mmcosine:scale=3")
    return root / "r", out.getvalue().split("last epoch")[1].split()[:4]


def test_a_checkpoint_of_mmcosine_is_evaluated_with_its_own_head(data, cosine_run, capsys):
    folder, expected = cosine_run
    base = [*TINY, "--data_root", str(data), "--checkpoint", str(folder / "last.pth")]
    for typed in ([], ["--balance", "mmcosine:scale=3"]):
        train.main([*base, *typed])
        assert shown_in_table(capsys.readouterr().out) == expected
    for typed in ("pmr", "mmcosine", "mmcosine:scale=9"):
        with pytest.raises(UserError, match=f"--balance {typed}: .*trained with --balance mmcosine:scale=3; leave"):
            train.main([*base, "--balance", typed])


# Flags of every earlier version's config and what they are now. Values as earlier versions wrote them.
EARLIER = [
    ({"balance": "none", "ogm_alpha": None}, "none", {}),
    ({"balance": "mmcosine", "mmcosine_scale": 3.0}, "mmcosine:scale=3.0", {"mmcosine": {"scale": 3.0}}),
    ({"balance": "pmr,ogm_ge", "ogm_alpha": 0.8, "ogm_noise": "off", "ogm_starts": 1, "ogm_ends": 9, "pmr_rule": "hard",
      "pmr_alpha": 2.0, "pmr_mu": 0.0, "pmr_entropy_epochs": 3, "pmr_momentum": 0.5, "pmr_ends": 70},
     "pmr:alpha=2.0:mu=0.0:entropy_epochs=3:momentum=0.5:rule=hard:ends=70,"
     "ogm_ge:alpha=0.8:noise=off:starts=1:ends=9",
     {"ogm_ge": {"alpha": 0.8, "noise": "off", "starts": 1, "ends": 9}}),
    ({"balance": "opm,gblend,dr", "opm_q": 0.4, "opm_lambda": 0.1, "opm_p": 0.3, "opm_starts": 2, "gblend_every": 5,
      "gblend_probe": None, "gblend_weights": "1,2,5", "gblend_sum": None, "dr_lambda": 2.0, "dr_every": 4,
      "dr_resets": 1, "dr_views": "plain"},
     "dr:lambda=2.0:every=4:resets=1:views=plain,opm:q=0.4:lambda=0.1:p=0.3:starts=2,gblend:every=5:weights=1/2/5",
     {"gblend": {"every": 5, "probe": None, "weights": (1.0, 2.0, 5.0), "sum": None},
      "dr": {"lambda": 2.0, "every": 4, "resets": 1, "views": "plain"}}),
    ({"balance": "agm,mmpareto", "agm_alpha": 1.0, "mmpareto_gamma": 2.0, "mmpareto_norm": "encoder"},
     "agm:alpha=1.0,mmpareto:gamma=2.0:norm=encoder", {"mmpareto": {"gamma": 2.0, "norm": "encoder"}}),
]  # fmt: skip


@pytest.mark.parametrize(("config", "words", "options"), EARLIER)
def test_earlier_versions_flags_become_options(config, words, options):
    found = balance.modernise(config | {"method": "baseline"})
    assert found["balance"] == words and found["method"] == "baseline"
    args = Namespace(
        balance=words,
        dataset="CREMAD",
        method="baseline",
        fusion_method="concat",
        model="late",
        unimodal="heads",
        train=False,
    )
    balance.settle(args, BOTH)
    assert args.balance == words
    assert {name: args.balance_options[name] for name in options} == options
    now = config | {"balance": words, "balance_options": args.balance_options}
    assert balance.modernise(now) == now, "today's stays as it is"
    assert balance.modernise({}) == {}, "the official code's checkpoints say nothing"


def test_a_checkpoint_of_an_earlier_version_is_evaluated_the_same(data, cosine_run, tmp_path, capsys):
    folder, expected = cosine_run
    state = torch.load(folder / "last.pth", weights_only=True)
    del state["config"]["balance_options"]
    state["config"] |= {"balance": "mmcosine", "mmcosine_scale": 3.0, "ogm_alpha": None, "pmr_alpha": None}
    torch.save(state, tmp_path / "old.pth")
    base = ["--dataset", "folder", "--data_root", str(data), "--checkpoint", str(tmp_path / "old.pth")]
    train.main(base)
    assert shown_in_table(capsys.readouterr().out) == expected
    args = train.parse_args(base)
    assert (args.balance, args.balance_options) == ("mmcosine:scale=3.0", {"mmcosine": {"scale": 3.0}})
    with pytest.raises(UserError, match=r"--balance mmcosine:scale=9: .*trained with --balance mmcosine:scale=3\.0"):
        train.main([*base, "--balance", "mmcosine:scale=9"])


# ----------------------------------------------------------------------------------------------------------------- OPM


def test_opm_chances():
    assert drop_chances(torch.tensor([5.0, 5.0]), 0.5, 0.5).tolist() == [0, 0]
    assert drop_chances(torch.tensor([20.0, 16.0]), 0.4, 0.5).tolist() == pytest.approx(
        [0.4 * (1 + 0.5 * math.tanh(0.25)), 0])  # fmt: skip
    assert drop_chances(torch.tensor([1.0, 1000.0]), 0.5, 0.5).tolist() == pytest.approx([0, 0.75])
    assert drop_chances(torch.tensor([1000.0, 1.0]), 0.9, 0.5).tolist() == [1, 0]


def test_opm_drops_the_feature_that_is_ahead_from_the_joint_head_alone(clips):
    ours, theirs = Trained(clips, "--balance opm:p=1:lambda=0.8"), Trained(clips)
    seen = {}
    for t in (ours, theirs):
        t.net.head.register_forward_hook(lambda head, fed, out, t=t: seen.update({t: fed[0]}))
        t.batch(clips=24)
    audio, video = np_scores(theirs)
    lead = max(audio, video) / min(audio, video) - 1
    q = 0.5 * (1 + 0.8 * math.tanh(lead))
    dropped = 0
    for m, ahead in enumerate((audio > video, video > audio)):
        fed, whole = (list(seen[t].values())[m].detach().numpy() for t in (ours, theirs))
        gone = (fed == 0).all(axis=1)
        assert (gone.any() and not gone.all()) if ahead else not gone.any()
        np.testing.assert_allclose(fed[~gone], whole[~gone] / (1 - q / 2), rtol=1e-4)
        dropped += gone.sum()
    assert 3 <= dropped <= 21
    torch.testing.assert_close(ours.output.logits, theirs.output.logits, rtol=0, atol=0)
    ours.net.eval()
    theirs.net.eval()
    with torch.no_grad():
        logits = [t.net(t.fed.inputs, BOTH).joint for t in (ours, theirs)]
    assert torch.equal(*logits)


def test_opm_acts_in_its_share_of_the_batches(clips):
    t = Trained(clips, "--balance opm:p=0.3")
    (method,) = t.balance.methods
    acted = []
    for index in range(300):
        method.before_forward(step(6, index, 2))
        acted.append(method.hook is not None)
        method.outputs(None, step(6, index, 2))
    assert 65 <= sum(acted) <= 115 and method.hook is None and not t.net.head._forward_pre_hooks


# ----------------------------------------------------------------------------------------------------------------- D&R


def test_purity_is_that_of_the_majority_in_each_cluster():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 20)
    apart = rng.normal(size=(60, 5)) * 0.01 + labels[:, None]
    apart[:, 4] = 2.5  # a dimension that does not vary
    assert purity(apart, labels, 3) == 1.0
    assert purity(apart, np.where(np.arange(60) % 20 == 0, (labels + 1) % 3, labels), 3) == pytest.approx(57 / 60)
    mixed = rng.normal(size=(60, 5))
    scaled = (mixed - mixed.min(0)) / (mixed.max(0) - mixed.min(0)) * 2 - 1
    clusters = KMeans(3, n_init=10, random_state=0).fit(scaled).labels_
    expected = sum(max(np.sum(labels[clusters == c] == k) for k in range(3)) for c in range(3)) / 60
    assert purity(mixed, labels, 3) == pytest.approx(expected)
    assert purity(mixed * [1, 10, 100, 1000, 1], labels, 3) == pytest.approx(expected)
    assert purity(mixed, np.array([2, 0, 1])[labels], 3) == pytest.approx(expected)
    assert reset_weight(torch.tensor(1.0), torch.tensor(1.0), 3.0).item() == 0
    assert reset_weight(torch.tensor(0.4), torch.tensor(0.9), 3.0).item() == pytest.approx(math.tanh(1.5))


def test_dr_resets_the_encoders_towards_their_first_weights(clips, monkeypatch):
    t = Trained(clips, "--balance dr:every=7:resets=1 --lr_decay_step 60")
    first = {k: v.clone() for k, v in t.state().items()}
    weights = torch.tensor([0.25, 1.0])
    monkeypatch.setattr(t.balance.methods[0], "diagnose", lambda epoch: weights)
    t.epochs(epochs=(7,))
    trained = {k: v.clone() for k, v in t.state().items()}
    assert not same(trained, first, "audio_net")
    t.balance.start_epoch(8)
    parameters = {official_name(name) for name, _ in t.net.named_parameters()}
    for name, value in t.state().items():
        w = 0.25 if name.startswith("audio_net") else 1.0
        if name in parameters and name.startswith(("audio_net", "visual_net")):
            np.testing.assert_allclose(value, w * first[name] + (1 - w) * trained[name], rtol=1e-5, atol=1e-7)
        elif name not in parameters and name.startswith(("audio_net", "visual_net")):
            pass  # statistics: see test_a_reset_encoder_s_statistics_are_its_own
        else:  # heads
            assert torch.equal(value, trained[name]), name
    after = {k: v.clone() for k, v in t.state().items()}
    t.balance.start_epoch(15)  # one reset was asked for
    assert same(t.state(), after)


def test_dr_resets_after_every_nth_epoch_while_the_learning_rate_is_the_first(clips, monkeypatch):
    t = Trained(clips, "--balance dr:every=5 --lr_decay_step 12")
    asked = []
    monkeypatch.setattr(t.balance.methods[0], "diagnose", lambda epoch: asked.append(epoch) or torch.zeros(2))
    for epoch in range(30):
        t.balance.start_epoch(epoch)
    assert asked == [6, 11]  # after epochs 5 and 10; 16 comes after the decay


def test_dr_diagnoses_train_against_held_out_clips(clips):
    t = Trained(clips, "--balance dr:views=plain").epochs()
    t.net.eval()
    gaps = []
    with torch.no_grad():
        for name in BOTH:
            found = []
            for part in ("train", "val"):
                (batch,) = clips[part].epoch(remix.batches_of(len(clips[part]), 25, BOTH, None))
                features = t.net(batch.inputs, BOTH).features[name].numpy()
                found.append(purity(features, batch.labels.numpy(), CLASSES))
            gaps.append(math.tanh(3 * abs(found[0] - found[1])))
    assert max(gaps) > 0 and t.balance.methods[0].diagnose(8).tolist() == pytest.approx(gaps, abs=1e-5)
