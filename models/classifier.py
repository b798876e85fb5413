"""The multimodal classifier of Data Remixing: an encoder per modality, a fusion head, and a head per modality.

Here modalities are fused only in the fusion head ("late"); `models.intermediate` has networks with earlier fusion.

Shapes: B batch, T frames, F x W spectrogram, S x S pixels, D_m features of modality m (512 for ResNet-18), C classes.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from models.encoders import Sequences, make_encoder
from models.fusion import Decision, Fusion, make_fusion

UNIMODAL = ("heads", "masked")


class Output(NamedTuple):
    """Joint logits (B, C), unimodal logits (B, C) of the fed modalities, features (B, D_m) of all modalities.

    The features of a masked modality are zeros.
    """

    joint: Tensor
    logits: dict[str, Tensor]
    features: dict[str, Tensor]

    @property
    def heads(self) -> dict[str, Tensor]:
        """The logits (B, C) of all heads: "joint", then each fed modality."""
        return {"joint": self.joint} | self.logits


class MultimodalClassifier(nn.Module):
    """One encoder and one linear head per modality, and the fusion head `head` on all features.

    `inputs` maps each modality, in order, to (encoder name, shape of its input without the batch: (c, H, W) or (D,)).
    With `bf16` the encoders compute in bfloat16 by autocast (weights stay float32); heads and logits are float32 all
    the same, and so is the pooling of our own encoders.
    `unimodal` is where unimodal logits come from: the `heads` of the modalities, or the joint head with the other
    modalities "masked" (paper Table 6), which are computed in evaluation mode alone, since nothing trains them.
    Checkpoints are written under the official code's names (`models.checkpoint`).

    Raises `ValueError` for a fusion head that is not defined for these modalities.
    """

    late = True  # a feature is computed from its own modality alone
    fuses = True  # the joint logits are those of the fusion head

    def __init__(
        self,
        inputs: dict[str, tuple[str, tuple[int, ...]]],
        n_classes: int,
        fusion_method: str = "concat",
        bf16: bool = False,
        unimodal: str = "heads",
    ):
        super().__init__()
        self.bf16, self.n_classes, self.unimodal = bf16, n_classes, unimodal
        self.encoder_names = {name: encoder for name, (encoder, _) in inputs.items()}
        made = {name: make_encoder(encoder, shape) for name, (encoder, shape) in inputs.items()}
        self.widths = {name: width for name, (_, width) in made.items()}
        self.encoders = nn.ModuleDict({name: encoder for name, (encoder, _) in made.items()})
        self.frozen: tuple[str, ...] = ()
        self.head: Fusion = make_fusion(fusion_method, self.widths, n_classes)
        self.heads = nn.ModuleDict({name: nn.Linear(width, n_classes) for name, width in self.widths.items()})
        if isinstance(self.head, Decision):
            self.head.shared.append(self.heads)

    @property
    def names(self) -> tuple[str, ...]:
        """The modalities, in order."""
        return tuple(self.widths)

    def freeze(self, names: Iterable[str]) -> None:
        """Fix the encoders of these modalities: no gradients, and evaluation mode in training too (`BatchNorm`'s
        running statistics, no dropout)."""
        self.frozen = tuple(names)
        for name in self.frozen:
            self.encoders[name].requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name in self.frozen:
            self.encoders[name].eval()
        return self

    def encode(self, name: str, x: Tensor | Sequences) -> Tensor:
        """The features (B, D_m) of an input (B, c, H, W), (B, D), (B, T, c, H, W) or of B sequences.

        Frames share the batch dimension in the encoder and are averaged after it.
        """
        frames = x.shape[:2] if isinstance(x, Tensor) and x.dim() == 5 else None
        with self.autocast(x):
            features = self.encoders[name](x.flatten(0, 1) if isinstance(x, Tensor) and frames else x)
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        return features.unflatten(0, frames).mean(dim=1) if frames else features  # (B, D_m)

    def autocast(self, x: Tensor | Sequences) -> AbstractContextManager:
        """Precision of the encoders."""
        return torch.autocast(x.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def forward(
        self, inputs: Mapping[str, Tensor | Sequences], fed: tuple[str, ...], mask: Tensor | None = None
    ) -> Output:
        """Logits of all heads where the modalities `fed` are given to the network and the others are masked.

        The feature of a masked modality is zero. Its encoder runs only if its input is given (the official code's
        `--masked_encoder run`: BatchNorm statistics move and gradients are zeros); without it the encoder stays
        untouched. In a mixed batch `mask` (B, M) bool says which modalities each clip is given: all fed encoders run
        on the whole batch, and the features of each clip are masked for itself.
        """
        features = self.zeroed({name: self.encode(name, x) for name, x in inputs.items()}, fed, mask)
        return Output(self.head(features, fed, mask), self.unimodal_logits(features, fed), features)

    def zeroed(self, features: dict[str, Tensor], fed: tuple[str, ...], mask: Tensor | None) -> dict[str, Tensor]:
        """Features (B, D_m) of all modalities in order, zero where masked, from those of the encoders that ran."""
        some = next(iter(features.values()))
        for name, width in self.widths.items():
            if name not in features:
                features[name] = some.new_zeros(len(some), width)
            elif name not in fed:  # zeros in the encoder's graph, so that its gradients are zeros
                features[name] = features[name].masked_fill(torch.ones_like(features[name], dtype=torch.bool), 0.0)
        features = {name: features[name] for name in self.widths}
        if mask is not None:
            columns = zip(features.items(), mask.split(1, dim=1), strict=True)
            features = {name: values.masked_fill(~given, 0.0) for (name, values), given in columns}
        return features

    def unimodal_logits(self, features: dict[str, Tensor], fed: tuple[str, ...]) -> dict[str, Tensor]:
        """Unimodal logits (B, C) of the modalities `fed`; empty if they are not needed."""
        if self.unimodal == "heads":
            return {name: self.heads[name](features[name]) for name in self.widths if name in fed}
        return {} if self.training else {name: self.masked(features, name) for name in self.widths if name in fed}

    def masked(self, features: dict[str, Tensor], name: str) -> Tensor:
        """Joint logits (B, C) from the features of the modality `name` alone, the others masked."""
        alone = {own: values if own == name else torch.zeros_like(values) for own, values in features.items()}
        return self.head(alone, (name,))
