"""ReconBoost: modalities take turns to fit what the others get wrong, then all are rectified together.
Hua et al., ICML 2024.

Learners phi_m = shared head (D-256-C, ReLU) of z_m; ensemble Phi = rate * sum_m phi_m, `rate` trained, 1 at first.
Stage t of joint epochs trains modality u = t mod M in two phases, each with a fresh optimizer:
    phase 1: theta_u and the shared head, the other encoders frozen in evaluation mode, p = softmax(Phi without u)[y]:
        mean_i -(w1 - w2 p_i) log softmax(phi_u)[y_i] / C
        + alpha * mean (softmax(phi_u) - softmax(phi_v))^2 from stage 1 on, v the modality before u: consolidation
    phase 2: everything, CE(Phi).
In Remix's epochs a batch of u is phase 1 for u. The other encoders are not masked but frozen: their predictions on the
clips are needed for p. Phase 2 would need clips in all modalities and is omitted there.
"""

from argparse import Namespace
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from balance.method import Context, Method, Option, Step, frozen
from models import MultimodalClassifier, Output
from models.fusion import Features, Fed
from remix import ABLATIONS, Batch
from utils.cli import number
from utils.errors import UserError

HIDDEN = 256
WHY = "ReconBoost replaces the heads and every loss"
OTHERS = ("ogm_ge", "agm", "mmpareto", "pmr", "gblend", "mmcosine", "opm", "mla", "resample", "smv", "greedy", "lfm",
          "umt", "cml", "dgl", "inforeg", "midas")  # fmt: skip


class ReconBoost(Method):
    name = "reconboost"
    options = (
        Option("w1", number(float, 0), 5.0, "weight of a clip that the others get wrong"),
        Option("w2", number(float, 0), 1.0, "reduction of the weight where the others are correct; at most w1"),
        Option("alpha", number(float, 0), 0.5, "weight of the consolidation"),
        Option("phase1", number(int, 1), 4, "epochs of one modality in a stage"),
        Option("phase2", number(int, 0), 4, "epochs of all modalities in a stage"),
    )
    acts_in = ("joint", "homogeneous")
    owns = frozenset({"head", "plan"})
    conflicts = dict.fromkeys(OTHERS, WHY)
    needs_heads = True
    compiles = False  # encoders change mode from batch to batch

    def __init__(self, context: Context):
        super().__init__(context)
        self.kept: list[str] | None = None  # in an epoch of Remix, the modality of each batch
        self.held = ExitStack()  # the block in which the other encoders are frozen

    @classmethod
    def refuse(cls, args, opt) -> str | None:
        if opt.w2 > opt.w1:
            return f"w2={opt.w2:g} is above w1={opt.w1:g}, which would reward errors"
        if args.method == "remix" and args.reassemble in ABLATIONS:
            return f"--reassemble {args.reassemble} makes no batches of one modality; leave the flag out"
        if args.fusion_method != "concat":
            return f"it has a joint head of its own; leave --fusion_method {args.fusion_method} out"
        return None

    @classmethod
    def replace_heads(cls, model: MultimodalClassifier, opt: Namespace) -> None:
        """One head for all modalities, in the ensemble and as each one's unimodal head.

        Raises `UserError` for encoders whose features differ in width.
        """
        if len(set(model.widths.values())) > 1:
            widths = ", ".join(f"{name} {width}" for name, width in model.widths.items())
            raise UserError(f"--balance reconboost: its shared head needs encoders of equal width; here: {widths}")
        ensemble = Ensemble(model.widths, model.n_classes).to(next(model.parameters()))
        model.head = ensemble  # pyright: ignore[reportAttributeAccessIssue]
        model.heads = nn.ModuleDict(dict.fromkeys(model.names, ensemble.shared))

    @property
    def rate(self) -> nn.Parameter:
        return self.model.head.get_parameter("rate")

    def stage(self, epoch: int) -> tuple[int, str | None, bool]:
        """Of a joint epoch: its stage, the modality that phase 1 trains (None in phase 2), whether a phase begins."""
        length = self.opt.phase1 + self.opt.phase2
        number, at = divmod(epoch, length)
        learner = self.names[number % len(self.names)] if at < self.opt.phase1 else None
        return number, learner, at in (0, self.opt.phase1)

    def start_epoch(self, epoch: int) -> None:
        args = self.context.args
        remixed = args.method == "remix" and epoch >= args.warmup
        if epoch == args.warmup if remixed else self.stage(epoch)[2]:
            self.restart()
        if epoch == 0:  # frozen encoders need statistics, which nothing has estimated yet
            self.reestimate(self.model, self.names, epoch)

    def restart(self) -> None:
        """Reset the optimizer's state of every parameter to zeros, its initial value."""
        for state in self.context.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def plan(self, plan: list[Batch], epoch: int) -> list[Batch]:
        """Feed all modalities in batches of one modality: the loss needs the others' predictions."""
        alone = all(len(batch.fed) == 1 for batch in plan)
        self.kept = [batch.fed[0] for batch in plan] if alone else None
        return [batch._replace(fed=self.names) for batch in plan]

    def learner(self, step: Step) -> str | None:
        return self.kept[step.batch] if self.kept is not None else self.stage(step.epoch)[1]

    def before_forward(self, step: Step) -> None:
        if learner := self.learner(step):
            others = [self.model.encoders[name] for name in self.names if name != learner]
            for encoder in others:
                encoder.eval()
            self.held.enter_context(frozen(*others))

    def outputs(self, output: Output, step: Step) -> Output:
        self.held.close()
        self.model.encoders.train()
        return output

    def losses(self, terms: dict[str, Tensor], output: Output, step: Step) -> dict[str, Tensor]:
        learner = self.learner(step)
        if learner is None:
            return {"joint": terms["joint"]}
        logits = {name: o if name == learner else o.detach() for name, o in output.logits.items()}
        others = sum(o for name, o in logits.items() if name != learner) * self.rate.detach()
        right = F.softmax(others, dim=1).gather(1, step.labels[:, None])[:, 0]  # p (B,)
        self.note("p", step.sum(right) / step.total)
        entropies = F.cross_entropy(logits[learner], step.labels, reduction="none")
        loss = ((self.opt.w1 - self.opt.w2 * right) * entropies).mean() / self.model.n_classes
        if self.opt.alpha > 0 and (self.kept is not None or self.stage(step.epoch)[0] > 0):
            before = self.names[self.names.index(learner) - 1]
            loss = loss + self.opt.alpha * F.mse_loss(logits[learner].softmax(1), logits[before].softmax(1))
        return {learner: loss}  # nothing reaches `rate`: it is not part of phase 1, weight decay included


class Ensemble(nn.Module):
    """The sum of the learners, times a trained rate. `shared` is the one head (B, D) -> (B, C) of all of them."""

    def __init__(self, widths: dict[str, int], n_classes: int):
        super().__init__()
        self.names = tuple(widths)
        width = next(iter(widths.values()))
        self.shared = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, n_classes))
        self.rate = nn.Parameter(torch.ones(()))

    def forward(self, features: Features, fed: Fed = (), mask: Tensor | None = None) -> Tensor:
        """A masked modality has no learner in the sum."""
        total = 0
        for name in fed or self.names:
            own = self.shared(features[name])
            total = total + (own if mask is None else own * mask[:, self.names.index(name), None])
        return self.rate * total
