"""Markdown tables of a comparison: mean, spread and n per protocol, paired differences to the baseline, settings.

Numbers are percentages of test clips, except macro F1, which is 100 times the F1.
"""

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from report.runs import (
    PROTOCOLS,
    VARIANTS,
    Difference,
    Group,
    Spread,
    ablations,
    command_of,
    diagnoses,
    differing_flags,
    epoch_cost,
    minutes,
    paired_difference,
    quantities,
    reference_of,
    short,
    spread,
    values,
)

UNLIKE = "†"  # marks a difference to a baseline with other flags

# ----------------------------------------------------------------------------------------------------------- numbers


def measure(group: Group, groups: list[Group]) -> list[dict]:
    """A group's row for each quantity and protocol: n, mean, std and the paired difference, as fractions.

    `unlike` names the flags, other than the method, in which the group and its reference differ. If it is not empty,
    the difference is not like for like.
    """
    reference = reference_of(group, groups)
    unlike = differing_flags(group, reference) if reference else []
    rows = []
    for quantity in quantities(group.modalities):
        for protocol in PROTOCOLS:
            own = values(group, quantity, protocol)
            difference = paired_difference(own, values(reference, quantity, protocol)) if reference else None
            rows.append({
                "quantity": quantity, "protocol": protocol, "by_seed": own, "spread": spread(own.values()),
                "difference": difference, "reference": reference.label if reference else None, "unlike": unlike,
            })  # fmt: skip
    return rows


def _cell(found: Spread | None, n: int) -> str:
    """`81.2 ± 0.5`, with the number of values where it is not the row's `n`."""
    return spread_cell(found) + ("" if found is None or found.n == n else f" (n={found.n})")


def spread_cell(found: Spread | None) -> str:
    """`81.2 ± 0.5`, in percent; "–" for nothing."""
    if found is None:
        return "–"
    return f"{100 * found.mean:.1f}" + (f" ± {100 * found.std:.1f}" if found.std is not None else "")


def _difference_cell(row: dict, n: int) -> str:
    """`+3.1 [+1.2, +5.0]`, or the reason for a missing interval; marked if the comparison is not like for like."""
    found, mark = row["difference"], UNLIKE if row["unlike"] else ""
    if found is None:
        return "–"
    text = difference_cell(found, mark)
    if found.low is None:
        return f"{text} (n=1: no interval)"
    return text if found.n == n else f"{text} (n={found.n})"


def difference_cell(found: Difference, mark: str = "") -> str:
    """`difference_text` of a difference of fractions."""
    low, high = (None if end is None else 100 * end for end in (found.low, found.high))
    return difference_text(100 * found.mean, low, high, mark)


def difference_text(mean: float, low: float | None, high: float | None, mark: str = "") -> str:
    """`+3.1 [+1.2, +5.0]`, in points, without an interval `+3.1`; `mark` stands behind the mean."""
    return f"{mean:+.1f}{mark}" + ("" if low is None or high is None else f" [{low:+.1f}, {high:+.1f}]")


# ------------------------------------------------------------------------------------------------------------ tables


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, aligned as plain text too: the first column left, the others right.

    No-break spaces keep `81.2 ± 0.5` and `[+1.2, +5.0]` on one line: pages break the cells of a wide table.
    """
    rows = [
        [re.sub(r" ± |, (?=[+-][\d.]+\])", lambda m: m[0].replace(" ", "\u00a0"), cell) for cell in row] for row in rows
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    pad = [str.ljust, *[str.rjust] * (len(head) - 1)]
    lines = [
        "| " + " | ".join(p(cell, w) for p, cell, w in zip(pad, row, widths, strict=True)) + " |"
        for row in [head, *rows]
    ]
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def maintable(groups: list[Group]) -> str:
    """The main table: last epoch, the papers' protocol, and the difference to the baseline."""
    shown = list(quantities(groups[0].modalities))
    head = ["method", *shown, "best on test¹", "best on validation", "multimodal – baseline [95 %]", "n", "min/run",
            "epoch / baseline's"]  # fmt: skip
    rows = []
    for group in groups:
        reference = reference_of(group, groups)
        cost = epoch_cost(group, reference) if reference else None
        found = {(row["quantity"], row["protocol"]): row for row in measure(group, groups)}
        n = len(group.runs)
        cells = [_cell(found[quantity, "last"]["spread"], n) for quantity in shown]
        cells += [_cell(found["multimodal", protocol]["spread"], n) for protocol in ("best_test", "best_val")]
        cells += [_difference_cell(found["multimodal", "last"], n)]
        mark = UNLIKE if found["multimodal", "last"]["unlike"] else ""
        rows.append([group.label, *cells, str(n), f"{minutes(group).mean:.2g}", f"{cost:.2f}{mark}" if cost else "–"])
    head, rows = _without_empty(head, rows)
    return table(head, rows)


def readme_table(groups: list[Group]) -> str:
    """README's short table: baseline, Remix and each modality alone (all methods if these are absent), last epoch."""
    modalities = groups[0].modalities
    main = [group for group in groups if group.label in ("baseline", "remix", *modalities)] or groups
    heads, rows = ["multimodal", *modalities], []
    for group in main:
        found = {row["quantity"]: row for row in measure(group, groups) if row["protocol"] == "last"}
        n = len(group.runs)
        cells = [_cell(found[head]["spread"], n) for head in heads]
        rows.append([group.label, *cells, _difference_cell(found["multimodal"], n), str(n)])
    head = ["method", *heads, "multimodal – baseline [95 %]", "n"]
    return table(*_without_empty(head, rows))


README_NOTE = ("Test accuracy in percent after the last epoch: mean ± standard deviation over n seeds. Differences are "
               "paired by seed, in points, with a 95 % t interval.")  # fmt: skip


def quantitytable(quantity: str, groups: list[Group]) -> str:
    """One quantity under every protocol, each with its difference to the baseline."""
    head, rows = [quantity], [[group.label] for group in groups]
    for protocol, name in PROTOCOLS.items():
        head += [name, "– baseline [95 %]"]
        for group, row in zip(groups, rows, strict=True):
            found = next(r for r in measure(group, groups) if (r["quantity"], r["protocol"]) == (quantity, protocol))
            row += [_cell(found["spread"], len(group.runs)), _difference_cell(found, len(group.runs))]
    head, rows = _without_empty([*head, "n"], [[*row, str(len(g.runs))] for row, g in zip(rows, groups, strict=True)])
    return table(head, rows)


def _without_empty(head: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Drop the columns in which no row has a number."""
    keep = [i for i in range(len(head)) if any(row[i] != "–" for row in rows)]
    return [head[i] for i in keep], [[row[i] for i in keep] for row in rows]


def ablation_table(groups: list[Group]) -> str | None:
    """One flag at a time: the paired difference to the centre, with its standard error; None without an ablation.

    A difference larger than its standard error is in bold. This is a weak criterion, since n is small.
    """
    found, heads = ablations(groups), ["multimodal", *groups[0].modalities]
    head, rows = ["changed", *(f"{quantity} [± SE]" for quantity in heads), "n"], []
    for group, centre, name in found:
        cells = []
        for quantity in heads:
            ours, theirs = values(group, quantity), values(centre, quantity)
            over = spread(100 * (ours[seed] - theirs[seed]) for seed in ours.keys() & theirs.keys())
            if over is None or over.std is None:
                cells.append("–" if over is None else f"{over.mean:+.1f} (n=1)")
                continue
            error = over.std / over.n**0.5
            text = f"{over.mean:+.1f} ± {error:.1f}"
            cells.append(f"**{text}**" if abs(over.mean) > error else text)
        change = f"{centre.label}: {name} {short(centre.flags.get(name))} -> {short(group.flags.get(name))}"
        pairs = len(group.runs.keys() & centre.runs.keys())
        rows.append([change, *cells, str(pairs)])
    return table(head, rows) if rows else None


def diagnostics_table(groups: list[Group]) -> str | None:
    """What `--diagnose` measured: mean over the last tenth of the epochs, mean ± std over seeds; None if nothing."""
    keys = diagnoses(groups[0].modalities)
    head, rows = ["mean of the last tenth of epochs", *keys], []
    for group in groups:
        cells = []
        for key in keys:
            found = [[line[f"diagnose/{key}"] for line in run.history[-max(1, len(run.history) // 10) :]
                      if line.get(f"diagnose/{key}") is not None] for run in group.runs.values()]  # fmt: skip
            over = spread(sum(numbers) / len(numbers) for numbers in found if numbers)
            cells.append("–" if over is None else f"{over.mean:.3f}" + (f" ± {over.std:.3f}" if over.n > 1 else ""))
        rows.append([group.label, *cells])
    rows = [row for row in rows if set(row[1:]) != {"–"}]
    return table(*_without_empty(head, rows)) if rows else None


def unlike_notes(groups: list[Group]) -> list[str]:
    """A sentence for each group that is compared with a baseline of other flags."""
    lines = []
    for group in groups:
        reference = reference_of(group, groups)
        if reference and (names := differing_flags(group, reference)):
            pairs = ((group.flags.get(name, "off"), reference.flags.get(name, "off")) for name in names)
            flags = ", ".join(f"{n} ({short(a)}, {short(b)})" for n, (a, b) in zip(names, pairs, strict=True))
            lines += [f"{UNLIKE} **Not like for like**: {group.label} and {reference.label} also differ in {flags}."]
    return lines


def notes(groups: list[Group]) -> str:
    """Notes for reading the table."""
    lines = [
        "Test accuracy in percent (macro F1 x 100) after the last epoch: mean ± sample standard deviation over n "
        "seeds. ¹ The papers' protocol: the best epoch is chosen on the test set itself, which flatters every method."
    ]
    if any(values(group, "multimodal", "best_val") for group in groups):
        lines += ["Best on validation: the epoch is chosen on a part held out from train."]
    else:
        lines += ["Without a validation part (`--val_fraction`) no epoch can be chosen independently of test."]
    pairs = [paired_difference(values(group, "multimodal"), values(reference, "multimodal"))
             for group in groups if (reference := reference_of(group, groups))]  # fmt: skip
    if any(pair and pair.low is not None for pair in pairs):
        lines += ["Differences are paired over the same seeds, in points, with a 95 % t interval."]
    elif pairs:
        lines += ["n=1: no interval. The variation between seeds is unknown; run more of them (`--seeds`)."]
    else:
        lines += ["There is no baseline beside another method among these runs, so there are no differences."]
    if alone := [group.label for group in groups if group.method in group.modalities]:
        names = f"{', '.join(alone[:-1])} and {alone[-1]} are networks" if alone[1:] else f"{alone[0]} is a network"
        lines += [f"{names} trained on that modality alone; multimodal is then the joint head."]
    for name, (method, flags) in VARIANTS.items():
        if any(group.label.split(",")[0].split(" + ")[0] == name for group in groups):
            words = " ".join(f"`--{flag} {short(value)}`" for flag, value in flags.items())
            lines += [f"{name} is {method} with {words}."]
    if any(reference_of(group, groups) for group in groups):
        lines += ["Epoch / baseline's: seconds of scoring and training per epoch, over the same seeds; they depend on "
                  "what else the machine did."]  # fmt: skip
    return " ".join([*lines, *unlike_notes(groups)])


def protocol(groups: list[Group]) -> list[str]:
    """The flags that all groups share, and those of each group."""
    shared = [item for item in groups[0].flags.items() if all(item in group.flags.items() for group in groups)]
    own = {group.label: [item for item in group.flags.items() if item not in shared] for group in groups}
    return [f"all: {_flag_words(shared)}", *(f"{label}: {_flag_words(items)}" for label, items in own.items())]


def settings(groups: list[Group]) -> str:
    """The flags that all groups share, those of each group, the code and the machine."""
    runs = [run for group in groups for run in group.runs.values()]
    lines = [f"- {line}" for line in protocol(groups)]

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
    """The command that repeats each row and, if there was one, the comparison it was part of."""
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


# ------------------------------------------------------------------------------------------------------- all of it


def markdown(datasets: dict[str, list[Group]], left_out: list[str], pictures: dict[str, list[str]]) -> str:
    """The whole report; `left_out` are lines on runs, `pictures` names of files by dataset."""
    command = shlex.join(["python", "-m", "report", *sys.argv[1:]])
    scripts = {"compare.py": "bash scripts/run_compare.sh", "reproduce.py": "bash scripts/reproduce.sh"}
    made_by = scripts.get(Path(sys.argv[0]).name, command)
    parts = [f"<!-- generated by `{made_by}`: change the runs, not this file -->", "# Results"]
    for name, groups in datasets.items():
        parts += [f"## {name}", maintable(groups), notes(groups)]
        parts += [f"![{name}: {picture}]({picture})" for picture in pictures.get(name, [])]
        shown = quantities(groups[0].modalities)
        parts += ["### Every protocol", *(quantitytable(quantity, groups) for quantity in shown)]
        if ablated := ablation_table(groups):
            parts += ["### One flag at a time", "Last epoch, points, paired over seeds; in bold what exceeds its "
                      "standard error.", ablated]  # fmt: skip
        if measured := diagnostics_table(groups):
            parts += ["### Diagnostics (`--diagnose`)", measured]
        parts += ["### Settings", settings(groups), "### Commands", commands(groups)]
    if left_out:
        parts += ["## Left out", "\n".join(f"- {line}" for line in left_out)]
    return "\n\n".join(parts) + "\n"
