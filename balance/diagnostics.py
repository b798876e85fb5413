"""Diagnostics of modality clash, imbalance, calibration and changes of the partition, as flat numbers.

`train.py --diagnose` logs them to metrics.jsonl and TensorBoard each epoch, under `diagnose/`. They do not change the
run: networks are in eval mode, gradients are computed separately, generators are restored. The cost is one forward pass
over the test clips, plus one forward pass and about M + 1 backward passes over the probe clips.

Shapes: N clips, B clips of a batch, C classes, M modalities, D_m features of modality m.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from math import comb
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models import MultimodalClassifier
from models.inference import aside, collect
from remix import Batch, batches_of
from utils.acceleration import compiled, in_double
from utils.distributed import sum_over_ranks

PROBE_BATCHES = 4  # of training clips, on which gradients are taken
BINS = 15  # of the calibration error (Guo et al., ICML 2017)


# ------------------------------------------------------------------------------------------------------------ clash


def gradient_clash(model: MultimodalClassifier, batches: Iterable) -> dict[str, float | None]:
    """Compare the gradients of the joint loss and of the unimodal loss in each encoder.

    Gradients of the mean cross entropy over all `batches`, of the joint head and of the unimodal head, each with
    respect to all parameters of the encoder. Returns for each modality m `clash_cosine_<m>` (1 same direction, 0
    orthogonal, -1 opposite) and `clash_ratio_<m>`, the norm of the joint gradient divided by that of the unimodal
    gradient. Values are None if a gradient is zero or the encoder is frozen. `.grad` is not modified.
    """
    encoders = {name: list(encoder.parameters()) for name, encoder in model.encoders.items()
                if name not in model.frozen}  # fmt: skip
    heads = ("joint", *encoders)
    total: dict[tuple[str, str], Tensor] = {}  # (encoder, loss) -> the flat gradient's sum
    for batch in batches if encoders else ():
        output = model(batch.inputs, batch.fed)
        logits = output.heads
        for loss in heads:
            value = batch.weight * F.cross_entropy(logits[loss].float(), batch.labels, reduction="sum")
            reached = [name for name in encoders if loss in ("joint", name)]
            parameters = [parameter for name in reached for parameter in encoders[name]]
            gradients = torch.autograd.grad(value, parameters, retain_graph=loss != heads[-1])
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            sizes = [sum(parameter.numel() for parameter in encoders[name]) for name in reached]
            for name, part in zip(reached, flat.split(sizes), strict=True):
                total[name, loss] = total[name, loss] + part if (name, loss) in total else part
    numbers: dict[str, float | None] = {}
    for name in model.names:
        if name in model.frozen:
            numbers |= {f"clash_cosine_{name}": None, f"clash_ratio_{name}": None}
            continue
        joint, own = (in_double(sum_over_ranks(total[name, loss])) for loss in ("joint", name))
        norms = joint.norm().item(), own.norm().item()
        finite = all(norm > 0 for norm in norms)  # False for NaN too
        numbers[f"clash_cosine_{name}"] = (joint @ own).item() / (norms[0] * norms[1]) if finite else None
        numbers[f"clash_ratio_{name}"] = norms[0] / norms[1] if finite else None
    return numbers


def reassembly_angles(
    model: MultimodalClassifier, clips: Any, keep: Tensor, batch_size: int, generator: torch.Generator
) -> dict[str, float | None]:
    """Angle in degrees between an encoder's actual and ideal gradient, in mixed and in homogeneous batches.

    The actual gradient of modality m's encoder is that of the joint head's cross entropy on a batch; the ideal one is
    that of the unimodal head's on the batch's clips that keep m (keep (N, M) bool). Nothing is masked: with a linear
    head, masking alone leaves the direction of an encoder's gradient unchanged, so that masked batches would show no
    clash. Returns means over a few batches, None where no clip keeps m:

    angle_mixed_<m>    batches of `batch_size` random clips, as without reassembling
    angle_part_<m>     only the clips of those batches that keep m: a control with as many clips of m as mixed batches
    angle_grouped_<m>  batches of `batch_size` clips that keep m, as with reassembling

    Cf. figure 3c of the paper, which leaves its ideal direction undefined.
    """
    found: dict[str, list[Tensor]] = {}
    for m, name in enumerate(model.names):
        own = keep[:, m].nonzero().flatten()
        if not len(own) or name in model.frozen:
            continue
        for _ in range(PROBE_BATCHES):
            mixed = torch.randperm(len(keep), generator=generator)[:batch_size]
            grouped = own[torch.randperm(len(own), generator=generator)[:batch_size]]
            part = mixed[keep[mixed, m]]
            pairs = {"grouped": _encoder_gradients(model, clips, grouped, name, ("joint", name))}
            if len(part):
                pairs["part"] = _encoder_gradients(model, clips, part, name, ("joint", name))
                pairs["mixed"] = [*_encoder_gradients(model, clips, mixed, name, ("joint",)), pairs["part"][1]]
            for kind, (actual, ideal) in pairs.items():
                cosine = F.cosine_similarity(actual, ideal, dim=0).clamp(-1, 1)
                found.setdefault(f"angle_{kind}_{name}", []).append(cosine.arccos().rad2deg())
    keys = [f"angle_{kind}_{name}" for name in model.names for kind in ("mixed", "part", "grouped")]
    return {key: torch.stack(found[key]).mean().item() if key in found else None for key in keys}


def _encoder_gradients(
    model: MultimodalClassifier, clips: Any, chosen: Tensor, name: str, heads: tuple[str, ...]
) -> list[Tensor]:
    """The flat gradient (float64) for one encoder of each head's mean cross entropy on the `chosen` clips."""
    parameters, found = list(model.encoders[name].parameters()), []
    for batch in clips.epoch([Batch(chosen, model.names)]):
        logits = model(batch.inputs, batch.fed).heads
        for head in heads:
            value = batch.weight * F.cross_entropy(logits[head].float(), batch.labels, reduction="sum")
            gradients = torch.autograd.grad(value, parameters, retain_graph=head != heads[-1])
            found.append(in_double(sum_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))))
    return found


# -------------------------------------------------------------------------------------------------------- imbalance


@torch.no_grad()
def discrepancy(slices: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
    """OGM-GE's discrepancy ratio of each modality: `rho_<m>`, above 1 where m is ahead (CVPR 2022, eq. 6).

    The sum over clips of the true class's probability in m's part of the joint logits (N, C), over the mean of that of
    the other modalities.
    """
    probabilities = {name: in_double(logits).softmax(1) for name, logits in slices.items()}  # (N, C) each
    scores = {name: p.gather(1, labels.to(p.device)[:, None]).sum().item() for name, p in probabilities.items()}
    others = {name: (sum(scores.values()) - own) / (len(scores) - 1) for name, own in scores.items()}
    return {f"rho_{name}": own / max(others[name], 1e-12) for name, own in scores.items()}


@torch.no_grad()
def shapley(head: Callable[..., Tensor], features: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
    """Each modality's share of the joint head's accuracy: its Shapley value when the features of others are zeroed.

    features (N, D_m). The value of a set of modalities is the accuracy with all other features zero, returned as
    `worth_<names joined by +>` and `worth_none`. `shapley_<m>` is the weighted mean of what m adds to each set without
    m. The Shapley values sum to the value of all modalities minus the value of none.
    """
    names = tuple(features)
    worth = {}
    for size in range(len(names) + 1):
        for fed in combinations(names, size):
            kept = {name: z if name in fed else torch.zeros_like(z) for name, z in features.items()}
            worth[fed] = in_double(head(kept, fed or names).argmax(1) == labels).mean().item()
    numbers = {f"worth_{'+'.join(fed) or 'none'}": value for fed, value in worth.items()}
    for name in names:
        gain = 0.0
        for fed in (fed for fed in worth if name not in fed):
            joined = tuple(other for other in names if other in fed or other == name)
            gain += (worth[joined] - worth[fed]) / (len(names) * comb(len(names) - 1, len(fed)))
        numbers[f"shapley_{name}"] = gain
    return numbers


# ------------------------------------------------------------------------------------------------------ calibration


def calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error in [0, 1]: mean |accuracy - confidence| over bins of equal width, weighted by clips.

    logits (N, C), labels (N,); the confidence is the highest probability (Guo et al., ICML 2017).
    """
    logits = in_double(logits)
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    excess = (predicted == labels.to(logits.device)).double() - confidence  # (N,)
    # Bins are open below and closed above, as in the paper: (0, 1/bins], ..., (1 - 1/bins, 1].
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    sums = torch.zeros(bins, dtype=torch.double, device=logits.device).index_add_(0, place, excess)
    return (sums.abs().sum() / len(labels)).item()


# -------------------------------------------------------------------------------------------------------- partition


def partition_moves(
    keep: Tensor, before: Tensor | None, names: Sequence[str], labels: Tensor, classes: Sequence[str]
) -> dict[str, float | None]:
    """Shares of clips that keep each modality, also by class, and `moved`, the share that changed since last time.

    keep (N, M) bool; `before` is the partition of the previous scoring (None at the first one, `moved` is then None);
    labels (N,). Returns `kept_<m>` of every modality and `kept_<m>/<class>` of every modality but the last (which has
    the remainder), under `diagnose/`.
    """
    moved = (keep != before).any(dim=1).double().mean().item() if before is not None else None
    numbers: dict[str, float | None] = {"moved": moved}
    for m, name in enumerate(names):
        numbers[f"kept_{name}"] = keep[:, m].double().mean().item()
        for index, label in enumerate(classes if m + 1 < len(names) else ()):
            own = keep[labels == index, m].double()
            numbers[f"kept_{name}/{label}"] = own.mean().item() if len(own) else None
    return under_name(numbers)


# ---------------------------------------------------------------------------------------------------- all of an epoch


def diagnose_model(
    model: MultimodalClassifier, probe: Iterable, test: Iterable, labels: Tensor
) -> dict[str, float | None]:
    """Clash on the `probe` batches; imbalance and calibration on the `test` batches, whose labels are (N,).

    A network that is fed one modality has neither clash nor imbalance. `unimodal_gap` is the accuracy of the first
    modality's head minus the second's, where there are two.
    """
    with aside(model):
        logits, features = collect(model, test, len(labels))
        numbers: dict[str, float | None] = {
            f"ece_{name}": calibration_error(values, labels) for name, values in logits.items()
        }
        if all(name in logits for name in model.names):
            hits = [in_double(logits[name].argmax(1) == labels).mean().item() for name in model.names]
            if len(hits) == 2:
                numbers["unimodal_gap"] = hits[0] - hits[1]
            if model.late:  # otherwise zero features do not mask the modality: the other features depend on it, too
                numbers |= shapley(model.head, features, labels)
            numbers |= gradient_clash(model, probe)
    return numbers


def diagnose(
    model: MultimodalClassifier,
    clips: dict,
    fed: tuple[str, ...],
    batch_size: int,
    seed: int,
    keep: Tensor | None = None,
) -> dict:
    """`diagnose_model` on the same few training clips in every epoch and on the test clips. Changes no run.

    With the partition `keep` (N, M) of a Remix epoch, `reassembly_angles` too.
    """
    probe = batches_of(len(clips["train"]), batch_size, fed, torch.Generator().manual_seed(seed))[:PROBE_BATCHES]
    test = batches_of(len(clips["test"]), 4 * batch_size, fed, generator=None)
    with compiled(False):  # compiled code gives gradients once; here two losses share a forward pass
        found = diagnose_model(model, clips["train"].epoch(probe), clips["test"].epoch(test), clips["test"].labels)
        with aside(model):
            slices = getattr(model.head, "slices", None)
            if fed == model.names and slices is not None:
                chosen = torch.cat([batch.clips for batch in probe]).to(clips["train"].device)
                row = torch.zeros(len(clips["train"]), dtype=torch.long, device=chosen.device)  # of a clip in `chosen`
                row[chosen] = torch.arange(len(chosen), device=chosen.device)
                batches = (batch._replace(clips=row[batch.clips]) for batch in clips["train"].epoch(probe))
                seen = collect(model, batches, len(chosen)).features  # not a row for every training clip
                with torch.no_grad():
                    found |= discrepancy(slices(seen), clips["train"].labels[chosen])
            if keep is not None:
                generator = torch.Generator().manual_seed(seed)
                found |= reassembly_angles(model, clips["train"], keep, batch_size, generator)
    return under_name(found)


def under_name(numbers: dict, prefix: str = "diagnose/") -> dict:
    return {f"{prefix}{name}": value for name, value in numbers.items()}
