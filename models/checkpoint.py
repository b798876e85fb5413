"""Conversion of weights between the names in the network and the official code's names in checkpoints."""

from pathlib import Path

from torch import Tensor, nn

from utils.errors import UserError

# The one map between names inside the network and in checkpoints of the official code, prefix by prefix. `fc_x` and
# `fc_y` are OGM-GE's names in the sum head.
OFFICIAL_NAMES = {
    "encoders.audio.": "audio_net.",
    "encoders.video.": "visual_net.",
    "heads.audio.": "head_audio.",
    "heads.video.": "head_video.",
    "head.maps.audio.": "head.fc_x.",
    "head.maps.video.": "head.fc_y.",
}


def official_name(name: str) -> str:
    """The name in checkpoints of a parameter or buffer of the network."""
    for inside, official in OFFICIAL_NAMES.items():
        if name.startswith(inside):
            return official + name.removeprefix(inside)
    return name


def plain_name(name: str) -> str:
    """`name` without the prefixes of DistributedDataParallel and torch.compile."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def model_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network under the names of checkpoints."""
    return {official_name(plain_name(name)): value for name, value in model.state_dict().items()}


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: Path | str) -> None:
    """Load `weights` of a checkpoint into a network; prefixes of wrappers (DDP, compile) are removed.

    Raises `UserError` naming what is missing, unknown or of another shape.
    """
    weights = {plain_name(name): value for name, value in weights.items()}
    own = {official_name(plain_name(name)): name for name in model.state_dict()}
    values = model.state_dict()
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(values[inside].shape)}"
        for name, inside in own.items()
        if name in weights and weights[name].shape != values[inside].shape
    ]
    found = {
        "missing": [name for name in own if name not in weights],
        "unknown": [name for name in weights if name not in own],
        "of another shape": shapes,
    }
    complaints = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in found.items()
        if names
    ]
    if complaints:
        raise UserError(f"{source}: does not fit this network: {'; '.join(complaints)}; "
                        "check --dataset, --model, --encoder, --n_classes and --fusion_method")  # fmt: skip
    model.load_state_dict({inside: weights[name] for name, inside in own.items()})
