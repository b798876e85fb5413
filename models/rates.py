"""The optimizer and its parameter groups: a learning-rate multiplier per encoder (0 freezes it), layer-wise decay."""

import re
from argparse import Namespace

import torch
from torch import nn
from torch.nn import Parameter

from models.classifier import MultimodalClassifier
from models.timm_encoders import layer_ids
from utils.cli import factors

STAGE = re.compile(r"layer(\d+)\.")  # torchvision's names in ResNets; what comes before is the stem, stage 0


def make_optimizer(model: MultimodalClassifier, args: Namespace) -> torch.optim.Optimizer:
    """Adam (betas .9/.999, eps 1e-8) or SGD (momentum .9), weight decay 1e-4 as in the official code; AdamW: 0.01."""
    groups = parameter_groups(model, args.learning_rate, args.encoder_lr_decay, args.layer_decay)
    if args.optimizer != "sgd":
        kind, decay = (torch.optim.Adam, 1e-4) if args.optimizer == "adam" else (torch.optim.AdamW, 0.01)
        return kind(groups, lr=args.learning_rate, weight_decay=decay, fused=True)
    optimizer = torch.optim.SGD(groups, lr=args.learning_rate, momentum=0.9, weight_decay=1e-4, fused=True)
    # Zero momentum is what the first step starts from anyway. PyTorch's fused step fails if only some parameters have
    # a buffer, as in the homogeneous batches of a run without warm-up.
    for p in (p for group in groups for p in group["params"]):
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def parameter_groups(
    model: MultimodalClassifier, rate: float, encoder_decay: float | str = 1.0, layer_decay: float = 1.0
) -> list[dict]:
    """Groups for an optimizer: the encoders' parameters by learning rate, then all others at `rate`.

    The rate of an encoder's layer is `rate * factor * layer_decay**depth`: depth 1 for its last layer, rising to the
    stem (BEiT; Bao et al., ICLR 2022), where the heads have 0. `encoder_decay` is the factor, or says it of modalities
    as `--encoder_lr_decay` does. Frozen encoders are in no group.
    """
    decay = factors(encoder_decay, model.names)
    by_rate: dict[float, list[Parameter]] = {}
    for name, encoder in model.encoders.items():
        for parameter, depth in zip(encoder.parameters(), depths(encoder), strict=True):
            if parameter.requires_grad:
                by_rate.setdefault(rate * decay[name] * layer_decay**depth, []).append(parameter)
    inside = {id(parameter) for parameter in model.encoders.parameters()}
    heads = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    return [{"params": own, "lr": lr} for lr, own in by_rate.items()] + [{"params": heads, "lr": rate}]


def depths(encoder: nn.Module) -> list[int]:
    """Depth below the heads of each of `encoder.parameters()`; 0 for all if the layers have no known names.

    Layers are the stem and the four stages of a ResNet, and in a timm model those of its `group_matcher`.
    """
    names = [name for name, _ in encoder.named_parameters()]
    layers = layer_ids(encoder)
    if layers is None:
        found = [STAGE.match(name) for name in names]
        if not any(found):
            return [0] * len(names)
        layers = {name: int(match[1]) if match else 0 for name, match in zip(names, found, strict=True)}
    top = max(layers.values()) + 1
    return [top - layers[name] for name in names]
