"""Step 1, score: the difficulty of each clip in each modality.

Shapes: N clips, C classes, M modalities.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

SCORES = ("kl", "loss", "random")
ROWS = 4096  # clips whose KL is computed at once: for 309 classes 10 MB, which a processor's cache holds


def kl_from_uniform(logits: Tensor) -> Tensor:
    """KL(softmax(logits) || uniform) in bits, (N, C) -> (N,): 0 for a uniform prediction, log2(C) for a certain one.

    Probabilities are clipped to [1e-9, 1] as in the official code (paper section 3.2), which fixes C to 6; here C is
    the number of columns. The result is bit-identical to the official code: softmax and clipping in float32 (float64
    for float64 logits), then p log2(p / (1 / C)) in float64, summed class by class. Where heads are certain, the values
    of a clip differ between modalities in the last bits only. Another order of summation would therefore change which
    modality many of these clips keep. For the same reason the sum is computed on the CPU: a GPU's logarithm can differ
    in the last bit.

    Memory: four float64 values per class of `ROWS` clips, whatever N is.
    """
    rows = [_kl_of_rows(part) for part in logits.split(ROWS)]
    return torch.cat(rows).to("cpu" if logits.device.type == "mps" else logits.device)


def _kl_of_rows(logits: Tensor) -> Tensor:
    """`kl_from_uniform` of a few clips, on the CPU: (n, C) -> (n,)."""
    logits = logits.cpu() if logits.device.type == "mps" else logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    p = logits.softmax(dim=1).clamp(1e-9, 1.0).double().cpu()  # (n, C)
    terms = p * (p / (1 / logits.shape[1])).log2()
    return sum(terms.unbind(dim=1), torch.zeros(len(p), dtype=p.dtype))


def difficulty(
    logits: Sequence[Tensor],
    score: str = "kl",
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Difficulty of each clip in each modality from its unimodal logits, M x (N, C) -> (N, M). LOW means hard.

    kl      KL of the prediction from uniform: an uncertain prediction is hard. Labels are not used (the paper's rule).
    loss    minus the unimodal cross entropy: a wrong prediction is hard. Needs `labels` (N,).
    random  uniform noise from `generator` (on the CPU): a control that remixes without choosing.

    Raises `ValueError` for another `score`, or for "loss" without labels.
    """
    if score == "kl":
        return torch.stack([kl_from_uniform(values) for values in logits], dim=1)  # (N, M)
    if score == "loss":
        if labels is None:
            raise ValueError("score 'loss' needs labels")
        return torch.stack([-F.cross_entropy(values.float(), labels, reduction="none") for values in logits], dim=1)
    if score == "random":
        return torch.rand(len(logits[0]), len(logits), generator=generator).to(logits[0].device)
    raise ValueError(f"score {score!r}: allowed are {', '.join(SCORES)}")
