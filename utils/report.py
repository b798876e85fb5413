"""Runs side by side: mean, spread and n under every protocol, differences to the baseline, figures.

    python -m utils.report runs/compare                                     # runs, or folders of runs
    python -m utils.report runs/* --results docs/results.md --readme README.md
    python -m utils.report --model runs/NAME                                # pictures of a trained model
    python -m utils.report --people summaryTable.csv --partition runs/NAME/partition.csv      # CREMA-D against people

Everything about runs comes from their JSON files. A number of a table is a percentage of test clips, except macro F1,
which is 100 times the F1.
"""

import csv
import json
import re
import shlex
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from pathlib import Path

from utils.cli import Parser
from utils.errors import UserError, run_main
from utils.files import atomic_path
from utils.logging import write_json
from utils.people import compare_with_people, people_markdown, read_partition, read_votes, recognition
from utils.plots import DIAGNOSES, plot_compared_bars, plot_compared_curves, plot_diagnoses, plot_shares, save_figure
from utils.runs import (
    PROTOCOLS,
    QUANTITIES,
    VARIANTS,
    Difference,
    Group,
    Run,
    Spread,
    ablations,
    command_of,
    differing_flags,
    epoch_cost,
    find_runs,
    group_runs,
    minutes,
    paired_difference,
    reference_of,
    short,
    spread,
    values,
)

START, END = "<!-- results:start -->", "<!-- results:end -->"

# ----------------------------------------------------------------------------------------------------------- numbers


def measure(group: Group, groups: list[Group]) -> list[dict]:
    """A group's row for each quantity and protocol: n, mean, std and the paired difference, as fractions."""
    reference = reference_of(group, groups)
    rows = []
    for quantity in QUANTITIES:
        for protocol in PROTOCOLS:
            own = values(group, quantity, protocol)
            difference = paired_difference(own, values(reference, quantity, protocol)) if reference else None
            rows.append({
                "quantity": quantity, "protocol": protocol, "by_seed": own, "spread": spread(own.values()),
                "difference": difference, "reference": reference.label if reference else None,
            })  # fmt: skip
    return rows


def _cell(found: Spread | None, n: int) -> str:
    """`81.2 ± 0.5`; the number of values is told where it is not the row's `n`."""
    if found is None:
        return "–"
    text = f"{100 * found.mean:.1f}" + (f" ± {100 * found.std:.1f}" if found.std is not None else "")
    return text if found.n == n else f"{text} (n={found.n})"


def _difference_cell(found: Difference | None, n: int) -> str:
    """`+3.1 [+1.2, +5.0]`, or why there is no interval."""
    if found is None:
        return "–"
    text = f"{100 * found.mean:+.1f}"
    if found.low is None:
        return f"{text} (n=1: no interval)"
    text += f" [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return text if found.n == n else f"{text} (n={found.n})"


# ------------------------------------------------------------------------------------------------------------ tables


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown, the first column to the left and numbers to the right, aligned for reading as plain text too."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    pad = [str.ljust, *[str.rjust] * (len(head) - 1)]
    lines = [
        "| " + " | ".join(p(cell, w) for p, cell, w in zip(pad, row, widths, strict=True)) + " |"
        for row in [head, *rows]
    ]
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def maintable(groups: list[Group]) -> str:
    """The table people quote: last epoch, the papers' protocol beside it, and the difference to the baseline."""
    head = ["method", "multimodal", "audio", "video", "macro F1", "best on test¹", "best on validation",
            "multimodal – baseline [95 %]", "n", "min/run", "epoch / baseline's"]  # fmt: skip
    rows = []
    for group in groups:
        reference = reference_of(group, groups)
        cost = epoch_cost(group, reference) if reference else None
        found = {(row["quantity"], row["protocol"]): row for row in measure(group, groups)}
        n = len(group.runs)
        cells = [_cell(found[quantity, "last"]["spread"], n) for quantity in QUANTITIES]
        cells += [_cell(found["multimodal", protocol]["spread"], n) for protocol in ("best_test", "best_val")]
        cells += [_difference_cell(found["multimodal", "last"]["difference"], n)]
        rows.append([group.label, *cells, str(n), f"{minutes(group).mean:.2g}", f"{cost:.2f}" if cost else "–"])
    head, rows = _without_empty(head, rows)
    return table(head, rows)


def quantitytable(quantity: str, groups: list[Group]) -> str:
    """One quantity under every protocol side by side, each with its difference to the baseline."""
    head, rows = [quantity], [[group.label] for group in groups]
    for protocol, name in PROTOCOLS.items():
        head += [name, "– baseline [95 %]"]
        for group, row in zip(groups, rows, strict=True):
            found = next(r for r in measure(group, groups) if (r["quantity"], r["protocol"]) == (quantity, protocol))
            row += [_cell(found["spread"], len(group.runs)), _difference_cell(found["difference"], len(group.runs))]
    head, rows = _without_empty([*head, "n"], [[*row, str(len(g.runs))] for row, g in zip(rows, groups, strict=True)])
    return table(head, rows)


def _without_empty(head: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Columns in which some row has a number."""
    keep = [i for i in range(len(head)) if any(row[i] != "–" for row in rows)]
    return [head[i] for i in keep], [[row[i] for i in keep] for row in rows]


def ablation_table(groups: list[Group]) -> str | None:
    """One flag at a time: the paired difference to the centre, with its standard error; None if nothing was ablated.

    A difference that is larger than its standard error is in bold. One standard error is a low bar, and n is small.
    """
    found = ablations(groups)
    head, rows = ["changed", *(f"{quantity} [± SE]" for quantity in list(QUANTITIES)[:3]), "n"], []
    for group, centre, name in found:
        cells = []
        for quantity in list(QUANTITIES)[:3]:
            ours, theirs = values(group, quantity), values(centre, quantity)
            over = spread(100 * (ours[seed] - theirs[seed]) for seed in ours.keys() & theirs.keys())
            if over is None or over.std is None:
                cells.append("–" if over is None else f"{over.mean:+.1f} (n=1)")
                continue
            error = over.std / over.n**0.5
            text = f"{over.mean:+.1f} ± {error:.1f}"
            cells.append(f"**{text}**" if abs(over.mean) > error else text)
        told = f"{centre.label}: {name} {short(centre.flags.get(name))} -> {short(group.flags.get(name))}"
        pairs = len(group.runs.keys() & centre.runs.keys())
        rows.append([told, *cells, str(pairs)])
    return table(head, rows) if rows else None


def diagnostics_table(groups: list[Group]) -> str | None:
    """What `--diagnose` measured: mean over the last tenth of the epochs, mean ± std over seeds; None if nothing."""
    head, rows = ["mean of the last tenth of epochs", *DIAGNOSES], []
    for group in groups:
        cells = []
        for key in DIAGNOSES:
            found = [[line[f"diagnose/{key}"] for line in run.history[-max(1, len(run.history) // 10) :]
                      if line.get(f"diagnose/{key}") is not None] for run in group.runs.values()]  # fmt: skip
            over = spread(sum(numbers) / len(numbers) for numbers in found if numbers)
            cells.append("–" if over is None else f"{over.mean:.3f}" + (f" ± {over.std:.3f}" if over.n > 1 else ""))
        rows.append([group.label, *cells])
    head, rows = _without_empty(head, [row for row in rows if set(row[1:]) != {"–"}])
    return table(head, rows) if rows else None


def notes(groups: list[Group]) -> str:
    """What a reader of the table has to know to read it right."""
    lines = [
        "Test accuracy in percent (macro F1 x 100) after the last epoch: mean ± sample standard deviation over n "
        "seeds. ¹ The papers' protocol: the best epoch is chosen on the test set itself, which flatters every method."
    ]
    if any(values(group, "multimodal", "best_val") for group in groups):
        lines += ["Best on validation: the epoch is chosen on a part held out from train."]
    else:
        lines += ["No validation part here (`--val_fraction` makes one), so no honest choice of an epoch either."]
    pairs = [paired_difference(values(group, "multimodal"), values(reference, "multimodal"))
             for group in groups if (reference := reference_of(group, groups))]  # fmt: skip
    if any(pair and pair.low is not None for pair in pairs):
        lines += ["Differences are paired over the same seeds, in points, with a 95 % t interval."]
    elif pairs:
        lines += ["n=1: no interval. One seed says nothing of how much another would differ; run more (`--seeds`)."]
    else:
        lines += ["No baseline beside another method among these runs: no differences."]
    if any(group.method in ("audio", "video") for group in groups):
        lines += ["audio and video are networks trained on that modality alone; multimodal is then their joint head."]
    for name, (method, flags) in VARIANTS.items():
        if any(group.label.split(",")[0].split(" + ")[0] == name for group in groups):
            told = " ".join(f"`--{flag} {short(value)}`" for flag, value in flags.items())
            lines += [f"{name} is {method} with {told}."]
    if any(reference_of(group, groups) for group in groups):
        lines += ["Epoch / baseline's: seconds of scoring and training, over the same seeds; as exact as the machine "
                  "was idle."]  # fmt: skip
    for group in groups:
        reference = reference_of(group, groups)
        if reference and (names := differing_flags(group, reference)):
            told = ", ".join(f"{k} ({short(group.flags.get(k))}, {short(reference.flags.get(k))})" for k in names)
            lines += [f"**Not like for like**: {group.label} and {reference.label} also differ in {told}."]
    return " ".join(lines)


def settings(groups: list[Group]) -> str:
    """Flags that all groups share, the code and the machine, in words."""
    runs = [run for group in groups for run in group.runs.values()]
    shared = [item for item in groups[0].flags.items() if all(item in group.flags.items() for group in groups)]
    own = {group.label: [item for item in group.flags.items() if item not in shared] for group in groups}
    lines = [f"- all: {_flag_words(shared)}", *(f"- {label}: {_flag_words(items)}" for label, items in own.items())]

    def of(read: Callable[[dict], str | None]) -> str:
        return "; ".join(sorted({str(read(run.config)) for run in runs}))

    clips = of(lambda c: ", ".join(f"{n} {part}" for part, n in c.get("data", {}).get("clips", {}).items()))
    machine = of(lambda c: "{device}, {processes} process(es), {cpu}, {threads} thread(s)".format(
        **{"device": "?", "processes": "?", "cpu": "?", "threads": "?"} | c.get("hardware", {})))  # fmt: skip
    commit = of(
        lambda c: (c.get("git_commit") or "unknown")[:10] + ("-dirty" if "dirty" in str(c.get("git_commit")) else "")
    )
    torch = of(lambda c: c.get("versions", {}).get("torch"))
    lines += [f"- clips: {clips}", f"- code: {commit}; PyTorch {torch}", f"- machine: {machine}"]
    return "\n".join(lines)


def _flag_words(items: Iterable[tuple[str, object]]) -> str:
    return ", ".join(f"{name} {short(value)}" for name, value in items) or "nothing else"


def commands(groups: list[Group]) -> str:
    """Every row with the line that makes it again, and the comparison it was part of, if it was."""
    notes: dict[str, None] = {}
    for run in (run for group in groups for run in group.runs.values()):
        path = run.folder.parent / "compare.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        notes |= dict.fromkeys(command for command, names in found.items() if run.folder.name in names)
    lines = [f"    {command}" for command in notes]
    whole = ["All of them:", "", *lines, "", "One by one:", ""] if lines else []
    rows = [[group.label, f"`{command_of(group)}`"] for group in groups]
    head = ["| method | command |", "|---|---|"]
    return "\n".join([*whole, *head, *(f"| {label} | {command} |" for label, command in rows)])


# -------------------------------------------------------------------------------------------------------------- files


def make_report(runs: list[Run], out: Path, results: Path | None = None, readme: Path | None = None) -> None:
    """Write report.md, report.csv, report.json and figures to `out`; print the tables. See `main` for the rest.

    Raises `UserError` when none of the runs is finished.
    """
    datasets, left_out = group_runs(runs)
    told = [f"{run.folder}: {reason}" for run, reason in left_out]
    if not datasets:
        first = "; ".join(told[:3]) + ("; ..." if len(told) > 3 else "")
        raise UserError(f"no finished run among {len(runs)}: {first}; finish them with their command and --resume")
    out.mkdir(parents=True, exist_ok=True)
    pictures = write_figures(datasets, out)
    _write(out / "report.md", markdown(datasets, told, pictures))
    write_csv(out / "report.csv", datasets)
    write_json(out / "report.json", as_json(datasets, told))
    if results:
        _write(results, markdown(datasets, told, write_figures(datasets, results.parent, f"{results.stem}-")))
    if readme:
        replace_block(readme, datasets)
    for name, groups in datasets.items():
        print(f"\n{name}\n\n{maintable(groups)}")
    for line in told:
        print(f"left out: {line}")
    print(f"\n{', '.join(str(p) for p in (out / 'report.md', results, readme) if p)} written, figures beside")


def markdown(datasets: dict[str, list[Group]], left_out: list[str], pictures: dict[str, list[str]]) -> str:
    command = shlex.join(["python", "-m", "utils.report", *sys.argv[1:]])
    made_by = "bash scripts/run_compare.sh" if Path(sys.argv[0]).name == "compare.py" else command
    parts = [f"<!-- generated by `{made_by}`: change the runs, not this file -->", "# Results"]
    for name, groups in datasets.items():
        parts += [f"## {name}", maintable(groups), notes(groups)]
        parts += [f"![{name}: {picture}]({picture})" for picture in pictures.get(name, [])]
        parts += ["### Every protocol", *(quantitytable(quantity, groups) for quantity in QUANTITIES)]
        if ablated := ablation_table(groups):
            parts += ["### One flag at a time", "Last epoch, points, paired over seeds; in bold what exceeds its "
                      "standard error.", ablated]  # fmt: skip
        if measured := diagnostics_table(groups):
            parts += ["### Diagnostics (`--diagnose`)", measured]
        parts += ["### Settings", settings(groups), "### Commands", commands(groups)]
    if left_out:
        parts += ["## Left out", "\n".join(f"- {line}" for line in left_out)]
    return "\n\n".join(parts) + "\n"


def write_csv(path: Path, datasets: dict[str, list[Group]]) -> None:
    """A line for each data set, group, quantity and protocol; fractions, empty where there is no number."""
    names = ["dataset", "label", "quantity", "protocol", "n", "mean", "std", "reference", "pairs", "difference",
             "low95", "high95"]  # fmt: skip
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for dataset, groups in datasets.items():
            for group in groups:
                for row in measure(group, groups):
                    found, difference = row["spread"], row["difference"]
                    writer.writerow([dataset, group.label, row["quantity"], row["protocol"],
                                     *(found or (0, None, None)), row["reference"],
                                     *(difference or (None, None, None, None))])  # fmt: skip


def as_json(datasets: dict[str, list[Group]], left_out: list[str]) -> dict:
    """Everything, single seeds included."""

    def plain(row: dict) -> dict:
        return row | {key: row[key] and row[key]._asdict() for key in ("spread", "difference")}

    def describe(group: Group, groups: list[Group]) -> dict:
        reference = reference_of(group, groups)
        return {"label": group.label, "method": group.method, "flags": group.flags, "minutes": minutes(group)._asdict(),
                "epoch_cost": reference and epoch_cost(group, reference),
                "command": command_of(group), "runs": {seed: str(run.folder) for seed, run in group.runs.items()},
                "numbers": [plain(row) for row in measure(group, groups)]}  # fmt: skip

    found = {name: [describe(group, groups) for group in groups] for name, groups in datasets.items()}
    return {"datasets": found, "left_out": left_out}


def write_figures(datasets: dict[str, list[Group]], out: Path, prefix: str = "") -> dict[str, list[str]]:
    """PNG files in `out`; returns their names by data set."""
    made: dict[str, list[str]] = {}
    for name, groups in datasets.items():
        slug = re.sub(r"\W+", "-", name).strip("-")
        figures = {"curves": plot_compared_curves(groups, name), "bars": plot_compared_bars(groups, name)}
        figures |= {"shares": plot_shares(groups, name), "diagnostics": plot_diagnoses(groups, name)}
        for kind, figure in figures.items():
            if figure is not None:
                save_figure(figure, out / f"{prefix}{slug}-{kind}.png")
                made.setdefault(name, []).append(f"{prefix}{slug}-{kind}.png")
    return made


def replace_block(readme: Path, datasets: dict[str, list[Group]]) -> None:
    """Put the first data set's table (the demo's, where it is there) between the markers of README.md."""
    text = readme.read_text() if readme.is_file() else ""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise UserError(f"{readme}: needs a line {START} and below it a line {END}, each once")
    groups = next(iter(datasets.values()))
    before, rest = text.split(START)
    _write(readme, f"{before}{START}\n{maintable(groups)}\n\n{notes(groups)}\n{END}{rest.split(END)[1]}")


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------- main


def compare_people(people: Path, partitions: list[Path], out: Path | None) -> None:
    """CREMA-D's votes against partitions: printed, and with `out` written there as people.md and people.json."""
    votes = read_votes(people)
    found = {str(path): compare_with_people(read_partition(path), votes) for path in partitions}
    text = people_markdown(found, votes, table)
    print(text)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        _write(out / "people.md", text)
        write_json(out / "people.json", {"recognition": recognition(votes), "partitions": found})


def parse_args(argv: list[str] | None = None) -> Namespace:
    p = Parser(prog="python -m utils.report", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="*", type=Path, help="runs' folders, or folders of runs")
    p.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (report, beside the first run)")
    p.add_argument("--results", type=Path, metavar="FILE", help="write the report as this file too (none)")
    p.add_argument("--readme", type=Path, metavar="FILE",
                   help=f"replace what stands between {START} and {END} by the first table (none)")  # fmt: skip
    p.add_argument("--model", type=Path, metavar="RUN", help="pictures of this run's trained model instead (none)")
    p.add_argument("--data_root", type=Path, metavar="DIR", help="with --model: the data's folder (as in the run)")
    p.add_argument("--people", type=Path, metavar="FILE", help="CREMA-D's summaryTable.csv, with --partition (none)")
    p.add_argument("--partition", type=Path, nargs="+", metavar="FILE", help="partition.csv of CREMA-D runs (none)")
    args = p.parse_args(argv)
    if bool(args.people) != bool(args.partition):
        raise UserError("--people and --partition go together: the votes, and a run's partition.csv")
    if sum(map(bool, (args.runs, args.model, args.people))) != 1:
        raise UserError("give runs or a folder of runs (python -m utils.report runs), or --model RUN, or --people FILE")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.people:
        compare_people(args.people, args.partition, args.out)
    elif args.model:
        from utils.pictures import picture_model  # late: scikit-learn, the network and the data are for this alone

        picture_model(args.model, args.out or args.model / "pictures", args.data_root)
    else:
        runs = find_runs(args.runs)
        make_report(runs, args.out or runs[0].folder.parent / "report", args.results, args.readme)


if __name__ == "__main__":
    run_main(main)
