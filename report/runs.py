"""Read run folders: find finished runs, group them by the relevant flags, average over seeds.

Only the JSON files of the run folders are read: no model, no clips. A group is one experiment with several seeds; a
dataset is what several groups were measured on.
"""

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from dataset.specs import AUDIO, VIDEO
from utils.errors import UserError
from utils.run import HOW, modern, read_metrics

# Named settings, used as a method of `report.compare` and as a row label: joint training without the unimodal losses,
# and the control that assigns random modalities.
VARIANTS = {
    "joint_only": ("baseline", {"alpha": 0.0, "beta": 0.0}),
    "remix_random": ("remix", {"score": "random"}),
}
ORDER = ("baseline", "joint_only", "remix", "remix_random")  # first rows; the modalities follow, then all others

# Flags that do not define a group: besides `HOW`, the seed (differs within a group) and the data (one table each).
IRRELEVANT = HOW | {"random_seed", "dataset", "data_root", "n_classes", "allow_missing"}
NOT_FLAGS = {"from_preset", "data", "versions", "git_commit", "hardware", "command"}
REMIX_ONLY = {"warmup", "score", "keep", "rescore_every", "reassemble", "masked_encoder"}
# Official flags: the weight of a modality's loss in joint batches, and in its homogeneous batches. All modalities but
# video have audio's.
WEIGHTS = {AUDIO: ("alpha", "gamma2"), VIDEO: ("beta", "gamma1")}
# Balance options of older runs were flags with these prefixes: --ogm_alpha is now the option alpha of ogm_ge.
FORMER_PREFIXES = {name: name for name in ("agm", "dr", "gblend", "mmcosine", "mmpareto", "opm", "pmr")} | {
    "ogm": "ogm_ge"
}

PROTOCOLS = {
    "last": "last epoch",
    "best_test": "best on test (papers' protocol)",
    "best_val": "best on validation",
}


def quantities(modalities: Sequence[str]) -> dict[str, str]:
    """Table columns -> keys in metrics.jsonl."""
    heads = {"multimodal": "test_acc"} | {name: f"test_acc_{name}" for name in modalities}
    return heads | {"macro F1": "test_f1_macro"}


def diagnoses(modalities: Sequence[str]) -> dict[str, str]:
    """Keys of `train.py --diagnose` in metrics.jsonl, without `diagnose/`, that are shown -> title of the figure.

    The share of the last modality follows from the others. `unimodal_gap` is of older runs with two modalities.
    """
    cosine, share = "encoder: cosine of joint\nand unimodal gradient", "share of clips that keep"
    return {
        **{f"clash_cosine_{name}": f"{name} {cosine}" for name in modalities},
        **{f"shapley_{name}": f"Shapley value of {name}" for name in modalities},
        "unimodal_gap": f"accuracy of the {modalities[0]} head minus\nthe {modalities[-1]} head",
        "ece_joint": "calibration error, joint head",
        **{f"kept_{name}": f"{share} {name}" for name in modalities[:-1]},
        "moved": "share of clips that changed\nmodality since the last scoring",
    }


def unread(method: str) -> set[str]:
    """Flags that a method does not read: a grid over them repeats the same run.

    `method` is baseline, remix or the name of a modality: a unimodal network has nothing to balance.
    """
    if method == "remix":
        return set()
    gammas = {remixed for _, remixed in WEIGHTS.values()}
    if method == "baseline":
        return REMIX_ONLY | gammas
    alphas = {joint for joint, _ in WEIGHTS.values()}
    return (REMIX_ONLY | alphas | gammas | {"balance", "balance_options"}) - set(
        WEIGHTS.get(method, WEIGHTS[AUDIO])[1:]
    )


class Run(NamedTuple):
    """A run folder: config and metrics, one dict per epoch; `problem` is the reason to exclude it, else ""."""

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

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names in the dataset's order. For older runs, which do not record them: those with a test accuracy."""
        named = self.config.get("data", {}).get("modalities")
        if named is None:
            last = self.history[-1] if self.history else {}
            named = [key.removeprefix("test_acc_") for key in last if key.startswith("test_acc_")]
        return tuple(named)


class Group(NamedTuple):
    """One experiment with several seeds: `runs` by seed; `flags` are those its method reads, see `flags_of`."""

    label: str
    method: str
    flags: dict
    runs: dict[int, Run]
    modalities: tuple[str, ...]


def group_of(label: str, runs: dict[int, Run]) -> Group:
    """The group of these runs by seed, which differ in their seed only."""
    first = next(iter(runs.values()))
    return Group(label, first.method, flags_of(first.config), runs, first.modalities)


class Spread(NamedTuple):
    """Mean and sample standard deviation of n values; `std` is None where n is 1."""

    n: int
    mean: float
    std: float | None


class Difference(NamedTuple):
    """Mean of n paired differences and its 95 % t interval; `low` and `high` are None where n is 1."""

    n: int
    mean: float
    low: float | None
    high: float | None


# ---------------------------------------------------------------------------------------------------------- reading


def find_runs(paths: Iterable[Path | str]) -> list[Run]:
    """The runs in `paths`, each a run's folder or a folder of runs at any depth. Duplicates are removed.

    Raises `UserError` for a path that does not exist, and if there is no run at all.
    """
    folders: dict[Path, None] = {}
    paths = [Path(path) for path in paths]
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; give runs or a folder of runs, such as runs")
        found = [path] if (path / "config.json").is_file() else sorted(p.parent for p in path.rglob("config.json"))
        folders |= dict.fromkeys(folder for folder in found if ".tmp-" not in str(folder))
    if not folders:
        raise UserError(f"{', '.join(map(str, paths))}: contains no run (a folder with a config.json); "
                        "create some with bash scripts/run_compare.sh")  # fmt: skip
    return [read_run(folder) for folder in folders]


def read_run(folder: Path) -> Run:
    """One run. It is finished if its summary and its last epoch match the epochs in its config."""
    config, summary, history = _read(folder / "config.json"), _read(folder / "summary.json"), read_metrics(folder)
    if not config or not {"method", "dataset", "random_seed", "epochs"} <= config.keys():
        return Run(folder, config or {}, history, "config.json is unreadable or not of train.py")
    done, asked = history[-1]["epoch"] + 1 if history else 0, config["epochs"]
    if summary is None or summary.get("epochs") != asked or done != asked:
        return Run(folder, config, history, f"unfinished: {done} of {asked} epochs")
    run = Run(folder, modern(config), history, "")
    missing = [key for key in quantities(run.modalities or ("<modality>",)).values() if key not in history[-1]]
    return run._replace(problem=f"metrics.jsonl has no {', '.join(missing)}" if missing else "")


def _read(path: Path) -> dict | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


# --------------------------------------------------------------------------------------------------------- grouping


def flags_of(config: dict) -> dict:
    """The flags of a run that can change its result, sorted by name; two runs of one group have equal ones.

    Balance methods appear as `balance` (names only) and `<method>.<option>`. A flag that is off counts as absent, since
    older runs do not have it. `val_clips` is the size of a validation part that no flag asked for (val.csv).
    """
    skip = IRRELEVANT | NOT_FLAGS | unread(config["method"]) | {"method", "balance_options"}
    options = config.get("balance_options") or {}
    own = {name: value for name, value in config.items() if name not in skip}
    own = {_option_name(name): value for name, value in own.items()}
    own |= {f"{method}.{option}": value for method, values in options.items() for option, value in values.items()}
    if "balance" in own:
        own["balance"] = ",".join(name for name in balance_methods(own["balance"]) if name != "none") or None
    if not config.get("val_fraction"):
        own["val_clips"] = config.get("data", {}).get("clips", {}).get("val")
    absent = (None, False)  # compared by identity: 0.0 == False
    return {name: own[name] for name in sorted(own) if not any(own[name] is nothing for nothing in absent)}


def _option_name(flag: str) -> str:
    """`ogm_alpha` -> `ogm_ge.alpha`; other flags unchanged."""
    prefix, _, option = flag.partition("_")
    return f"{FORMER_PREFIXES[prefix]}.{option}" if option and prefix in FORMER_PREFIXES else flag


def balance_methods(text: str) -> list[str]:
    """The names in a value of `--balance`, options left out: `ogm_ge:alpha=0.8,pmr` -> ogm_ge, pmr."""
    return re.findall(r"(?:^|,)(\w+)(?=[:,]|$)", text)


def dataset_of(config: dict) -> str:
    """The dataset of a run, with its folder and its split if they are not the default ones."""
    name, split = config["dataset"], config.get("data", {}).get("split", {}).get("name")
    if "data_root" not in config.get("from_preset", {}):
        root = Path(config["data_root"]).name
        name = root if name == "folder" or root.startswith(name) else f"{name} in {root}"
    return f"{name}, {split} split" if split not in (None, "official", "demo") else name


def group_runs(runs: list[Run]) -> tuple[dict[str, list[Group]], list[tuple[Run, str]]]:
    """Groups of finished runs by dataset, and the runs left out with the reason: unfinished and repeated ones."""
    left_out = [(run, run.problem) for run in runs if run.problem]
    found: dict[tuple, dict[tuple, dict[int, Run]]] = {}
    for run in sorted((run for run in runs if not run.problem), key=_finished_at, reverse=True):
        key = (run.method, json.dumps(flags_of(run.config)))
        seeds = found.setdefault(_dataset_key(run), {}).setdefault(key, {})
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


def _dataset_key(run: Run) -> tuple:
    """Equal only for runs measured on the same test clips and modalities, as far as config.json says.

    Train and validation clips are counted together: a part held out of train is a setting, not another dataset.
    """
    clips = run.config.get("data", {}).get("clips", {})
    return dataset_of(run.config), clips.get("test"), clips.get("train", 0) + clips.get("val", 0), run.modalities


def _dataset_names(keys: Iterable[tuple]) -> dict[tuple, str]:
    """A unique name for each dataset: the words, then the numbers of clips, then the modalities where needed."""
    names = {key: key[0] for key in keys}
    for more in (lambda key: f"{key[2]} + {key[1]} clips", lambda key: " and ".join(key[3])):
        times = Counter(names.values())
        names = {key: name if times[name] == 1 else f"{name}, {more(key)}" for key, name in names.items()}
    return names


def _label(seeds: list[dict[int, Run]]) -> list[Group]:
    """Name the groups of one dataset: the method or its variant, the balance methods, and the flags that differ.

    Flags are named where they were given on the command line; a balance option only beside the same balance methods.
    """
    firsts = [next(iter(runs.values())) for runs in seeds]
    groups = [Group("", first.method, flags_of(first.config), runs, first.modalities)
              for first, runs in zip(firsts, seeds, strict=True)]  # fmt: skip
    named = []
    for group in groups:
        own = group.flags
        peers = [other.flags for other in groups if other.method == group.method]
        alike = [peer for peer in peers if peer.get("balance") == own.get("balance")]
        differing = {name for peer in peers for name in _unequal(peer, own) if "." not in name}
        differing |= {name for peer in alike for name in _unequal(peer, own) if "." in name}
        given = {name for run in group.runs.values() for name in own if name not in run.config.get("from_preset", {})}
        base, shown = _variant(group.method, own)
        base = " + ".join([base, *own["balance"].split(",")]) if "balance" in own else base
        named.append(group._replace(label=_words(base, own, differing & given - shown - {"balance"})))
    # Two presets may differ in flags that were not given: groups with equal labels show the preset, or, where it is not
    # recorded or not what differs, all flags that differ.
    complete = []
    for group in named:
        twins = [other for other in named if other.label == group.label]
        presets = [_preset(twin) for twin in twins]
        if len(twins) > 1 and None not in presets and len(set(presets)) == len(twins):
            complete.append(group._replace(label=f"{group.label}, preset {_preset(group)}"))
            continue
        more = {name for twin in twins for name in _unequal(twin.flags, group.flags)}
        complete.append(group._replace(label=_words(group.label, group.flags, more)))
    return sorted(complete, key=lambda group: (_rank(group), group.label))


def _preset(group: Group) -> str | None:
    return next(iter(group.runs.values())).config.get("preset")


def _unequal(one: dict, other: dict) -> set[str]:
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


def _variant(method: str, flags: dict) -> tuple[str, set[str]]:
    for name, (base, values) in VARIANTS.items():
        if base == method and all(flags.get(flag) == value for flag, value in values.items()):
            return name, set(values)
    return method, set()


def _words(label: str, flags: dict, names: set[str]) -> str:
    return ", ".join([label, *(f"{name} {short(flags.get(name, 'off'))}" for name in sorted(names))])


def short(value) -> str:
    """The value of a flag as on the command line."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _rank(group: Group) -> int:
    order = (*ORDER, *group.modalities)
    name = group.label.split(",")[0]
    return order.index(name) if name in order else len(order)


# ------------------------------------------------------------------------------------------------------- statistics


def protocol_line(run: Run, protocol: str, first: int = 0) -> dict | None:
    """The metrics of the epoch that a protocol selects, the first one on a tie; None without a validation part.

    Epochs before `first` are not selected, except in a run that has no others.
    """
    if protocol == "last":
        return run.history[-1]
    part = protocol.removeprefix("best_")
    if any(line.get(f"{part}_acc") is None for line in run.history):
        return None
    lines = [line for line in run.history if line["epoch"] >= first] or run.history[-1:]
    return max(lines, key=lambda line: line[f"{part}_acc"])


def values(group: Group, quantity: str, protocol: str = "last", first: int = 0) -> dict[int, float]:
    """A quantity (a key of `quantities`) by seed, as a fraction in [0, 1]. Empty if it was not trained or measured.

    `protocol` and `first` select the epoch, see `protocol_line`.
    """
    if quantity in group.modalities and not head_is_trained(group.method, group.flags, quantity):
        return {}
    key = quantities(group.modalities)[quantity]
    lines = {seed: protocol_line(run, protocol, first) for seed, run in group.runs.items()}
    found = {seed: line[key] for seed, line in lines.items() if line is not None}
    return {seed: value for seed, value in found.items() if value is not None}


def head_is_trained(method: str, flags: dict, head: str) -> bool:
    """Whether some unimodal loss of `head` had a weight above 0.

    Runs record None for an untrained head; older ones recorded the accuracy of its initial weights.
    """
    if method not in ("baseline", "remix") or head not in WEIGHTS:
        return True
    joint, remixed = WEIGHTS[head]
    warmup = flags.get("warmup", 0) if method == "remix" else flags["epochs"]
    used = {joint: warmup > 0, remixed: warmup < flags["epochs"]}
    return any(flags.get(name) != 0 for name, is_used in used.items() if is_used)


def spread(numbers: Iterable[float]) -> Spread | None:
    """Mean and sample standard deviation of n numbers; None if there are none."""
    array = np.array(list(numbers), dtype=float)
    if not len(array):
        return None
    return Spread(len(array), float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None)


def paired_difference(ours: dict[int, float], theirs: dict[int, float]) -> Difference | None:
    """Mean of ours - theirs over the seeds both have, with a 95 % t interval; None if they share no seed.

    Pairing removes the effects of a seed that both share: the initial weights and the order of clips.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    found = spread(ours[seed] - theirs[seed] for seed in seeds)
    if found is None or found.std is None:
        return found and Difference(found.n, found.mean, None, None)
    half = stats.t.ppf(0.975, found.n - 1) * found.std / np.sqrt(found.n)
    return Difference(found.n, found.mean, float(found.mean - half), float(found.mean + half))


def excludes_zero(low: float | None, high: float | None) -> bool:
    """Whether there is an interval, and zero is not in it."""
    return low is not None and high is not None and (low > 0 or high < 0)


def p_value(ours: dict[int, float], theirs: dict[int, float]) -> float | None:
    """p value of a two-sided paired t test over the common seeds; None for fewer than two seeds or zero variance."""
    pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if len(pairs) < 2 or np.ptp(pairs) == 0:
        return None
    t = np.mean(pairs) / (np.std(pairs, ddof=1) / len(pairs) ** 0.5)
    return float(2 * stats.t.sf(abs(t), len(pairs) - 1))


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction: adjusted p values, in the order given (Scandinavian Journal of Statistics, 1979).

    None stands for a row without a test. It stays None and does not count.
    """
    tested = sorted((value, i) for i, value in enumerate(p) if value is not None)
    adjusted: list[float | None] = [None] * len(p)
    highest = 0.0
    for rank, (value, i) in enumerate(tested):
        adjusted[i] = highest = max(highest, min(1.0, (len(tested) - rank) * value))
    return adjusted


def reference_of(group: Group, groups: list[Group]) -> Group | None:
    """The plain baseline a group is compared with: of several, the one with the fewest differing flags.

    None for that baseline itself. "Plain" is without balance methods and not a variant.
    """
    baselines = [g for g in groups if g.method == "baseline" and "balance" not in g.flags]
    baselines = [g for g in baselines if _variant(g.method, g.flags)[0] == g.method]
    if not baselines:
        return None
    best = min(baselines, key=lambda baseline: len(differing_flags(group, baseline)))
    return None if best is group else best


def differing_flags(group: Group, reference: Group) -> list[str]:
    """Flags that both methods read and in which they differ, except those that define the group's method.

    The latter are the flags of its variant, and its balance methods with their options.
    """
    names = _unequal(group.flags, reference.flags) - _variant(group.method, group.flags)[1]
    names -= unread(group.method) | unread(reference.method)
    if "balance" in group.flags:
        names = {name for name in names if name != "balance" and "." not in name}
    return sorted(names)


def ablations(groups: list[Group]) -> list[tuple[Group, Group, str]]:
    """(group, the group it is compared with, the flag that differs), one flag away from their method's centre.

    The centre is the group of a method with the most such neighbours, at least two: the ablated setting.
    """

    def flag_between(one: Group, other: Group) -> str | None:
        names = _unequal(one.flags, other.flags)
        return names.pop() if len(names) == 1 else None

    found = []
    for method in dict.fromkeys(group.method for group in groups):
        own = [group for group in groups if group.method == method]
        centre = max(own, key=lambda group: sum(flag_between(group, other) is not None for other in own))
        near = [(group, centre, name) for group in own if (name := flag_between(group, centre))]
        found += near if len(near) > 1 else []
    return found


def mean_by_epoch(group: Group, key: str) -> tuple[list[int], list[float]]:
    """Epochs in which every run of the group has the number `key`, and its mean over the runs."""
    histories = [{line["epoch"]: line[key] for line in run.history if line.get(key) is not None}
                 for run in group.runs.values()]  # fmt: skip
    epochs = sorted(set.intersection(*map(set, histories)))
    return epochs, [float(np.mean([history[epoch] for history in histories])) for epoch in epochs]


def origin(runs: Sequence[Run]) -> str:
    """Machines, commits and hours of training of runs, for the page that is made from them."""
    machines = sorted({f"{run.config['hardware']['cpu']}, {run.config['hardware']['device']}" for run in runs})
    commits = sorted({str(run.config.get("git_commit"))[:12] for run in runs})
    hours = sum(map(seconds, runs)) / 3600
    return f"{', '.join(machines)}; commits {', '.join(commits)}; {hours:.1f} hours of training in all"


def seconds(run: Run) -> float:
    """Seconds of scoring, training and evaluation over all epochs of a run, including resumed attempts."""
    return sum(line.get(f"seconds_{part}") or 0 for line in run.history for part in ("score", "train", "eval"))


def minutes(group: Group) -> Spread:
    """Minutes of a run, see `seconds`."""
    found = spread(seconds(run) / 60 for run in group.runs.values())
    assert found is not None  # a group has at least one run
    return found


def epoch_cost(group: Group, reference: Group) -> float | None:
    """Seconds of scoring and training per epoch, relative to the reference: mean ratio over the seeds both have.

    None if they share no seed. What a balance method computes between epochs counts as scoring.
    """
    seconds = [
        {seed: float(np.mean([line["seconds_train"] + (line.get("seconds_score") or 0) for line in run.history]))
         for seed, run in g.runs.items()} for g in (group, reference)
    ]  # fmt: skip
    found = spread(seconds[0][seed] / seconds[1][seed] for seed in seconds[0].keys() & seconds[1].keys())
    return found and found.mean


def command_of(group: Group) -> str:
    """A shell command that repeats the group's runs, derived from the command of its first run."""
    drop = {"--random_seed", "--log_path", "--run_name", "--num_workers", "--gpu_ids", "--device", "--cache",
            "--resume", "--diagnose"}  # fmt: skip
    kept, dropped = [], False
    for word in shlex.split(next(iter(group.runs.values())).config.get("command", ""))[1:]:
        dropped = word.split("=")[0] in drop if word.startswith("--") else dropped  # values follow their flag
        kept += [] if dropped else [word]
    line = f"python train.py {shlex.join(kept)} --random_seed"
    seeds = list(group.runs)
    if len(seeds) == 1:
        return f"{line} {seeds[0]}"
    return f"for seed in {' '.join(map(str, seeds))}; do {line} $seed; done"
