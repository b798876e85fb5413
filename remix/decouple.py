"""Step 2, decouple: each clip keeps one modality.

Shapes: N clips, 2 modalities.
"""

import torch
from torch import Tensor

AUDIO, VIDEO, BOTH = 0, 1, 2
NAMES = ("audio", "video", "both")
KEEP = ("hard", "easy", "all")


def decouple(difficulty: Tensor, keep: str = "hard") -> Tensor:
    """The modality each clip keeps, (N, 2) -> (N,) of AUDIO, VIDEO or BOTH. Low difficulty values mean hard.

    hard  the modality with the lower value (paper section 3.2); an exact tie keeps video, as the official code does.
    easy  the modality with the higher value; a tie keeps video (ablation).
    all   both: each clip enters the batches of either modality, twice the steps (ablation).
    """
    audio, video = difficulty.unbind(dim=1)
    if keep == "hard":
        return torch.where(audio < video, AUDIO, VIDEO)
    if keep == "easy":
        return torch.where(audio > video, AUDIO, VIDEO)
    if keep == "all":
        return torch.full_like(audio, BOTH, dtype=torch.long)
    raise ValueError(f"keep {keep!r}: allowed are {', '.join(KEEP)}")
