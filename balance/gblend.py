"""Gradient blending: weigh the unimodal and joint losses by generalisation over squared overfitting.
Wang, Tran, Feiszli, CVPR 2020.

For each head k (every modality, and joint), a copy of the network is trained for n epochs with the loss of k alone.
With mean losses L^T on train and L^V on held-out clips, both in evaluation mode, before (0) and after (1) training:
    overfitting O = L^V - L^T, dO = O(1) - O(0), generalisation G = L^V(0) - L^V(1), w_k = G_k / dO_k^2, sum 1.
The held-out clips are the validation part, never test. A modality whose held-out loss rose has G < 0 and weight 0; dO^2
has a floor; if nothing generalised, the weights are uniform.
"""

import argparse
import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from balance.method import Balance, Context, Method, Option, Step
from models import Output
from models.inference import predict
from models.rates import make_optimizer
from remix import batches_of
from utils import distributed
from utils.cli import number
from utils.seeding import epoch_generator

FLOOR = 0.01  # of |dO|, in mean held-out losses: below it a difference is noise


def weight_list(text: str) -> tuple[float, ...]:
    values = tuple(number(float, 0)(part) for part in text.split("/"))
    if sum(values) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: all weights are 0; separate them by slashes: 0.1/0.6/0.3")
    return values


class GBlend(Method):
    name = "gblend"
    options = (
        Option("every", number(int, 1), 10, "epochs between two estimates of the weights"),
        Option("probe", number(int, 1), None, "epochs that the copies train for an estimate (default: every)"),
        Option("weights", weight_list, None, "fixed weights of the modalities and joint, as in 0.1/0.6/0.3"),
        Option("sum", number(float, 0, open_low=True), None, "sum of the weights (default: that of those replaced)"),
    )
    owns = frozenset({"loss weights"})
    needs_heads = True

    def __init__(self, context: Context):
        super().__init__(context)
        self.losses_of = (*self.names, "joint")
        fixed = self.opt.weights or [1 / len(self.losses_of)] * len(self.losses_of)
        self.weights = torch.tensor(fixed)  # on the CPU

    @classmethod
    def refuse(cls, args, opt) -> str | None:
        given = [f"--{name}" for name in ("alpha", "beta") if name not in args.from_preset]
        if given:
            return f"sets the weights of the losses itself; leave {' and '.join(given)} out"
        if opt.weights and len(opt.weights) != len(args.joint_weights) + 1:
            return f"weights: {len(opt.weights)} given; {', '.join(args.joint_weights)} and joint need one each"
        return None

    @classmethod
    def needs_validation(cls, opt) -> bool:
        return not opt.weights

    def start_epoch(self, epoch: int) -> None:
        if not self.opt.weights and epoch % self.opt.every == 0:
            self.weights = self.estimate(epoch)
        for name, weight in zip(self.losses_of, self.weights, strict=True):
            self.note(f"weight_{name}", weight / self.weights.sum())

    def estimate(self, epoch: int) -> Tensor:
        """Weights (M + 1,) in the order of `losses_of`, sum 1. Costs M + 1 trainings of `probe` epochs.

        Estimates near the end of the run also train `probe` epochs, so that a run that is extended later has the same
        first part.
        """
        epochs = self.opt.probe or self.opt.every
        before, after = [], []
        for name in self.losses_of:
            fed = self.names if name == "joint" else (name,)
            for trained, losses in ((0, before), (epochs, after)):
                losses.append(self.mean_losses(self.train_copy(name, fed, epoch, trained), name, fed))
        return blend(torch.tensor(before).T, torch.tensor(after).T)

    def train_copy(self, head: str, fed: tuple[str, ...], epoch: int, epochs: int) -> nn.Module:
        """A copy of the network trained for `epochs` with one head's loss alone, with a fresh optimizer.

        With 0 epochs it is the network itself, to be compared with a trained copy: its BatchNorm statistics are
        re-estimated in the same way, which those of the network are not before its first epoch.
        """
        run, args = self.context, self.context.args
        network = copy.deepcopy(self.model)
        optimizer = make_optimizer(network, args)
        for group, rate in zip(optimizer.param_groups, [g["lr"] for g in run.optimizer.param_groups], strict=True):
            group["lr"] = rate
        distributed.parallel(network, network.encoders.values())
        alone, clips = Balance([OneLoss(run, head)]), run.clips["train"]
        for e in range(epoch, epoch + epochs):
            plan = batches_of(len(clips), args.batch_size, fed, epoch_generator(args.random_seed, e, "plan"))
            run.train_epoch(network, clips, plan, optimizer, e, args, alone, run.check)
        distributed.same_buffers(network)
        self.reestimate(network, fed, max(0, epoch + epochs - 1))
        return network

    def mean_losses(self, network: nn.Module, head: str, fed: tuple[str, ...]) -> list[float]:
        """Mean cross entropy of one head on train and on validation, clips fed in evaluation mode."""
        clips, size = self.context.clips, 4 * self.context.args.batch_size
        parts = {part: predict(network, clips[part], fed, size, f"{part} predictions", self.context.check)[head]
                 for part in ("train", "val")}  # fmt: skip
        return [F.cross_entropy(logits, clips[part].labels).item() for part, logits in parts.items()]

    def losses(self, terms: dict[str, Tensor], output: Output, step: Step) -> dict[str, Tensor]:
        args, names = self.context.args, (*step.fed, "joint")
        given = args.joint_weights if step.joint else args.alone_weights
        replaced = 1 + sum(given[name] for name in step.fed)
        own = [float(self.weights[self.losses_of.index(name)]) for name in names]
        # A batch of one modality whose two weights are both 0 would have no gradient: use equal weights.
        own = own if sum(own) > 0 else [1.0] * len(own)
        scale = (self.opt.sum or replaced) / sum(own)
        logits = output.heads
        blended = {name: scale * w * F.cross_entropy(logits[name], step.labels)
                   for name, w in zip(names, own, strict=True)}  # fmt: skip
        return terms | {name: blended[name] for name in ("joint", *step.fed)}

    def state_dict(self) -> dict:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        self.weights = state["weights"]


class OneLoss(Method):
    """Train with a single loss, as a probe does."""

    def __init__(self, context: Context, head: str):
        super().__init__(context)
        self.head = head

    def losses(self, terms: dict[str, Tensor], output: Output, step: Step) -> dict[str, Tensor]:
        return {self.head: F.cross_entropy(output.heads[self.head], step.labels)}


def blend(before: Tensor, after: Tensor) -> Tensor:
    """Weights (K,) with sum 1 from mean losses before and after, each (2, K): on train, on held-out clips."""
    overfitting = (after[1] - after[0]) - (before[1] - before[0])
    gain = (before[1] - after[1]).clamp(min=0)
    floor = FLOOR * before[1].mean()
    weights = gain / overfitting.square().clamp(min=float(floor.square()))
    total = weights.sum()
    return weights / total if total > 0 else torch.full_like(weights, 1 / len(weights))
