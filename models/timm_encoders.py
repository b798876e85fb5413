"""Encoders from timm (PyTorch Image Models), an optional package: `timm:NAME`, any of its image models.

timm is imported lazily: it is optional, and importing it takes seconds.

Shapes: B images, c channels, H x W pixels, D features.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.errors import UserError

TIMM = "timm:"
MULTIPLE = 32  # of pixels: what the patches and windows of most models divide


class Resize:
    """A forward pre-hook: images are resized (bilinear) to `size`. A hook leaves the names of the weights alone."""

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def __call__(self, module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return F.interpolate(inputs[0], self.size, mode="bilinear", antialias=True)


def make_timm(name: str, shape: tuple[int, ...]) -> tuple[nn.Module, int]:
    """The timm model `name` without its classifier, with timm's initialisation, and its number of features D.

    `shape` is (c, H, W). A model whose input size is fixed is built for H x W. A model that does not take images of
    that size has them resized to the next multiples of 32. Raises `UserError` if timm is not installed, has no such
    model, or the model does not turn images of either size into one vector each.
    """
    try:
        import timm
    except ImportError:
        raise UserError(f"--encoder {TIMM}{name}: timm is not installed; pip install timm") from None
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0][:8]}*")[:3]
        similar = f"; similar ones: {', '.join(near)}" if near else ""
        raise UserError(f"--encoder {TIMM}{name}: timm {timm.__version__} has no such model{similar}")
    config = timm.get_pretrained_cfg(name)
    fixed = config is not None and config.fixed_input_size
    size = shape[1], shape[2]
    larger = -(-size[0] // MULTIPLE) * MULTIPLE, -(-size[1] // MULTIPLE) * MULTIPLE
    failure = ""
    for built_for in [size, larger] if larger != size else [size]:
        try:
            options: dict[str, Any] = {"img_size": built_for} if fixed else {}
            net = timm.create_model(name, num_classes=0, in_chans=shape[0], **options)
            if built_for != size:
                net.register_forward_pre_hook(Resize(built_for))
            return net, features_of(net, shape)
        except Exception as error:  # models refuse a size in more ways than can be listed; all of them mean the same
            failure = failure or " ".join(str(error).split())[:120]
    shown = " x ".join(map(str, shape))
    raise UserError(f"--encoder {TIMM}{name}: does not take images of {shown} ({failure}); use another one or another "
                    "--image_size")  # fmt: skip


@torch.no_grad()
def features_of(net: nn.Module, shape: tuple[int, ...]) -> int:
    """D of a model that maps (B, c, H, W) to (B, D), found by one image. Raises `ValueError` for another output."""
    output = net.eval()(torch.zeros(1, *shape))
    net.train()
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise ValueError("its output is no vector")
    return output.shape[1]


def layer_ids(net: nn.Module) -> dict[str, int] | None:
    """The layer of each parameter of a timm model, 0 for the stem, as `group_matcher` says; None for another model."""
    if not hasattr(net, "group_matcher"):
        return None
    from timm.models import group_parameters

    return group_parameters(net, net.group_matcher(coarse=False), reverse=True)  # pyright: ignore[reportCallIssue]


def adapted(net: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a file under the names and sizes of a timm model: what timm does with those that it publishes.

    It renames those of other repositories and resizes positions and patches to the images of `net`. Weights that its
    rules do not know are returned as they are.
    """
    module = sys.modules[type(net).__module__]
    rules = getattr(module, "checkpoint_filter_fn", None) or getattr(module, "_filter_fn", None)
    if rules is None or not module.__name__.startswith("timm."):
        return weights
    try:
        return rules(dict(weights), net)
    except Exception:  # of another network: whoever loads them will say what does not fit
        return weights
