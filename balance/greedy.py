"""Greedy: if one modality learns mostly through the other, replace its gates by their mean for some steps.
Wu et al., ICML 2022.

For `--model mmtm`. The bypass of modality m consists of the shared squeeze layers and m's gate layers; its main path
is its encoder with its unimodal head. On every regular step, mu = sum |g|^2 / sum |theta|^2 of each of these groups is
added to a running sum that starts at the first step, and
    s_m = log10(sum mu_bypass,m / sum mu_main,m),    d = s_1 - s_2.
After the warm-up, if |d| > alpha, re-balancing steps follow, in which the modality with the larger s has its gates
replaced by their running mean over the regular steps, without gradient. Then one regular step measures again.
`policy=random` draws the kind of each step instead: regular, or re-balancing of either modality, probability 1/3 each.
"""

from typing import Any

import torch
from torch import Tensor, nn

from balance.method import Context, Method, Option, Step, never_joint
from models import Output
from models.intermediate import MMTM, MMTMNet
from utils.cli import number


class Greedy(Method):
    name = "greedy"
    options = (
        Option("alpha", number(float, 0), 0.01, "difference of the speeds that is re-balanced"),
        Option("steps", number(int, 1), 5, "re-balancing steps before the next regular one"),
        Option("warmup", number(int, 1), 1, "epochs of regular steps at the start"),
        Option("policy", str, "guided", "by the speeds, or drawn for each step", choices=("guided", "random")),
        Option("decay", number(float, 0, 1), 1.0, "factor on the sums of mu at each regular step; below 1 they forget"),
    )
    acts_in = ("joint",)  # in other networks no modality can learn through another
    two_modalities = True

    def __init__(self, context: Context):
        super().__init__(context)
        assert isinstance(self.model, MMTMNet)  # see refuse
        self.mmtm = [unit for unit in self.model.mmtm.children() if isinstance(unit, MMTM)]
        shared = [p for unit in self.mmtm for p in unit.get_submodule("squeeze").parameters()]
        # Of each modality, the parameters of its gates, of its bypass, and of its main path.
        self.gates = [
            [p for unit in self.mmtm for p in unit.get_submodule(f"gates.{name}").parameters()] for name in self.names
        ]
        self.groups = [
            [
                [*shared, *gates],
                [*self.model.encoders[name].parameters(), *self.model.heads[name].parameters()],
            ]
            for name, gates in zip(self.names, self.gates, strict=True)
        ]
        # The rule is evaluated on the device, so that the host need not wait for the speeds.
        device = shared[0].device
        self.mu = torch.zeros(2, 2, dtype=torch.double, device=device)  # sums: modality, group
        self.ahead = torch.zeros(2, dtype=torch.bool, device=device)  # the modality that is re-balanced
        self.left = torch.zeros((), dtype=torch.long, device=device)  # re-balancing steps still to come
        self.replaced: Tensor | None = None  # (2,) bool, in the step that runs; None: a step of the warm-up
        self.held: Tensor | None = None  # `replaced`, for the optimizer's step
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []  # (whether to put back, tensor, its value before)
        context.optimizer.register_step_pre_hook(self.keep)
        context.optimizer.register_step_post_hook(self.put_back)

    @classmethod
    def refuse(cls, args, opt) -> str | None:
        if args.model != "mmtm":
            return "acts on the gates between encoders; use --model mmtm"
        return never_joint(args, opt.warmup, "warmup")

    def before_forward(self, step: Step) -> None:
        self.replaced = None
        if step.epoch >= self.opt.warmup:
            self.replaced = self.ahead & (self.left > 0)
            if self.opt.policy == "random":
                drawn = int(torch.randint(3, (1,), generator=self.generator(step)))  # 0: regular
                self.replaced = torch.arange(1, 3, device=self.left.device) == drawn
        for unit in self.mmtm:
            unit.record = True if self.replaced is None else ~self.replaced.any()
            unit.replace = None if self.replaced is None else dict(zip(self.names, self.replaced, strict=True))

    def outputs(self, output: Output, step: Step) -> Output:
        for unit in self.mmtm:
            unit.record, unit.replace = False, None
        return output

    @torch.no_grad()
    def after_backward(self, output: Output, step: Step) -> None:
        self.held = self.replaced
        replaced = torch.zeros_like(self.ahead) if self.replaced is None else self.replaced
        for name, own in zip(self.names, replaced, strict=True):
            self.note(f"rebalanced_{name}", own)
        regular = ~replaced.any()
        mu = self.opt.decay * self.mu + torch.stack([torch.stack([speed(g) for g in m]) for m in self.groups])
        self.mu = torch.where(regular, mu, self.mu)
        speeds = (self.mu[:, 0] / self.mu[:, 1]).log10()  # (2,)
        difference = speeds[0] - speeds[1]
        self.note("d", difference, regular)
        if self.opt.policy == "guided" and step.epoch >= self.opt.warmup:
            starts = regular & (difference.abs() > self.opt.alpha)
            self.left = (self.left - 1).clamp(min=0).masked_fill(starts, self.opt.steps)
            self.ahead = torch.where(starts, torch.stack([speeds[0] >= speeds[1], speeds[1] > speeds[0]]), self.ahead)

    def keep(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before the optimizer's step: copy the replaced gates' layers and their state.

        Their gradients are zero, with which momentum and weight decay would still move them.
        """
        replaced, self.held, self.kept = self.held, None, []
        if replaced is None:  # or a batch in which the method does not act
            return
        for own, gates in zip(replaced, self.gates, strict=True):
            for p in gates:
                state = [value for value in optimizer.state[p].values() if isinstance(value, Tensor)]
                self.kept += [(own, value, value.detach().clone()) for value in (p, *state)]

    @torch.no_grad()
    def put_back(self, *_: Any) -> None:
        """After the optimizer's step: undo it for the replaced gates' layers."""
        for own, value, before in self.kept:
            value.copy_(torch.where(own, before, value))
        self.kept = []

    def name_of(self, chosen: Tensor | None) -> str:
        """The modality that `chosen` (2,) marks, "" for none. The host waits for it."""
        marks = [] if chosen is None else chosen.tolist()
        return next((name for name, own in zip(self.names, marks, strict=False) if own), "")

    def state_dict(self) -> dict:
        return {"mu": self.mu, "left": int(self.left), "ahead": self.name_of(self.ahead)}

    def load_state_dict(self, state: dict) -> None:
        self.mu = state["mu"].to(self.mu)
        self.left.fill_(state["left"])
        self.ahead = torch.tensor([name == state["ahead"] for name in self.names], device=self.ahead.device)


@torch.no_grad()
def speed(parameters: list[nn.Parameter]) -> Tensor:
    """mu = sum |g|^2 / sum |theta|^2 over the parameters that have a gradient, float64."""
    reached = [p for p in parameters if p.grad is not None]
    gradients = torch.nn.utils.get_total_norm([p.grad for p in reached if p.grad is not None])
    return (gradients / torch.nn.utils.get_total_norm(reached)).double().square()
