"""Reproduce the experiments of the paper, one command per table or figure, on any dataset.

    bash scripts/paper.sh table1                                    # fusion heads, on the demo
    bash scripts/paper.sh table5 --seeds 0,1,2,3,4
    bash scripts/paper.sh all --dataset CREMAD --gpu_ids 0          # other flags go to every run: train.py --help
    bash scripts/paper.sh all --doc docs/paper.md                   # also write the page

A command trains missing runs and resumes interrupted ones (as `run_compare.sh` does; tables share runs). Then it writes
the table in the paper's layout, next to the published values: percent, CREMA-D and Kinetics-Sounds, mean of three
seeds. Xiaoyu Ma, Hao Chen, Yongjian Deng, ICML 2025, arXiv 2506.11550.
"""

from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

import train
from report.compare import Planned, alone_in, exit_status, leading_words, planned, seeds_of, take_stock, train_missing
from report.figures import plot_mean, seeds_text
from report.runs import (
    Difference,
    Group,
    Run,
    excludes_zero,
    group_of,
    holm,
    origin,
    p_value,
    paired_difference,
    read_run,
    seconds,
    spread,
    values,
)
from report.tables import difference_cell, spread_cell, table
from utils.cli import Parser, number
from utils.errors import UserError, run_main
from utils.files import atomic_path
from utils.run import write_json
from utils.style import (
    METHOD_COLOURS,
    MUTED,
    caption,
    epoch_axis,
    label_ends,
    modality_colours,
    panels,
    save,
    styled,
)

# Flags of every run of a dataset where they are not given on the command line. The paper trains at one learning rate;
# the demo's schedule is half as long as the paper's.
SCHEDULES = {
    "demo": ("--epochs", "30", "--warmup", "6", "--lr_decay_step", "22"),
    "CREMAD": ("--learning_rate", "5e-5"),
    "KineticSound": ("--learning_rate", "5e-5"),
}
SEEDS = {"table1": "0,1,2,3,4", "table5": "0,1,2,3,4", "gates": "0,1,2,3,4"}  # demo; others: the paper's three
PUBLISHED = ("CREMAD", "KineticSound")  # the order of `Row.published`


class Row(NamedTuple):
    """One setting of a table.

    `flags` are those in which its runs differ from others; `base` is the label of the row it is compared with, "" for
    none; `published` the paper's accuracies (percent) on CREMA-D and Kinetics-Sounds. `quiet` flags change nothing in a
    run's result.
    """

    label: str
    method: str
    flags: tuple[tuple[str, str], ...] = ()
    base: str = ""
    published: tuple[float | None, float | None] = (None, None)
    quiet: tuple[str, ...] = ()


class Table(NamedTuple):
    """A table of the paper: its rows, and a sentence on what the rows are; `fed` adds the samples fed per epoch."""

    title: str
    rows: tuple[Row, ...]
    about: str
    fed: bool = False
    seconds: bool = False


def fused(head: str) -> tuple[tuple[str, str], ...]:
    return () if head == "concat" else (("fusion_method", head),)


def pair(label: str, flags: tuple[tuple[str, str], ...], plain: tuple, remixed: tuple, quiet: tuple = ()) -> list[Row]:
    """A setting without and with Remix."""
    return [
        Row(label, "baseline", flags, "", plain, quiet),
        Row(f"{label} + Remix", "remix", flags, label, remixed, quiet),
    ]


NOTHING = (None, None)
WATCHED = ("--diagnose",)  # flags of the runs that figure 3 shows
CONCAT, CONCAT_REMIX = pair("Concat", (), (64.52, 50.23), (72.72, 55.63), WATCHED)
SUM, SUM_REMIX = pair("Sum", fused("sum"), (63.44, 51.66), (71.51, 54.09))
DECISION, DECISION_REMIX = pair("Decision", fused("decision"), (67.47, 52.47), (70.70, 54.86))


def balanced(label: str, name: str, published: tuple, **more: str) -> Row:
    return Row(label, "baseline", (("balance", name), *more.items()), "Concat", published)


def without_heads(label: str, head: str, plain: tuple, remixed: tuple) -> list[Row]:
    return pair(f"{label}, masked", (*fused(head), ("unimodal", "masked")), plain, remixed)


TABLES = {
    "table1": Table("Table 1: fusion heads", (
        CONCAT, SUM, DECISION, *pair("FiLM", fused("film"), (62.77, 49.61), NOTHING)[:1],
        *pair("Bi-Gated", fused("bigated"), (63.04, 49.92), NOTHING)[:1], CONCAT_REMIX, SUM_REMIX, DECISION_REMIX,
    ), "Joint training with each fusion head, and Data Remixing with the three that the paper combines it with."),
    "table2": Table("Table 2: other balance methods", (
        CONCAT,
        balanced("OGM-GE", "ogm_ge", (68.15, 52.66)), balanced("G-Blend", "gblend", (69.89, 53.55), val_fraction="0.1"),
        balanced("Greedy", "greedy", (68.28, 51.20), model="mmtm"), balanced("PMR", "pmr", (68.95, 51.93)),
        balanced("MLA", "mla", (68.01, 54.66)), balanced("Resample", "resample", (67.61, 55.17)), CONCAT_REMIX,
        Row("MLA + Remix", "remix", (("balance", "mla"), ("reassemble", "alternate")), "MLA", (74.19, 57.75)),
        Row("Resample + Remix", "remix", (("balance", "resample"),), "Resample", (73.25, 58.40)),
    ), "All methods with one optimizer and learning rate, since the paper gives no settings of the methods it compares "
       "with. G-Blend measures on a validation part of a tenth of the training clips, which it does not train on. "
       "Greedy needs MMTM units (Table 4).", fed=True),
    "table3": Table("Table 3: cost", (CONCAT, CONCAT_REMIX,
                    *(row for label in ("Resample", "MLA")
                      for row in (balanced(label, label.lower(), NOTHING),))),
                    "Seconds of scoring, training and evaluation of a whole run, median over seeds. The paper's "
                    "seconds are to convergence on two RTX 3090: 1,536 (CREMA-D) and 3,849 (Kinetics-Sounds) for "
                    "joint training, 2,537 and 4,946 for Remix, 4,525 and 10,362 for Resample, 6,128 and 12,868 for "
                    "MLA.",
                    seconds=True),
    "table4": Table("Table 4: intermediate fusion", (
        CONCAT, *pair("MMTM", (("model", "mmtm"),), (66.40, 52.27), (68.82, 54.78)),
        *pair("CentralNet", (("model", "centralnet"),), (65.46, 54.09), (67.61, 55.94)),
    ), "Networks whose modalities meet between the stages of the encoders, alone and with Remix."),
    "table5": Table("Table 5: decouple and reassemble", (
        CONCAT._replace(label="neither"),
        Row("decouple only", "remix", (("reassemble", "off"),), "neither", (69.89, 52.31)),
        Row("reassemble only", "remix", (("reassemble", "unmasked"),), "neither", (68.68, 51.70)),
        CONCAT_REMIX._replace(label="both (Remix)", base="neither"),
    ), "Decouple only: mixed batches, each clip masked for itself. Reassemble only: batches grouped by the modality "
       "that the clips keep, without masks."),
    "gates": Table("Gates under Remix", (
        *(row for label, head in (("FiLM", "film"), ("Gated", "gated"), ("Bi-Gated", "bigated"))
          for row in (*pair(label, fused(head), NOTHING, NOTHING),
                      Row(f"{label}, bias 1 + Remix", "remix", fused(f"{head}_bias1"), label))),
    ), "Not in the paper, which combines Remix with none of these heads. At initialisation a lone modality hardly "
       "reaches the logits of FiLM and of the one-way gate; with bias 1 the bias that it is multiplied by starts at 1 "
       "([fusion.md](fusion.md))."),
    "table6": Table("Table 6: unimodal predictions without heads", (
        *without_heads("Concat", "concat", (61.56, 49.58), (70.03, 53.89)),
        *without_heads("Sum", "sum", (59.68, 48.00), (68.68, 53.12)),
        *without_heads("Decision", "decision", (62.23, 50.08), (68.55, 53.55)),
        CONCAT, CONCAT_REMIX, SUM, SUM_REMIX, DECISION, DECISION_REMIX,
    ), "Masked: no unimodal heads and no unimodal losses; a modality's prediction is the joint head's with the other "
       "modalities masked (the paper's column Dropout). The other rows train unimodal heads (Table 1)."),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- runs


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, list[str]]:
    """Parse the flags of this command; return them and the remaining arguments, which go to train.py.

    Tables must come first: an argument after a flag of train.py is read as that flag's value.
    """
    chosen, words = leading_words(argv)
    known = (*TABLES, "figure3")
    p = Parser(prog="paper.sh", usage="paper.sh TABLE [TABLE ...] [flags]", description=__doc__,
               formatter_class=RawDescriptionHelpFormatter)  # fmt: skip
    p.add_argument("--seeds", metavar="A,B", help="seeds (default: 0,1,2; 0,1,2,3,4 for some demo rows)")
    p.add_argument(
        "--jobs", type=number(int, 1), metavar="N", help="concurrent runs (default: one per CPU core or GPU)"
    )
    p.add_argument("--log_path", default="runs/paper", metavar="DIR", help="folder of the runs (default: runs/paper)")
    p.add_argument("--doc", type=Path, metavar="FILE", help="page with all tables (default: LOG_PATH/paper.md)")
    p.epilog = f"TABLE: {', '.join(known)} or all. All other flags are passed to every run; see python train.py --help."
    args, rest = p.parse_known_args(words)
    for word in chosen:
        if word not in (*known, "all"):
            raise UserError(f"{word}: unknown; give {', '.join(known)} or all")
    if not chosen:
        raise UserError(f"nothing to do: give {', '.join(known)} or all, as in bash scripts/paper.sh table1")
    args.what = list(known) if "all" in chosen else list(dict.fromkeys(chosen))
    return args, rest


def rows_of(what: str) -> tuple[Row, ...]:
    return TABLES["table5"].rows if what == "figure3" else TABLES[what].rows


def seeds_for(what: str, args: Namespace, dataset: str) -> list[int]:
    text = args.seeds or (SEEDS.get(what, "0,1,2") if dataset == "demo" else "0,1,2")
    return seeds_of(text)


def make_plan(args: Namespace, rest: list[str]) -> dict[str, dict[str, dict[int, Planned]]]:
    """The runs by table, row and seed; tables share runs of the same name.

    Raises `UserError` for anything that train.py refuses.
    """
    args.dataset = train.parse_args(["--train", "--method", "baseline", *rest]).dataset
    given = {word.split("=")[0] for word in rest}
    schedule = SCHEDULES.get(args.dataset, ())
    usual = [word for flag, value in zip(schedule[::2], schedule[1::2], strict=True) if flag not in given
             for word in (flag, value)]  # fmt: skip
    plan: dict[str, dict[str, dict[int, Planned]]] = {}
    for what in args.what:
        plan[what] = {}
        for row in rows_of(what):
            words = [*usual, *rest, *row.quiet]
            runs = {seed: planned(row.method, seed, row.flags, words, args.log_path)
                    for seed in seeds_for(what, args, args.dataset)}  # fmt: skip
            plan[what][row.label] = runs
    return plan


def in_order(plan: dict[str, dict[str, dict[int, Planned]]]) -> list[Planned]:
    """Every run once, ordered by seed, so that an interrupted command has all rows of fewer seeds."""
    by_seed = sorted(((seed, run) for rows in plan.values() for runs in rows.values() for seed, run in runs.items()),
                     key=lambda item: item[0])  # fmt: skip
    return list({run.name: run for _, run in by_seed}.values())


# ------------------------------------------------------------------------------------------------------------ numbers


class Result(NamedTuple):
    """A row's numbers: accuracies by quantity (fractions, by seed), best on test, and the difference to its base.

    `p` is the p value of a paired t test over seeds, `holm` the same after Holm's correction over the table's
    differences. `fed` is the number of clips fed per epoch after the warm-up, divided by the number of training clips.
    `seconds` is the duration of a whole run, the median over seeds: other jobs slow single runs down.
    """

    row: Row
    by_seed: dict[str, dict[int, float]]
    best: dict[int, float]
    difference: Difference | None
    p: float | None
    holm: float | None
    fed: float
    seconds: float


def results_of(rows: Sequence[Row], groups: dict[str, Group]) -> list[Result]:
    found = []
    for row in rows:
        if (group := groups.get(row.label)) is None:
            continue
        heads = {name: values(group, name) for name in ("multimodal", *group.modalities)}
        base = groups.get(row.base)
        own, theirs = heads["multimodal"], values(base, "multimodal") if base else {}
        found.append(Result(row, heads, values(group, "multimodal", "best_test"), paired_difference(own, theirs),
                            p_value(own, theirs), None, fed_per_clip(group),
                            float(np.median([seconds(run) for run in group.runs.values()]))))  # fmt: skip
    corrected = holm([result.p for result in found])
    return [result._replace(holm=value) for result, value in zip(found, corrected, strict=True)]


def fed_per_clip(group: Group) -> float:
    """Clips fed per epoch after the warm-up, divided by the training clips: the factor in Table 2 of the paper."""
    found = []
    for run in group.runs.values():
        after = [line for line in run.history if line["epoch"] >= run.config.get("warmup", 0)] or run.history
        found.append(np.mean([line["n_fed"] for line in after]) / run.config["data"]["clips"]["train"])
    return float(np.mean(found))


def mean_gain(results: list[Result], pairs: Sequence[tuple[str, str]]) -> Difference | None:
    """The gain of (label, label with Remix) pairs, averaged per seed, then over seeds: the abstract's number."""
    found = {result.row.label: result.by_seed["multimodal"] for result in results}
    if not all(label in found for names in pairs for label in names):
        return None
    seeds = set.intersection(*(set(found[label]) for names in pairs for label in names))
    gain = {seed: float(np.mean([found[after][seed] - found[before][seed] for before, after in pairs]))
            for seed in sorted(seeds)}  # fmt: skip
    return paired_difference(gain, dict.fromkeys(gain, 0.0))


# -------------------------------------------------------------------------------------------------------------- words


def points(found: Difference | None) -> str:
    return "–" if found is None else difference_cell(found)


def percent(by_seed: dict[int, float]) -> str:
    return spread_cell(spread(by_seed.values()))


def table_of(key: str, results: list[Result], dataset: str) -> str:
    """The table in Markdown, in the paper's order of rows."""
    made = TABLES[key]
    head = ["setting", *results[0].by_seed, "best on test", "difference [95 %]", "p (Holm)", "n"]
    head += ["clips fed"] if made.fed else []
    head += ["seconds", "ratio"] if made.seconds else []
    head += [f"paper, {name}" for name in PUBLISHED if dataset in (name, "demo")]
    first, lines = results[0].seconds, []
    for result in results:
        cells = [result.row.label, *map(percent, result.by_seed.values()), percent(result.best)]
        cells += [points(result.difference), "–" if result.holm is None else f"{result.holm:.3f}"]
        cells += [str(len(result.by_seed["multimodal"]))]
        cells += [f"{result.fed:.2f}"] if made.fed else []
        cells += [f"{result.seconds:.0f}", f"{result.seconds / first:.2f}"] if made.seconds else []
        cells += ["–" if value is None else f"{value:.2f}"
                  for name, value in zip(PUBLISHED, result.row.published, strict=True)
                  if dataset in (name, "demo")]  # fmt: skip
        lines.append(cells)
    return table(head, lines)


def finding(key: str, results: list[Result]) -> str:
    """Sentences on a table, generated from its numbers: significance, agreement with the paper's order, mean gain."""
    told = []
    tested = [result for result in results if result.holm is not None]
    if tested:
        sure = [result for result in tested if result.holm is not None and result.holm < 0.05]
        said = "; ".join(f"{r.row.label} {points(r.difference)} against {r.row.base}" for r in sure) or "none"
        told.append(f"Significant at 5 % after Holm's correction over {len(tested)} differences: {said}.")
        if rest := [result for result in tested if result not in sure]:
            said = "; ".join(f"{r.row.label} {points(r.difference)}" for r in rest)
            told.append(f"Not significant: {said}.")
    if key == "table1":
        heads = [(head, f"{head} + Remix") for head in ("Concat", "Sum", "Decision")]
        if (gain := mean_gain(results, heads)) is not None:
            told.append("Mean gain of Remix over Concat, Sum and Decision, the abstract's number: "
                        f"{points(gain)} points (paper: +6.50 on CREMA-D, +3.41 on Kinetics-Sounds).")  # fmt: skip
    told += [ordering(results, column) for column in range(len(PUBLISHED))]
    return " ".join(line for line in told if line)


def ordering(results: list[Result], column: int) -> str:
    """How many pairs of rows are in the paper's order, and how many of those that differ significantly here."""
    rows = [(result, value) for result in results if (value := result.row.published[column]) is not None]
    pairs = [(a, b) if x > y else (b, a) for (a, x), (b, y) in combinations(rows, 2) if x != y]
    if not pairs:
        return ""
    means = {result.row.label: np.mean(list(result.by_seed["multimodal"].values())) for result, _ in rows}
    right = sum(means[a.row.label] > means[b.row.label] for a, b in pairs)
    told = f"Of the {len(pairs)} pairs of rows, {right} are in the paper's order on {PUBLISHED[column]}"
    clear = []
    for a, b in pairs:
        found = paired_difference(a.by_seed["multimodal"], b.by_seed["multimodal"])
        if found is not None and excludes_zero(found.low, found.high):
            clear.append(found.mean > 0)
    return f"{told}; of the {len(clear)} pairs whose 95 % interval excludes 0, {sum(clear)}." if clear else f"{told}."


# -------------------------------------------------------------------------------------------------------------- files


def grouped(rows: Sequence[Row], plan: dict[str, dict[int, Planned]], finished: dict[str, Run]) -> dict[str, Group]:
    """The finished runs of each row, from all by name."""
    found = {}
    for row in rows:
        runs = {seed: finished[run.name] for seed, run in plan[row.label].items() if run.name in finished}
        if runs:
            found[row.label] = group_of(row.label, runs)
    return found


def as_json(result: Result) -> dict:
    row, difference = result.row, result.difference
    return {"label": row.label, "method": row.method, "flags": dict(row.flags), "base": row.base,
            "by_seed": result.by_seed, "best_on_test": result.best, "p": result.p, "holm": result.holm,
            "difference": difference and difference._asdict(), "clips_fed": result.fed, "seconds": result.seconds,
            "published": dict(zip(PUBLISHED, row.published, strict=True))}  # fmt: skip


def write_table(key: str, groups: dict[str, Group], args: Namespace, log_path: Path) -> list[str]:
    """Print one table and save it next to the runs as Markdown and JSON; returns the lines of its section."""
    made, results = TABLES[key], results_of(TABLES[key].rows, groups)
    if not results:
        print(f"{key}: no run has finished")
        return []
    text = table_of(key, results, args.dataset)
    section = [f"## {made.title}", "", made.about, "", text, "", finding(key, results), ""]
    print("\n" + "\n".join(section))
    write_json(log_path / f"{key}.json", {"title": made.title, "rows": [as_json(result) for result in results]})
    return section


def write_page(path: Path, sections: list[str], args: Namespace, rest: list[str], runs: list[Run]) -> None:
    seeds = ["--seeds", args.seeds] if args.seeds else []
    words = " ".join(["bash scripts/paper.sh", *args.what, *seeds, *rest])
    head = ["# The experiments of the paper", "",
            f"Written by `{words}` from {len(runs)} runs on `{args.dataset}` ({origin(runs)}).", "",
            "Test accuracy in percent after the last epoch, mean ± sample standard deviation over n seeds. Differences "
            "are paired over seeds, in points, with a 95 % t interval; p values are of paired t tests, corrected by "
            "Holm's method within each table. Best on test is the papers' protocol: the best epoch is chosen on the "
            "test set, which flatters every setting. The last columns are the paper's own numbers.", ""]  # fmt: skip
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join([*head, *sections]).rstrip() + "\n", encoding="utf-8")
    print(f"\n{path} written")


@styled()
def draw_figure3(groups: dict[str, Group], path: Path) -> list[str]:
    """Clips per modality, OGM-GE's discrepancy ratio, and the angle of an encoder's gradient, over epochs."""
    remix, plain = groups.get("both (Remix)"), groups.get("neither")
    if remix is None or plain is None:
        return []
    names, colours = remix.modalities, modality_colours(remix.modalities)
    figure, axes = panels(2 + len(names), width=2.6, height=2.1)
    caption(figure, "Why it works", f"Mean over {seeds_text([remix])}.")
    clips, ratio, *angles = axes.flat
    ends = [(clips, [plot_mean(clips, remix, f"n_{name}", name, colours[name]) for name in names])]
    clips.set(title="clips that keep a modality", ylim=(0, None))
    methods = ((plain, "joint", METHOD_COLOURS["baseline"]), (remix, "Remix", METHOD_COLOURS["remix"]))
    ratio.axhline(1, color=MUTED, lw=0.8, ls=":")
    ends.append((ratio, [plot_mean(ratio, group, f"diagnose/rho_{names[0]}", label, colour)
                         for group, label, colour in methods]))  # fmt: skip
    ratio.set(title=f"discrepancy ratio of {names[0]}", yscale="log")
    for side in (ratio.yaxis.set_major_formatter, ratio.yaxis.set_minor_formatter):
        side("{x:g}")
    kinds = {"mixed": ("mixed batches", "-"), "part": ("own clips only", "--"), "grouped": ("homogeneous", ":")}
    for name, axis in zip(names, angles, strict=True):
        ends.append((axis, [plot_mean(axis, remix, f"diagnose/angle_{kind}_{name}", label, colours[name], line)
                            for kind, (label, line) in kinds.items()]))  # fmt: skip
        axis.set(title=f"{name} encoder: degrees between\nactual and ideal gradient")
    last = max(run.history[-1]["epoch"] + 1 for run in remix.runs.values())
    for axis in axes.flat:
        epoch_axis(axis, [1, last])
    label_ends((axis, [end for end in own if end is not None]) for axis, own in ends)
    save(figure, path.with_suffix(""))
    seeds = len(remix.runs)
    told = angles_in_words(remix)
    return ["## Figure 3: why it works", "",
            f"![Clips per modality, discrepancy ratio and gradient angles over epochs]({path.name})", "",
            f"Means over {seeds} seeds. Left: clips that keep each modality. Then OGM-GE's discrepancy ratio, on "
            "unmasked training clips (1: balanced). Right: the angle between the gradient of the joint loss on a batch "
            "and that of the encoder's own loss on the clips of the batch that keep its modality, in Remix runs, all "
            "on unmasked clips in evaluation mode: for mixed batches, for the same clips without the others, and for "
            f"homogeneous batches of full size. {told}", ""]  # fmt: skip


def angles_in_words(remix: Group) -> str:
    """Mean angles over the Remix epochs and seeds, and paired differences between kinds of batches."""
    told = []
    for name in remix.modalities:
        mean = {}
        for kind in ("mixed", "part", "grouped"):
            key = f"diagnose/angle_{kind}_{name}"
            lines = {seed: [line[key] for line in run.history if line.get(key) is not None]
                     for seed, run in remix.runs.items()}  # fmt: skip
            mean[kind] = {seed: float(np.mean(angles)) for seed, angles in lines.items() if angles}
        if not all(mean.values()):
            continue
        found = paired_difference(mean["mixed"], mean["grouped"])
        alike = paired_difference(mean["mixed"], mean["part"])
        degrees = {kind: np.mean(list(by_seed.values())) for kind, by_seed in mean.items()}
        told.append(f"{name}: {degrees['mixed']:.0f}° in mixed batches, {degrees['part']:.0f}° with their own clips "
                    f"only, {degrees['grouped']:.0f}° in homogeneous ones (mixed minus homogeneous {_degrees(found)}, "
                    f"mixed minus own clips {_degrees(alike)}).")  # fmt: skip
    return " ".join(told)


def _degrees(found: Difference | None) -> str:
    if found is None:
        return "–"
    interval = "" if found.low is None else f" [{found.low:+.0f}, {found.high:+.0f}]"
    return f"{found.mean:+.0f}°{interval}"


# --------------------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> int:
    args, rest = parse_args(argv)
    plan, log_path = make_plan(args, rest), Path(args.log_path)
    runs = in_order(plan)
    with alone_in(log_path):
        failures = train_missing([(run, take_stock(run, log_path)) for run in runs], log_path, args.jobs)
    read = (read_run(log_path / run.name) for run in runs)
    finished = {run.folder.name: run for run in read if not run.problem}
    doc = args.doc or log_path / "paper.md"
    sections: list[str] = []
    for what in args.what:
        groups = grouped(rows_of(what), plan[what], finished)
        if what == "figure3":
            sections += draw_figure3(groups, doc.parent / f"{doc.stem}-figure3.png")
        else:
            sections += write_table(what, groups, args, log_path)
    if finished:
        write_page(doc, sections, args, rest, list(finished.values()))
    return exit_status(failures)


if __name__ == "__main__":
    run_main(main)
