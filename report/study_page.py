"""The page of a study: a table of all datasets, a table for each, forest plot, and what explains gain and loss."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from report.figures import Effect, effect, forest, plot_mean
from report.ranking import agreement, draw_ranking, gain_table, ranking_table
from report.runs import Group, Run, epoch_cost, holm, origin, paired_difference, spread
from report.study import EPOCHS, TITLES, WARMUP, Setting, Study
from report.study_results import Result, against, alone, cell, chance, results_of
from report.tables import spread_cell, table
from report.write import replace_block, write_text
from utils.run import write_json
from utils.style import (
    INK,
    METHOD_COLOURS,
    Look,
    caption,
    epoch_axis,
    label_ends,
    label_points,
    mark_warmup,
    modality_colours,
    panels,
    save,
    styled,
)

# -------------------------------------------------------------------------------------------------------------- tables


def dataset_table(study: Study, setting: Setting, results: dict[str, Result]) -> str:
    """All rows of a dataset in Markdown."""
    names = next(iter(results.values())).group.modalities
    if setting.ranked:
        results = dict(sorted(results.items(), key=lambda item: -item[1].mean))
    plain = next((row.group for row in results.values() if row.key == "baseline"), None)
    head = ["row", "rate", "multimodal", *names, "macro F1", "last epoch", "difference [95 %]", "p", "p (Holm)", "n",
            "cost"]  # fmt: skip
    lines = []
    for key, row in results.items():
        cells = [spread_cell(spread(row.chosen[name].values())) for name in ("multimodal", *names, "macro F1")]
        rate = study.rates[setting.data, key]
        cells = [row.label, rate, *cells, spread_cell(spread(row.last.values())), cell(row.difference), chance(row.p)]
        cost = epoch_cost(row.group, plain) if plain else None
        lines.append([*cells, chance(row.corrected), str(len(row.fused)), "–" if cost is None else f"{cost:.2f}"])
    if setting.ranked:  # the imbalance: best minus worst modality of the same network
        head = ["rank", *head, "imbalance"]
        ordered = list(results.values())
        lines = [[str(i + 1), *line, imbalance(ordered[i])] for i, line in enumerate(lines)]
    return table(head, lines)


def imbalance(row: Result) -> str:
    """Accuracy of a row's best modality minus that of its worst, in points; "–" where they are not trained."""
    means = [np.mean(list(row.chosen[name].values())) for name in row.group.modalities if row.chosen[name]]
    return f"{100 * (max(means) - min(means)):.1f}" if len(means) > 1 else "–"


def summary_table(found: dict[str, tuple[Setting, dict[str, Result]]], short: bool = False) -> str:
    """One line per dataset: baseline, Remix and their difference, corrected over the datasets; `short` is README's."""
    shown = {data: pair for data, pair in found.items() if {"baseline", "remix"} <= pair[1].keys()}
    corrected = holm([results["remix"].p for _, results in shown.values()])
    full = ["best modality alone", "p (Holm)", "last epoch [95 %]", "Remix – random [95 %]"]
    head = ["data", "baseline", "Remix", "Remix – baseline [95 %]", "n", *([] if short else full)]
    lines = []
    for (setting, results), p in zip(shown.values(), corrected, strict=True):
        plain, remix = results["baseline"], results["remix"]
        cells = [spread_cell(spread(row.fused.values())) for row in (plain, remix)]
        cells = [text.split(" ±")[0] for text in cells] if short else cells
        cells = [setting.title, *cells, cell(remix.difference), str(remix.difference.n if remix.difference else 0)]
        if not short:
            best = max(alone(results), key=lambda row: row.mean, default=None)
            cells += ["–" if best is None else f"{best.key} {spread_cell(spread(best.fused.values()))}"]
            cells += [chance(p), cell(paired_difference(remix.last, plain.last)),
                      cell(against(results, "remix", "random"))]  # fmt: skip
        lines.append(cells)
    return table(head, lines)


def finding(results: dict[str, Result]) -> str:
    """Which differences of a table are significant, in sentences made from its numbers."""
    tested = [row for row in results.values() if row.corrected is not None]
    sure = [row for row in tested if row.corrected is not None and row.corrected < 0.05]
    told = "; ".join(f"{row.label} {cell(row.difference)} against {row.base}" for row in sure) or "none"
    words = [f"Significant at 5 % after Holm's correction over {len(tested)} differences: {told}."] if tested else []
    if (pair := against(results, "remix", "random")) is not None:
        words.append(f"Remix against a random modality: {cell(pair)}.")
    if (pair := against(results, "remix", "keep_all_steps")) is not None:
        words.append(f"Remix against keep all with the same steps: {cell(pair)}.")
    return " ".join(words)


# ------------------------------------------------------------------------------------------------------------- figures


def draw_forest(found: dict[str, tuple[Setting, dict[str, Result]]], stem: Path) -> None:
    """Remix against the baseline and against a random modality, a row per dataset."""
    rows: list[Effect] = []
    for base, title in (("baseline", "Remix – baseline"), ("random", "Remix – random modality")):
        for setting, results in found.values():
            if (pair := against(results, "remix", base)) is not None:
                rows.append(effect(setting.title, pair, title))
    if rows:
        forest_of_remix(rows, stem, "Where Remix helps")


def forest_of_remix(rows: Sequence[Effect], stem: Path, title: str) -> None:
    look = Look(METHOD_COLOURS["remix"], "-", "o")
    forest(rows, Path(f"{stem}-forest"), title, note="Joint head, epoch chosen on validation, paired over seeds.",
           drawn=dict.fromkeys((row.label for row in rows), look))  # fmt: skip


@styled()
def draw_gap(found: dict[str, tuple[Setting, dict[str, Result]]], path: Path) -> Figure | None:
    """Remix's gain over the gap between the stronger and the weaker modality alone, a point per dataset."""
    points = []
    for setting, results in found.values():
        means = [100 * row.mean for row in alone(results)]
        pair = against(results, "remix", "baseline")
        if len(means) > 1 and pair is not None:
            points.append((max(means) - min(means), effect(setting.title, pair)))
    if not points:
        return None
    figure = Figure(figsize=(6.75, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color=INK, lw=0.8)
    for gap, row in points:
        if row.low is not None and row.high is not None:
            axis.plot([gap, gap], [row.low, row.high], color=METHOD_COLOURS["remix"], lw=1.2)
        axis.plot([gap], [row.mean], "o", color=METHOD_COLOURS["remix"], ms=5)
    axis.set(xlabel="best minus worst modality alone (points of test accuracy)", ylabel="Remix – baseline (points)")
    axis.margins(x=0.12)  # room for names
    caption(figure, "Gain and imbalance of information", "Bars are 95 % t intervals over seeds.")
    label_points(axis, [(row.label, gap, row.mean) for gap, row in points])
    save(figure, path)
    return figure


@styled()
def draw_why(cases: Sequence[tuple[Setting, dict[str, Result]]], path: Path) -> Figure:
    """What training looks like in each case: accuracy, unimodal training losses, partition, gradient agreement."""
    figure, axes = panels(4, len(cases), width=2.4, height=1.9)
    ends = []
    for (setting, results), row in zip(cases, axes, strict=True):
        plain, remix = results["baseline"].group, results["remix"].group
        names = remix.modalities
        colours = modality_colours(names)
        methods = ((plain, "joint", ":"), (remix, "Remix", "-"))
        both = [(name, *method) for name in names for method in methods]
        own = METHOD_COLOURS["baseline"], METHOD_COLOURS["remix"]
        ends.append((row[0], [plot_mean(row[0], group, "test_acc", label, colour)
                              for (group, label, _), colour in zip(methods, own, strict=True)]))  # fmt: skip
        row[0].set(title=f"{setting.title}\ntest accuracy", ylim=(0, 1))
        ends.append((row[2], [plot_mean(row[2], remix, f"n_{name}", name, colours[name]) for name in names]))
        row[2].set(title="clips that keep\na modality", ylim=(0, None))
        for axis, key in ((row[1], "train_ce_"), (row[3], "diagnose/clash_cosine_")):
            ends.append((axis, [plot_mean(axis, group, key + name, f"{name}, {label}", colours[name], line)
                                for name, group, label, line in both]))  # fmt: skip
        row[1].set(title="training loss of the\nunimodal heads", yscale="log")
        row[3].set(title="cosine of joint and\nunimodal gradient")
        for axis in row:
            epoch_axis(axis, [1, EPOCHS])
            mark_warmup(axis, WARMUP + 1, text=False)
    caption(figure, "Training with and without Remix", "Mean over seeds. The dashed line ends the warm-up.")
    label_ends((axis, [end for end in own if end is not None]) for axis, own in ends)
    save(figure, path)
    return figure


# ---------------------------------------------------------------------------------------------------------------- page


def as_json(study: Study, setting: Setting, results: dict[str, Result]) -> dict:
    rows = {row.key: {"label": row.label, "base": row.base, "rate": study.rates[setting.data, key],
                      "chosen": row.chosen, "last": row.last, "p": row.p, "holm": row.corrected,
                      "difference": row.difference and row.difference._asdict()}
            for key, row in results.items()}  # fmt: skip
    return {"data": setting.data, "title": setting.title, "rows": rows}


def write_page(study: Study, args: Namespace) -> None:
    """Print the tables; write them to the page with figures beside, study.json next to the runs, and the short table.

    `args` are those of `report.study`.
    """
    log_path = Path(args.log_path)
    doc = args.doc or log_path / "study.md"
    found = {setting.data: (setting, results_of(study, setting)) for setting in study.settings}
    found = {data: pair for data, pair in found.items() if pair[1]}
    if not found:
        print("no run has finished: nothing to report")
        return
    runs = [run for by_seed in study.runs.values() for run in by_seed.values()]
    stem = doc.parent / doc.stem
    ranked = {setting.title: results for setting, results in found.values() if setting.ranked}
    if ranked:
        summary, short = ranked_parts(ranked, stem), ranking_table(ranked)
    else:
        summary = compared_parts(found, stem) if len(found) > 1 else single_parts(*next(iter(found.values())), stem)
        short = summary_table(found, short=True)
    cases = [(setting, results) for setting, results in found.values()
             if "--diagnose" in setting.quiet and {"baseline", "remix"} <= results.keys()]  # fmt: skip
    why: list[str] = []
    if cases:
        draw_why(cases, Path(f"{stem}-why"))
        why = ["## Why", "", f"![Training with and without Remix in two cases]({stem.name}-why.png)", "",
               *(line for setting, results in cases for line in (*diagnosis(setting, results), ""))]  # fmt: skip
    lines = [*head_of(args, runs), "", *(["## All datasets", ""] if ranked or len(found) > 1 else []), *summary, ""]
    for setting, results in found.values():
        lines += [f"## {setting.title}", "", dataset_table(study, setting, results), "", finding(results), ""]
        if refused := {row: why for (data, row), why in study.refused.items() if data == setting.data}:
            lines += ["Not possible here: " + "; ".join(f"`{row}` ({why})" for row, why in refused.items()) + ".", ""]
        if not setting.validated:
            lines += [f"Learning rate {', '.join(setting.rates)} and the last epoch for all rows "
                      "([protocol.md](protocol.md#training)).", ""]  # fmt: skip
    lines += why
    print("\n" + "\n".join(lines))
    write_text(doc, "\n".join(lines).rstrip() + "\n")
    about = {"command": args.command, "runs": len(runs), "origin": origin(runs)}
    write_json(log_path / "study.json", {"about": about} | {key: as_json(study, *pair) for key, pair in found.items()})
    if args.readme:
        replace_block(args.readme, short)
    print(f"\n{doc} written, figures beside")


LEGEND = ("Test accuracy in percent at the epoch chosen on validation (last epoch: after the last one), mean ± sample "
          "standard deviation over n seeds. Differences are paired over seeds, in points, with a 95 % t interval; p "
          "values are of paired t tests. Cost: seconds of scoring and training per epoch over the "
          "baseline's.")  # fmt: skip


def compared_parts(found: dict[str, tuple[Setting, dict[str, Result]]], stem: Path) -> list[str]:
    """Remix against the baseline over all datasets: the lines of its section; pictures are written beside `stem`."""
    draw_forest(found, stem)
    lines = [summary_table(found), "",
             f"{LEGEND} In this table Holm's correction is over the datasets, below over the rows of a table.", "",
             "![Difference of Remix to the baseline and to a random modality, by dataset]"
             f"({stem.name}-forest.png)"]  # fmt: skip
    if draw_gap(found, Path(f"{stem}-gap")) is not None:
        lines += ["", f"![Gain of Remix over the gap between the modalities]({stem.name}-gap.png)"]
    return lines


def single_parts(setting: Setting, results: dict[str, Result], stem: Path) -> list[str]:
    """A study of one dataset: the differences of its rows; the picture is written beside `stem`."""
    rows = [effect(row.label, row.difference, f"difference to {row.base}")
            for row in results.values() if row.difference]  # fmt: skip
    if not rows:
        return [LEGEND]
    forest_of_remix(rows, stem, setting.title)
    return [LEGEND, "", f"![Difference of each row to the one it is compared with]({stem.name}-forest.png)"]


def ranked_parts(found: dict[str, dict[str, Result]], stem: Path) -> list[str]:
    """All balance methods over all datasets: the lines of their section; the picture is written beside `stem`."""
    draw_ranking(found, Path(f"{stem}-methods"))
    agree = agreement(found)
    return [ranking_table(found), "",
            "Accuracy, and in parentheses its difference to the baseline; bold: significant at 5 % after Holm's "
            f"correction over the dataset's rows. {LEGEND} Imbalance: best minus worst modality of the same network.",
            "", f"![Difference of each method to the baseline, by dataset]({stem.name}-methods.png)", "",
            "What Remix adds to each method:", "", gain_table(found),
            *(["", "Do the datasets agree?", "", *agree] if agree else [])]  # fmt: skip


def head_of(args: Namespace, runs: Sequence[Run]) -> list[str]:
    return [f"# {TITLES[args.study]}", "", f"Written by `{args.command}` from {len(runs)} runs ({origin(runs)}). The "
            "rules were fixed before: [protocol.md](protocol.md)."]  # fmt: skip


def diagnosis(setting: Setting, results: dict[str, Result]) -> list[str]:
    """What the diagnostics say, after the warm-up: means over epochs, paired over seeds."""
    rows = []
    for key, name in (*((f"diagnose/clash_cosine_{m}", f"cosine of joint and unimodal gradient, {m}")
                        for m in results["remix"].group.modalities),
                      *((f"diagnose/shapley_{m}", f"Shapley value, {m}") for m in results["remix"].group.modalities),
                      ("diagnose/ece_joint", "calibration error, joint head")):  # fmt: skip
        found = {row: _after_warmup(results[row].group, key) for row in ("baseline", "remix")}
        if all(found.values()):
            pair = paired_difference(found["remix"], found["baseline"])
            ends = "" if pair is None or pair.low is None else f" [{pair.low:+.3f}, {pair.high:+.3f}]"
            means = [f"{np.mean(list(values.values())):.3f}" for values in found.values()]
            rows.append([name, *means, "–" if pair is None else f"{pair.mean:+.3f}{ends}"])
    for name in results["remix"].group.modalities:
        total = next(iter(results["remix"].group.runs.values())).config["data"]["clips"]["train"]
        kept = list(_after_warmup(results["remix"].group, f"n_{name}").values())
        if kept:
            rows.append([f"share of clips that keep {name}", "–", f"{np.mean(kept) / total:.3f}", "–"])
    words = f"{setting.title}, mean over the epochs after the warm-up:"
    return [words, "", table(["quantity", "baseline", "Remix", "difference [95 %]"], rows)] if rows else []


def _after_warmup(group: Group, key: str) -> dict[int, float]:
    found = {seed: [line[key] for line in run.history if line["epoch"] >= WARMUP and line.get(key) is not None]
             for seed, run in group.runs.items()}  # fmt: skip
    return {seed: float(np.mean(values)) for seed, values in found.items() if values}
