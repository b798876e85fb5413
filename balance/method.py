"""What a balance method is: a class with hooks, each optional, called by the one loop of train.py in this order:

    start_epoch                                      once an epoch, before Remix scores
    before_forward -> (network) -> outputs -> losses -> backward -> after_backward -> (optimizer)      each batch

A batch holds both modalities ("joint") or one ("homogeneous", Remix's). A method says in `acts_in` in which of the two
it acts; in the others none of its hooks is called. What it keeps from batch to batch goes through `state_dict`, and
what it draws comes from `generator`, so that a run resumed at any step goes on bit for bit.

Shapes: B clips of a batch on this process, C classes, D features per modality.
"""

from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models import AVClassifier, Output
from utils.acceleration import compiled
from utils.diagnostics import aside, collect
from utils.distributed import sum_over_ranks, world_size
from utils.seeding import step_generator

MODALITIES = ("audio", "video")


class Flag(NamedTuple):
    """One flag of a method, typed as `--name`. `by_dataset` holds defaults where the literature has others."""

    name: str
    type: Callable
    default: object
    help: str
    choices: tuple = ()
    by_dataset: dict = {}  # noqa: RUF012  (never written to)

    def default_for(self, dataset: str) -> object:
        return self.by_dataset.get(dataset, self.default)


class Run(NamedTuple):
    """What a method may use of a run.

    model: the bare network; clips: the parts train, test and, where there is one, val (no method reads test); flags:
    every flag of train.py; predict(network, part, kept): logits (N, C) of all heads in evaluation mode, no
    augmentation; train_copy(method, kept, epoch, epochs): a copy of the network, trained apart for `epochs` from the
    weights of now under that one method alone; refresh(epoch): BatchNorm's statistics estimated anew after a change of
    weights, with --batchnorm refreshed.
    """

    model: AVClassifier
    clips: dict
    flags: Namespace
    predict: Callable[..., dict[str, Tensor]]
    train_copy: Callable[..., AVClassifier]
    refresh: Callable[[int], None]


class Step(NamedTuple):
    """One batch as the hooks see it: its place in the epoch's plan, the modality it keeps (or both), labels (B,).

    share: this process's part of the batch, 0 if it got no clip and repeats one; total: clips over all processes.
    """

    epoch: int
    index: int
    kept: str
    labels: Tensor
    share: float
    total: int

    @property
    def kind(self) -> str:
        return "joint" if self.kept == "both" else "homogeneous"

    @property
    def weight(self) -> float:
        """Of this process's mean loss, so that averaging the processes' gradients gives the whole batch's mean."""
        return self.share * world_size()

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that are fed."""
        return MODALITIES if self.kept == "both" else (self.kept,)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the batch's clips (the first dimension), those of the other processes included. No gradient."""
        return sum_over_ranks(values.detach().float().sum(0) * float(self.share > 0))


class Method:
    """A balance method that does nothing: every hook hands on what it was given."""

    name = ""  # as typed after --balance
    flags: tuple[Flag, ...] = ()
    acts_in: tuple[str, ...] = ("joint", "homogeneous")
    owns: frozenset[str] = frozenset()  # of "head", "backward", "loss weights": each has one owner in a run
    conflicts: dict[str, str] = {}  # noqa: RUF012  # method it cannot stand beside -> why
    needs_slices = False  # a fusion whose logits are one part per modality: concat, sum
    compiles = True  # False: what it does to the network's pass is lost, or fails, where that is compiled
    scales_gradients = False  # a constant factor on a gradient cancels in Adam: the run says so

    def __init__(self, run: Run):
        self.run, self.model = run, run.model
        for flag in self.flags:
            setattr(self, flag.name, getattr(run.flags, flag.name))
        self.sums: dict[str, Tensor] = {}  # what `note` gathered in this epoch: (sum, count)

    # ---- before a run

    @classmethod
    def refuse(cls, flags: Namespace) -> str | None:
        """Why the method cannot run under these flags, in one line; None if it can."""
        return None

    @classmethod
    def needs_validation(cls, flags: Namespace) -> bool:
        """Whether it measures on a validation part."""
        return False

    @classmethod
    def replace_heads(cls, model: AVClassifier, flags: Namespace) -> None:
        """Put other heads in, for training and inference alike. The state dict's names must stay."""

    # ---- in a run

    def start_epoch(self, epoch: int) -> None:
        """Once at the start of an epoch, before Remix scores; not again when an epoch is resumed in its middle."""

    def before_forward(self, step: Step) -> None:
        """Before the network sees the batch."""

    def outputs(self, output: Output, step: Step) -> Output:
        """Edit what the network gave."""
        return output

    def losses(self, terms: dict[str, Tensor], output: Output, step: Step) -> dict[str, Tensor]:
        """Edit the terms whose sum is trained on, each a mean over this process's clips; more may be added."""
        return terms

    def backward(self, loss: Tensor, terms: dict[str, Tensor], step: Step) -> None:
        """Fill `.grad`; called for the owner of "backward" alone. Must call `loss.backward()`, which under several
        processes is what averages the gradients."""
        loss.backward()

    def after_backward(self, output: Output, step: Step) -> None:
        """Edit `.grad` in place: averaged over the processes. Go by `step.modalities`: a masked encoder's gradient is
        None or zero (`--masked_encoder`)."""

    # ---- what it keeps

    def state_dict(self) -> dict:
        """Tensors, numbers, dicts and lists that `load_state_dict` puts back."""
        return {}

    def load_state_dict(self, state: dict) -> None: ...

    # ---- tools

    def generator(self, step: Step, device: torch.device | str = "cpu") -> torch.Generator:
        """This method's random numbers of this step, the same on every process."""
        return step_generator(self.run.flags.random_seed, step.epoch, step.index, "balance", self.name, device)

    def note(self, name: str, value: Tensor) -> None:
        """Have the epoch's mean of `value` (a number on the device, the same on every process) in metrics.jsonl."""
        old = self.sums.get(name)
        new = torch.stack([value.detach().float(), torch.ones((), device=value.device)])
        self.sums[name] = new if old is None else old.to(value.device) + new

    def features(self, part: str, clips: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Features (n, D) of both modalities of the given clips of a part, over all processes: evaluation mode, no
        gradient; augmented with a `generator`."""
        size = 4 * self.run.flags.batch_size
        plan = [Fed(indices, "both") for indices in clips.split(size)]
        source = self.run.clips[part]
        with aside(self.model), compiled(False):  # these batches' sizes would each be compiled
            batches = source.epoch(plan, generator)
            found = collect(batches, lambda batch: self.model(batch.audio, batch.video, batch.kept), len(source))
        return {name: found[f"{name}_features"][clips.to(source.device)] for name in MODALITIES}


class Fed(NamedTuple):
    """A batch of a plan, as `dataset.clips.Clips.epoch` takes it."""

    clips: Tensor
    kept: str


def label_scores(logits: tuple[Tensor, Tensor], step: Step) -> Tensor:
    """sum over the batch of softmax(o_m)[y] for audio and video, (2,), over all processes: who is ahead."""
    found = [o.detach().float().softmax(1).gather(1, step.labels[:, None]) for o in logits]  # 2 x (B, 1)
    return step.sum(torch.cat(found, dim=1))


def mean_over_ranks(values: Tensor) -> Tensor:
    """What DistributedDataParallel would have made of a gradient taken aside."""
    return sum_over_ranks(values) / world_size()


def never_joint(flags: Namespace, first: int = 0, flag: str = "") -> str | None:
    """Why a method of joint batches would never act from epoch `first` (given by --flag) on; None if it would."""
    joint = flags.warmup if flags.method == "remix" else flags.epochs
    if first < joint:
        return None
    given = f"--warmup {flags.warmup}" if flags.method == "remix" else f"--epochs {flags.epochs}"
    since = f" from epoch {first} (--{flag}) on" if flag else ""
    return f"acts in joint batches{since}, and with {given} there are none"
