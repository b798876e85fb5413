"""Run folders made by hand, for the tests of reports."""

import json
from pathlib import Path

from report.runs import Group, find_runs, group_runs

PRESET = {"epochs": 4, "warmup": 1, "learning_rate": 1e-3, "alpha": 0.5, "beta": 0.5, "gamma1": 1.0, "gamma2": 1.0,
          "score": "kl", "batch_size": 64, "data_root": "data/demo", "encoder": "resnet18_thin"}  # fmt: skip


def make_run(
    root: Path,
    method: str,
    seed: int,
    accuracies=(0.5, 0.6, 0.8, 0.7),
    val=None,
    name: str = "",
    data=None,
    names: tuple[str, ...] | None = None,
    **given,
) -> Path:
    """A finished run's folder; the heads' numbers follow from the joint head's: audio - 0.1, video - 0.2, F1 - 0.01.

    `names` are the modalities in config.json; without them it is an older run, of audio and video.
    """
    folder = root / (name or f"{method}_{seed}_{len(list(root.glob('*')))}")
    folder.mkdir(parents=True)
    flags = {"dataset": "demo", "method": method, "random_seed": seed, "run_name": folder.name} | PRESET | given
    command = f"train.py --train --method {method} " + " ".join(f"--{k} {v}" for k, v in given.items())
    config = flags | {
        "from_preset": {key: value for key, value in PRESET.items() if key not in given},
        "data": {"clips": data or {"train": 90, "test": 30}, "split": {"source": "demo"}}
        | ({"modalities": list(names)} if names else {}),
        "command": f"{command} --random_seed {seed} --log_path {root} --run_name {folder.name}",
        "git_commit": "a" * 40, "versions": {"torch": "2.11.0"},
        "hardware": {"device": "cpu", "processes": 1, "cpu": "a CPU", "threads": 1},
    }  # fmt: skip
    lines = []
    for epoch, accuracy in enumerate(accuracies):
        remixed = method == "remix" and epoch >= flags["warmup"]
        line = {"epoch": epoch, "phase": "remix" if remixed else "joint", "train_loss": 1.0, "test_acc": accuracy,
                "test_f1_macro": accuracy - 0.01, "seconds_score": 1.0, "seconds_train": 28.0,
                "seconds_eval": 1.0}  # fmt: skip
        for i, modality in enumerate(names or ("audio", "video")):
            line |= {
                f"test_acc_{modality}": accuracy - 0.1 * (i + 1),
                f"n_{modality}": 30 * (i + 1) if remixed else None,
            }
        lines.append(line | ({"val_acc": val[epoch]} if val else {}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"epochs": flags["epochs"], "total_seconds": 1.0}))
    return folder


def edit_metrics(folder: Path, change) -> None:
    """Replace each line of metrics.jsonl, a dict, by `change(line)`."""
    path = folder / "metrics.jsonl"
    lines = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def groups_of(root: Path) -> list[Group]:
    datasets, _ = group_runs(find_runs([root]))
    assert len(datasets) == 1
    return next(iter(datasets.values()))


def by_label(root: Path) -> dict[str, Group]:
    return {group.label: group for group in groups_of(root)}
