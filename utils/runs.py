"""Runs' folders as data: finished told from unfinished, grouped by the flags that matter, averaged over seeds.

Reads the JSON files of DESIGN section 4 and nothing else: no model, no data set. A group is the same experiment with
several seeds; a data set is what several groups were measured on.
"""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from utils.errors import UserError
from utils.logging import read_metrics

# Names for flags worth a name of their own, usable as a method of `utils.compare` and used as a row's label:
# joint training without the unimodal losses, and the control that remixes but does not choose.
VARIANTS = {
    "joint_only": ("baseline", {"alpha": 0.0, "beta": 0.0}),
    "remix_random": ("remix", {"score": "random"}),
}
ORDER = ("baseline", "joint_only", "remix", "remix_random", "audio", "video")  # of the rows; others follow

# What changes where and how a run is made but not what comes out.
HOW = {"run_name", "log_path", "num_workers", "cache", "device", "gpu_ids", "resume", "train", "preset", "diagnose",
       "save_every", "compile"}  # fmt: skip
# Beside these, what is told apart elsewhere: the seed within a group, the data between groups.
IRRELEVANT = HOW | {"random_seed", "dataset", "data_root", "n_classes", "allow_missing"}
NOT_FLAGS = {"from_preset", "data", "versions", "git_commit", "hardware", "command"}
REMIX_ONLY = {"warmup", "score", "keep", "rescore_every", "batch_order", "masked_encoder"}
# Flags a method never reads: a grid over them gives the same run again and again. Beside one modality there is nothing
# to balance.
UNREAD = {
    "baseline": REMIX_ONLY | {"gamma1", "gamma2"},
    "audio": REMIX_ONLY | {"alpha", "beta", "gamma1", "balance"},
    "video": REMIX_ONLY | {"alpha", "beta", "gamma2", "balance"},
}

QUANTITIES = {
    "multimodal": "test_acc",
    "audio": "test_acc_audio",
    "video": "test_acc_video",
    "macro F1": "test_f1_macro",
}
PROTOCOLS = {
    "last": "last epoch",
    "best_test": "best on test (papers' protocol)",
    "best_val": "best on validation",
}


class Run(NamedTuple):
    """One run's folder: its flags and records, one dict per epoch; `problem` says why it does not count, else ""."""

    folder: Path
    config: dict
    history: list[dict]
    problem: str

    @property
    def seed(self) -> int:
        return self.config["random_seed"]

    @property
    def method(self) -> str:
        return self.config["method"]


class Group(NamedTuple):
    """The same experiment with several seeds: `runs` by seed, `flags` those that matter to its method."""

    label: str
    method: str
    flags: dict
    runs: dict[int, Run]


class Spread(NamedTuple):
    """n values in a mean and a standard deviation (n - 1 in the denominator), None where n is 1."""

    n: int
    mean: float
    std: float | None


class Difference(NamedTuple):
    """Mean of n paired differences and its 95% t interval, None where n is 1."""

    n: int
    mean: float
    low: float | None
    high: float | None


# ---------------------------------------------------------------------------------------------------------- reading


def find_runs(paths: Iterable[Path | str]) -> list[Run]:
    """The runs in `paths`, each a run's folder or a folder of runs at any depth, every run once.

    Raises `UserError` for a path that is not there, and when there is no run at all.
    """
    folders: dict[Path, None] = {}
    paths = [Path(path) for path in paths]
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; give runs or a folder of runs, such as runs")
        found = [path] if (path / "config.json").is_file() else sorted(p.parent for p in path.rglob("config.json"))
        folders |= dict.fromkeys(folder for folder in found if ".tmp-" not in str(folder))
    if not folders:
        raise UserError(f"{', '.join(map(str, paths))}: no run in here (a run has a config.json); "
                        "make some: bash scripts/run_compare.sh")  # fmt: skip
    return [read_run(folder) for folder in folders]


def read_run(folder: Path) -> Run:
    """One run. It counts as finished when its summary and its last epoch are those its config asks for."""
    config, summary, history = _read(folder / "config.json"), _read(folder / "summary.json"), read_metrics(folder)
    if not config or not {"method", "dataset", "random_seed", "epochs"} <= config.keys():
        return Run(folder, config or {}, history, "config.json is unreadable or not of train.py")
    done, asked = history[-1]["epoch"] + 1 if history else 0, config["epochs"]
    if summary is None or summary.get("epochs") != asked or done != asked:
        return Run(folder, config, history, f"unfinished: {done} of {asked} epochs")
    missing = [key for key in QUANTITIES.values() if key not in history[-1]]
    return Run(folder, config, history, f"metrics.jsonl has no {', '.join(missing)}" if missing else "")


def _read(path: Path) -> dict | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


# --------------------------------------------------------------------------------------------------------- grouping


def flags_of(config: dict) -> dict:
    """The flags of a run that can change its result. One that is off counts as absent: older runs do not have it."""
    skip = IRRELEVANT | NOT_FLAGS | UNREAD.get(config["method"], set()) | {"method"}
    absent = (None, False)  # compared by identity: 0.0 == False
    own = {name: value for name, value in sorted(config.items()) if name not in skip}
    own = {name: value for name, value in own.items() if not any(value is nothing for nothing in absent)}
    return {name: value for name, value in own.items() if (name, value) != ("balance", "none")}


def dataset_of(config: dict) -> str:
    """What a run was measured on, in words: data set, another folder than its own, another split than the published."""
    name, split = config["dataset"], config.get("data", {}).get("split", {}).get("name")
    if "data_root" not in config.get("from_preset", {}):
        root = Path(config["data_root"]).name
        name = root if name == "folder" or root.startswith(name) else f"{name} in {root}"
    return f"{name}, {split} split" if split not in (None, "official", "demo") else name


def group_runs(runs: list[Run]) -> tuple[dict[str, list[Group]], list[tuple[Run, str]]]:
    """Groups of finished runs by data set, and the runs left out with the reason, unfinished and repeated ones."""
    left_out = [(run, run.problem) for run in runs if run.problem]
    found: dict[str, dict[tuple, dict[int, Run]]] = {}
    for run in sorted((run for run in runs if not run.problem), key=_finished_at, reverse=True):
        key = (run.method, json.dumps(flags_of(run.config)))
        seeds = found.setdefault(_dataset_key(run.config), {}).setdefault(key, {})
        if run.seed in seeds:
            left_out.append((run, f"same flags and seed as the newer {seeds[run.seed].folder}"))
        else:
            seeds[run.seed] = run
    names = _dataset_names(found)
    datasets = {names[key]: _label([dict(sorted(seeds.items())) for seeds in groups.values()])
                for key, groups in found.items()}  # fmt: skip
    return dict(sorted(datasets.items(), key=lambda item: (not item[0].startswith("demo"), item[0]))), left_out


def _finished_at(run: Run) -> float:
    return (run.folder / "summary.json").stat().st_mtime


def _dataset_key(config: dict) -> tuple:
    """Equal only for runs measured on the same test clips, as far as config.json tells. A held-out part is a flag."""
    clips = config.get("data", {}).get("clips", {})
    return dataset_of(config), clips.get("test"), clips.get("train", 0) + clips.get("val", 0)


def _dataset_names(keys: Iterable[tuple]) -> dict[tuple, str]:
    """A name for each data set; the numbers of clips join in where the words alone are the same."""
    keys = list(keys)
    words = [key[0] for key in keys]
    return {key: key[0] if words.count(key[0]) == 1 else f"{key[0]}, {key[2]} + {key[1]} clips" for key in keys}


def _label(groups: list[dict[int, Run]]) -> list[Group]:
    """Name the groups of one data set: the method, or its variant, with the balance methods beside it, and the given
    flags in which its groups differ."""
    named: list[Group] = []
    flags = [flags_of(_any(runs).config) for runs in groups]
    for runs, own in zip(groups, flags, strict=True):
        method = _any(runs).method
        peers = [other for other, seeds in zip(flags, groups, strict=True) if _any(seeds).method == method]
        differing = {name for peer in peers for name in peer.keys() | own.keys() if peer.get(name) != own.get(name)}
        given = {name for run in runs.values() for name in own if name not in run.config.get("from_preset", {})}
        base, shown = _variant(method, own)
        base = " + ".join([base, *own.get("balance", "").split(",")]) if "balance" in own else base
        label = _words(base, own, differing & given - shown - {"balance"})
        named.append(Group(label, method, own, runs))
    # Two presets may differ in flags that nobody gave: groups of one label get all in which they differ.
    told = [group._replace(label=_words(group.label, group.flags, _differing(group, named))) for group in named]
    return sorted(told, key=lambda group: (_rank(group), group.label))


def _differing(group: Group, groups: list[Group]) -> set[str]:
    twins = [other.flags for other in groups if other.label == group.label]
    names = group.flags.keys() | {name for twin in twins for name in twin}
    return {name for name in names if any(twin.get(name) != group.flags.get(name) for twin in twins)}


def _any(runs: dict[int, Run]) -> Run:
    return next(iter(runs.values()))


def _variant(method: str, flags: dict) -> tuple[str, set[str]]:
    for name, (of, values) in VARIANTS.items():
        if of == method and all(flags.get(flag) == value for flag, value in values.items()):
            return name, set(values)
    return method, set()


def _words(label: str, flags: dict, names: set[str]) -> str:
    return ", ".join([label, *(f"{name} {short(flags.get(name, 'off'))}" for name in sorted(names))])


def short(value) -> str:
    """A flag's value as one would type it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _rank(group: Group) -> int:
    name = group.label.split(",")[0]
    return ORDER.index(name) if name in ORDER else len(ORDER)


# ------------------------------------------------------------------------------------------------------- statistics


def protocol_line(run: Run, protocol: str) -> dict | None:
    """The epoch's numbers a protocol reports; None without a validation part. The first of equally good epochs."""
    if protocol == "last":
        return run.history[-1]
    part = protocol.removeprefix("best_")
    if any(line.get(f"{part}_acc") is None for line in run.history):
        return None
    return max(run.history, key=lambda line: line[f"{part}_acc"])


def values(group: Group, quantity: str, protocol: str = "last") -> dict[int, float]:
    """A quantity (a key of `QUANTITIES`) by seed, as a fraction in [0, 1]. Empty if it was not trained or measured."""
    if quantity in ("audio", "video") and not _head_is_trained(group, quantity):
        return {}
    lines = {seed: protocol_line(run, protocol) for seed, run in group.runs.items()}
    found = {seed: line[QUANTITIES[quantity]] for seed, line in lines.items() if line is not None}
    return {seed: value for seed, value in found.items() if value is not None}


def _head_is_trained(group: Group, head: str) -> bool:
    """Whether any loss reached the unimodal head: a weight of 0 leaves it as it was drawn."""
    joint, remixed = ("alpha", "gamma2") if head == "audio" else ("beta", "gamma1")
    weights = {"baseline": (joint,), "remix": (joint, remixed)}.get(group.method, ())
    return not weights or any(group.flags.get(name, 0) != 0 for name in weights)


def spread(numbers: Iterable[float]) -> Spread | None:
    """Mean and sample standard deviation of n numbers; None if there are none."""
    array = np.array(list(numbers), dtype=float)
    if not len(array):
        return None
    return Spread(len(array), float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None)


def paired_difference(ours: dict[int, float], theirs: dict[int, float]) -> Difference | None:
    """ours - theirs over the seeds both have, with a 95% t interval; None if they share no seed.

    Pairing takes out what a seed does to both: the same initial weights and the same order of clips.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    found = spread(ours[seed] - theirs[seed] for seed in seeds)
    if found is None or found.std is None:
        return found and Difference(found.n, found.mean, None, None)
    half = stats.t.ppf(0.975, found.n - 1) * found.std / np.sqrt(found.n)
    return Difference(found.n, found.mean, float(found.mean - half), float(found.mean + half))


def reference_of(group: Group, groups: list[Group]) -> Group | None:
    """The plain baseline a group is compared with: of several, the one whose flags differ least. None for itself."""
    variants = set(VARIANTS)
    baselines = [g for g in groups if g.method == "baseline" and g.label.split(",")[0] not in variants]
    baselines = [g for g in baselines if "balance" not in g.flags]
    if not baselines:
        return None
    best = min(baselines, key=lambda baseline: len(differing_flags(group, baseline)))
    return None if best is group else best


def differing_flags(group: Group, reference: Group) -> list[str]:
    """Flags that both methods read and that are not the same in both, the group's own variant and balance aside."""
    shared = group.flags.keys() | reference.flags.keys()
    shared -= (
        UNREAD.get(group.method, set()) | UNREAD.get(reference.method, set()) | _variant(group.method, group.flags)[1]
    )
    if "balance" in group.flags:  # it and its flags, which no run without it has
        shared -= group.flags.keys() - reference.flags.keys()
    return sorted(name for name in shared if group.flags.get(name) != reference.flags.get(name))


def ablations(groups: list[Group]) -> list[tuple[Group, Group, str]]:
    """(group, the one it is held against, the flag that differs) for groups one flag away from their method's centre.

    The centre is the group of a method with the most such neighbours, two at least: what is ablated.
    """

    def flag_between(one: Group, other: Group) -> str | None:
        names = {name for name in one.flags.keys() | other.flags.keys() if one.flags.get(name) != other.flags.get(name)}
        return names.pop() if len(names) == 1 else None

    found = []
    for method in dict.fromkeys(group.method for group in groups):
        own = [group for group in groups if group.method == method]
        centre = max(own, key=lambda group: sum(flag_between(group, other) is not None for other in own))
        near = [(group, centre, name) for group in own if (name := flag_between(group, centre))]
        found += near if len(near) > 1 else []
    return found


def mean_by_epoch(group: Group, key: str) -> tuple[list[int], list[float]]:
    """Epochs that have the number `key` in every run of the group, and its mean over the runs in each."""
    histories = [{line["epoch"]: line[key] for line in run.history if line.get(key) is not None}
                 for run in group.runs.values()]  # fmt: skip
    epochs = sorted(set.intersection(*map(set, histories)))
    return epochs, [float(np.mean([history[epoch] for history in histories])) for epoch in epochs]


def minutes(group: Group) -> Spread | None:
    """Minutes of a run: scoring, training and evaluation of all epochs, over as many attempts as it took."""
    keys = ("seconds_score", "seconds_train", "seconds_eval")
    return spread(sum(line.get(key) or 0 for line in run.history for key in keys) / 60 for run in group.runs.values())


def epoch_cost(group: Group, reference: Group) -> float | None:
    """An epoch's scoring and training in those of the reference: mean of the ratios over the seeds both have.

    None if they share no seed. What a balance method does between epochs counts, as scoring.
    """
    seconds = [
        {seed: np.mean([line["seconds_train"] + (line.get("seconds_score") or 0) for line in run.history])
         for seed, run in g.runs.items()} for g in (group, reference)
    ]  # fmt: skip
    found = spread(seconds[0][seed] / seconds[1][seed] for seed in seconds[0].keys() & seconds[1].keys())
    return found and found.mean


def command_of(group: Group) -> str:
    """A line of shell that makes the group's runs again, from what was typed."""
    drop = {"--random_seed", "--log_path", "--run_name", "--num_workers", "--gpu_ids", "--device", "--cache"}
    words = _any(group.runs).config.get("command", "")
    kept, skip = [], False
    for word in shlex.split(words)[1:]:
        if skip or word.split("=")[0] in drop or word in ("--resume", "--diagnose"):
            skip = not skip and word in drop
            continue
        kept.append(word)
    line = f"python train.py {shlex.join(kept)} --random_seed"
    seeds = list(group.runs)
    if len(seeds) == 1:
        return f"{line} {seeds[0]}"
    return f"for seed in {' '.join(map(str, seeds))}; do {line} $seed; done"
