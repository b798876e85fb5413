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
        # Of each modality, the parameters of its bypass and of its main path.
        self.groups = [
            [
                [*shared, *(p for unit in self.mmtm for p in unit.get_submodule(f"gates.{name}").parameters())],
                [*self.model.encoders[name].parameters(), *self.model.heads[name].parameters()],
            ]
            for name in self.names
        ]
        self.mu = torch.zeros(2, 2, dtype=torch.double, device=shared[0].device)  # sums: modality, group
        self.left, self.ahead = 0, ""  # re-balancing steps still to come, and of which modality
        self.replaced = ""  # in the step that runs

    @classmethod
    def refuse(cls, args, opt) -> str | None:
        if args.model != "mmtm":
            return "acts on the gates between encoders; use --model mmtm"
        return never_joint(args, opt.warmup, "warmup")

    def before_forward(self, step: Step) -> None:
        self.replaced = self.ahead if self.left else ""
        if self.opt.policy == "random":
            drawn = int(torch.randint(3, (1,), generator=self.generator(step)))
            self.replaced = ("", *self.names)[drawn] if step.epoch >= self.opt.warmup else ""
        for unit in self.mmtm:
            unit.record, unit.replace = not self.replaced, self.replaced or None

    def outputs(self, output: Output, step: Step) -> Output:
        for unit in self.mmtm:
            unit.record, unit.replace = False, None
        return output

    def after_backward(self, output: Output, step: Step) -> None:
        for name in self.names:
            self.note(f"rebalanced_{name}", float(name == self.replaced))
        if self.replaced:
            self.left = max(0, self.left - 1)
            return
        self.mu = self.opt.decay * self.mu + torch.stack([torch.stack([speed(g) for g in m]) for m in self.groups])
        speeds = (self.mu[:, 0] / self.mu[:, 1]).log10()  # (2,)
        self.note("d", speeds[0] - speeds[1])
        if self.opt.policy == "guided" and step.epoch >= self.opt.warmup:
            # The host chooses the kind of the next steps, so it synchronizes here, once in `steps` + 1 steps.
            first, second = speeds.tolist()
            if abs(first - second) > self.opt.alpha:
                self.left, self.ahead = self.opt.steps, self.names[int(second > first)]

    def state_dict(self) -> dict:
        return {"mu": self.mu, "left": self.left, "ahead": self.ahead}

    def load_state_dict(self, state: dict) -> None:
        self.mu, self.left, self.ahead = state["mu"].to(self.mu), state["left"], state["ahead"]


@torch.no_grad()
def speed(parameters: list[nn.Parameter]) -> Tensor:
    """mu = sum |g|^2 / sum |theta|^2 over the parameters that have a gradient, float64."""
    reached = [p for p in parameters if p.grad is not None]
    gradients = torch.nn.utils.get_total_norm([p.grad for p in reached if p.grad is not None])
    return (gradients / torch.nn.utils.get_total_norm(reached)).double().square()
