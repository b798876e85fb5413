"""Pretrained weights from local files (`--pretrained`): torchvision, timm, and checkpoints of this project."""

from argparse import Namespace
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from models.checkpoint import load_weights, official_name, plain_name
from models.classifier import MultimodalClassifier
from models.encoders import takes
from models.timm_encoders import adapted
from utils.checkpoint import load_checkpoint, load_tensors
from utils.cli import per_modality
from utils.console import some
from utils.distributed import is_main
from utils.errors import UserError


def load_initial(model: MultimodalClassifier, args: Namespace, classes: list[str], root: Path) -> None:
    """Load the weights of `--checkpoint`, else of `--pretrained`, where they are given. `root` is the training folder.

    Raises `UserError` for weights that do not fit or, to be evaluated, were trained for other classes.
    """
    if args.pretrained and not args.checkpoint:
        load_pretrained(model, args.pretrained, classes)
    if args.checkpoint:
        state = load_checkpoint(args.checkpoint)
        if state.get("classes", classes) != classes and not args.train:
            raise UserError(f"{root}: classes ({some(classes, 6)}) differ from those of {args.checkpoint} "
                            f"({some(state['classes'], 6)}); use --data_root")  # fmt: skip
        load_weights(model, state["model"], args.checkpoint)


def load_pretrained(model: MultimodalClassifier, text: str, classes: list[str]) -> None:
    """Load the files that `text` names, `FILE` or `audio=FILE,video=FILE`; prints a line per modality.

    A file of torchvision or timm goes into the encoder of the modality, `FILE` alone into those of all images. A
    checkpoint of this project gives a modality its encoder and its unimodal head; `FILE` alone gives all of them and
    whatever else fits. Heads trained for other classes than `classes` are left out. Raises `UserError` for a file that
    does not have all weights of an encoder.
    """
    told, files = [], per_modality(text)
    for modality, path in files.items():
        weights, about = load_tensors(path)
        weights = {plain_name(name): value for name, value in weights.items()}
        others = [name for name in model.names if name not in files]
        wanted = [modality] if modality else others
        if any(name.startswith(official_name(f"encoders.{own}.")) for own in model.names for name in weights):
            same = about.get("classes", classes) == classes
            told += [_from_run(model, own, weights, path, same) for own in wanted]
            told += [_rest(model, weights, path)] if not modality and same else []
        else:
            images = [own for own in wanted if modality or takes(model.encoder_names[own]) == "image"]
            told += [f"pretrained {own}: {_fill(model.encoders[own], weights, path, own)}" for own in images]
    if is_main():
        print("\n".join(told), flush=True)


def check_files(text: str, checkpoint: str | None) -> None:
    """Raise `UserError` for missing files, before the data are read, and for a simultaneous `checkpoint`."""
    if checkpoint:
        raise UserError("--pretrained: --checkpoint already loads all weights; omit one of the two flags")
    for path in per_modality(text).values():
        if not Path(path).is_file():
            raise UserError(f"--pretrained {path}: no such file; give a .pth or .safetensors file")


def _from_run(model: MultimodalClassifier, name: str, weights: dict[str, Tensor], path: str, same: bool) -> str:
    """Fill a modality's encoder and, where the classes are the `same`, its head, from a checkpoint of this project."""
    own = _below(weights, official_name(f"encoders.{name}."))
    if not own:
        raise UserError(f"--pretrained {path}: has no encoder of {name}; give only modalities in the file, as in "
                        f"{next(iter(model.names))}={path}")  # fmt: skip
    told = f"pretrained {name}: {_fill(model.encoders[name], own, path, name)}"
    head, given = model.heads[name], _below(weights, official_name(f"heads.{name}."))
    fits = same and {k: v.shape for k, v in given.items()} == {k: v.shape for k, v in head.state_dict().items()}
    if fits:
        head.load_state_dict(given)
    return f"{told}; its head {'loaded' if fits else 'as initialised'}"


def _rest(model: MultimodalClassifier, weights: dict[str, Tensor], path: str) -> str:
    """Load what is neither encoder nor unimodal head, such as the joint head, where name and shape are the same."""
    state = model.state_dict()
    names = [name for name in state if not name.startswith(("encoders.", "heads."))]
    fits = {name: weights[official_name(name)] for name in names if official_name(name) in weights
            and weights[official_name(name)].shape == state[name].shape}  # fmt: skip
    model.load_state_dict(fits, strict=False)
    return f"pretrained joint head: {len(fits)} of {len(names)} tensors from {path}"


def _fill(encoder: nn.Module, weights: dict[str, Tensor], path: str, name: str) -> str:
    """Load an encoder's weights and say what was loaded and what was not.

    The first convolution is adapted to the channels of the modality. Raises `UserError` unless the file has them all.
    """
    state, weights, notes = encoder.state_dict(), adapted(encoder, weights), []
    first = next((own for own, value in state.items() if value.dim() == 4), None)
    if first in weights and _other_channels(weights[first], state[first]):
        before, after = weights[first].shape[1], state[first].shape[1]
        weights = weights | {first: adapt_channels(weights[first], after)}
        notes.append(f"{first} adapted from {before} to {after} channels")
    needed = [own for own in state if not own.endswith("num_batches_tracked")]  # files of before 2018 lack these
    missing = [own for own in needed if own not in weights]
    misfits = [f"{own} is {tuple(weights[own].shape)}, not {tuple(state[own].shape)}" for own in state
               if own in weights and weights[own].shape != state[own].shape]  # fmt: skip
    if missing or misfits:
        what = [f"{len(missing)} of {len(needed)} tensors missing ({some(missing, 2)})"] if missing else []
        what += [f"{len(misfits)} of another shape ({some(misfits, 2)})"] if misfits else []
        raise UserError(f"--pretrained {path}: does not fit the encoder of {name}: {'; '.join(what)}; use the weights "
                        "of the same architecture, or another --encoder")  # fmt: skip
    encoder.load_state_dict({own: weights[own] for own in state if own in weights}, strict=False)
    unused = Counter(own.split(".")[0] for own in weights if own not in state)
    notes += [f"left out: {', '.join(f'{part} ({count})' for part, count in unused.items())}"] if unused else []
    return "; ".join([f"{sum(own in weights for own in state)} of {len(state)} tensors from {path}", *notes])


def _other_channels(given: Tensor, own: Tensor) -> bool:
    """Whether two convolutions (D, c, h, w) differ only in c."""
    return given.dim() == 4 and given.shape[1] != own.shape[1] and (
        given.shape[0], *given.shape[2:]) == (own.shape[0], *own.shape[2:])  # fmt: skip


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """A convolution (D, c, h, w) for another number of input channels, by timm's rule: (D, `channels`, h, w).

    One channel: the sum over c, which gives a grey image the response it had. Otherwise the channels are repeated in
    turn and scaled by c / `channels`, which keeps the size of the response.
    """
    before = weight.shape[1]
    if channels == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    repeated = weight[:, torch.arange(channels) % before]
    return (repeated.float() * (before / channels)).to(weight.dtype)


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
