"""LFM: fit labels and align the modalities' predictions, under a weight that changes over the run.
Yang et al., NeurIPS 2024.

Every cross entropy becomes scale * a1 * it, and the loss gains scale * a2 * Align, a2 = 1 - a1, scale 2. The paper has
late fusion, o = mean of the h_m, and CE(o) alone: `--fusion_method decision --alpha 0 --beta 0`.
weight=fitted: a1 is the authors' polynomial of degree 5 in the epoch of a run of 200 on CREMA-D, in time rescaled to
    the joint epochs of this run, clipped to [0, 1]. weight=learned: before each joint epoch, one step on a batch of the
    validation part, a2 <- clip(a2 - lr d, .05, .95), a2 first .95, lr halved every 20 epochs, where
    d = d CE_val(theta - eta scale (a1 g_cls + a2 g_align)) / d a2 = -eta scale <g_val, g_align - g_cls>
    at the network's weights, eta its learning rate, g_cls and g_align gradients of a training batch. A number fixes a2.
align=contrastive (paper): symmetric cross entropy of the cosines of all pairs of clips in the batch over `temperature`,
    each clip's own other modality being the right one. align=reverse_js (code): (KL(m || p) + KL(m || q)) / 2 with p, q
    the two softmaxes and m their mean, which is not the Jensen-Shannon divergence: that has KL(p || m).
For more than two modalities Align is the mean over pairs.
"""

import argparse
import math
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from balance.method import Context, Method, Option, Step, mean_over_ranks, never_joint
from models import Output
from models.inference import aside
from remix import Batch
from utils.cli import number
from utils.errors import UserError
from utils.seeding import step_generator

# a1 at these epochs of 200: the polynomial of degree 5 through them has its highest value, 1.011, at 183 as theirs has.
FITTED = {0: 0.205, 50: 0.437, 100: 0.539, 150: 0.821, 175: 0.993, 199: 0.916}
LEAST, MOST = 0.05, 0.95  # a2 where it is learned
HALVED = 20  # epochs between two halvings of its learning rate


def weighting(text: str) -> str | float:
    if text in ("fitted", "learned"):
        return text
    try:
        return number(float, 0, 1)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError("fitted, learned, or the weight of the alignment, from 0 to 1") from None


class LFM(Method):
    name = "lfm"
    options = (
        Option("weight", weighting, "fitted", "weight a2 of the alignment: fitted, learned, or a number from 0 to 1"),
        Option("align", str, "contrastive", "alignment", choices=("contrastive", "reverse_js")),
        Option("temperature", number(float, 0, open_low=True), 0.07, "of the contrastive alignment"),
        Option("scale", number(float, 0, open_low=True), 2.0, "factor on both parts of the loss"),
        Option("lr", number(float, 0), 1e-4, "learning rate of a2 where it is learned"),
    )
    acts_in = ("joint",)  # an alignment needs both modalities of a clip
    owns = frozenset({"loss weights"})
    needs_heads = True

    def __init__(self, context: Context):
        super().__init__(context)
        args = context.args
        self.epochs = args.warmup if args.method == "remix" else args.epochs  # joint ones
        self.a2 = MOST if self.opt.weight == "learned" else 0.0
        widths = self.model.widths
        if self.opt.align == "contrastive" and len(set(widths.values())) > 1:
            told = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise UserError(f"--balance lfm: the contrastive alignment needs encoders of equal width; here: {told}; "
                            "use align=reverse_js")  # fmt: skip

    @classmethod
    def refuse(cls, args, opt) -> str | None:
        return never_joint(args)

    @classmethod
    def needs_validation(cls, opt) -> bool:
        return opt.weight == "learned"

    def start_epoch(self, epoch: int) -> None:
        if epoch >= self.epochs:
            return
        if self.opt.weight == "fitted":
            self.a2 = 1 - fitted(epoch / self.epochs)
        elif self.opt.weight == "learned":
            rate = self.opt.lr * 0.5 ** (epoch // HALVED)
            self.a2 = min(max(self.a2 - rate * self.hypergradient(epoch), LEAST), MOST)
        else:
            self.a2 = self.opt.weight
        self.note("weight", self.a2)

    def losses(self, terms: dict[str, Tensor], output: Output, step: Step) -> dict[str, Tensor]:
        scale = self.opt.scale
        scaled = {name: scale * (1 - self.a2) * terms[name] for name in output.heads}
        if self.a2 > 0:
            scaled["lfm"] = scale * self.a2 * self.alignment(output, step)
        return terms | scaled

    def alignment(self, output: Output, step: Step) -> Tensor:
        """Align, a mean over the batch and over pairs of modalities."""
        found = []
        for pair in combinations(self.names, 2):
            if self.opt.align == "contrastive":
                # Whole on every process, which weighs it by its share of the batch.
                first, second = (step.gather(output.features[name]) for name in pair)
                found.append(contrastive(first, second, self.opt.temperature) / step.weight)
            else:
                found.append(reverse_js(*(output.logits[name] for name in pair)).mean())
        return torch.stack(found).mean()

    def hypergradient(self, epoch: int) -> float:
        """d: how the validation loss after one step of plain gradient descent depends on a2. In evaluation mode."""
        if epoch == 0:
            self.reestimate(self.model, self.names, epoch)  # nothing has yet
        rates = {id(p): group["lr"] for group in self.context.optimizer.param_groups for p in group["params"]}
        own = [p for p in self.model.parameters() if p.requires_grad]
        eta = torch.cat([p.new_full((p.numel(),), rates[id(p)]) for p in own])
        with aside(self.model):
            fit, align = self.gradients("train", epoch, own)
            held, _ = self.gradients("val", 0, own)  # the same clips each time
        d = -self.opt.scale * (held * eta) @ (align - fit)
        self.note("slope", d)
        return float(d)

    def gradients(self, part: str, draw: int, parameters: list) -> tuple[Tensor, Tensor]:
        """Gradients (P,) of the classification loss and of the alignment on a batch of a part, over all processes."""
        run, args = self.context, self.context.args
        generator = step_generator(args.random_seed, draw, 0, "balance", self.name)
        chosen = torch.randperm(len(run.clips[part]), generator=generator)[: args.batch_size]
        (batch,) = run.clips[part].epoch([Batch(chosen, self.names)])
        output, step = self.model(batch.inputs, batch.fed), Step(draw, 0, batch, True)
        entropies = {head: F.cross_entropy(logits, batch.labels) for head, logits in output.heads.items()}
        fit = sum((args.joint_weights[name] * entropies[name] for name in self.names), entropies["joint"])
        found = []
        for loss in (fit, self.alignment(output, step)):
            grads = torch.autograd.grad(
                loss * step.weight, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            found.append(mean_over_ranks(torch.cat([grad.flatten() for grad in grads])))
        return found[0], found[1]

    def state_dict(self) -> dict:
        return {"a2": self.a2}

    def load_state_dict(self, state: dict) -> None:
        self.a2 = state["a2"]


def fitted(time: float) -> float:
    """a1 at a time in [0, 1) of the run: Lagrange's polynomial through `FITTED`, clipped to [0, 1]."""
    at, value = 200 * time, 0.0
    for own, height in FITTED.items():
        for other in FITTED:
            if other != own:
                height *= (at - other) / (own - other)
        value += height
    return min(max(value, 0.0), 1.0)


def contrastive(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """(B, D) of two modalities -> mean over clips and both directions of the cross entropy of finding the other."""
    cosines = F.normalize(first.float(), dim=1) @ F.normalize(second.float(), dim=1).T / temperature  # (B, B)
    clips = torch.arange(len(cosines), device=cosines.device)
    return (F.cross_entropy(cosines, clips) + F.cross_entropy(cosines.T, clips)) / 2


def reverse_js(first: Tensor, second: Tensor) -> Tensor:
    """Logits (B, C) of two modalities -> (KL(m || p) + KL(m || q)) / 2 in nats, (B,)."""
    log_p, log_q = first.float().log_softmax(1), second.float().log_softmax(1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (log_m.exp() * (log_m - (log_p + log_q) / 2)).sum(1)
