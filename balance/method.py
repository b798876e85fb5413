"""Base class of balance methods: optional hooks, called by the training loop of train.py in this order:

    start_epoch                                      once an epoch, before Remix scores
    plan                                             once an epoch, after Remix made its batches
    before_forward -> (network) -> outputs -> losses -> backward -> after_backward -> (optimizer)      each batch

A batch feeds all modalities ("joint"), one ("homogeneous", Remix's), or to each clip its own ("mixed", of `--reassemble
off` and of methods that mask clip by clip). A method says in `acts_in` in which of them it acts; in the others none of
its hooks is called. What it keeps from epoch to epoch goes through `state_dict`, and what it draws comes from
`generator`, so that a run resumed after any epoch continues bit for bit.

Shapes: B clips of a batch on this process, C classes, M modalities, D_m features of modality m.
"""

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from models import MultimodalClassifier, Output
from models.batchnorm import reestimate
from models.fusion import Concat, Decision, Sum
from models.inference import aside, collect
from remix import Batch
from utils.acceleration import compiled
from utils.distributed import gather_in_order, rank, sum_over_ranks, world_size
from utils.seeding import step_generator


class Option(NamedTuple):
    """One option of a method, given as `--balance method:name=value`. `by_dataset` holds published defaults."""

    name: str
    type: Callable[[str], Any]
    default: Any
    help: str
    choices: tuple = ()
    by_dataset: dict = {}  # noqa: RUF012  (never written to)

    def default_for(self, dataset: str) -> Any:
        return self.by_dataset.get(dataset, self.default)


class Context(NamedTuple):
    """The parts of a run that a method can use.

    model: the bare network; clips: the parts train, test and, where there is one, val (no method reads test); args:
    every flag of train.py; optimizer: the run's; train_epoch: train.py's own, for methods that train a copy;
    check(): raises if the run was asked to stop.
    """

    model: MultimodalClassifier
    clips: dict
    args: Namespace
    optimizer: torch.optim.Optimizer
    train_epoch: Callable[..., Any]
    check: Callable[[], None]


class ClipBatchLike(Protocol):
    """The attributes used of a `dataset.clips.ClipBatch`."""

    @property
    def clips(self) -> Tensor: ...
    @property
    def fed(self) -> tuple[str, ...]: ...
    @property
    def inputs(self) -> Mapping[str, Any]: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def total(self) -> int: ...
    @property
    def share(self) -> float: ...
    @property
    def mask(self) -> Tensor | None: ...
    @property
    def weight(self) -> float: ...


class Step(NamedTuple):
    """One batch as the hooks see it.

    batch: its place in the epoch's plan; source: this process's share of it (`dataset.clips.ClipBatch`); joint: whether
    every clip is fed all modalities. The other attributes are those of `source`: clips (B,) indices into the training
    part, the modalities fed, their inputs, labels (B,), in a mixed batch the mask (B, M), share: this process's part of
    the batch, total: clips over all processes, clip_weight: what each clip here counts in a sum over processes.
    """

    epoch: int
    batch: int
    source: ClipBatchLike
    joint: bool

    @property
    def kind(self) -> str:
        """ "joint", "homogeneous" or "mixed"."""
        return "joint" if self.joint else "mixed" if self.mask is not None else "homogeneous"

    @property
    def clips(self) -> Tensor:
        return self.source.clips

    @property
    def fed(self) -> tuple[str, ...]:
        return self.source.fed

    @property
    def inputs(self) -> Mapping[str, Any]:
        return self.source.inputs

    @property
    def labels(self) -> Tensor:
        return self.source.labels

    @property
    def mask(self) -> Tensor | None:
        return self.source.mask

    @property
    def share(self) -> float:
        return self.source.share

    @property
    def total(self) -> int:
        return self.source.total

    @property
    def clip_weight(self) -> float:
        return self.source.weight

    @property
    def weight(self) -> float:
        """Of this process's mean loss, so that averaging the processes' gradients gives the whole batch's mean."""
        return self.share * world_size()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the batch's clips (the first dimension), those of the other processes included. No gradient."""
        return sum_over_ranks(values.detach().float().sum(0) * self.clip_weight)

    def own(self, values: Tensor) -> Tensor:
        """This process's rows of `values` (total, ...), drawn for the whole batch in the plan's order."""
        return values[rank() :: world_size()] if self.total >= world_size() else values

    def gather(self, values: Tensor) -> Tensor:
        """(B, ...) of each process's clips -> (total, ...) of the whole batch in the plan's order, with gradient.

        For losses between clips. They come out the same on every process: add them as `loss / step.weight`.
        """
        return gather_in_order(values, self.total)

    def given(self, name: str, names: tuple[str, ...]) -> Tensor | None:
        """(B,) bool: which clips of a mixed batch are given the modality `name` of all `names`; None: all are."""
        return None if self.mask is None else self.mask[:, names.index(name)]

    def masks(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Of a mixed batch, which clips (B,) bool are given each of all modalities `names`; of another batch, {}."""
        return {} if self.mask is None else dict(zip(names, self.mask.unbind(1), strict=True))

    def mean(self, values: Tensor, given: Tensor | None = None) -> Tensor:
        """The mean over this process's clips of values (B,), counting 0 for the clips not in `given` (B,) bool."""
        return values.mean() if given is None else (values * given).mean()


class Method:
    """A balance method that does nothing: every hook returns its input."""

    name = ""  # the name given to --balance
    options: tuple[Option, ...] = ()
    acts_in: tuple[str, ...] = ("joint", "homogeneous")
    owns: frozenset[str] = frozenset()  # of "head", "backward", "loss weights", "plan": each has one owner in a run
    conflicts: dict[str, str] = {}  # noqa: RUF012  # method it cannot be combined with -> why
    needs_fusion = False  # it calls the joint head on features alone: not for joint heads that need other inputs
    needs_heads = False  # of unimodal heads: it reads or changes their losses
    needs_slices = False  # a fusion whose logits are one part per modality: concat, sum, decision
    two_modalities = False  # defined for exactly two modalities: no rule for more is published
    splits_joint = False  # its plan has no joint batches: methods that act only in those are refused with it
    compiles = True  # False: its changes to the forward pass are lost, or fail, in a compiled network
    scales_gradients = False  # a constant factor on a gradient cancels in Adam: the run prints a note

    def __init__(self, context: Context):
        self.context, self.model = context, context.model
        self.names = self.model.names
        self.opt = Namespace(**context.args.balance_options.get(self.name, {}))
        self.sums: dict[str, Tensor] = {}  # what `note` gathered in this epoch: (sum, count)

    # ---- before a run

    @classmethod
    def refuse(cls, args: Namespace, opt: Namespace) -> str | None:
        """Why the method cannot run under these flags and options, in one line; None if it can."""
        return None

    @classmethod
    def needs_validation(cls, opt: Namespace) -> bool:
        """Whether the method needs a validation part."""
        return False

    @classmethod
    def replace_heads(cls, model: MultimodalClassifier, opt: Namespace) -> None:
        """Replace heads of the network, for training and inference; parameters added here are trained and saved.

        `OFFICIAL_NAMES` of models/checkpoint.py apply to their names. Raises `UserError` for a network it does not fit.
        """

    # ---- in a run

    def start_epoch(self, epoch: int) -> None:
        """Once at the start of an epoch, before Remix scores."""

    def plan(self, plan: list[Batch], epoch: int) -> list[Batch]:
        """Edit the epoch's batches: joint ones in the warm-up and without Remix, else those that Remix made.

        All processes must return the same plan. Draw from `epoch_draws`."""
        return plan

    def before_forward(self, step: Step) -> None:
        """Before the network sees the batch."""

    def outputs(self, output: Output, step: Step) -> Output:
        """Edit what the network returned."""
        return output

    def losses(self, terms: dict[str, Tensor], output: Output, step: Step) -> dict[str, Tensor]:
        """Edit the loss terms, each a mean over this process's clips; terms may be added. Their sum is minimised."""
        return terms

    def backward(self, loss: Tensor, terms: dict[str, Tensor], step: Step) -> None:
        """Compute `.grad`; called only for the owner of "backward". Must call `loss.backward()`, because that call
        averages the gradients over processes."""
        loss.backward()

    def after_backward(self, output: Output, step: Step) -> None:
        """Edit `.grad` in place: averaged over the processes. Use `step.fed`: a masked encoder's gradient is None or
        zero (`--masked_encoder`)."""

    # ---- what it keeps

    def state_dict(self) -> dict:
        """Tensors, numbers, dicts and lists that `load_state_dict` puts back, after an epoch."""
        return {}

    def load_state_dict(self, state: dict) -> None: ...

    # ---- tools

    def generator(self, step: Step, device: torch.device | str = "cpu") -> torch.Generator:
        """This method's random numbers of this step, the same on every process."""
        return step_generator(self.context.args.random_seed, step.epoch, step.batch, "balance", self.name, device)

    def epoch_draws(self, epoch: int) -> torch.Generator:
        """This method's random numbers of an epoch, on the CPU, the same on every process."""
        return step_generator(self.context.args.random_seed, epoch, 0, "balance", self.name)

    def note(self, name: str, value: Tensor | float, counts: Tensor | None = None) -> None:
        """Report the epoch's mean of `value` (a number, best on the device, the same on every process) in
        metrics.jsonl. `counts` () bool: whether this value counts; the host need not know."""
        old, value = self.sums.get(name), torch.as_tensor(value, dtype=torch.float32).detach()
        count = torch.ones((), device=value.device)
        if counts is not None:
            value, count = torch.where(counts, value, 0.0), count * counts
        new = torch.stack([value, count])
        self.sums[name] = new if old is None else old.to(value.device) + new

    def reestimate(self, network: nn.Module, fed: tuple[str, ...], epoch: int) -> None:
        """Re-estimate BatchNorm after a change of weights, as train.py does after an epoch."""
        args = self.context.args
        if args.batchnorm == "refreshed":
            reestimate(network, self.context.clips["train"], fed, args.batch_size, args.random_seed, epoch)

    def slices(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each modality's part of the joint logits (B, C). Only for methods that say `needs_slices`."""
        assert isinstance(self.model.head, Concat | Sum | Decision)
        return self.model.head.slices(features)

    def features(self, part: str, clips: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Features (n, D_m) of every modality of the given clips of a part, over all processes: evaluation mode, no
        gradient; augmented with a `generator`."""
        plan = [Batch(indices, self.names) for indices in clips.split(4 * self.context.args.batch_size)]
        source = self.context.clips[part]
        with aside(self.model), compiled(False):  # each of these batch sizes would be compiled
            found = collect(self.model, source.epoch(plan, generator), len(source)).features
        return {name: values[clips.to(source.device)] for name, values in found.items()}


class Balance:
    """The balance methods of a run, called by train.py's loop. Without methods, every hook returns its input."""

    def __init__(self, methods: Iterable[Method] = ()):
        self.methods = list(methods)

    def _acting(self, step: Step) -> list[Method]:
        return [method for method in self.methods if step.kind in method.acts_in]

    def start_epoch(self, epoch: int) -> None:
        for method in self.methods:
            method.sums = {}
            method.start_epoch(epoch)

    def plan(self, plan: list[Batch], epoch: int) -> list[Batch]:
        for method in self.methods:
            plan = method.plan(plan, epoch)
        return plan

    def before_forward(self, step: Step) -> None:
        for method in self._acting(step):
            method.before_forward(step)

    def outputs(self, output: Output, step: Step) -> Output:
        for method in self._acting(step):
            output = method.outputs(output, step)
        return output

    def losses(self, terms: dict[str, Tensor], output: Output, step: Step) -> dict[str, Tensor]:
        for method in self._acting(step):
            terms = method.losses(terms, output, step)
        return terms

    def backward(self, loss: Tensor, terms: dict[str, Tensor], output: Output, step: Step) -> None:
        """Compute gradients into `.grad`, then let the methods modify them."""
        acting = self._acting(step)
        owner = next((method for method in acting if "backward" in method.owns), None)
        if owner:
            owner.backward(loss, terms, step)
        else:
            loss.backward()
        for method in acting:
            method.after_backward(output, step)

    def numbers(self) -> dict[str, float]:
        """Means over the epoch of what the methods noted, for metrics.jsonl."""
        found = {}
        for method in self.methods:
            for name, sums in method.sums.items():
                total, count = sums.tolist()
                if count:
                    found[f"balance/{method.name}_{name}"] = total / count
        return found

    def state_dict(self) -> dict:
        return {method.name: method.state_dict() for method in self.methods}

    def load_state_dict(self, state: dict) -> None:
        for method in self.methods:
            method.load_state_dict(state[method.name])


def label_scores(logits: dict[str, Tensor], step: Step) -> Tensor:
    """sum over the batch of softmax(o_m)[y] for each modality, (M,), over all processes: who is ahead."""
    found = [o.detach().float().softmax(1).gather(1, step.labels[:, None]) for o in logits.values()]  # M x (B, 1)
    return step.sum(torch.cat(found, dim=1))


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Freeze the parameters of `modules` in the block. Gradients still flow through the modules to their inputs."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def gradient(parameter: nn.Parameter) -> Tensor:
    """`parameter.grad`, for parameters that took part in a batch whose gradients are computed."""
    assert parameter.grad is not None
    return parameter.grad


def mean_over_ranks(values: Tensor) -> Tensor:
    """Average a separately computed gradient over processes, as `loss.backward()` averages those in `.grad`."""
    return sum_over_ranks(values) / world_size()


def never_joint(args: Namespace, first: int = 0, option: str = "") -> str | None:
    """Why a method of joint batches never acts from epoch `first` (set by `option`) onward; None if it does act."""
    joint = args.warmup if args.method == "remix" else args.epochs
    if first < joint:
        return None
    given = f"--warmup {args.warmup}" if args.method == "remix" else f"--epochs {args.epochs}"
    since = f" from epoch {first} ({option}={first}) on" if option else ""
    return f"acts in joint batches{since}, and with {given} there are none"
