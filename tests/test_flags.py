"""Every flag of train.py with wrong values: one line that names the flag, exit status 2, no run folder."""

import argparse
import subprocess
import sys

import pytest
from helpers import REPO, make_folder

import balance
import train
from utils.errors import run_main

WHOLE = ["", "ten", "1.5", "-1", "99999999999999999999", "nan", "inf", "0x10"]
REAL = ["", "much", "-1", "nan", "inf", "-inf", "1e9", "1,5"]
NAME = ["", "magic", "NONE", "../x"]
PATH = ["", " ", "a\0b", "x" * 5000]

# What each flag that takes a value must refuse; a new flag without a line here fails the first test.
WRONG = {
    "dataset": [*NAME, "cremad"],
    "data_root": [*PATH, "/nowhere"],
    "n_classes": [*WHOLE, "0", "1", "7"],
    "val_fraction": [*REAL, "1.5", "1"],
    "split": [*NAME, "actor"],
    "image_size": [*WHOLE, "0", "7", "100000"],
    "cache": NAME,
    "num_workers": [*WHOLE, "100000"],
    "model": NAME,
    "encoder": [*NAME, "mlp", "timm:", "audio=", "audio=magic", "smell=resnet18", "audio=resnet18,audio=resnet34",
                "resnet18,resnet34"],
    "pretrained": [*PATH, "/nowhere", "audio=", "smell=x.pth", "audio=x.pth,audio=y.pth"],
    "layer_decay": [*REAL, "0", "1.1"],
    "unimodal": NAME,
    "fusion_method": NAME,
    "checkpoint": [*PATH, "/nowhere/x.pth", "/"],
    "predictions": [*PATH, "x.npz"],  # with --train
    "clip": [*PATH, "x.mp4"],  # with --train
    "method": NAME,
    "preset": NAME,
    "warmup": [*WHOLE, "61"],
    "score": NAME,
    "keep": NAME,
    "rescore_every": [*WHOLE, "0"],
    "reassemble": NAME,
    "masked_encoder": NAME,
    "alpha": REAL,
    "beta": REAL,
    "gamma1": REAL,
    "gamma2": REAL,
    "epochs": [*WHOLE, "0"],
    "batch_size": [*WHOLE, "0", "1"],
    "optimizer": NAME,
    "learning_rate": [*REAL, "0"],
    "lr_decay_step": [*WHOLE, "0"],
    "lr_decay_ratio": [*REAL, "0", "1.1"],
    "encoder_lr_decay": [*REAL, "audio=", "audio=much", "smell=0", "audio=0,audio=1"],
    "random_seed": [*WHOLE, str(2**32)],
    "device": [*NAME, "cuda", "mps"],
    "gpu_ids": ["", "a", "0,,1", "0,0", "-1", "0;1", "\u00b2", "0,7"],
    "log_path": [*PATH, "/proc/version"],
    "run_name": ["", ".", "..", "../x", "a/b", "/x", "a\0b", "x" * 300],
    "batchnorm": NAME,
    "pack_size": [*WHOLE, "0", "7", "100000"],
    "precision": [*NAME, "fp16"],
    "balance": [*NAME, "ogm_ge,", "none,pmr", "agm,ogm_ge", "gblend,dr", "ogm_ge:", "ogm_ge:alpha", "ogm_ge:x=1",
                "none:alpha=1", "ogm_ge,pmr:magic=1"],  # gblend needs a validation part
    "resume": [*PATH, "/nowhere", "/proc/version"],
}  # fmt: skip
# Of each option of a balance method: what neither its type nor its choices can be.
OPTIONS = [(name, option.name) for name, method in balance.METHODS.items() for option in method.options]
WRONG_OPTION = ["", "some", "-1", "nan", "inf", "0/0/0"]


def takes_value(action: argparse.Action) -> bool:
    return action.nargs != 0


ACTIONS = {action.dest: action for action in train.make_parser()._actions}


def test_no_flag_is_forgotten():
    assert set(WRONG) == {name for name, action in ACTIONS.items() if takes_value(action)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"), train=6, test=4)


def mistake(words, capsys):
    """The one line on standard error."""
    with pytest.raises(SystemExit) as end:
        run_main(lambda: train.main(words))
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values(name, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.torch.cuda, "device_count", lambda: 2 if name == "gpu_ids" else 0)
    monkeypatch.setattr(train.torch.cuda, "init", lambda: None)
    monkeypatch.setattr(train.torch.cuda, "get_device_capability", lambda gpu: (9, 0))
    monkeypatch.setattr(train, "train_epoch", lambda *_: pytest.fail(f"--{name} was taken"))  # not 60 epochs of it
    usual = {"data_root": str(data), "log_path": str(tmp_path / "runs"), "run_name": "r"}
    for value in WRONG[name]:
        words = [f"--{flag}={text}" for flag, text in ({"dataset": "folder"} | usual | {name: value}).items()]
        said = mistake(["--train", *words], capsys)
        where = {"data_root": "/nowhere", "checkpoint": "/", "log_path": "/proc/version"}.get(name, f"--{name}")
        assert f"--{name}" in said or where in said, (value, said)
        assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("method", "option"), OPTIONS)
def test_wrong_options_of_balance_methods(method, option, capsys):
    for value in WRONG_OPTION:
        said = mistake(["--train", "--val_fraction", "0.2", "--balance", f"{method}:{option}={value}"], capsys)
        assert f"--balance {method}:" in said and f"{option}={value}" in said, (value, said)


@pytest.mark.parametrize("name", [name for name, action in ACTIONS.items() if not takes_value(action)])
def test_flags_without_a_value_take_none(name, capsys):
    assert f"--{name}" in mistake([f"--{name}=yes"], capsys)


def test_what_no_flag_knows_alone(capsys, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("was taken"))
    for words, names in (
        ("", "--train"),
        ("--train --resume", "--run_name"),
        ("--resume --run_name x", "--train"),
        ("--train --resume auto --run_name x --checkpoint y.pth", "y.pth: no such checkpoint"),
        ("--train --epochs 5 --warmup 6", "--warmup 6"),
        ("--train --epoch", "--epoch"),
        ("--train --colour red", "--colour"),
        ("--train stray", "stray"),
    ):
        assert names in mistake(words.split(), capsys)


def test_the_help_has_50_flags_at_most(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    flags = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert 30 < len(flags) <= 50
    assert len(flags) == len(ACTIONS) - 1  # --help itself is the only other


@pytest.mark.parametrize(("typed", "meant"), [
    ("--lr 0.1", "learning_rate"), ("--lr=0.1", "learning_rate"), ("--seed 1", "random_seed"), ("--bs 8", "batch_size"),
    ("--batchsize 8", "batch_size"), ("--warmpu 3", "warmup"), ("--dataroot x", "data_root"), ("--modle x", "model"),
    ("--rescore 2", "rescore_every"), ("--lr_decay 3", "lr_decay_ratio"),
])  # fmt: skip
def test_the_nearest_flag_is_suggested(typed, meant, capsys):
    said = mistake(["--train", *typed.split()], capsys)
    assert typed.split("=")[0].split()[0] in said and f"did you mean --{meant}?" in said


def test_nothing_is_suggested_where_nothing_is_near(capsys):
    for word in ("--colour", "--xyzzy"):
        assert "did you mean" not in mistake(["--train", word, "1"], capsys)


def test_official_flags_may_be_abbreviated():
    words = "--train --batch 8 --gpu 0 --warm=1 --log x --epoch 3 --rand 7 --lr_decay_s 4 --encoder_lr 0.5 --fusion sum"
    args = train.parse_args(words.split())
    assert (args.batch_size, args.gpu_ids, args.warmup, args.log_path, args.epochs) == (8, "0", 1, "x", 3)
    assert (args.random_seed, args.lr_decay_step, args.encoder_lr_decay, args.fusion_method) == (7, 4, 0.5, "sum")


WITHOUT = """
import sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
import train, dataset.prepare.__main__
from utils.files import locked
train.parse_args(["--train"])
print("imported")
"""


def test_train_py_imports_where_there_is_no_fcntl():
    """Windows has none of these modules."""
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=REPO, capture_output=True, text=True)
    assert done.stdout == "imported\n", done.stderr
