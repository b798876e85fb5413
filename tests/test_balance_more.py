"""LFM, UMT, CML, ReconBoost, DGL, InfoReg and MIDAS: each against its formula in NumPy, one clip or pair at a time.

The contract of tests/test_balance.py holds for them too: a neutral setting changes no bit, runs resume bit for bit, two
processes train what one would.
"""

import copy
import math
from argparse import Namespace
from contextlib import nullcontext
from itertools import combinations

import numpy as np
import pytest
import torch
from double_run import by_one_and_by_two
from helpers import make_folder, numbers_of
from helpers import run as run_tiny
from networks import network
from test_balance import AUDIO, BATCH, BOTH, CLASSES, VIDEO, Trained, flags_of, np_softmax, same
from torch.nn import functional as F

import remix
import train
from balance import METHODS, Context, Step
from balance.inforeg import growth, pulls
from balance.lfm import contrastive, fitted, reverse_js
from balance.umt import teacher_path
from dataset.clips import ClipBatch, Feed, make_clips
from dataset.folder import load_folder
from dataset.specs import get_spec
from models import Output
from models.batchnorm import batchnorm_of_one_clip
from models.checkpoint import official_name
from utils.errors import UserError
from utils.seeding import epoch_generator, step_generator

NAMES = BOTH
EPOCH = 7  # late enough for all of them
NEUTRAL = {"cml": ":lambda=0", "umt": ":lambda=0", "midas": ":lambda=0", "inforeg": ":beta=0",
           "lfm": ":weight=0:scale=1"}  # fmt: skip


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


@pytest.fixture(scope="module")
def plain(clips):
    """States after two joint epochs, and after an epoch of either modality."""
    return Trained(clips).epochs().state(), remixed(clips, "")


def remixed(clips, text: str) -> dict[str, torch.Tensor]:
    trained = Trained(clips, f"--warmup 9 {text}")
    for fed in (AUDIO, VIDEO):
        trained.epochs(fed, (8,))
    return trained.state()


def logits_of(t: Trained, given: tuple[str, ...]) -> np.ndarray:
    """Joint logits (B, C) of the concatenation from the modalities `given`, in float64 from the parameters."""
    weights = dict(zip(NAMES, t.net.head.weight.detach().double().chunk(2, dim=1), strict=True))
    parts = [t.output.features[name].detach().double().numpy() @ weights[name].numpy().T for name in given]
    return sum(parts) + t.net.head.bias.detach().double().numpy()


def entropies_of(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -np.log(np_softmax(logits)[np.arange(len(labels)), labels])


def mixed(t: Trained, kept: list[int], epoch: int = EPOCH) -> Trained:
    """Forward and backward of a mixed batch in which clip i is given modality kept[i] alone (2: both)."""
    t.net.train()
    mask = torch.tensor([[k != 1, k != 0] for k in kept])
    (given,) = t.clips["train"].epoch([remix.Batch(torch.arange(len(kept)), BOTH, mask)])
    t.fed = given._replace(inputs={name: x.to(t.dtype) for name, x in given.inputs.items()})
    step = Step(epoch, 0, t.fed, False)
    t.balance.before_forward(step)
    t.output = t.balance.outputs(t.net(t.fed.inputs, BOTH, mask), step)
    columns = dict(zip(NAMES, mask.unbind(1), strict=True))
    entropies = train.cross_entropies(t.output, t.fed.labels, columns)
    t.terms = t.balance.losses(train.loss_terms(entropies, t.args.alone_weights), t.output, step)
    t.net.zero_grad()
    t.balance.backward(sum(t.terms.values()), t.terms, t.output, step)
    return t


def joint_step(labels: list[int], epoch: int = EPOCH) -> Step:
    """A joint batch of which only the labels matter."""
    n = len(labels)
    return Step(epoch, 0, ClipBatch(torch.arange(n), BOTH, {}, torch.tensor(labels), n, 1.0), True)


# ------------------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_setting_changes_no_bit(name, clips, plain):
    text = f"--balance {name}{NEUTRAL[name]}"
    assert same(Trained(clips, text).epochs().state(), plain[0])
    assert same(remixed(clips, text), plain[1])


@pytest.mark.parametrize("name", ["cml", "midas", "inforeg", "lfm"])
def test_what_needs_both_modalities_is_off_in_homogeneous_batches(name, clips, plain):
    assert same(remixed(clips, f"--balance {name}"), plain[1])


@pytest.mark.parametrize(("flags", "message"), [
    ("lfm:weight=2", "lfm:weight=2: fitted, learned, or the weight of the alignment, from 0 to 1"),
    ("lfm:weight=learned --val_fraction 0", "lfm: needs a validation part"),
    ("lfm,gblend", "gblend,lfm: both replace the loss weights"),
    ("umt:teachers=runs/audio", "umt: teachers=runs/audio: put {} in place of the modality's name"),
    ("umt:teachers=none_{}", r"umt: teachers=none_{}: none_audio does not exist; train it with --method audio"),
    ("umt:teachers={}:epochs=2", "umt: epochs applies only if teachers are trained"),
    ("umt --unimodal masked", "umt: needs unimodal heads"),
    ("inforeg:beta=1/2/3", "inforeg: beta=1/2/3: give one number for all modalities, or one each for audio, video"),
    ("inforeg:beta=x", "inforeg:beta=x: 'x' is not a number; one per modality, or one for all"),
    ("inforeg --warmup 0", "inforeg: acts in joint batches, and with --warmup 0 there are none"),
    ("cml --warmup 0", "cml: acts in joint batches, and with --warmup 0 there are none"),
    ("midas:starts=9 --warmup 9", r"midas: acts in joint batches from epoch 9 \(starts=9\) on"),
    ("reconboost:w1=1:w2=2", "reconboost: w2=2 is above w1=1"),
    ("reconboost --reassemble off", "reconboost: --reassemble off makes no batches of one modality"),
    ("reconboost --fusion_method sum", "reconboost: it has a joint head of its own; leave --fusion_method sum out"),
    ("reconboost --compile", "reconboost: cannot act in a compiled network"),
    *((f"dgl,{other}", "DGL stops the joint loss before") for other in ("agm", "opm", "mmpareto", "cml", "midas")),
])  # fmt: skip
def test_mistakes_are_one_line(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        flags_of(f"--balance {flags}")
    assert "\n" not in str(caught.value)


def test_reconboost_stands_alone():
    """But for D&R, which changes encoders between epochs."""
    for name in METHODS:
        if name not in ("dr", "reconboost", "greedy"):  # greedy needs another network
            with pytest.raises(UserError, match=r"ReconBoost replaces the heads and every loss|both replace"):
                flags_of(f"--balance {name},reconboost:phase1=1")
    flags_of("--balance dr:every=7,reconboost")


# ---------------------------------------------------------------------------------------------------------------- CML


def test_cml_is_a_hinge_per_clip_on_the_confidence_of_fewer_modalities(clips):
    t = Trained(clips, "--balance cml:lambda=3").batch()
    whole = np_softmax(logits_of(t, NAMES)).max(1)
    expected = violated = 0
    for name in NAMES:
        lone = np_softmax(logits_of(t, (name,))).max(1)
        expected += sum(max(0.0, a - b) for a, b in zip(lone, whole, strict=True)) / len(whole)
        violated += np.mean(lone > whole) / 2
    on_the_sum = sum(max(0.0, (np_softmax(logits_of(t, (name,))).max(1) - whole).mean()) for name in NAMES)
    assert expected > on_the_sum + 1e-5, "some clips violate it and some do not"
    assert t.terms["cml"].item() == pytest.approx(3 * expected, rel=1e-4)
    total, count = t.balance.methods[0].sums["violations"].tolist()
    assert total / count == pytest.approx(violated)


def test_cml_costs_nothing_where_confidence_falls(clips):
    """Without video the prediction stays, without audio it is uniform: no violation, no gradient."""
    (method,) = Trained(clips, "--balance cml").balance.methods
    with torch.no_grad():
        method.model.head.bias.zero_()
    features = {"audio": torch.randn(4, 128, requires_grad=True), "video": torch.zeros(4, 128, requires_grad=True)}
    output = Output(method.model.head(features), {}, features)
    loss = method.losses({}, output, joint_step([0, 1, 2, 0]))["cml"]
    gradients = torch.autograd.grad(loss, [*features.values(), method.model.head.weight])
    assert loss.item() == 0 and not any(gradient.any() for gradient in gradients)


def test_cml_of_three_modalities_compares_sets_that_differ_by_one():
    net = network(three=True)
    args = Namespace(balance_options={"cml": {"lambda": 2.0, "rule": "paper"}})
    method = METHODS["cml"](Context(net, {}, args, *(None,) * 3))
    features = {name: 3 * torch.randn(6, 128) for name in net.names}
    output = Output(net.head(features), {}, features)
    found = method.losses({}, output, joint_step([0] * 6))["cml"].item()
    weights, bias = net.head.weights(), net.head.bias.detach().numpy()
    sure = {}
    for size in (1, 2, 3):
        for kept in combinations(net.names, size):
            parts = [features[name].numpy() @ weights[name].detach().numpy().T for name in kept]
            sure[kept] = np_softmax(sum(parts) + bias).max(1)
    pairs = [(a, b) for a in sure for b in sure if len(a) + 1 == len(b) and set(a) < set(b)]
    assert len(pairs) == 9
    expected = sum(np.maximum(sure[a] - sure[b], 0).mean() for a, b in pairs)
    assert found == pytest.approx(2 * expected, rel=1e-4) and expected > 0


def test_the_code_s_rule_of_cml_follows_one_chain_per_clip(clips):
    (method,) = Trained(clips, "--balance cml:rule=code:lambda=2").balance.methods
    n, head = 60, method.model.head
    labels = np.arange(n) % CLASSES
    features = {name: 2 * torch.randn(n, 128, requires_grad=True) for name in NAMES}
    output = Output(head(features), {}, features)
    joint = F.cross_entropy(output.joint, torch.tensor(labels))
    terms = method.losses({"joint": joint}, output, joint_step(labels.tolist()))

    drawn = torch.rand(n, 2, generator=step_generator(42, EPOCH, 0, "balance", "cml")).numpy()
    weights, bias = [w.detach().numpy() for w in head.weight.chunk(2, dim=1)], head.bias.detach().numpy()
    first_lost, kinds, entropy, hinge, pushed = drawn.argmin(1), set(), 0.0, 0.0, []
    assert 15 < first_lost.sum() < 45, "clips differ in what they lose"
    for i, label in enumerate(labels):
        kept = 1 - first_lost[i]
        small = weights[kept] @ features[NAMES[kept]][i].detach().numpy() + bias
        large, small = np_softmax(output.joint[i].detach().numpy()[None])[0], np_softmax(small[None])[0]
        entropy -= (np.log(large[label]) + np.log(small[label])) / 2 / n
        counts, excess = large.argmax() == label or small.argmax() != label, small.max() - large.max()
        hinge += counts * max(0.0, excess) / n
        kinds.add((bool(counts), bool(excess > 0)))
        pushed.append(large.argmax() == label and excess > 0)
    assert (False, True) in kinds and (True, True) in kinds, "the gate matters"
    assert terms["joint"].item() == pytest.approx(entropy, rel=1e-4)
    assert terms["cml"].item() == pytest.approx(2 * hinge, rel=1e-4)
    # The modality that is lost is part of the larger set alone, a constant where both are wrong.
    gradients = torch.autograd.grad(terms["cml"], list(features.values()))
    for i, lost in enumerate(first_lost):
        assert bool(gradients[lost][i].any()) == bool(pushed[i])


# ---------------------------------------------------------------------------------------------------------------- DGL


def authors_gradients(t: Trained, alpha: float, mask: torch.Tensor | None = None) -> dict[str, np.ndarray]:
    """Two backward passes on a copy, the joint head's gradients cleared between them; unimodal heads added."""
    net, fed, labels = copy.deepcopy(t.net), t.fed.fed, t.fed.labels
    net.zero_grad()
    output = net(t.fed.inputs, fed, mask)
    given = {name: torch.ones(len(labels)) if mask is None else mask[:, m].float() for m, name in enumerate(NAMES)}
    for name in fed:
        alone = F.cross_entropy(net.masked(output.features, name), labels, reduction="none")
        (alpha * (alone * given[name]).mean()).backward(retain_graph=True)
    for parameter in (*net.head.parameters(), *net.heads.parameters()):
        parameter.grad = None
    detached = {name: z.detach() for name, z in output.features.items()}
    F.cross_entropy(net.head(detached, fed, mask), labels).backward()
    weights = t.args.joint_weights if len(fed) > 1 and mask is None else t.args.alone_weights
    for name in fed:
        own = F.cross_entropy(output.logits[name], labels, reduction="none")
        (weights[name] * (own * given[name]).mean()).backward(retain_graph=True)
    return {official_name(k): p.grad.numpy() for k, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fusion", ["concat", "decision", "film"])
@pytest.mark.parametrize("fed", [BOTH, AUDIO, VIDEO, "mixed"])
def test_dgl_is_the_authors_two_passes(fed, fusion, clips):
    t = Trained(clips, f"--balance dgl:alpha=3:clip=0 --fusion_method {fusion}", torch.float64)
    t = mixed(t, [0, 1, 2, 1, 0, 0, 2, 1]) if fed == "mixed" else t.batch(fed)
    expected = authors_gradients(t, 3.0, t.fed.mask)
    found = t.grads()
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-7, atol=1e-11, err_msg=name)
    assert all(p.requires_grad for p in t.net.parameters())


def test_dgl_clips_the_norm_of_all_gradients(clips):
    whole, clipped = (Trained(clips, f"--balance dgl:clip={clip}").batch().grads() for clip in (0, 0.5))
    norm = math.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in whole.values()))
    assert norm > 0.5
    for name, gradient in clipped.items():
        np.testing.assert_allclose(gradient, whole[name] * 0.5 / norm, rtol=1e-3, atol=1e-8, err_msg=name)


# ---------------------------------------------------------------------------------------------------------------- UMT


@pytest.mark.parametrize("fed", [BOTH, AUDIO, VIDEO, "mixed"])
def test_umt_adds_the_mean_square_distance_to_the_teachers(fed, clips):
    t = Trained(clips, "--balance umt:lambda=4")
    torch.manual_seed(5)
    teachers = network(CLASSES).encoders
    t.balance.methods[0].keep(copy.deepcopy(dict(teachers)))
    kept = [0, 1, 1, 2, 0, 1]
    t = mixed(t, kept) if fed == "mixed" else t.batch(fed)
    expected = 0.0
    for m, name in enumerate(NAMES):
        if fed not in (BOTH, "mixed") and name not in fed:
            continue
        with torch.no_grad():
            x = t.fed.inputs[name]
            target = teachers.eval()[name](x.flatten(0, 1) if x.dim() == 5 else x)
            target = target.unflatten(0, x.shape[:2]).mean(1) if x.dim() == 5 else target
        z = t.output.features[name].detach().double().numpy()
        rows = [i for i in range(len(z)) if fed != "mixed" or kept[i] in (m, 2)]
        expected += sum(((z[i] - target[i].double().numpy()) ** 2).mean() for i in rows) / len(z)
    assert t.terms["umt"].item() == pytest.approx(4 * expected, rel=1e-4)


def test_a_student_that_is_its_teacher_has_no_distance_and_the_teacher_stays(clips):
    t = Trained(clips, "--balance umt")
    (method,) = t.balance.methods
    method.keep({name: copy.deepcopy(t.net.encoders[name]) for name in NAMES})
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    t.net.eval()
    (batch,) = clips["train"].epoch([remix.Batch(torch.arange(8), BOTH)])
    output = t.net(batch.inputs, BOTH)
    loss = method.losses({}, output, Step(EPOCH, 0, batch, True))["umt"]
    gradients = torch.autograd.grad(loss, list(t.net.encoders.parameters()))
    assert loss.item() == 0 and not any(gradient.any() for gradient in gradients)
    t.epochs()
    assert same(before, method.teacher.state_dict())
    assert not same(before, t.net.state_dict(), "encoders")


def test_teachers_are_trained_on_their_modality_alone(clips, monkeypatch):
    t = Trained(clips, "--balance umt:epochs=3 --batchnorm running --lr_decay_step 2")
    (method,) = t.balance.methods
    before = {name: value.clone() for name, value in t.net.state_dict().items()}
    t.balance.start_epoch(0)
    assert same(before, t.net.state_dict())
    assert not any(p.requires_grad for p in method.teacher.parameters()) and not method.teacher.training
    for name in NAMES:
        other = Trained(clips)
        for epoch, rate in enumerate((0.01, 0.01, 0.001)):
            order, views = (epoch_generator(42, epoch, what) for what in ("plan", "views"))
            other.optimizer.param_groups[0]["lr"] = other.optimizer.param_groups[1]["lr"] = rate
            for batch in clips["train"].epoch(remix.batches_of(25, BATCH, (name,), order), views):
                other.net.train()
                # the odd clip has its own statistics, as --batchnorm running says
                with batchnorm_of_one_clip(other.net, True) if batch.total == 1 else nullcontext():
                    output = other.net(batch.inputs, (name,))
                other.optimizer.zero_grad()
                F.cross_entropy(output.logits[name], batch.labels).backward()
                other.optimizer.step()
        for key, value in other.net.encoders[name].state_dict().items():
            found = method.teacher.encoders[name].state_dict()[key]
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5, msg=key)
    monkeypatch.setattr(method, "train", lambda name: pytest.fail("teachers are made once"))
    t.balance.start_epoch(1)


@pytest.fixture(scope="module")
def unimodal_runs(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("unimodal")
    for name in NAMES:
        run_tiny(data, root, f"alone_{name}", "--epochs", "1", "--method", name)
    return root


def test_teachers_can_be_finished_runs(clips, unimodal_runs):
    assert teacher_path(f"{unimodal_runs}/alone_{{}}", "audio") == unimodal_runs / "alone_audio" / "last.pth"
    t = Trained(clips, f"--balance umt:teachers={unimodal_runs}/alone_{{}}")
    (method,) = t.balance.methods
    t.balance.start_epoch(0)
    for name in NAMES:
        weights = torch.load(unimodal_runs / f"alone_{name}" / "last.pth", weights_only=True)["model"]
        found = {official_name(k): v for k, v in method.teacher.state_dict().items() if f"encoders.{name}" in k}
        assert found and all(torch.equal(value, weights[key]) for key, value in found.items())
    wrong = Trained(clips, f"--balance umt:teachers={unimodal_runs}/alone_{{}}").balance.methods[0]
    wrong.model.encoders = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1) for name in NAMES})
    with pytest.raises(UserError, match=r"alone_audio/last\.pth: its audio encoder is not that of this run"):
        wrong.start_epoch(0)


# ------------------------------------------------------------------------------------------------------------ InfoReg


@pytest.mark.parametrize("epochs", [0, 1, 5, 10, 11, 14])
def test_growth_of_the_trace_over_ten_epochs(epochs):
    traces = np.random.default_rng(0).random((epochs, 2)) + 0.1
    kept = [torch.tensor(trace) for trace in traces][-11:]  # what is kept of a longer history
    found = growth(kept, torch.ones(2)).numpy()
    last = [traces[i] for i in range(epochs - 10, epochs) if i >= 0]
    before = [traces[i] for i in range(epochs - 11, epochs - 1) if i >= 0]
    expected = (sum(last) - sum(before)) / sum(last) if epochs else np.ones(2)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_only_the_leading_modality_is_held_and_only_in_its_window():
    yes, no = torch.tensor([True, True]), torch.tensor([False, True])
    assert pulls(torch.tensor([3.0, 3.0]), yes).tolist() == [0, 0]
    assert pulls(torch.tensor([3.0, 2.5]), yes).tolist() == pytest.approx([math.exp(math.tanh(0.5)), 0])
    assert pulls(torch.tensor([3.0, 2.5]), no).tolist() == [0, 0]
    assert pulls(torch.tensor([2.5, 3.0]), no).tolist() == pytest.approx([0, math.exp(math.tanh(0.5))])
    three = pulls(torch.tensor([4.0, 3.0, 1.0]), torch.ones(3).bool()).tolist()
    assert three == pytest.approx([math.exp(math.tanh(2.0)), math.exp(math.tanh(0.5)), 0])


def test_inforeg_pulls_the_leading_encoder_to_where_its_epoch_began(clips):
    t = Trained(clips, "--balance inforeg:beta=0.7/0.3")
    (method,) = t.balance.methods
    t.balance.start_epoch(EPOCH)
    start = {name: value.clone() for name, value in t.net.named_parameters()}
    traces = np.zeros(2)
    for index in (0, 1):
        theirs = Trained(clips)
        theirs.net.load_state_dict(t.net.state_dict())
        theirs.batch(clips=BATCH - index)
        t.batch(clips=BATCH - index, index=index)
        expected = theirs.grads()
        scores = [np_softmax(o.detach().double().numpy())[np.arange(len(o)), t.fed.labels].sum()
                  for o in t.output.logits.values()]  # fmt: skip
        ahead = int(scores[1] > scores[0])
        pull = (0.7, 0.3)[ahead] * math.exp(math.tanh(abs(scores[0] - scores[1])))
        for m, prefix in enumerate(("audio_net.", "visual_net.")):
            weights = [g for name, g in expected.items() if name.startswith(prefix) and g.ndim > 1]
            traces[m] += sum(np.square(g.astype(np.float64)).mean() for g in weights)
        for name, p in t.net.named_parameters():
            grad, other = p.grad.numpy(), expected[official_name(name)]
            if name.startswith(f"encoders.{NAMES[ahead]}."):
                other = other + pull * (p - start[name]).detach().numpy()
            np.testing.assert_allclose(grad, other, rtol=1e-3, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(method.trace, traces, rtol=1e-4)
        t.optimizer.step()
    moved = max((p - start[name]).abs().max().item() for name, p in t.net.named_parameters())
    assert moved > 1e-3, "the second batch was pulled"

    method.growth = torch.tensor([0.05, 0.01])  # not above rate: nothing is held
    theirs.net.load_state_dict(t.net.state_dict())
    found, expected = t.batch(index=2).grads(), theirs.batch().grads()
    assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_the_window_is_measured_from_the_epochs_before(clips):
    t = Trained(clips, "--balance inforeg").epochs(epochs=(0, 1, 2))
    (method,) = t.balance.methods
    assert len(method.history) == 2 and method.trace is not None
    t.balance.start_epoch(3)
    assert len(method.history) == 3 and method.trace is None
    a, b, c = (trace.numpy() for trace in method.history)
    np.testing.assert_allclose(method.growth, c / (a + b + c), rtol=1e-5)


# -------------------------------------------------------------------------------------------------------------- MIDAS


@pytest.mark.parametrize("count", [BATCH, 24])
def test_midas_pairs_clips_one_by_one(count, clips):
    t = Trained(clips, "--balance midas:lambda=1.5:step=0.8", torch.float64)
    (method,) = t.balance.methods
    method.weights = torch.tensor([1.2, 1.3])
    with torch.no_grad():
        t.net.heads["audio"].weight.mul_(6)  # surer, and so not the weak one
    t.batch(clips=count)
    labels = t.fed.labels.numpy()
    other = torch.randperm(count, generator=step_generator(42, EPOCH, 0, "balance", "midas")).numpy()
    z = {name: value.detach().numpy() for name, value in t.output.features.items()}
    p = {name: np_softmax(value.detach().numpy()) for name, value in t.output.logits.items()}
    weight, bias = (value.detach().numpy() for value in (t.net.head.weight, t.net.head.bias))
    pairs, found = [(i, j, "video") for i, j in enumerate(other)] + [(j, i, "audio") for i, j in enumerate(other)], []
    for i, j, replaced in pairs:
        if labels[i] == labels[j]:
            continue
        logits = weight @ np.concatenate([z["audio"][i], z["video"][j]]) + bias
        q = np_softmax(logits[None])[0]
        c = np.array([p["audio"][i, labels[i]], p["video"][j, labels[j]]])
        own = np.array([q[labels[i]], q[labels[j]]])
        a, b = z[replaced][i], z[replaced][j]
        cosine = max(0.0, a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        found.append((c / c.sum(), own / own.sum(), -np.log(own), cosine, q, labels[i], labels[j]))
    c, q, entropies = (np.stack([row[k] for row in found]) for k in range(3))
    weak = int(c.mean(0)[1] < c.mean(0)[0])
    grown = max(1.0, (1.2, 1.3)[weak] + 0.8 * (c - q)[:, weak].mean())
    weights = np.ones(2)
    weights[weak] = grown
    cosine = np.array([row[3] for row in found])
    expected = 1.5 * (cosine * (weights * c * entropies).sum(1)).mean()
    assert len(found) < len(pairs) and t.terms["midas"].item() == pytest.approx(expected, rel=1e-4)
    kept = np.array([1.2, 1.3])
    kept[weak] = grown
    np.testing.assert_allclose(method.weights, kept, rtol=1e-5)


def test_midas_gradient_treats_labels_and_weights_as_constants(clips):
    t = Trained(clips, "--balance midas:step=0", torch.float64)
    (method,) = t.balance.methods
    t.net.train()
    (batch,) = clips["train"].epoch([remix.Batch(torch.arange(BATCH), BOTH)])
    output = t.net({name: x.double() for name, x in batch.inputs.items()}, BOTH)
    step = Step(EPOCH, 0, batch, True)
    loss = method.losses({}, output, step)["midas"]
    assert torch.autograd.grad(loss, t.net.heads["audio"].weight, retain_graph=True, allow_unused=True) == (None,)
    (gradient,) = torch.autograd.grad(loss, t.net.head.bias)
    labels = batch.labels.numpy()
    other = torch.randperm(BATCH, generator=step_generator(42, EPOCH, 0, "balance", "midas")).numpy()
    z = {name: value.detach().numpy() for name, value in output.features.items()}
    p = {name: np_softmax(value.detach().numpy()) for name, value in output.logits.items()}
    weight, bias = (value.detach().numpy() for value in (t.net.head.weight, t.net.head.bias))
    expected, count = np.zeros(CLASSES), 0
    for i, j, replaced in [(i, j, "video") for i, j in enumerate(other)] + [
        (j, i, "audio") for i, j in enumerate(other)
    ]:
        if labels[i] != labels[j]:
            q = np_softmax((weight @ np.concatenate([z["audio"][i], z["video"][j]]) + bias)[None])[0]
            c = np.array([p["audio"][i, labels[i]], p["video"][j, labels[j]]])
            a, b = z[replaced][i], z[replaced][j]
            cosine = max(0.0, a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            target = (c[0] * np.eye(CLASSES)[labels[i]] + c[1] * np.eye(CLASSES)[labels[j]]) / c.sum()
            expected, count = expected + cosine * (q - target), count + 1
    np.testing.assert_allclose(gradient.numpy(), expected / count, rtol=1e-6)


def test_midas_waits_for_its_start_and_needs_two_classes(clips):
    (method,) = Trained(clips, "--balance midas:starts=4").balance.methods
    features = {name: torch.randn(4, 128) for name in NAMES}
    logits = {name: torch.randn(4, CLASSES) for name in NAMES}
    output = Output(torch.randn(4, CLASSES), logits, features)
    assert method.losses({}, output, joint_step([0, 1, 2, 0], epoch=3)) == {}
    assert method.losses({}, output, joint_step([0, 1, 2, 0], epoch=4))["midas"] > 0
    assert method.losses({}, output, joint_step([1, 1, 1, 1], epoch=4))["midas"] == 0


# --------------------------------------------------------------------------------------------------------- ReconBoost


@pytest.mark.parametrize(("epoch", "learner"), [(0, "audio"), (3, "audio"), (4, None), (7, None), (8, "video"),
                                                (12, None), (16, "audio")])  # fmt: skip
def test_reconboost_takes_turns(epoch, learner, clips):
    (method,) = Trained(clips, "--balance reconboost").balance.methods
    number, found, begins = method.stage(epoch)
    assert (number, found, begins) == (epoch // 8, learner, epoch % 4 == 0)


@pytest.mark.parametrize(("right", "weight"), [(1.0, 5 - 1), (0.0, 5), (0.5, 4.5)])
def test_what_the_others_get_right_weighs_less(right, weight, clips):
    (method,) = Trained(clips, "--balance reconboost").balance.methods
    labels = torch.tensor([0, 1, 2, 1])
    own = torch.randn(4, CLASSES)
    sure = F.one_hot(labels if right else (labels + 1) % 3, CLASSES) * 200.0
    if right == 0.5:
        sure = torch.maximum(sure, F.one_hot((labels + 1) % 3, CLASSES) * 200.0)
    output = Output(torch.zeros(4, CLASSES), {"audio": own, "video": sure}, {})
    terms = method.losses({"joint": torch.zeros(())}, output, joint_step(labels.tolist(), epoch=0))
    expected = weight / CLASSES * entropies_of(own.double().numpy(), labels.numpy()).mean()
    assert sum(terms.values()).item() == pytest.approx(expected, rel=1e-5)


def test_consolidation_reaches_the_learner_alone(clips):
    (method,) = Trained(clips, "--balance reconboost:w1=0:w2=0:alpha=0.7").balance.methods
    logits = {name: torch.randn(4, CLASSES, requires_grad=True) for name in NAMES}
    output, step = Output(torch.zeros(4, CLASSES), logits, {}), joint_step([0, 1, 2, 1], epoch=8)  # stage 1: video
    loss = sum(method.losses({"joint": torch.zeros(())}, output, step).values())
    p, q = (np_softmax(o.detach().double().numpy()) for o in (logits["video"], logits["audio"]))
    assert loss.item() == pytest.approx(0.7 * np.mean((p - q) ** 2), rel=1e-5)
    video, audio = torch.autograd.grad(loss, list(logits.values())[::-1], allow_unused=True)
    assert video.abs().max() > 0 and audio is None
    early = method.losses({"joint": torch.zeros(())}, output, joint_step([0, 1, 2, 1], epoch=3))
    assert sum(early.values()).item() == 0, "not in stage 0"


@pytest.mark.parametrize(("epoch", "moves"), [(0, ("audio_net", "head")), (8, ("visual_net", "head")),
                                              (4, ("audio_net", "visual_net", "head"))])  # fmt: skip
def test_a_phase_trains_its_own_parameters_alone(epoch, moves, clips):
    t = Trained(clips, "--balance reconboost --batchnorm running")
    before = {name: value.clone() for name, value in t.state().items()}
    t.epochs(epochs=(epoch,))
    moved = {name for name, value in t.state().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in moved} - {"head_audio", "head_video"} == set(moves)
    assert ("head.rate" in moved) == (epoch == 4)
    assert all(p.requires_grad for p in t.net.parameters()) and t.net.encoders.training
    assert t.net.heads["audio"] is t.net.heads["video"] is t.net.head.shared


def test_the_ensemble_is_a_trained_multiple_of_the_learners(clips):
    t = Trained(clips, "--balance reconboost")
    with torch.no_grad():
        t.net.head.rate.fill_(1.7)
    t.batch(epoch=4)
    torch.testing.assert_close(t.output.joint, 1.7 * (t.output.logits["audio"] + t.output.logits["video"]))
    expected = F.cross_entropy(t.output.joint, t.fed.labels).item()
    assert sum(t.terms.values()).item() == pytest.approx(expected) and t.net.head.rate.grad.abs() > 0
    mask = torch.tensor([[True, False], [False, True]])
    masked = t.net.head({"audio": torch.ones(2, 128), "video": torch.ones(2, 128)}, BOTH, mask)
    torch.testing.assert_close(masked, 1.7 * t.net.head.shared(torch.ones(2, 128)))


def test_an_epoch_of_remix_is_phase_one_with_the_others_unmasked(clips):
    t = Trained(clips, "--balance reconboost --warmup 1 --batchnorm running")
    (method,) = t.balance.methods
    plan = [remix.Batch(torch.arange(12), VIDEO), remix.Batch(torch.arange(12, 24), AUDIO)]
    fed = method.plan(plan, 1)
    assert [batch.fed for batch in fed] == [BOTH, BOTH]
    assert all(torch.equal(a.clips, b.clips) for a, b in zip(plan, fed, strict=True))
    before = {name: value.clone() for name, value in t.state().items()}
    for index, (learner, other) in enumerate((("visual_net", "audio_net"), ("audio_net", "visual_net"))):
        start = {name: value.clone() for name, value in t.state().items()}
        t.batch(epoch=1, index=index)
        own, others = (t.output.logits[name].detach().double().numpy() for name in (NAMES[::-1], NAMES)[index])
        p = np_softmax(others)[np.arange(BATCH), t.fed.labels.numpy()]
        weighed = ((5 - p) * entropies_of(own, t.fed.labels.numpy())).mean() / CLASSES
        assert sum(t.terms.values()).item() == pytest.approx(
            weighed + 0.5 * np.mean((np_softmax(own) - np_softmax(others)) ** 2), rel=1e-4
        )
        t.optimizer.step()
        assert same(start, t.state(), other) and not same(start, t.state(), learner)
    assert torch.equal(before["head.rate"], t.state()["head.rate"])
    joint = [remix.Batch(torch.arange(4), BOTH)]
    assert method.plan(joint, 0) == joint and method.kept is None


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_each_phase_has_a_fresh_optimizer(optimizer, clips):
    t = Trained(clips, f"--balance reconboost --optimizer {optimizer}").epochs(epochs=(3,))
    assert any(value.any() for state in t.optimizer.state.values() for value in state.values())
    t.balance.start_epoch(4)
    assert not any(value.any() for state in t.optimizer.state.values() for value in state.values())
    fresh = train.make_optimizer(t.net, t.args)
    for p in t.net.parameters():
        p.grad = torch.ones_like(p)
    weights = [p.detach().clone() for p in t.net.parameters()]
    t.optimizer.step()
    once = [p.detach().clone() for p in t.net.parameters()]
    with torch.no_grad():
        for p, value in zip(t.net.parameters(), weights, strict=True):
            p.copy_(value)
    fresh.step()
    assert all(torch.equal(p, value) for p, value in zip(t.net.parameters(), once, strict=True))


def test_one_head_needs_features_of_one_width():
    net = network(encoder="resnet18_thin", three=True)
    net.widths["text"] = 64
    with pytest.raises(UserError, match=r"reconboost: its shared head needs .* audio 128, video 128, text 64"):
        METHODS["reconboost"].replace_heads(net, Namespace())


# ---------------------------------------------------------------------------------------------------------------- LFM


def test_the_fitted_schedule_has_the_authors_values():
    for epoch, value in ((0, 0.205), (50, 0.437), (100, 0.539), (150, 0.821), (175, 0.993), (199, 0.916)):
        assert fitted(epoch / 200) == pytest.approx(value, abs=6e-4)
    assert fitted(183 / 200) == 1, "1.011, clipped"
    through = np.polyfit([0, 50, 100, 150, 175, 199], [0.205, 0.437, 0.539, 0.821, 0.993, 0.916], 5)
    values = [np.polyval(through, epoch) for epoch in range(200)]
    assert int(np.argmax(values)) == 183 and max(values) == pytest.approx(1.011, abs=6e-4)
    np.testing.assert_allclose([fitted(epoch / 200) for epoch in range(200)], np.clip(values, 0, 1), atol=1e-6)


def test_the_schedule_is_that_of_the_joint_epochs(clips):
    for text, epochs in (("--method baseline --epochs 40", 40), ("--warmup 10", 10)):
        t = Trained(clips, f"--balance lfm {text}")
        (method,) = t.balance.methods
        for epoch in range(epochs):
            t.balance.start_epoch(epoch)
            assert method.a2 == pytest.approx(1 - fitted(epoch / epochs))
    t.balance.start_epoch(10)  # an epoch of Remix
    assert method.a2 == pytest.approx(1 - fitted(0.9))


def test_alignments():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7, 5)) * 2
    p, q = np_softmax(a), np_softmax(b)
    m = (p + q) / 2
    divergence = ((m * np.log(m / p)).sum(1) + (m * np.log(m / q)).sum(1)) / 2
    first, second = torch.tensor(a), torch.tensor(b)
    np.testing.assert_allclose(reverse_js(first, second), divergence, rtol=1e-4)
    assert torch.equal(reverse_js(first, second), reverse_js(second, first))
    np.testing.assert_allclose(reverse_js(first, first), np.zeros(7), atol=1e-6)
    assert torch.isfinite(reverse_js(100 * first, -100 * first)).all()

    cosine = np.array([[x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in b] for x in a]) / 0.2
    expected = (entropies_of(cosine, np.arange(7)).mean() + entropies_of(cosine.T, np.arange(7)).mean()) / 2
    assert contrastive(first, second, 0.2).item() == pytest.approx(expected, rel=1e-5)
    assert contrastive(first, second, 0.2) == contrastive(second, first, 0.2)
    assert contrastive(first, first, 0.01) < 1e-3 < contrastive(first, second, 0.01)


@pytest.mark.parametrize("align", ["contrastive", "reverse_js"])
def test_lfm_blends_labels_and_alignment(align, clips):
    t = Trained(clips, f"--balance lfm:weight=0.3:align={align}:temperature=0.5 --fusion_method decision --alpha 0.2")
    t.balance.start_epoch(EPOCH)
    t.batch()
    labels = t.fed.labels.numpy()
    o = {name: value.detach().double().numpy() for name, value in t.output.logits.items()}
    mean = (o["audio"] + o["video"]) / 2
    weights = {"joint": (mean, 1.0), "audio": (o["audio"], 0.2), "video": (o["video"], 0.5)}
    expected = {name: 1.4 * weight * entropies_of(own, labels).mean() for name, (own, weight) in weights.items()}
    own = t.output.features if align == "contrastive" else t.output.logits
    first, second = (own[name].detach().double() for name in NAMES)
    value = contrastive(first, second, 0.5) if align == "contrastive" else reverse_js(first, second).mean()
    expected["lfm"] = 0.6 * value.item()
    assert {name: term.item() for name, term in t.terms.items()} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("align", ["contrastive", "reverse_js"])
def test_the_learned_weight_follows_the_validation_loss_after_one_step(align, clips):
    """Against finite differences of the loss itself, in float64."""
    text = f"--method baseline --balance lfm:weight=learned:align={align}:lr=0.5 --batchnorm running"
    t = Trained(clips, text)
    (method,) = t.balance.methods
    t.epochs(epochs=(0,))
    method.a2, rates = 0.6, (3e-6, 1e-5)  # so small that the loss is linear in the step
    for group, rate in zip(t.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    slope = method.hypergradient(1)

    def batch_of(part: str, draw: int):
        order = torch.randperm(len(clips[part]), generator=step_generator(42, draw, 0, "balance", "lfm"))
        (batch,) = clips[part].epoch([remix.Batch(order[:BATCH], BOTH)])
        return batch._replace(inputs={name: x.double() for name, x in batch.inputs.items()})

    def labels_loss(net, batch):
        output = net(batch.inputs, BOTH)
        entropies = train.cross_entropies(output, batch.labels)
        return sum(train.loss_terms(entropies, t.args.joint_weights).values()), output

    def after(a2: float) -> float:
        net = copy.deepcopy(t.net).double().eval()
        batch = batch_of("train", 1)
        fit, output = labels_loss(net, batch)
        step = Step(1, 0, batch, True)
        loss = 2 * ((1 - a2) * fit + a2 * method.alignment(output, step))
        loss.backward()
        with torch.no_grad():
            for name, p in net.named_parameters():
                p -= rates["encoders" not in name] * (0 if p.grad is None else p.grad)
        return labels_loss(net, batch_of("val", 0))[0].item()

    assert slope == pytest.approx(after(1.0) - after(0.0), rel=5e-3) and slope != 0
    for epoch, rate in ((1, 0.5), (41, 0.125)):  # halved twice
        for group in t.optimizer.param_groups:
            group["lr"] = 0.01
        method.a2 = 0.6
        slope = method.hypergradient(epoch)
        method.start_epoch(epoch)
        assert method.a2 == pytest.approx(min(max(0.6 - rate * slope, 0.05), 0.95), rel=1e-5) and method.a2 != 0.6


# -------------------------------------------------------------------------------------------------------- whole runs


RUN = ["--train", "--dataset", "folder", "--encoder", "resnet18_thin", "--image_size", "32", "--batch_size", "12",
       "--optimizer", "sgd", "--learning_rate", "0.01", "--cache", "ram"]  # fmt: skip
TOGETHER = {  # as many as go together at once
    "losses": "lfm:weight=learned:lr=1,umt:epochs=1,cml:rule=code,midas:starts=0,inforeg",
    "dgl": "dgl,lfm:align=reverse_js",
    "reconboost": "reconboost:phase1=1:phase2=1",
}


@pytest.mark.parametrize("name", TOGETHER)
def test_resume_is_bit_identical(name, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("utils.summary.finish", lambda *_: None)  # pictures take most of so short a run
    method = "baseline" if name == "losses" else "remix --warmup 2"  # these are off in Remix's epochs
    text = f"--method {method} --data_root {data} --log_path {tmp_path} --balance {TOGETHER[name]} --val_fraction 0.3"
    for run, epochs, more in (("whole", 4, ""), ("part", 3, ""), ("part", 4, "--resume auto")):
        train.main([*RUN, *f"{text} --epochs {epochs} --run_name {run} {more}".split()])
    whole, part = (torch.load(tmp_path / run / "last.pth", weights_only=True) for run in ("whole", "part"))
    assert all(torch.equal(whole["model"][key], part["model"][key]) for key in whole["model"])
    numbers = numbers_of(tmp_path / "whole")
    assert numbers == numbers_of(tmp_path / "part")
    told = {key.removeprefix("balance/") for line in numbers for key in line if "balance/" in key}
    for own in (method.split(":")[0] for method in TOGETHER[name].split(",")):
        assert any(key.startswith(f"{own}_") for key in told), own
    if name == "reconboost":  # evaluated with its own heads
        capsys.readouterr()
        expected = numbers[-1]["test_acc"]
        train.main(["--checkpoint", str(tmp_path / "whole" / "last.pth")])
        assert f" {expected:.4f} " in capsys.readouterr().out


@pytest.fixture(scope="module")
def processes(data, tmp_path_factory):
    """Folder of runs by one and by two processes; batches of 12 and of an odd clip fall unevenly on two."""
    return by_one_and_by_two(tmp_path_factory.mktemp("processes"), data, RUN, TOGETHER)


@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_train_the_weights_of_one(name, processes):
    one, first, second = (
        torch.load(processes / f"{name}_{which}", weights_only=True) for which in ("one", "two0", "two1")
    )
    for key, value in one.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-7, msg=key)
    runs = [numbers_of(processes / f"run_{name}_{which}") for which in ("one", "two")]
    for a, b in zip(*runs, strict=True):
        a, b = ({k: v for k, v in line.items() if k.startswith(("balance", "train_"))} for line in (a, b))
        assert a["train_loss"] > 0 and [k for k in a if a[k] is None] == [k for k in b if b[k] is None]
        told = {k: v for k, v in a.items() if v is not None}
        assert told == pytest.approx({k: b[k] for k in told}, rel=1e-4)
