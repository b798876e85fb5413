"""Write the files of a comparison: report.md, report.csv, report.json, figures, and the table in README.md."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from report.figures import (
    looks_of,
    plot_ablations,
    plot_compared_curves,
    plot_diagnoses,
    plot_differences,
    plot_shares,
)
from report.runs import Group, Run, command_of, epoch_cost, group_runs, minutes, reference_of
from report.tables import README_NOTE, maintable, markdown, measure, readme_table, unlike_notes
from utils.errors import UserError
from utils.files import atomic_path
from utils.run import write_json
from utils.style import save

START, END = "<!-- results:start -->", "<!-- results:end -->"


def make_report(
    runs: list[Run],
    out: Path,
    results: Path | None = None,
    readme: Path | None = None,
    formats: Sequence[str] = ("png",),
) -> None:
    """Write report.md, report.csv, report.json and figures, in each of `formats`, to `out`; print the tables.

    `results` gets a copy of report.md, `readme` the first table between its markers. Raises `UserError` if none of the
    runs is finished.
    """
    datasets, left_out = group_runs(runs)
    reasons = [f"{run.folder}: {reason}" for run, reason in left_out]
    if not datasets:
        first = "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "")
        raise UserError(f"no finished run among {len(runs)}: {first}; finish them with their command and --resume")
    out.mkdir(parents=True, exist_ok=True)
    pictures = write_figures(datasets, out, formats)
    write_text(out / "report.md", markdown(datasets, reasons, pictures))
    write_csv(out / "report.csv", datasets)
    write_json(out / "report.json", as_json(datasets, reasons))
    if results:
        beside = write_figures(datasets, results.parent, formats, f"{results.stem}-")
        write_text(results, markdown(datasets, reasons, beside))
    if readme:
        replace_block(readme, readme_block(datasets))
    for name, groups in datasets.items():
        print("\n".join([f"\n{name}\n\n{maintable(groups)}", *unlike_notes(groups)]))
    for line in reasons:
        print(f"left out: {line}")
    print(f"\n{', '.join(str(p) for p in (out / 'report.md', results, readme) if p)} written, figures beside")


def write_csv(path: Path, datasets: dict[str, list[Group]]) -> None:
    """Write one row per dataset, group, quantity and protocol: fractions in [0, 1], empty for missing values.

    `not_like_for_like` names the flags in which a group and its reference differ beside the method.
    """
    names = ["dataset", "label", "quantity", "protocol", "n", "mean", "std", "reference", "pairs", "difference",
             "low95", "high95", "not_like_for_like"]  # fmt: skip
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for dataset, groups in datasets.items():
            for group in groups:
                for row in measure(group, groups):
                    found, difference = row["spread"], row["difference"]
                    writer.writerow([dataset, group.label, row["quantity"], row["protocol"],
                                     *(found or (0, None, None)), row["reference"],
                                     *(difference or (None, None, None, None)), " ".join(row["unlike"])])  # fmt: skip


def as_json(datasets: dict[str, list[Group]], left_out: list[str]) -> dict:
    """All numbers, single seeds included."""

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


def write_figures(
    datasets: dict[str, list[Group]], out: Path, formats: Sequence[str] = ("png",), prefix: str = ""
) -> dict[str, list[str]]:
    """Figures in `out`; returns the names of those in the first format, by dataset."""
    made: dict[str, list[str]] = {}
    for name, groups in datasets.items():
        slug, drawn = re.sub(r"\W+", "-", name).strip("-"), looks_of(groups)
        kinds = {"curves": plot_compared_curves, "differences": plot_differences, "ablations": plot_ablations,
                 "shares": plot_shares, "diagnostics": plot_diagnoses}  # fmt: skip
        for kind, plot in kinds.items():
            if (figure := plot(groups, name, drawn)) is not None:
                made.setdefault(name, []).append(save(figure, out / f"{prefix}{slug}-{kind}", formats)[0].name)
    return made


def readme_block(datasets: dict[str, list[Group]]) -> str:
    """The short table of the first dataset (the demo's if there is one), with its note."""
    groups = next(iter(datasets.values()))
    return f"{readme_table(groups)}\n\n{' '.join([README_NOTE, *unlike_notes(groups)])}"


def replace_block(readme: Path, block: str) -> None:
    """Put `block` between the markers of README.md. Raises `UserError` unless both are there, once."""
    text = readme.read_text() if readme.is_file() else ""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise UserError(f"{readme}: needs a line {START} and below it a line {END}, each once")
    before, rest = text.split(START)
    write_text(readme, f"{before}{START}\n{block}\n{END}{rest.split(END)[1]}")


def write_text(path: Path, text: str) -> None:
    """Write `path` atomically, in UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
