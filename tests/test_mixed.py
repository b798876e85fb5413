"""Mixed batches (decouple only), reassemble only, and unimodal predictions of the masked joint head.

References are one clip at a time: a mixed batch must be the mean of what its clips would give in batches of their own.
"""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from helpers import make_folder, run
from networks import network
from torch.nn import functional as F

import remix
import train
from models import FUSIONS
from utils.metrics import Tally

NAMES = ("audio", "video")
BOTH = [name for name, kind in FUSIONS.items() if not hasattr(kind.head, "needs")]


def inputs(clips: int, three: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {"audio": torch.randn(clips, 1, 33, 20, generator=generator, dtype=torch.float64),
             "video": torch.randn(clips, 2, 3, 32, 32, generator=generator, dtype=torch.float64)}  # fmt: skip
    return found | ({"text": torch.randn(clips, 7, generator=generator, dtype=torch.float64)} if three else {})


def rows(given: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    return {name: x[i : i + 1] for name, x in given.items()}


def masks(names: tuple[str, ...], kept: list[int]) -> torch.Tensor:
    return F.one_hot(torch.tensor(kept), len(names)).bool()


@pytest.mark.parametrize(("fusion", "three"), [*((name, False) for name in FUSIONS), *((name, True) for name in BOTH)])
def test_each_clip_of_a_mixed_batch_is_masked_for_itself(fusion, three):
    """In evaluation mode the clips do not see each other: logits equal those of homogeneous batches of one clip."""
    net = network(fusion=fusion, three=three).double().eval()
    names, kept = net.names, [1, 0, 0, 1, 1] if not three else [2, 0, 1, 2, 1]
    given = inputs(len(kept), three)
    with torch.no_grad():
        mixed = net(given, names, masks(names, kept))
        for i, m in enumerate(kept):
            own = {names[m]: given[names[m]][i : i + 1]}
            alone = net(own, (names[m],))
            torch.testing.assert_close(mixed.joint[i : i + 1], alone.joint, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(
                mixed.logits[names[m]][i : i + 1], alone.logits[names[m]], rtol=1e-10, atol=1e-12
            )
            masked = [name for name in names if name != names[m]]
            assert all(not mixed.features[name][i].any() for name in masked)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_mask_of_ones_is_a_joint_batch(fusion):
    net, given = network(fusion=fusion).double().eval(), inputs(3)
    with torch.no_grad():
        assert torch.equal(net(given, NAMES, torch.ones(3, 2).bool()).joint, net(given, NAMES).joint)


def test_the_loss_of_a_mixed_batch_is_one_mean_over_its_clips():
    """Not a mean per modality, in which the clips of the smaller group would weigh more."""
    net, kept = network().double().eval(), [1, 0, 1, 1, 1]
    given, labels = inputs(5), torch.tensor([0, 1, 2, 0, 1])
    mask, gamma = masks(NAMES, kept), {"audio": 0.7, "video": 1.3}
    output = net(given, NAMES, mask)
    columns = dict(zip(NAMES, mask.unbind(1), strict=True))
    entropies = train.cross_entropies(output, labels, columns)
    loss = sum(train.loss_terms(entropies, gamma).values())
    expected = 0.0
    for i, m in enumerate(kept):
        alone = net(rows(given, i), (NAMES[m],))
        expected += sum(train.loss_terms(train.cross_entropies(alone, labels[i : i + 1]), gamma).values()).item()
    assert loss.item() == pytest.approx(expected / len(kept), rel=1e-12)

    tally = Tally(1, ("joint", *NAMES))
    tally.add(0, loss, entropies, output.heads, labels, 5, columns)
    numbers = tally.numbers(("joint", *NAMES))
    by_head = {}
    for name in NAMES:
        own = [i for i, m in enumerate(kept) if NAMES[m] == name]
        by_head[name] = [F.cross_entropy(output.logits[name][i : i + 1], labels[i : i + 1]).item() for i in own]
        right = [bool(output.logits[name][i].argmax() == labels[i]) for i in own]
        assert numbers[f"train_ce_{name}"] == pytest.approx(np.mean(by_head[name]), rel=1e-5)
        assert numbers[f"train_acc_{name}"] == pytest.approx(np.mean(right))


def test_a_mixed_batch_of_one_kind_equals_the_homogeneous_one():
    """Weights after the loss's gradient, BatchNorm in training mode included."""
    given, labels = inputs(4), torch.tensor([0, 1, 2, 0])
    gradients = []
    for mask in (None, masks(NAMES, [1, 1, 1, 1])):
        torch.manual_seed(0)
        net = network().double().train()
        fed = ("video",) if mask is None else NAMES
        output = net(given, fed, mask)
        columns = {} if mask is None else dict(zip(NAMES, mask.unbind(1), strict=True))
        entropies = train.cross_entropies(output, labels, columns)
        sum(train.loss_terms(entropies, dict.fromkeys(NAMES, 1.0)).values()).backward()
        gradients.append({n: p.grad for n, p in net.named_parameters() if "heads.audio" not in n})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-12, msg=name)


def test_plans_of_the_two_ablations():
    keep = masks(NAMES, [1, 0, 1, 1, 0, 1, 1])
    order = torch.Generator().manual_seed(3)
    off = remix.reassemble(keep, NAMES, 3, "off", order)
    clips = torch.cat([batch.clips for batch in off])
    assert sorted(clips.tolist()) == list(range(7)) and clips.tolist() != list(range(7))
    assert [len(batch.clips) for batch in off] == [3, 3, 1]
    for batch in off:
        assert batch.fed == NAMES and torch.equal(batch.mask, keep[batch.clips])

    order.manual_seed(3)
    unmasked = remix.reassemble(keep, NAMES, 3, "unmasked", order)
    order.manual_seed(3)
    grouped = remix.reassemble(keep, NAMES, 3, "sequential", order)
    assert [batch.clips.tolist() for batch in unmasked] == [batch.clips.tolist() for batch in grouped]
    assert all(batch.fed == NAMES and batch.mask is None for batch in unmasked)


def test_the_masked_joint_head_predicts_from_one_modality():
    net = network(unimodal="masked").double()
    given = inputs(3)
    net.train()
    assert net(given, NAMES).logits == {}
    net.eval()
    with torch.no_grad():
        output = net(given, NAMES)
        for name in NAMES:
            alone = net({name: given[name]}, (name,))
            torch.testing.assert_close(output.logits[name], alone.joint, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(alone.logits[name], alone.joint, rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("mixed"))


FLAGS = ["--epochs", "3", "--warmup", "1", "--encoder", "resnet18_thin"]


@pytest.mark.parametrize("reassemble", ["off", "unmasked"])
def test_the_ablations_train_and_resume(data, tmp_path, reassemble):
    flags = [*FLAGS, "--reassemble", reassemble]
    whole = run(data, tmp_path, "whole", *flags)
    run(data, tmp_path, "part", *flags[:1], "2", *flags[2:])
    run(data, tmp_path, "part", *flags, "--resume", "auto")
    states = [torch.load(tmp_path / name / "last.pth", weights_only=True)["model"] for name in ("whole", "part")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["n_audio"] + last["n_video"] == 24 == last["n_fed"]
    if reassemble == "unmasked":  # joint losses: both heads see every clip
        assert last["train_ce_audio"] is not None and last["train_ce_video"] is not None


def test_without_unimodal_heads_nothing_trains_them(data, tmp_path):
    folder = run(data, tmp_path, "masked", *FLAGS, "--unimodal", "masked", "--batchnorm", "running")
    first = run(data, tmp_path, "first", *FLAGS[2:], "--epochs", "1", "--unimodal", "masked", "--batchnorm", "running")
    before, after = (torch.load(path / "last.pth", weights_only=True)["model"] for path in (first, folder))
    assert torch.equal(before["head_audio.weight"], after["head_audio.weight"])
    assert not torch.equal(before["head.weight"], after["head.weight"])
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["train_ce_audio"] is None and 0 <= last["test_acc_audio"] <= 1
    assert last["phase"] == "remix" and last["n_audio"] + last["n_video"] == 24


def test_the_score_without_heads_is_that_of_the_masked_joint_head():
    args = train.parse_args(["--train", "--unimodal", "masked", "--dataset", "demo"])
    assert set(args.joint_weights.values()) == {0.0} == set(args.alone_weights.values())
    with pytest.raises(train.UserError, match=r"--balance mmpareto: needs unimodal heads, .*--unimodal masked"):
        train.parse_args(["--train", "--unimodal", "masked", "--balance", "mmpareto"])
    assert isinstance(args, Namespace)


def test_the_joint_loss_of_decision_fusion_trains_the_unimodal_heads():
    flags = ["--train", "--alpha", "0", "--beta", "0", "--method", "baseline", "--fusion_method"]
    assert train.trained_heads(train.parse_args([*flags, "concat"])) == ()
    assert train.trained_heads(train.parse_args([*flags, "decision"])) == NAMES
