"""Evaluate a checkpoint: print a table, and write all metrics as JSON next to the checkpoint."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from dataset.build import Data, build_data
from evaluation.numbers import evaluate, fed_to, measure, trained_heads
from evaluation.predictions import Predictions, as_arrays, predict_part, save_predictions
from evaluation.unimodal import SOURCES, Labelled, Probe, has_head, linear_probe
from models import MultimodalClassifier
from utils import distributed
from utils.console import result_table
from utils.errors import UserError
from utils.files import atomic_path, writing

KIND = "evaluation of a checkpoint"  # marks files written by this module; other files are never overwritten
FORMAT = 1


def evaluate_checkpoint(args: Namespace, device: torch.device, make_model: Callable[..., MultimodalClassifier]) -> None:
    """Evaluate `--checkpoint`, as train.py does without `--train`; `make_model` is train.py's.

    Prints and saves the numbers of the test clips. With `--predictions` all clips' logits and features go to that
    file, and a linear probe is fitted on the features of the training clips. `--clip` is classified instead.
    """
    if args.clip:
        from evaluation.clip import classify_clips  # late: only this needs the code that prepares raw files

        return classify_clips(args, device, make_model)
    data = build_data(args, device, only=None if args.predictions else ("test",))
    model = make_model(args, data, device)
    fed, size = fed_to(args, data.spec.names), 4 * args.batch_size
    parts = {name: predict_part(model, clips, fed, size, name) for name, clips in data.clips.items()}
    with distributed.together():
        if distributed.is_main():
            if args.predictions:
                arrays = as_arrays(parts, data.classes, data.spec.names, trained_heads(args))
                save_predictions(Path(args.predictions), arrays)
            found = measured(args, data, model, parts)
            print("\n".join([*table(args, data, parts["test"]), *unimodal_lines(found["heads"])]))
            if args.predictions:
                sizes = ", ".join(f"{len(part.clips)} {name}" for name, part in parts.items())
                print(f"{args.predictions}: logits and features of {sizes} clips (docs/evaluation.md)")
            save_numbers(beside(Path(args.checkpoint)), found)


def table(args: Namespace, data: Data, test: Predictions) -> list[str]:
    """The data, and the accuracies of the trained heads."""
    missing = len(data.folder.missing)
    left_out = f", {missing} clips with missing files left out" if missing else ""
    numbers = evaluate(test.logits, test.labels, "test", args)
    return [f"{args.dataset}, {data.folder.root}: {len(test.clips)} test clips{left_out}",
            result_table({args.checkpoint: numbers}, data.spec.names)]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- numbers


def measured(args: Namespace, data: Data, model: MultimodalClassifier, parts: dict[str, Predictions]) -> dict:
    """Contents of the JSON file: the origin of the metrics and, under `heads`, the metrics of each head and source.

    `heads["multimodal"]["head"]` and, for each fed modality, `heads[modality][source]` are results of `measure`. A
    result is None if it does not exist: for a head that was not trained, for slices if the joint logits are no sum of
    one part per modality, and for a probe without the training clips.
    """
    test, classes, trained = parts["test"], data.classes, trained_heads(args)
    heads: dict[str, dict] = {"multimodal": {"head": measure(test.logits["joint"], test.labels, classes)}}
    for name in [name for name in data.spec.names if name in test.features]:
        probe = probe_of(parts, name, len(classes))
        logits = {
            "head": test.logits.get(name) if has_head(model, name, trained) else None,
            "slice": test.slices.get(name),
            "masked": test.masked.get(name),
            "probe": probe and probe.logits,
        }
        heads[name] = {source: None if values is None else measure(values, test.labels, classes)
                       for source, values in logits.items()}  # fmt: skip
        if probe:
            heads[name]["probe"]["C"] = probe.cost
    about = {"dataset": args.dataset, "root": str(data.folder.root), "part": "test", "clips": len(test.clips),
             "left_out": len(data.folder.missing), "classes": classes, "modalities": list(data.spec.names)}  # fmt: skip
    chosen = ("method", "balance", "model", "fusion_method", "unimodal", "precision")
    return {"kind": KIND, "format": FORMAT, "checkpoint": args.checkpoint, "epoch": args.trained.get("epoch"),
            "data": about, "settings": {name: getattr(args, name) for name in chosen}, "sources": SOURCES,
            "heads": heads}  # fmt: skip


def probe_of(parts: dict[str, Predictions], name: str, n_classes: int) -> Probe | None:
    """A linear probe of the modality `name`, None where the training clips are not among `parts`."""
    if "train" not in parts:
        return None
    train, val = (Labelled(parts[part].features[name], parts[part].labels) if part in parts else None
                  for part in ("train", "val"))  # fmt: skip
    assert train is not None
    return linear_probe(train, parts["test"].features[name], n_classes, val)


def unimodal_lines(heads: dict[str, dict]) -> list[str]:
    """Accuracy of each head by source, and the calibration of the joint head."""
    joint = heads["multimodal"]["head"]
    lines = [f"multimodal: negative log-likelihood {joint['nll']:.4f}, calibration error {joint['ece']:.4f}"]
    for name, sources in heads.items():
        if name == "multimodal":
            continue
        found = [f"{source} {own['accuracy']:.4f}" + (f" (C = {own['C']:g})" if "C" in own else "")
                 for source, own in sources.items() if own]  # fmt: skip
        lines.append(f"{name}: {', '.join(found)}")
    return lines


# ------------------------------------------------------------------------------------------------------------- JSON


def beside(checkpoint: Path) -> Path:
    """runs/NAME/best.pth -> runs/NAME/best.evaluation.json"""
    return checkpoint.with_name(f"{checkpoint.stem}.evaluation.json")


def save_numbers(path: Path, found: dict) -> None:
    """Write the metrics to a JSON file. A failure prints one line and raises no error: the table is already printed.

    A file of an earlier evaluation is replaced. Any other file is left unchanged.
    """
    try:
        foreign = path.exists() and not is_ours(path)
        if not foreign:
            with writing(path), atomic_path(path) as temporary:
                temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except UserError as error:
        print(f"note: {error}")
    else:
        print(f"{path}: {'left alone: not written by an evaluation' if foreign else 'all numbers'}")


def is_ours(path: Path) -> bool:
    """Whether an evaluation wrote the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("kind") == KIND
