"""Build the network, for training, reports and benchmarks."""

from collections.abc import Sequence
from typing import Protocol

import torch

from models.classifier import MultimodalClassifier
from models.encoders import ENCODERS, takes
from models.intermediate import CentralNet, MMTMNet
from models.timm_encoders import TIMM
from utils.cli import per_modality
from utils.errors import UserError
from utils.graphs import compiles_encoders

MODELS: dict[str, type[MultimodalClassifier]] = {
    "late": MultimodalClassifier,
    "mmtm": MMTMNet,
    "centralnet": CentralNet,
}
DEFAULT_ENCODERS = {"vector": "mlp", "sequence": "gru"}


class ModalityLike(Protocol):
    """The attributes used of a `dataset.specs.Modality`."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def encoder(self) -> str | None: ...
    @property
    def channels(self) -> int: ...


def check_model(model: str, fusion_method: str, compile: str | bool) -> None:
    """Raise `UserError` for flags that the architecture `model` has no use for or cannot do."""
    if not MODELS[model].fuses and fusion_method != "concat":
        raise UserError(f"--fusion_method {fusion_method}: --model {model} has its own joint head; leave the flag out")
    if compiles_encoders(compile) and not MODELS[model].late:
        raise UserError(f"--compile: --model {model} runs encoders stage by stage, uncompiled; use --compile graphs, "
                        "or leave it out")  # fmt: skip


def build_model(
    modalities: Sequence[ModalityLike],
    shapes: dict[str, tuple[int, ...]],
    n_classes: int,
    encoder: str = "resnet18",
    fusion_method: str = "concat",
    precision: str = "fp32",
    device: torch.device | str = "cpu",
    unimodal: str = "heads",
    model: str = "late",
    image_size: int = 224,
) -> MultimodalClassifier:
    """The network for a dataset's `modalities`, on `device` in channels-last memory format.

    `shapes` holds the shape of one clip's array for each modality that is not frames: (F, W) is an image of one
    channel, (D,) a vector; of a sequence (L, D) only D matters. Frames are `image_size` pixels high and wide.
    `encoder` is as `--encoder`: `NAME` is the image encoder of the modalities that name none, `text=NAME` that of one
    modality, whatever it names. Raises `UserError` for an encoder that does not exist, does not take such an input or
    does not fit the architecture `model`, and for a fusion head that is not defined for these modalities.
    """
    inputs, chosen = {}, per_modality(encoder)
    for modality in modalities:
        shape = tuple(shapes.get(modality.name, ()))
        given_as, size = _input(modality, shape, image_size)
        usual = chosen.get("", "resnet18") if given_as == "image" else DEFAULT_ENCODERS.get(given_as, "mlp")
        name = chosen.get(modality.name) or modality.encoder or usual
        wanted = takes(name)
        if wanted is None:
            raise UserError(f"encoder {name} of {modality.name}: unknown; allowed: {', '.join(ENCODERS)}, {TIMM}NAME")
        if wanted != given_as:
            given = "frames" if modality.kind == "frames" else f"{modality.kind}s of shape {shape}"
            advice = 'give them the kind "sequence" in dataset.json' if wanted == "sequence" else "use another"
            raise UserError(f"encoder {name} of {modality.name}: takes {wanted}s, the clips have {given}; {advice}")
        inputs[modality.name] = name, size
    try:
        network = MODELS[model](inputs, n_classes, fusion_method, precision == "bf16", unimodal)
    except ValueError as error:
        raise UserError(str(error)) from None
    return network.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _input(modality: ModalityLike, shape: tuple[int, ...], image_size: int) -> tuple[str, tuple[int, ...]]:
    """(what an encoder must take, its shape without the batch) for the clips of a modality."""
    if modality.kind == "frames":
        return "image", (modality.channels, image_size, image_size)
    if modality.kind == "sequence":
        return "sequence", shape[-1:]
    if len(shape) == 2:
        return "image", (1, *shape)
    return ("vector", shape) if len(shape) == 1 else ("", ())
