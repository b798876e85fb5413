"""The benchmark's part of a study's page: every balance method alone and with Remix, over all datasets."""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import kendalltau, rankdata

from report.figures import draw_effect, effect, limits_of
from report.runs import Difference, excludes_zero
from report.study_results import Result, against, cell
from report.tables import table
from utils.style import INK, METHOD_COLOURS, Look, caption, save, styled

Found = Mapping[str, Mapping[str, Result]]  # a dataset's title -> its rows by key, such as "agm" and "agm+remix"
PLAIN, REMIXED = "baseline", "remix"  # the pair of rows without a balance method


def methods_of(found: Found) -> list[tuple[str, str]]:
    """The pairs of rows without and with Remix, the best method first: by its rank without Remix, see `ranks`."""
    rank = ranks(found)
    keys = {key: None for rows in found.values() for key in rows}
    names = [key for key in keys if key not in (PLAIN, REMIXED) and not key.endswith("+remix")]
    pairs = [(PLAIN, REMIXED), *((name, f"{name}+remix") for name in names)]
    return sorted(pairs, key=lambda pair: rank.get(pair[0], np.inf))


def ranks(found: Found) -> dict[str, float]:
    """The rank of each row by accuracy, 1 for the best; mean over the datasets on which it ran."""
    places: dict[str, list[float]] = {}
    for rows in found.values():
        for key, place in zip(rows, rankdata([-row.mean for row in rows.values()]), strict=True):
            places.setdefault(key, []).append(float(place))
    return {key: float(np.mean(own)) for key, own in places.items()}


def ranking_table(found: Found) -> str:
    """A line for each row: mean rank, accuracy and difference to the baseline on each dataset."""
    rank = ranks(found)
    labels = {key: row.label for rows in found.values() for key, row in rows.items()}
    lines = []
    for key in sorted(rank, key=rank.__getitem__):
        own = [rows.get(key) for rows in found.values()]
        lines.append([labels[key], f"{rank[key]:.1f}", *("–" if row is None else _accuracy(row) for row in own)])
    return table(["row", "mean rank", *found], lines)


def _accuracy(row: Result) -> str:
    """`81.2 (+3.1 [+1.2, +5.0])`; bold where the difference is significant after Holm's correction."""
    text = f"{100 * row.mean:.1f}" + (f" ({cell(row.difference)})" if row.difference else "")
    return f"**{text}**" if row.corrected is not None and row.corrected < 0.05 else text


def gain_table(found: Found) -> str:
    """What Remix adds to each method: the difference of its rows with and without Remix."""
    lines = []
    for name, remixed in methods_of(found):
        gains = [against(rows, remixed, name) for rows in found.values()]
        if any(gains):
            label = "no balance method" if name == PLAIN else name
            lines.append([label, *(cell(gain) for gain in gains)])
    return table(["method", *(f"{title}: with Remix – without" for title in found)], lines)


def agreement(found: Found) -> list[str]:
    """Whether the datasets agree: Kendall's tau of the order of rows, and the rows on which they contradict."""
    lines = []
    for (one, ours), (other, theirs) in combinations(found.items(), 2):
        common = [key for key in ours if key in theirs]
        if len(common) < 3:
            continue
        tau, p = kendalltau([ours[key].mean for key in common], [theirs[key].mean for key in common])
        pairs = {ours[key].label: (ours[key].difference, theirs[key].difference) for key in common}
        told = [f"{label} ({cell(first)}, {cell(second)})"
                for label, (first, second) in pairs.items() if opposed(first, second)]  # fmt: skip
        lines.append(f"- {one} and {other}: Kendall's tau of the {len(common)} common rows {tau:+.2f} (p {p:.3f}). "
                     "Opposite differences to the baseline, both intervals without 0: "
                     f"{'; '.join(told) or 'none'}.")  # fmt: skip
    return lines


def opposed(one: Difference | None, other: Difference | None) -> bool:
    """Whether two differences have opposite signs and both intervals exclude zero."""
    if one is None or other is None:
        return False
    return all(excludes_zero(found.low, found.high) for found in (one, other)) and one.mean * other.mean < 0


@styled()
def draw_ranking(found: Found, path: Path) -> Figure:
    """Difference to the baseline of each method, without and with Remix, a panel per dataset."""
    pairs = methods_of(found)
    figure = Figure(figsize=(6.75, 1.2 + 0.24 * len(pairs)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(found), sharey=True))
    for axis, (title, rows) in zip(axes, found.items(), strict=True):
        axis.axvline(0, color=INK, lw=0.8)
        axis.set_title(title)
        axis.grid(True, axis="x")
        axis.grid(False, axis="y")
        effects = {key: effect(row.label, row.difference) for key, row in rows.items() if row.difference}
        limits = limits_of(list(effects.values()))
        for y, pair in enumerate(pairs):
            for key, shift, colour in zip(pair, (-0.17, 0.17), (INK, METHOD_COLOURS["remix"]), strict=True):
                if key in effects:
                    draw_effect(axis, effects[key], y + shift, Look(colour, "-", "o"), limits)
        axis.set_xlim(*limits)
    axes[0].set_yticks(range(len(pairs)), ["no balance method" if name == PLAIN else name for name, _ in pairs])
    axes[0].set_ylim(len(pairs) - 0.4, -0.6)
    axes[len(axes) // 2].set_xlabel("difference to the baseline in test accuracy (points)")
    caption(figure, "Balance methods without Remix (black) and with Remix (orange)",
            "95 % t intervals over seeds. Filled: the interval excludes zero.")  # fmt: skip
    save(figure, path)
    return figure
