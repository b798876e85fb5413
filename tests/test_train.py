"""Whole runs through the command line on tiny data: every file of the run folder, every phase, resume, evaluation."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, make_folder, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import remix
import train
from dataset.clips import Feed, make_clips
from dataset.folder import load_folder
from dataset.prepare import actor_split
from dataset.specs import SPECS, get_spec
from models import AVClassifier
from utils.errors import UserError
from utils.seeding import epoch_generator

REPO = Path(__file__).resolve().parents[1]


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
        for key in ("lr", "train_loss", "test_acc", "test_acc_audio", "test_acc_video", "val_acc", "val_acc_audio",
                    "val_acc_video", "seconds_score", "seconds_train", "seconds_eval", "clips_per_second"):  # fmt: skip
            assert isinstance(line[key], float), key
        assert 0 <= line["test_acc"] <= 1 and (line["test_acc"] * 15) == pytest.approx(round(line["test_acc"] * 15))
        if line["phase"] == "remix":
            assert line["n_audio"] + line["n_video"] == clips["train"]
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
    for name in vars(train.parse_args(["--train"])):
        assert name in config
    assert config["epochs"] == 4 and config["learning_rate"] == 1e-3 and config["masked_encoder"] == "skip"
    assert config["from_preset"]["alpha"] == 0.5 and "epochs" not in config["from_preset"]
    assert config["versions"]["torch"] == torch.__version__.split("+")[0]
    assert config["hardware"]["device"] == "cpu"


def test_tensorboard_tags(remix_run):
    events = EventAccumulator(str(remix_run[0]), size_guidance={"histograms": 0}).Reload()
    tags = events.Tags()
    for tag in ("loss/train", "accuracy/multimodal", "accuracy/audio", "accuracy/video", "remix/n_audio",
                "remix/n_video", "lr", "speed/clips_per_second"):  # fmt: skip
        assert tag in tags["scalars"], tag
    assert {"remix/kl_audio", "remix/kl_video"} <= set(tags["histograms"])
    assert "confusion" in tags["images"]
    lines = metrics(remix_run[0])
    assert [round(e.value, 5) for e in events.Scalars("accuracy/multimodal")] == [
        round(x["test_acc"], 5) for x in lines
    ]
    assert [e.step for e in events.Scalars("remix/n_audio")] == [2, 3]


def test_checkpoints_load_safely_and_evaluate_to_the_same_numbers(remix_run, data, capsys):
    folder, _ = remix_run
    for name in ("last.pth", "best.pth"):
        state = torch.load(folder / name, weights_only=True)
        assert {"model", "optimizer", "scheduler", "epoch", "rng", "config"} <= set(state)
    train.main([*TINY, "--data_root", str(data), "--checkpoint", str(folder / "last.pth")])
    shown = capsys.readouterr().out.splitlines()[-1].split()[1:]
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


@pytest.mark.parametrize("method", ["audio", "video"])
def test_one_modality_alone(data, runs, method):
    folder = run(data, runs, method, "--method", method, "--epochs", "2")
    other = "video" if method == "audio" else "audio"
    for line in metrics(folder):
        assert line["phase"] == "joint" and line[f"test_acc_{other}"] is None
        assert 0 <= line[f"test_acc_{method}"] <= 1
    weights = torch.load(folder / "last.pth", weights_only=True)["model"]
    torch.manual_seed(42)
    fresh = train.AVClassifier(3, "resnet18_thin").state_dict()
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
    timing = ("seconds_score", "seconds_train", "seconds_eval", "clips_per_second")
    strip = [[{k: v for k, v in line.items() if k not in timing} for line in metrics(f)] for f in (whole, part)]
    assert strip[0] == strip[1]


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
        shown = [None if cell == "-" else float(cell) for cell in out[-1].split()[1:]]
        assert shown == [None if value is None else pytest.approx(value, abs=5e-5) for value in expected]
        for name, value in (
            ("method", "audio"),
            ("image_size", "32"),
            ("fusion_method", "film"),
            ("model", "resnet18"),
        ):
            with pytest.raises(UserError, match=rf"--{name} {value}: .*was trained with --{name} .*leave it out"):
                train.main(["--checkpoint", str(folder / "last.pth"), f"--{name}", value])
    other = make_folder(tmp_path / "other", classes=("x", "y", "z"))
    with pytest.raises(UserError, match=r"its classes \(x, y, z\) are not .*last.pth's \(a, b, c\)"):
        train.main(["--checkpoint", str(folder / "last.pth"), "--data_root", str(other)])


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
    assert capsys.readouterr().out.splitlines()[0] == f"folder, {other}: 8 test clips, 1 broken ones left out"


def test_a_run_is_not_made_shorter_by_resuming_it(data, tmp_path):
    flags = ("--method", "audio", "--epochs")
    folder = run(data, tmp_path, "r", *flags, "2")
    before = (folder / "summary.json").read_bytes()
    with pytest.raises(UserError, match=r"--epochs 1: the run has done 2; type --epochs 2"):
        run(data, tmp_path, "r", *flags, "1", "--resume")
    assert (folder / "summary.json").read_bytes() == before


def test_all_epochs_of_warm_up_is_told(data, tmp_path, capsys):
    run(data, tmp_path, "r", "--epochs", "1", "--warmup", "1")
    assert "warning: all 1 epochs are warm-up: no epoch of Remix" in capsys.readouterr().out


def test_a_mistake_on_several_processes_is_one_line(data, runs, remix_run):
    """That the run is there is rank 0's to see; the other ends without a word."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *TINY]
    command += ["--train", "--data_root", str(data), "--log_path", str(runs), "--run_name", "remix"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=200)
    lines = done.stderr.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == sum("exists already" in line for line in lines) == 1
    assert done.returncode and not any(line.startswith("[rank") for line in lines), done.stderr


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
    folder, parts = train.load_parts(train.parse_args(flags))
    actors = {name: {clip.split("_")[0] for clip in parts[name].clips} for name in ("train", "val")}
    assert len(parts["train"].clips) + len(parts["val"].clips) == 60 and folder.split == {"name": split}
    assert bool(actors["train"] & actors["val"]) == (split == "official")


def test_the_actor_split_needs_no_new_preparation(tmp_path, monkeypatch):
    """--split actor cuts a folder of the published lists as `prepare --split actor` would."""
    rows = [(f"{1001 + i % 12}_S{i // 12:02d}_{('ANG', 'SAD')[i // 3 % 2]}_XX", ("ANG", "SAD")[i // 3 % 2])
            for i in range(96)]  # fmt: skip
    spec = replace(get_spec("CREMAD"), classes=("ANG", "SAD"), audio_recipe=None, counts=None, train_class_counts=None)
    monkeypatch.setitem(SPECS, "CREMAD", spec)
    data = make_folder(tmp_path / "data", train=80, test=16, classes=("ANG", "SAD"))
    for i, (clip, _) in enumerate(rows):
        old = f"train_{i:04d}" if i < 80 else f"test_{i - 80:04d}"
        (data / "visual" / old).rename(data / "visual" / clip)
        (data / "audio" / f"{old}.npy").rename(data / "audio" / f"{clip}.npy")
    for name, part in (("train", rows[:80]), ("test", rows[80:])):
        (data / f"{name}.csv").write_text("".join(f"{clip},{label}\n" for clip, label in part))
    words = ["--train", "--dataset", "CREMAD", "--data_root", str(data)]
    _, official = train.load_parts(train.parse_args([*words, "--split", "official"]))
    assert official["test"].clips == [clip for clip, _ in rows[80:]]
    wanted = actor_split(rows, spec).parts
    for more in ([], ["--val_fraction", "0.2"]):
        folder, parts = train.load_parts(train.parse_args([*words, "--split", "actor", *more]))
        assert folder.split["name"] == "actor"
        found = {name: {(clip, folder.classes[y]) for clip, y in zip(part.clips, part.labels, strict=True)}
                 for name, part in parts.items()}  # fmt: skip
        assert found["test"] == set(wanted["test"])
        assert found["train"] | found.get("val", set()) == set(wanted["train"])
        actors = [{clip[:4] for clip, _ in part} for part in found.values()]
        assert sum(map(len, actors)) == 12, "an actor is in two parts"
        assert all(path.parent.name == clip for part in parts.values()
                   for clip, (path, *_) in zip(part.clips, part.frames, strict=True))  # fmt: skip
    (data / "val.csv").write_text("".join(f"{clip},{label}\n" for clip, label in rows[70:80]))
    (data / "train.csv").write_text("".join(f"{clip},{label}\n" for clip, label in rows[:70]))
    with pytest.raises(UserError, match=r"--split actor: .*val\.csv.*--val_fraction"):
        train.load_parts(train.parse_args([*words, "--split", "actor"]))
    (data / "val.csv").unlink()
    (data / "split.json").write_text(json.dumps({"name": "actor"}))
    with pytest.raises(UserError, match=r"--split official: .*has the actor split"):
        train.load_parts(train.parse_args([*words, "--split", "official"]))
    with pytest.raises(UserError, match=r"--split actor: the clip ids of demo name no actors"):
        train.parse_args(["--train", "--split", "actor"])


def test_two_processes_equal_one(data, runs):
    """The same weights give the same partition and metrics; ranks end with the same parameters (one file, rank 0's)."""
    one = run(data, runs, "one", "--epochs", "1", "--warmup", "0", "--learning_rate", "1e-12")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *TINY]
    command += ["--train", "--data_root", str(data), "--log_path", str(runs), "--run_name", "two"]
    command += ["--epochs", "1", "--warmup", "0", "--learning_rate", "1e-12"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [(runs / name / "partition.csv").read_text().splitlines() for name in ("one", "two")]
    assert len(rows[0]) == 35
    assert rows[0][0] == rows[1][0] == "clip,label,kl_audio,kl_video,kept"
    for a, b in zip(*(lines[1:] for lines in rows), strict=True):
        a, b = a.split(","), b.split(",")
        assert a[:2] == b[:2] and a[4] == b[4]
        assert [float(x) for x in a[2:4]] == pytest.approx([float(x) for x in b[2:4]], rel=1e-4, abs=1e-6)
    a, b = metrics(one)[0], metrics(runs / "two")[0]
    assert (a["n_audio"], a["n_video"]) == (b["n_audio"], b["n_video"])
    assert a["seconds_train"] > 0 and b["seconds_train"] > 0


def test_sgd_takes_the_steps_of_pytorch_s_plain_one_whatever_comes_first(data):
    """An encoder's first batch may be the second modality's: its momentum starts there."""
    args = train.parse_args([*TINY, "--train", "--optimizer", "sgd", "--learning_rate", "0.01"])
    folder = load_folder(data, get_spec("folder"))
    feed = Feed(frames=2, image_size=32, device=torch.device("cpu"), cache="ram", workers=0)
    clips = make_clips(folder.root, "train", folder.parts["train"], folder.audio_shape, feed)
    weights = []
    for plain in (False, True):
        torch.manual_seed(0)
        model = AVClassifier(3, "resnet18_thin")
        optimizer = train.make_optimizer(model, args)
        if plain:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, foreach=False)
        for epoch, kept in enumerate(("audio", "video", "both")):
            train.train_epoch(model, clips, remix.batches_of(16, 8, kept, None), optimizer, epoch, args)
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-5, atol=1e-6, msg=name)


def test_fewer_test_clips_than_processes(tmp_path):
    """One process has none of its own; it trains and evaluates all the same, and one table is printed."""
    data = make_folder(tmp_path / "data", train=18, test=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *TINY]
    where = ["--data_root", str(data), "--log_path", str(tmp_path)]
    for more in (
        ["--train", "--run_name", "two", "--epochs", "2", "--warmup", "1", "--diagnose"],
        ["--checkpoint", str(tmp_path / "two" / "last.pth")],
    ):
        done = subprocess.run([*command, *where, *more], cwd=REPO, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-2000:]
        tables = [line for line in done.stdout.splitlines() if line.split()[:2] == ["multimodal", "audio"]]
        assert len(tables) == 1, done.stdout
    assert metrics(tmp_path / "two")[-1]["test_acc"] in (0, 1)


@pytest.mark.parametrize(
    ("flags", "rank", "gpu"), [([], 1, 1), (["--gpu_ids", "2,3"], 1, 3), (["--gpu_ids", "2"], 0, 2)]
)
def test_each_process_of_torchrun_takes_the_gpu_it_is_given(flags, rank, gpu, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(rank + 1))
    monkeypatch.setenv("WORLD_SIZE", "1")  # no group to join
    args = train.parse_args(["--train", *flags])
    assert train.choose_device(args, typed=True) == torch.device("cuda", gpu) and taken == [torch.device("cuda", gpu)]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    with pytest.raises(UserError, match=r"5 processes for .*--nproc_per_node"):
        train.choose_device(args, typed=True)


def test_several_gpus_start_torchrun_only_where_train_py_was_typed(monkeypatch):
    started = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(train.os, "execv", lambda program, words: started.append(words))
    args = train.parse_args(["--train"])
    assert train.choose_device(args, typed=False) == torch.device("cuda", 0) and not started
    monkeypatch.setattr(sys, "argv", ["train.py", "--train"])
    train.choose_device(args, typed=True)
    assert started[0][-3:] == ["--nproc_per_node=2", "train.py", "--train"]


@pytest.mark.parametrize(("flags", "message"), [
    ([], "type --train"),
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
    (["--checkpoint", "nowhere.pth"], "nowhere.pth: no such checkpoint"),
    (["--train", "--dataset", "folder", "--data_root", "/nowhere"], "/nowhere"),
    (["--train", "--run_name", "../x"], "--run_name ../x"),
    (["--train", "--n_classes", "6"], "--n_classes 6.*3 classes"),
])  # fmt: skip
def test_mistakes_are_one_line(flags, message, tmp_path, data):
    if "--data_root" not in flags and "--dataset" not in flags:
        flags = [*flags, "--dataset", "folder", "--data_root", str(data), "--model", "resnet18_thin"]
    with pytest.raises(UserError, match=message) as caught:
        train.main([*flags, "--log_path", str(tmp_path / "runs")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


def test_a_mistake_exits_with_status_2_and_no_stack_trace():
    done = subprocess.run(
        [sys.executable, "train.py", "--train", "--epochs", "x"], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_official_command_is_understood():
    command = "--batch_size 64 --dataset CREMAD --train --epoch 60 --gpu_ids 2,3 --warmup 10"
    args = train.parse_args(command.split())
    assert (args.epochs, args.warmup, args.dataset, args.gpu_ids) == (60, 10, "CREMAD", "2,3")
    assert (args.alpha, args.beta, args.gamma1, args.gamma2) == (0.5, 0.5, 1.0, 1.0)
    assert (args.optimizer, args.lr_decay_step, args.lr_decay_ratio, args.random_seed) == ("adam", 30, 0.1, 42)


def test_refreshed_batchnorm_statistics_are_those_of_the_training_clips(data):
    folder = load_folder(data, get_spec("folder"))
    feed = Feed(frames=2, image_size=32, device=torch.device("cpu"), cache="ram", workers=0)
    clips = make_clips(folder.root, "train", folder.parts["train"], folder.audio_shape, feed)
    torch.manual_seed(0)
    model = AVClassifier(3, "resnet18_thin")
    weights = {name: value.clone() for name, value in model.named_parameters()}
    args = train.parse_args(["--train", "--dataset", "folder", "--batch_size", "11"])
    train.refresh_batchnorm(model, clips, "both", args, 3)

    order = torch.randperm(34, generator=epoch_generator(args.random_seed, 3, "batchnorm"))
    order = order[:33].split(11)  # the 34th would be alone
    whole = next(clips.epoch([remix.Batch(torch.arange(34), "both")]))
    for inputs, net in ((whole.audio, model.audio_net), (whole.video.flatten(0, 1), model.visual_net)):
        per_clip = len(inputs) // 34
        maps = net.conv1(inputs).detach().unflatten(0, (34, per_clip)).numpy().astype("float64")
        parts = [np.moveaxis(maps[part.numpy()], 2, 0).reshape(8, -1) for part in order]  # (channels, values)
        np.testing.assert_allclose(net.bn1.running_mean, np.mean([p.mean(1) for p in parts], 0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(net.bn1.running_var, np.mean([p.var(1, ddof=1) for p in parts], 0), rtol=1e-4)
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    assert {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.1}


def test_running_batchnorm_statistics_are_left_alone_where_asked(data, runs, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "refresh_batchnorm", lambda *args: asked.append(args))
    for flags in (["--batchnorm", "running"], ["--preset", "official"]):
        run(data, runs, f"bn{len(flags[1])}", "--epochs", "2", "--warmup", "1", *flags)
    assert asked == []
    run(data, runs, "bn", "--epochs", "2", "--warmup", "1")
    assert len(asked) == 2  # once an epoch
