"""Why remixing helps, or does not: clash, imbalance, calibration and the partition's moves, as flat numbers.

What `train.py --diagnose` writes to metrics.jsonl and TensorBoard each epoch, all under `diagnose/`. Nothing here
changes a run: networks are in evaluation mode, gradients are taken aside, generators are put back. It costs one pass
forward over the test clips and, over the probe clips, one forward and about three backward.

Shapes: N clips, B clips of a batch, C classes, D features per modality.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.distributed import sum_over_ranks

BINS = 15  # of the calibration error (Guo et al., ICML 2017)
HEADS = ("joint", "audio", "video")


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; modes of all modules and global generators as before after it."""
    modes = [(module, module.training) for module in model.modules()]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices):  # a DataLoader draws its workers' seed when it starts
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


# ------------------------------------------------------------------------------------------------------------ clash


def gradient_clash(model: nn.Module, batches: Iterable, forward: Callable) -> dict[str, float | None]:
    """Do the joint loss and an encoder's own unimodal loss pull the encoder the same way?

    Gradients of the mean cross entropy over all `batches` (with `labels`, `share`), of the joint head and of the
    unimodal one, each with respect to all parameters of the encoder; `forward(batch)` gives an `Output`. Returns
    `clash_cosine_audio`, `_video` (1 same direction, 0 unrelated, -1 opposite) and `clash_ratio_audio`, `_video`, the
    norm of the joint gradient over that of the unimodal one. None where a gradient is zero. `.grad` stays untouched.
    """
    encoders = {"audio": list(model.audio_net.parameters()), "video": list(model.visual_net.parameters())}
    total: dict[tuple[str, str], Tensor] = {}  # (encoder, loss) -> the flat gradient's sum
    for batch in batches:
        output = forward(batch)
        count = float(batch.share > 0)  # a process without a clip of its own repeats one, which must not count
        for loss in HEADS:
            value = count * F.cross_entropy(getattr(output, loss).float(), batch.labels, reduction="sum")
            reached = [name for name in encoders if loss in ("joint", name)]
            parameters = [parameter for name in reached for parameter in encoders[name]]
            gradients = torch.autograd.grad(value, parameters, retain_graph=loss != HEADS[-1])
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            sizes = [sum(parameter.numel() for parameter in encoders[name]) for name in reached]
            for name, part in zip(reached, flat.split(sizes), strict=True):
                total[name, loss] = total.get((name, loss), 0) + part
    numbers = {}
    for name in encoders:
        joint, own = (sum_over_ranks(total[name, loss]).double() for loss in ("joint", name))
        norms = joint.norm().item(), own.norm().item()
        sound = all(norm > 0 for norm in norms)  # False for NaN too
        numbers[f"clash_cosine_{name}"] = (joint @ own).item() / (norms[0] * norms[1]) if sound else None
        numbers[f"clash_ratio_{name}"] = norms[0] / norms[1] if sound else None
    return numbers


# -------------------------------------------------------------------------------------------------------- imbalance


@torch.no_grad()
def collect(batches: Iterable, forward: Callable, clips: int) -> dict[str, Tensor]:
    """Every head's logits (N, C) and both features (N, D) of a part of N `clips`, over all processes."""
    found: dict[str, Tensor] = {}
    for batch in batches:
        for name, values in forward(batch)._asdict().items():
            if values is not None:
                values = values.float()
                rows = found.setdefault(name, values.new_zeros(clips, values.shape[1]))
                if batch.share > 0:  # else the clip is another process's, which counts it
                    rows[batch.clips] = values
    return {name: sum_over_ranks(values) for name, values in found.items()}


@torch.no_grad()
def shapley(head: Callable[[Tensor, Tensor, str], Tensor], a: Tensor, v: Tensor, labels: Tensor) -> dict[str, float]:
    """Each modality's share of the joint head's accuracy, by its Shapley value in the game of zeroed features.

    a, v: features (N, D). The worth of a set of modalities is the accuracy with the others' features at zero:
    `worth_both`, `worth_audio`, `worth_video`, `worth_none`. `shapley_audio` is the mean of what audio adds to nothing
    and what it adds to video; the two Shapley values add up to worth_both - worth_none.
    """
    no_a, no_v = torch.zeros_like(a), torch.zeros_like(v)
    fed = {
        "both": (a, v, "both"),
        "audio": (a, no_v, "audio"),
        "video": (no_a, v, "video"),
        "none": (no_a, no_v, "both"),
    }
    worth = {name: (head(*inputs).argmax(1) == labels).double().mean().item() for name, inputs in fed.items()}
    gains = {
        "audio": (worth["audio"] - worth["none"] + worth["both"] - worth["video"]) / 2,
        "video": (worth["video"] - worth["none"] + worth["both"] - worth["audio"]) / 2,
    }
    return {f"worth_{name}": value for name, value in worth.items()} | {
        f"shapley_{name}": value for name, value in gains.items()
    }


# ------------------------------------------------------------------------------------------------------ calibration


def calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error in [0, 1]: |accuracy - confidence| over equal bins of confidence, weighed by clips.

    logits (N, C), labels (N,); the confidence is the highest probability (Guo et al., ICML 2017).
    """
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    excess = (predicted == labels).double() - confidence  # (N,)
    # Bins are open below and closed above, as in the paper: (0, 1/bins], ..., (1 - 1/bins, 1].
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    sums = torch.zeros(bins, dtype=torch.double, device=logits.device).index_add_(0, place, excess)
    return (sums.abs().sum() / len(labels)).item()


# -------------------------------------------------------------------------------------------------------- partition


def partition_moves(
    keeps_audio: Tensor, before: Tensor | None, labels: Tensor, classes: Sequence[str]
) -> dict[str, float | None]:
    """`kept_audio`, the share of clips that keep audio, also of each class, and `moved`, the share that changed.

    keeps_audio (N,) bool now, `before` the same at the last scoring (None at the first: `moved` is None), labels (N,).
    """
    numbers = {"moved": (keeps_audio != before).double().mean().item() if before is not None else None}
    numbers["kept_audio"] = keeps_audio.double().mean().item()
    for index, name in enumerate(classes):
        own = keeps_audio[labels == index].double()
        numbers[f"kept_audio/{name}"] = own.mean().item() if len(own) else None
    return numbers


# ---------------------------------------------------------------------------------------------------- all of an epoch


def diagnose_model(
    model: nn.Module, probe: Iterable, test: Iterable, labels: Tensor, forward: Callable
) -> dict[str, float | None]:
    """Clash on the `probe` batches; imbalance and calibration on the `test` batches, whose labels are (N,).

    `forward(batch)` gives the network's `Output`. A network of one modality has neither clash nor imbalance.
    """
    with aside(model):
        found = collect(test, forward, len(labels))
        numbers = {f"ece_{name}": calibration_error(found[name], labels) for name in HEADS if name in found}
        if {"audio", "video"} <= found.keys():
            accuracies = [(found[name].argmax(1) == labels).double().mean().item() for name in ("audio", "video")]
            numbers["unimodal_gap"] = accuracies[0] - accuracies[1]
            numbers |= shapley(model.head, found["audio_features"], found["video_features"], labels)
            numbers |= gradient_clash(model, probe, forward)
    return numbers


def under_name(numbers: dict, prefix: str = "diagnose/") -> dict:
    return {f"{prefix}{name}": value for name, value in numbers.items()}
