"""The numbers of a study's rows: accuracies at the chosen epoch, differences to the row they are compared with."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from report.runs import Difference, Group, group_of, holm, p_value, paired_difference, quantities, values
from report.study import WARMUP, Setting, Study
from report.tables import difference_cell


class Result(NamedTuple):
    """A row's numbers by seed, in [0, 1]: at the chosen epoch by quantity, and of the joint head after the last epoch.

    `p` is of a paired t test against the row `base`, `corrected` the same after Holm's correction over the table.
    """

    key: str
    label: str
    base: str
    group: Group
    chosen: dict[str, dict[int, float]]
    last: dict[int, float]
    difference: Difference | None
    p: float | None
    corrected: float | None

    @property
    def fused(self) -> dict[int, float]:
        return self.chosen["multimodal"]

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.fused.values())))


def results_of(study: Study, setting: Setting) -> dict[str, Result]:
    """The finished rows of a dataset by key, in the order of the study."""
    found: dict[str, Result] = {}
    for key, entry in study.rows[setting.data].items():
        runs = study.runs.get((setting.data, key))
        if not runs:
            continue
        group = group_of(entry.label, runs)
        chosen = {name: values(group, name, setting.protocol, WARMUP) for name in quantities(group.modalities)}
        base = next((row for row in found.values() if row.label == entry.base), None)
        pair = (chosen["multimodal"], base.fused) if base else ({}, {})
        found[key] = Result(key, entry.label, entry.base, group, chosen, values(group, "multimodal"),
                            paired_difference(*pair), p_value(*pair), None)  # fmt: skip
    corrected = holm([row.p for row in found.values()])
    return {key: row._replace(corrected=p) for (key, row), p in zip(found.items(), corrected, strict=True)}


def alone(results: dict[str, Result]) -> list[Result]:
    """The rows of the modalities that were trained alone."""
    return [row for row in results.values() if row.key in row.group.modalities]


def against(results: Mapping[str, Result], one: str, other: str) -> Difference | None:
    """The paired difference of two rows' joint heads; None where one is missing."""
    if one not in results or other not in results:
        return None
    return paired_difference(results[one].fused, results[other].fused)


def cell(found: Difference | None) -> str:
    return "–" if found is None else difference_cell(found)


def chance(p: float | None) -> str:
    return "–" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"
