"""MLA: alternate between the modalities, one step each through one shared head; fuse by certainty at inference.
Zhang et al., CVPR 2024.

Every joint batch becomes one batch per modality of the same clips, in the modalities' order: loss CE(F z_m), F one
linear head for all modalities. There is no joint loss. The joint prediction is o = sum_m w_m F z_m with
w = softmax over m of -e_m, e_m the entropy of softmax(F z_m) of the clip ("dynamic"), or with fixed weights.

`projection=paper` keeps F from forgetting: before a step on another modality than that of the step before, the gradient
of F's weight is multiplied by P (D, D), which starts as the identity. After each step, with r (D,) the batch's mean
feature and k = P r,
    P <- P - k k^T / (a + r . k),    a = 0.1^(1 + batch / batches of the epoch).
`none` is what the released code does: it looks up the head's weight under a name that does not exist, so no projection
is applied.
"""

from argparse import Namespace
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from balance.gblend import weight_list
from balance.method import Context, Method, Option, Step, gradient
from models import MultimodalClassifier, Output
from models.fusion import Features, Fed
from remix import Batch
from utils.errors import UserError


class MLA(Method):
    name = "mla"
    options = (
        Option("projection", str, "none", "of the shared head's gradient", choices=("none", "paper")),
        Option("fusion", str, "dynamic", "weights of the modalities at inference", choices=("dynamic", "fixed")),
        Option("weights", weight_list, None, "fixed weights, as in 0.55/0.45 (default: equal)",
               by_dataset={"CREMAD": (0.55, 0.45)}),
    )  # fmt: skip
    acts_in = ("homogeneous",)
    owns = frozenset({"head", "plan", "loss weights"})
    conflicts = {"mmpareto": "MLA trains without the joint loss that MMPareto merges"}  # noqa: RUF012
    needs_heads = True
    splits_joint = True

    def __init__(self, context: Context):
        super().__init__(context)
        weight = self.model.head.get_parameter("weight")
        self.p = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        self.previous, self.batches = "", 1  # the modality of the step before, the batches of the epoch

    @classmethod
    def refuse(cls, args, opt) -> str | None:
        if args.model != "late" or args.fusion_method != "concat":
            return "has a head of its own on separate encoders; leave --model and --fusion_method out"
        if args.method == "remix" and args.reassemble == "off":
            return "steps on one modality at a time, which --reassemble off mixes; leave the flag out"
        given = [f"--{name}" for name in ("alpha", "beta") if name not in args.from_preset]
        if given:
            return f"makes no joint batches, whose losses {' and '.join(given)} would weigh; leave the flag out"
        if opt.weights and len(opt.weights) != len(args.joint_weights):
            return f"weights: {len(opt.weights)} given; {', '.join(args.joint_weights)} need one each"
        return None

    @classmethod
    def replace_heads(cls, model: MultimodalClassifier, opt: Namespace) -> None:
        """Use the first modality's head for all, and as fusion head. Names stay; the joint weight is (C, D)."""
        if len(set(model.widths.values())) > 1:
            widths = ", ".join(f"{name} {width}" for name, width in model.widths.items())
            raise UserError(f"--balance mla: its shared head needs encoders of equal width; here: {widths}; "
                            "choose other encoders")  # fmt: skip
        shared = next(iter(model.heads.values()))
        assert isinstance(shared, nn.Linear)
        model.heads = nn.ModuleDict(dict.fromkeys(model.names, shared))
        fixed = None if opt.fusion == "dynamic" else opt.weights or [1 / len(model.names)] * len(model.names)
        model.head = SharedHead(shared, model.names, fixed)  # pyright: ignore[reportAttributeAccessIssue]

    def plan(self, plan: list[Batch], epoch: int) -> list[Batch]:
        """Batches of one modality for each joint batch; those that Remix made stay."""
        steps = [Batch(batch.clips, (name,)) for batch in plan for name in batch.fed]
        self.batches = len(steps)
        return steps

    def losses(self, terms: dict[str, Tensor], output: Output, step: Step) -> dict[str, Tensor]:
        return {name: term for name, term in terms.items() if name != "joint"}

    @torch.no_grad()
    def after_backward(self, output: Output, step: Step) -> None:
        (name,) = step.fed
        if self.opt.projection == "none":
            return
        grad = gradient(self.model.head.get_parameter("weight"))  # (C, D)
        if name != self.previous:
            before = grad.norm()
            grad.copy_(grad @ self.p)
            self.note("kept", grad.norm() / before.clamp(min=1e-12))
        mean = (step.sum(output.features[name]) / step.total).to(self.p.dtype)  # (D,)
        self.p = projected(self.p, mean, 0.1 ** (1 + step.batch / self.batches))
        self.previous = name

    def state_dict(self) -> dict:
        return {"p": self.p, "previous": self.previous} if self.opt.projection == "paper" else {}

    def load_state_dict(self, state: dict) -> None:
        if state:
            self.p, self.previous = state["p"].to(self.p), state["previous"]


class SharedHead(nn.Module):
    """The joint prediction of one linear map of every modality's features: a weighted mean of its logits."""

    fixed: Tensor | None  # (M,)

    def __init__(self, shared: nn.Linear, names: tuple[str, ...], fixed: Sequence[float] | None):
        super().__init__()
        self.weight, self.bias, self.names = shared.weight, shared.bias, names
        values = None if fixed is None else torch.tensor(fixed, device=shared.weight.device)
        self.register_buffer("fixed", values, persistent=False)

    def forward(self, features: Features, fed: Fed = (), mask: Tensor | None = None) -> Tensor:
        """(B, D) of each modality -> (B, C). A masked modality has weight 0, the others share the whole."""
        own = [m for m, name in enumerate(self.names) if not fed or name in fed]
        logits = torch.stack([F.linear(features[self.names[m]], self.weight, self.bias) for m in own], dim=1)
        if self.fixed is None:
            standing = -entropy(logits)  # (B, m) of the m fed modalities
        else:
            # Indexed one by one: a list would be copied to the device, for which the host waits.
            standing = torch.stack([self.fixed[m] for m in own]).log().expand(logits.shape[:2])
        if mask is not None:
            standing = standing.masked_fill(~torch.stack([mask[:, m] for m in own], dim=1), -torch.inf)
        weights = standing.softmax(dim=1).to(logits.dtype)  # of logarithms: the weights divided by their sum
        return (weights[..., None] * logits).sum(1)  # (B, C)


def entropy(logits: Tensor) -> Tensor:
    """(..., C) -> (...) in nats."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


def projected(p: Tensor, feature: Tensor, a: float) -> Tensor:
    """P after a step on clips with mean `feature` (D,). With a = 0 the component along `feature` is removed."""
    k = p @ feature
    return p - torch.outer(k, k) / (a + feature @ k)
