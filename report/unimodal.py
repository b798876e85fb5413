"""Bar chart of the unimodal accuracies of a trained model, one bar per definition."""

import numpy as np
from matplotlib.figure import Figure

from evaluation.unimodal import SOURCES
from utils.style import MUTED, MUTED_PALETTE, caption, panels, styled

COLOURS = dict(zip(SOURCES, MUTED_PALETTE, strict=False))


@styled()
def plot_unimodal(heads: dict[str, dict], title: str) -> Figure:
    """Plot the accuracies of `heads` (see `evaluation.checkpoint.measured`), one group of bars per modality."""
    names = [name for name in heads if name != "multimodal"]
    shown = [source for source in SOURCES if any(heads[name][source] for name in names)]
    figure, axes = panels(1, width=1.3 + 1.8 * len(names), height=2.3)
    axis, width = axes[0, 0], 0.8 / len(shown)
    for i, source in enumerate(shown):
        places = np.arange(len(names)) + (i - (len(shown) - 1) / 2) * width
        values = [own["accuracy"] if (own := heads[name][source]) else np.nan for name in names]
        bars = axis.bar(places, values, 0.94 * width, color=COLOURS[source], label=source)
        labels = ["" if np.isnan(value) else f"{100 * value:.1f}" for value in values]
        axis.bar_label(bars, labels, fontsize=6, padding=2)
    joint = heads["multimodal"]["head"]["accuracy"]
    axis.axhline(joint, color=MUTED, lw=1, ls="--", label=f"multimodal, {100 * joint:.1f}")
    axis.set_xticks(range(len(names)), names)
    axis.set(ylabel="test accuracy", ylim=(0, 1.02))
    figure.legend(frameon=False, fontsize=7, loc="outside right center")
    caption(figure, f"{title}: unimodal accuracy")
    return figure
