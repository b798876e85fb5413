"""Inference over many batches in eval mode, for scoring, evaluation, features and diagnostics.

Shapes: N clips, C classes, D_m features of modality m.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from remix import Batch, batches_of
from utils.acceleration import compiled
from utils.console import progress, some
from utils.distributed import is_main, sum_over_ranks
from utils.errors import UserError
from utils.progress import Progress


class ClipsLike(Protocol):
    """The attributes used of `dataset.clips.Clips`."""

    names: list[str]

    def __len__(self) -> int: ...
    def epoch(self, plan: list[Batch]) -> Iterator[Any]: ...


class Collected(NamedTuple):
    """Logits (N, C) of "joint" and of every fed modality, and features (N, D_m) of every modality, float32."""

    logits: dict[str, Tensor]
    features: dict[str, Tensor]


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


@torch.inference_mode()
def collect(
    model: nn.Module,
    batches: Iterable,
    clips: int,
    features: bool = True,
    bar: Progress | None = None,
    check: Callable[[], None] = lambda: None,
    full: int = 0,
    slices: bool = False,
) -> Collected:
    """Predict a part of N `clips`. Processes share the work; each gets all results.

    `batches` are `dataset.clips.ClipBatch`es that together hold every clip once. The network is
    used in the mode it is in. Features are left out where not asked for. `bar` is moved by the clips of each batch, and
    `check` may end the pass by raising after any of them. Compiled encoders run as such on batches of `full` clips only
    (0: on none), since every other size would compile one more graph. With `slices`, the logits have `slice_<modality>`
    too, each fed modality's part of the joint logits, where the fusion head has such parts.
    """
    parts_of = getattr(getattr(model, "head", None), "slices", None) if slices else None
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for batch in batches:
        with compiled(batch.total == full):
            output = model(batch.inputs, batch.fed)
        parts = {f"slice_{name}": own for name, own in parts_of(output.features).items()
                 if name in batch.fed} if parts_of else {}  # fmt: skip
        kinds = (output.heads | parts, output.features if features else {})
        for rows, values in zip(found, kinds, strict=True):
            for name, value in values.items():
                if name not in rows:
                    rows[name] = torch.zeros(clips, value.shape[1], device=value.device)
                rows[name][batch.clips] = value.float() * batch.weight
        if bar is not None:
            bar.update(batch.total)
        check()
    logits, values = ({name: sum_over_ranks(rows) for name, rows in own.items()} for own in found)
    return Collected(logits, values)


def predict(
    model: nn.Module,
    clips: ClipsLike,
    fed: tuple[str, ...],
    batch_size: int,
    name: str = "predictions",
    check: Callable[[], None] = lambda: None,
    slices: bool = False,
) -> dict[str, Tensor]:
    """Logits (N, C) of "joint" and of each fed modality for all `clips` in order: eval mode, no augmentation.

    One pass serves evaluation and the scoring of Remix. `slices` as in `collect`. Raises `UserError` naming the clips
    if a logit is not finite.
    """
    model.eval()
    with progress(name, len(clips), is_main()) as bar:
        batches = clips.epoch(batches_of(len(clips), batch_size, fed, generator=None))
        logits = collect(model, batches, len(clips), False, bar, check, batch_size, slices).logits
    check_finite(logits, clips.names, name)
    return logits


def check_finite(logits: dict[str, Tensor], clips: list[str], name: str) -> None:
    """Raise `UserError` naming those of the `clips` whose logits, (N, C) of each head, are not all finite."""
    finite = torch.stack([values.isfinite().all(dim=1) for values in logits.values()]).all(dim=0)  # (N,)
    if not finite.all():
        bad = [clips[i] for i in (~finite).nonzero().flatten().tolist()]
        raise UserError(f"{name}: not finite for {len(bad)} of {len(clips)} clips: {some(bad)}; look at them, or train "
                        "with a lower --learning_rate")  # fmt: skip
