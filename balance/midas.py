"""MIDAS: train on the audio of one clip with the video of another; soft labels from each modality's confidence.
Hwang, Choi, Whang, NeurIPS 2025.

Clips i and j = pi(i) of a batch, pi random, y_i != y_j; o = head(z_1,i, z_2,j), p_m the unimodal heads' probabilities:
    c_1 = p_1,i[y_i] / (p_1,i[y_i] + p_2,j[y_j]), c_2 = 1 - c_1                  (labels: confidences)
    q_1 = softmax(o)[y_i] / (softmax(o)[y_i] + softmax(o)[y_j]), q_2 = 1 - q_1
    w: the modality with the lower mean c; a_w <- max(1, a_w + step * mean(c_w - q_w)), and the other's a counts 1
    loss += lambda * mean of cos (a_1 c_1 CE(o, y_i) + a_2 c_2 CE(o, y_j))
and the same for (z_1,j, z_2,i). cos is the cosine similarity of the inserted feature and the one it replaces, at least
0, so that pairs that are hard to distinguish weigh more. No gradient flows through c, q, a and cos. The mean is over
all pairs of both kinds.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from balance.method import Context, Method, Option, Step, never_joint
from models import Output
from utils.cli import number


class MIDAS(Method):
    name = "midas"
    needs_fusion = True
    options = (
        Option("lambda", number(float, 0), 1.0, "weight of the misaligned pairs", by_dataset={"KineticSound": 5.0}),
        Option("step", number(float, 0), 0.05, "step of the weak modality's weight"),
        Option("starts", number(int, 0), 5, "first epoch in which it acts; unimodal heads must be trained before"),
    )
    acts_in = ("joint",)
    needs_heads = True
    two_modalities = True

    def __init__(self, context: Context):
        super().__init__(context)
        self.weights = torch.ones(2, device=next(self.model.parameters()).device)  # a

    @classmethod
    def refuse(cls, args, opt) -> str | None:
        return never_joint(args, opt.starts, "starts")

    def losses(self, terms: dict[str, Tensor], output: Output, step: Step) -> dict[str, Tensor]:
        strength = getattr(self.opt, "lambda")
        if strength == 0 or step.epoch < self.opt.starts:
            return terms
        first, second = (step.gather(output.features[name]) for name in self.names)  # (total, D)
        sure = [step.gather(output.logits[name].detach()).float().softmax(1) for name in self.names]  # (total, C)
        labels, own = step.gather(step.labels), torch.arange(step.total, device=first.device)
        other = torch.randperm(step.total, generator=self.generator(step, first.device), device=first.device)
        i, j = torch.cat([own, other]), torch.cat([other, own])  # (2 total,): the clip that each modality is of
        joint = self.model.head(dict(zip(self.names, (first[i], second[j]), strict=True)), self.names)
        y = torch.stack([labels[i], labels[j]], dim=1)  # (2 total, 2)
        apart = (y[:, 0] != y[:, 1]).float()  # pairs of one class are aligned as they are
        unimodal = normalised(torch.stack([sure[0][i, y[:, 0]], sure[1][j, y[:, 1]]], dim=1))
        multimodal = normalised(joint.detach().float().softmax(1).gather(1, y))
        weights = self.weak_weights(unimodal, multimodal, apart)
        with torch.no_grad():  # the video is replaced in the first half, the audio in the second
            alike = torch.cat([F.cosine_similarity(z, z[other]) for z in (second, first)]).clamp(min=0)
        entropies = torch.stack([F.cross_entropy(joint, y[:, m], reduction="none") for m in (0, 1)], dim=1)
        losses = apart * alike * (weights * unimodal * entropies).sum(1)  # (2 total,)
        # The same on every process, which weighs it by its share of the batch.
        return terms | {"midas": strength * losses.sum() / apart.sum().clamp(min=1) / step.weight}

    def weak_weights(self, unimodal: Tensor, multimodal: Tensor, apart: Tensor) -> Tensor:
        """(2,): the updated a of the less confident modality, and 1 for the other. c, q (n, 2), apart (n,)."""
        count = apart.sum().clamp(min=1)
        means, gaps = ((apart[:, None] * values).sum(0) / count for values in (unimodal, unimodal - multimodal))
        weak = means < means.flip(0)  # (2,): none where both are equally sure
        self.weights = torch.where(weak, (self.weights + self.opt.step * gaps).clamp(min=1), self.weights)
        for name, weight in zip(self.names, self.weights, strict=True):
            self.note(f"weight_{name}", weight)
        return torch.where(weak, self.weights, torch.ones_like(self.weights))

    def state_dict(self) -> dict:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        self.weights = state["weights"].to(self.weights.device)


def normalised(values: Tensor) -> Tensor:
    """(n, 2) positive, each row to sum 1."""
    return values / values.sum(1, keepdim=True).clamp(min=1e-12)
