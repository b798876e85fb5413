"""One way to build the network, for training, reports and benchmarks alike."""

from collections.abc import Sequence
from typing import Protocol

import torch

from models.classifier import MultimodalClassifier
from models.encoders import ENCODERS
from models.intermediate import CentralNet, MMTMNet
from utils.errors import UserError

MODELS: dict[str, type[MultimodalClassifier]] = {
    "late": MultimodalClassifier,
    "mmtm": MMTMNet,
    "centralnet": CentralNet,
}
DEFAULT_ENCODERS = {"vector": "mlp", "sequence": "gru"}


class ModalityLike(Protocol):
    """What is read of a `dataset.specs.Modality`."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def encoder(self) -> str | None: ...
    @property
    def channels(self) -> int: ...


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
) -> MultimodalClassifier:
    """The network for a dataset's `modalities`, on `device` in channels-last memory format.

    `shapes` holds the shape of one clip's array for each modality that is not frames: (F, W) is an image of one
    channel, (D,) a vector; of a sequence (L, D) only D matters. `encoder` is the image encoder of the modalities that
    name none. Raises `UserError` for an encoder that does not exist, does not take such an input or does not fit the
    architecture `model`, and for a fusion head that is not defined for these modalities.
    """
    inputs = {}
    for modality in modalities:
        shape = tuple(shapes.get(modality.name, ()))
        takes, size = _input(modality, shape)
        name = modality.encoder or (encoder if takes == "image" else DEFAULT_ENCODERS.get(takes, "mlp"))
        if name not in ENCODERS:
            raise UserError(f"encoder {name} of {modality.name}: unknown; allowed: {', '.join(ENCODERS)}")
        wanted = ENCODERS[name].takes
        if wanted != takes:
            given = "frames" if modality.kind == "frames" else f"{modality.kind}s of shape {shape}"
            advice = 'give them the kind "sequence" in dataset.json' if wanted == "sequence" else "use another"
            raise UserError(f"encoder {name} of {modality.name}: takes {wanted}s, the clips have {given}; {advice}")
        inputs[modality.name] = name, size
    try:
        network = MODELS[model](inputs, n_classes, fusion_method, precision == "bf16", unimodal)
    except ValueError as error:
        raise UserError(str(error)) from None
    return network.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _input(modality: ModalityLike, shape: tuple[int, ...]) -> tuple[str, int]:
    """(what an encoder must take, channels or numbers of it) for the clips of a modality."""
    if modality.kind == "frames":
        return "image", modality.channels
    if modality.kind == "sequence":
        return "sequence", shape[-1]
    if len(shape) == 2:
        return "image", 1
    return ("vector", shape[0]) if len(shape) == 1 else ("", 0)
