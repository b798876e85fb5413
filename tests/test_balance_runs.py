"""Balance methods in whole runs: resumed, on several processes, compared and reported; the documentation's example."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from double_run import by_one_and_by_two
from helpers import REPO, make_folder, numbers_of
from networks import network

import train
from balance import METHODS
from models.checkpoint import model_weights
from report import compare
from report.runs import find_runs, group_runs, reference_of
from utils.errors import Interrupted, UserError

TINY = ["--train", "--dataset", "folder", "--encoder", "resnet18_thin", "--image_size", "32", "--batch_size", "12"]
TINY += ["--optimizer", "sgd", "--learning_rate", "0.01", "--cache", "ram"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"), train=31, test=6)


def run(data, root, name: str, text: str) -> Path:
    train.main([*TINY, "--data_root", str(data), "--log_path", str(root), "--run_name", name, *text.split()])
    return root / name


def signal_at(monkeypatch, at: int) -> list[int]:
    """SIGTERM in training step `at`, a probe's steps counted too; the steps that were begun."""
    terms, steps = train.loss_terms, []

    def signalled(*args):
        steps.append(len(steps))
        if len(steps) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return terms(*args)

    monkeypatch.setattr(train, "loss_terms", signalled)
    return steps


@pytest.mark.parametrize("methods", [
    "dr:every=1:resets=1,pmr:momentum=0.5,gblend:every=2:probe=1",
    "agm,pmr --method baseline",
    "mmcosine,opm:starts=0,mmpareto,ogm_ge --masked_encoder run --rescore_every 2",
])  # fmt: skip
def test_resume_is_bit_identical(methods, data, tmp_path, monkeypatch):
    """After an epoch, and again after the second step of the next one, which is repeated."""
    monkeypatch.setattr("utils.summary.finish", lambda *_: None)  # pictures take most of so short a run
    text = f"--val_fraction 0.3 --warmup 2 --balance {methods}"
    whole = run(data, tmp_path, "whole", f"{text} --epochs 4")
    part = run(data, tmp_path, "part", f"{text} --epochs 3")
    with pytest.raises(UserError, match=r"--balance .*now none"):
        plain = " ".join(text.split()[:4])
        run(data, tmp_path, "part", f"{plain} --epochs 4 --resume auto")
    with monkeypatch.context() as patch:
        signal_at(patch, 2)
        with pytest.raises(Interrupted, match=r"stopped by SIGTERM; .*last\.pth holds 3 epochs"):
            run(data, tmp_path, "part", f"{text} --epochs 4 --resume auto")
    train.main(["--resume", str(part), "--epochs", "4"])  # every other flag from its config.json
    a, b = (torch.load(folder / "last.pth", weights_only=True) for folder in (whole, part))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert a["model"].keys() == model_weights(network()).keys()
    assert numbers_of(whole) == numbers_of(part)
    names = {name.split("/")[1].rpartition("_")[0] for line in numbers_of(whole) for name in line if "balance/" in name}
    for method in (word.split(":")[0] for word in methods.split()[0].split(",")):
        assert method == "mmcosine" or any(name.startswith(method) for name in names), method
    config = json.loads((part / "config.json").read_text())
    assert config["balance"] == methods.split()[0] and list(config["balance_options"]) == [
        word.split(":")[0] for word in methods.split()[0].split(",")
    ]


TOGETHER = {  # every method, as many as go together at once
    "all": "mmcosine,opm:starts=0,pmr,gblend:probe=1,mmpareto,ogm_ge,dr:every=1:views=plain",
    "agm": "agm,pmr",
    "mla": "mla:projection=paper",
    "resample": "resample:warmup=1",
    # No batch of one clip: both processes get it whole, and the mean of the gates counts it twice.
    "greedy": "greedy:alpha=0:steps=2 --model mmtm --batch_size 5",
}


@pytest.fixture(scope="module")
def processes(data, tmp_path_factory):
    """Folder of runs by one and by two processes; batches of 12, 12 and 1 clips fall unevenly on two."""
    return by_one_and_by_two(tmp_path_factory.mktemp("processes"), data, TINY, TOGETHER)


@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_train_the_weights_of_one(name, processes):
    one, first, second = (
        torch.load(processes / f"{name}_{which}", weights_only=True) for which in ("one", "two0", "two1")
    )
    for key, value in one.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-7, msg=key)
    runs = [numbers_of(processes / f"run_{name}_{which}") for which in ("one", "two")]
    for a, b in zip(*runs, strict=True):
        a, b = ({k: v for k, v in line.items() if k.startswith(("balance", "train_"))} for line in (a, b))
        assert a["train_loss"] > 0 and a == pytest.approx(b, rel=1e-4)
    told = {key.removeprefix("balance/") for line in runs[1] for key in line if key.startswith("balance/")}
    for own in (method.split(":")[0] for method in TOGETHER[name].split()[0].split(",")):
        assert own == "mmcosine" or any(key.startswith(f"{own}_") for key in told), own


@pytest.mark.parametrize(("at", "has"), [(2, "no epoch was completed"), (10, r"last\.pth holds 1 epochs")])
def test_a_signal_in_an_estimate_ends_the_run_at_once(at, has, data, tmp_path, monkeypatch):
    """Before the first epoch (an estimate is three times two steps, an epoch two), and before the second."""
    monkeypatch.setattr("utils.summary.finish", lambda *_: None)  # pictures take most of so short a run
    text = "--method baseline --epochs 2 --val_fraction 0.3 --balance gblend:every=1:probe=1"
    whole = run(data, tmp_path, "whole", text)
    with monkeypatch.context() as patch:
        steps = signal_at(patch, at)
        with pytest.raises(Interrupted, match=rf"stopped by SIGTERM; .*{has}; continue with: .*--resume"):
            run(data, tmp_path, "part", text)
        assert len(steps) == at
    run(data, tmp_path, "part", f"{text} --resume auto")
    a, b = (torch.load(folder / "last.pth", weights_only=True)["model"] for folder in (whole, tmp_path / "part"))
    assert all(torch.equal(a[name], b[name]) for name in a) and numbers_of(whole) == numbers_of(tmp_path / "part")


# ------------------------------------------------------------------------------------------- comparisons and reports


def plan_of(words: str) -> list[compare.Planned]:
    return compare.make_plan(*compare.parse_args(words.split()))


def test_a_grid_over_methods_is_planned_once_for_each(data):
    plan = plan_of("--methods baseline,remix,audio --seeds 0 --grid balance=none,ogm_ge:alpha=0.5,pmr+agm")
    assert [(run.name, run.flags["balance"]) for run in plan] == [
        ("demo_baseline_balance-none_seed0", "none"),
        ("demo_baseline_balance-ogm_ge-alpha-0.5_seed0", "ogm_ge:alpha=0.5"),
        ("demo_baseline_balance-pmr+agm_seed0", "agm,pmr"),
        ("demo_remix_balance-none_seed0", "none"),
        ("demo_remix_balance-ogm_ge-alpha-0.5_seed0", "ogm_ge:alpha=0.5"),
        ("demo_remix_balance-pmr+agm_seed0", "agm,pmr"),
        ("demo_audio_seed0", "none"),
    ]
    assert [run.flags["balance_options"].get("ogm_ge", {}).get("alpha") for run in plan[:3]] == [None, 0.5, None]
    names = [run.name for run in plan_of("--methods baseline --seeds 0 --grid balance=none,pmr:alpha=1,pmr:alpha=2")]
    assert names == ["demo_baseline_balance-none_seed0", "demo_baseline_balance-pmr-alpha-1_seed0",
                     "demo_baseline_balance-pmr-alpha-2_seed0"]  # fmt: skip
    with pytest.raises(UserError, match=r"--balance dr: .*--val_fraction"):
        plan_of("--methods baseline --grid balance=none,dr")


def test_reports_name_the_methods_and_compare_with_the_plain_baseline(tmp_path):
    texts = {
        "plain": "--method baseline",
        "ogm": "--method baseline --balance ogm_ge",
        "both": "--method remix --balance pmr,mmpareto",
        "remix": "--method remix",
    }
    for i, (name, text) in enumerate(texts.items()):
        for seed in (0, 1):
            folder = tmp_path / f"{name}{seed}"
            folder.mkdir()
            args = train.parse_args(["--train", "--epochs", "20", *text.split(), "--random_seed", str(seed)])
            config = train.flags(args) | {"from_preset": args.from_preset, "command": f"train.py {text}"}
            if name == "plain":
                del config["balance"], config["balance_options"]  # a run from before there were methods
            (folder / "config.json").write_text(json.dumps(config))
            keys = ("test_acc", "test_acc_audio", "test_acc_video", "test_f1_macro")
            numbers = [dict.fromkeys(keys, 0.5 + 0.1 * i) | {"epoch": epoch} for epoch in range(20)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in numbers))
            (folder / "summary.json").write_text(json.dumps({"epochs": 20}))
    datasets, left_out = group_runs(find_runs([tmp_path]))
    (groups,) = datasets.values()
    assert not left_out and all(len(group.runs) == 2 for group in groups)
    assert [group.label for group in groups] == ["baseline", "remix", "baseline + ogm_ge", "remix + pmr + mmpareto"]
    assert [reference_of(group, groups) for group in groups] == [None, *[groups[0]] * 3]
    from report.tables import notes

    assert "Not like for like" not in notes(groups)


# ---------------------------------------------------------------------------------------------- the documentation


def test_the_documented_method_runs(data, tmp_path, monkeypatch):
    (code,) = re.findall(r"<!-- example:.*?-->\n```python\n(.*?)```", (REPO / "docs/balance.md").read_text(), re.S)
    namespace = {"__name__": "moddrop"}
    exec(compile(code, "docs/balance.md", "exec"), namespace)
    monkeypatch.setitem(METHODS, "moddrop", namespace["ModDrop"])
    assert len(code.splitlines()) < 60
    neutral, plain, acting = (
        torch.load(run(data, tmp_path, name, f"--warmup 1 {text}") / "last.pth", weights_only=True)["model"]
        for name, text in (
            ("n", "--epochs 1 --balance moddrop:p=0"),
            ("p", "--epochs 1"),
            ("a", "--epochs 2 --balance moddrop:p=1,pmr:alpha=0:mu=0"),
        )
    )
    assert all(torch.equal(neutral[name], plain[name]) for name in plain)
    assert not torch.equal(acting["head.weight"], plain["head.weight"])
    joint, remix = numbers_of(tmp_path / "a")
    assert joint["balance/moddrop_kept"] == 0.5, "each clip keeps one of two"
    # Each clip's unimodal loss is that of the modality it keeps, with the weight of batches of one modality, 1.
    unimodal = joint["train_loss"] - joint["train_ce_joint"]
    own = sorted(joint[f"train_ce_{name}"] for name in ("audio", "video"))
    assert own[0] - 1e-4 <= unimodal <= own[1] + 1e-4
    assert "balance/moddrop_kept" not in remix and remix["n_audio"] + remix["n_video"] == 31


def test_every_option_is_documented():
    text = (REPO / "docs/balance.md").read_text()
    for name, method in METHODS.items():
        assert f"`{name}`" in text
        for option in method.options:
            assert f"`{option.name}`" in text or f"`{option.name}=" in text, (name, option.name)
            if option.default is not None:
                shown = option.default if isinstance(option.default, str) else f"{option.default:g}"
                assert re.search(rf"`{option.name}( = |=| ){re.escape(shown)}", text), (name, option.name, shown)
