"""Resample (SMV): estimate each modality's contribution per clip; feed clips again with the one that contributes less.
Wei et al., CVPR 2024.

Before each epoch from `warmup` on, one pass over train in evaluation mode without augmentation: v(S) = |S| if the joint
head is right with the features outside S at zero, else 0. phi_m is the Shapley value of m in this game; for two
modalities phi_a = (v(a) + v(av) - v(v)) / 2, one of -0.5, 0, 0.5, 1, 1.5. phi_m = 1: m contributes its part.

sample     each clip gets copies that keep m alone: 1 if phi_m < 1, 2 if phi_m < 0.4, 3 if phi_m < -0.1
modality   with the mean phi_m over a random `part` of train, int(2/3 alpha |phi_a - phi_v| N) clips drawn with
           replacement get a copy that keeps the modality whose mean is lower alone

In joint training originals and copies share shuffled mixed batches, a copy's other features at zero. The copies are
redrawn for each epoch. With Remix a clip enters the batches of a modality that it keeps 1 + copies times.
"""

from collections.abc import Callable
from itertools import combinations
from math import comb

import torch
from torch import Tensor
from torch.nn import functional as F

from balance.method import Context, Method, Option, Step
from models import Output
from remix import Batch, batches_of, reassemble
from utils.cli import number
from utils.distributed import same
from utils.seeding import epoch_generator


class Resample(Method):
    name = "resample"
    options = (
        Option(
            "level", str, "sample", "copies by each clip's values or by their means", choices=("sample", "modality")
        ),
        Option("warmup", number(int, 1), 5, "epochs before the first valuation"),
        Option("part", number(float, 0, 1, open_low=True), 0.2, "share of train in the means of level=modality"),
        Option("alpha", number(float, 0), 1.0, "factor on the copies of level=modality"),
    )
    acts_in = ("mixed",)
    owns = frozenset({"plan"})

    def __init__(self, context: Context):
        super().__init__(context)
        self.copies: Tensor | None = None  # (N, M) of this epoch, on the CPU

    @classmethod
    def refuse(cls, args, opt) -> str | None:
        if opt.warmup >= args.epochs:
            return f"would never act: warmup={opt.warmup}, and the run has --epochs {args.epochs}"
        if args.model != "late":
            return f"values a modality with the others' features at zero, which masks nothing in --model {args.model}"
        if args.method == "remix" and args.reassemble in ("off", "unmasked"):
            return f"is defined for batches of one modality; leave --reassemble {args.reassemble} out"
        return None

    def start_epoch(self, epoch: int) -> None:
        if epoch < self.opt.warmup:
            return
        clips = self.context.clips["train"]
        dtype = next(self.model.parameters()).dtype
        features = {name: z.to(dtype) for name, z in self.features("train", torch.arange(len(clips))).items()}
        values = same(contributions(self.model.head, features, clips.labels)).cpu()  # (N, M)
        for name, mean in zip(self.names, values.mean(0), strict=True):
            self.note(f"phi_{name}", mean)
        if self.opt.level == "sample":
            self.copies = copies_of(values)
        else:
            self.copies = self.drawn(values, self.epoch_draws(epoch))

    def drawn(self, values: Tensor, draws: torch.Generator) -> Tensor:
        """Copies (N, M) of level=modality: random clips of the modality whose mean value (N, M) is the lowest."""
        n, copies = len(values), torch.zeros(values.shape, dtype=torch.long)
        chosen = torch.randperm(n, generator=draws)[: max(1, int(self.opt.part * n))]
        means = values[chosen].mean(0)
        count = int(2 / 3 * self.opt.alpha * float(means.max() - means.min()) * n)
        again = torch.randint(n, (count,), generator=draws)
        copies[:, means.argmin()] = torch.bincount(again, minlength=n)
        return copies

    def plan(self, plan: list[Batch], epoch: int) -> list[Batch]:
        if epoch < self.opt.warmup or not plan:
            return plan
        args, copies = self.context.args, self.copies
        assert copies is not None  # made by start_epoch
        if len(plan[0].fed) == 1:
            keep = kept(plan, self.names, len(copies))
            copies = keep * copies
            # The same random numbers as for Remix's own batches: without copies the result is the same.
            order = epoch_generator(args.random_seed, epoch, "plan")
            plan = reassemble(keep + copies, self.names, args.batch_size, args.reassemble, order)
        elif copies.any():
            clips = torch.cat([batch.clips for batch in plan])
            plan = mixed(clips, copies, self.names, args.batch_size, self.epoch_draws(epoch))
        for name, count in zip(self.names, copies.sum(0), strict=True):
            self.note(f"copies_{name}", count)
        return plan

    def losses(self, terms: dict[str, Tensor], output: Output, step: Step) -> dict[str, Tensor]:
        """Give the unimodal losses of originals and copies the weight that they have in joint batches."""
        assert step.mask is not None
        columns = dict(zip(self.names, step.mask.unbind(1), strict=True))
        weights = self.context.args.joint_weights
        own = {name: weights[name] * (F.cross_entropy(logits, step.labels, reduction="none") * columns[name]).mean()
               for name, logits in output.logits.items()}  # fmt: skip
        return terms | own


@torch.no_grad()
def contributions(head: Callable[..., Tensor], features: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Shapley values (N, M), float64, of the game v(S) = |S| where the prediction from S is right.

    features (N, D_m), labels (N,). The values of a clip add up to M if all together predict right, else to 0.
    """
    names = tuple(features)
    worth: dict[tuple[str, ...], Tensor] = {(): torch.zeros(len(labels), dtype=torch.double, device=labels.device)}
    for size in range(1, len(names) + 1):
        for fed in combinations(names, size):
            given = {name: z if name in fed else torch.zeros_like(z) for name, z in features.items()}
            worth[fed] = size * (head(given, fed).argmax(1) == labels).double()
    values = []
    for name in names:
        value = torch.zeros_like(worth[()])
        for fed in [fed for fed in worth if name not in fed]:
            joined = tuple(other for other in names if other in fed or other == name)
            value += (worth[joined] - worth[fed]) / (len(names) * comb(len(names) - 1, len(fed)))
        values.append(value)
    return torch.stack(values, dim=1)


def copies_of(values: Tensor) -> Tensor:
    """(N, M) -> (N, M) int64: 3 copies below -0.1, 2 below 0.4, 1 below 1, else none."""
    return sum((values < limit - 1e-9).long() for limit in (1.0, 0.4, -0.1))  # pyright: ignore[reportReturnType]


def kept(plan: list[Batch], names: tuple[str, ...], clips: int) -> Tensor:
    """The partition (N, M), as 0 and 1, that homogeneous batches follow from."""
    keep = torch.zeros(clips, len(names), dtype=torch.long)
    for batch in plan:
        keep[batch.clips, names.index(batch.fed[0])] = 1
    return keep


def mixed(
    originals: Tensor, copies: Tensor, names: tuple[str, ...], batch_size: int, draws: torch.Generator
) -> list[Batch]:
    """Shuffled mixed batches of all `originals` (n,), whole, and of their `copies` (N, M), one modality each."""
    m = len(names)
    again = [torch.arange(len(copies)).repeat_interleave(copies[:, i]) for i in range(m)]
    clips = torch.cat([originals, *again])
    alone = torch.eye(m, dtype=torch.bool).repeat_interleave(torch.tensor([len(own) for own in again]), dim=0)
    masks = torch.cat([torch.ones(len(originals), m, dtype=torch.bool), alone])
    plan = []
    for rows, _, _ in batches_of(len(clips), batch_size, names, draws):
        mask = masks[rows]
        plan.append(Batch(clips[rows], names, None if mask.all() else mask))
    return plan
