"""Balance methods in whole runs: resumed, on several processes, compared and reported; the documentation's example."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_folder

import train
from balance import METHODS
from report import compare
from utils.errors import Interrupted, UserError
from report.runs import find_runs, group_runs, reference_of

REPO = Path(__file__).resolve().parents[1]
TINY = ["--train", "--dataset", "folder", "--model", "resnet18_thin", "--image_size", "32", "--batch_size", "12"]
TINY += ["--optimizer", "sgd", "--learning_rate", "0.01", "--cache", "ram"]
TIMES = ("seconds_score", "seconds_train", "seconds_eval", "clips_per_second")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"), train=31, test=6)


def run(data, root, name: str, text: str) -> Path:
    train.main([*TINY, "--data_root", str(data), "--log_path", str(root), "--run_name", name, *text.split()])
    return root / name


def lines(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


def signal_at(monkeypatch, at: int) -> None:
    """SIGTERM before training step `at`, a probe's steps counted too."""
    terms, steps = train.loss_terms, []

    def signalled(*args):
        steps.append(0)
        if len(steps) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return terms(*args)

    monkeypatch.setattr(train, "loss_terms", signalled)


@pytest.mark.parametrize("methods", [
    "pmr,gblend,dr --gblend_every 2 --gblend_probe 1 --dr_every 1 --dr_resets 1 --pmr_momentum 0.5",
    "agm,pmr --method baseline",
    "mmcosine,opm,mmpareto,ogm_ge --opm_starts 0 --masked_encoder run --rescore_every 2",
])  # fmt: skip
def test_resume_is_bit_identical(methods, data, tmp_path, monkeypatch):
    """After an epoch, and again after the second step of the next one."""
    monkeypatch.setattr(train, "finish", lambda *_: None)  # pictures take most of so short a run
    text = f"--val_fraction 0.3 --warmup 2 --balance {methods}"
    whole = run(data, tmp_path, "whole", f"{text} --epochs 4")
    part = run(data, tmp_path, "part", f"{text} --epochs 3")
    with pytest.raises(UserError, match=r"--balance .*now none"):
        plain = " ".join(text.split()[:4])
        run(data, tmp_path, "part", f"{plain} --epochs 4 --resume")
    with monkeypatch.context() as patch:
        signal_at(patch, 2)
        with pytest.raises(Interrupted, match="in epoch 3, batch 2 of its training"):
            run(data, tmp_path, "part", f"{text} --epochs 4 --resume")
    run(data, tmp_path, "part", f"{text} --epochs 4 --resume")
    a, b = (torch.load(folder / "last.pth", weights_only=True) for folder in (whole, part))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert a["model"].keys() == train.AVClassifier(3, "resnet18_thin").state_dict().keys()
    assert lines(whole) == lines(part)
    names = {name.split("/")[1].rpartition("_")[0] for line in lines(whole) for name in line if "balance/" in name}
    for method in methods.split()[0].split(","):
        assert method == "mmcosine" or any(name.startswith(method) for name in names), method


WORKER = """
import os, sys
import torch, train
from models import AVClassifier

networks = []

class Network(AVClassifier):  # float64, BatchNorm on its running statistics: processes differ in nothing but sums
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.double()
        networks.append(self)
    def forward(self, audio, video, kept="both"):
        return super().forward(*(x.double() if x is not None else None for x in (audio, video)), kept)
    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        return self

def main(path, *words):
    train.AVClassifier = Network
    train.main(list(words))
    torch.save(networks[0].state_dict(), path + os.environ.get("RANK", ""))

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.mark.parametrize("methods", [
    "mmcosine,opm,pmr,gblend,mmpareto,ogm_ge,dr --opm_starts 0 --gblend_probe 1 --dr_every 1 --dr_views plain",
    "agm,pmr",
])  # fmt: skip
def test_two_processes_train_the_weights_of_one(methods, data, tmp_path, monkeypatch):
    """Batches of 12, 12 and 1 clips fall unevenly on two processes; every method, as many as go together at once."""
    text = f"--val_fraction 0.2 --epochs 3 --warmup 2 --data_root {data} --log_path {tmp_path} --balance {methods}"
    words = [*TINY, *text.split(), "--run_name"]
    (tmp_path / "worker.py").write_text(WORKER)
    worker = {"__name__": "worker"}
    exec(WORKER, worker)
    monkeypatch.setattr(train, "AVClassifier", train.AVClassifier)  # the worker's is taken out again after the test
    worker["main"](str(tmp_path / "one"), *words, "run_one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(tmp_path / "worker.py"), str(tmp_path / "two"), *words, "run_two"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPO)})
    assert done.returncode == 0, done.stderr[-2000:]
    one, first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two0", "two1"))
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-7, msg=name)
    for a, b in zip(*(lines(tmp_path / folder) for folder in ("run_one", "run_two")), strict=True):
        a, b = ({k: v for k, v in line.items() if k.startswith(("balance", "train_loss"))} for line in (a, b))
        assert "train_loss_pmr" in a and a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize(("at", "has"), [(2, "nothing is saved yet"), (14, "last.pth has it")])
def test_a_signal_in_an_estimate_ends_the_run_at_once(at, has, data, tmp_path, monkeypatch):
    """Before the first epoch (an estimate is three times two steps, an epoch two), and before the second."""
    monkeypatch.setattr(train, "finish", lambda *_: None)  # pictures take most of so short a run
    text = "--method baseline --epochs 2 --val_fraction 0.3 --balance gblend --gblend_every 1 --gblend_probe 1"
    whole = run(data, tmp_path, "whole", text)
    with monkeypatch.context() as patch:
        signal_at(patch, at)
        with pytest.raises(Interrupted, match=rf"before epoch {at // 8}, while --balance gblend estimated.*{has}"):
            run(data, tmp_path, "part", text)
    run(data, tmp_path, "part", f"{text} --resume")
    a, b = (torch.load(folder / "last.pth", weights_only=True)["model"] for folder in (whole, tmp_path / "part"))
    assert all(torch.equal(a[name], b[name]) for name in a) and lines(whole) == lines(tmp_path / "part")


# ------------------------------------------------------------------------------------------- comparisons and reports


def plan_of(words: str) -> list[compare.Planned]:
    return compare.make_plan(*compare.parse_args(words.split()), train)


def test_a_grid_over_methods_is_planned_once_for_each(data):
    plan = plan_of("--methods baseline,remix,audio --seeds 0 --grid balance=none,ogm_ge,pmr+agm --ogm_alpha 0.5")
    assert [(run.name, run.flags["balance"], run.flags["ogm_alpha"]) for run in plan] == [
        ("demo_baseline_balance-none_seed0", "none", None),
        ("demo_baseline_balance-ogm_ge_seed0", "ogm_ge", 0.5),
        ("demo_baseline_balance-pmr+agm_seed0", "agm,pmr", None),
        ("demo_remix_balance-none_seed0", "none", None),
        ("demo_remix_balance-ogm_ge_seed0", "ogm_ge", 0.5),
        ("demo_remix_balance-pmr+agm_seed0", "agm,pmr", None),
        ("demo_audio_seed0", "none", None),
    ]
    names = [run.name for run in plan_of("--methods baseline --seeds 0 --grid balance=none,pmr --grid pmr_alpha=1,2")]
    assert names == ["demo_baseline_balance-none_seed0", "demo_baseline_balance-pmr_pmr_alpha-1_seed0",
                     "demo_baseline_balance-pmr_pmr_alpha-2_seed0"]  # fmt: skip
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
                del config["balance"]  # a run from before there were methods
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
    namespace = {"__name__": "cml"}
    exec(compile(code, "docs/balance.md", "exec"), namespace)
    monkeypatch.setitem(METHODS, "cml", namespace["CML"])
    assert len(code.splitlines()) < 60
    neutral, plain, acting = (
        torch.load(run(data, tmp_path, name, f"--warmup 1 {text}") / "last.pth", weights_only=True)["model"]
        for name, text in (
            ("n", "--epochs 1 --balance cml --cml_lambda 0"),
            ("p", "--epochs 1"),
            ("a", "--epochs 2 --balance cml,ogm_ge"),
        )
    )
    assert all(torch.equal(neutral[name], plain[name]) for name in plain)
    assert not torch.equal(acting["head.weight"], plain["head.weight"])
    assert lines(tmp_path / "a")[0]["train_loss_cml"] > 0 and "train_loss_cml" not in lines(tmp_path / "a")[1]


def test_every_flag_is_documented():
    text = (REPO / "docs/balance.md").read_text()
    for name, method in METHODS.items():
        assert f"`{name}`" in text
        for flag in method.flags:
            assert f"`--{flag.name}" in text, flag.name
            if flag.default is not None and not flag.choices:
                assert f"`--{flag.name} {flag.default:g}`" in text, flag.name
