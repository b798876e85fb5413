"""OPM: drop the feature of the modality that is ahead, on the fly. Wei, Hu, Du, Wen, TPAMI 2024.

s_m as in OGM-GE; t_m = tanh(relu(s_m / s_other - 1)); q_m = clip(q_base (1 + lam t_m), 0, 1) where t_m > 0, else 0. In
a batch chosen with probability p, each clip's feature m is dropped from the joint head with probability q_m, and all
features are divided by 1 - theta, theta the mean of q over the features of both modalities, also those that are never
dropped (as the authors' code does when it is run). At most one q is above 0, so no clip loses both.

q is a constant of the batch here. In the released code q depends on the features by way of the scores, and the divisor
lets a gradient through to them that the paper does not mention, up to 33 times the intended one: not copied.
"""

import torch
from torch import Tensor

from balance.method import Context, Method, Option, Step, label_scores, never_joint
from models import Output
from utils.cli import number
from utils.distributed import rank, world_size


class OPM(Method):
    name = "opm"
    options = (
        Option("q", number(float, 0, 1), 0.5, "probability of a drop where the modalities are nearly even"),
        Option("lambda", number(float, 0), 0.5, "growth of that probability with the lead"),
        Option("p", number(float, 0, 1), 0.7, "share of the batches it acts in"),
        Option("starts", number(int, 0), 6, "first epoch it acts in"),
    )
    acts_in = ("joint",)  # elsewhere the other modality is dropped for good
    needs_slices = True
    two_modalities = True
    compiles = False  # its hook comes and goes

    def __init__(self, context: Context):
        super().__init__(context)
        self.hook = None

    @classmethod
    def refuse(cls, args, opt) -> str | None:
        return never_joint(args, opt.starts, "starts")

    def before_forward(self, step: Step) -> None:
        """Register a hook on the joint head for this batch, which drops features before the head sees them."""
        draws = self.generator(step)
        chance, *_ = torch.rand(1, generator=draws).tolist()
        if step.epoch < self.opt.starts or chance >= self.opt.p:
            return
        # Drawn for the whole batch, so that several processes drop what one would; their clips are dealt in turn.
        uniform = torch.rand(step.total, 2, generator=draws)
        own = uniform[rank() :: world_size()] if step.total >= world_size() else uniform

        def drop(head, features):
            by_name, *fed = features
            scores = label_scores(head.slices({name: z.detach() for name, z in by_name.items()}), step)
            q = drop_chances(scores, self.opt.q, getattr(self.opt, "lambda"))
            for name, value in zip(self.names, q, strict=True):
                self.note(f"q_{name}", value)
            sent = own.pin_memory() if q.is_cuda else own  # from pinned memory the host need not wait for the copy
            keep = (sent.to(q.device, non_blocking=True) >= q).split(1, dim=1)  # 2 x (B, 1)
            dropped = {name: z * k / (1 - q.mean()) for (name, z), k in zip(by_name.items(), keep, strict=True)}
            return dropped, *fed

        self.hook = self.model.head.register_forward_pre_hook(drop)

    def outputs(self, output: Output, step: Step) -> Output:
        if self.hook is not None:
            self.hook.remove()
            self.hook = None
        return output


def drop_chances(scores: Tensor, q_base: float, growth: float) -> Tensor:
    """q (2,) from the scores (2,) of the two modalities."""
    lead = torch.tanh(torch.relu(scores / scores.flip(0) - 1))
    return torch.where(lead > 0, (q_base * (1 + growth * lead)).clamp(0, 1), torch.zeros_like(lead))
