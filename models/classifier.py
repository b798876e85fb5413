"""The audio-visual classifier of Data Remixing (official network, DESIGN section 1).

Shapes: B batch, T frames, F x W spectrogram, S x S pixels, D features per modality (512 for ResNet-18), C classes.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.encoders import ENCODERS
from models.fusion import FUSIONS

MODELS = tuple(ENCODERS)


class Output(NamedTuple):
    """Logits (B, C) of the three heads; None where the modality was masked. Then the features (B, D) they came from."""

    joint: Tensor
    audio: Tensor | None
    video: Tensor | None
    audio_features: Tensor
    video_features: Tensor


class AVClassifier(nn.Module):
    """Two ResNet-18 trunks, a fusion head `head` and the unimodal heads `head_audio` and `head_video`.

    Module names are the official code's, so that its checkpoints load (`concat` fusion, `resnet18`). With `bf16` the
    trunks compute in bfloat16 by autocast (weights stay float32); pooling, heads and logits are float32 all the same.
    """

    def __init__(self, n_classes: int, model: str = "resnet18", fusion_method: str = "concat", bf16: bool = False):
        super().__init__()
        self.bf16 = bf16
        make, features = ENCODERS[model]
        self.audio_net = make(1)
        self.visual_net = make(3)
        self.head = FUSIONS[fusion_method](features, n_classes)
        self.head_audio = nn.Linear(features, n_classes)
        self.head_video = nn.Linear(features, n_classes)

    def encoders(self) -> dict[str, nn.Module]:
        """The trunks by modality."""
        return {"audio": self.audio_net, "video": self.visual_net}

    def encode_audio(self, audio: Tensor) -> Tensor:
        """(B, 1, F, W) -> (B, D)."""
        return self._features(self.audio_net, audio)

    def encode_video(self, video: Tensor) -> Tensor:
        """(B, T, 3, S, S) -> (B, D): the frames share the batch dimension in the trunk and are averaged after it."""
        features = self._features(self.visual_net, video.flatten(0, 1))  # (B*T, D)
        return features.unflatten(0, video.shape[:2]).mean(dim=1)

    def _features(self, encoder: nn.Module, images: Tensor) -> Tensor:
        """(B, c, H, W) -> (B, D), pooled in float32 at least."""
        with torch.autocast(images.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            return encoder(images)

    def forward(self, audio: Tensor | None, video: Tensor | None, kept: str = "both") -> Output:
        """Logits of all heads for `kept` in both, audio, video.

        The feature of a masked modality is zero. Its encoder runs only if its input is given (the official code's
        `--masked_encoder run`: BatchNorm statistics move and gradients are zeros); with None it stays untouched.
        """
        a = self.encode_audio(audio) if audio is not None else None
        v = self.encode_video(video) if video is not None else None
        if kept == "audio":
            v = _zero_features(v, a)
        elif kept == "video":
            a = _zero_features(a, v)
        return Output(
            joint=self.head(a, v, kept),
            audio=self.head_audio(a) if kept != "video" else None,
            video=self.head_video(v) if kept != "audio" else None,
            audio_features=a,
            video_features=v,
        )


def _zero_features(masked: Tensor | None, like: Tensor) -> Tensor:
    """Zeros for the masked modality: in its graph, so that its gradients are zeros, when its encoder ran."""
    if masked is None:
        return torch.zeros_like(like)
    return masked.masked_fill(torch.ones_like(masked, dtype=torch.bool), 0.0)
