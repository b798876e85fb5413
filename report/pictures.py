"""Pictures of a trained model: features, heads, classes, the hardest and easiest clips.

    python -m report --model runs/NAME

Shapes: N test clips, C classes, D features.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor

from dataset.folder import Part
from dataset.specs import Modality
from evaluation.checkpoint import measured, unimodal_lines
from evaluation.numbers import fed_to
from evaluation.predictions import Predictions, predict_part
from report.clips import example, note_of, plot_clips, recorded
from report.load import load_run
from report.partition import Clip, read_partition
from report.runs import Run, dataset_of, flags_of, head_is_trained, read_run
from report.unimodal import plot_unimodal
from utils.errors import UserError
from utils.metrics import confusion
from utils.plots import plot_confusion
from utils.style import JOINT_COLOUR, MODALITY_COLOURS, caption, modality_colours, panels, save, styled

EXAMPLES = 6  # clips of a section
CLASS_COLOURS = (*MODALITY_COLOURS, "#d55e00", "#332288", "#882255", "#999999")
MARKERS = ("o", "s", "^", "P")  # one for each round through the colours
SHOWN = 2000  # largest number of clips in a t-SNE; more take minutes and overlap


# ------------------------------------------------------------------------------------------------- a run's model


def picture_model(folder: Path, out: Path, data_root: Path | None, formats: Sequence[str] = ("png",)) -> None:
    """Pictures of a run's trained model to `out`: unimodal, tsne, confusion and, after Remix, classes and clips.

    Prints the unimodal accuracies by source (head, slice, masked, linear probe). Needs the run's training data, at
    `data_root` if they have moved. Raises `UserError` for missing files.
    """
    run = read_run(folder)
    if not run.config:
        raise UserError(f"--model {folder}: not a run (no config.json); give a run's folder, such as runs/NAME")
    args, data, model = load_run(folder, data_root)
    classes, names = data.folder.classes, data.spec.names
    fed = fed_to(args, names)
    parts = {part: predict_part(model, clips, fed, 4 * args.batch_size, part) for part, clips in data.clips.items()}
    heads = measured(args, data, model, parts)["heads"]
    print("\n".join(unimodal_lines(heads)))
    found = parts["test"]
    labels = found.labels.cpu()
    title = f"{dataset_of(run.config)}, {run.method}, seed {run.seed}"
    features = {name: found.features[name].cpu().numpy() for name in fed}
    if len(features) > 1:
        features["fused"] = np.concatenate(list(features.values()), axis=1)
    counts = {name: confusion(logits, labels) for name, logits in trained_heads(run, found).items()}
    figures = {"unimodal": plot_unimodal(heads, title),
               "tsne": plot_tsne(features, labels.numpy(), classes, title, run.seed),
               "confusion": plot_confusion(counts, classes, f"{title}, test clips")}  # fmt: skip
    if (folder / "partition.csv").is_file():
        partition = read_partition(folder, names)
        shares = {name: kept_shares(partition, classes, name) for name in names}
        accuracies = {name: table.diagonal() / np.maximum(table.sum(axis=1), 1) for name, table in counts.items()}
        modalities = recorded(data.folder.root, data.spec.modalities)
        figures["classes"] = plot_classes(shares, accuracies, classes, title)
        figures["clips"] = plot_hardest(partition, data.folder.parts["train"], modalities, title)
    else:
        print(f"{folder}: no partition.csv (only Remix scores clips), so no pictures of classes and clips")
    for name, figure in figures.items():
        save(figure, out / name, formats)
    print(f"{', '.join(figures)} ({', '.join(formats)}) written to {out}")


def trained_heads(run: Run, found: Predictions) -> dict[str, Tensor]:
    """Logits (N, C) of the joint head, as `multimodal`, and of each modality whose head the run trained."""
    last, flags = run.history[-1] if run.history else {}, flags_of(run.config)
    trained = [name for name in found.logits if name != "joint" and head_is_trained(run.method, flags, name)]
    heads = {name: found.logits[name] for name in trained if last.get(f"test_acc_{name}", 0) is not None}
    return {"multimodal": found.logits["joint"]} | heads


def kept_shares(partition: dict[str, Clip], classes: list[str], modality: str) -> np.ndarray:
    """(C,) share of each class's clips that keep `modality`, NaN for a class without clips."""
    kept = [[modality in clip.kept for clip in partition.values() if clip.label == name] for name in classes]
    return np.array([np.mean(own) if own else np.nan for own in kept])


def plot_hardest(partition: dict[str, Clip], part: Part, modalities: Sequence[Modality], title: str) -> Figure:
    """The clips with the lowest and the highest KL in each modality, as stored in the training folder.

    Raises `UserError` if `part`, the training part, has none of the partition's clips.
    """
    places = {name: i for i, name in enumerate(part.clips)}
    present = {name: clip for name, clip in partition.items() if name in places}
    if not present:
        raise UserError("--data_root: train.csv there has none of the clips in partition.csv; give the run's own data")
    sections = {}
    for modality in (modality.name for modality in modalities):
        by_kl = sorted(present, key=lambda name: present[name].kl[modality])
        for word, chosen in (("hardest", by_kl[:EXAMPLES]), ("easiest", by_kl[::-1][:EXAMPLES])):
            clips = [(name, present[name]) for name in chosen]
            sections[f"{word} by {modality}"] = [
                example(part, modalities, places[name], clip.label,
                        f"{name}\n{clip.kl[modality]:.2f} bits\nkeeps {'+'.join(clip.kept)}") for name, clip in clips
            ]  # fmt: skip
    note = f"Lowest and highest KL from uniform at the last scoring. {note_of(modalities)}"
    return plot_clips(sections, f"{title}: hardest and easiest clips", note)


# ------------------------------------------------------------------------------------------------------- figures


@styled()
def plot_tsne(features: dict[str, np.ndarray], labels: np.ndarray, classes: list[str], title: str, seed: int) -> Figure:
    """t-SNE (van der Maaten and Hinton, 2008) of each entry of `features` (N, D), a colour and a marker for each class.

    At most `SHOWN` clips, drawn from `seed`. Only the separation of classes has a meaning; distances between clusters
    and their sizes have none.
    """
    rows = np.sort(np.random.default_rng(seed).permutation(len(labels))[:SHOWN])
    figure, axes = panels(len(features), width=2.7, height=2.7)
    for axis, (name, values) in zip(axes.flat, features.items(), strict=True):
        perplexity = min(30, (len(rows) - 1) / 3)
        points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(values[rows])  # (n, 2)
        for i, label in enumerate(classes):
            own = points[labels[rows] == i]
            axis.scatter(*own.T, s=9, color=CLASS_COLOURS[i % len(CLASS_COLOURS)], alpha=0.85, lw=0, label=label,
                         marker=MARKERS[i // len(CLASS_COLOURS) % len(MARKERS)])  # fmt: skip
        axis.set(title=f"{name} features, {values.shape[1]}-d", xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", ncols=-(-len(names) // 16), frameon=False, fontsize=7,
                  markerscale=1.5, handletextpad=0.1)  # fmt: skip
    caption(figure, f"{title}: t-SNE of {len(rows)} test clips")
    return figure


@styled()
def plot_classes(
    shares: dict[str, np.ndarray], accuracies: dict[str, np.ndarray], classes: list[str], title: str
) -> Figure:
    """Test accuracy of each head on each class, (C,) each, against the share of its clips that keep a modality, (C,).

    That is the head's own modality; for the joint head the first one.
    """
    colours = {"multimodal": JOINT_COLOUR} | modality_colours(list(shares))
    figure, axes = panels(len(accuracies), width=2.5, height=2.3, sharey=True)
    for axis, (name, values) in zip(axes.flat, accuracies.items(), strict=True):
        modality = name if name in shares else next(iter(shares))
        axis.scatter(shares[modality], values, s=14, color=colours[name], zorder=3)
        for label, x, y in zip(classes, shares[modality], values, strict=True):
            axis.annotate(label, (x, y), xytext=(3, 2), textcoords="offset points", fontsize=6)
        axis.set(title=f"{name} head", xlabel=f"share that keeps {modality}", xlim=(-0.03, 1.08))
        axis.grid(True, axis="x")
    axes[0, 0].set(ylabel="test accuracy on the class", ylim=(-0.03, 1.08))
    note = "A dot for each class. Share: of the class's training clips, at the last scoring."
    caption(figure, f"{title}: kept modality and accuracy by class", note)
    return figure
