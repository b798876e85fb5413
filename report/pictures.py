"""Pictures of one trained model: features, heads, classes, the hardest and easiest clips.

    python -m report --model runs/NAME

Shapes: N test clips, C classes, D features.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor

from dataset.folder import Part
from dataset.pack import read_frame
from dataset.specs import DatasetSpec, Modality
from evaluation.checkpoint import measured, unimodal_lines
from evaluation.numbers import fed_to
from evaluation.predictions import Predictions, predict_part
from report.figures import save_figure
from report.load import load_run
from report.partition import Clip, read_partition
from report.runs import Run, dataset_of, flags_of, head_is_trained, read_run
from report.unimodal import plot_unimodal
from utils.errors import UserError
from utils.metrics import confusion
from utils.plots import JOINT_COLOUR, modality_colours, plot_confusion

EXAMPLES = 6  # clips in a row of pictures
SHOWN = 2000  # clips of a t-SNE: more take minutes and hide one another


class Example(NamedTuple):
    """One clip to show, by modality, and its caption.

    Frames are side by side as one RGB image, uint8 (H, W, 3); arrays are (frequency, time) or (D,).
    """

    shown: dict[str, np.ndarray]
    caption: str


# ------------------------------------------------------------------------------------------------- a run's model


def picture_model(folder: Path, out: Path, data_root: Path | None) -> None:
    """Pictures of a run's trained model to `out`: unimodal, tsne, confusion and, after Remix, classes and clips.

    Prints the unimodal accuracies by what they are measured with, a linear probe among them. Needs the data the run was
    trained on, at `data_root` if it has moved. Raises `UserError` for whatever is missing.
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
        figures["classes"] = plot_classes(shares, accuracies, classes, title)
        figures["clips"] = plot_hardest(partition, data.folder.parts["train"], data.spec, title)
    else:
        print(f"{folder}: no partition.csv (only Remix scores clips), so no pictures of classes and clips")
    for name, figure in figures.items():
        save_figure(figure, out / f"{name}.png")
    print(f"{', '.join(f'{name}.png' for name in figures)} written to {out}")


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


def plot_hardest(partition: dict[str, Clip], part: Part, spec: DatasetSpec, title: str) -> Figure:
    """The clips with the lowest and the highest KL in each modality, as stored in the training folder.

    Raises `UserError` if `part`, the training part, has none of the partition's clips.
    """
    places = {name: i for i, name in enumerate(part.clips)}
    present = {name: clip for name, clip in partition.items() if name in places}
    if not present:
        raise UserError("--data_root: train.csv there has none of the clips in partition.csv; give the run's own data")

    def example(name: str, modality: str) -> Example:
        clip = partition[name]
        shown = {own.name: stored(own, part.files[own.name][places[name]]) for own in spec.modalities}
        return Example(shown, f"{name}\n{clip.label}, {clip.kl[modality]:.2f} bits, keeps {'+'.join(clip.kept)}")

    rows = {}
    for modality in spec.names:
        by_kl = sorted(present, key=lambda name: present[name].kl[modality])
        rows[f"hardest by {modality}"] = [example(name, modality) for name in by_kl[:EXAMPLES]]
        rows[f"easiest by {modality}"] = [example(name, modality) for name in by_kl[::-1][:EXAMPLES]]
    return plot_examples(rows, f"{title}: lowest and highest KL from uniform at the last scoring")


def stored(modality: Modality, files: list[Path] | Path) -> np.ndarray:
    """A clip in one modality, for `Example`: three frames side by side at most, or the array."""
    if isinstance(files, list):  # frames
        picks = np.linspace(0, len(files) - 1, min(3, len(files))).round().astype(int)
        frames = [read_frame(files[k]) for k in picks]
        height = min(len(frame) for frame in frames)
        return np.concatenate([frame[:height] for frame in frames], axis=1)  # (H, W, 3)
    array = np.load(files, allow_pickle=False)
    return (
        array.T if modality.recipe is not None and modality.recipe.name == "fbank" else array
    )  # that recipe stores (time, mel)


# ------------------------------------------------------------------------------------------------------- figures


def plot_tsne(features: dict[str, np.ndarray], labels: np.ndarray, classes: list[str], title: str, seed: int) -> Figure:
    """t-SNE (van der Maaten and Hinton, 2008) of each entry of `features` (N, D), a colour for each class.

    At most `SHOWN` clips, drawn from `seed`. Only the separation of classes has a meaning; distances between clusters
    and their sizes have none.
    """
    rows = np.sort(np.random.default_rng(seed).permutation(len(labels))[:SHOWN])
    palette = [_class_colour(i, len(classes)) for i in range(len(classes))]
    figure = Figure(figsize=(5.2 * len(features), 5.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(features)))
    for axis, (name, values) in zip(axes, features.items(), strict=True):
        perplexity = min(30, (len(rows) - 1) / 3)
        points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(values[rows])  # (n, 2)
        for i, label in enumerate(classes):
            own = points[labels[rows] == i]
            axis.scatter(*own.T, s=12, color=palette[i], alpha=0.8, lw=0, label=label)
        axis.set(title=f"{name} features, {values.shape[1]}-d", xticks=[], yticks=[])
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(16, len(names)), frameon=False, markerscale=2)
    figure.suptitle(f"{title}: t-SNE of {len(rows)} test clips")
    return figure


def _class_colour(i: int, n: int) -> tuple:
    return colormaps["tab10"](i) if n <= 10 else colormaps["tab20"](i) if n <= 20 else colormaps["turbo"](i / (n - 1))


def plot_classes(
    shares: dict[str, np.ndarray], accuracies: dict[str, np.ndarray], classes: list[str], title: str
) -> Figure:
    """Test accuracy of each head on each class, (C,) each, against the share of its clips that keep a modality, (C,).

    That is the head's own modality; for the joint head the first one.
    """
    colours = {"multimodal": JOINT_COLOUR} | modality_colours(list(shares))
    figure = Figure(figsize=(5.2 * len(accuracies), 4.8), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(accuracies), sharey=True))
    for axis, (name, values) in zip(axes, accuracies.items(), strict=True):
        modality = name if name in shares else next(iter(shares))
        axis.scatter(shares[modality], values, s=34, color=colours[name])
        for label, x, y in zip(classes, shares[modality], values, strict=True):
            axis.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axis.set(title=f"{name} head", xlabel=f"share of the class's training clips that keep {modality}")
        axis.set_xlim(-0.03, 1.08)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="test accuracy on the class", ylim=(-0.03, 1.08))
    figure.suptitle(f"{title}: kept modality and accuracy by class")
    return figure


def plot_examples(rows: dict[str, list[Example]], title: str) -> Figure:
    """A row of clips for each entry of `rows`; a clip's modalities are below one another."""
    columns = max(map(len, rows.values()))
    modalities = max(len(example.shown) for examples in rows.values() for example in examples)
    figure = Figure(figsize=(2.6 * columns, 1.45 * modalities * len(rows)), layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False)
    for part, (name, examples) in zip(parts[:, 0], rows.items(), strict=True):
        part.suptitle(name, fontsize=11, fontweight="bold")
        axes = part.subplots(modalities, columns, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for column, example in enumerate(examples):
            for axis, values in zip(axes[:, column], example.shown.values(), strict=True):
                _draw(axis, values)
            axes[0, column].set_title(example.caption, fontsize=7)
    figure.suptitle(title, fontsize=12)
    return figure


def _draw(axis: Axes, values: np.ndarray) -> None:
    """An image (H, W, 3), a spectrogram (frequency, time) or a vector (D,)."""
    if values.ndim == 1:
        axis.plot(values, lw=0.8)
    elif values.ndim == 3:
        axis.imshow(values)
    else:
        low, high = np.percentile(values, [2, 99.5])  # else the lowest value of a recipe takes the whole scale
        axis.imshow(values, origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=max(high, low + 1e-6))
