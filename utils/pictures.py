"""Pictures of one trained model: features, heads, classes, the hardest and easiest clips.

    python -m utils.report --model runs/NAME

Shapes: N test clips, C classes, D features.
"""

from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from utils.checkpoint import load_checkpoint, load_weights
from utils.diagnostics import aside, collect
from utils.errors import UserError
from utils.metrics import confusion
from utils.people import Clip, read_partition
from utils.plots import COLOURS, plot_confusion, save_figure
from utils.runs import dataset_of, read_run

HEAD_KEYS = {"multimodal": "joint", "audio": "audio", "video": "video"}  # names in figures -> names in the network
EXAMPLES = 6  # clips in a row of pictures
SHOWN = 2000  # clips of a t-SNE: more take minutes and hide one another


class Example(NamedTuple):
    """One clip to be shown: frames as RGB uint8 (H, W, 3), spectrogram (frequency, time) and what is said of it."""

    frames: list[np.ndarray]
    spectrogram: np.ndarray
    caption: str


class Predicted(NamedTuple):
    """What a trained model says of the test clips: logits (N, C) and features (N, D) by name, labels (N,); the data."""

    found: dict[str, torch.Tensor]
    labels: torch.Tensor
    folder: object
    train: object  # the part that was scored


# ------------------------------------------------------------------------------------------------- a run's model


def picture_model(run: Path, out: Path, data_root: Path | None) -> None:
    """Pictures of a run's trained model (last.pth) to `out`: tsne, confusion and, after Remix, classes and clips.

    Needs the data the run was trained on, at `data_root` if it has moved. Raises `UserError` for what is not there.
    """
    config = read_run(run).config
    if not config:
        raise UserError(f"--model {run}: no run (it has no config.json); give a run's folder, such as runs/NAME")
    found, labels, folder, scored = predict_again(run, config, data_root)
    title = f"{dataset_of(config)}, {config['method']}, seed {config['random_seed']}"
    features = {name: found[f"{name}_features"].numpy() for name in ("audio", "video") if name in found}
    if len(features) == 2:
        features["fused"] = np.concatenate(list(features.values()), axis=1)
    counts = {name: confusion(found[head], labels) for name, head in HEAD_KEYS.items() if head in found}
    figures = {"tsne": plot_tsne(features, labels.numpy(), folder.classes, title, config["random_seed"]),
               "confusion": plot_confusion(counts, folder.classes, f"{title}, test clips")}  # fmt: skip
    if (run / "partition.csv").is_file():
        partition = read_partition(run)
        shares = kept_shares(partition, folder.classes)
        accuracies = {name: table.diagonal() / np.maximum(table.sum(axis=1), 1) for name, table in counts.items()}
        figures["classes"] = plot_classes(shares, accuracies, folder.classes, title)
        figures["clips"] = plot_hardest(partition, scored, config, title)
    else:
        print(f"{run}: has no partition.csv (only Remix scores clips): no pictures of classes and clips")
    for name, figure in figures.items():
        save_figure(figure, out / f"{name}.png")
    print(f"{', '.join(f'{name}.png' for name in figures)} written to {out}")


def predict_again(run: Path, config: dict, data_root: Path | None) -> Predicted:
    """The model in a run's last.pth on the run's test clips. Raises `UserError` where data and model do not fit."""
    # Not at the top: the data, the network and train.py's way of loading them stand above utils, and reports on runs
    # are to need none of them.
    import train
    from balance import replace_heads
    from dataset.clips import Feed, choose_cache, make_clips
    from dataset.specs import get_spec
    from models import AVClassifier
    from remix import batches_of

    state = load_checkpoint(run / "last.pth")
    defaults = train.flags(train.parse_args(["--train"]))  # of flags that are younger than the run
    wanted = defaults | config | ({"data_root": str(data_root)} if data_root else {})
    folder, parts = train.load_parts(Namespace(**wanted))
    if state["classes"] != folder.classes:
        raise UserError(f"{folder.root}: other classes than the run's; give its own data with --data_root DIR")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = config.get("pack_size")  # None too for runs from before there was the flag
    cache, _ = choose_cache("auto", folder.root, {"test": parts["test"]}, folder.audio_shape, device, size)
    feed = Feed(get_spec(config["dataset"]).frames, config["image_size"], device, cache, workers=0, pack_size=size)
    test = make_clips(folder.root, "test", parts["test"], folder.audio_shape, feed)
    model = AVClassifier(len(folder.classes), config["model"], config["fusion_method"]).to(device)
    replace_heads(model, Namespace(**{"balance": "none"} | config))
    load_weights(model, state["model"], run / "last.pth")
    inputs = config["method"] if config["method"] in ("audio", "video") else "both"
    plan = batches_of(len(test), 64, inputs, generator=None)
    with aside(model):
        found = collect(test.epoch(plan), lambda batch: model(batch.audio, batch.video, batch.kept), len(test))
    found = {name: values.cpu() for name, values in found.items()}
    return Predicted(found, torch.as_tensor(parts["test"].labels), folder, parts["train"])


def kept_shares(partition: dict[str, Clip], classes: list[str]) -> np.ndarray:
    """(C,) share of each class's clips that keep audio, NaN for a class without clips."""
    kept = [[clip.kept == "audio" for clip in partition.values() if clip.label == name] for name in classes]
    return np.array([np.mean(own) if own else np.nan for own in kept])


def plot_hardest(partition: dict[str, Clip], part, config: dict, title: str) -> Figure:
    """The clips of the lowest and highest KL of each modality, as they lie in the training folder."""
    from dataset.pack import read_frame  # late, as in predict_again
    from dataset.specs import get_spec

    spec, places = get_spec(config["dataset"]), {name: i for i, name in enumerate(part.clips)}
    present = {name: clip for name, clip in partition.items() if name in places}
    if not present:
        raise UserError(f"--data_root: none of the clips in {config['run_name']}'s partition.csv is in train.csv there")

    def example(name: str, modality: str) -> Example:
        clip, i = partition[name], places[name]
        picks = np.linspace(0, len(part.frames[i]) - 1, min(3, len(part.frames[i]))).round().astype(int)
        sound = np.load(part.spectrograms[i], allow_pickle=False)
        sound = sound.T if spec.audio_recipe == "fbank" else sound  # stored as (time, mel), unlike the others
        caption = f"{name}\n{clip.label}, {clip.kl[modality]:.2f} bits, keeps {clip.kept}"
        return Example([read_frame(part.frames[i][k]) for k in picks], sound, caption)

    rows = {}
    for modality in ("audio", "video"):
        by_kl = sorted(present, key=lambda name: present[name].kl[modality])
        rows[f"hardest by {modality}"] = [example(name, modality) for name in by_kl[:EXAMPLES]]
        rows[f"easiest by {modality}"] = [example(name, modality) for name in by_kl[::-1][:EXAMPLES]]
    return plot_examples(rows, f"{title}: lowest and highest KL from uniform at the last scoring")


# ------------------------------------------------------------------------------------------------------- figures


def plot_tsne(features: dict[str, np.ndarray], labels: np.ndarray, classes: list[str], title: str, seed: int) -> Figure:
    """t-SNE (van der Maaten and Hinton, 2008) of each entry of `features` (N, D), a colour for each class.

    At most `SHOWN` clips, drawn from `seed`. Distances between clusters and their sizes mean nothing; whether classes
    stand apart does.
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


def plot_classes(shares: np.ndarray, accuracies: dict[str, np.ndarray], classes: list[str], title: str) -> Figure:
    """Test accuracy of each head on each class, (C,) each, against the share of its clips that keep audio, (C,)."""
    figure = Figure(figsize=(5.2 * len(accuracies), 4.8), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(accuracies), sharey=True))
    for axis, (name, values) in zip(axes, accuracies.items(), strict=True):
        axis.scatter(shares, values, s=34, color=COLOURS[name])
        for label, x, y in zip(classes, shares, values, strict=True):
            axis.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axis.set(title=f"{name} head", xlabel="share of the class's training clips that keep audio", xlim=(-0.03, 1.08))
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="test accuracy on the class", ylim=(-0.03, 1.08))
    figure.suptitle(f"{title}: what a class keeps and how well it is known")
    return figure


def plot_examples(rows: dict[str, list[Example]], title: str) -> Figure:
    """A row of clips for each entry of `rows`: each clip's frames side by side, its spectrogram below."""
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(2.6 * columns, 2.9 * len(rows)), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(len(rows), 1))
    for part, (name, examples) in zip(parts, rows.items(), strict=True):
        part.suptitle(name, fontsize=11, fontweight="bold")
        axes = part.subplots(2, columns, squeeze=False)
        for column in range(columns):
            for axis in axes[:, column]:
                axis.set_axis_off()
            if column < len(examples):
                _draw_example(axes[0, column], axes[1, column], examples[column])
    figure.suptitle(title, fontsize=12)
    return figure


def _draw_example(above: Axes, below: Axes, example: Example) -> None:
    height = min(frame.shape[0] for frame in example.frames)
    above.imshow(np.concatenate([frame[:height] for frame in example.frames], axis=1))
    above.set_title(example.caption, fontsize=7)
    low, high = np.percentile(example.spectrogram, [2, 99.5])  # a recipe's floor would take the whole scale
    below.imshow(example.spectrogram, origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=max(high, low + 1e-6))
