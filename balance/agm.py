"""AGM: scale the gradient that reaches each modality by how far its score departs from its running mean.
Li et al., ICCV 2023.

With a linear head and zeroed features, the mono-modal response phi_m = (f(a, v) - f(without m) + f(m alone)) / 2 is the
modality's slice of the joint logits, and phi_a + phi_v = f(a, v). s_m = mean cross entropy of phi_m, probabilities
floored at 1e-8; S_m its mean over the batches before this one. For M modalities, with s the mean of the s_m,
    r_m = exp(M / (M - 1) (s - s_m)), large where m is ahead; tau_m the same of S_m;
    kappa_m = exp(alpha * min(tau_m - r_m, cap)), cap 10 for two modalities and 7 for more.
For two modalities r_m is exp(s_other - s_m). Before the first batch S_m is 0.
The gradient of the joint loss that enters phi_m is multiplied by kappa_m; the unimodal losses' is not touched. Then, as
in the authors' CREMA-D trainer: where an element of the joint head's gradient exceeds 1 in absolute value, the norm of
all gradients together is clipped to `clip`. The factor is unbounded above 1 without it.

The authors zero inputs, not features, so their responses come from encoders that see a black or silent clip. Zeroed
features need no extra forward pass, and the responses are then exactly the slices. The two quantities differ: on the
same weights, the logarithms of the two kappas have a correlation of -0.60.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from balance.method import Context, Method, Option, Step, gradient, never_joint
from models import Output
from utils.cli import number

CAP, CAP_MORE = 10.0, 7.0
LARGE = 1.0  # an element of the joint head's gradient


class AGM(Method):
    name = "agm"
    options = (
        Option("alpha", number(float, 0), 1.5, "strength of the modulation"),
        Option("clip", number(float, 0), 1.0, "norm of all gradients where the joint head's are large; 0: no clipping"),
    )
    acts_in = ("joint",)  # the masked modality's response is a constant
    conflicts = {  # noqa: RUF012
        "ogm_ge": "both damp the modality that is ahead, and their factors would multiply",
        "opm": "AGM weighs the responses of whole features, OPM drops some of them",
    }
    needs_slices = True
    scales_gradients = True

    def __init__(self, context: Context):
        super().__init__(context)
        self.steps, self.means = 0, torch.zeros(len(self.names), device=next(self.model.parameters()).device)

    @classmethod
    def refuse(cls, args, opt) -> str | None:
        return never_joint(args)

    def outputs(self, output: Output, step: Step) -> Output:
        if self.opt.alpha == 0:
            return output
        slices = list(self.slices(output.features).values())
        scores = step.sum(torch.stack([cross_entropies(o, step.labels) for o in slices], dim=1)) / step.total  # (M,)
        kappa = modulation(scores, self.means, self.opt.alpha)
        self.steps += 1
        self.means = self.means * ((self.steps - 1) / self.steps) + scores / self.steps
        for name, value in zip(self.names, kappa, strict=True):
            self.note(f"kappa_{name}", value)
        # The value is the joint logits', the gradient goes to the slices: o - o.detach() is 0, its gradient is not.
        joint = output.joint.detach() + sum(k * (o - o.detach()) for k, o in zip(kappa, slices, strict=True))
        return output._replace(joint=joint)

    def after_backward(self, output: Output, step: Step) -> None:
        if self.opt.clip == 0:
            return
        head = list(self.model.head.parameters()) or list(self.model.heads.parameters())  # decision has none of its own
        large = clip_if_large(list(self.model.parameters()), head, self.opt.clip)
        self.note("clipped", large)

    def state_dict(self) -> dict:
        return {"steps": self.steps, "means": self.means}

    def load_state_dict(self, state: dict) -> None:
        self.steps, self.means = state["steps"], state["means"].to(self.means.device)


@torch.no_grad()
def clip_if_large(parameters: list[nn.Parameter], head: list[nn.Parameter], most: float) -> Tensor:
    """Clip the norm of all gradients to `most` if an element of the head's exceeds 1; returns whether, 0 or 1.

    The host does not synchronize with the device: if no element exceeds 1, the norm is taken as 0, so that clipping
    has no effect.
    """
    large = torch.stack([gradient(p).abs().max() for p in head]).max() > LARGE
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    torch.nn.utils.clip_grads_with_norm_(parameters, most, norm.where(large, torch.zeros_like(norm)))
    return large.float()


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, C), (B,) -> (B,): minus the log of the label's probability, which is floored at 1e-8."""
    p = F.softmax(logits.detach().float(), dim=1).gather(1, labels[:, None])[:, 0]
    return -p.clamp(min=1e-8).log()


def modulation(scores: Tensor, means: Tensor, alpha: float) -> Tensor:
    """kappa (M,) from this batch's scores (M,) and their running means (M,). Low scores are good."""
    m = len(scores)
    if m == 2:  # the same, without the rounding of a mean
        ahead, standing = (torch.exp(s.flip(0) - s) for s in (scores, means))  # r, tau
    else:
        ahead, standing = (torch.exp(m / (m - 1) * (s.mean() - s)) for s in (scores, means))
    return torch.exp(alpha * (standing - ahead).clamp(max=CAP if m == 2 else CAP_MORE))
