"""Three modalities from end to end: sound, pictures and vectors, named in the folder's dataset.json."""

import csv
import json

import numpy as np
import pytest
import torch
from helpers import TINY, make_folder, numbers_of, run, shown_in_table
from networks import network
from torch.nn import functional as F

import remix
import train
from balance.agm import modulation
from dataset.build import build_data
from models.checkpoint import load_weights, model_weights
from utils.errors import UserError

NAMES = ("audio", "video", "text")
CLIPS, TEST = 26, 9
FLAGS = ("--warmup", "1", "--diagnose", "--random_seed", "0")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Frames as large as those that either data path resizes by the same code."""
    root = make_folder(tmp_path_factory.mktemp("data"), train=CLIPS, test=TEST, size=(64, 80))
    (root / "text").mkdir()
    rng = np.random.default_rng(1)
    for path in sorted((root / "audio").iterdir()):
        words = rng.normal(size=7).astype(np.float32)
        words[int(path.stem[-4:]) % 3] += 6.0
        np.save(root / "text" / path.name, words)
    modalities = [
        {"name": "audio", "kind": "array", "folder": "audio"},
        {"name": "video", "kind": "frames", "folder": "visual", "frames": 2},
        {"name": "text", "kind": "array", "folder": "text"},
    ]
    (root / "dataset.json").write_text(json.dumps({"modalities": modalities}))
    return root


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take most of so short a run; `runs` draws them once."""
    monkeypatch.setattr("utils.summary.finish", lambda *_: None)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Three epochs of Remix at once; and two, after which `after_two` keeps last.pth, then the third."""
    root = tmp_path_factory.mktemp("runs")
    run(data, root, "whole", *FLAGS, "--epochs", "3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.summary.finish", lambda *_: None)
        part = run(data, root, "part", *FLAGS, "--epochs", "2")
        (root / "after_two.pth").write_bytes((part / "last.pth").read_bytes())
        run(data, root, "part", *FLAGS, "--epochs", "3", "--resume", "auto")
    return root


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def partition(folder) -> list[dict]:
    with open(folder / "partition.csv", newline="") as file:
        return list(csv.DictReader(file))


def weights(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def one_line(match: str, *words: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        train.parse_args(["--train", "--dataset", "folder", *words])
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- Remix


def test_metrics_name_the_three(runs):
    joint, *homogeneous = metrics(runs / "whole")
    assert joint["phase"] == "joint" and [line["phase"] for line in homogeneous] == ["remix"] * 2
    for name in NAMES:
        assert joint[f"n_{name}"] is None and 0 <= joint[f"test_acc_{name}"] <= 1
        assert joint[f"train_ce_{name}"] > 0 and 0 <= joint[f"train_acc_{name}"] <= 1
    terms = joint["train_ce_joint"] + 0.5 * sum(joint[f"train_ce_{name}"] for name in NAMES)
    assert joint["train_loss"] == pytest.approx(terms, rel=1e-5)
    for line in homogeneous:
        assert sum(line[f"n_{name}"] for name in NAMES) == CLIPS
        own = sum(line[f"n_{name}"] * (line[f"train_ce_{name}"] or 0) for name in NAMES) / CLIPS
        assert line["train_loss"] == pytest.approx(line["train_ce_joint"] + own, rel=1e-5)
        assert [line[f"train_ce_{name}"] is None for name in NAMES] == [line[f"n_{name}"] == 0 for name in NAMES]
    assert json.loads((runs / "whole" / "config.json").read_text())["data"]["modalities"] == list(NAMES)


def test_each_clip_keeps_the_lowest_of_three_divergences(runs, data):
    """The last scoring, recomputed number by number from the checkpoint of the epoch before it."""
    args = train.parse_args([*TINY, "--train", "--data_root", str(data)])
    found = build_data(args, CPU, only=("train",))
    model = train.make_model(args, found, CPU).eval()
    load_weights(model, weights(runs / "after_two.pth"), "after_two.pth")
    (batch,) = found.clips["train"].epoch(remix.batches_of(CLIPS, CLIPS, NAMES, None))
    with torch.no_grad():
        logits = {name: model.heads[name](model.encode(name, batch.inputs[name])).numpy() for name in NAMES}
    rows = partition(runs / "part")
    assert list(rows[0]) == ["clip", "label", "kl_audio", "kl_video", "kl_text", "kept"]
    assert [row["clip"] for row in rows] == found.clips["train"].names
    slow = np.zeros((CLIPS, 3))
    for i in range(CLIPS):
        for m, name in enumerate(NAMES):
            exp = np.exp(logits[name][i].astype(float) - logits[name][i].max())
            for p in np.clip(exp / exp.sum(), 1e-9, 1):
                slow[i, m] += p * np.log2(p * 3)
    written = np.array([[float(row[f"kl_{name}"]) for name in NAMES] for row in rows])
    np.testing.assert_allclose(written, slow, atol=2e-4)
    kept = []
    for values in written.tolist():  # of equal ones the last
        kept.append(NAMES[max(m for m in range(3) if values[m] == min(values))])
    assert [row["kept"] for row in rows] == kept and len(set(kept)) >= 2
    clear = np.sort(slow, axis=1)[:, 1] - slow.min(axis=1) > 1e-3
    assert [NAMES[m] for m in slow[clear].argmin(axis=1)] == [kept[i] for i in np.flatnonzero(clear)]
    last = metrics(runs / "part")[-1]
    assert {name: last[f"n_{name}"] for name in NAMES} == {name: kept.count(name) for name in NAMES}
    assert last["diagnose/kept_text"] == pytest.approx(kept.count("text") / CLIPS)


def test_a_resumed_run_is_the_whole_one_bit_for_bit(runs):
    whole, part = (torch.load(runs / name / "last.pth", weights_only=True) for name in ("whole", "part"))
    assert all(torch.equal(value, part["model"][name]) for name, value in whole["model"].items())
    assert torch.equal(whole["keep"], part["keep"]) and whole["keep"].shape == (CLIPS, 3)
    assert numbers_of(runs / "whole") == numbers_of(runs / "part")
    assert (runs / "whole" / "partition.csv").read_text() == (runs / "part" / "partition.csv").read_text()


def test_checkpoints_are_evaluated_to_what_the_run_has_reported(runs, data, capsys):
    train.main(["--dataset", "folder", "--data_root", str(data), "--checkpoint", str(runs / "whole" / "last.pth")])
    out = capsys.readouterr().out
    (head,) = [line for line in out.splitlines() if line.split()[:1] == ["multimodal"]]
    assert head.split() == ["multimodal", *NAMES, "macro", "F1"]
    last = metrics(runs / "whole")[-1]
    expected = [last[key] for key in ("test_acc", *(f"test_acc_{name}" for name in NAMES), "test_f1_macro")]
    assert [float(cell) for cell in shown_in_table(out)] == pytest.approx(expected, abs=5e-5)


def test_diagnosis_of_three(runs):
    last = metrics(runs / "whole")[-1]
    found = {key.removeprefix("diagnose/"): value for key, value in last.items() if key.startswith("diagnose/")}
    assert all(isinstance(value, float) for value in found.values())
    assert found["worth_audio+video+text"] == pytest.approx(last["test_acc"]) and "unimodal_gap" not in found
    gained = sum(found[f"shapley_{name}"] for name in NAMES)
    assert gained == pytest.approx(found["worth_audio+video+text"] - found["worth_none"])
    assert {f"{what}_{name}" for what in ("clash_cosine", "clash_ratio", "ece", "kept") for name in NAMES} <= set(found)


def test_every_modality_is_kept_by_keep_all(data, tmp_path):
    folder = run(data, tmp_path, "all", "--warmup", "0", "--epochs", "1", "--keep", "all", "--reassemble", "alternate")
    assert {row["kept"] for row in partition(folder)} == {"audio+video+text"}
    assert [metrics(folder)[0][f"n_{name}"] for name in NAMES] == [CLIPS] * 3


# --------------------------------------------------------------------------------------------------------- data paths


def test_files_and_memory_train_the_same_network(runs, data, tmp_path):
    """Frames this large are resized by the same code, so that whole runs agree bit for bit."""
    files = run(data, tmp_path, "files", *FLAGS, "--epochs", "3", "--num_workers", "0", "--cache", "none")
    first, second = (weights(folder / "last.pth") for folder in (files, runs / "whole"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert numbers_of(files) == numbers_of(runs / "whole")


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_vectors_are_fed_as_they_lie_in_their_files(data, cache):
    args = train.parse_args([*TINY, "--train", "--data_root", str(data), "--cache", cache, "--num_workers", "0"])
    clips = build_data(args, CPU, only=("train",)).clips["train"]
    whole, alone = clips.epoch([remix.Batch(torch.tensor([5, 2]), NAMES), remix.Batch(torch.tensor([7]), ("text",))])
    assert {name: tuple(x.shape) for name, x in whole.inputs.items()} == {
        "audio": (2, 1, 33, 20), "video": (2, 2, 3, 32, 32), "text": (2, 7)}  # fmt: skip
    assert list(alone.inputs) == ["text"]
    for clip, vector in zip((5, 2, 7), torch.cat([whole.inputs["text"], alone.inputs["text"]]), strict=True):
        assert np.array_equal(vector.numpy(), np.load(data / "text" / f"{clips.names[clip]}.npy"))


# ---------------------------------------------------------------------------------------------- one modality, refusals


def test_the_third_modality_is_trained_alone(data, tmp_path, capsys):
    folder = run(data, tmp_path, "text", "--method", "text", "--epochs", "2")
    torch.manual_seed(42)
    fresh, trained = model_weights(network(three=True)), weights(folder / "last.pth")
    for name, value in trained.items():
        own = name.startswith(("encoders.text.", "heads.text."))
        if name.startswith(("audio_net", "visual_net", "head_audio", "head_video")):
            assert torch.equal(value, fresh[name]), name
        elif own or name == "head.bias":
            assert not torch.equal(value, fresh[name]), name
    columns = (w["head.weight"].split(128, dim=1)[NAMES.index("text")] for w in (trained, fresh))
    assert not torch.equal(*columns)
    last = metrics(folder)[-1]
    for name in NAMES:
        assert (last[f"test_acc_{name}"] is None) == (last[f"train_ce_{name}"] is None) == (name != "text")
        assert last[f"n_{name}"] is None
    assert last["train_loss"] == pytest.approx(last["train_ce_joint"] + last["train_ce_text"], rel=1e-5)
    capsys.readouterr()
    train.main(["--dataset", "folder", "--data_root", str(data), "--checkpoint", str(folder / "last.pth")])
    shown = shown_in_table(capsys.readouterr().out)
    assert float(shown[0]) == pytest.approx(last["test_acc"], abs=5e-5)


def test_the_joint_loss_alone_trains_no_unimodal_head(data, tmp_path):
    """The official flags name audio and video; the third modality has audio's weights."""
    words = ["--train", "--dataset", "folder", "--data_root", str(data)]
    args = train.parse_args([*words, "--alpha", "0.2", "--beta", "0.3", "--gamma1", "4", "--gamma2", "5"])
    assert args.joint_weights == {"audio": 0.2, "video": 0.3, "text": 0.2}
    assert args.alone_weights == {"audio": 5, "video": 4, "text": 5}
    folder = run(data, tmp_path, "x", "--method", "baseline", "--alpha", "0", "--beta", "0", "--epochs", "2")
    for line in metrics(folder):
        assert line["train_loss"] == line["train_ce_joint"] and line["test_acc_text"] is None


def test_a_modality_that_the_folder_does_not_name_is_no_method(data):
    one_line("--method smell: unknown; allowed: remix, baseline, audio, video, text", "--data_root", str(data),
             "--method", "smell")  # fmt: skip


@pytest.mark.parametrize("fusion", ["film", "gated"])
def test_fusion_heads_of_two_modalities_are_refused(fusion, data, tmp_path):
    message = f"--fusion_method {fusion}: defined for the modalities audio and video, .*audio, video, text; use concat"
    with pytest.raises(UserError, match=message) as caught:
        run(data, tmp_path, fusion, "--fusion_method", fusion, "--epochs", "1", "--method", "baseline")
    assert "\n" not in str(caught.value) and not list((tmp_path / fusion).glob("*"))


@pytest.mark.parametrize("name", ["ogm_ge", "opm", "pmr"])
def test_balance_methods_of_two_modalities_are_refused(name, data):
    message = rf"--balance {name}: is defined for two modalities, and the dataset has 3 \(audio, video, text\)"
    one_line(message, "--data_root", str(data), "--balance", f"{name}:starts=0" if name == "opm" else name)


# ---------------------------------------------------------------------------------------------------- balance methods


@pytest.mark.parametrize(("methods", "notes"), [
    ("agm,gblend:every=2:probe=1,mmpareto", ("agm_kappa", "gblend_weight", "mmpareto_weight")),
    ("dr:every=1:resets=1,mmcosine", ("dr_reset",)),
    ("dr:every=1:resets=1,mla:projection=paper", ("dr_reset",)),
    ("resample:warmup=1", ("resample_phi", "resample_copies")),
])  # fmt: skip
def test_the_other_balance_methods_run_and_resume(methods, notes, data, tmp_path):
    flags = ("--warmup", "2", "--val_fraction", "0.3", "--balance", methods, "--optimizer", "sgd")
    flags += ("--learning_rate", "0.01")
    whole = run(data, tmp_path, "whole", *flags, "--epochs", "4")
    part = run(data, tmp_path, "part", *flags, "--epochs", "3")
    run(data, tmp_path, "part", *flags, "--epochs", "4", "--resume", "auto")
    first, second = (weights(folder / "last.pth") for folder in (whole, part))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert numbers_of(whole) == numbers_of(part)
    told = {key for line in metrics(whole) for key in line if key.startswith("balance/")}
    assert {f"balance/{note}_{name}" for note in notes for name in NAMES} <= told
    if "gblend" in methods:
        line = metrics(whole)[0]
        assert sum(line[f"balance/gblend_weight_{name}"] for name in (*NAMES, "joint")) == pytest.approx(1)


def test_agm_s_factors_for_three_by_its_formula():
    scores, means, alpha = np.array([0.4, 1.0, 1.3]), np.array([0.9, 0.8, 1.1]), 0.7
    ahead, standing = (np.exp(1.5 * (s.mean() - s)) for s in (scores, means))  # M / (M - 1) = 3 / 2
    expected = np.exp(alpha * np.minimum(standing - ahead, 7))
    found = modulation(torch.tensor(scores), torch.tensor(means), alpha)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert expected[0] < 1 < expected[1], "damped is the one that is ahead of its standing"
    capped = modulation(torch.tensor([9.0, 0.0, 0.0]), torch.tensor([0.0, 9.0, 9.0]), 1.0)
    assert capped[0].item() == pytest.approx(np.exp(7))
    assert modulation(torch.ones(3), torch.full((3,), 2.0), 1.5).tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("fusion", ["concat", "sum"])
def test_mmcosine_adds_three_cosines(fusion, data):
    args = train.parse_args([*TINY, "--train", "--data_root", str(data), "--fusion_method", fusion,
                             "--balance", "mmcosine:scale=4"])  # fmt: skip
    model = network(three=True, fusion=fusion)
    train.balances.replace_heads(model, args)
    features = {name: torch.randn(5, 128) for name in NAMES}
    expected = sum(4 * F.cosine_similarity(features[name][:, None], model.head.weights()[name][None], dim=2)
                   for name in NAMES)  # fmt: skip
    torch.testing.assert_close(model.head(features), expected)
    expected = 4 * F.cosine_similarity(features["text"][:, None], model.heads["text"].weight[None], dim=2)
    torch.testing.assert_close(model.heads["text"](features["text"]), expected)


def test_gblend_of_three_takes_four_weights(data):
    root = ("--data_root", str(data))
    one_line("--balance gblend: weights: 3 given; audio, video, text and joint need one each", *root,
             "--balance", "gblend:weights=1/2/3")  # fmt: skip
    args = train.parse_args(["--train", "--dataset", "folder", *root, "--balance", "gblend:weights=1/2/3/4"])
    assert args.balance_options["gblend"]["weights"] == (1, 2, 3, 4)
