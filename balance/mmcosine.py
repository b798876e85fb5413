"""MMCosine: features and class weights normalised per modality, so that neither wins by its norm.
Xu et al., ICASSP 2023.

cos_m[k] = z_m / |z_m| . W_m[k] / |W_m[k]|, o = s sum_m cos_m, no bias, in training and in inference. The unimodal
heads take the same form, s cos(z_m, H_m[k]), so that Remix's difficulty is on one scale for all modalities.
"""

from argparse import Namespace

from torch import Tensor, nn
from torch.nn import functional as F

from balance.method import Method, Option
from models import MultimodalClassifier
from models.fusion import Concat, Decision, Features, Fed, Sum
from utils.cli import number


class MMCosine(Method):
    name = "mmcosine"
    options = (Option("scale", number(float, 0, open_low=True), 10.0, "s, the factor on the cosines"),)
    owns = frozenset({"head"})
    needs_slices = True

    @classmethod
    def replace_heads(cls, model: MultimodalClassifier, opt: Namespace) -> None:
        """The same parameters under the same names: the bias stays in the state dict and is not used."""
        # Decision averages the unimodal heads' logits, which are cosines then.
        kinds = {Concat: CosineConcat, Sum: CosineSum, Decision: Decision, nn.Linear: CosineLinear}
        for head in (model.head, *model.heads.values()):
            # Only forward changes, so the module object is kept, with its parameters, names and devices.
            head.__class__ = kinds[type(head)]
            head.scale = opt.scale


def cosines(features: Tensor, weight: Tensor) -> Tensor:
    """(B, D), (C, D) -> (B, C); a feature of zeros (a masked modality's) gives zeros."""
    return F.linear(F.normalize(features.to(weight.dtype), dim=1), F.normalize(weight, dim=1))


class CosineLinear(nn.Linear):
    """s times the cosine of the feature and each class's weight."""

    scale: float

    def forward(self, input: Tensor) -> Tensor:
        return self.scale * cosines(input, self.weight)  # (B, C)


class CosineConcat(Concat):
    """The joint head over [W_1, ..., W_M]: the sum of the modalities' cosines, scaled."""

    scale: float

    def forward(self, features: Features, fed: Fed = (), mask: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        first, *others = self.slices(features).values()
        return sum(others, first)  # (B, C)

    def slices(self, features: Features) -> dict[str, Tensor]:
        """Each modality's part of the logits, (B, C)."""
        return {name: self.scale * cosines(features[name], weight) for name, weight in self.weights().items()}


class CosineSum(Sum):
    """The joint head over one map per modality: the sum of the modalities' cosines, scaled."""

    scale: float

    def slices(self, features: Features) -> dict[str, Tensor]:
        """Each modality's part of the logits, (B, C)."""
        return {name: self.scale * cosines(features[name], weight) for name, weight in self.weights().items()}
