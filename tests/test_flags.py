"""Every flag of train.py with wrong values: one line that names the flag, exit status 2, no run folder."""

import argparse

import pytest
from helpers import make_folder

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
    "fusion_method": NAME,
    "checkpoint": [*PATH, "/nowhere/x.pth", "/"],
    "method": NAME,
    "preset": NAME,
    "warmup": [*WHOLE, "61"],
    "score": NAME,
    "keep": NAME,
    "rescore_every": [*WHOLE, "0"],
    "batch_order": NAME,
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
    "encoder_lr_decay": REAL,
    "random_seed": [*WHOLE, str(2**32)],
    "device": [*NAME, "cuda"],
    "gpu_ids": ["", "a", "0,,1", "0,0", "-1", "0;1", "\u00b2", "0,7"],
    "log_path": [*PATH, "/proc/version"],
    "run_name": ["", ".", "..", "../x", "a/b", "/x", "a\0b", "x" * 300],
    "batchnorm": NAME,
    "pack_size": [*WHOLE, "0", "7", "100000"],
    "precision": [*NAME, "fp16"],
    "balance": [*NAME, "ogm_ge,", "none,pmr", "agm,ogm_ge", "gblend,dr"],  # the last needs a validation part
    "save_every": ["", "0", "-1", "1.5", "steps", "0steps", "5 minutes", "\u00b2", "9" * 30],
}  # fmt: skip
# Of a balance method's flag: what neither its type nor its choices can be.
WRONG |= {name: ["", "some", "-1", "nan", "inf", "0,0,0"] for name in balance.flag_owners()}


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
    monkeypatch.setattr(train, "train_epoch", lambda *_: pytest.fail(f"--{name} was taken"))  # not 60 epochs of it
    usual = {"data_root": str(data), "log_path": str(tmp_path / "runs"), "run_name": "r"}
    if owner := balance.flag_owners().get(name):
        usual |= {"balance": owner, "val_fraction": "0.2"}
    for value in WRONG[name]:
        words = [f"--{flag}={text}" for flag, text in ({"dataset": "folder"} | usual | {name: value}).items()]
        said = mistake(["--train", *words], capsys)
        where = {"data_root": "/nowhere", "checkpoint": "/", "log_path": "/proc/version"}.get(name, f"--{name}")
        assert f"--{name}" in said or where in said, (value, said)
        assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", [name for name, action in ACTIONS.items() if not takes_value(action)])
def test_flags_without_a_value_take_none(name, capsys):
    assert f"--{name}" in mistake([f"--{name}=yes"], capsys)


def test_what_no_flag_knows_alone(capsys):
    for words, names in (
        ("", "--train"),
        ("--train --resume", "--run_name"),
        ("--resume --run_name x --checkpoint y", "--train"),
        ("--train --resume --run_name x --checkpoint y", "--checkpoint"),
        ("--train --epochs 5 --warmup 6", "--warmup 6"),
        ("--train --epoch", "--epoch"),
        ("--train --colour red", "--colour"),
        ("--train stray", "stray"),
    ):
        assert names in mistake(words.split(), capsys)
