"""Gradient blending: weigh the audio, video and joint losses by generalisation over squared overfitting.
Wang, Tran, Feiszli, CVPR 2020.

For each k of audio, video, joint, a copy of the network is trained alone with its own loss for n epochs. With mean
losses L^T on train and L^V on held-out clips, both in evaluation mode, before (0) and after (1):
    overfitting O = L^V - L^T, dO = O(1) - O(0), generalisation G = L^V(0) - L^V(1), w_k = G_k / dO_k^2, sum 1.
The held-out clips are the validation part, never test. A modality whose held-out loss rose has G < 0 and weight 0; dO^2
has a floor; if nothing generalised, the weights are uniform.
"""

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F

from balance.method import Flag, Method, Run, Step
from models import Output
from utils.cli import number

LOSSES = ("audio", "video", "joint")
FLOOR = 0.01  # of |dO|, in mean held-out losses: below it a difference is noise


def three_weights(text: str) -> str:
    values = [number(float, 0)(part) for part in text.split(",")]
    if len(values) != 3 or sum(values) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: three numbers are wanted, such as 0.014,0.63,0.356")
    return ",".join(f"{value:g}" for value in values)


class GBlend(Method):
    name = "gblend"
    flags = (
        Flag("gblend_every", number(int, 1), 10, "epochs between two estimates of the weights"),
        Flag("gblend_probe", number(int, 1), None, "epochs the three copies train for an estimate (gblend_every)"),
        Flag("gblend_weights", three_weights, None, "fixed weights audio,video,joint instead (estimated)"),
        Flag("gblend_sum", number(float, 0, open_low=True), None, "what weights add up to (that of those replaced)"),
    )
    owns = frozenset({"loss weights"})

    def __init__(self, run: Run):
        super().__init__(run)
        fixed = self.gblend_weights
        self.weights = torch.tensor([float(w) for w in fixed.split(",")] if fixed else [1 / 3] * 3)  # on the CPU

    @classmethod
    def refuse(cls, flags) -> str | None:
        given = [f"--{name}" for name in ("alpha", "beta") if name not in flags.from_preset]
        return f"sets the weights of the losses itself; leave {' and '.join(given)} out" if given else None

    @classmethod
    def needs_validation(cls, flags) -> bool:
        return not flags.gblend_weights

    def start_epoch(self, epoch: int) -> None:
        if not self.gblend_weights and epoch % self.gblend_every == 0:
            self.weights = self.estimate(epoch)
        for name, weight in zip(LOSSES, self.weights, strict=True):
            self.note(f"weight_{name}", weight / self.weights.sum())

    def estimate(self, epoch: int) -> Tensor:
        """Weights (3,) in the order of `LOSSES`, sum 1. Costs three trainings of `gblend_probe` epochs.

        As many near the end of the run as before, so that a run that is made longer later is the same up to there.
        """
        epochs = self.gblend_probe or self.gblend_every
        before, after = [], []
        for name in LOSSES:
            kept = "both" if name == "joint" else name
            method = OneLoss(self.run, name)
            for trained, losses in ((0, before), (epochs, after)):
                copy = self.run.train_copy(method, kept, epoch, trained)
                losses.append(self.mean_losses(copy, name, kept))
        return blend(torch.tensor(before).T, torch.tensor(after).T)

    def mean_losses(self, network, head: str, kept: str) -> list[float]:
        """Mean cross entropy of one head on train and on validation, clips fed in evaluation mode."""
        parts = {part: self.run.predict(network, part, kept)[head] for part in ("train", "val")}
        return [F.cross_entropy(logits, self.run.clips[part].labels).item() for part, logits in parts.items()]

    def losses(self, terms: dict[str, Tensor], output: Output, step: Step) -> dict[str, Tensor]:
        flags, names = self.run.flags, (*step.modalities, "joint")
        if step.kind == "joint":
            replaced = 1 + flags.alpha + flags.beta
        else:
            replaced = 1 + (flags.gamma2 if step.kept == "audio" else flags.gamma1)
        own = [float(self.weights[LOSSES.index(name)]) for name in names]
        # A batch of one modality whose two weights are both 0 would be wasted: it is weighed evenly.
        own = own if sum(own) > 0 else [1.0] * len(own)
        scale = (self.gblend_sum or replaced) / sum(own)
        blended = {name: scale * w * F.cross_entropy(getattr(output, name), step.labels)
                   for name, w in zip(names, own, strict=True)}  # fmt: skip
        return terms | {name: blended[name] for name in ("joint", *step.modalities)}

    def state_dict(self) -> dict:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        self.weights = state["weights"]


class OneLoss(Method):
    """Train with one loss alone: what a probe does."""

    def __init__(self, run: Run, head: str):
        super().__init__(run)
        self.head = head

    def losses(self, terms: dict[str, Tensor], output: Output, step: Step) -> dict[str, Tensor]:
        return {self.head: F.cross_entropy(getattr(output, self.head), step.labels)}


def blend(before: Tensor, after: Tensor) -> Tensor:
    """Weights (K,) with sum 1 from mean losses before and after, each (2, K): on train, on held-out clips."""
    overfitting = (after[1] - after[0]) - (before[1] - before[0])
    gain = (before[1] - after[1]).clamp(min=0)
    floor = FLOOR * before[1].mean()
    weights = gain / overfitting.square().clamp(min=float(floor.square()))
    total = weights.sum()
    return weights / total if total > 0 else torch.full_like(weights, 1 / len(weights))
