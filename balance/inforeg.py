"""InfoReg: pull the leading encoder towards its weights at the start of the epoch, while its Fisher trace grows fast.
Huang et al., CVPR 2025.

The trace T_m(e) of encoder m in epoch e: the mean square of each convolution's and linear map's gradient, added up over
layers and steps (an empirical Fisher trace). With the sums over the last 10 epochs before this one,
    k_m = (sum of T_m(e-10 .. e-1) - sum of T_m(e-11 .. e-2)) / sum of T_m(e-10 .. e-1), 1 in the first epoch,
m is in its prime learning window while k_m > `rate`. With s_m = sum_i softmax(h_m,i)[y_i], of the unimodal heads,
    gap_m = s_m - mean of the other modalities' s; where gap_m > 0 in the window:
    g_m += beta_m exp(tanh(gap_m)) (theta_m - theta_m at the start of the epoch).
"""

import argparse

import torch
from torch import Tensor, nn

from balance.method import Context, Method, Option, Step, label_scores, never_joint
from models import Output
from utils.cli import number

WINDOW = 10  # epochs that the traces are added up over


def strengths(text: str) -> str:
    """Numbers separated by slashes, one per modality or one for all."""
    for part in text.split("/"):
        try:
            number(float, 0)(part)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}; one per modality, or one for all: 0.95/0.1") from None
    return text


class InfoReg(Method):
    name = "inforeg"
    options = (
        Option("beta", strengths, "0.95/0.1", "strength of the pull, one per modality or one for all"),
        Option("rate", number(float, 0), 0.05, "growth of the trace above which the window is open"),
    )
    acts_in = ("joint",)
    needs_heads = True

    def __init__(self, context: Context):
        super().__init__(context)
        device = next(self.model.parameters()).device
        given = [float(part) for part in self.opt.beta.split("/")]
        self.beta = torch.tensor(given * (len(self.names) if len(given) == 1 else 1), device=device)  # (M,)
        self.history: list[Tensor] = []  # T (M,) of the last joint epochs
        self.trace: Tensor | None = None  # T (M,) of the current or latest joint epoch
        self.growth = torch.ones(len(self.names), device=device)  # k (M,)
        self.start: dict[str, list[Tensor]] = {}

    @classmethod
    def refuse(cls, args, opt) -> str | None:
        names = tuple(args.joint_weights)
        if len(opt.beta.split("/")) not in (1, len(names)):
            return f"beta={opt.beta}: give one number for all modalities, or one each for {', '.join(names)}"
        return never_joint(args)

    def start_epoch(self, epoch: int) -> None:
        if self.trace is not None:
            self.history = [*self.history, self.trace][-WINDOW - 1 :]
            self.trace = None
        self.growth = growth(self.history, self.growth)
        if self.beta.any():
            with torch.no_grad():
                self.start = {name: [p.clone() for p in self.model.encoders[name].parameters()] for name in self.names}

    @torch.no_grad()
    def after_backward(self, output: Output, step: Step) -> None:
        if not self.start:
            return
        trace = torch.stack([fisher_trace(self.model.encoders[name]) for name in self.names])
        self.trace = trace if self.trace is None else self.trace + trace
        pull = self.beta * pulls(label_scores(output.logits, step), self.growth > self.opt.rate)  # (M,)
        for name, strength in zip(self.names, pull, strict=True):
            self.note(f"beta_{name}", strength)
            for p, start in zip(self.model.encoders[name].parameters(), self.start[name], strict=True):
                if p.grad is not None:
                    p.grad.add_(strength * (p - start))

    def state_dict(self) -> dict:
        return {"history": self.history, "trace": self.trace}

    def load_state_dict(self, state: dict) -> None:
        device = self.beta.device
        self.history = [trace.to(device) for trace in state["history"]]
        self.trace = None if state["trace"] is None else state["trace"].to(device)


def fisher_trace(encoder: nn.Module) -> Tensor:
    """Sum over the weights of convolutions and linear maps (not BatchNorm) of the gradient's mean square; a scalar."""
    return sum(p.grad.square().mean() for p in encoder.parameters() if p.dim() > 1 and p.grad is not None)  # pyright: ignore[reportReturnType]


def growth(history: list[Tensor], like: Tensor) -> Tensor:
    """k (M,) from the traces (M,) of the epochs before; 1 without any."""
    if not history:
        return torch.ones_like(like)
    last, before = torch.stack(history[-WINDOW:]).sum(0), torch.stack([like * 0, *history[-WINDOW - 1 : -1]]).sum(0)
    return (last - before) / last


def pulls(scores: Tensor, open_: Tensor) -> Tensor:
    """exp(tanh(gap)) of the modalities that lead and whose window is open, else 0. scores (M,), open_ (M,) bool."""
    others = (scores.sum() - scores) / (len(scores) - 1)
    gap = scores - others
    return torch.where(open_ & (gap > 0), gap.tanh().exp(), torch.zeros_like(gap))
