"""Count operations on any device, with their bytes and floating-point operations: for benchmarks and tests."""

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach", "view",
             "_reshape_alias", "lift_fresh", "resize_", "is_pinned", "is_same_size", "_local_scalar_dense", "set_",
             "device"}  # fmt: skip
OVERWRITING = {"copy_", "fill_", "zero_"}  # they do not read what they write to


def name_of(func: Any) -> str:
    """The name of an operator without its namespace and overload."""
    return func._schema.name.split("::")[1]


def computes(func: Any) -> bool:
    """Whether an operator launches a kernel on a GPU: views and allocations do not. It can launch more than one."""
    return not func.is_view and name_of(func) not in NO_KERNEL


class Operation(NamedTuple):
    """An operator that computes: the bytes it reads and writes, and the floating-point operations PyTorch counts."""

    name: str
    bytes: float
    flops: float


class Operations(TorchDispatchMode):
    """Lists the operations in the block that compute something, in `done`."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if computes(func):
            read = {key: value for key, value in (kwargs or {}).items() if key != "out"}
            moved = tree_leaves((args[name_of(func) in OVERWRITING :], read, out))
            size = sum(distinct(x) * x.element_size() for x in moved if isinstance(x, Tensor))
            flops = flop_registry.get(func.overloadpacket)
            self.done.append(
                Operation(name_of(func), size, flops(*args, **(kwargs or {}), out_val=out) if flops else 0)
            )
        return out

    @property
    def bytes(self) -> float:
        return sum(own.bytes for own in self.done)


def distinct(x: Tensor) -> int:
    """Elements of `x` that lie at places of their own: a broadcast operand is read once."""
    total = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        total *= size if stride else 1
    return total
