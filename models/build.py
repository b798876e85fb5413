"""One way to build the network, for training, reports and benchmarks alike."""

from collections.abc import Sequence
from typing import Protocol

import torch

from models.classifier import MultimodalClassifier
from models.encoders import ENCODERS, IMAGE_ENCODERS
from utils.errors import UserError


class ModalityLike(Protocol):
    """What is read of a `dataset.specs.Modality`."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def encoder(self) -> str | None: ...


def build_model(
    modalities: Sequence[ModalityLike],
    shapes: dict[str, tuple[int, ...]],
    n_classes: int,
    model: str = "resnet18",
    fusion_method: str = "concat",
    precision: str = "fp32",
    device: torch.device | str = "cpu",
) -> MultimodalClassifier:
    """The network for a dataset's `modalities`, on `device` in channels-last memory format.

    `shapes` holds the shape of one clip's array for each modality of kind "array": (F, W) is an image of one channel,
    (D,) a vector. `model` is the image encoder of the modalities that name none. Raises `UserError` for an encoder that
    does not exist or does not take such an input, and for a fusion head that is not defined for these modalities.
    """
    inputs = {}
    for modality in modalities:
        frames, shape = modality.kind == "frames", tuple(shapes.get(modality.name, ()))
        dimensions = len(shape)
        image = frames or dimensions == 2
        name = modality.encoder or (model if image else "mlp")
        if name not in ENCODERS:
            raise UserError(f"encoder {name} of {modality.name}: unknown; allowed: {', '.join(ENCODERS)}")
        if (name in IMAGE_ENCODERS) != image or (modality.kind == "array" and dimensions > 2):
            given = "frames" if frames else f"arrays of shape {shape}"
            wanted = ENCODERS[name].takes
            raise UserError(f"encoder {name} of {modality.name}: takes {wanted}s, the clips have {given}; use another")
        inputs[modality.name] = name, 3 if frames else 1 if image else shape[0]
    try:
        network = MultimodalClassifier(inputs, n_classes, fusion_method, precision == "bf16")
    except ValueError as error:
        raise UserError(str(error)) from None
    return network.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
