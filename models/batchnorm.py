"""BatchNorm: statistics over all processes, re-estimated after an epoch, and in a batch of one clip."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from models.inference import ClipsLike
from remix import batches_of
from utils.acceleration import compiled
from utils.distributed import sum_over_ranks, world_size
from utils.seeding import epoch_generator

CLIPS = 1024  # that statistics are re-estimated from, at most
BatchNorm = nn.modules.batchnorm._BatchNorm


def running_statistics(norm: BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Running mean (D,), running variance (D,) and number of batches of a BatchNorm. All layers here track them."""
    mean, variance, tracked = norm.running_mean, norm.running_var, norm.num_batches_tracked
    assert mean is not None and variance is not None and tracked is not None
    return mean, variance, tracked


class SyncedBatchNorm(BatchNorm):
    """BatchNorm with the statistics of the whole batch over all processes, on any device.

    PyTorch's own SyncBatchNorm runs on GPUs only. Sums are taken in float64. Its children follow it: timm's BatchNorm
    holds a dropout and an activation.
    """

    def _check_input_dim(self, input: Tensor) -> None: ...

    def forward(self, input: Tensor) -> Tensor:
        x = self.normalised(input)
        for module in self.children():
            x = module(x)
        return x

    def normalised(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        shape = [1, -1] + [1] * (input.dim() - 2)
        dims = [0, *range(2, input.dim())]
        x = input.double()
        count = x.new_full((1,), x.numel() / x.shape[1])
        sums = all_reduce(torch.cat([x.sum(dims), x.square().sum(dims), count]))
        total, squares, n = sums.split([x.shape[1], x.shape[1], 1])
        mean = total / n
        variance = (squares / n - mean.square()).clamp(min=0)
        with torch.no_grad():
            momentum = self.momentum if self.momentum is not None else 0.1
            running_mean, running_var, tracked = running_statistics(self)
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            unbiased = variance * n / (n - 1).clamp(min=1)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
            tracked.add_(1)
        x = (x - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        return (x * self.weight.view(shape) + self.bias.view(shape)).to(input.dtype)


def synchronise_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Have every BatchNorm of `model` compute its statistics over all processes; parameters and names stay."""
    if world_size() == 1:
        return model
    if device.type == "cuda":
        if "timm" in sys.modules:  # PyTorch's own would drop the activation that is a part of timm's BatchNorm
            from timm.layers.norm_act import convert_sync_batchnorm

            return convert_sync_batchnorm(model)
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, BatchNorm):
                synced = SyncedBatchNorm(norm.num_features, norm.eps, norm.momentum)
                for own, child in norm.named_children():
                    synced.add_module(own, child)
                synced.weight, synced.bias = norm.weight, norm.bias
                synced.running_mean, synced.running_var = norm.running_mean, norm.running_var
                synced.num_batches_tracked = norm.num_batches_tracked
                setattr(parent, name, synced)
    return model


@contextmanager
def batchnorm_of_one_clip(model: nn.Module, own: bool) -> Iterator[None]:
    """Train on a batch of a single clip inside the block.

    By default BatchNorm uses its running statistics and leaves them as they are: those of one clip would erase what
    sets the clip apart. With `own` it does what the official code does, normalises with the clip's own statistics and
    moves the running ones, in every layer whose maps have more than one value per channel (frames of the clip counted
    in). A layer with a single value per channel has no statistics, and PyTorch raises; there the running ones are used.
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNorm) and module.training]
    hooks = [norm.register_forward_pre_hook(_train_if_many_values) for norm in norms if own]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()
        for hook in hooks:
            hook.remove()


def _train_if_many_values(norm: nn.Module, inputs: tuple[Tensor]) -> None:
    norm.train(inputs[0].numel() > inputs[0].shape[1])


@torch.no_grad()
def reestimate(
    model: nn.Module, clips: ClipsLike, fed: tuple[str, ...], batch_size: int, seed: int, epoch: int
) -> None:
    """Re-estimate BatchNorm's running statistics for the current weights: the mean over batches, forward only.

    Running statistics lag the weights by about ten steps, and those of an encoder that is skipped in homogeneous
    batches come from its last few batches, which held the clips that are hard in it. Scored with them, a clip's
    difficulty is partly an accident: an encoder can look certain, get no more batches and never recover. At most
    `CLIPS` clips, the same for the same seed and epoch, are seen as they are scored: without augmentation. Layers that
    stay in evaluation mode (frozen encoders) keep theirs.
    """
    chosen = torch.randperm(len(clips), generator=epoch_generator(seed, epoch, "batchnorm"))[:CLIPS]
    plan = [batch for batch in batches_of(chosen, batch_size, fed, None) if len(batch.clips) >= 2 * world_size()]
    model.train()
    norms = [module for module in model.modules() if isinstance(module, BatchNorm) and module.training]
    before = [(norm.momentum, running_statistics(norm)[2].clone()) for norm in norms]
    for i, batch in enumerate(clips.epoch(plan)):
        for norm in norms:
            norm.momentum = 1 / (i + 1)  # a plain mean; PyTorch's own (None) reads a counter off the device each time
        with compiled(False):  # one more graph for a pass without gradients would take longer than it saves
            model(batch.inputs, batch.fed)
    for norm, (momentum, steps) in zip(norms, before, strict=True):
        mean, variance, tracked = running_statistics(norm)
        norm.momentum = momentum
        tracked.copy_(steps)  # counts training steps
        for statistic in (mean, variance):
            sum_over_ranks(statistic).div_(world_size())
