"""MLA and Resample (SMV): each against a slow version of its own, and the properties that its paper's formula has.

The slow versions share nothing with balance/: MLA is a plain loop over batches and modalities with an optimizer, P a
matrix inverse; Shapley values are means over all orders in which modalities may join.
"""

import itertools
import json

import numpy as np
import pytest
import torch
from helpers import make_folder, run, shown_in_table
from networks import network
from test_balance import BATCH, BOTH, CLASSES, Trained, flags_of
from torch import nn
from torch.nn import functional as F

import remix
import train
from balance import METHODS, Method, replace_heads
from balance.mla import MLA, projected
from balance.resample import contributions, copies_of, mixed
from dataset.clips import Feed, make_clips
from dataset.folder import load_folder
from dataset.specs import get_spec
from utils.errors import UserError
from utils.seeding import epoch_generator

NAMES = ("audio", "video", "text")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"), train=25, test=9)


@pytest.fixture(scope="module")
def clips(data):
    folder = load_folder(data, get_spec("folder"))
    feed = Feed(folder.spec.modalities, 32, torch.device("cpu"), "ram")
    return {"train": make_clips(folder.root, "train", folder.parts["train"], folder.shapes, feed)}


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("flags", "message"), [
    ("--balance mla --fusion_method sum", "--balance mla: has a head of its own.*leave --model and --fusion_met"),
    ("--balance mla --reassemble off", "--balance mla: steps on one modality .* --reassemble off .*; leave the flag"),
    ("--balance mla --beta 1", "--balance mla: makes no joint batches.* --beta would weigh"),
    ("--balance mla --unimodal masked", "--balance mla: needs unimodal heads"),
    ("--balance mla:weights=1/2/3", "--balance mla: weights: 3 given; audio, video need one each"),
    ("--balance mla:weights=0/0", "--balance mla:weights=0/0: .*all weights are 0"),
    ("--balance mla,mmcosine", "--balance mmcosine,mla: both replace the head"),
    ("--balance mla,mmpareto", "--balance mmpareto,mla: MLA trains without the joint loss"),
    ("--balance mla,ogm_ge", "--balance ogm_ge,mla: ogm_ge acts in joint batches, and mla splits them by modality"),
    ("--balance mla,opm", "--balance opm,mla: opm acts in joint batches"),
    ("--balance mla,gblend:weights=1/1/1", "--balance gblend,mla: both replace the loss weights"),
    ("--balance mla,resample", "--balance mla,resample: both replace the plan"),
    ("--balance resample:warmup=60", "--balance resample: would never act: warmup=60, .*--epochs 60"),
    ("--balance resample --reassemble off", "--balance resample: .*leave --reassemble off out"),
    ("--balance resample --reassemble unmasked", "--balance resample: .*leave --reassemble unmasked out"),
])  # fmt: skip
def test_mistakes_are_one_line(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        flags_of(flags)
    assert "\n" not in str(caught.value)


def test_a_method_without_the_joint_loss_beside_mmpareto_is_one_line(clips, monkeypatch):
    """Also where neither says so: the methods are known when a batch's losses are."""

    class Alone(Method):
        name = "alone"

        def losses(self, terms, output, step):
            return {name: term for name, term in terms.items() if name != "joint"}

    monkeypatch.setitem(METHODS, "alone", Alone)
    with pytest.raises(UserError, match=r"--balance mmpareto,alone: mmpareto merges the joint loss .*; choose one"):
        Trained(clips, "--balance mmpareto,alone").batch()


def test_adamw_decays_weights_apart_from_the_gradient():
    """One step against the formula: w - lr (wd w + m / (sqrt(v) + eps)); at the first step m / sqrt(v) is the sign."""
    args = flags_of("--optimizer adamw --encoder_lr_decay 0.5")
    net = network(CLASSES)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = train.make_optimizer(net, args)
    for p in net.parameters():
        p.grad = torch.full_like(p, -3.0)
    optimizer.step()
    for name, p in net.named_parameters():
        rate = 0.01 * (0.5 if name.startswith("encoders") else 1)
        torch.testing.assert_close(p.detach(), before[name] - rate * (0.01 * before[name] - 1), rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------- MLA


def test_p_takes_the_features_seen_out_of_the_head_s_gradient():
    """Updates of rank one against the inverse they make up: P = (I + R^T R / a)^-1 for a constant a (Woodbury)."""
    rng = np.random.default_rng(0)
    seen, a = rng.normal(size=(4, 9)), 0.05
    p = torch.eye(9, dtype=torch.double)
    for feature in seen:
        p = projected(p, torch.tensor(feature), a)
    np.testing.assert_allclose(p, np.linalg.inv(np.eye(9) + seen.T @ seen / a), rtol=1e-9, atol=1e-12)

    r, weight = torch.tensor(seen[0]), torch.tensor(rng.normal(size=(3, 9)))
    p = projected(torch.eye(9, dtype=torch.double), r, 0.0)
    assert (p @ r).abs().max() < 1e-12
    along, other = torch.outer(torch.tensor([1.0, -2.0, 0.5]).double(), r), torch.tensor(rng.normal(size=(3, 9)))
    assert torch.equal((weight - 0.7 * (along @ p) @ torch.eye(9).double()).round(decimals=9), weight.round(decimals=9))
    changed = weight - 0.7 * (other @ p)
    assert not torch.allclose(changed, weight)
    np.testing.assert_allclose(changed @ r, weight @ r, atol=1e-10)  # what F says of r stays


@pytest.mark.parametrize("three", [False, True])
@pytest.mark.parametrize("fixed", [None, (0.2, 0.7, 0.1)])
def test_fusion_weighs_each_clip_by_the_certainty_of_its_modalities(fixed, three):
    names = NAMES[: 2 + three]
    net = network(CLASSES, three=three).double()
    options = {"fusion": "dynamic" if fixed is None else "fixed", "weights": fixed and fixed[: len(names)]}
    MLA.replace_heads(net, train.Namespace(**options, projection="none"))
    torch.manual_seed(0)
    features = {name: 8 * torch.randn(6, 128, dtype=torch.double) for name in names}
    weight, bias = (p.detach().numpy() for p in (net.head.weight, net.head.bias))
    given = [names[:1], names[1:], names, names[:1], names, names[1:2]]
    expected = []
    for i, fed in enumerate(given):
        rows = [features[name][i].numpy() @ weight.T + bias for name in fed]
        p = [np.exp(row) / np.exp(row).sum() for row in rows]
        e = np.array([-(q * np.log(q)).sum() for q in p])
        w = np.exp(e.max() - e) if fixed is None else np.array([fixed[names.index(name)] for name in fed])
        expected.append((w / w.sum()) @ np.array(rows))
    mask = torch.tensor([[name in fed for name in names] for fed in given])
    with torch.no_grad():
        # a clip's mask leaves weight 0 to what it masks; a clip's fusion does not depend on its batch
        np.testing.assert_allclose(net.head(features, names, mask), expected, rtol=1e-6, atol=1e-9)
        for i, fed in enumerate(given):
            alone = net.head({name: z[i : i + 1] for name, z in features.items()}, fed)
            np.testing.assert_allclose(alone[0], expected[i], rtol=1e-6, atol=1e-9)
        same = dict.fromkeys(names, features["audio"])  # equal entropies: equal weights
        if fixed is None:
            np.testing.assert_allclose(net.head(same), features["audio"] @ weight.T + bias, rtol=1e-6)


@pytest.mark.parametrize("projection", ["none", "paper"])
def test_mla_is_one_step_per_modality_through_one_head(projection, clips):
    ours = Trained(clips, f"--balance mla:projection={projection}").epochs()
    slow = network(CLASSES)
    torch.manual_seed(0)
    slow = network(CLASSES)
    head = slow.heads["audio"]
    parameters = [*slow.encoders.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)
    seen: list[tuple[np.ndarray, float]] = []
    previous = ""
    for epoch in (7, 8):
        order, views = (epoch_generator(42, epoch, what) for what in ("plan", "views"))
        plan = [remix.Batch(part, (name,)) for part in torch.randperm(25, generator=order).split(BATCH)
                for name in BOTH]  # fmt: skip
        for i, batch in enumerate(clips["train"].epoch(plan, views)):
            (name,) = batch.fed
            slow.train()
            if batch.total == 1:
                slow.apply(lambda module: module.eval() if isinstance(module, nn.BatchNorm2d) else module)
            z = slow.encode(name, batch.inputs[name])
            optimizer.zero_grad()
            F.cross_entropy(head(z), batch.labels).backward()
            if projection == "paper":
                p = np.eye(128)
                for feature, a in seen:
                    k = p @ feature
                    p = p - np.outer(k, k) / (a + feature @ k)
                if name != previous:
                    head.weight.grad = (head.weight.grad.double() @ torch.tensor(p)).float()
                seen.append((z.detach().double().numpy().mean(0), 0.1 ** (1 + i / len(plan))))
                previous = name
            optimizer.step()
    found, expected = ours.net.state_dict(), slow.state_dict()
    for name, value in expected.items():
        if name.startswith(("encoders", "heads.audio")):
            torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-5, msg=name)
    for name in ("weight", "bias"):
        assert torch.equal(found[f"head.{name}"], found[f"heads.video.{name}"])
    assert ours.numbers["train_ce_audio"] > 0 and ours.numbers["train_ce_video"] > 0
    assert ("balance/mla_kept" in ours.numbers) == (projection == "paper")


def test_the_head_s_gradient_is_projected_where_the_modality_changes_alone(clips):
    """As in the homogeneous batches of Remix, several of one modality in a row. No step is taken: weights stay."""
    ours, plain = (Trained(clips, f"--balance mla:projection={kind}") for kind in ("paper", "none"))
    (method,) = ours.balance.methods
    for name, projects in (("audio", True), ("audio", False), ("video", True), ("video", False), ("audio", True)):
        p = method.p.numpy()
        found, raw = (t.batch((name,)).grads()["head.weight"] for t in (ours, plain))
        np.testing.assert_allclose(found, raw @ p if projects else raw, rtol=1e-3, atol=1e-6)
        assert np.allclose(raw @ p, raw, rtol=1e-2) == (p == np.eye(128)).all(), "P does change a gradient"


def test_with_remix_each_clip_is_in_its_own_modality_s_steps_alone(data, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.summary.finish", lambda *_: None)
    words = "--epochs 2 --warmup 1 --reassemble alternate --balance mla"
    folder = run(data, tmp_path, "r", *words.split())
    joint, mixed_ = metrics(folder)
    assert joint["n_fed"] == 50 and mixed_["n_fed"] == 25 == mixed_["n_audio"] + mixed_["n_video"]
    assert joint["train_loss"] == pytest.approx((joint["train_ce_audio"] + joint["train_ce_video"]) / 2, rel=1e-5)
    state = torch.load(folder / "last.pth", weights_only=True)
    assert state["model"]["head.weight"].shape == (CLASSES, 128)
    assert torch.equal(state["model"]["head.weight"], state["model"]["head_video.weight"])


def test_a_checkpoint_of_mla_is_evaluated_with_its_own_head(data, tmp_path, capsys):
    words = "--epochs 1 --method baseline --balance mla:fusion=fixed:weights=0.9/0.1"
    folder = run(data, tmp_path, "r", *words.split())
    expected = capsys.readouterr().out.split("last epoch")[1].split()[:4]
    train.main(["--checkpoint", str(folder / "last.pth"), "--data_root", str(data)])
    assert shown_in_table(capsys.readouterr().out) == expected


def test_encoders_of_different_widths_are_refused():
    net = network(CLASSES)
    net.widths["video"] = 512
    with pytest.raises(UserError, match=r"--balance mla: .*equal width; .* audio 128, video 512; choose"):
        replace_heads(net, flags_of("--balance mla"))


# ----------------------------------------------------------------------------------------------------------- Resample


def shapley_over_orders(right: dict[frozenset, bool], names: tuple[str, ...]) -> list[float]:
    """Means over all orders of joining of what each adds to v(S) = |S| [S is right]."""
    worth = {fed: len(fed) * is_right for fed, is_right in right.items()} | {frozenset(): 0}
    added = dict.fromkeys(names, 0.0)
    orders = list(itertools.permutations(names))
    for order in orders:
        for i, name in enumerate(order):
            added[name] += worth[frozenset(order[: i + 1])] - worth[frozenset(order[:i])]
    return [added[name] / len(orders) for name in names]


@pytest.mark.parametrize("m", [2, 3])
def test_contributions_of_every_pattern_of_right_and_wrong(m):
    """A head that is right where a table says so; all 8 (or 128) tables, one clip each."""
    names = NAMES[:m]
    sets = [frozenset(fed) for size in range(1, m + 1) for fed in itertools.combinations(names, size)]
    tables = list(itertools.product([False, True], repeat=len(sets)))

    def head(features, fed):
        given = frozenset(name for name, z in features.items() if z.any())
        assert given == frozenset(fed)
        right = torch.tensor([table[sets.index(given)] for table in tables])
        return torch.stack([~right, right], dim=1).float()

    features = {name: torch.ones(len(tables), 2) for name in names}
    values = contributions(head, features, torch.ones(len(tables), dtype=torch.long))
    expected = [shapley_over_orders(dict(zip(sets, table, strict=True)), names) for table in tables]
    np.testing.assert_allclose(values, expected, atol=1e-12)
    together = [m * table[-1] for table in tables]
    np.testing.assert_allclose(values.sum(1), together, atol=1e-12)
    if m == 2:  # (a, v, av) right -> (phi_a, phi_v), copies of (a, v), by hand
        by_hand = {(0, 0, 0): (0, 0, 2, 2), (1, 0, 0): (0.5, -0.5, 1, 3), (0, 1, 0): (-0.5, 0.5, 3, 1),
                   (1, 1, 0): (0, 0, 2, 2), (0, 0, 1): (1, 1, 0, 0), (1, 0, 1): (1.5, 0.5, 0, 1),
                   (0, 1, 1): (0.5, 1.5, 1, 0), (1, 1, 1): (1, 1, 0, 0)}  # fmt: skip
        for table, value, copies in zip(tables, values.tolist(), copies_of(values).tolist(), strict=True):
            assert (*value, *copies) == by_hand[table]
    else:  # a third of a part, thrice: all right, no copies
        assert copies_of(values[-1:]).tolist() == [[0, 0, 0]]


def test_the_epoch_holds_every_clip_and_copies_with_one_modality():
    copies = torch.tensor([[0, 2], [3, 0], [0, 0], [1, 1], [2, 2]])
    plan = mixed(torch.tensor([3, 0, 1, 4, 2]), copies, BOTH, 4, torch.Generator().manual_seed(0))
    assert [len(batch.clips) for batch in plan] == [4] * 4
    rows = [(clip, *(mask if batch.mask is not None else [True, True])) for batch in plan
            for clip, mask in zip(batch.clips.tolist(), batch.mask.tolist(), strict=True)]  # fmt: skip
    for clip, (a, v) in enumerate(copies.tolist()):
        own = [tuple(row[1:]) for row in rows if row[0] == clip]
        assert sorted(own) == sorted([(True, True)] + [(True, False)] * a + [(False, True)] * v)
    assert [row[0] for row in rows] != sorted(row[0] for row in rows), "shuffled"
    whole = mixed(torch.arange(5), torch.zeros(5, 2, dtype=torch.long), BOTH, 5, torch.Generator().manual_seed(0))
    assert whole[0].mask is None, "a batch of originals alone is a joint one"


def slow_copies(t: Trained, clips) -> list[list[int]]:
    """By the network itself, each clip and each set of modalities in a pass of its own."""
    table = {-0.5: 3, 0: 2, 0.5: 1, 1: 0, 1.5: 0}
    t.net.eval()
    found = []
    for batch in clips["train"].epoch(remix.batches_of(25, 1, BOTH, None)):
        right = {}
        for fed in ((("audio",)), (("video",)), BOTH):
            with torch.no_grad():
                logits = t.net({name: batch.inputs[name] for name in fed}, fed).joint
            right[frozenset(fed)] = bool(logits.argmax() == batch.labels)
        found.append([table[value] for value in shapley_over_orders(right, BOTH)])
    t.net.train()
    return found


def test_the_run_s_valuation_is_of_each_clip_alone_and_does_not_compound(clips):
    t = Trained(clips, "--balance resample:warmup=7 --epochs 60").epochs(epochs=(6, 7))
    (method,) = t.balance.methods
    expected = slow_copies(t, clips)
    for _ in range(2):
        t.balance.start_epoch(8)
        assert method.copies.tolist() == expected
        plan = t.balance.plan(remix.batches_of(25, BATCH, BOTH, None), 8)
        assert sum(len(batch.clips) for batch in plan) == 25 + np.sum(expected)
    assert 0 < np.sum(expected) < 25 * 4
    numbers = t.balance.numbers()
    assert numbers["balance/resample_copies_audio"] == np.sum(expected, axis=0)[0]


def test_the_level_of_modalities_adds_random_clips_of_the_weaker_one(clips):
    t = Trained(clips, "--balance resample:level=modality:part=0.4:alpha=0.5")
    (method,) = t.balance.methods
    values = torch.tensor([[1.5, 0.5]] * 25, dtype=torch.double)
    draws = [method.drawn(values, method.epoch_draws(epoch)) for epoch in (7, 7, 8)]
    assert draws[0].sum(0).tolist() == [0, int(2 / 3 * 0.5 * 1.0 * 25)] and torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    # the part's mean, not that of all: with values on one clip alone it depends on whether that clip is drawn
    lone = torch.zeros(25, 2, dtype=torch.double)
    lone[3, 0] = 25.0
    counts = {int(method.drawn(lone, method.epoch_draws(epoch)).sum()) for epoch in range(12)}
    assert counts == {0, int(2 / 3 * 0.5 * 2.5 * 25)}


def test_the_loss_of_a_mixed_batch_weighs_originals_and_copies_alike(clips):
    t = Trained(clips, "--balance resample --alpha 0.3 --beta 0.9 --gamma1 7")
    mask = torch.tensor([[True, True], [True, False], [False, True], [True, False]])
    t.net.eval()
    (batch,) = clips["train"].epoch([remix.Batch(torch.tensor([4, 4, 9, 2]), BOTH, mask)])
    output = t.net(batch.inputs, BOTH, mask)
    given = dict(zip(BOTH, mask.unbind(1), strict=True))
    terms = train.loss_terms(train.cross_entropies(output, batch.labels, given), t.args.alone_weights)
    step = train.Step(7, 0, batch, False)
    loss = sum(t.balance.losses(terms, output, step).values()).item()
    expected = 0.0
    for i, kept in enumerate(mask.tolist()):
        fed = tuple(name for name, keep in zip(BOTH, kept, strict=True) if keep)
        alone = t.net({name: batch.inputs[name][i : i + 1] for name in fed}, fed)
        for name, logits in alone.heads.items():
            weight = {"joint": 1, "audio": 0.3, "video": 0.9}[name]
            expected += weight * F.cross_entropy(logits, batch.labels[i : i + 1]).item() / 4
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("order", ["sequential", "shuffled", "alternate"])
def test_with_remix_a_clip_is_fed_once_and_for_each_copy_of_what_it_keeps(order, clips):
    t = Trained(clips, f"--balance resample --reassemble {order} --warmup 6")
    (method,) = t.balance.methods
    rng = np.random.default_rng(0)
    keep, copies = F.one_hot(torch.tensor(rng.integers(2, size=25)), 2), torch.tensor(rng.integers(4, size=(25, 2)))
    plan = remix.reassemble(keep.bool(), BOTH, BATCH, order, epoch_generator(42, 8, "plan"))
    method.copies = torch.zeros_like(copies)
    for ours, theirs in zip(t.balance.plan(plan, 8), plan, strict=True):  # without copies: Remix alone
        assert ours.fed == theirs.fed and torch.equal(ours.clips, theirs.clips) and ours.mask is None
    method.copies = copies
    fed = {name: [] for name in BOTH}
    for batch in t.balance.plan(plan, 8):
        assert len(batch.fed) == 1 and batch.mask is None
        fed[batch.fed[0]] += batch.clips.tolist()
    for m, name in enumerate(BOTH):
        counts = [fed[name].count(i) for i in range(25)]
        assert counts == [int(k) * (1 + int(c)) for k, c in zip(keep[:, m], copies[:, m], strict=True)]
    assert t.balance.numbers()["balance/resample_copies_audio"] == pytest.approx((keep * copies)[:, 0].sum() / 2)


def test_samples_fed_are_reported(data, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.summary.finish", lambda *_: None)  # pictures take most of so short a run
    words = "--epochs 3 --warmup 2 --learning_rate 1e-5 --balance resample:warmup=1"
    folder = run(data, tmp_path, "r", *words.split())
    warm, joint, homogeneous = metrics(folder)
    assert warm["n_fed"] == 25 and "balance/resample_copies_audio" not in warm
    for line in (joint, homogeneous):
        added = line["balance/resample_copies_audio"] + line["balance/resample_copies_video"]
        assert line["n_fed"] == 25 + added > 25
        assert abs(line["balance/resample_phi_audio"]) <= 1.5
    assert homogeneous["n_audio"] + homogeneous["n_video"] == 25
    assert joint["train_ce_audio"] > 0
