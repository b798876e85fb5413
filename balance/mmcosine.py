"""MMCosine: features and class weights normalised per modality, so that neither wins by its norm.
Xu et al., ICASSP 2023.

cos_m[k] = z_m / |z_m| . W_m[k] / |W_m[k]|, o = s (cos_a + cos_v), no bias, in training and in inference. The unimodal
heads take the same form, s cos(z_m, H_m[k]), so that Remix's difficulty is on one scale for both modalities.
"""

from argparse import Namespace

from torch import Tensor, nn
from torch.nn import functional as F

from balance.method import Flag, Method
from models import AVClassifier
from models.fusion import Concat, Sum
from utils.cli import number


class MMCosine(Method):
    name = "mmcosine"
    flags = (Flag("mmcosine_scale", number(float, 0, open_low=True), 10.0, "s, the factor on the cosines"),)
    owns = frozenset({"head"})
    needs_slices = True

    @classmethod
    def replace_heads(cls, model: AVClassifier, flags: Namespace) -> None:
        """The same parameters under the same names: the bias stays in the state dict and is not used."""
        kinds = {Concat: CosineConcat, Sum: CosineSum, nn.Linear: CosineLinear}
        for head in (model.head, model.head_audio, model.head_video):
            # Only what forward does changes, so the object stays: its parameters, names and devices with it.
            head.__class__ = kinds[type(head)]
            head.scale = flags.mmcosine_scale


def cosines(features: Tensor, weight: Tensor) -> Tensor:
    """(B, D), (C, D) -> (B, C); a feature of zeros (a masked modality's) gives zeros."""
    return F.linear(F.normalize(features.to(weight.dtype), dim=1), F.normalize(weight, dim=1))


class CosineLinear(nn.Linear):
    """s times the cosine of the feature and each class's weight."""

    scale: float

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * cosines(features, self.weight)  # (B, C)


class CosineConcat(Concat):
    """The joint head over [W_a, W_v]: the sum of the modalities' cosines, scaled."""

    scale: float

    def forward(self, a: Tensor, v: Tensor, kept: str = "both") -> Tensor:
        o_a, o_v = self.slices(a, v)
        return o_a + o_v  # (B, C)

    def slices(self, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Each modality's part of the logits, 2 x (B, C)."""
        audio, video = self.weight.chunk(2, dim=1)
        return self.scale * cosines(a, audio), self.scale * cosines(v, video)


class CosineSum(Sum):
    """The joint head over two maps: the sum of the modalities' cosines, scaled."""

    scale: float
    forward = CosineConcat.forward

    def slices(self, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Each modality's part of the logits, 2 x (B, C)."""
        return self.scale * cosines(a, self.fc_x.weight), self.scale * cosines(v, self.fc_y.weight)
