"""Predictions for all clips: logits of all heads and features of all modalities, saved to one file.

    python train.py --checkpoint runs/NAME/best.pth --predictions out.npz

Shapes: N clips of a part, C classes, M modalities, D_m features of modality m.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataset.clips import Clips
from evaluation.trained import refuse_existing
from evaluation.unimodal import masked, slices
from models import MultimodalClassifier
from models.inference import check_finite, collect
from remix import batches_of
from utils import distributed
from utils.console import progress
from utils.files import atomic_path, writing


class Predictions(NamedTuple):
    """Predictions for one part: clips in order, labels (N,), outputs by modality (logits also by "joint").

    `logits`, `slices` and `masked` are (N, C) as in `evaluation.unimodal`, `features` (N, D_m). Modalities that are not
    fed have no entry; `slices` is empty where the joint logits are no sum of one part per modality.
    """

    clips: list[str]
    labels: Tensor
    logits: dict[str, Tensor]
    slices: dict[str, Tensor]
    masked: dict[str, Tensor]
    features: dict[str, Tensor]


@torch.inference_mode()
def predict_part(
    model: MultimodalClassifier, clips: Clips, fed: tuple[str, ...], batch_size: int, name: str
) -> Predictions:
    """One pass over all `clips` in order, in eval mode. Processes share the work; each gets all results.

    Raises `UserError` naming the clips if a logit is not finite.
    """
    model.eval()
    with progress(name, len(clips), distributed.is_main()) as bar:
        batches = clips.epoch(batches_of(len(clips), batch_size, fed, generator=None))
        logits, features = collect(model, batches, len(clips), bar=bar, full=batch_size)
    check_finite(logits, clips.names, name)
    parts = {modality: values for modality, values in slices(model, features).items() if modality in fed}
    own = {modality: features[modality] for modality in fed}
    return Predictions(clips.names, clips.labels, logits, parts, masked(model, features, fed), own)


def as_arrays(
    parts: dict[str, Predictions], classes: list[str], modalities: tuple[str, ...], trained: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Arrays of a predictions file. Logits of untrained heads are omitted.

    `classes` (C,) and `modalities` (M,) are names. For each part: `<part>_clips` (N,) names, `<part>_labels` (N,) class
    indices, `<part>_logits_joint` and `<part>_logits_<modality>` (N, C), `<part>_slice_<modality>` and
    `<part>_masked_<modality>` (N, C), `<part>_features_<modality>` (N, D_m). Numbers are float32, labels int64.
    """
    arrays = {"classes": np.array(classes), "modalities": np.array(modalities)}
    for part, found in parts.items():
        arrays |= {f"{part}_clips": np.array(found.clips), f"{part}_labels": found.labels.cpu().numpy()}
        heads = {name: values for name, values in found.logits.items() if name in ("joint", *trained)}
        for kind, values in (("logits", heads), ("slice", found.slices), ("masked", found.masked),
                             ("features", found.features)):  # fmt: skip
            arrays |= {f"{part}_{kind}_{name}": rows.float().cpu().numpy() for name, rows in values.items()}
    return arrays


def save_predictions(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write `arrays` to `path` atomically; `numpy.load(path)` reads them."""
    refuse_existing(path)
    with writing(path), atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]  (NumPy types allow_pickle as one of them)
