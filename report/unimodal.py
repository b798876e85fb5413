"""Bar chart of the unimodal accuracies of a trained model, one bar per definition."""

import numpy as np
from matplotlib.figure import Figure

from evaluation.unimodal import SOURCES

COLOURS = dict(zip(SOURCES, ("#274690", "#e08a00", "#b0b0b0", "#1b9e77"), strict=True))


def plot_unimodal(heads: dict[str, dict], title: str) -> Figure:
    """Accuracies of `heads` (as `evaluation.checkpoint.measured` gives them), a group of bars for each modality."""
    names = [name for name in heads if name != "multimodal"]
    shown = [source for source in SOURCES if any(heads[name][source] for name in names)]
    figure = Figure(figsize=(2.4 + 2.2 * len(names), 4.2), layout="constrained")
    axis, width = figure.subplots(), 0.8 / len(shown)
    for i, source in enumerate(shown):
        places = np.arange(len(names)) + (i - (len(shown) - 1) / 2) * width
        values = [own["accuracy"] if (own := heads[name][source]) else np.nan for name in names]
        bars = axis.bar(places, values, 0.94 * width, color=COLOURS[source], label=source)
        labels = ["" if np.isnan(value) else f"{100 * value:.1f}" for value in values]
        axis.bar_label(bars, labels, fontsize=8, padding=2)
    joint = heads["multimodal"]["head"]["accuracy"]
    axis.axhline(joint, color="0.4", lw=1, ls="--", label=f"multimodal, {100 * joint:.1f}")
    axis.set_xticks(range(len(names)), names)
    axis.set(ylabel="test accuracy", ylim=(0, 1.02))
    axis.legend(frameon=False, ncols=2, fontsize=8, loc="best")
    figure.suptitle(f"{title}: unimodal accuracy")
    return figure
