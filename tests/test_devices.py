"""Apple's MPS without an Apple machine: PyTorch's fake tensors have the device, and a mode refuses float64 on it."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import remix
from balance.diagnostics import calibration_error, discrepancy
from utils import distributed
from utils.acceleration import default_precision, device_name, in_double
from utils.errors import UserError
from utils.metrics import Tally, accuracy


class WithoutDoubles(TorchDispatchMode):
    """As MPS does: no float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.device.type == "mps" and value.dtype == torch.float64:
                raise TypeError(f"{func}: float64 on MPS")
        return out


def until_read(function, *args):
    """Run up to the point where a number is read, which a fake tensor does not have."""
    with pytest.raises(DataDependentOutputException):
        function(*args)


def test_nothing_on_mps_is_float64():
    with FakeTensorMode(), WithoutDoubles():
        logits = {name: torch.empty(6, 3, device="mps") for name in ("joint", "audio", "video")}
        labels = torch.zeros(6, dtype=torch.long, device="mps")
        with pytest.raises(TypeError, match="float64 on MPS"):
            labels.double()
        tally = Tally(1, tuple(logits))
        tally.losses, tally.sums = torch.empty(1, device="mps"), {tuple(logits): torch.empty(3, 3, device="mps")}
        until_read(tally.numbers, ("joint", "audio"))
        until_read(accuracy, logits["joint"], labels)
        until_read(calibration_error, logits["joint"], labels)
        until_read(discrepancy, {"audio": logits["audio"], "video": logits["video"]}, labels)
        assert in_double(labels).device.type == "cpu"
        for score in remix.SCORES:
            hard = remix.difficulty([logits["audio"], logits["video"]], score, labels, torch.Generator())
            assert remix.decouple(hard).cpu().shape == (6, 2)


def test_the_flag(monkeypatch):
    with pytest.raises(UserError, match="--device mps: PyTorch sees no Apple GPU here"):
        distributed.start("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert distributed.start("mps") == torch.device("mps") and device_name(torch.device("mps")) == "MPS"
    assert default_precision("mps") == default_precision("cpu") == "fp32"
    with pytest.raises(UserError, match="one GPU, one process"):
        distributed.start("mps", "0,1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one GPU, one process"):
        distributed.start("mps")
