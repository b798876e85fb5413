"""CML: the joint prediction must not become more confident when a modality is taken away. Ma et al., ICML 2023.

conf(S) = max softmax of the joint logits from the modalities S, the features of the others zero, the bias whole.
rule=paper: loss += lambda * sum over S and m in S of mean_i relu(conf(S without m) - conf(S)), S of two or more. Pairs
    that differ by more modalities follow from these.
rule=code: modalities are removed from each clip one by one, in a random order per clip. This gives a chain of sets. The
    joint loss becomes the mean of the cross entropies along the chain. The hinge of two neighbouring sets counts if
    the larger set predicts correctly, or if both are wrong; in the second case only the smaller set's confidence is
    reduced. With two modalities the chain has two sets: both modalities, and one of them.
The hinge is a mean over clips. The authors sum it: lambda here is theirs times the batch size, 0.1 * 64.
"""

from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from balance.method import Method, Option, Step, never_joint
from models import Output
from utils.cli import number


class CML(Method):
    name = "cml"
    needs_fusion = True
    options = (
        Option("lambda", number(float, 0), 6.4, "weight of the hinge"),
        Option("rule", str, "paper", "pairs that are compared", choices=("paper", "code")),
    )
    acts_in = ("joint",)  # with one modality there is nothing to compare

    @classmethod
    def refuse(cls, args, opt) -> str | None:
        return never_joint(args)

    def losses(self, terms: dict[str, Tensor], output: Output, step: Step) -> dict[str, Tensor]:
        if getattr(self.opt, "lambda") == 0:
            return terms
        return self.all_pairs(terms, output, step) if self.opt.rule == "paper" else self.chain(terms, output, step)

    def all_pairs(self, terms: dict[str, Tensor], output: Output, step: Step) -> dict[str, Tensor]:
        found = {self.names: confidence(output.joint)}
        for size in range(len(self.names) - 1, 0, -1):
            for kept in combinations(self.names, size):
                zeroed = {name: z if name in kept else torch.zeros_like(z) for name, z in output.features.items()}
                found[kept] = confidence(self.model.head(zeroed, kept))
        pairs = [(found[small], found[large]) for large in found for small in found
                 if len(small) == len(large) - 1 and set(small) < set(large)]  # fmt: skip
        excess = torch.stack([F.relu(small - large) for small, large in pairs], dim=1)  # (B, pairs)
        return terms | {"cml": self.hinge(excess, step)}

    def chain(self, terms: dict[str, Tensor], output: Output, step: Step) -> dict[str, Tensor]:
        device, labels = output.joint.device, step.labels
        drawn = torch.rand(step.total, len(self.names), generator=self.generator(step, device), device=device)
        order = step.own(drawn).argsort(dim=1).argsort(dim=1)  # (B, M): the position at which a modality is removed
        logits = [output.joint]
        for lost in range(1, len(self.names)):
            mask = order >= lost
            columns = zip(output.features.items(), mask.split(1, dim=1), strict=True)
            zeroed = {name: z.masked_fill(~given, 0.0) for (name, z), given in columns}
            logits.append(self.model.head(zeroed, self.names, mask))
        rest = [F.cross_entropy(values, labels) for values in logits[1:]]
        conf, right = [confidence(values) for values in logits], [values.argmax(1) == labels for values in logits]
        excess = []
        for i in range(len(logits) - 1):
            wrong = ~right[i] & ~right[i + 1]
            excess.append(F.relu(conf[i + 1] - conf[i]) * right[i] + F.relu(conf[i + 1] - conf[i].detach()) * wrong)
        joint = sum(rest, terms["joint"]) / len(logits)
        return terms | {"joint": joint, "cml": self.hinge(torch.stack(excess, dim=1), step)}

    def hinge(self, excess: Tensor, step: Step) -> Tensor:
        """lambda times the mean over clips of the sum over pairs. excess (B, pairs)."""
        self.note("violations", (step.sum(excess > 0) / step.total).mean())
        return getattr(self.opt, "lambda") * excess.sum(1).mean()


def confidence(logits: Tensor) -> Tensor:
    """(B, C) -> (B,): the highest probability."""
    return logits.float().softmax(1).amax(1)
