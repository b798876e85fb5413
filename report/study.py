"""Run a study: several datasets, several methods, several seeds, by a protocol that is fixed before the first run.

    bash scripts/evidence.sh --sources DIR                    # where Remix helps
    bash scripts/evidence.sh grid_digits_m10 mosi --seeds 0,1
    bash scripts/evidence.sh --doc docs/results.md --readme README.md
    bash scripts/benchmark.sh --sources DIR                   # all balance methods
    python -m report.study ablations --sources DIR            # flags of Remix, ten seeds

The learning rate of each method is chosen on the validation part, from the same grid for every method, with the first
seed. Then all seeds are trained with that rate. The epoch is chosen on the validation part too, among the epochs after
the warm-up; the test accuracy of that epoch is reported. Run the same command again to resume.
"""

import tempfile
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from balance import METHODS
from dataset.specs import spec_of
from report.compare import (
    Planned,
    alone_in,
    environments,
    exit_status,
    leading_words,
    planned,
    seeds_of,
    take_stock,
    timed_run,
    train_missing,
)
from report.runs import Run, excludes_zero, read_run, seconds
from report.study_data import RECIPES, make
from utils.cli import Parser, number
from utils.errors import UserError, run_main
from utils.run import write_json

RATES = ("3e-4", "1e-3", "3e-3", "1e-2")  # the grid of learning rates, for every method
EPOCHS, WARMUP, DECAY = 24, 6, 18
VAL_FRACTION = "0.15"  # of the training clips, the same clips for every seed

Flags = tuple[tuple[str, str], ...]


class Entry(NamedTuple):
    """A row of a study: a method of `report.compare` with its flags; `base` is the row it is compared with."""

    label: str
    method: str
    flags: Flags = ()
    base: str = "baseline"


class Setting(NamedTuple):
    """A dataset of a study and its rows.

    `rates` are the learning rates that each row chooses from, `quiet` flags that do not change the result. Where
    validation clips say nothing about test clips, `validated` is False and the last epoch is reported. `more_seeds`
    are added for the rows in `MORE_ROWS` where the interval of Remix against the baseline includes zero.
    """

    data: str
    title: str
    rows: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    more_seeds: tuple[int, ...] = (5, 6, 7, 8, 9)
    rates: tuple[str, ...] = RATES
    quiet: tuple[str, ...] = ()
    validated: bool = True
    ranked: bool = False  # rows in the order of their accuracy

    @property
    def protocol(self) -> str:
        """The protocol (`report.runs.PROTOCOLS`) that selects the epoch, among those after the warm-up.

        All methods choose among the same epochs. Otherwise a Remix run could choose an epoch of its joint warm-up.
        """
        return "best_val" if self.validated else "last"


def schedule(epochs: int = EPOCHS, warmup: int = WARMUP, decay: int = DECAY) -> Flags:
    return (("epochs", str(epochs)), ("warmup", str(warmup)), ("lr_decay_step", str(decay)))


def entries(names: Sequence[str]) -> dict[str, Entry]:
    """All rows by name, for a dataset with these modalities.

    With `--keep all` an epoch after the warm-up has as many steps as modalities times a joint epoch's; "same steps"
    has that many fewer epochs.
    """
    after = (EPOCHS - WARMUP) // len(names)
    fewer = schedule(WARMUP + after, WARMUP, WARMUP + round(after * (DECAY - WARMUP) / (EPOCHS - WARMUP)))
    return {
        "baseline": Entry("baseline", "baseline", base=""),
        "joint_only": Entry("baseline, joint loss only", "joint_only"),
        "remix": Entry("Remix", "remix"),
        "random": Entry("Remix, random modality", "remix_random"),
        "keep_all": Entry("Remix, keep all", "remix", (("keep", "all"),)),
        "keep_all_steps": Entry("Remix, keep all, same steps", "remix", (("keep", "all"), *fewer)),
        "masked_run": Entry("Remix, masked encoder runs", "remix", (("masked_encoder", "run"),), "Remix"),
        "rescore_4": Entry("Remix, scored every 4 epochs", "remix", (("rescore_every", "4"),), "Remix"),
        "warmup_2": Entry("Remix, warm-up 2", "remix", (("warmup", "2"),), "Remix"),
        "warmup_12": Entry("Remix, warm-up 12", "remix", (("warmup", "12"),), "Remix"),
        **{name: Entry(f"{name} alone", name) for name in names},
        **balance_entries(),
    }


# Flags that a balance method needs beside its name. D&R's resets follow every 20th of 60 epochs in its paper.
NEEDS = {"greedy": (("model", "mmtm"),), "dr": (("balance", "dr:every=8"),)}
NEEDS_REMIXED = {"mla": (("reassemble", "alternate"),)}


def balance_entries() -> dict[str, Entry]:
    """Every balance method alone, and with Remix."""
    found = {}
    for name in METHODS:
        flags = dict((("balance", name), *NEEDS.get(name, ())))
        found[name] = Entry(name, "baseline", tuple(flags.items()))
        remixed = flags | dict(NEEDS_REMIXED.get(name, ()))
        found[f"{name}+remix"] = Entry(f"{name} + Remix", "remix", tuple(remixed.items()))
    return found


MORE_ROWS = ("baseline", "remix", "random")
MAIN = (*MORE_ROWS, "alone")  # "alone": each modality
ALL = ("baseline", "joint_only", "remix", "random", "keep_all", "keep_all_steps", "alone")
TEN = tuple(range(10))

STUDIES = {
    "evidence": (
        *(Setting(f"grid_digits_{snr}", f"GRID digits, {title}", ALL if snr in ("clean", "m10") else MAIN,
                  quiet=("--diagnose",) if snr in ("clean", "m10") else ())
          for snr, title in (("m10", "babble at -10 dB"), ("clean", "clean sound"), ("0", "babble at 0 dB"),
                             ("p10", "babble at +10 dB"))),
        Setting("mosi", "CMU-MOSI", ALL, rates=("1e-3",), validated=False),
        Setting("views3", "Multi-view digits, three views", ALL),
        Setting("views6", "Multi-view digits, six views", ALL),
        Setting("grid_letters_m10", "GRID letters, babble at -10 dB", MAIN),
        Setting("grid_letters_clean", "GRID letters, clean sound", MAIN),
        Setting("grid_flow_m10", "GRID digits with optical flow, babble at -10 dB", MAIN),
        Setting("speech", "Real speech with real handwriting", MAIN),
        *(Setting(f"demo_draw{draw}", f"Demo, draw {draw}", MAIN) for draw in range(3)),
    ),
    "ablations": (
        Setting("grid_digits_m10", "GRID digits, babble at -10 dB",
                ("baseline", "remix", "masked_run", "rescore_4", "warmup_2", "warmup_12"), TEN, ()),
    ),
    "benchmark": tuple(
        Setting(data, title, ("baseline", "remix", "balance"), (0, 1, 2), (), RATES[:3], ranked=True)
        for data, title in (("views3", "Multi-view digits, three views"),
                            ("grid_digits_m10", "GRID digits, babble at -10 dB"), ("demo_draw0", "Demo"))
    ),
}  # fmt: skip

COMMANDS = {"evidence": "bash scripts/evidence.sh", "benchmark": "bash scripts/benchmark.sh",
            "ablations": "python -m report.study ablations"}  # fmt: skip
TITLES = {"evidence": "Results", "benchmark": "Balance methods compared", "ablations": "Ablations"}


# --------------------------------------------------------------------------------------------------------------- plan


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, list[str]]:
    """The flags of this command, and the remaining words, which are for train.py."""
    chosen, words = leading_words(argv)
    p = Parser(prog="python -m report.study", usage="report.study STUDY [DATASET ...] [flags]", description=__doc__,
               formatter_class=RawDescriptionHelpFormatter)  # fmt: skip
    p.add_argument("--sources", type=Path, default=Path("../shared/data"), metavar="DIR",
                   help="parent of grid_s1, mosi, multiview_digits and spoken_digits "
                        "(default: ../shared/data)")  # fmt: skip
    p.add_argument("--data", type=Path, default=Path("data/study"), metavar="DIR",
                   help="training folders made from them (default: data/study)")  # fmt: skip
    p.add_argument("--seeds", metavar="A,B", help="seeds of all settings (default: the protocol's)")
    p.add_argument("--rows", metavar="A,B", help="rows to train (default: the protocol's)")
    p.add_argument("--jobs", type=number(int, 1), metavar="N", help="concurrent runs (default: one per core or GPU)")
    p.add_argument("--log_path", metavar="DIR", help="folder of the runs (default: runs/STUDY)")
    p.add_argument("--doc", type=Path, metavar="FILE", help="page with all tables (default: LOG_PATH/study.md)")
    p.add_argument("--readme", type=Path, metavar="FILE", help="put the short table into this file (default: none)")
    p.epilog = "All other flags are passed to every run; see python train.py --help."
    args, rest = p.parse_known_args(words)
    args.study = chosen.pop(0) if chosen else "nothing to do"
    if args.study not in STUDIES:
        raise UserError(f"{args.study}: give one of {', '.join(STUDIES)}")
    known = [setting.data for setting in STUDIES[args.study]]
    for name in chosen:
        if name not in known:
            raise UserError(f"{name}: unknown; {args.study} has {', '.join(known)}")
    args.settings = [setting for setting in STUDIES[args.study] if not chosen or setting.data in chosen]
    args.command = " ".join([COMMANDS[args.study], *chosen])
    args.log_path = args.log_path or f"runs/{args.study}"
    return args, rest


def rows_of(setting: Setting, names: Sequence[str], only: str | None = None) -> dict[str, Entry]:
    """The entries of a setting by name. Raises `UserError` for an unknown name in `only`."""
    known = entries(names)
    groups = {"alone": names, "balance": balance_entries()}
    wanted = [name for row in setting.rows for name in groups.get(row, [row])]
    if only is not None:
        for name in only.split(","):
            if name not in known:
                raise UserError(f"--rows {name}: unknown; allowed: {', '.join(known)}")
        wanted = [name for name in wanted if name in only.split(",")]
    return {name: known[name] for name in wanted}


def dataset_in(root: Path) -> str:
    """The value of `--dataset` for a training folder made by `report.study_data`."""
    return "demo" if (root / "demo.json").is_file() else "folder"


def seeds_for(setting: Setting, args: Namespace) -> Sequence[int]:
    return seeds_of(args.seeds) if args.seeds else setting.seeds


def words_of(setting: Setting, entry: Entry, root: Path, rest: Sequence[str]) -> list[str]:
    """The flags of all runs of a row which are not in their names."""
    given = {word.split("=")[0] for word in rest} | {f"--{flag}" for flag, _ in entry.flags}
    usual = [word for flag, value in schedule() if f"--{flag}" not in given for word in (f"--{flag}", value)]
    quiet = setting.quiet if entry.method in ("baseline", "remix") and not entry.flags else ()
    return [
        "--dataset",
        dataset_in(root),
        "--data_root",
        str(root),
        "--val_fraction",
        VAL_FRACTION,
        *usual,
        *rest,
        *quiet,
    ]


def plan_run(
    setting: Setting, entry: Entry, rate: str, seed: int, root: Path, args: Namespace, rest: list[str]
) -> Planned:
    flags = (*entry.flags, ("learning_rate", rate))
    return planned(entry.method, seed, flags, words_of(setting, entry, root, rest), args.log_path)


# ------------------------------------------------------------------------------------------------------------ choices


def tuning_score(run: Run) -> float:
    """Validation accuracy over the epochs after the decay of the learning rate, on average: what chooses the rate."""
    decay = run.config["lr_decay_step"]
    return float(np.mean([line["val_acc"] for line in run.history if line["epoch"] >= decay]))


def choose_rates(finished: dict[tuple[str, str, str], Run]) -> dict[tuple[str, str], str]:
    """{(dataset, row): rate} from {(dataset, row, rate): run}; the lower rate of equals."""
    best: dict[tuple[str, str], tuple[float, str]] = {}
    for (data, row, rate), run in finished.items():
        score = tuning_score(run)
        if (data, row) not in best or score > best[data, row][0]:
            best[data, row] = (score, rate)
    return {key: rate for key, (_, rate) in best.items()}


# --------------------------------------------------------------------------------------------------------------- main


class Study(NamedTuple):
    """The finished runs: {(dataset, row): {seed: run}}, the chosen rates, the validation scores that chose them.

    `refused`: the rows that train.py refuses on a dataset, with its reason.
    """

    settings: list[Setting]
    rows: dict[str, dict[str, Entry]]
    runs: dict[tuple[str, str], dict[int, Run]]
    rates: dict[tuple[str, str], str]
    scores: dict[tuple[str, str], dict[str, float]]
    refused: dict[tuple[str, str], str]


def train_study(args: Namespace, rest: list[str]) -> tuple[Study, int]:
    """Train what is missing: first the grid of rates, then all seeds. Returns the study and the exit status."""
    log_path = Path(args.log_path)
    needed = {setting.data for setting in args.settings}
    roots = {name: make(name, args.sources, args.data) for name in RECIPES if name in needed}
    names = {name: spec_of(dataset_in(root), root).names for name, root in roots.items()}
    rows = {setting.data: rows_of(setting, names[setting.data], args.rows) for setting in args.settings}
    first = (seeds_of(args.seeds) if args.seeds else [0])[0]
    refused: dict[tuple[str, str], str] = {}
    for setting in args.settings:
        for row, entry in list(rows[setting.data].items()):
            try:
                plan_run(setting, entry, setting.rates[0], first, roots[setting.data], args, rest)
            except UserError as error:
                if row not in balance_entries():
                    raise
                refused[setting.data, row] = str(error)
                del rows[setting.data][row]

    # the grid of rates
    grid = {(setting.data, row, rate): plan_run(setting, entry, rate, first, roots[setting.data], args, rest)
            for setting in args.settings for row, entry in rows[setting.data].items()
            for rate in setting.rates}  # fmt: skip
    print_hours(args, rest, roots, grid, rows)
    status = run_all(list(grid.values()), log_path, args.jobs)
    tuned = {key: read_run(log_path / run.name) for key, run in grid.items()}
    tuned = {key: run for key, run in tuned.items() if not run.problem}
    rates = choose_rates(tuned)
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for (data, row, rate), run in tuned.items():
        scores.setdefault((data, row), {})[rate] = tuning_score(run)
    study = Study(args.settings, rows, {}, rates, scores, refused)
    if status:
        return study, status

    def plan_seeds(setting: Setting, row: str, seeds: Sequence[int]) -> dict[int, Planned]:
        entry, rate = rows[setting.data][row], rates[setting.data, row]
        return {seed: plan_run(setting, entry, rate, seed, roots[setting.data], args, rest) for seed in seeds}

    plan = {(setting.data, row): plan_seeds(setting, row, seeds_for(setting, args))
            for setting in args.settings for row in rows[setting.data]}  # fmt: skip
    study, status = run_seeds(study, plan, log_path, args.jobs)
    if status or args.seeds:
        return study, status
    extended = [setting for setting in args.settings if setting.more_seeds and undecided(study, setting)]
    for setting in extended:
        seeds = ", ".join(map(str, setting.more_seeds))
        print(f"{setting.title}: the interval of Remix against the baseline includes zero; seeds {seeds} follow for "
              f"{', '.join(MORE_ROWS)}", flush=True)  # fmt: skip
        for row in (row for row in MORE_ROWS if row in rows[setting.data]):
            plan[setting.data, row] |= plan_seeds(setting, row, setting.more_seeds)
    return run_seeds(study, plan, log_path, args.jobs) if extended else (study, status)


def run_seeds(
    study: Study, plan: dict[tuple[str, str], dict[int, Planned]], log_path: Path, jobs: int | None
) -> tuple[Study, int]:
    """Train the missing runs of `plan`, seed by seed. Returns the study with all finished ones, and the exit status."""
    ordered = sorted(((seed, run) for runs in plan.values() for seed, run in runs.items()), key=lambda item: item[0])
    status = run_all(list({run.name: run for _, run in ordered}.values()), log_path, jobs)
    read = {key: {seed: read_run(log_path / run.name) for seed, run in runs.items()} for key, runs in plan.items()}
    finished = {key: {seed: run for seed, run in runs.items() if not run.problem} for key, runs in read.items()}
    return study._replace(runs=finished), status


def undecided(study: Study, setting: Setting) -> bool:
    """Whether the 95 % interval of Remix against the baseline includes zero."""
    from report.study_results import against, results_of  # late: it imports this module

    found = against(results_of(study, setting), "remix", "baseline")
    return found is not None and not excludes_zero(found.low, found.high)


def print_hours(
    args: Namespace, rest: list[str], roots: dict[str, Path], grid: dict[tuple[str, str, str], Planned],
    rows: dict[str, dict[str, Entry]],
) -> None:  # fmt: skip
    """Print how many runs are left and how long they take, from timed epochs of the baseline on each dataset.

    Methods cost more or less than the baseline, so this is a rough estimate. Without runs to train, nothing is timed.
    """
    log_path, left = Path(args.log_path), dict.fromkeys(roots, 0)
    for (data, _, _), run in grid.items():
        left[data] += take_stock(run, log_path) != "done"
    for setting in args.settings:
        for entry in rows[setting.data].values():
            for seed in seeds_for(setting, args)[1:]:  # the first is one of the runs of the grid
                tried = (plan_run(setting, entry, rate, seed, roots[setting.data], args, rest)
                         for rate in setting.rates)  # fmt: skip
                left[setting.data] += not any(take_stock(run, log_path) == "done" for run in tried)
    left = {name: count for name, count in left.items() if count}
    if not left:
        return
    each_run = {name: EPOCHS * epoch_seconds(roots[name], args, rest) for name in left}
    flags = next(iter(grid.values())).flags
    jobs = len(environments(args.jobs, flags["device"], flags["gpu_ids"]))
    each = ", ".join(f"{name} {count} of about {each_run[name]:.0f} s" for name, count in left.items())
    hours = sum(count * each_run[name] for name, count in left.items()) / jobs / 3600
    print(f"{sum(left.values())} runs left, about {hours:.1f} hours with {jobs} at a time ({each}); two epochs of the "
          "baseline on each dataset were timed", flush=True)  # fmt: skip


def epoch_seconds(root: Path, args: Namespace, rest: Sequence[str]) -> float:
    """Seconds of an epoch of the baseline, evaluation included: the second of a run that is deleted again."""
    log_path = Path(args.log_path)
    log_path.mkdir(parents=True, exist_ok=True)
    words = ["--dataset", dataset_in(root), "--data_root", str(root), "--val_fraction", VAL_FRACTION, *rest]
    with tempfile.TemporaryDirectory(prefix=".tmp-hours-", dir=log_path) as folder:
        run = planned("baseline", 0, [("epochs", "2")], words, folder)
        env = environments(args.jobs, run.flags["device"], run.flags["gpu_ids"])[0]
        timed = read_run(timed_run(run, Path(folder), env).folder)
        return seconds(timed._replace(history=timed.history[-1:]))


def run_all(runs: Iterable[Planned], log_path: Path, jobs: int | None) -> int:
    """Train the missing ones of `runs`; returns the exit status."""
    with alone_in(log_path):
        return exit_status(train_missing([(run, take_stock(run, log_path)) for run in runs], log_path, jobs))


def main(argv: list[str] | None = None) -> int:
    args, rest = parse_args(argv)
    study, status = train_study(args, rest)
    chosen = {f"{data} {row}": {"rate": study.rates[data, row], "validation": found}
              for (data, row), found in study.scores.items()}  # fmt: skip
    write_json(Path(args.log_path) / "rates.json", chosen)
    from report.study_page import write_page  # late: matplotlib is not needed before the end

    write_page(study, args)
    return status


if __name__ == "__main__":
    run_main(main)
