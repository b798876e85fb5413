"""What --diagnose measures, against slow references and hand-made cases, and that it changes no run."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import make_folder
from torch.nn import functional as F

import train
from models import AVClassifier
from utils.diagnostics import (
    aside,
    calibration_error,
    collect,
    diagnose_model,
    gradient_clash,
    partition_moves,
    shapley,
)


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
    labels = torch.tensor([0, 1, 0, 1])
    only_audio = shapley(lambda a, v, kept: a + torch.tensor([0.1, 0.0]), a, v, labels)
    assert only_audio["worth_none"] == 0.5 and only_audio["worth_both"] == 1.0
    assert (only_audio["shapley_audio"], only_audio["shapley_video"]) == (0.5, 0.0)
    either = shapley(lambda a, v, kept: a + v + torch.tensor([0.1, 0.0]), a, a, labels)  # both know, one would do
    assert (either["shapley_audio"], either["shapley_video"]) == (0.25, 0.25)


@pytest.mark.parametrize("fusion", ["concat", "film", "gated"])
def test_shapley_adds_up_and_masks_as_training_does(fusion: str) -> None:
    torch.manual_seed(0)
    model = AVClassifier(4, "resnet18_thin", fusion)
    features = model.audio_net.features
    a, v, labels = torch.randn(64, features), torch.randn(64, features), torch.randint(0, 4, (64,))
    found = shapley(model.head, a, v, labels)
    gained = found["shapley_audio"] + found["shapley_video"]
    assert gained == pytest.approx(found["worth_both"] - found["worth_none"])
    masked = (model.head(torch.zeros_like(a), v, "video").argmax(1) == labels).double().mean().item()
    assert found["worth_video"] == masked


def tiny_batches(sizes: list[int], share: float = 1.0) -> list:
    rng = torch.Generator().manual_seed(1)
    return [
        SimpleNamespace(
            audio=torch.randn(size, 1, 33, 20, generator=rng),
            video=torch.randn(size, 2, 3, 32, 32, generator=rng),
            labels=torch.randint(0, 3, (size,), generator=rng),
            share=share,
            kept="both",
            clips=torch.arange(size) + sum(sizes[:i]),
        )
        for i, size in enumerate(sizes)
    ]


def make_model() -> tuple[AVClassifier, object]:
    torch.manual_seed(0)
    model = AVClassifier(3, "resnet18_thin")
    return model, lambda batch: model(batch.audio, batch.video, batch.kept)


def test_clash_is_that_of_plain_backward_passes_over_all_clips_at_once() -> None:
    model, forward = make_model()
    batches = tiny_batches([4, 3, 1])
    with aside(model):
        found = gradient_clash(model, batches, forward)
    model.eval()
    whole = [torch.cat([getattr(batch, name) for batch in batches]) for name in ("audio", "video", "labels")]
    for name, net in (("audio", model.audio_net), ("video", model.visual_net)):
        gradients = []
        for head in ("joint", name):
            model.zero_grad()
            F.cross_entropy(getattr(model(*whole[:2]), head), whole[2]).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]).double())
        cosine = F.cosine_similarity(*gradients, dim=0).item()
        assert found[f"clash_cosine_{name}"] == pytest.approx(cosine, abs=1e-4)
        assert found[f"clash_ratio_{name}"] == pytest.approx(
            (gradients[0].norm() / gradients[1].norm()).item(), rel=1e-4
        )


@pytest.mark.parametrize("sign", [1, -1])
def test_clash_of_gradients_known_to_agree_or_to_oppose(sign: int) -> None:
    model, forward = make_model()
    with torch.no_grad():  # the joint head is the audio head, or its mirror image, and does not see the video
        model.head.weight.zero_()
        model.head.weight[:, : model.audio_net.features] = 1e-3 * sign * model.head_audio.weight
        model.head_audio.weight *= 1e-3  # near uniform predictions: the softmax is linear there
        for layer in (model.head, model.head_audio):
            layer.bias.zero_()
    with aside(model):
        found = gradient_clash(model, tiny_batches([4]), forward)
    assert found["clash_cosine_audio"] == pytest.approx(sign, abs=1e-3)
    assert found["clash_ratio_audio"] == pytest.approx(1, abs=1e-2)
    assert found["clash_cosine_video"] is None and found["clash_ratio_video"] is None  # no gradient, no direction


def test_diagnosis_leaves_everything_as_it_was() -> None:
    model, forward = make_model()
    model.train()
    model.audio_net.bn1.eval()  # a mode that differs from its parent's must come back too
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    batches = tiny_batches([4, 2])
    found = diagnose_model(model, batches, batches, torch.cat([b.labels for b in batches]), forward)
    assert {"ece_joint", "clash_cosine_audio", "shapley_video", "unimodal_gap"} <= found.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_repeated_clip_of_a_process_without_one_does_not_count() -> None:
    model, forward = make_model()
    own, repeated = tiny_batches([4]), tiny_batches([4, 2], share=0.0)[1:]
    with aside(model):
        alone, both = (gradient_clash(model, batches, forward) for batches in (own, own + repeated))
        assert alone == pytest.approx(both)
        assert torch.equal(collect(own, forward, 4)["joint"], collect(own + repeated, forward, 4)["joint"])


def test_partition_moves_by_hand() -> None:
    now, before = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 0, 0, 1]).bool()
    labels = torch.tensor([0, 0, 0, 1])
    found = partition_moves(now, before, labels, ["x", "y", "z"])
    assert found == {"moved": 0.5, "kept_audio": 0.5, "kept_audio/x": 2 / 3, "kept_audio/y": 0.0, "kept_audio/z": None}
    assert partition_moves(now, None, labels, ["x", "y"])["moved"] is None


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run with and without --diagnose, on the path through files, whose loader draws random numbers."""
    root = tmp_path_factory.mktemp("diagnose")
    make_folder(root / "data", train=26, test=12)
    words = f"--train --dataset folder --data_root {root}/data --log_path {root} --epochs 3 --warmup 1 --batch_size 8"
    words += " --image_size 32 --model resnet18_thin --cache none --num_workers 0 --device cpu"
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
    ]
    assert {f"diagnose/{name}" for name in [*names, "kept_audio/a"]} <= measured.keys()
    assert last["seconds_diagnose"] > 0
    assert measured["diagnose/kept_audio"] == pytest.approx(last["n_audio"] / (last["n_audio"] + last["n_video"]))
    assert measured["diagnose/worth_both"] == pytest.approx(last["test_acc"])
    assert measured["diagnose/unimodal_gap"] == pytest.approx(last["test_acc_audio"] - last["test_acc_video"])
    assert not any(key.startswith("diagnose/") for key in lines_of(runs / "without")[-1])
    board = EventAccumulator(str(runs / "with"))
    board.Reload()
    assert measured.keys() <= set(board.Tags()["scalars"])
