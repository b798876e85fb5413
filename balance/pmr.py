"""PMR: a prototype loss per modality strengthens the slow one; an entropy term slows the fast one in early epochs.
Fan et al., CVPR 2023.

c_m[k] = mean feature of class k over about a tenth of train, recomputed before each epoch (eval mode), with
c <- eps c_old + (1 - eps) c_new from the third set on (the second replaces the first, which is of an untrained network,
as in the authors' code). q_m = softmax_k(-||z_m - c_m[k]||), PCE_m = -mean log q_m[y],
rho = sum q_a[y] / sum q_v[y]; beta = clip(1/rho - 1, 0, 1), gamma = clip(rho - 1, 0, 1) (Eq. 11):
    loss += alpha beta PCE_a + alpha gamma PCE_v, and in the first epochs -= mu gamma H(q_a) + mu beta H(q_v)   (Eq. 13)
A homogeneous batch has only the fed modality's terms. Its rho is the epoch's, from the clips of the prototypes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from balance.method import Context, Method, Option, Step
from models import Output
from utils.cli import number

SHARE = 10  # a prototype is made of one clip in ten
AVERAGED = 3  # the first set of prototypes that is averaged with the one before


class PMR(Method):
    name = "pmr"
    options = (
        Option("alpha", number(float, 0), 1.0, "weight of the prototype losses"),
        Option("mu", number(float, 0), 0.01, "weight of the entropy of the modality ahead"),
        Option("entropy_epochs", number(int, 0), 10, "epochs with the entropy term, at the start"),
        Option("momentum", number(float, 0, 1), 0.0, "share of the old prototypes kept each epoch"),
        Option("rule", str, "paper", "coefficients: clipped ratios, or 1 and 0", choices=("paper", "hard")),
        Option("ends", number(int, 0), 70, "last epoch it acts in"),
    )

    two_modalities = True

    def __init__(self, context: Context):
        super().__init__(context)
        self.prototypes: Tensor | None = None  # (2, C, D)
        self.present: Tensor | None = None  # (C,) bool: classes of which train has a clip
        self.ratio: Tensor | None = None  # rho of the epoch
        self.sets = 0  # of prototypes made so far

    def start_epoch(self, epoch: int) -> None:
        if epoch > self.opt.ends:
            return
        labels = self.context.clips["train"].labels
        draw = self.epoch_draws(epoch)
        chosen = subset(labels.cpu(), draw)
        features = self.features("train", chosen)
        own = labels[chosen.to(labels.device)]
        stacked = torch.stack([features[name] for name in self.names])  # (2, n, D)
        new, self.present = class_means(stacked, own, self.model.n_classes)
        old, eps = self.prototypes, self.opt.momentum
        self.sets += 1
        self.prototypes = new if old is None or self.sets < AVERAGED else eps * old + (1 - eps) * new
        scores = [self.similarity(name, features[name])[0].gather(1, own[:, None]).exp().sum() for name in self.names]
        self.ratio = scores[0] / scores[1]

    def similarity(self, name: str, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) -> log q and q, (B, C) each; a class without clips has probability 0."""
        assert self.prototypes is not None and self.present is not None  # made by start_epoch
        prototypes = self.prototypes[self.names.index(name)]
        squares = (features.float()[:, None] - prototypes).square().sum(2)  # (B, C)
        # The root has no finite slope at 0, where a feature lies on its prototype.
        logits = -squares.clamp(min=1e-12).sqrt().masked_fill(~self.present, torch.inf)
        log_q = F.log_softmax(logits, dim=1)
        return log_q, log_q.exp()

    def losses(self, terms: dict[str, Tensor], output: Output, step: Step) -> dict[str, Tensor]:
        if step.epoch > self.opt.ends or (self.opt.alpha == 0 and self.opt.mu == 0):
            return terms
        found = {name: self.similarity(name, output.features[name]) for name in step.fed}
        labels = step.labels[:, None]
        ratio, present = self.ratio, self.present
        if step.kind == "joint":
            sums = step.sum(torch.cat([q.gather(1, labels) for _, q in found.values()], dim=1))  # (2,)
            ratio = sums[0] / sums[1]
            self.note("ratio", ratio)
        assert ratio is not None and present is not None  # made by start_epoch
        slow = coefficients(ratio, self.opt.rule)
        added = ratio.new_zeros(())
        for name, (log_q, q) in found.items():
            ahead = slow[1 - self.names.index(name)]  # how far the other modality lags behind
            added = added - self.opt.alpha * slow[self.names.index(name)] * log_q.gather(1, labels).mean()
            if step.epoch < self.opt.entropy_epochs:
                entropy = -(q * log_q.masked_fill(~present, 0.0)).sum(1).mean()
                added = added - self.opt.mu * ahead * entropy
        return terms | {"pmr": added}

    def state_dict(self) -> dict:
        return {"prototypes": self.prototypes, "present": self.present, "ratio": self.ratio, "sets": self.sets}

    def load_state_dict(self, state: dict) -> None:
        device = self.context.clips["train"].labels.device
        for name, value in state.items():
            setattr(self, name, value.to(device) if isinstance(value, Tensor) else value)


def subset(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Indices of about one clip in ten, sorted, at least one of every class that occurs. labels (N,) on the CPU."""
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels[order]
    first = [int(torch.nonzero(shuffled == label)[0]) for label in shuffled.unique()]
    taken = torch.zeros(len(labels), dtype=torch.bool)
    taken[: -(-len(labels) // SHARE)] = True
    taken[first] = True
    return order[taken].sort().values


def class_means(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(M, n, D), (n,) -> means (M, C, D), zero for a class without clips, and which classes have clips (C,)."""
    member = F.one_hot(labels, classes).to(features.dtype)  # (n, C)
    counts = member.sum(0)
    return (member.T @ features) / counts.clamp(min=1)[:, None], counts > 0


def coefficients(ratio: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """(beta, gamma): how far the first, and the second, modality lag behind. At most one of them is above 0."""
    if rule == "hard":
        return (ratio < 1).float(), (ratio > 1).float()
    return (1 / ratio - 1).clamp(0, 1), (ratio - 1).clamp(0, 1)
