"""What the flags of Remix do to a run: who keeps what, in which order, scored how often; whose choice best.pth is."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import run

import train
from dataset.folder import load_folder
from dataset.specs import get_spec


@pytest.fixture
def watched(data, tmp_path, monkeypatch):
    """Runs two epochs of Remix and tells of each what was scored (logits, None without a scoring) and planned."""
    seen = []
    predict, train_epoch = train.predict, train.train_epoch

    def scored(model, clips, fed, batch_size, name, *rest):
        logits = predict(model, clips, fed, batch_size, name, *rest)
        if name.endswith("scoring"):
            seen.append([{head: values.numpy() for head, values in logits.items()}, None])
        return logits

    def planned(model, clips, plan, *rest):
        if not seen or seen[-1][1] is not None:
            seen.append([None, None])
        seen[-1][1] = plan
        return train_epoch(model, clips, plan, *rest)

    def go(*flags):
        seen.clear()
        run(data, tmp_path, "watched", "--warmup", "0", "--epochs", "2", *flags)
        return seen

    monkeypatch.setattr("utils.summary.finish", lambda *_: None)  # pictures take most of so short a run
    monkeypatch.setattr(train, "predict", scored)
    monkeypatch.setattr(train, "train_epoch", planned)
    return go


def kept_by(plan) -> dict[int, list[str]]:
    found = {clip: [] for clip in range(34)}
    for batch in plan:
        for clip in batch.clips.tolist():
            (name,) = batch.fed
            found[clip].append(name)
    return found


def np_divergence(logits: np.ndarray) -> np.ndarray:
    """KL in bits of the softmax from uniform, (N,)."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return (p * np.log2(p * p.shape[1])).sum(1)


def np_losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    top = logits.max(1)
    return top + np.log(np.exp(logits - top[:, None]).sum(1)) - logits[np.arange(len(labels)), labels]


@pytest.mark.parametrize("flags", [[], ["--keep", "easy"], ["--score", "loss"], ["--score", "loss", "--keep", "easy"]])
def test_each_clip_keeps_what_score_and_keep_say(watched, data, flags):
    labels, both = np.asarray(load_folder(data, get_spec("folder")).parts["train"].labels), 0
    for logits, plan in watched(*flags):
        if "loss" in flags:
            audio_is_harder = np_losses(logits["audio"], labels) > np_losses(logits["video"], labels)
        else:
            audio_is_harder = np_divergence(logits["audio"]) < np_divergence(logits["video"])
        expected = audio_is_harder != ("easy" in flags)
        both += 0 < expected.sum() < 34
        assert kept_by(plan) == {clip: ["audio" if audio else "video"] for clip, audio in enumerate(expected)}
    assert both, "one-sided: tells nothing"


def test_a_random_partition_is_another_in_each_epoch(watched):
    (_, first), (_, second) = watched("--score", "random")
    assert all(len(kept) == 1 for kept in kept_by(first).values()) and kept_by(first) != kept_by(second)
    assert 5 < sum(kept == ["audio"] for kept in kept_by(first).values()) < 29


def test_keep_all_has_every_clip_in_both(watched):
    for _, plan in watched("--keep", "all"):
        assert all(sorted(kept) == ["audio", "video"] for kept in kept_by(plan).values())


def test_batches_come_in_the_order_asked_for(watched):
    orders = {}
    for order in ("sequential", "alternate", "shuffled"):
        flags = ("--keep", "all", "--reassemble", order, "--run_name", order)
        orders[order] = [batch.fed[0] for batch in watched(*flags)[0][1]]  # 5 batches of each modality
    changes = {order: sum(a != b for a, b in pairwise(kept)) for order, kept in orders.items()}
    assert changes["sequential"] == 1 and changes["alternate"] == 9 and 1 < changes["shuffled"] < 9
    assert all(sorted(kept) == ["audio"] * 5 + ["video"] * 5 for kept in orders.values())


def test_clips_are_scored_as_often_as_asked_for(watched):
    seen = watched("--rescore_every", "2", "--epochs", "5", "--warmup", "1")
    assert [logits is not None for logits, _ in seen] == [False, True, False, True, False]
    for (_, a), (_, b) in ((seen[1], seen[2]), (seen[3], seen[4])):
        assert kept_by(a) == kept_by(b)


@pytest.mark.parametrize(("flags", "best"), [([], 0), (["--val_fraction", "0.2"], 1)])
def test_best_pth_is_validation_s_choice_where_there_is_one(data, tmp_path, monkeypatch, flags, best):
    told = {"test": [0.9, 0.1, 0.2], "val": [0.1, 0.5, 0.3]}
    evaluate = train.evaluate

    def scripted(logits, labels, part, args):
        numbers = evaluate(logits, labels, part, args)
        return numbers | {f"{part}_acc": told[part].pop(0)} if told[part] else numbers

    monkeypatch.setattr(train, "evaluate", scripted)
    folder = run(data, tmp_path, "best", "--method", "baseline", "--epochs", "3", *flags)
    assert torch.load(folder / "best.pth", weights_only=True)["epoch"] == best
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["best_test_acc"], summary["best_test_epoch"]) == (0.9, 0)
    assert summary["test_acc_at_best_val"] == (0.1 if flags else None)
