"""MMPareto: merge an encoder's joint and unimodal gradients along a Pareto direction, magnitude restored.
Wei & Hu, ICML 2024.

Per encoder, over all its parameters: g_J the gradient of the joint loss, g_U that of its other losses. If they agree
(g_J . g_U > 0) both weigh 1/2; else k_J = (|g_U|^2 - g_J . g_U) / |g_J - g_U|^2 and k_U = 1 - k_J, the minimum-norm
point between them. Then d = 2 k_J g_J + 2 k_U g_U, and the gradient is gamma * d * max(1, |g_J + g_U| / |d|). The
official code, when run, takes that last ratio per parameter tensor (the default here). Heads keep their sum.
"""

import torch
from torch import Tensor

from balance.method import Method, Option, Step, gradient, mean_over_ranks
from utils.cli import number
from utils.errors import UserError


class MMPareto(Method):
    name = "mmpareto"
    options = (
        Option("gamma", number(float, 0), 1.5, "factor on the merged gradient"),
        Option("norm", str, "tensor", "what the magnitude is restored over", choices=("tensor", "encoder")),
    )
    owns = frozenset({"backward"})
    needs_heads = True
    scales_gradients = True
    compiles = False  # the graph is walked twice

    def backward(self, loss: Tensor, terms: dict[str, Tensor], step: Step) -> None:
        if "joint" not in terms:
            raise UserError(f"--balance {self.context.args.balance}: mmpareto merges the joint loss with the others, "
                            "and another of these methods leaves the joint loss out; choose one")  # fmt: skip
        encoders = {name: list(self.model.encoders[name].parameters()) for name in step.fed
                    if name not in self.model.frozen}  # fmt: skip
        if not encoders:
            return loss.backward()
        parameters = [p for own in encoders.values() for p in own]
        joint = iter(torch.autograd.grad(terms["joint"] * step.weight, parameters, retain_graph=True))
        loss.backward()  # g_J + g_U, averaged over the processes where there are several
        with torch.no_grad():
            for name, own in encoders.items():
                self.merge(name, [gradient(p) for p in own], [next(joint) for _ in own])

    def merge(self, name: str, total: list[Tensor], joint: list[Tensor]) -> None:
        """Overwrite `total` = g_J + g_U of one encoder, given g_J."""
        joint = list(mean_over_ranks(torch.cat([g.flatten() for g in joint])).split([g.numel() for g in joint]))
        flat = torch.cat([g.flatten() for g in total])
        weight = joint_weight(torch.cat(joint), flat - torch.cat(joint))
        self.note(f"weight_{name}", weight)
        directions = [g + (2 * weight - 1) * (2 * j.view_as(g) - g) for g, j in zip(total, joint, strict=True)]
        sizes = [(g.norm(), d.norm()) for g, d in zip(total, directions, strict=True)]
        if self.opt.norm == "encoder":
            sizes = [tuple(torch.stack(column).norm() for column in zip(*sizes, strict=True))] * len(sizes)
        for g, d, (before, after) in zip(total, directions, sizes, strict=True):
            restored = torch.where(after > 0, (before / after).clamp(min=1), torch.ones_like(after))
            g.copy_(self.opt.gamma * restored * d)


def joint_weight(joint: Tensor, unimodal: Tensor) -> Tensor:
    """k_J of two flat gradients. 1/2 where one of them is zero: there is nothing to merge."""
    dot, jj, uu = joint @ unimodal, joint @ joint, unimodal @ unimodal
    least_norm = (uu - dot) / (joint - unimodal).square().sum()
    return torch.where((dot > 0) | (jj == 0) | (uu == 0), torch.full_like(dot, 0.5), least_norm)
