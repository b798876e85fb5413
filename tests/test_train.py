"""Whole runs through the command line on tiny data: every file of the run folder, every phase, resume, evaluation."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import rank_gradients
import torch
from helpers import REPO, TINY, in_two_processes, make_folder, numbers_of, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import remix
import train
from dataset.build import load_parts
from dataset.clips import Feed, make_clips
from dataset.folder import load_folder
from dataset.prepare.lists import actor_split
from dataset.specs import SPECS, audio, get_spec, video
from models import build_model
from models.batchnorm import reestimate
from models.checkpoint import model_weights
from utils import distributed
from utils.errors import UserError
from utils.partitions import Partitions
from utils.seeding import epoch_generator
from utils.threads import SPINS


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def remix_run(data, runs):
    """Remix as a user starts it: a process of its own."""
    command = [sys.executable, "train.py", *TINY, "--train", "--data_root", str(data), "--log_path", str(runs)]
    command += ["--run_name", "remix", "--epochs", "4", "--warmup", "2", "--val_fraction", "0.2"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return runs / "remix", done.stdout


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def network(seed=0):
    """The network of `TINY` runs with the weights that `seed` draws."""
    torch.manual_seed(seed)
    return build_model(get_spec("folder").modalities, {"audio": (33, 20)}, 3, "resnet18_thin")


def clips_of(data, part="train"):
    """A part of the folder as a run with the flags of `TINY` has it."""
    folder = load_folder(data, get_spec("folder"))
    feed = Feed(folder.spec.modalities, image_size=32, device=torch.device("cpu"), cache="ram")
    return make_clips(folder.root, part, folder.parts[part], folder.shapes, feed)


def test_remix_run_folder(remix_run):
    folder, _ = remix_run
    lines = metrics(folder)
    assert [(line["epoch"], line["phase"]) for line in lines] == [
        (0, "joint"),
        (1, "joint"),
        (2, "remix"),
        (3, "remix"),
    ]
    clips = json.loads((folder / "config.json").read_text())["data"]["clips"]
    assert clips["train"] + clips["val"] == 34 and clips["test"] == 15 and clips["val"] >= 3
    for line in lines:
        for key in ("lr", "train_loss", "train_ce_joint", "train_acc_joint", "test_loss", "val_loss", "test_acc",
                    "test_acc_audio", "test_acc_video", "val_acc", "val_acc_audio",
                    "val_acc_video", "seconds_score", "seconds_train", "seconds_eval", "seconds_save",
                    "clips_per_second"):  # fmt: skip
            assert isinstance(line[key], float), key
        assert 0 <= line["test_acc"] <= 1 and (line["test_acc"] * 15) == pytest.approx(round(line["test_acc"] * 15))
        if line["phase"] == "remix":
            assert line["n_audio"] + line["n_video"] == clips["train"]
            for name in ("audio", "video"):
                assert all((line[f"train_{key}_{name}"] is None) == (line[f"n_{name}"] == 0) for key in ("ce", "acc"))
        else:
            assert line["n_audio"] is None and line["n_video"] is None

    summary = json.loads((folder / "summary.json").read_text())
    best = max(range(4), key=lambda i: lines[i]["test_acc"])
    assert summary["best_test_acc"] == lines[best]["test_acc"] and summary["best_test_epoch"] == best
    assert summary["last_test_acc"] == lines[-1]["test_acc"]
    assert summary["test_acc_audio"] == lines[-1]["test_acc_audio"]
    chosen = max(range(4), key=lambda i: lines[i]["val_acc"])
    assert summary["test_acc_at_best_val"] == lines[chosen]["test_acc"]
    assert (summary["method"], summary["dataset"], summary["seed"], summary["epochs"]) == ("remix", "folder", 42, 4)
    assert 0 <= summary["f1_macro"] <= 1 and summary["total_seconds"] > 0

    with open(folder / "partition.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["clip", "label", "kl_audio", "kl_video", "kept"]
    assert len({row["clip"] for row in rows}) == clips["train"]
    for row in rows:
        a, v = float(row["kl_audio"]), float(row["kl_video"])
        assert 0 <= a <= 1.6 and 0 <= v <= 1.6  # log2(3) bits at most
        if abs(a - v) > 1e-5:
            assert row["kept"] == ("audio" if a < v else "video")
    assert sum(row["kept"] == "audio" for row in rows) == lines[-1]["n_audio"]
    for picture in ("curves.png", "confusion.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_config_names_every_flag_and_what_it_ran_on(remix_run):
    config = json.loads((remix_run[0] / "config.json").read_text())
    for name in train.make_parser().names:
        assert name in config
    assert config["epochs"] == 4 and config["learning_rate"] == 1e-3 and config["masked_encoder"] == "skip"
    assert config["balance"] == "none" and config["balance_options"] == {} and config["resume"] is None
    assert config["data"]["modalities"] == ["audio", "video"] and config["data"]["classes"] == ["a", "b", "c"]
    assert config["from_preset"]["alpha"] == 0.5 and "epochs" not in config["from_preset"]
    assert config["versions"]["torch"] == torch.__version__.split("+")[0]
    assert config["hardware"]["device"] == "cpu"


def test_tensorboard_tags(remix_run):
    events = EventAccumulator(str(remix_run[0]), size_guidance={"histograms": 0}).Reload()
    tags = events.Tags()
    for tag in ("loss/train", "accuracy/multimodal", "accuracy/audio", "accuracy/video", "remix/n_audio",
                "remix/n_video", "lr", "speed/clips_per_second",
                "loss/ce_joint", "loss/ce_audio", "train_accuracy/video"):  # fmt: skip
        assert tag in tags["scalars"], tag
    assert {"remix/kl_audio", "remix/kl_video"} <= set(tags["histograms"])
    assert "confusion" in tags["images"]
    lines = metrics(remix_run[0])
    assert [round(e.value, 5) for e in events.Scalars("accuracy/multimodal")] == [
        round(x["test_acc"], 5) for x in lines
    ]
    assert [e.step for e in events.Scalars("remix/n_audio")] == [2, 3]
    (layout,) = events.Tensors("custom_scalars__config__")
    charts = Layout.FromString(layout.tensor_proto.string_val[0]).category[0].chart
    assert {chart.title: list(chart.multiline.tag) for chart in charts} == {
        "test accuracy": ["accuracy/multimodal", "accuracy/audio", "accuracy/video"],
        "training accuracy": ["train_accuracy/joint", "train_accuracy/audio", "train_accuracy/video"],
        "training cross entropy": ["loss/ce_joint", "loss/ce_audio", "loss/ce_video"],
    }
    assert {tag for chart in charts for tag in chart.multiline.tag} <= set(tags["scalars"])
    board = {tag: HParamsPluginData.FromString(text) for tag, text in events.PluginTagToContent("hparams").items()}
    flags = board["_hparams_/session_start_info"].session_start_info.hparams
    assert flags["method"].string_value == "remix" and flags["epochs"].number_value == 4
    assert "cache" not in flags and "run_name" not in flags  # how it was run is no setting
    metrics_shown = [info.name.tag for info in board["_hparams_/experiment"].experiment.metric_infos]
    assert metrics_shown == ["accuracy/multimodal", "accuracy/audio", "accuracy/video"]
    assert "_hparams_/session_end_info" in board


def test_checkpoints_load_safely_and_evaluate_to_the_same_numbers(remix_run, data, capsys):
    folder, _ = remix_run
    last, best = (torch.load(folder / name, weights_only=True) for name in ("last.pth", "best.pth"))
    assert {"model", "optimizer", "scheduler", "epoch", "rng", "config", "classes", "format"} <= set(last)
    assert set(best) == {"model", "epoch", "config", "classes", "input"}  # weights to use, nothing to train on with
    assert (folder / "best.pth").stat().st_size < 0.5 * (folder / "last.pth").stat().st_size
    train.main([*TINY, "--data_root", str(data), "--checkpoint", str(folder / "last.pth")])
    shown = capsys.readouterr().out.splitlines()[2].split()[1:]
    last = metrics(folder)[-1]
    expected = [last[key] for key in ("test_acc", "test_acc_audio", "test_acc_video", "test_f1_macro")]
    assert [float(cell) for cell in shown] == pytest.approx(expected, abs=5e-5)


def test_the_result_table_is_printed(remix_run):
    folder, out = remix_run
    summary = json.loads((folder / "summary.json").read_text())
    (last,) = [line for line in out.splitlines() if line.startswith("last epoch")]
    assert float(last.split()[2]) == pytest.approx(summary["last_test_acc"], abs=5e-5)
    assert any(line.startswith("best on test") for line in out.splitlines())
    assert any(line.startswith("best on validation") for line in out.splitlines())


def test_baseline_is_the_warm_up_that_never_ends(data, runs):
    baseline = run(data, runs, "baseline", "--method", "baseline", "--epochs", "2")
    remixed = run(data, runs, "late", "--method", "remix", "--epochs", "3", "--warmup", "2")
    assert not (baseline / "partition.csv").exists() and (remixed / "partition.csv").exists()
    for a, b in zip(metrics(baseline), metrics(remixed), strict=False):
        assert (a["phase"], a["train_loss"], a["test_acc"]) == (b["phase"], b["train_loss"], b["test_acc"])


def np_cross_entropy(logits, labels):
    """(N,) from logits (N, C)."""
    top = logits.max(1)
    return top + np.log(np.exp(logits - top[:, None]).sum(1)) - logits[np.arange(len(labels)), labels]


@pytest.mark.parametrize("sizes", [(8,), (8, 5)])
def test_training_numbers_are_plain_means_over_the_clips_that_a_head_was_fed(data, sizes):
    """Unweighted, whatever the weights of the losses; of one batch, and of batches of different size."""
    flags = ("--alpha", "0.3", "--beta", "2", "--gamma1", "0.7", "--gamma2", "3")
    args = train.parse_args([*TINY, "--train", "--optimizer", "sgd", "--learning_rate", "0.01", *flags])
    clips = clips_of(data)
    part = torch.randperm(34, generator=torch.Generator().manual_seed(3))[: sum(sizes)].split(sizes)
    weights = {("audio", "video"): {"joint": 1, "audio": 0.3, "video": 2}, ("audio",): {"joint": 1, "audio": 3}}
    for fed, own in weights.items():
        model, seen = network(), []
        model.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(output))
        plan = [remix.Batch(indices, fed) for indices in part]
        found = train.train_epoch(model, clips, plan, train.make_optimizer(model, args), 0, args)
        labels = clips.labels[torch.cat(part)].numpy()
        heads = {"joint": [output.joint for output in seen]} | {n: [o.logits[n] for o in seen] for n in fed}
        logits = {head: torch.cat(rows).detach().double().numpy() for head, rows in heads.items()}
        entropies = {head: np_cross_entropy(rows, labels).mean() for head, rows in logits.items()}
        expected = {f"train_ce_{head}": value for head, value in entropies.items()}
        expected |= {f"train_acc_{head}": (rows.argmax(1) == labels).mean() for head, rows in logits.items()}
        # Each batch counts by its clips in the loss too, which is the weighted one.
        expected["train_loss"] = sum(own[head] * value for head, value in entropies.items())
        if "video" not in fed:
            expected |= {"train_ce_video": None, "train_acc_video": None}
        assert found == {name: value if value is None else pytest.approx(value, rel=1e-5)
                         for name, value in expected.items()}  # fmt: skip


def test_heads_that_no_loss_reaches_have_no_numbers(data, runs, capsys, drawn):
    """They stay as they were drawn: an accuracy of theirs would be of chance."""
    folder = run(data, runs, "headless", "--method", "baseline", "--epochs", "1", "--alpha", "0", "--beta", "0")
    out = capsys.readouterr().out.splitlines()
    (line,) = metrics(folder)
    for name in ("audio", "video"):
        assert [line[f"{key}_{name}"] for key in ("train_ce", "train_acc", "test_acc")] == [None] * 3
    assert isinstance(line["train_ce_joint"], float) and isinstance(line["test_acc"], float)
    assert json.loads((folder / "summary.json").read_text())["test_acc_audio"] is None
    (row,) = [line for line in out if line.startswith("last epoch")]
    assert row.split()[3:5] == ["–", "–"]
    (row,) = [line for line in out if line.startswith("epoch   1/1")]
    assert row.count("audio –") == row.count("video –") == row.count("/–/–") == 1
    train.main(["--checkpoint", str(folder / "best.pth"), "--device", "cpu"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[2].split()[2:4] == ["–", "–"]
    for name, line_shown in zip(("audio", "video"), shown[4:6], strict=True):  # the slices stand for them, by name
        assert line_shown.startswith(f"{name}: slice {line[f'test_slice_{name}']:.4f}, masked ")
    (slices,) = [line for line in out if line.startswith("slices of the joint head, last epoch: ")]
    assert slices.endswith(f"audio {line['test_slice_audio']:.4f}, video {line['test_slice_video']:.4f}")
    # One of two: its neighbour has numbers.
    (line,) = metrics(run(data, runs, "one headed", "--method", "baseline", "--epochs", "1", "--alpha", "0"))
    assert line["test_acc_audio"] is line["train_acc_audio"] is line["train_ce_audio"] is None
    assert all(isinstance(line[f"{key}_video"], float) for key in ("test_acc", "train_acc", "train_ce"))


@pytest.mark.parametrize("method", ["audio", "video"])
def test_one_modality_alone(data, runs, method, drawn):
    folder = run(data, runs, method, "--method", method, "--epochs", "2")
    other = "video" if method == "audio" else "audio"
    for line in metrics(folder):
        assert line["phase"] == "joint" and line[f"test_acc_{other}"] is None
        assert 0 <= line[f"test_acc_{method}"] <= 1
    weights = torch.load(folder / "last.pth", weights_only=True)["model"]
    fresh = model_weights(network(42))
    net = {"audio": "audio_net", "video": "visual_net"}
    assert all(torch.equal(weights[k], fresh[k]) for k in fresh if k.startswith(net[other]))
    assert not all(torch.equal(weights[k], fresh[k]) for k in fresh if k.startswith(net[method]))


def test_the_same_command_gives_the_same_run(data, runs):
    flags = ("--epochs", "3", "--warmup", "1")
    first, second = run(data, runs, "once", *flags), run(data, runs, "twice", *flags)
    a, b = (torch.load(folder / "last.pth", weights_only=True)["model"] for folder in (first, second))
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = torch.load(run(data, runs, "thrice", *flags, "--random_seed", "1") / "last.pth", weights_only=True)["model"]
    assert not torch.equal(a["head.weight"], other["head.weight"])


@pytest.mark.parametrize("stop", [1, 2])  # in the warm-up, in Remix
def test_resume_is_bit_identical(data, runs, stop):
    flags = ("--warmup", "2", "--rescore_every", "2")
    whole = run(data, runs, f"whole{stop}", *flags, "--epochs", "5")
    part = run(data, runs, f"part{stop}", *flags, "--epochs", str(stop + 1))
    run(data, runs, f"part{stop}", *flags, "--epochs", "5", "--resume")
    a, b = (torch.load(folder / "last.pth", weights_only=True) for folder in (whole, part))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    for key in a["optimizer"]["state"]:
        for name, value in a["optimizer"]["state"][key].items():
            assert torch.equal(value, b["optimizer"]["state"][key][name])
    assert numbers_of(whole) == numbers_of(part)
    first, second = (np.load(folder / "partitions.npz") for folder in (whole, part))
    assert first["epochs"].tolist() == [2, 4] and set(first) == set(second)
    assert all((first[name] == second[name]).all() for name in first)


def test_every_partition_is_kept(data, runs):
    """The last one as in partition.csv, which has it in decimals; a run resumed in between drops what it repeats."""
    flags = ("--warmup", "1", "--epochs", "3")
    folder = run(data, runs, "partitions", *flags)
    with np.load(folder / "partitions.npz") as found:
        assert found["epochs"].tolist() == [1, 2] and found["modalities"].tolist() == ["audio", "video"]
        assert found["kl"].shape == found["keep"].shape == (2, 34, 2) and found["kl"].dtype == np.float32
        assert [row.sum() for row in found["keep"]] == [34, 34]  # each clip keeps one
        counts = [[line["n_audio"], line["n_video"]] for line in metrics(folder)[1:]]
        assert found["keep"].sum(axis=1).tolist() == counts
        kl, keep = found["kl"], found["keep"]
        with open(folder / "partition.csv") as file:
            rows = list(csv.DictReader(file))
        assert found["clips"].tolist() == [row["clip"] for row in rows]
    names = [["audio", "video"][k] for k in kl[1].argmin(axis=1)]
    assert [row["kept"] for row in rows] == [["audio", "video"][k] for k in keep[1].argmax(axis=1)] == names
    written = [[float(row["kl_audio"]), float(row["kl_video"])] for row in rows]
    np.testing.assert_allclose(kl[1], written, atol=1e-6)

    partitions = Partitions(folder / "partitions.npz")
    partitions.load(2)
    assert partitions.epochs == [1] and (partitions.keep[0] == keep[0]).all()
    for spoiled in (b"", b"no archive"):
        (folder / "partitions.npz").write_bytes(spoiled)
        partitions.load(2)
        assert partitions.epochs == []
    partitions.add(5, ["x"], ["audio", "video"], np.zeros((1, 2)), np.ones((1, 2), dtype=bool))
    assert np.load(folder / "partitions.npz")["epochs"].tolist() == [5]


def test_a_checkpoint_is_evaluated_as_it_was_trained(data, tmp_path, capsys):
    """By its name alone; what would make another network or input of it is refused."""
    flags = ("--epochs", "2", "--warmup", "1", "--fusion_method", "sum", "--image_size", "40", "--pack_size", "36")
    for method in ("remix", "video"):
        folder = run(data, tmp_path, method, *flags, "--method", method)
        capsys.readouterr()
        train.main(["--checkpoint", str(folder / "last.pth"), "--device", "cpu"])
        out = capsys.readouterr().out.splitlines()
        assert out[0] == f"folder, {data}: 15 test clips"
        last = metrics(folder)[-1]
        expected = [last[key] for key in ("test_acc", "test_acc_audio", "test_acc_video", "test_f1_macro")]
        shown = [None if cell == "–" else float(cell) for cell in out[2].split()[1:]]
        assert shown == [None if value is None else pytest.approx(value, abs=5e-5) for value in expected]
        for name, value in (
            ("method", "audio"),
            ("image_size", "32"),
            ("fusion_method", "film"),
            ("encoder", "resnet18"),
        ):
            with pytest.raises(UserError, match=rf"--{name} {value}: .*trained with --{name} .*; leave the flag out"):
                train.main(["--checkpoint", str(folder / "last.pth"), f"--{name}", value])
    other = make_folder(tmp_path / "other", classes=("x", "y", "z"))
    with pytest.raises(UserError, match=r"classes \(x, y, z\) differ from those of .*last.pth \(a, b, c\)"):
        train.main(["--checkpoint", str(folder / "last.pth"), "--data_root", str(other)])


@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]])
def test_a_run_starts_from_the_weights_of_a_checkpoint(data, remix_run, tmp_path, monkeypatch, resume):
    """Also where `--resume auto` finds nothing to resume; a run that is resumed needs that file no more."""
    first, make = remix_run[0] / "best.pth", train.make_model
    start, seen = tmp_path / "start.pth", []
    start.write_bytes(first.read_bytes())

    def made(*args):
        seen.append(make(*args))
        seen.append({name: value.clone() for name, value in model_weights(seen[0]).items()})
        return seen[0]

    monkeypatch.setattr(train, "make_model", made)
    flags = ("--checkpoint", str(start), "--epochs", "1", "--method", "baseline")
    folder = run(data, tmp_path, "tuned", *flags, *resume)
    expected = torch.load(first, weights_only=True)["model"]
    assert all(torch.equal(seen[1][name], value) for name, value in expected.items())
    start.unlink()
    train.main(["--resume", str(folder), "--epochs", "2"])
    assert len(metrics(folder)) == 2


def test_evaluation_reads_the_weights_once(data, remix_run, monkeypatch):
    """What the flags are taken from is read without them."""
    reads, load = [], torch.load
    monkeypatch.setattr(
        torch, "load", lambda *args, **more: reads.append(more.get("mmap", False)) or load(*args, **more)
    )
    train.main(["--checkpoint", str(remix_run[0] / "best.pth"), "--device", "cpu"])
    assert sorted(reads) == [False, True]


def test_evaluation_counts_the_test_clips_that_are_left_out(data, remix_run, tmp_path, capsys):
    """And does not mind training clips, which it does not use."""
    other = make_folder(tmp_path / "data", train=6, test=9)
    (other / "audio" / "train_0003.npy").unlink()
    words = ["--checkpoint", str(remix_run[0] / "last.pth"), "--data_root", str(other)]
    train.main([*words, "--val_fraction", "0.1"])
    assert capsys.readouterr().out.splitlines()[0] == f"folder, {other}: 9 test clips"
    (other / "audio" / "test_0003.npy").unlink()
    with pytest.raises(UserError, match=r"1 problem.*test_0003.*--allow_missing"):
        train.main(words)
    train.main([*words, "--allow_missing"])
    assert (
        capsys.readouterr().out.splitlines()[0] == f"folder, {other}: 8 test clips, 1 clips with missing files left out"
    )


def test_a_run_is_not_made_shorter_by_resuming_it(data, tmp_path):
    flags = ("--method", "audio", "--epochs")
    folder = run(data, tmp_path, "r", *flags, "2")
    before = (folder / "summary.json").read_bytes()
    with pytest.raises(UserError, match=r"--epochs 1: the run has finished 2; use --epochs 2 or more"):
        run(data, tmp_path, "r", *flags, "1", "--resume")
    assert (folder / "summary.json").read_bytes() == before


def test_all_epochs_of_warm_up_is_told(data, tmp_path, capsys):
    run(data, tmp_path, "r", "--epochs", "1", "--warmup", "1")
    assert "warning: all 1 epochs are warm-up, so Remix never starts" in capsys.readouterr().out


@pytest.fixture(scope="module")
def pairs(data, runs, remix_run, tmp_path_factory):
    """What several programs said and did, each as two processes."""
    few = make_folder(tmp_path_factory.mktemp("few"), train=18, test=1)
    sound = make_folder(tmp_path_factory.mktemp("whole batches"))  # 24 clips in batches of 8, for one process and two
    out = tmp_path_factory.mktemp("pairs")
    command = ["train.py", *TINY, "--device", "cpu", "--log_path", str(runs), "--data_root"]
    commands = {
        "existing": [*command, str(data), "--train", "--run_name", "remix"],
        "small batch": [*command, str(data), "--train", "--run_name", "small", "--batch_size", "3"],
        "few": [*command, str(few), "--train", "--run_name", "few", "--epochs", "2", "--warmup", "1", "--diagnose"],
        "evaluate": [
            *command,
            str(few),
            "--checkpoint",
            str(runs / "few" / "last.pth"),
            "--predictions",
            str(out / "two.npz"),
        ],
    } | {
        f"gradients {model}": ["tests/rank_gradients.py", str(out / model), *gradient_flags(sound), "--model", model]
        for model in SYNCHRONISED
    }
    for model in SYNCHRONISED:
        (out / model).mkdir()
    return dict(zip(commands, in_two_processes(out, *commands.values()), strict=True)) | {"data": sound, "out": out}


SYNCHRONISED = ("late", "mmtm")  # the architectures that sum over processes in their own way


def gradient_flags(data) -> list[str]:
    return [*TINY, "--train", "--device", "cpu", "--data_root", str(data), "--warmup", "0", "--optimizer", "sgd",
            "--learning_rate", "0.01"]  # fmt: skip


@pytest.mark.parametrize(("case", "said"), [
    ("existing", "this run exists already"),  # rank 0's to see; the other ends without a word
    ("small batch", "--batch_size 3: BatchNorm needs 2 clips per process; use 4 or more"),
])  # fmt: skip
def test_a_mistake_on_several_processes_is_one_line(pairs, runs, case, said):
    status, _, err = pairs[case]
    assert status == [2, 2] and err.count("\n") == 1 and err.startswith("error: ") and said in err, err
    assert not (runs / "small").exists()


def test_two_processes_write_the_predictions_of_one(pairs, runs):
    """Once; of 18 training clips, and of one test clip, which both processes have."""
    status, out, err = pairs["evaluate"]
    assert status == [0, 0], err
    assert out.count(": 1 test clips\n") == out.count("last.evaluation.json: all numbers\n") == 1
    one, two = pairs["out"] / "one.npz", pairs["out"] / "two.npz"
    train.main(["--checkpoint", str(runs / "few" / "last.pth"), "--predictions", str(one), "--device", "cpu"])
    one, two = np.load(one), np.load(two)
    assert set(one) == set(two) and two["train_logits_joint"].shape == (18, 3)
    for name in one:
        if one[name].dtype.kind == "f":
            np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-5)
        else:
            assert (two[name] == one[name]).all()


@pytest.mark.parametrize("model", SYNCHRONISED)
def test_two_processes_equal_one(pairs, model):
    """Gradients and statistics of joint, homogeneous and mixed batches, step by step, and the partition after them.

    In float64, so that nothing but the order of sums differs.
    """
    statuses, _, errors = pairs[f"gradients {model}"]
    assert statuses == [0, 0], errors
    one = rank_gradients.states([*gradient_flags(pairs["data"]), "--model", model])
    assert [sum(g is None for g in step["gradients"].values()) > 0 for step in one["steps"][:3]] == [False, True, True]
    for rank in (0, 1):
        two = torch.load(pairs["out"] / model / f"rank{rank}.pth", weights_only=True)
        for i, (a, b) in enumerate(zip(one["steps"], two["steps"], strict=True)):
            reached = {name: g.nbytes for name, g in a["gradients"].items() if g is not None}
            encoders = {name.split(".")[1] for name in reached if name.startswith("encoders.")}
            if i < 5:  # one reduction for each encoder that ran and one for the rest, of nothing else
                assert len(b["sent"]) == len(encoders) + 1 and sum(b["sent"]) == sum(reached.values()), i
            for kind in ("gradients", "buffers"):
                assert a[kind].keys() == b[kind].keys()
                for name, value in a[kind].items():
                    assert (value is None) == (b[kind][name] is None), (i, name)
                    if value is not None:
                        error = (value - b[kind][name]).double().norm() / value.double().norm().clamp(min=1e-12)
                        assert error < 1e-6, (i, name, error)
        assert two["numbers"] == pytest.approx(one["numbers"], rel=1e-6)
        assert torch.equal(one["keep"], two["keep"]) and one["counts"] == two["counts"]
        assert 0 < one["counts"]["n_audio"] < 24  # a partition that tells something
        for name, bits in one["kl"].items():
            torch.testing.assert_close(bits, two["kl"][name], rtol=1e-4, atol=1e-6)


def test_an_existing_run_is_not_overwritten(data, runs, remix_run):
    before = (remix_run[0] / "summary.json").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        run(data, runs, "remix", "--epochs", "4", "--warmup", "2")
    with pytest.raises(UserError, match=r"--learning_rate 0\.001"):
        run(data, runs, "remix", "--epochs", "4", "--warmup", "2", "--val_fraction", "0.2", "--learning_rate", "0.1",
            "--resume")  # fmt: skip
    assert (remix_run[0] / "summary.json").read_bytes() == before


def test_a_lone_clip_at_the_end_does_not_break_batchnorm(tmp_path):
    data = make_folder(tmp_path / "data", train=17, test=5)  # 8 + 8 + 1
    for method in ("baseline", "remix"):
        folder = run(data, tmp_path, method, "--method", method, "--epochs", "2", "--warmup", "1")
        assert len(metrics(folder)) == 2


def test_a_missing_clip_stops_the_run_unless_allowed(tmp_path):
    data = make_folder(tmp_path / "data", train=18, test=6)
    (data / "audio" / "train_0003.npy").unlink()
    flags = ("--epochs", "1", "--method", "baseline")
    with pytest.raises(UserError, match=r"1 problem.*train_0003.*--allow_missing"):
        run(data, tmp_path, "strict", *flags)
    folder = run(data, tmp_path, "lenient", *flags, "--allow_missing")
    config = json.loads((folder / "config.json").read_text())
    assert config["data"]["missing"] == 1 and config["data"]["clips"] == {"train": 17, "test": 6}
    assert json.loads((folder / "summary.json").read_text())["missing"] == 1


def test_the_validation_part_is_the_same_for_every_seed(data):
    """So that a spread over seeds is of training alone, and every seed's numbers are of the same clips."""
    words = ["--train", "--dataset", "folder", "--data_root", str(data), "--val_fraction", "0.2", "--random_seed"]
    found = [load_parts(train.parse_args([*words, seed]))[1] for seed in ("0", "1", "42", "4294967295")]
    assert len(found[0]["val"].clips) == 6  # two of the 12, 11 and 11 clips of each class
    for parts in found[1:]:
        for name in ("train", "val", "test"):
            assert parts[name].clips == found[0][name].clips
            assert parts[name].labels.tolist() == found[0][name].labels.tolist()


@pytest.mark.parametrize("split", ["actor", "official"])
def test_validation_is_cut_by_actor_where_the_split_is_by_actor(tmp_path, split):
    data = make_folder(tmp_path / "data", train=60, test=6)
    lines = (data / "train.csv").read_text().splitlines()
    (data / "train.csv").write_text("")
    for i, line in enumerate(lines):  # twelve actors of five clips each, named as CREMA-D's clips are
        old, label = line.split(",")
        new = f"{1001 + i // 5}_S{i % 5:02d}_ANG_XX"
        (data / "visual" / old).rename(data / "visual" / new)
        (data / "audio" / f"{old}.npy").rename(data / "audio" / f"{new}.npy")
        with open(data / "train.csv", "a") as file:
            file.write(f"{new},{label}\n")
    (data / "split.json").write_text(json.dumps({"name": split}))
    flags = ["--train", "--dataset", "folder", "--data_root", str(data), "--val_fraction", "0.2"]
    folder, parts = load_parts(train.parse_args(flags))
    actors = {name: {clip.split("_")[0] for clip in parts[name].clips} for name in ("train", "val")}
    assert len(parts["train"].clips) + len(parts["val"].clips) == 60 and folder.split == {"name": split}
    assert bool(actors["train"] & actors["val"]) == (split == "official")


def test_the_actor_split_needs_no_new_preparation(tmp_path, monkeypatch):
    """--split actor cuts a folder of the published lists as `prepare --split actor` would."""
    rows = [(f"{1001 + i % 12}_S{i // 12:02d}_{('ANG', 'SAD')[i // 3 % 2]}_XX", ("ANG", "SAD")[i // 3 % 2])
            for i in range(96)]  # fmt: skip
    spec = replace(get_spec("CREMAD"), classes=("ANG", "SAD"), modalities=(audio(None), video(frames=2)), counts=None,
                   train_class_counts=None)  # fmt: skip
    monkeypatch.setitem(SPECS, "CREMAD", spec)
    data = make_folder(tmp_path / "data", train=80, test=16, classes=("ANG", "SAD"))
    for i, (clip, _) in enumerate(rows):
        old = f"train_{i:04d}" if i < 80 else f"test_{i - 80:04d}"
        (data / "visual" / old).rename(data / "visual" / clip)
        (data / "audio" / f"{old}.npy").rename(data / "audio" / f"{clip}.npy")
    for name, part in (("train", rows[:80]), ("test", rows[80:])):
        (data / f"{name}.csv").write_text("".join(f"{clip},{label}\n" for clip, label in part))
    words = ["--train", "--dataset", "CREMAD", "--data_root", str(data)]
    _, official = load_parts(train.parse_args([*words, "--split", "official"]))
    assert official["test"].clips == [clip for clip, _ in rows[80:]]
    wanted = actor_split(rows, spec).parts
    for more in ([], ["--val_fraction", "0.2"]):
        folder, parts = load_parts(train.parse_args([*words, "--split", "actor", *more]))
        assert folder.split["name"] == "actor"
        found = {name: {(clip, folder.classes[y]) for clip, y in zip(part.clips, part.labels, strict=True)}
                 for name, part in parts.items()}  # fmt: skip
        assert found["test"] == set(wanted["test"])
        assert found["train"] | found.get("val", set()) == set(wanted["train"])
        actors = [{clip[:4] for clip, _ in part} for part in found.values()]
        assert sum(map(len, actors)) == 12, "an actor is in two parts"
        assert all(path.parent.name == clip for part in parts.values()
                   for clip, (path, *_) in zip(part.clips, part.files["video"], strict=True))  # fmt: skip
    (data / "val.csv").write_text("".join(f"{clip},{label}\n" for clip, label in rows[70:80]))
    (data / "train.csv").write_text("".join(f"{clip},{label}\n" for clip, label in rows[:70]))
    with pytest.raises(UserError, match=r"--split actor: .*val\.csv.*--val_fraction"):
        load_parts(train.parse_args([*words, "--split", "actor"]))
    (data / "val.csv").unlink()
    (data / "split.json").write_text(json.dumps({"name": "actor"}))
    with pytest.raises(UserError, match=r"--split official: .*has the actor split"):
        load_parts(train.parse_args([*words, "--split", "official"]))
    with pytest.raises(UserError, match=r"--split actor: the clip ids of demo contain no actor"):
        train.parse_args(["--train", "--split", "actor"])


def test_sgd_takes_the_steps_of_pytorch_s_plain_one_whatever_comes_first(data):
    """An encoder's first batch may be the second modality's: its momentum starts there."""
    args = train.parse_args([*TINY, "--train", "--optimizer", "sgd", "--learning_rate", "0.01"])
    clips, weights = clips_of(data), []
    for plain in (False, True):
        model = network()
        optimizer = train.make_optimizer(model, args)
        if plain:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, foreach=False)
        for epoch, fed in enumerate((("audio",), ("video",), ("audio", "video"))):
            train.train_epoch(model, clips, remix.batches_of(16, 8, fed, None), optimizer, epoch, args)
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-5, atol=1e-6, msg=name)


def test_fewer_test_clips_than_processes(pairs, runs):
    """One process has none of its own; it trains and evaluates all the same, and one table is printed."""
    for case in ("few", "evaluate"):
        status, out, err = pairs[case]
        assert status == [0, 0], err
        tables = [line for line in out.splitlines() if line.split()[:2] == ["multimodal", "audio"]]
        assert len(tables) == 1, out
    assert metrics(runs / "few")[-1]["test_acc"] in (0, 1)


def usable_gpus(monkeypatch, count: int, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capability)


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "tf32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_bf16_is_the_default_of_gpus_that_have_it(capability, precision, monkeypatch):
    usable_gpus(monkeypatch, 1, capability)
    assert train.parse_args(["--train"]).precision == precision
    assert train.parse_args(["--train", "--device", "cpu"]).precision == "fp32"
    assert train.parse_args(["--train", "--preset", "official"]).precision == "official"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (9, 0) if gpu == 1 else capability)
    assert train.parse_args(["--train", "--gpu_ids", "1"]).precision == "bf16"
    assert train.parse_args(["--train", "--gpu_ids", "0,1"]).precision == precision  # all of them have to


def test_a_driver_that_cannot_be_used_is_one_line(monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it.")

    usable_gpus(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "init", init)
    for flags in (["--train"], ["--train", "--device", "cuda", "--precision", "fp32"]):
        with pytest.raises(UserError, match=r"driver .* is too old \(found version 11040\).*--device cpu") as caught:
            train.main(flags)
        assert "\n" not in str(caught.value)
    assert train.parse_args(["--train", "--device", "cpu"]).precision == "fp32"


def test_nccl_is_given_its_gpu(monkeypatch):
    """Without it NCCL guesses from the rank, which is wrong for `--gpu_ids 1,0`, and warns at each barrier."""
    asked = {}
    usable_gpus(monkeypatch, 2)
    monkeypatch.setattr(
        distributed.dist, "init_process_group", lambda backend, **words: asked.update(words, on=backend)
    )
    monkeypatch.setattr(distributed.dist, "new_group", lambda **_: None)
    for name, value in {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    distributed.start("auto", "1,0")
    assert (asked["on"], asked["device_id"]) == ("nccl", torch.device("cuda", 0))
    distributed.start("cpu")
    assert (asked["on"], asked["device_id"]) == ("gloo", None)


@pytest.mark.parametrize(
    ("flags", "rank", "gpu"), [([], 1, 1), (["--gpu_ids", "2,3"], 1, 3), (["--gpu_ids", "2"], 0, 2)]
)
def test_each_process_of_torchrun_takes_the_gpu_it_is_given(flags, rank, gpu, monkeypatch):
    taken = []
    usable_gpus(monkeypatch, 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(rank + 1))
    monkeypatch.setenv("WORLD_SIZE", "1")  # no group to join
    args = train.parse_args(["--train", *flags])
    device = torch.device("cuda", gpu)
    assert distributed.start(args.device, args.gpu_ids, relaunch=True) == device and taken == [device]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    with pytest.raises(UserError, match=r"5 processes for .*--nproc_per_node"):
        distributed.start(args.device, args.gpu_ids, relaunch=True)


def test_several_gpus_start_torchrun_only_where_train_py_was_typed(monkeypatch):
    started = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    usable_gpus(monkeypatch, 2)
    monkeypatch.setattr(distributed.os, "execv", lambda program, words: started.append(words))
    assert distributed.start("auto", None, relaunch=True) == torch.device("cuda", 0) and not started
    assert distributed.start("auto", "1,0", relaunch=False) == torch.device("cuda", 1) and not started
    monkeypatch.setattr(sys, "argv", ["train.py", "--train"])
    distributed.start("auto", "0,1", relaunch=True)
    assert started[0][-3:] == ["--nproc_per_node=2", "train.py", "--train"]


def test_only_the_command_itself_may_start_torchrun(monkeypatch):
    """`main` called from Python keeps to its process."""
    asked = []

    def start(*_, relaunch):
        asked.append(relaunch)
        raise UserError("far enough")

    monkeypatch.setattr(distributed, "start", start)
    monkeypatch.setattr(sys, "argv", ["train.py", "--train"])
    for argv in (None, ["--train"]):
        with pytest.raises(UserError, match="far enough"):
            train.main(argv)
    assert asked == [True, False]


@pytest.mark.parametrize(("flags", "message"), [
    ([], "nothing to do: use --train"),
    (["--train", "--epochs", "0"], "--epochs.*at least 1"),
    (["--train", "--epochs", "ten"], "--epochs.*not a whole number"),
    (["--train", "--batch_size", "1"], "--batch_size.*at least 2"),
    (["--train", "--val_fraction", "1.5"], "--val_fraction.*0.9 at most"),
    (["--train", "--learning_rate", "0"], "--learning_rate.*above 0"),
    (["--train", "--learning_rate", "nan"], "--learning_rate"),
    (["--train", "--method", "magic"], "--method.*remix.*baseline.*audio.*video"),
    (["--train", "--dataset", "cremad"], "--dataset.*CREMAD"),
    (["--train", "--warmup", "61"], "--warmup 61.*--epochs 60"),
    (["--train", "--gpu_ids", "a,b"], "--gpu_ids: a,b"),
    (["--train", "--resume"], "--resume.*--run_name"),
    (["--train", "--device", "cuda"], "no CUDA device"),
    (["--train", "--unknown", "1"], "unrecognized arguments: --unknown"),
    (["--train", "--resume", "auto"], "--resume: no run given.*--run_name"),
    (["--resume", "/nowhere/run"], "--resume /nowhere/run: no run.*config.json"),
    (["--checkpoint", "nowhere.pth"], "nowhere.pth: no such checkpoint"),
    (["--train", "--dataset", "folder", "--data_root", "/nowhere"], "/nowhere"),
    (["--train", "--run_name", "../x"], "--run_name ../x"),
    (["--train", "--n_classes", "6"], "--n_classes 6.*3 classes"),
])  # fmt: skip
def test_mistakes_are_one_line(flags, message, tmp_path, data):
    if "--data_root" not in flags and "--dataset" not in flags:
        flags = [*flags, "--dataset", "folder", "--data_root", str(data), "--encoder", "resnet18_thin"]
    with pytest.raises(UserError, match=message) as caught:
        train.main([*flags, "--log_path", str(tmp_path / "runs")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("command", [["train.py", "--train"], ["-m", "benchmarks.gpu"]])
def test_a_mistake_exits_with_status_2_and_no_stack_trace(command):
    """And libgomp, asked to say so when it is loaded, has been told how long threads spin."""
    free = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, *command, "--epochs", "x"], cwd=REPO, capture_output=True, text=True,
                          env=free | {"OMP_DISPLAY_ENV": "VERBOSE"})  # fmt: skip
    said = [line for line in done.stderr.splitlines() if line and not line.startswith(("OPENMP DISPLAY", "  "))]
    assert done.returncode == 2 and len(said) == 1 and said[0].startswith("error: "), done.stderr
    spins = set(re.findall(r"GOMP_SPINCOUNT = '(.*)'", done.stderr))  # none where PyTorch has another OpenMP
    assert spins == ({SPINS} if sys.platform == "linux" else set()) or "GOMP_" not in done.stderr


def test_the_official_command_is_understood():
    command = "--batch_size 64 --dataset CREMAD --train --epoch 60 --gpu_ids 2,3 --warmup 10"
    args = train.parse_args(command.split())
    assert (args.epochs, args.warmup, args.dataset, args.gpu_ids) == (60, 10, "CREMAD", "2,3")
    assert (args.alpha, args.beta, args.gamma1, args.gamma2) == (0.5, 0.5, 1.0, 1.0)
    assert (args.optimizer, args.lr_decay_step, args.lr_decay_ratio, args.random_seed) == ("adam", 30, 0.1, 42)


def test_refreshed_batchnorm_statistics_are_those_of_the_training_clips(data):
    clips, model = clips_of(data), network()
    weights = {name: value.clone() for name, value in model.named_parameters()}
    reestimate(model, clips, ("audio", "video"), batch_size=11, seed=42, epoch=3)

    order = torch.randperm(34, generator=epoch_generator(42, 3, "batchnorm"))
    order = order[:33].split(11)  # the 34th would be alone
    whole = next(clips.epoch([remix.Batch(torch.arange(34), ("audio", "video"))]))
    images = {"audio": whole.inputs["audio"], "video": whole.inputs["video"].flatten(0, 1)}
    for inputs, net in ((images[name], model.encoders[name]) for name in images):
        per_clip = len(inputs) // 34
        maps = net.conv1(inputs).detach().unflatten(0, (34, per_clip)).numpy().astype("float64")
        parts = [
            np.moveaxis(maps[part.numpy()], 2, 0).reshape(maps.shape[2], -1) for part in order
        ]  # (channels, values)
        np.testing.assert_allclose(net.bn1.running_mean, np.mean([p.mean(1) for p in parts], 0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(net.bn1.running_var, np.mean([p.var(1, ddof=1) for p in parts], 0), rtol=1e-4)
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    assert {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.1}


@pytest.mark.parametrize("statistics", ["refreshed", "running"])
def test_without_warm_up_batchnorm_is_estimated_before_the_first_scoring(data, runs, monkeypatch, statistics):
    """The network is as it was drawn: its running statistics are those of nothing, 0 and 1."""
    seen, predict = [], train.predict

    def scored(model, clips, fed, size, name, *rest):
        buffers = {key: value.clone() for key, value in model.named_buffers()}
        seen.append((name, buffers, {key: value.clone() for key, value in model.named_parameters()}))
        return predict(model, clips, fed, size, name, *rest)

    monkeypatch.setattr(train, "predict", scored)
    run(data, runs, f"bn {statistics}", "--epochs", "1", "--warmup", "0", "--batchnorm", statistics)
    name, buffers, weights = seen[0]
    fresh = network(42)
    assert name == "epoch 1 scoring" and all(torch.equal(weights[key], p) for key, p in fresh.named_parameters())
    if statistics == "refreshed":
        reestimate(fresh, clips_of(data), ("audio", "video"), batch_size=8, seed=42, epoch=0)
    assert all(torch.equal(buffers[key], value) for key, value in fresh.named_buffers())
    means = [value for key, value in buffers.items() if key.endswith("running_mean")]
    assert means and all(value.any() == (statistics == "refreshed") for value in means)


def test_running_batchnorm_statistics_are_left_alone_where_asked(data, runs, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "reestimate", lambda *args: asked.append(args))
    for flags in (["--batchnorm", "running"], ["--preset", "official"]):
        run(data, runs, f"bn{len(flags[1])}", "--epochs", "2", "--warmup", "1", *flags)
    assert asked == []
    run(data, runs, "bn", "--epochs", "2", "--warmup", "1")
    assert len(asked) == 2  # once an epoch
