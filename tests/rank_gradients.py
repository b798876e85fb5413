"""One of one or two processes: gradients, statistics and partition of a few batches in float64, for FOLDER/rank<r>.pth.

python tests/rank_gradients.py FOLDER <flags of train.py>
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from dataset.build import build_data
from models.batchnorm import synchronise_batchnorm
from remix import Batch
from utils import distributed


class Doubles:
    """Clips whose batches are float64: what is left of a difference is the order of sums."""

    def __init__(self, clips):
        self.clips = clips

    def __len__(self):
        return len(self.clips)

    def __getattr__(self, name):
        return getattr(self.clips, name)

    def epoch(self, *args):
        for batch in self.clips.epoch(*args):
            yield batch._replace(inputs={name: values.double() for name, values in batch.inputs.items()})


def counted(sent: list[int]):
    """Inside, append the bytes of each tensor of gradients that is reduced over processes: only these are awaited."""
    reduce = dist.all_reduce

    def all_reduce(values, *args, async_op=False, **options):
        if async_op:
            sent.append(values.nbytes)
        return reduce(values, *args, async_op=async_op, **options)

    return mock.patch.object(dist, "all_reduce", all_reduce)


def states(argv: list[str]) -> dict:
    """After each step of an epoch every gradient and buffer; then the epoch's numbers, and what scoring makes of it."""
    args = train.parse_args(argv)
    device = distributed.start(args.device)
    data = build_data(args, device)
    clips, names = Doubles(data.clips["train"]), data.spec.names
    torch.manual_seed(0)
    shape = (data.spec.modalities, data.folder.shapes, len(data.classes), args.encoder)
    model = train.build_model(*shape, model=args.model).double()
    synchronise_batchnorm(model, device)
    distributed.parallel(model, model.encoders.values())
    optimizer, steps, sent, scored = train.make_optimizer(model, args), [], [], {}

    def note() -> None:
        gradients = {name: p.grad if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        steps.append({"gradients": gradients, "buffers": buffers, "sent": sent.copy()})
        sent.clear()

    # Joint, homogeneous of either modality, mixed; shares that differ (odd sizes); a clip that every process has whole.
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(1))
    sizes, fed = (6, 5, 5, 7, 1), (names, names[:1], names[1:], names, names)
    plan = [Batch(part, own) for part, own in zip(order.split(sizes), fed, strict=True)]
    kept = torch.eye(2, dtype=torch.bool)[torch.arange(7) % 3 % 2]  # (7, 2): 5 clips keep the first modality
    plan[3] = plan[3]._replace(mask=kept)
    with counted(sent):
        numbers = train.train_epoch(model, clips, plan, optimizer, 0, args, after_step=note)
    distributed.same_buffers(model)
    run = SimpleNamespace(check=lambda: None, writes=False, partition=lambda *found: scored.update(kl=found[3]))
    _, keep, counts = train.plan_epoch(model, data._replace(clips={"train": clips}), names, None, 0, args, run)
    note()  # the statistics that scoring estimated
    return {"steps": steps, "numbers": numbers, "keep": keep, "counts": counts, "kl": scored["kl"]}


if __name__ == "__main__":
    found = states(sys.argv[2:])
    torch.save(found, Path(sys.argv[1]) / f"rank{distributed.rank()}.pth")
    distributed.stop()
