"""Count what operations move, without a device: bytes of operands and results, views aside."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FREE = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "prim::device")


class Traffic(TorchDispatchMode):
    """Inside the block: `bytes` read and written by all operations, `kernels` of them, and `by_op` bytes by name.

    An operand counts with its distinct elements: a broadcast one is read once. Views move nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.kernels, self.by_op = 0, 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aliases = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
        leaves = (*tree_leaves((args, kwargs)), *tree_leaves(out))
        tensors = {id(x): x for x in leaves if isinstance(x, torch.Tensor)}  # what is written in place counts once
        if not aliases and tensors and func._schema.name not in FREE:
            moved = sum(distinct(x) * x.element_size() for x in tensors.values())
            self.bytes, self.kernels = self.bytes + moved, self.kernels + 1
            self.by_op[func._schema.name] += moved
        return out


def distinct(x: torch.Tensor) -> int:
    """Elements of `x` that lie at places of their own."""
    total = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        total *= size if stride else 1
    return total
