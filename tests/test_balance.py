"""Balance methods: each against its formula in NumPy or by hand, and the contract that all of them keep.

The contract: a method in its neutral setting leaves training bit for bit as it is; in a homogeneous batch nothing
touches the masked encoder; what cannot go together is refused in one line.
"""

import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from helpers import make_folder
from sklearn.cluster import KMeans
from torch.nn import functional as F

import remix
import train
from balance import METHODS, Balance, Run, Step, notes, replace_heads
from balance.agm import modulation
from balance.gblend import GBlend, blend
from balance.mmpareto import joint_weight
from balance.ogm_ge import damping
from balance.opm import drop_chances
from balance.pmr import class_means, coefficients, subset
from balance.relearn import purity, reset_weight
from dataset.clips import Feed, make_clips
from dataset.folder import load_folder
from dataset.specs import get_spec
from models import AVClassifier
from utils.errors import UserError
from utils.seeding import step_generator

CLASSES, BATCH = 3, 12
TINY = ["--dataset", "folder", "--model", "resnet18_thin", "--image_size", "32", "--batch_size", str(BATCH)]
# What makes a method do nothing; MMCosine has no such setting.
NEUTRAL = {
    "ogm_ge": "--ogm_alpha 0 --ogm_noise off",
    "agm": "--agm_alpha 0",
    "mmpareto": "--mmpareto_gamma 1 --alpha 0 --beta 0",
    "pmr": "--pmr_alpha 0 --pmr_mu 0",
    "gblend": "--gblend_weights 0.5,0.5,1",
    "opm": "--opm_q 0",
    "dr": "--dr_lambda 0 --dr_every 7",
}
ACTIVE = {"dr": "--dr_every 7", "gblend": "--gblend_weights 1,2,3"}
EPOCHS = (7, 8)  # late enough for all of them


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"), train=25, test=9)  # 12 + 12 + 1 clips


@pytest.fixture(scope="module")
def clips(data):
    """train, and the test clips as val: no method may look for a test part."""
    folder = load_folder(data, get_spec("folder"))
    feed = Feed(frames=2, image_size=32, device=torch.device("cpu"), cache="ram", workers=0)
    return {name: make_clips(folder.root, part, folder.parts[part], folder.audio_shape, feed)
            for name, part in (("train", "train"), ("val", "test"))}  # fmt: skip


def flags_of(text: str = "") -> Namespace:
    words = ["--train", *TINY, "--optimizer", "sgd", "--learning_rate", "0.01", "--val_fraction", "0.2"]
    return train.parse_args([*words, *text.split()])


class Trained:
    """A network with the methods of some flags, and its optimizer, seeded alike."""

    def __init__(self, clips, text: str = "", dtype: torch.dtype = torch.float32):
        self.clips, self.args, self.dtype = clips, flags_of(text), dtype
        torch.manual_seed(0)
        self.net = AVClassifier(CLASSES, "resnet18_thin", self.args.fusion_method).to(dtype)
        replace_heads(self.net, self.args)
        self.optimizer = train.make_optimizer(self.net, self.args)
        refresh = lambda epoch: train.refresh_batchnorm(self.net, clips["train"], "both", self.args, epoch)  # noqa: E731
        self.balance = Balance.of(Run(self.net, clips, self.args, None, None, refresh))

    def epochs(self, kept: str = "both", epochs=EPOCHS) -> "Trained":
        for epoch in epochs:
            self.balance.start_epoch(epoch)
            plan = remix.batches_of(25, BATCH, kept, None)
            position = train.Position()
            clips = self.clips["train"]
            train.train_epoch(self.net, clips, plan, self.optimizer, epoch, self.args, self.balance, position)
            self.numbers = train.mean_losses(position, plan, clips.names, epoch) | self.balance.numbers()
        return self

    def batch(self, kept: str = "both", clips: int = BATCH, epoch: int = EPOCHS[0], index: int = 0):
        """Forward and backward of one batch of fixed views, without a step; leaves output, batch and `.grad`."""
        self.net.train()
        (fed,) = self.clips["train"].epoch([remix.Batch(torch.arange(clips), kept)])
        audio, video = (x.to(self.dtype) if x is not None else None for x in (fed.audio, fed.video))
        self.fed = fed._replace(audio=audio, video=video)
        step = Step(epoch, index, kept, self.fed.labels, 1.0, clips)
        self.balance.before_forward(step)
        self.output = self.balance.outputs(self.net(self.fed.audio, self.fed.video, kept), step)
        terms = train.loss_terms(self.output, self.fed.labels, kept, self.args)
        self.terms = self.balance.losses(terms, self.output, step)
        self.net.zero_grad()
        self.balance.backward(sum(self.terms.values()), self.terms, self.output, step)
        return self

    def grads(self) -> dict[str, np.ndarray]:
        return {k: p.grad.numpy().copy() for k, p in self.net.named_parameters() if p.grad is not None}

    def state(self) -> dict[str, torch.Tensor]:
        return self.net.state_dict()


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
    parts = zip(np.split(weight, 2, axis=1), (t.output.audio_features, t.output.video_features), strict=True)
    return [z.detach().double().numpy() @ w.T + bias / 2 for w, z in parts]


def np_scores(t: Trained) -> list[float]:
    rows = np.arange(len(t.fed.labels))
    return [np_softmax(o)[rows, t.fed.labels.numpy()].sum() for o in np_slices(t)]


# ------------------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_setting_changes_no_bit(name, clips, plain):
    text = NEUTRAL[name]
    reference = Trained(clips, "--alpha 0 --beta 0").epochs() if "--alpha" in text else plain
    neutral = Trained(clips, f"--balance {name} {text}").epochs()
    assert same(neutral.state(), reference.state())
    assert neutral.numbers["train_loss"] == reference.numbers["train_loss"]


# In batches of one modality the weights that a method replaces are the gammas: (its flags, flags of either run).
HOMOGENEOUS = {"gblend": ("--gblend_weights 1,1,1", ""), "mmpareto": ("--mmpareto_gamma 1", "--gamma1 0 --gamma2 0")}


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_setting_changes_no_bit_of_remix(name, clips):
    own, either = HOMOGENEOUS.get(name, (NEUTRAL[name], ""))
    states = []
    for text in (f"--balance {name} {own}", ""):
        trained = Trained(clips, f"--warmup 9 {either} {text}")
        for kept in ("audio", "video"):
            trained.epochs(kept, EPOCHS[1:])
        states.append(trained.state())
    assert same(*states)


@pytest.mark.parametrize("name", METHODS)
def test_the_defaults_do_act(name, clips, plain):
    assert not same(Trained(clips, f"--balance {name} {ACTIVE.get(name, '')}").epochs().state(), plain.state())


@pytest.mark.parametrize("masked_encoder", ["skip", "run"])
@pytest.mark.parametrize(("kept", "masked"), [("audio", "visual_net"), ("video", "audio_net")])
def test_a_homogeneous_batch_leaves_the_masked_encoder_alone(kept, masked, masked_encoder, clips):
    """With `skip` nothing moves it; with `run` the methods move it no further than Remix alone does."""
    everything = "mmcosine,opm,pmr,gblend,mmpareto,ogm_ge,dr"
    for names in (everything, "agm"):
        text = f"--masked_encoder {masked_encoder} --warmup 9"
        fixed = " --gblend_weights 1,2,3 --dr_every 15" if "gblend" in names else ""
        balanced = Trained(clips, f"{text} --balance {names}{fixed}")
        alone = Trained(clips, text)
        before = {k: v.clone() for k, v in balanced.state().items()}
        states = [t.epochs(kept, EPOCHS[:1]).state() for t in (balanced, alone)]
        assert same(states[0], states[1], masked)
        assert same(states[0], before, masked) == (masked_encoder == "skip")
        trained = {"audio": "audio_net", "video": "visual_net"}[kept]
        assert same(states[0], states[1], trained) == (names == "agm")  # which does not act here


def test_random_numbers_depend_on_the_step_and_the_method_alone(clips):
    ogm, opm = (Trained(clips, f"--balance {name}").balance.methods[0] for name in ("ogm_ge", "opm"))

    def draw(method, epoch, index) -> list[float]:
        return torch.rand(4, generator=method.generator(Step(epoch, index, "both", None, 1.0, 1))).tolist()

    drawn = [draw(ogm, 3, 5), draw(ogm, 3, 6), draw(ogm, 4, 5), draw(opm, 3, 5)]
    assert len({tuple(values) for values in drawn}) == 4
    assert draw(Trained(clips, "--balance ogm_ge").epochs().balance.methods[0], 3, 5) == drawn[0]


@pytest.mark.parametrize(("flags", "message"), [
    ("--balance magic", "--balance magic: unknown.*dr.*ogm_ge"),
    ("--balance none,agm", "none stands alone"),
    ("--balance ogm_ge,agm", "--balance agm,ogm_ge: both damp"),
    ("--balance agm,opm", "--balance opm,agm: .*drops"),
    ("--balance agm --ogm_alpha 1", "--ogm_alpha: a flag of --balance ogm_ge"),
    ("--ogm_alpha 1", "--ogm_alpha: a flag of --balance ogm_ge.*not chosen"),
    ("--balance ogm_ge --method audio", "nothing to balance in --method audio"),
    ("--balance pmr --method video", "nothing to balance in --method video"),
    *((f"--balance {name} --fusion_method {fusion}", f"--balance {name}: needs.*--fusion_method {fusion}")
      for name, fusion in zip(("ogm_ge", "agm", "mmcosine", "opm"), ("film", "gated") * 2, strict=True)),
    ("--balance gblend --val_fraction 0", "--balance gblend: .*validation.*--val_fraction"),
    ("--balance dr --val_fraction 0", "--balance dr: .*never on test.*--val_fraction"),
    ("--balance gblend --alpha 1", "sets the weights.*leave --alpha out"),
    ("--balance gblend --gblend_weights 1,2", "--gblend_weights.*three numbers"),
    ("--balance opm --warmup 6", "from epoch 6 .*--warmup 6 there are none"),
    ("--balance agm --warmup 0", "--warmup 0 there are none"),
    ("--balance ogm_ge --ogm_starts 9 --ogm_ends 8", "--ogm_starts 9: later"),
    ("--balance dr --dr_every 29", "never reset: --dr_every 29"),
    ("--balance ogm_ge --ogm_noise maybe", "--ogm_noise.*on"),
    ("--balance ogm_ge --ogm_alpha -1", "--ogm_alpha.*at least 0"),
])  # fmt: skip
def test_mistakes_are_one_line(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        flags_of(flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mmpareto", "opm"])
def test_what_cannot_be_compiled_is_refused(name):
    with pytest.raises(UserError, match=f"--balance {name}: cannot act in a compiled network.*--compile"):
        flags_of(f"--balance {name} --compile")


def test_two_owners_of_one_thing_are_refused(monkeypatch):
    """Whatever they are called: no pair of today's methods owns the same and is not refused by name."""

    class Other(METHODS["mmcosine"]):
        name, flags = "other", ()

    monkeypatch.setitem(METHODS, "other", Other)
    with pytest.raises(UserError, match=r"--balance mmcosine,other: each of them has the head to itself; choose one"):
        flags_of("--balance other,mmcosine")


@pytest.mark.parametrize("name", ["ogm_ge", "agm", "mmpareto"])
def test_scaling_gradients_under_adam_is_noted(name):
    assert len(notes(flags_of(f"--balance {name} --optimizer adam"))) == 1
    assert name in notes(flags_of(f"--balance {name} --optimizer adam"))[0]
    assert notes(flags_of(f"--balance {name}")) == notes(flags_of("--balance pmr --optimizer adam")) == []


def test_help_shows_the_defaults_of_each_data_set():
    words = " ".join(train.make_parser().format_help().split())
    assert "(0.8; KineticSound 1)" in words.split("--ogm_alpha")[-1].split(" --")[0]


def test_what_is_measured_before_an_epoch_is_measured_on_reset_encoders(clips, monkeypatch):
    t = Trained(clips, "--balance pmr,gblend,dr --dr_every 7 --gblend_every 1")
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
    assert not same(now, before, "audio_net") and not same(now, before, "visual_net")
    assert same(now, seen["pmr"]) and same(now, seen["gblend"])


def test_a_reset_encoder_s_statistics_are_its_own(clips, monkeypatch):
    t = Trained(clips, "--balance dr --dr_every 7").epochs(epochs=(6, 7))
    (method,) = t.balance.methods
    for start in method.initial.values():
        for p in start:
            p.mul_(3)
    monkeypatch.setattr(method, "diagnose", lambda epoch: torch.tensor([1.0, 1.0]))
    t.balance.start_epoch(8)
    found = {k: v.clone() for k, v in t.state().items() if "running" in k}
    train.refresh_batchnorm(t.net, clips["train"], "both", t.args, 7)
    assert same(found, t.state())


def test_defaults_by_data_set_and_the_warning_about_adam(data, tmp_path, capsys):
    assert flags_of("--balance ogm_ge").ogm_alpha == 0.8
    for dataset, alpha in (("CREMAD", 0.8), ("KineticSound", 1.0)):
        assert train.parse_args(["--train", "--balance", "ogm_ge", "--dataset", dataset]).ogm_alpha == alpha
    args = train.parse_args(["--train", "--balance", "pmr+ogm_ge"])
    assert (args.balance, args.from_preset["ogm_alpha"]) == ("pmr,ogm_ge", 0.8)
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
    ours = Trained(clips, "--balance ogm_ge --ogm_noise off --ogm_alpha 0.4").batch()
    theirs = Trained(clips).batch().grads()
    audio, video = np_scores(ours)
    ahead, ratio = ("audio_net", audio / video) if audio > video else ("visual_net", video / audio)
    for name, grad in ours.grads().items():
        if name.startswith(ahead) and grad.ndim == 4:
            np.testing.assert_allclose(grad, (1 - math.tanh(0.4 * ratio)) * theirs[name], rtol=1e-4, atol=1e-9)
        else:
            assert np.array_equal(grad, theirs[name]), name


def test_ge_adds_noise_as_wide_as_the_raw_gradient_to_every_convolution(clips):
    ours, again, later = (Trained(clips, "--balance ogm_ge --ogm_alpha 0").batch(index=i).grads() for i in (0, 0, 1))
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
    late = Trained(clips, "--balance ogm_ge --ogm_starts 2 --ogm_ends 7")
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

    ours, theirs = (Trained(clips, f"--alpha 0 --beta 0 {text}") for text in ("--balance agm --agm_alpha 0.9", ""))
    losses = []
    for clip_count in (BATCH, 8):  # the first batch only fills the running means
        ours.batch(clips=clip_count)
        rows = np.arange(clip_count)
        losses.append([-np.log(np_softmax(o)[rows, ours.fed.labels.numpy()]).mean() for o in np_slices(ours)])
    theirs.batch(clips=8)
    # running statistics of BatchNorm differ, batch statistics and so the gradients do not
    (s, means) = (np.array(losses[1]), np.array(losses[0]))
    kappa = np.exp(0.9 * np.minimum(np.exp(means[::-1] - means) - np.exp(s[::-1] - s), 10))
    assert abs(kappa[0] - kappa[1]) > 1e-3
    torch.testing.assert_close(ours.output.joint, theirs.output.joint, rtol=0, atol=0)
    expected = theirs.grads()
    for name, grad in ours.grads().items():
        if name.startswith(("audio_net", "visual_net")):
            factor = kappa[int(name.startswith("visual_net"))]
        elif name == "head.weight":
            factor = np.repeat(kappa, grad.shape[1] // 2)
        else:
            factor = kappa.mean() if name == "head.bias" else 0
        np.testing.assert_allclose(grad, factor * expected[name], rtol=2e-3, atol=1e-6, err_msg=name)


def test_agm_leaves_the_unimodal_losses_gradient_alone(clips):
    ours, theirs = (Trained(clips, text) for text in ("--balance agm", ""))
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


@pytest.mark.parametrize("kept", ["both", "video"])
@pytest.mark.parametrize("norm", ["tensor", "encoder"])
def test_mmpareto_merges_the_gradients_of_separate_passes(norm, kept, clips):
    # With the audio labels turned round the unimodal loss of audio pulls against the joint one. In float64: where the
    # two nearly cancel, float32 leaves errors of 1e-5 that differ between processors.
    text = f"--alpha 4 --beta 0.5 --balance mmpareto --mmpareto_norm {norm}"
    ours = Trained(clips, text, torch.float64)
    against_joint(ours)
    ours.batch(kept)
    grads = {}
    for term in ("joint", "other"):
        t = Trained(clips, text.split(" --balance")[0], torch.float64)
        against_joint(t)
        t.batch(kept)
        part = t.terms["joint"] if term == "joint" else sum(v for k, v in t.terms.items() if k != "joint")
        t.net.zero_grad()
        t.net.train()
        terms = train.loss_terms(t.net(t.fed.audio, t.fed.video, kept), t.fed.labels, kept, t.args)
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
    assert weights["visual_net"] != 0.5 if kept == "video" else weights["audio_net"] != 0.5
    for name in ("head.weight", "head_video.weight"):
        total = grads["joint"].get(name, 0) + grads["other"].get(name, 0)
        np.testing.assert_allclose(ours.grads()[name], total, rtol=1e-9, atol=1e-12)


def against_joint(t: Trained) -> None:
    """Make each unimodal head the opposite of the joint head's slice: its loss pulls the other way."""
    with torch.no_grad():
        for head, slice_ in zip((t.net.head_audio, t.net.head_video), t.net.head.weight.chunk(2, dim=1), strict=True):
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
@pytest.mark.parametrize("kept", ["both", "audio", "video"])
def test_pmr_adds_prototype_loss_and_entropy(kept, rule, clips):
    t = Trained(clips, f"--balance pmr --pmr_alpha 1.7 --pmr_mu 0.3 --pmr_rule {rule}")
    (method,) = t.balance.methods
    t.balance.start_epoch(EPOCHS[0])
    rng = np.random.default_rng(1)
    method.prototypes = torch.tensor(rng.normal(size=(2, CLASSES, 64)) * [[[0.5]], [[3.0]]], dtype=torch.float32)
    method.ratio = torch.tensor(0.7)
    t.batch(kept)
    labels, q = t.fed.labels.numpy(), {}
    for m, name in enumerate(("audio", "video")):
        if kept in ("both", name):
            z = getattr(t.output, f"{name}_features").detach().double().numpy()
            distances = [[np.linalg.norm(z_i - c) for c in method.prototypes[m].double().numpy()] for z_i in z]
            q[name] = np_softmax(-np.array(distances))
    rows = np.arange(len(labels))
    rho = q["audio"][rows, labels].sum() / q["video"][rows, labels].sum() if kept == "both" else 0.7
    beta, gamma = (float(rho < 1), float(rho > 1)) if rule == "hard" else (
        float(np.clip(1 / rho - 1, 0, 1)), float(np.clip(rho - 1, 0, 1)))  # fmt: skip
    expected = 0
    for name, p in q.items():
        lag, lead = (beta, gamma) if name == "audio" else (gamma, beta)
        expected += 1.7 * lag * -np.log(p[rows, labels]).mean() - 0.3 * lead * -(p * np.log(p)).sum(1).mean()
    assert expected != 0 and t.terms["pmr"].item() == pytest.approx(expected, rel=1e-4)
    grads = t.grads()
    assert all(np.isfinite(g).all() for g in grads.values())
    theirs = Trained(clips).batch(kept).grads()  # the heads learn from cross entropy alone
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
    t = Trained(clips, "--balance pmr --pmr_momentum 0.25")
    (method,) = t.balance.methods
    (everything,) = clips["train"].epoch(remix.batches_of(25, 25, "both", None))
    labels = everything.labels.numpy()
    expected = None
    for epoch in (3, 4):
        t.net.eval()
        with torch.no_grad():
            z = t.net(everything.audio, everything.video).video_features.numpy()
        chosen = subset(everything.labels, step_generator(42, epoch, 0, "balance", "pmr")).numpy()
        means = np.stack([z[chosen][labels[chosen] == k].mean(0) for k in range(CLASSES)])
        expected = means if expected is None else 0.25 * expected + 0.75 * means
        t.net.train()
        t.balance.start_epoch(epoch)
        np.testing.assert_allclose(method.prototypes[1], expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            t.net.visual_net.layer4[1].bn2.weight.mul_(2.0)  # other features in the next epoch
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


def test_gblend_estimates_from_copies_trained_alone(clips):
    """Mean losses are made up of logits that give them; the estimate must find the weights they imply."""
    losses = {
        ("model", "audio"): (1.1, 1.1), ("audio", "audio"): (0.5, 0.9), ("model", "video"): (1.2, 1.2),
        ("video", "video"): (0.3, 0.8), ("model", "joint"): (1.0, 1.0), ("joint", "joint"): (0.2, 0.7),
    }  # fmt: skip
    asked = []

    def predict(network, part, kept):
        head = "joint" if kept == "both" else kept
        loss = losses[network if isinstance(network, str) else "model", head][part == "val"]
        labels, other = clips[part].labels, (CLASSES - 1) * math.exp(-loss) / (1 - math.exp(-loss))
        return {head: math.log(other) * F.one_hot(labels, CLASSES).float()}

    def train_copy(method, kept, epoch, epochs):
        asked.append((method.head, kept, epoch, epochs))
        return method.head if epochs else None

    args = flags_of("--balance gblend --gblend_every 4 --epochs 10 --warmup 0")
    method = GBlend(Run(AVClassifier(CLASSES, "resnet18_thin"), clips, args, predict, train_copy, None))
    for epoch in range(10):
        method.start_epoch(epoch)
    expected = [("audio", "audio"), ("video", "video"), ("joint", "both")]
    assert asked == [(*kind, epoch, epochs) for epoch in (0, 4, 8) for kind in expected for epochs in (0, 4)]
    raw = np.array([0.2 / 0.4**2, 0.4 / 0.5**2, 0.3 / 0.5**2])
    np.testing.assert_allclose(method.weights, raw / raw.sum(), rtol=1e-4)


def test_gblend_replaces_the_weights_and_keeps_their_sum(clips):
    t = Trained(clips, "--balance gblend --gblend_weights 1,2,5 --gamma1 3").batch()
    ce = {n: F.cross_entropy(getattr(t.output, n), t.fed.labels).item() for n in ("audio", "video", "joint")}
    for name, share in (("audio", 1 / 8), ("video", 2 / 8), ("joint", 5 / 8)):
        assert t.terms[name].item() == pytest.approx(2 * share * ce[name], rel=1e-5)
    t.batch("video")
    ce = {n: F.cross_entropy(getattr(t.output, n), t.fed.labels).item() for n in ("video", "joint")}
    assert {n: v.item() for n, v in t.terms.items()} == pytest.approx(
        {"joint": 4 * 5 / 7 * ce["joint"], "video": 4 * 2 / 7 * ce["video"]}, rel=1e-5)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ MMCosine


@pytest.mark.parametrize("fusion", ["concat", "sum"])
def test_mmcosine_logits_are_scaled_cosines_in_training_and_inference(fusion, clips):
    t = Trained(clips, f"--balance mmcosine --mmcosine_scale 10 --fusion_method {fusion}")
    fresh = AVClassifier(CLASSES, "resnet18_thin", fusion)
    assert t.state().keys() == fresh.state_dict().keys()
    head, (a, v) = t.net.head, torch.randn(2, 5, 64)
    weights = head.weight.chunk(2, dim=1) if fusion == "concat" else (head.fc_x.weight, head.fc_y.weight)

    def cosine(z, w) -> np.ndarray:
        return np.array([[z_i @ w_k / np.linalg.norm(z_i) / np.linalg.norm(w_k) for w_k in w] for z_i in z])

    parts = [10 * cosine(z.numpy(), w.detach().numpy()) for z, w in zip((a, v), weights, strict=True)]
    for mode in (True, False):
        t.net.train(mode)
        np.testing.assert_allclose(head(a, v).detach(), sum(parts), atol=1e-4)
    np.testing.assert_allclose(head.slices(a, v)[1].detach(), parts[1], atol=1e-4)
    unimodal = 10 * cosine(a.numpy(), t.net.head_audio.weight.detach().numpy())
    np.testing.assert_allclose(t.net.head_audio(a).detach(), unimodal, atol=1e-4)
    assert head(a, v).abs().max() <= 20
    np.testing.assert_allclose(head(7 * a, 0.01 * v).detach(), sum(parts), atol=1e-4)
    np.testing.assert_allclose(head(a, torch.zeros_like(v), "audio").detach(), parts[0], atol=1e-4)
    with torch.no_grad():
        weights[0].mul_(3.0)
    np.testing.assert_allclose(head(a, v).detach(), sum(parts), atol=1e-4)


def test_a_checkpoint_of_mmcosine_is_evaluated_with_its_own_head(data, tmp_path, capsys):
    base = [*TINY, "--data_root", str(data)]
    train.main([*base, "--train", "--log_path", str(tmp_path), "--run_name", "r", "--epochs", "2", "--warmup", "1",
                "--balance", "mmcosine", "--mmcosine_scale", "3"])  # fmt: skip
    expected = capsys.readouterr().out.split("last epoch")[1].split()[:4]
    checkpoint = ["--checkpoint", str(tmp_path / "r" / "last.pth")]
    for typed in ([], ["--balance", "mmcosine"]):
        train.main([*base, *checkpoint, *typed])
        assert capsys.readouterr().out.splitlines()[-1].split()[1:] == expected
    for typed, message in (("--balance pmr", "--balance pmr: .*trained with --balance mmcosine"),
                           ("--balance mmcosine --mmcosine_scale 9", "--mmcosine_scale 9.*trained with")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            train.main([*base, *checkpoint, *typed.split()])


# ----------------------------------------------------------------------------------------------------------------- OPM


def test_opm_chances():
    assert drop_chances(torch.tensor([5.0, 5.0]), 0.5, 0.5).tolist() == [0, 0]
    assert drop_chances(torch.tensor([20.0, 16.0]), 0.4, 0.5).tolist() == pytest.approx(
        [0.4 * (1 + 0.5 * math.tanh(0.25)), 0])  # fmt: skip
    assert drop_chances(torch.tensor([1.0, 1000.0]), 0.5, 0.5).tolist() == pytest.approx([0, 0.75])
    assert drop_chances(torch.tensor([1000.0, 1.0]), 0.9, 0.5).tolist() == [1, 0]


def test_opm_drops_the_feature_that_is_ahead_from_the_joint_head_alone(clips):
    ours, theirs = Trained(clips, "--balance opm --opm_p 1 --opm_lambda 0.8"), Trained(clips)
    seen = {}
    for t in (ours, theirs):
        t.net.head.register_forward_hook(lambda head, fed, out, t=t: seen.update({t: fed}))
        t.batch(clips=24)
    audio, video = np_scores(theirs)
    lead = max(audio, video) / min(audio, video) - 1
    q = 0.5 * (1 + 0.8 * math.tanh(lead))
    dropped = 0
    for m, ahead in enumerate((audio > video, video > audio)):
        fed, whole = (seen[t][m].detach().numpy() for t in (ours, theirs))
        gone = (fed == 0).all(axis=1)
        assert (gone.any() and not gone.all()) if ahead else not gone.any()
        np.testing.assert_allclose(fed[~gone], whole[~gone] / (1 - q / 2), rtol=1e-4)
        dropped += gone.sum()
    assert 3 <= dropped <= 21
    torch.testing.assert_close(ours.output.audio, theirs.output.audio, rtol=0, atol=0)
    ours.net.eval()
    theirs.net.eval()
    with torch.no_grad():
        logits = [t.net(t.fed.audio, t.fed.video).joint for t in (ours, theirs)]
    assert torch.equal(*logits)


def test_opm_acts_in_its_share_of_the_batches(clips):
    t = Trained(clips, "--balance opm --opm_p 0.3")
    (method,) = t.balance.methods
    acted = []
    for index in range(300):
        step = Step(6, index, "both", None, 1.0, 2)
        method.before_forward(step)
        acted.append(method.hook is not None)
        method.outputs(None, step)
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
    t = Trained(clips, "--balance dr --dr_every 7 --dr_resets 1 --lr_decay_step 60")
    first = {k: v.clone() for k, v in t.state().items()}
    weights = torch.tensor([0.25, 1.0])
    monkeypatch.setattr(t.balance.methods[0], "diagnose", lambda epoch: weights)
    t.epochs(epochs=(7,))
    trained = {k: v.clone() for k, v in t.state().items()}
    assert not same(trained, first, "audio_net")
    t.balance.start_epoch(8)
    parameters = {name for name, _ in t.net.named_parameters()}
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
    t = Trained(clips, "--balance dr --dr_every 5 --lr_decay_step 12")
    asked = []
    monkeypatch.setattr(t.balance.methods[0], "diagnose", lambda epoch: asked.append(epoch) or torch.zeros(2))
    for epoch in range(30):
        t.balance.start_epoch(epoch)
    assert asked == [6, 11]  # after epochs 5 and 10; 16 comes after the decay


def test_dr_diagnoses_train_against_held_out_clips(clips):
    t = Trained(clips, "--balance dr --dr_views plain").epochs()
    t.net.eval()
    gaps = []
    with torch.no_grad():
        for name in ("audio_features", "video_features"):
            found = []
            for part in ("train", "val"):
                (batch,) = clips[part].epoch(remix.batches_of(len(clips[part]), 25, "both", None))
                features = getattr(t.net(batch.audio, batch.video), name).numpy()
                found.append(purity(features, batch.labels.numpy(), CLASSES))
            gaps.append(math.tanh(3 * abs(found[0] - found[1])))
    assert max(gaps) > 0 and t.balance.methods[0].diagnose(8).tolist() == pytest.approx(gaps, abs=1e-5)
