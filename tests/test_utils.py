"""Checkpoints (the official code's too), files that appear whole, generators, metrics."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import REPO
from sklearn.metrics import confusion_matrix, f1_score

import train
from dataset.specs import get_spec
from models import build_model
from models.checkpoint import load_weights, model_weights
from utils.background import HostCopy, Writer
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.files import atomic_path
from utils.metrics import accuracy, confusion, f1_macro
from utils.seeding import epoch_generator, rng_state, seed_everything, set_rng_state


def network(classes, model="resnet18", fusion_method="concat"):
    return build_model(get_spec("CREMAD").modalities, {"audio": (257, 188)}, classes, model, fusion_method)


@pytest.fixture
def official(tmp_path):
    """A checkpoint as the official code saves it: DataParallel's prefix, optimizer and scheduler beside the weights."""
    torch.manual_seed(1)
    model = network(6)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30, 0.1)
    # tests/test_reference.py holds these names to the official code's.
    weights = {f"module.{name}": value for name, value in model_weights(model).items()}
    assert {"module.audio_net.conv1.weight", "module.visual_net.bn1.bias", "module.head_audio.weight"} < set(weights)
    state = {"saved_epoch": 17, "acc": 0.61, "model": weights, "optimizer": optimizer.state_dict()}
    path = tmp_path / "Concat_with_Remix.pth"
    torch.save(state | {"scheduler": scheduler.state_dict()}, path)
    return path, model


def test_official_checkpoints_load(official):
    path, saved = official
    model = network(6)
    load_weights(model, load_checkpoint(path)["model"], path)
    for name, value in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize(("other", "complaint"), [
    ((31,), "6 of another shape.*head.weight is .6, 1024., expected .31, 1024."),
    ((6, "resnet18", "sum"), "4 missing .head.fc_x.weight.*2 unknown .head.weight, head.bias"),
    ((6, "resnet18_thin"), "of another shape.*audio_net.conv1.weight"),
])  # fmt: skip
def test_what_does_not_fit_is_named(official, other, complaint):
    path, _ = official
    with pytest.raises(UserError, match=complaint) as caught:
        load_weights(network(*other), load_checkpoint(path)["model"], path)
    assert "--fusion_method" in str(caught.value) and "\n" not in str(caught.value)


def test_checkpoints_that_run_code_are_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    for name, content in (("a.pth", pickle.dumps({"model": Trap()})), ("b.pth", b"PK not a zip"), ("c.pth", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            load_checkpoint(tmp_path / name)
    torch.save({"model": Trap()}, tmp_path / "d.pth")
    with pytest.raises(UserError, match="not a checkpoint that is safe to read"):
        load_checkpoint(tmp_path / "d.pth")
    assert not (tmp_path / "trapped").exists()
    torch.save({"weights": {}}, tmp_path / "e.pth")
    with pytest.raises(UserError, match="no `model` entry"):
        load_checkpoint(tmp_path / "e.pth")


def test_a_failed_write_leaves_the_previous_file(tmp_path):
    path = tmp_path / "last.pth"
    save_checkpoint(path, {"model": {}, "epoch": 1})
    with pytest.raises(RuntimeError, match="disk"), atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("disk")
    assert load_checkpoint(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]


def test_generators_depend_on_seed_epoch_and_purpose_alone():
    def draw(*key):
        return torch.rand(3, generator=epoch_generator(*key)).tolist()

    assert draw(1, 2, "plan") == draw(1, 2, "plan")
    keys = [(1, 2, "plan"), (2, 1, "plan"), (1, 3, "plan"), (1, 2, "views"), (0, 0, "plan"), (0, 0, "score")]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


def test_rng_state_survives_a_checkpoint(tmp_path):
    seed_everything(3)
    np.random.normal()  # leaves a cached second value
    save_checkpoint(tmp_path / "x.pth", {"model": {}, "rng": rng_state()})

    def draw():
        import random

        return random.random(), np.random.normal(), np.random.rand(), torch.rand(1).item()

    expected = draw()
    draw()
    set_rng_state(load_checkpoint(tmp_path / "x.pth")["rng"])
    assert draw() == expected


def test_metrics_against_plain_counting():
    rng = np.random.default_rng(0)
    logits, labels = torch.from_numpy(rng.normal(size=(200, 5))), torch.from_numpy(rng.integers(0, 4, 200))
    predicted = logits.numpy().argmax(1)
    assert accuracy(logits, labels) == pytest.approx(np.mean(predicted == labels.numpy()))
    counts = confusion(logits, labels)
    assert counts.shape == (5, 5) and counts[4].sum() == 0 and counts.sum() == 200
    scores = []
    for k in range(5):
        hit = ((predicted == k) & (labels.numpy() == k)).sum()
        wrong = (predicted == k).sum() + (labels.numpy() == k).sum()
        scores.append(2 * hit / wrong if wrong else 0.0)
    assert f1_macro(logits, labels) == pytest.approx(np.mean(scores))
    assert f1_macro(logits, labels) < f1_score(labels.numpy(), predicted, labels=range(4), average="macro")


def test_presets():
    fair = train.parse_args(["--train", "--dataset", "CREMAD"])
    assert (
        fair.learning_rate == train.parse_args(["--train", "--dataset", "CREMAD", "--method", "baseline"]).learning_rate
    )
    official = [train.parse_args(["--train", "--preset", "official", "--method", m]) for m in ("remix", "baseline")]
    assert [args.learning_rate for args in official] == [5e-5, 1e-3]
    assert all(args.masked_encoder == "run" and args.reassemble == "sequential" for args in official)
    assert all(args.batchnorm == "running" and args.precision == "official" for args in official)
    mine = train.parse_args(["--train", "--preset", "official", "--masked_encoder", "skip", "--learning_rate", "0.01"])
    assert (mine.masked_encoder, mine.learning_rate) == ("skip", 0.01)
    assert "masked_encoder" not in mine.from_preset and mine.from_preset["score"] == "kl"


def test_a_host_copy_is_taken_into_the_same_memory_and_does_not_change_with_the_original():
    network, host = torch.nn.BatchNorm2d(2).to(memory_format=torch.channels_last), HostCopy()
    images = torch.zeros(1, 2, 3, 3).to(memory_format=torch.channels_last)
    state = {"model": network.state_dict(), "list": [1, torch.ones(2), {"a": images}], "best": {"epoch": 1}}
    for value in (1.0, 2.0):
        images.fill_(value)
        first, arrived = host.take(state)
        arrived()
        places = [first["list"][2]["a"].data_ptr(), first["model"]["weight"].data_ptr()]
        images.fill_(9)
        network.weight.data.fill_(9)
        state["best"]["epoch"] += 1
        assert first["list"][2]["a"].eq(value).all() and first["model"]["weight"].eq(1).all()
        assert first["list"][2]["a"].stride() == images.stride() and first["list"][0] == 1
        assert type(first["model"]) is type(state["model"]) and first["model"]._metadata == state["model"]._metadata
        assert first["best"]["epoch"] == state["best"]["epoch"] - 1
        network.weight.data.fill_(1)
        kept = getattr(host, "kept", places)
        assert kept == places
        host.kept = places
    state["list"][1] = torch.ones(3)
    assert host.take(state)[0]["list"][1].shape == (3,) and len(host.buffers) == 7


def test_what_fails_in_the_thread_is_raised_once_by_who_waits_for_it():
    writer, done = Writer(), []
    writer.start(lambda: done.append(1))
    writer.start(lambda: done.append(1 / len(done) / 0))
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    writer.check()
    writer.wait()
    assert done == [1] and writer.seconds is not None
    writer.start(lambda: [].pop())
    with pytest.raises(IndexError):
        writer.start(lambda: done.append(2))
    assert done == [1]


def test_f1_and_confusion_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    for clips, classes in ((1, 2), (50, 3), (200, 31), (300, 309)):  # some classes never appear, or are never predicted
        logits = torch.randn(clips, classes, generator=generator)
        labels = torch.randint(0, classes - 1, (clips,), generator=generator)
        truth, predicted = labels.numpy(), logits.argmax(1).numpy()
        assert (confusion(logits, labels) == confusion_matrix(truth, predicted, labels=range(classes))).all()
        expected = f1_score(truth, predicted, labels=range(classes), average="macro", zero_division=0)
        assert f1_macro(logits, labels) == expected


LEAN = """
import sys, torch, train
from dataset.prepare.demo import ensure_demo
from utils.metrics import confusion, f1_macro
f1_macro(torch.eye(3), torch.arange(3)), confusion(torch.eye(3), torch.arange(3))
heavy = ("torch._dynamo", "sklearn", "scipy", "matplotlib", "torchvision", "pandas", "tensorboard", "sympy")
print([name for name in heavy if name in sys.modules])
"""


def test_import_of_train_is_lean():
    """Nothing of what takes seconds to import and is not used by every command."""
    done = subprocess.run([sys.executable, "-c", LEAN], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
