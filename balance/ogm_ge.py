"""OGM-GE: damp the gradient of the encoder that is ahead, add noise. Peng et al., CVPR 2022.

s_m = sum_i softmax(o_m,i)[y_i], o_m the modality's slice of the joint logits; rho_a = s_a / s_v, rho_v = 1 / rho_a.
k_m = 1 - tanh(alpha * rho_m) where rho_m > 1, else 1 (Eq. 10; at a tie the official code damps audio).
The gradient g of every convolution of encoder m becomes k_m g + n, n ~ N(0, std(g)^2) elementwise, std of g unscaled.
"""

import torch
from torch import Tensor

from balance.method import Method, Option, Step, gradient, label_scores, never_joint
from models import Output
from utils.cli import number


class OGMGE(Method):
    name = "ogm_ge"
    options = (
        Option("alpha", number(float, 0), 0.8, "strength of the damping"),
        Option("noise", str, "on", "Gaussian noise on the gradients (GE)", choices=("on", "off")),
        Option("starts", number(int, 0), 0, "first epoch it acts in"),
        # The authors' script for Kinetics-Sounds passes alpha 0.8 and 60; 1 is only the default of its parser.
        Option("ends", number(int, 0), 50, "last epoch it acts in", by_dataset={"KineticSound": 60}),
    )
    # In a batch of one modality the masked slice is a constant: the fed one would always look ahead.
    acts_in = ("joint",)
    needs_slices = True
    two_modalities = True
    scales_gradients = True

    @classmethod
    def refuse(cls, args, opt) -> str | None:
        if opt.starts > opt.ends:
            return f"starts={opt.starts} is later than ends={opt.ends}"
        return never_joint(args, opt.starts, "starts")

    @torch.no_grad()
    def after_backward(self, output: Output, step: Step) -> None:
        if not self.opt.starts <= step.epoch <= self.opt.ends:
            return
        slices = self.slices(output.features)
        factors = damping(label_scores(slices, step), self.opt.alpha)  # (2,)
        noise = self.generator(step, output.joint.device) if self.opt.noise == "on" else None
        for name, factor in zip(self.names, factors, strict=True):
            self.note(f"k_{name}", factor)
            for weight in self.model.encoders[name].parameters():
                if weight.dim() != 4 or not weight.requires_grad:
                    continue
                grad = gradient(weight)
                spread = grad.std() + 1e-8
                grad.mul_(factor)
                if noise is not None:
                    drawn = torch.randn(weight.shape, generator=noise, device=weight.device, dtype=weight.dtype)
                    grad.add_(drawn * spread)


def damping(scores: Tensor, alpha: float) -> Tensor:
    """k (2,) from the scores (2,) of the two modalities."""
    ratios = torch.stack([scores[0] / scores[1], scores[1] / scores[0]])
    return torch.where(ratios > 1, 1 - torch.tanh(alpha * ratios), torch.ones_like(ratios))
