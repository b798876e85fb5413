"""Other balance methods as plug-ins: `--balance NAME[,NAME]` beside `--method baseline` or `--method remix`.

A method is one file with one class (balance/method.py says what it may do) and one line in `METHODS` below.
docs/balance.md has each method's paper, formula, flags and departures, and how to add one.
"""

from argparse import ArgumentParser, Namespace

from torch import Tensor

from balance.agm import AGM
from balance.gblend import GBlend
from balance.method import Method, Run, Step
from balance.mmcosine import MMCosine
from balance.mmpareto import MMPareto
from balance.ogm_ge import OGMGE
from balance.opm import OPM
from balance.pmr import PMR
from balance.relearn import Relearn
from models import AVClassifier, Output
from utils.errors import UserError

__all__ = ["METHODS", "Balance", "Method", "Run", "Step", "add_flags", "flag_owners", "settle"]

# Their order is that in which they act, whatever order is typed. Relearn changes encoders before an epoch, so what PMR
# and G-Blend measure there comes after it.
METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Relearn, MMCosine, OPM, AGM, PMR, GBlend, MMPareto, OGMGE)
}
SLICED = ("concat", "sum")  # fusions whose logits are one part per modality

# ---------------------------------------------------------------------------------------------------------- flags


def add_flags(parser: ArgumentParser) -> None:
    g = parser.add_argument_group("balance (docs/balance.md)")
    g.add_argument("--balance", default="none", metavar="NAME[,NAME]",
                   help=f"balance methods beside --method baseline or remix: {', '.join(METHODS)} (none)")  # fmt: skip
    for name, method in METHODS.items():
        for flag in method.flags:
            others = "".join(f"; {data} {_short(value)}" for data, value in flag.by_dataset.items())
            default = f" ({_short(flag.default)}{others})" if flag.default is not None else ""
            g.add_argument(f"--{flag.name}", type=flag.type, choices=flag.choices or None,
                           metavar=None if flag.choices else "X", help=f"{name}: {flag.help}{default}")  # fmt: skip


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def flag_owners() -> dict[str, str]:
    """Every method's flags -> the method."""
    return {flag.name: name for name, method in METHODS.items() for flag in method.flags}


def chosen(text: str) -> list[str]:
    """The methods named in `text`, in the order of `METHODS`. Raises `UserError` for an unknown one.

    "+" parts names as "," does: `run_compare.sh --grid` splits its values at commas.
    """
    names = text.replace("+", ",").split(",")
    for name in names:
        if name not in (*METHODS, "none"):
            raise UserError(f"--balance {name}: unknown; allowed: none, {', '.join(METHODS)}")
    if "none" in names and len(names) > 1:
        raise UserError(f"--balance {text}: none stands alone")
    return [name for name in METHODS if name in names]


def settle(args: Namespace) -> None:
    """Write the chosen methods' names and defaults into `args`. Raises `UserError` for what does not go together."""
    names = chosen(args.balance)
    args.balance = ",".join(names) or "none"
    for flag, owner in flag_owners().items():
        if owner not in names and getattr(args, flag) is not None:
            raise UserError(f"--{flag}: a flag of --balance {owner}, which is not chosen; type --balance {owner}, "
                            "or leave the flag out")  # fmt: skip
    for flag in (flag for name in names for flag in METHODS[name].flags):
        if getattr(args, flag.name) is None:
            args.from_preset[flag.name] = flag.default_for(args.dataset)
            setattr(args, flag.name, args.from_preset[flag.name])
    for i, name in enumerate(names):
        _refuse(args, METHODS[name], [METHODS[other] for other in names[:i]])


def _refuse(args: Namespace, method: type[Method], others: list[type[Method]]) -> None:
    reason = None
    for other in others:
        why = method.conflicts.get(other.name) or other.conflicts.get(method.name)
        if not why and (shared := method.owns & other.owns):
            why = f"each of them has the {min(shared)} to itself"
        if why:
            raise UserError(f"--balance {other.name},{method.name}: {why}; choose one")
    if args.method not in ("baseline", "remix"):
        reason = f"there is nothing to balance in --method {args.method}; use it with baseline or remix"
    elif method.needs_slices and args.fusion_method not in SLICED:
        reason = (f"needs joint logits that are one part per modality, which --fusion_method {args.fusion_method} "
                  f"has not; type --fusion_method {' or '.join(SLICED)}")  # fmt: skip
    elif args.train and not method.compiles and getattr(args, "compile", False):
        reason = "cannot act in a compiled network; leave --compile out"
    reason = reason or (method.refuse(args) if args.train else None)
    if reason:
        raise UserError(f"--balance {method.name}: {reason}")


def needs_validation(args: Namespace) -> list[str]:
    """The chosen methods that measure on a validation part."""
    return [name for name in chosen(args.balance) if METHODS[name].needs_validation(args)]


def adopt(args: Namespace, config: dict, checkpoint: str) -> None:
    """Evaluate a checkpoint as it was trained: take --balance and its flags from its `config`.

    Raises `UserError` if others were typed; a checkpoint that says nothing (the official code's) takes what was typed.
    """
    if "balance" not in config:
        return
    flags = [flag for flag, owner in flag_owners().items() if owner in chosen(config["balance"])]
    typed = {name: value for name, value in vars(args).items() if name in flags and name not in args.from_preset}
    typed |= {"balance": args.balance} if args.balance != "none" else {}
    for name, value in typed.items():
        if value is not None and value != config.get(name, value):
            raise UserError(f"--{name} {value}: {checkpoint} was trained with --{name} {config[name]}; leave it out")
    args.balance = config["balance"]
    # A checkpoint may be older than a flag: it was trained as the flag's default has it.
    defaults = {flag.name: flag.default_for(args.dataset) for method in METHODS.values() for flag in method.flags}
    vars(args).update({name: config.get(name, defaults[name]) for name in flags})


def replace_heads(model: AVClassifier, args: Namespace) -> None:
    """The heads of the chosen methods, before weights are loaded, for training and evaluation alike."""
    for name in chosen(args.balance):
        METHODS[name].replace_heads(model, args)


def notes(args: Namespace) -> list[str]:
    """What the user should know before the run."""
    scaling = [name for name in chosen(args.balance) if METHODS[name].scales_gradients]
    if not scaling or args.optimizer != "adam":
        return []
    return [f"note: {', '.join(scaling)} scales gradients, and Adam divides a constant scale out again: only its "
            "changes from step to step act; the papers use --optimizer sgd"]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- hooks


class Balance:
    """The methods of a run, as train.py's loop calls them; with none of them every hook hands on what it was given."""

    def __init__(self, methods: list[Method] = ()):
        self.methods = list(methods)

    @classmethod
    def of(cls, run: Run) -> "Balance":
        return cls([METHODS[name](run) for name in chosen(run.flags.balance)])

    def _acting(self, step: Step) -> list[Method]:
        return [method for method in self.methods if step.kind in method.acts_in]

    def start_epoch(self, epoch: int) -> None:
        for method in self.methods:
            method.start_epoch(epoch)

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
        """Gradients into `.grad`, and whatever the methods make of them."""
        acting = self._acting(step)
        owner = next((method for method in acting if "backward" in method.owns), None)
        if owner:
            owner.backward(loss, terms, step)
        else:
            loss.backward()
        for method in acting:
            method.after_backward(output, step)

    def numbers(self) -> dict[str, float]:
        """Means over the epoch of what the methods noted, for metrics.jsonl; starts anew."""
        found = {}
        for method in self.methods:
            for name, sums in method.sums.items():
                total, count = sums.tolist()
                found[f"balance/{method.name}_{name}"] = total / count
            method.sums = {}
        return found

    def state_dict(self) -> dict:
        return {method.name: {"state": method.state_dict(), "sums": method.sums} for method in self.methods}

    def load_state_dict(self, state: dict) -> None:
        for method in self.methods:
            method.load_state_dict(state[method.name]["state"])
            method.sums = dict(state[method.name]["sums"])
