"""Metrics from logits, and running sums of a training epoch. Shapes: N clips, B clips of a batch, C classes."""

import numpy as np
import torch
from torch import Tensor

from utils.acceleration import in_double
from utils.console import some
from utils.distributed import sum_over_ranks
from utils.errors import UserError


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of clips whose highest logit is their label's, in [0, 1]. logits (N, C), labels (N,)."""
    return in_double(logits.argmax(1) == labels).mean().item()


def f1_macro(logits: Tensor, labels: Tensor) -> float:
    """Mean of the per-class F1 over all C classes, 0 for a class that never appears. logits (N, C), labels (N,)."""
    counts = confusion(logits, labels)
    hits, both = 2.0 * counts.diagonal(), counts.sum(0) + counts.sum(1)  # F1 = 2 TP / (predicted + true)
    return float(np.divide(hits, both, out=np.zeros_like(hits), where=both > 0).mean())


def confusion(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Counts (C, C): row the label, column the prediction."""
    classes = logits.shape[1]
    truth, predicted = labels.cpu().numpy(), logits.argmax(1).cpu().numpy()
    return np.bincount(truth * classes + predicted, minlength=classes**2).reshape(classes, classes)


class Tally:
    """Sums of a training epoch of `batches` batches, kept on the device until the epoch ends.

    `losses` (batches,) holds each batch's loss summed over this process's clips, `sums` for the heads that were trained
    together (heads, 3): cross entropy, correct predictions and clips, over the clips that were fed to each. Only heads
    of `trained` are counted.
    """

    def __init__(self, batches: int, trained: tuple[str, ...]):
        self.batches, self.trained = batches, trained
        self.losses: Tensor | None = None
        self.sums: dict[tuple[str, ...], Tensor] = {}

    @torch.no_grad()
    def add(
        self,
        i: int,
        loss: Tensor,
        entropies: dict[str, Tensor],
        logits: dict[str, Tensor],
        labels: Tensor,
        n: float,
        given: dict[str, Tensor] | None = None,
    ) -> None:
        """Count batch `i`: its mean loss and each head's cross entropy, means over `n` clips. logits (B, C).

        `given` (B,) bool: in a mixed batch, the clips that are fed to a head; the others have no cross entropy there.
        All heads are counted together: on a GPU every operation here is a launch in every step.
        """
        if self.losses is None:
            self.losses = torch.zeros(self.batches, device=loss.device)
            self.whole = torch.ones(len(self.trained), device=loss.device)  # share of the batch that each head is fed
        torch.mul(loss, n, out=self.losses[i])
        names = tuple(name for name in entropies if name in self.trained)
        right = torch.stack([logits[name] for name in names]).argmax(2) == labels  # (heads, B)
        if given:
            everyone = torch.ones_like(labels, dtype=torch.bool)
            fed = torch.stack([given.get(name, everyone) for name in names])
            counted = [(right & fed).mean(1, dtype=torch.float32), fed.mean(1, dtype=torch.float32)]
        else:
            counted = [right.mean(1, dtype=torch.float32), self.whole[: len(names)]]
        own = torch.stack([torch.stack([entropies[name] for name in names]).float(), *counted], dim=1) * n
        self.sums[names] = self.sums[names].add_(own) if names in self.sums else own

    def numbers(self, heads: tuple[str, ...]) -> dict[str, float | None]:
        """`train_loss`, the mean loss of a clip, and for each of `heads` `train_ce_<head>` and `train_acc_<head>`.

        Plain, unweighted means over the clips that were fed to the head, None where there were none or the head is not
        trained. All processes must call it; the host reads the device once.
        """
        numbers: dict[str, float | None] = {}
        if self.losses is not None:
            found = dict.fromkeys(("joint", *heads), torch.zeros(3, device=self.losses.device))
            for names, rows in self.sums.items():
                found |= {name: found[name] + row for name, row in zip(names, rows, strict=True) if name in found}
            rows = in_double(torch.stack([self.losses.sum().expand(3), *found.values()]))
            loss, *sums = sum_over_ranks(rows).tolist()
            by_head = dict(zip(found, sums, strict=True))
            numbers["train_loss"] = loss[0] / by_head["joint"][2]
            for name in heads:
                entropy, correct, count = by_head[name]
                numbers[f"train_ce_{name}"] = entropy / count if count else None
                numbers[f"train_acc_{name}"] = correct / count if count else None
        return numbers

    def check_finite(self, epoch: int, plan: list[Tensor], names: list[str]) -> None:
        """Raise `UserError` naming the first batch of `plan`, indices of clips in `names`, whose loss is not finite.

        All processes must call it.
        """
        if self.losses is None:
            return
        bad = (~sum_over_ranks(self.losses.clone()).isfinite()).nonzero().flatten().tolist()
        if bad:
            clips = some([names[i] for i in plan[bad[0]].tolist()])
            raise UserError(f"epoch {epoch + 1}, batch {bad[0] + 1} of {len(plan)}: loss not finite; clips: {clips}; "
                            "last.pth is that of the epoch before; try a lower --learning_rate")  # fmt: skip
