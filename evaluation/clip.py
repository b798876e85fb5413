"""Classify raw video and audio files, prepared with the settings of the network's training folder.

    python train.py --checkpoint runs/NAME/best.pth --clip a.mp4 b.mp4
    python train.py --checkpoint runs/NAME/best.pth --clip a.flv a.wav     # video and audio of one clip
    python train.py --checkpoint runs/NAME/best.pth --clip a.mp4@1.2-3.4   # seconds cut out of a file

Shapes: C classes.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor

from dataset.clips import Feed, make_clips
from dataset.folder import Folder, Part
from dataset.prepare.given import given_clips, prepare_given
from evaluation.numbers import fed_to, trained_heads
from evaluation.trained import trained_folder, without_clips
from models import MultimodalClassifier
from models.inference import predict
from utils import distributed
from utils.errors import UserError

SHOWN = 5  # classes of each head, the most probable first


class Answer(NamedTuple):
    """Predictions for one clip: the fed modalities, and the probabilities (C,) of each trained head."""

    clip: str
    fed: tuple[str, ...]
    probabilities: dict[str, Tensor]


def classify_clips(args: Namespace, device: torch.device, make_model: Callable[..., MultimodalClassifier]) -> None:
    """Print the classes of the clips of `--clip` by each head. `make_model` is train.py's own."""
    if distributed.world_size() > 1:
        raise UserError("--clip: runs in one process; start it with python, not torchrun")
    clips = given_clips(args.clip)
    folder, record = trained_folder(args)
    model = make_model(args, without_clips(folder), device)
    with TemporaryDirectory(prefix="clips-") as place:
        parts = prepare_given(clips, Path(place), folder.spec, folder.shapes, record)
        found = [answers_for(args, folder, names, part, Path(place), model) for names, part in parts]
    answers = {answer.clip: answer for group in found for answer in group}
    for clip in clips:
        print("\n".join(lines(answers[clip.name], folder)))


def answers_for(
    args: Namespace, folder: Folder, names: tuple[str, ...], part: Part, place: Path, model: MultimodalClassifier
) -> list[Answer]:
    """The answers for the clips of `part`, in the folder `place`, which have the modalities `names`.

    They are fed as test clips are.
    """
    fed = tuple(name for name in fed_to(args, folder.spec.names) if name in names)
    if not fed:
        raise UserError(f"--clip {part.clips[0]}: only {' and '.join(names)}, but the network was trained by --method "
                        f"{args.method}")  # fmt: skip
    modalities, device = tuple(folder.spec.modality(name) for name in fed), next(model.parameters()).device
    feed = Feed(modalities, args.image_size, device, "ram", pack_size=args.pack_size)
    clips = make_clips(place, "clips", part, {name: folder.shapes[name] for name in fed if name in folder.shapes}, feed)
    logits = predict(model, clips, fed, 4 * args.batch_size, "clips")
    heads = {name: rows.float().softmax(1).cpu() for name, rows in logits.items()
             if name in ("joint", *trained_heads(args))}  # fmt: skip
    return [Answer(clip, fed, {name: rows[i] for name, rows in heads.items()}) for i, clip in enumerate(part.clips)]


def lines(answer: Answer, folder: Folder) -> list[str]:
    """The clip and what it has, then for each head the most probable classes."""
    masked = [name for name in folder.spec.names if name not in answer.fed]
    given = " and ".join(answer.fed) + (f" alone ({' and '.join(masked)} masked)" if masked else "")
    width = max(len(name) for name in ("multimodal", *folder.spec.names))
    shown = [f"{answer.clip}: {given}"]
    for head, values in answer.probabilities.items():
        top = values.topk(min(SHOWN, len(values)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        classes = (f"{folder.classes[i]} {probability:.3f}" for i, probability in pairs)
        shown.append(f"  {'multimodal' if head == 'joint' else head:{width}}  {'  '.join(classes)}")
    return shown
