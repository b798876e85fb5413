"""DGL: the joint loss trains the joint head alone, unimodal losses through a fixed copy of it train the encoders.
Wei et al., ICCV 2025.

o = head of detached features; o_m = the head with the other modalities' features zero, its parameters detached:
    loss = CE(o) + alpha sum_m CE(o_m).
So no gradient of the joint loss reaches an encoder, and no unimodal gradient the joint head. Then, as in the authors'
code, the norm of all gradients together is clipped to `clip`. Unimodal heads keep their own losses, which reach the
encoders as always; the paper has none.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from balance.method import Method, Option, Step, frozen
from models import Output
from utils.cli import number

WHY = "DGL stops the joint loss before the encoders, through which the other method acts"


class DGL(Method):
    name = "dgl"
    needs_fusion = True
    options = (
        Option("alpha", number(float, 0), 4.0, "weight of the unimodal losses", by_dataset={"KineticSound": 3.0}),
        Option("clip", number(float, 0), 40.0, "largest norm of all gradients; 0: no clipping"),
    )
    acts_in = ("joint", "homogeneous", "mixed")
    conflicts = dict.fromkeys(("agm", "opm", "mmpareto", "cml", "midas"), WHY)

    def outputs(self, output: Output, step: Step) -> Output:
        detached = {name: z.detach() for name, z in output.features.items()}
        return output._replace(joint=self.model.head(detached, step.fed, step.mask))

    def losses(self, terms: dict[str, Tensor], output: Output, step: Step) -> dict[str, Tensor]:
        added = output.joint.new_zeros(())
        with frozen(self.model.head, self.model.heads):  # a head that averages the unimodal ones has only theirs
            for name in step.fed:
                entropies = F.cross_entropy(self.model.masked(output.features, name), step.labels, reduction="none")
                given = step.given(name, self.names)
                self.note(f"ce_{name}", self.mean_of(entropies, given, step))
                added = added + self.opt.alpha * step.mean(entropies, given)
        return terms | {"dgl": added}

    def mean_of(self, entropies: Tensor, given: Tensor | None, step: Step) -> Tensor:
        """Mean over the clips of all processes that are fed the modality."""
        if given is None:
            return step.sum(entropies) / step.total
        return step.sum(entropies * given) / step.sum(given).clamp(min=1)

    def after_backward(self, output: Output, step: Step) -> None:
        if self.opt.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.opt.clip)
