"""D&R, diagnosing and re-learning: softly reset encoders by the gap in separability of train and held-out features.
Wei et al., ECCV 2024.

After every n-th epoch: features z_m of train and of validation clips, each scaled to [-1, 1] per dimension, k-means
with one cluster per class; P = share of clips in the majority class of their cluster.
w_m = tanh(lambda |P_train - P_val|);
theta_m <- w_m theta_m^0 + (1 - w_m) theta_m for all parameters of the encoder: not BatchNorm's running statistics, not
the heads, not the optimizer's state. theta^0: the weights the run began with. With `--batchnorm refreshed` the
statistics are then re-estimated.

k-means is the best of 10 starts. The authors leave that number to scikit-learn, whose default was 10 and is 1 since
version 1.4.
"""

import numpy as np
import torch
from torch import Tensor

from balance.method import Context, Method, Option
from utils.cli import number
from utils.distributed import is_main, sum_over_ranks
from utils.errors import UserError

STARTS = 10  # of k-means


class Relearn(Method):
    name = "dr"
    options = (
        Option("lambda", number(float, 0), 3.0, "strength of a reset"),
        Option("every", number(int, 1), 20, "a reset follows each epoch that is a multiple of this"),
        Option("resets", number(int, 0), 3, "resets at most"),
        Option("views", str, "augmented", "train clips as seen for the diagnosis", choices=("augmented", "plain")),
    )

    def __init__(self, context: Context):
        super().__init__(context)
        classes, held = self.model.n_classes, len(context.clips["val"])
        if held < classes:
            raise UserError(f"--balance dr: {held} validation clips cannot form {classes} clusters; "
                            "use a larger --val_fraction")  # fmt: skip
        self.classes, self.resets = classes, 0
        encoders = self.model.encoders
        self.initial = {name: [p.detach().clone() for p in encoders[name].parameters()] for name in self.names}

    @classmethod
    def refuse(cls, args, opt) -> str | None:
        last = min(args.epochs, args.lr_decay_step) - 1  # resets precede epochs at the initial learning rate
        if opt.resets and opt.every + 1 > last:
            return (
                f"would never reset: every={opt.every}, and a reset must come before the learning rate "
                f"decays (--lr_decay_step {args.lr_decay_step}) and before the end (--epochs {args.epochs})"
            )
        return None

    @classmethod
    def needs_validation(cls, opt) -> bool:
        return True

    def start_epoch(self, epoch: int) -> None:
        done = epoch - 1
        if done <= 0 or done % self.opt.every or self.resets >= self.opt.resets:
            return
        if epoch >= self.context.args.lr_decay_step:
            return  # at a tenth of the learning rate a reset encoder would not recover
        self.resets += 1
        weights = self.diagnose(epoch)
        for name, weight in zip(self.names, weights, strict=True):
            if name in self.model.frozen:
                continue
            self.note(f"reset_{name}", weight)
            with torch.no_grad():
                for p, start in zip(self.model.encoders[name].parameters(), self.initial[name], strict=True):
                    p.copy_(weight * start + (1 - weight) * p)
        if weights.any():
            self.reestimate(self.model, self.names, done)  # scoring comes next

    def diagnose(self, epoch: int) -> Tensor:
        """w (M,) of the modalities, the same on every process."""
        draw = self.epoch_draws(epoch)
        views = {"train": draw if self.opt.views == "augmented" else None, "val": None}
        purities = []
        for part, generator in views.items():
            clips = self.context.clips[part]
            features = self.features(part, torch.arange(len(clips)), generator)
            labels = clips.labels.cpu().numpy()
            own = [purity(features[m].cpu().numpy(), labels, self.classes) if is_main() else 0.0 for m in self.names]
            # The type is given: NumPy's numbers are double, and the processes' tensors must be alike to be added up.
            purities.append(torch.tensor(own, dtype=torch.float32, device=clips.labels.device))
        train, val = sum_over_ranks(torch.stack(purities))
        return reset_weight(train, val, getattr(self.opt, "lambda"))

    def state_dict(self) -> dict:
        return {"resets": self.resets, "initial": self.initial}

    def load_state_dict(self, state: dict) -> None:
        self.resets = state["resets"]
        for name, own in self.initial.items():
            for p, saved in zip(own, state["initial"][name], strict=True):
                p.copy_(saved)


def reset_weight(train: Tensor, val: Tensor, strength: float) -> Tensor:
    return torch.tanh(strength * (train - val).abs())


def purity(features: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Share of clips that belong to their cluster's majority class. features (N, D), labels (N,)."""
    from sklearn.cluster import KMeans  # late: importing it takes seconds

    low, high = features.min(0), features.max(0)
    scaled = 2 * (features - low) / np.where(high > low, high - low, 1) - 1
    kmeans = KMeans(classes, n_init=STARTS, random_state=0)  # pyright: ignore[reportArgumentType]
    cluster = kmeans.fit_predict(scaled)
    counts = np.zeros((classes, classes), dtype=int)
    np.add.at(counts, (cluster, labels), 1)
    return counts.max(axis=1).sum() / len(labels)
