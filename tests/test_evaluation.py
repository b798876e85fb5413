"""The evaluation of a checkpoint against scikit-learn and slow numpy; predictions read back as a user would."""

import contextlib
import io
import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from helpers import TINY, run
from sklearn import metrics as reference
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import train
from evaluation.checkpoint import beside, save_numbers
from evaluation.numbers import measure, trained_heads
from evaluation.unimodal import Labelled, linear_probe, masked, slices
from models import build_model
from utils.errors import UserError

BOTH = ("audio", "video")
HEADS = ("multimodal", *BOTH)


@pytest.fixture(scope="module", autouse=True)
def without_pictures():
    """They take most of so short a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.summary.finish", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(data, runs):
    """A checkpoint with a validation part, on 34 clips."""
    flags = ("--epochs", "2", "--warmup", "1", "--val_fraction", "0.2", "--learning_rate", "0.003")
    return run(data, runs, "trained", *flags) / "last.pth"


@pytest.fixture(scope="module")
def predicted(trained, runs):
    """(what was printed, predictions, numbers) of one evaluation."""
    path = runs / "out.npz"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train.main(["--checkpoint", str(trained), "--predictions", str(path), "--device", "cpu"])
    return out.getvalue().splitlines(), np.load(path), json.loads(beside(trained).read_text())


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def slow_ece(probabilities, labels, bins=15):
    """Guo et al., equation 3, bin by bin."""
    confidence, hits = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    total = 0.0
    for i in range(bins):
        own = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        if own.any():
            total += own.sum() / len(labels) * abs(hits[own].mean() - confidence[own].mean())
    return total


def check_numbers(found, logits, labels, classes):
    """Every number of `measure` against scikit-learn's and the slow calibration error."""
    places, probabilities = range(len(classes)), softmax(logits.astype(np.float64))
    guesses = logits.argmax(axis=1)
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(labels, guesses))
    assert found["nll"] == pytest.approx(reference.log_loss(labels, probabilities, labels=places), rel=1e-6)
    assert found["ece"] == pytest.approx(slow_ece(probabilities, labels), rel=1e-6)
    precision, recall, f1, clips = reference.precision_recall_fscore_support(
        labels, guesses, labels=places, zero_division=0
    )
    assert found["f1_macro"] == pytest.approx(f1.mean())
    assert (np.array(found["confusion"]) == reference.confusion_matrix(labels, guesses, labels=places)).all()
    for i, name in enumerate(classes):
        expected = {"clips": clips[i], "precision": pytest.approx(precision[i]), "f1": pytest.approx(f1[i]),
                    "recall": pytest.approx(recall[i]) if clips[i] else None}  # fmt: skip
        assert found["per_class"][name] == expected


# ---------------------------------------------------------------------------------------------------------- numbers


def test_numbers_are_scikit_learn_s():
    """With a class that has no clips (3) and one that is never predicted (4)."""
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 4], 200)
    logits = rng.normal(size=(200, 5)).astype(np.float32) + 2 * np.eye(5, dtype=np.float32)[labels]
    logits[:, 4] = -9
    found = measure(torch.from_numpy(logits), torch.from_numpy(labels), list("abcde"))
    check_numbers(found, logits, labels, list("abcde"))
    assert found["per_class"]["d"]["recall"] is None and found["per_class"]["e"]["precision"] == 0
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(("method", "unimodal", "alone", "expected"), [
    ("baseline", "heads", 1.0, ("video",)),
    ("remix", "heads", 1.0, BOTH),
    ("remix", "heads", 0.0, ("video",)),
    ("audio", "heads", 1.0, ("audio",)),
    ("audio", "heads", 0.0, ()),
    ("remix", "masked", 0.0, BOTH),
    ("video", "masked", 0.0, ("video",)),
])  # fmt: skip
def test_heads_that_a_loss_reaches(method, unimodal, alone, expected):
    joint = {"audio": 0.0, "video": 0.5} if unimodal == "heads" else dict.fromkeys(BOTH, 0.0)
    weights = {"joint_weights": joint, "alone_weights": dict.fromkeys(BOTH, alone)}
    args = Namespace(method=method, unimodal=unimodal, fusion_method="concat", **weights)
    assert trained_heads(args) == expected
    args.fusion_method = "decision"  # the joint loss trains the unimodal heads
    assert trained_heads(args) == ((method,) if method in BOTH else BOTH)


# --------------------------------------------------------------------------------------------------------- unimodal


def small(fusion):
    from dataset.specs import audio, video

    torch.manual_seed(0)
    modalities = (audio("logmel"), video(frames=2))
    return build_model(modalities, {"audio": (16, 8)}, 3, "resnet18_thin", fusion).eval()


@pytest.mark.parametrize("fusion", ["concat", "sum", "film", "gated", "decision", "bigated"])
@torch.no_grad()
def test_slices_and_masked_heads(fusion):
    """Slices by hand from the weights, adding up to the joint logits; the masked head as the network gives it."""
    model = small(fusion)
    inputs = {"audio": torch.randn(4, 1, 16, 8), "video": torch.randn(4, 2, 3, 32, 32)}
    output = model(inputs, BOTH)
    parts, alone = slices(model, output.features), masked(model, output.features, BOTH)
    for name in BOTH:
        torch.testing.assert_close(alone[name], model({name: inputs[name]}, (name,)).joint)
    if fusion in ("film", "gated", "bigated"):
        assert parts == {}
        return
    torch.testing.assert_close(parts["audio"] + parts["video"], output.joint)
    if fusion == "concat":
        weight, bias, width = model.head.weight.numpy(), model.head.bias.numpy(), 128
        own = {"audio": weight[:, :width], "video": weight[:, width:]}
        for name in BOTH:
            expected = output.features[name].numpy() @ own[name].T + bias / 2
            np.testing.assert_allclose(parts[name].numpy(), expected, rtol=1e-4, atol=1e-5)


def probe_by_hand(train_x, train_y, test_x, cost):
    scaler = StandardScaler().fit(train_x)
    model = LogisticRegression(C=cost, max_iter=1000).fit(scaler.transform(train_x), train_y)
    return model, scaler, model.predict_log_proba(scaler.transform(test_x))


def test_the_linear_probe_is_chosen_on_validation_alone():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 12))
    labels = {part: rng.choice([0, 1, 3], n) for part, n in (("train", 40), ("val", 40), ("test", 30))}
    points = {part: (centres[y] + 1.5 * rng.normal(size=(len(y), 12))).astype(np.float32) for part, y in labels.items()}
    own = {part: Labelled(torch.from_numpy(points[part]), torch.from_numpy(labels[part])) for part in labels}

    found = linear_probe(own["train"], own["test"].features, 4)
    assert found is not None and found.cost == 1.0
    expected = probe_by_hand(points["train"], labels["train"], points["test"], 1.0)[2]
    np.testing.assert_allclose(found.logits[:, [0, 1, 3]].numpy(), expected, rtol=1e-3, atol=1e-3)
    assert (found.logits[:, 2] < -80).all()  # no training clip is of that class

    scores = {}
    for cost in (0.01, 0.1, 1.0, 10.0):
        model, scaler, _ = probe_by_hand(points["train"], labels["train"], points["test"], cost)
        scores[cost] = model.score(scaler.transform(points["val"]), labels["val"])
    assert len(set(scores.values())) > 1
    best = min(cost for cost in scores if scores[cost] == max(scores.values()))
    chosen = linear_probe(own["train"], own["test"].features, 4, own["val"])
    assert chosen is not None and chosen.cost == best
    one = Labelled(own["train"].features, torch.ones(40, dtype=torch.long))
    assert linear_probe(one, own["test"].features, 4) is None


# --------------------------------------------------------------------------------------- a checkpoint, as a user does


def test_predictions_in_six_lines(predicted):
    """As in docs/evaluation.md, and every number of the JSON file again from the arrays."""
    out, found, numbers = predicted
    labels, logits = found["test_labels"], found["test_logits_joint"]
    right = logits.argmax(axis=1) == labels
    assert out[2].split()[1] == f"{right.mean():.4f}"
    classes = found["classes"].tolist()
    assert classes == ["a", "b", "c"] and numbers["data"]["classes"] == classes
    check_numbers(numbers["heads"]["multimodal"]["head"], logits, labels, classes)
    for name in BOTH:
        own = numbers["heads"][name]
        for source, key in (("head", "logits"), ("slice", "slice"), ("masked", "masked")):
            check_numbers(own[source], found[f"test_{key}_{name}"], labels, classes)
        assert own["probe"]["C"] in (0.01, 0.1, 1.0, 10.0)  # there is a validation part
        model, scaler, _ = probe_by_hand(found[f"train_features_{name}"].astype(np.float64), found["train_labels"],
                                         found[f"test_features_{name}"], own["probe"]["C"])  # fmt: skip
        expected = model.score(scaler.transform(found[f"test_features_{name}"]), labels)
        assert own["probe"]["accuracy"] == pytest.approx(expected)
        shown = [f"{source} {own[source]['accuracy']:.4f}" for source in ("head", "slice", "masked", "probe")]
        (line,) = [line for line in out if line.startswith(f"{name}: ")]
        assert line == f"{name}: {', '.join(shown)} (C = {own['probe']['C']:g})"
    assert set(numbers["sources"]) == {"head", "slice", "masked", "probe"} and numbers["epoch"] == 1


def test_predictions_are_of_the_parts_the_network_was_trained_with(predicted, trained, data):
    """The validation part is held out again; logits and features by a pass of our own, clip by clip."""
    _, found, _ = predicted
    config = json.loads((trained.parent / "config.json").read_text())
    for part in ("train", "val", "test"):
        assert len(found[f"{part}_clips"]) == len(found[f"{part}_labels"]) == config["data"]["clips"][part]
        assert found[f"{part}_features_video"].shape == (config["data"]["clips"][part], 128)
    assert not set(found["val_clips"]) & set(found["train_clips"])
    labels = dict(line.split(",") for line in (data / "train.csv").read_text().split())
    for part in ("train", "val"):
        classes = found["classes"][found[f"{part}_labels"]]
        assert [labels[clip] for clip in found[f"{part}_clips"]] == classes.tolist()

    args = train.parse_args(["--checkpoint", str(trained), "--device", "cpu"])
    built = train.build_data(args, torch.device("cpu"), only=("test",))
    model = train.make_model(args, built, torch.device("cpu")).eval()
    clips = built.clips["test"]
    assert found["test_clips"].tolist() == clips.names
    for batch in clips.epoch([train.remix.Batch(torch.tensor([i]), BOTH) for i in (0, 7, 14)]):
        with torch.no_grad():
            output, i = model(batch.inputs, BOTH), batch.clips.item()
        for name, values in output.heads.items():
            np.testing.assert_allclose(found[f"test_logits_{name}"][i], values[0].numpy(), rtol=1e-3, atol=1e-4)
        for name, values in output.features.items():
            np.testing.assert_allclose(found[f"test_features_{name}"][i], values[0].numpy(), rtol=1e-3, atol=1e-4)


def test_a_file_of_predictions_is_never_replaced(predicted, trained, runs):
    with pytest.raises(UserError, match=r"--predictions .*out.npz: already exists; delete it, or choose another"):
        train.main(["--checkpoint", str(trained), "--predictions", str(runs / "out.npz")])


def test_heads_that_were_not_trained_are_left_out(data, runs, tmp_path, capsys):
    folder = run(data, runs, "video head", "--method", "baseline", "--epochs", "1", "--alpha", "0")
    capsys.readouterr()
    words = ["--checkpoint", str(folder / "best.pth"), "--device", "cpu"]
    train.main([*words, "--predictions", str(tmp_path / "x.npz")])
    found, numbers = np.load(tmp_path / "x.npz"), json.loads((folder / "best.evaluation.json").read_text())
    assert "test_logits_audio" not in found and {"test_logits_video", "test_slice_audio"} <= set(found)
    assert numbers["heads"]["audio"]["head"] is None and numbers["heads"]["video"]["head"] is not None
    shown = capsys.readouterr().out
    assert "\naudio: slice " in shown and "\nvideo: head " in shown and "(C = 1)" in shown  # no validation part
    assert "val_labels" not in found


def test_a_network_of_one_modality_and_one_without_slices(data, runs, capsys):
    folder = run(data, runs, "alone", "--method", "video", "--epochs", "1")
    film = run(data, runs, "film", "--fusion_method", "film", "--unimodal", "masked", "--epochs", "1", "--warmup", "0")
    for path, names in ((folder, ["video"]), (film, ["audio", "video"])):
        train.main(["--checkpoint", str(path / "best.pth"), "--device", "cpu"])
        heads = json.loads((path / "best.evaluation.json").read_text())["heads"]
        assert list(heads) == ["multimodal", *names]
    assert heads["audio"]["head"] is heads["audio"]["slice"] is heads["audio"]["probe"] is None
    line = json.loads((film / "metrics.jsonl").read_text().splitlines()[-1])
    assert heads["audio"]["masked"]["accuracy"] == pytest.approx(line["test_acc_audio"])
    assert "test_slice_audio" not in line


def test_the_numbers_of_an_epoch_have_the_slices(predicted, trained):
    line = json.loads((trained.parent / "metrics.jsonl").read_text().splitlines()[-1])
    for part in ("test", "val"):
        for name in BOTH:
            rows = predicted[1][f"{part}_slice_{name}"]
            assert line[f"{part}_slice_{name}"] == pytest.approx(
                (rows.argmax(1) == predicted[1][f"{part}_labels"]).mean()
            )


def test_only_files_of_an_evaluation_are_replaced(trained, tmp_path, capsys):
    assert beside(tmp_path / "best.pth") == tmp_path / "best.evaluation.json"
    path = tmp_path / "x.json"
    save_numbers(path, {"kind": "evaluation of a checkpoint", "n": 1})
    save_numbers(path, {"kind": "evaluation of a checkpoint", "n": 2})
    assert json.loads(path.read_text())["n"] == 2 and f"{path}: all numbers" in capsys.readouterr().out
    for foreign in ("[]", '{"n": 3}', "no JSON"):
        path.write_text(foreign)
        save_numbers(path, {"kind": "evaluation of a checkpoint"})
        assert path.read_text() == foreign and "left alone" in capsys.readouterr().out
    missing = tmp_path / "file" / "x.json"
    (tmp_path / "file").write_text("")
    save_numbers(missing, {"kind": "evaluation of a checkpoint"})  # no folder to write to: a note, not an error
    assert capsys.readouterr().out.startswith(f"note: {missing}: cannot be written")


@pytest.mark.parametrize(("flags", "said"), [
    (["--train", "--predictions", "x.npz"], "--predictions: needs a trained network"),
    (["--train", "--clip", "x.mp4"], "--clip: needs a trained network"),
    (["--checkpoint", "CHECKPOINT", "--predictions", "x.npz", "--clip", "x.mp4"], "choose one"),
    (["--checkpoint", "CHECKPOINT", "--predictions", "x.csv"], "ends in .npz"),
    (["--predictions", "x.npz"], "nothing to do: .*--checkpoint"),
])  # fmt: skip
def test_flags_that_do_not_go_together(flags, said, trained):
    words = [str(trained) if word == "CHECKPOINT" else word for word in flags]
    with pytest.raises(UserError, match=said):
        train.parse_args([*TINY, *words] if "--train" in words else words)
