"""AGM: scale the signal that flows back into each modality by how far it departs from its running standing.
Li et al., ICCV 2023.

With a linear head and zeroed features, the mono-modal response phi_m = (f(a, v) - f(without m) + f(m alone)) / 2 is the
modality's slice of the joint logits, and phi_a + phi_v = f(a, v). s_m = mean cross entropy of phi_m, probabilities
floored at 1e-8; S_m its mean over the batches before this one. For two modalities
    r_m = exp(s_other - s_m), large where m is ahead; tau_m = exp(S_other - S_m);
    kappa_m = exp(alpha * min(tau_m - r_m, 10)).
The gradient of the joint loss that enters phi_m is multiplied by kappa_m; the unimodal losses' is not touched.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from balance.method import MODALITIES, Flag, Method, Run, Step, never_joint
from models import Output
from utils.cli import number

CAP = 10.0


class AGM(Method):
    name = "agm"
    flags = (Flag("agm_alpha", number(float, 0), 1.5, "strength of the modulation"),)
    acts_in = ("joint",)  # the masked modality's response is a constant
    conflicts = {  # noqa: RUF012
        "ogm_ge": "both damp the modality that is ahead, and their factors would multiply",
        "opm": "AGM weighs the responses of whole features, OPM drops some of them",
    }
    needs_slices = True
    scales_gradients = True

    def __init__(self, run: Run):
        super().__init__(run)
        self.steps, self.means = 0, torch.zeros(2, device=next(run.model.parameters()).device)

    @classmethod
    def refuse(cls, flags) -> str | None:
        return never_joint(flags)

    def outputs(self, output: Output, step: Step) -> Output:
        if self.agm_alpha == 0:
            return output
        slices = self.model.head.slices(output.audio_features, output.video_features)
        scores = step.sum(torch.stack([cross_entropies(o, step.labels) for o in slices], dim=1)) / step.total  # (2,)
        before = self.steps > 0
        kappa = modulation(scores, self.means, self.agm_alpha) if before else torch.ones_like(scores)
        self.steps += 1
        self.means = self.means * ((self.steps - 1) / self.steps) + scores / self.steps
        for name, value in zip(MODALITIES, kappa, strict=True):
            self.note(f"kappa_{name}", value)
        if not before:
            return output
        # The value is the joint logits', the gradient goes to the slices: o - o.detach() is 0, its gradient is not.
        joint = output.joint.detach() + sum(k * (o - o.detach()) for k, o in zip(kappa, slices, strict=True))
        return output._replace(joint=joint)

    def state_dict(self) -> dict:
        return {"steps": self.steps, "means": self.means}

    def load_state_dict(self, state: dict) -> None:
        self.steps, self.means = state["steps"], state["means"].to(self.means.device)


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, C), (B,) -> (B,): minus the log of the label's probability, which is floored at 1e-8."""
    p = F.softmax(logits.detach().float(), dim=1).gather(1, labels[:, None])[:, 0]
    return -p.clamp(min=1e-8).log()


def modulation(scores: Tensor, means: Tensor, alpha: float) -> Tensor:
    """kappa (2,) from this batch's scores (2,) and their running means (2,), audio first. Low scores are good."""
    ahead, standing = (torch.exp(s.flip(0) - s) for s in (scores, means))  # r, tau
    return torch.exp(alpha * (standing - ahead).clamp(max=CAP))
