"""What --diagnose measures, against slow references and hand-made cases, and that it changes no run."""

import json
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import make_folder
from networks import network
from torch.nn import functional as F

import train
from balance.diagnostics import (
    calibration_error,
    diagnose_model,
    discrepancy,
    gradient_clash,
    partition_moves,
    reassembly_angles,
    shapley,
)
from models import MultimodalClassifier
from models.inference import aside, collect

BOTH, THREE = ("audio", "video"), ("audio", "video", "text")
SHAPES = {"audio": (1, 33, 20), "video": (2, 3, 32, 32), "text": (7,)}


def slow_ece(logits: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """Bin by bin, as Guo et al. write it."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    confidence, right = p.max(1), p.argmax(1) == labels
    error = 0.0
    for m in range(1, bins + 1):
        inside = (confidence > (m - 1) / bins) & (confidence <= m / bins)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


@pytest.mark.parametrize("classes, bins, scale", [(3, 15, 1), (6, 15, 4), (31, 10, 0.1), (10, 1, 2)])
def test_calibration_error_is_the_slow_one(classes: int, bins: int, scale: float) -> None:
    rng = np.random.default_rng(classes)
    logits, labels = scale * rng.normal(size=(500, classes)), rng.integers(0, classes, 500)
    found = calibration_error(torch.tensor(logits), torch.tensor(labels), bins)
    assert found == pytest.approx(slow_ece(logits, labels, bins), abs=1e-12)


def test_calibration_error_of_the_certain() -> None:
    logits = torch.tensor([[50.0, 0.0], [50.0, 0.0], [50.0, 0.0], [50.0, 0.0]])
    assert calibration_error(logits, torch.tensor([0, 0, 0, 0])) == pytest.approx(0, abs=1e-9)
    assert calibration_error(logits, torch.tensor([0, 1, 1, 1])) == pytest.approx(0.75)


def test_shapley_of_hand_made_heads() -> None:
    a, v = torch.eye(2).repeat(2, 1), torch.eye(2).repeat_interleave(2, 0)  # a names labels[i] by i % 2, v by i // 2
    labels, first = torch.tensor([0, 1, 0, 1]), torch.tensor([0.1, 0.0])
    only_audio = shapley(lambda z, fed: z["audio"] + first, {"audio": a, "video": v}, labels)
    assert only_audio["worth_none"] == 0.5 and only_audio["worth_audio+video"] == 1.0
    assert (only_audio["shapley_audio"], only_audio["shapley_video"]) == (0.5, 0.0)
    either = shapley(lambda z, fed: z["audio"] + z["video"] + first, {"audio": a, "video": a}, labels)
    assert (either["shapley_audio"], either["shapley_video"]) == (0.25, 0.25)  # both know, one would do
    # Of three, one knows, two say nothing: the one has it all. Where all three know, each has a third.
    nothing = torch.zeros_like(a)
    one = shapley(lambda z, fed: sum(z.values()) + first, dict(zip(THREE, (nothing, a, nothing), strict=True)), labels)
    assert [one[f"shapley_{name}"] for name in THREE] == pytest.approx([0, 0.5, 0])
    all_know = shapley(lambda z, fed: sum(z.values()) + first, dict.fromkeys(THREE, a), labels)
    assert [all_know[f"shapley_{name}"] for name in THREE] == pytest.approx([0.5 / 3] * 3)


@pytest.mark.parametrize(("fusion", "names"), [("concat", BOTH), ("film", BOTH), ("gated", BOTH), ("concat", THREE),
                                                ("sum", THREE), ("decision_drop", THREE)])  # fmt: skip
def test_shapley_adds_up_and_masks_as_training_does(fusion: str, names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = network(4, fusion=fusion, three=names == THREE)
    features = {name: torch.randn(64, width) for name, width in model.widths.items()}
    labels = torch.randint(0, 4, (64,))
    found = shapley(model.head, features, labels)
    gained = sum(found[f"shapley_{name}"] for name in names)
    assert gained == pytest.approx(found[f"worth_{'+'.join(names)}"] - found["worth_none"])
    assert len([key for key in found if key.startswith("worth_")]) == 2 ** len(names)

    def worth(*fed: str) -> float:
        kept = {name: z if name in fed else torch.zeros_like(z) for name, z in features.items()}
        return (model.head(kept, fed).argmax(1) == labels).double().mean().item()

    for fed in [names, *((name,) for name in names), *([names[:2], names[1:]] if len(names) > 2 else [])]:
        assert found[f"worth_{'+'.join(fed)}"] == worth(*fed)
    # By its definition: the mean, over every order of arrival, of what a modality adds to those before it.
    for name in names:
        gains = []
        for order in permutations(names):
            before = tuple(n for n in names if n in order[: order.index(name)])
            joined = tuple(n for n in names if n in (*before, name))
            gains.append(found[f"worth_{'+'.join(joined)}"] - found[f"worth_{'+'.join(before) or 'none'}"])
        assert found[f"shapley_{name}"] == pytest.approx(np.mean(gains))


def tiny_batches(sizes: list[int], weight: float = 1.0, names: tuple[str, ...] = BOTH) -> list:
    rng = torch.Generator().manual_seed(1)
    return [
        SimpleNamespace(
            inputs={name: torch.randn(size, *SHAPES[name], generator=rng) for name in names},
            labels=torch.randint(0, 3, (size,), generator=rng),
            weight=weight,
            total=size,
            fed=names,
            clips=torch.arange(size) + sum(sizes[:i]),
        )
        for i, size in enumerate(sizes)
    ]


def make_model(names: tuple[str, ...] = BOTH) -> MultimodalClassifier:
    torch.manual_seed(0)
    return network(3, three=names == THREE)


@pytest.mark.parametrize("names", [BOTH, THREE])
def test_clash_is_that_of_plain_backward_passes_over_all_clips_at_once(names) -> None:
    model = make_model(names)
    batches = tiny_batches([4, 3, 1], names=names)
    with aside(model):
        found = gradient_clash(model, batches)
    model.eval()
    whole = {name: torch.cat([batch.inputs[name] for batch in batches]) for name in names}
    labels = torch.cat([batch.labels for batch in batches])
    assert len(found) == 2 * len(names)
    for name, encoder in model.encoders.items():
        gradients = []
        for head in ("joint", name):
            model.zero_grad()
            F.cross_entropy(model(whole, names).heads[head], labels).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in encoder.parameters()]).double())
        cosine = F.cosine_similarity(*gradients, dim=0).item()
        assert found[f"clash_cosine_{name}"] == pytest.approx(cosine, abs=1e-4)
        assert found[f"clash_ratio_{name}"] == pytest.approx(
            (gradients[0].norm() / gradients[1].norm()).item(), rel=1e-4
        )


@pytest.mark.parametrize("sign", [1, -1])
def test_clash_of_gradients_known_to_agree_or_to_oppose(sign: int) -> None:
    model = make_model()
    with torch.no_grad():  # the joint head is the audio head, or its mirror image, and does not see the video
        model.head.weight.zero_()
        model.head.weights()["audio"].copy_(1e-3 * sign * model.heads["audio"].weight)
        model.heads["audio"].weight *= 1e-3  # near uniform predictions: the softmax is linear there
        for layer in (model.head, model.heads["audio"]):
            layer.bias.zero_()
    with aside(model):
        found = gradient_clash(model, tiny_batches([4]))
    assert found["clash_cosine_audio"] == pytest.approx(sign, abs=1e-3)
    assert found["clash_ratio_audio"] == pytest.approx(1, abs=1e-2)
    assert found["clash_cosine_video"] is None and found["clash_ratio_video"] is None  # no gradient, no direction


class Held:
    """Twelve clips as `dataset.clips.Clips` serves them."""

    def __init__(self, names: tuple[str, ...]):
        (self.all,) = tiny_batches([12], names=names)

    def epoch(self, plan: list):
        for batch in plan:
            rows = {name: x[batch.clips] for name, x in self.all.inputs.items()}
            yield SimpleNamespace(inputs=rows, fed=batch.fed, labels=self.all.labels[batch.clips],
                                  weight=1.0)  # fmt: skip


@pytest.mark.parametrize("names", [BOTH, THREE])
def test_angles_of_mixed_and_homogeneous_batches_are_those_of_plain_backward_passes(names) -> None:
    model, clips = make_model(names), Held(names)
    kept = torch.tensor([0, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1])  # nobody keeps text
    keep = F.one_hot(kept, len(names)).bool()
    with aside(model):
        found = reassembly_angles(model, clips, keep, 5, torch.Generator().manual_seed(0))
    assert found.keys() == {f"angle_{kind}_{name}" for kind in ("mixed", "part", "grouped") for name in names}
    if names == THREE:
        assert found["angle_mixed_text"] is None and found["angle_grouped_text"] is None

    def gradient(chosen: list[int], name: str, head: str) -> np.ndarray:
        model.zero_grad()
        inputs = {n: x[chosen] for n, x in clips.all.inputs.items()}
        F.cross_entropy(model(inputs, names).heads[head], clips.all.labels[chosen]).backward()
        return np.concatenate([p.grad.double().flatten().numpy() for p in model.encoders[name].parameters()])

    def degrees(one: np.ndarray, other: np.ndarray) -> float:
        return np.degrees(np.arccos(one @ other / np.linalg.norm(one) / np.linalg.norm(other)))

    model.eval()
    generator = torch.Generator().manual_seed(0)
    for m, name in enumerate(names[:2]):
        own, angles = (kept == m).nonzero().flatten(), {"mixed": [], "part": [], "grouped": []}
        for _ in range(4):
            mixed = torch.randperm(12, generator=generator)[:5].tolist()
            grouped = own[torch.randperm(len(own), generator=generator)[:5]].tolist()
            if part := [i for i in mixed if kept[i] == m]:
                angles["mixed"].append(degrees(gradient(mixed, name, "joint"), gradient(part, name, name)))
                angles["part"].append(degrees(gradient(part, name, "joint"), gradient(part, name, name)))
            angles["grouped"].append(degrees(gradient(grouped, name, "joint"), gradient(grouped, name, name)))
        for kind, values in angles.items():
            assert found[f"angle_{kind}_{name}"] == pytest.approx(np.mean(values), abs=0.05)


def test_a_frozen_encoder_has_no_angle() -> None:
    model, clips = make_model(), Held(BOTH)
    model.freeze(["audio"])
    keep = F.one_hot(torch.arange(12) % 2, 2).bool()
    with aside(model):
        found = reassembly_angles(model, clips, keep, 5, torch.Generator().manual_seed(0))
    assert found["angle_grouped_audio"] is None and 0 < found["angle_grouped_video"] < 180


def test_discrepancy_is_the_ratio_of_summed_probabilities() -> None:
    rng = np.random.default_rng(0)
    logits, labels = {name: rng.normal(size=(9, 4)) for name in THREE}, rng.integers(0, 4, 9)
    exp = {name: np.exp(values) for name, values in logits.items()}
    score = {name: sum(e[i, y] / e[i].sum() for i, y in enumerate(labels)) for name, e in exp.items()}
    found = discrepancy({name: torch.tensor(values) for name, values in logits.items()}, torch.tensor(labels))
    assert found["rho_audio"] == pytest.approx(score["audio"] / ((score["video"] + score["text"]) / 2))
    two = discrepancy({name: torch.tensor(logits[name]) for name in BOTH}, torch.tensor(labels))
    assert two["rho_audio"] == pytest.approx(1 / two["rho_video"]) == pytest.approx(score["audio"] / score["video"])


@pytest.mark.parametrize("names", [BOTH, THREE])
def test_diagnosis_leaves_everything_as_it_was(names) -> None:
    model = make_model(names)
    model.train()
    model.encoders["audio"].bn1.eval()  # a mode that differs from its parent's must come back too
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    batches = tiny_batches([4, 2], names=names)
    found = diagnose_model(model, batches, batches, torch.cat([b.labels for b in batches]))
    assert {"ece_joint", "clash_cosine_audio", "shapley_video"} <= found.keys()
    assert ("unimodal_gap" in found) == (names == BOTH) and ("shapley_text" in found) == (names == THREE)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_network_that_is_fed_one_modality_has_neither_clash_nor_imbalance() -> None:
    model = make_model(THREE)
    batches = [SimpleNamespace(**vars(batch) | {"fed": ("text",), "inputs": {"text": batch.inputs["text"]}})
               for batch in tiny_batches([4, 2], names=THREE)]  # fmt: skip
    found = diagnose_model(model, [], batches, torch.cat([b.labels for b in batches]))
    assert set(found) == {"ece_joint", "ece_text"}


def test_what_another_process_holds_too_counts_by_its_share() -> None:
    """Two processes that hold the same two clips each count them by half; here as two batches of weight 1/2."""
    model = make_model()
    own, shared = tiny_batches([4, 2]), tiny_batches([4, 2], weight=0.5)
    with aside(model):
        alone, twice = (gradient_clash(model, batches) for batches in (own, [own[0], shared[1], shared[1]]))
        assert alone == pytest.approx(twice, rel=1e-4)
        whole = collect(model, own, 6).logits["joint"]
        half = collect(model, [own[0], shared[1]], 6).logits["joint"]
    torch.testing.assert_close(half[:4], whole[:4], rtol=0, atol=0)
    torch.testing.assert_close(2 * half[4:], whole[4:])


def test_partition_moves_by_hand() -> None:
    now, before = (torch.tensor([[a, not a] for a in rows]) for rows in ([1, 1, 0, 0], [1, 0, 0, 1]))
    labels = torch.tensor([0, 0, 0, 1])
    found = partition_moves(now.bool(), before.bool(), BOTH, labels, ["x", "y", "z"])
    assert found == {f"diagnose/{name}": value for name, value in {
        "moved": 0.5, "kept_audio": 0.5, "kept_video": 0.5,
        "kept_audio/x": 2 / 3, "kept_audio/y": 0.0, "kept_audio/z": None}.items()}  # fmt: skip
    assert partition_moves(now.bool(), None, BOTH, labels, ["x", "y"])["diagnose/moved"] is None


def test_partition_moves_of_three_by_hand() -> None:
    now = torch.eye(3).bool()[[0, 1, 2, 2]]
    before = torch.eye(3).bool()[[0, 2, 2, 1]]
    found = partition_moves(now, before, THREE, torch.tensor([0, 0, 1, 1]), ["x", "y"])
    assert found == {f"diagnose/{name}": value for name, value in {
        "moved": 0.5, "kept_audio": 0.25, "kept_video": 0.25, "kept_text": 0.5,
        "kept_audio/x": 0.5, "kept_audio/y": 0.0, "kept_video/x": 0.5, "kept_video/y": 0.0}.items()}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run with and without --diagnose, on the path through files, whose loader draws random numbers."""
    root = tmp_path_factory.mktemp("diagnose")
    make_folder(root / "data", train=26, test=12)
    words = f"--train --dataset folder --data_root {root}/data --log_path {root} --epochs 3 --warmup 1 --batch_size 8"
    words += " --image_size 32 --encoder resnet18_thin --cache none --num_workers 0 --device cpu"
    for name, more in (("with", "--diagnose"), ("without", "")):
        train.main([*words.split(), "--run_name", name, *more.split()])
    return root


def lines_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_is_the_same_bit_for_bit(runs) -> None:
    ours, plain = (torch.load(runs / name / "last.pth", weights_only=True) for name in ("with", "without"))
    assert all(torch.equal(value, plain["model"][name]) for name, value in ours["model"].items())
    assert torch.equal(ours["rng"]["torch"], plain["rng"]["torch"])
    for left, right in zip(lines_of(runs / "with"), lines_of(runs / "without"), strict=True):
        timed = ("seconds", "clips_per_second")
        assert {k: v for k, v in left.items() if k in right and not k.startswith(timed)} == {
            k: v for k, v in right.items() if not k.startswith(timed)
        }


def test_every_number_is_in_metrics_and_on_the_board(runs) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    last = lines_of(runs / "with")[-1]
    measured = {key: value for key, value in last.items() if key.startswith("diagnose/")}
    assert all(isinstance(value, float) for value in measured.values())
    names = [
        "clash_cosine_audio",
        "clash_ratio_video",
        "shapley_audio",
        "worth_none",
        "unimodal_gap",
        "ece_joint",
        "ece_audio",
        "moved",
        "rho_audio",
        "angle_grouped_video",
    ]
    assert {f"diagnose/{name}" for name in [*names, "kept_audio/a"]} <= measured.keys()
    assert last["seconds_diagnose"] > 0
    assert measured["diagnose/kept_audio"] == pytest.approx(last["n_audio"] / (last["n_audio"] + last["n_video"]))
    assert measured["diagnose/worth_audio+video"] == pytest.approx(last["test_acc"])
    assert measured["diagnose/unimodal_gap"] == pytest.approx(last["test_acc_audio"] - last["test_acc_video"])
    assert not any(key.startswith("diagnose/") for key in lines_of(runs / "without")[-1])
    board = EventAccumulator(str(runs / "with"))
    board.Reload()
    assert measured.keys() <= set(board.Tags()["scalars"])
