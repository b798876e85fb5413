"""Last batches filled up to the full size: the same logits, gradients and BatchNorm statistics as without it."""

import copy
from argparse import Namespace

import pytest
import torch
from networks import network
from torch.nn import functional as F

from models import MODELS, padding
from models.padding import FilledUp, few_sizes

NAMES = ("audio", "video")


def step(net, bare, clips, fed, mask=None):
    draw = torch.Generator().manual_seed(clips)
    inputs = {"audio": torch.randn(clips, 1, 33, 20, generator=draw, dtype=torch.float64),
              "video": torch.randn(clips, 2, 3, 32, 32, generator=draw, dtype=torch.float64)}  # fmt: skip
    seen = []
    hook = bare.encoders[fed[0]].conv1.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    output = net({name: inputs[name] for name in fed}, fed, mask)
    hook.remove()
    labels = torch.arange(clips) % 3
    bare.zero_grad()
    sum((F.cross_entropy(logits, labels) for logits in output.heads.values()), torch.zeros(())).backward()
    gradients = [torch.zeros(()) if p.grad is None else p.grad for p in bare.parameters()]
    return [*output.heads.values(), *output.features.values(), *gradients, *bare.buffers()], seen


def both(clips, fed, mask=None):
    torch.manual_seed(0)
    plain = network(3).double().train()
    other = copy.deepcopy(plain)
    expected, _ = step(plain, plain, clips, fed, mask)
    ours, seen = step(FilledUp(other, 4), other, clips, fed, mask)
    return expected, ours, seen[0]


@pytest.mark.parametrize(("clips", "fed", "mask", "rows"), [
    (3, NAMES, None, 4), (2, ("video",), None, 8), (3, ("audio",), None, 4), (4, ("audio",), None, 4),
    (1, ("audio",), None, 1), (3, NAMES, [[True, False], [False, True], [True, True]], 4),
])  # fmt: skip
def test_a_batch_filled_up_gives_what_its_real_clips_give(clips, fed, mask, rows):
    expected, ours, seen = both(clips, fed, None if mask is None else torch.tensor(mask))
    assert seen == rows  # so many images reach the first convolution
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_batchnorm_that_sees_the_filling_gives_other_numbers(monkeypatch):
    monkeypatch.setattr(padding, "BatchNorm", torch.nn.Bilinear)  # a layer that the network has none of
    expected, ours, _ = both(3, NAMES)
    assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("model", MODELS)
def test_networks_that_run_their_encoders_whole_are_filled_up(model):
    net, args, device = network(3, model=model), Namespace(precision="fp32", batch_size=4), torch.device("cuda", 0)
    assert isinstance(few_sizes(net, args, device), FilledUp) == (model == "late")
    args.precision = "official"
    assert few_sizes(net, args, device) is net
