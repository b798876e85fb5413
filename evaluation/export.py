"""Export a trained network with `torch.export` to one file that PyTorch runs without this project.

    python -m report.export --checkpoint runs/NAME/best.pth --out model.pt2

Shapes: B clips, M modalities, C classes, T frames, c channels, S x S pixels, (F, W) spectrogram.
"""

import copy
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dataset.augment import IMAGENET_MEAN, IMAGENET_STD
from dataset.folder import Folder
from models import MultimodalClassifier
from utils.errors import UserError
from utils.files import atomic_path, writing

ABOUT = "about.json"  # stored in the file with the program


class Heads(nn.Module):
    """Wrapper for export: plain tensors in, logits of all heads out."""

    def __init__(self, network: MultimodalClassifier):
        super().__init__()
        self.network = network

    def forward(self, inputs: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """inputs of every modality, as a `ClipBatch` has them; mask (B, M) bool says which modalities a clip has.

        Returns logits (B, C) of "joint" and of every modality. If a clip lacks a modality, the input of that modality
        is ignored, and the logits of its head are meaningless.
        """
        return self.network(inputs, self.network.names, mask).heads


def example_inputs(folder: Folder, image_size: int) -> dict[str, Tensor]:
    """Example inputs for two clips: zeros in the network's input shapes. Raises `UserError` for sequences."""
    inputs = {}
    for modality in folder.spec.modalities:
        if modality.kind == "sequence":
            raise UserError(f"{modality.name}: sequences of any length cannot be exported; frames, spectrograms and "
                            "vectors can")  # fmt: skip
        if modality.kind == "frames":
            shape = (modality.frames, modality.channels, image_size, image_size)
        else:
            own = folder.shapes[modality.name]
            shape = (1, *own) if len(own) == 2 else own
        inputs[modality.name] = torch.zeros(2, *shape)
    return inputs


def export_network(network: MultimodalClassifier, inputs: dict[str, Tensor]) -> ExportedProgram:
    """The program of `Heads` in evaluation mode and float32, for any number of clips at a time."""
    # Export a copy without autocast, in the default (contiguous) memory format, as stored arrays are.
    network = copy.deepcopy(network).cpu().eval().to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    network.bf16 = False
    batch = Dim("batch", min=1)
    clips, modalities = len(next(iter(inputs.values()))), len(network.names)
    mask = torch.ones(clips, modalities, dtype=torch.bool)
    shapes = {"inputs": {name: {0: batch} for name in inputs}, "mask": {0: batch}}
    with torch.no_grad():
        return torch.export.export(Heads(network), (inputs, mask), dynamic_shapes=shapes)


def describe(folder: Folder, inputs: dict[str, Tensor], record: dict) -> dict:
    """Metadata of the program: classes, input shapes for one clip, scaling of pixels."""
    found: dict[str, dict] = {}
    for modality in folder.spec.modalities:
        own: dict = {"shape": list(inputs[modality.name].shape[1:])}
        if modality.kind == "frames":
            rgb = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}  # of pixels in [0, 1]
            own |= rgb if modality.channels == 3 else {"mean": [0.5, 0.5], "std": [0.5, 0.5]}
        found[modality.name] = own
    return {"classes": folder.classes, "modalities": found, "prepared": record}


def save_program(path: Path, program: ExportedProgram, about: dict) -> None:
    """Write the program and `about` to `path` atomically."""
    with writing(path), atomic_path(path) as temporary:
        torch.export.save(program, temporary, extra_files={ABOUT: json.dumps(about)})
