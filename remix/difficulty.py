"""Step 1, score: how hard is each clip for each modality?

Shapes: N clips, C classes, 2 modalities (column 0 audio, column 1 video).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SCORES = ("kl", "loss", "random")


def kl_from_uniform(logits: Tensor) -> Tensor:
    """KL(softmax(logits) || uniform) in bits, (N, C) -> (N,): 0 when unsure of everything, log2(C) when certain.

    Probabilities are clipped to [1e-9, 1] as in the official code (paper section 3.2), there with C fixed to 6;
    here C is the number of columns. The softmax is computed in float32 (float64 for float64 logits) and the sum in
    float64, which is the official arithmetic: a float32 sum ranks saturated clips differently.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    p = logits.softmax(dim=1).double().clamp(1e-9, 1.0)
    return (p * (p.log2() + math.log2(logits.shape[1]))).sum(dim=1)


def difficulty(
    audio_logits: Tensor,
    video_logits: Tensor,
    score: str = "kl",
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Difficulty of each clip in each modality from its unimodal logits, 2 x (N, C) -> (N, 2). LOW means hard.

    kl      KL of the prediction from uniform: unsure is hard; labels are not used (the paper's).
    loss    minus the unimodal cross entropy: wrong is hard; needs `labels` (N,).
    random  uniform noise from `generator` (on the CPU): the control that keeps the remixing and drops the choosing.
    """
    if score == "kl":
        columns = kl_from_uniform(audio_logits), kl_from_uniform(video_logits)
    elif score == "loss":
        columns = tuple(-F.cross_entropy(x.float(), labels, reduction="none") for x in (audio_logits, video_logits))
    elif score == "random":
        return torch.rand(len(audio_logits), 2, generator=generator).to(audio_logits.device)
    else:
        raise ValueError(f"score {score!r}: allowed are {', '.join(SCORES)}")
    return torch.stack(columns, dim=1)  # (N, 2)
