"""Step 2, decouple: each clip keeps one modality.

Shapes: N clips, M modalities.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

KEEP = ("hard", "easy", "all")


def decouple(difficulty: Tensor, keep: str = "hard") -> Tensor:
    """The modalities each clip keeps, (N, M) -> (N, M) bool. Low difficulty values mean hard.

    hard  the modality with the lowest value (paper section 3.2); on a tie the last one, as in the official code.
    easy  the modality with the highest value; on a tie the last one (ablation).
    all   every modality: the clip enters the batches of each, M times the steps (ablation).

    Raises `ValueError` for another `keep`.
    """
    if keep not in KEEP:
        raise ValueError(f"keep {keep!r}: allowed are {', '.join(KEEP)}")
    if keep == "all":
        return torch.ones_like(difficulty, dtype=torch.bool)
    # argmin does not specify which of several equal minima it returns. Reverse the columns and take the first minimum.
    values = (difficulty if keep == "hard" else -difficulty).flip(1)
    lowest = values == values.min(dim=1, keepdim=True).values  # (N, M)
    last = difficulty.shape[1] - 1 - lowest.int().argmax(dim=1)  # (N,)
    return F.one_hot(last, difficulty.shape[1]).bool()
