"""Balance methods as plug-ins: `--balance NAME[:OPTION=VALUE...][,NAME...]` with baseline or remix.

A method is one file with one class (balance/method.py defines its hooks) and one line in `METHODS` below.
`python -m balance` lists methods and options; docs/balance.md has the paper, formula and deviations of each method.
"""

import argparse
from argparse import Namespace

from balance.agm import AGM
from balance.cml import CML
from balance.dgl import DGL
from balance.gblend import GBlend
from balance.greedy import Greedy
from balance.inforeg import InfoReg
from balance.lfm import LFM
from balance.method import Balance, Context, Method, Option, Step
from balance.midas import MIDAS
from balance.mla import MLA
from balance.mmcosine import MMCosine
from balance.mmpareto import MMPareto
from balance.ogm_ge import OGMGE
from balance.opm import OPM
from balance.pmr import PMR
from balance.reconboost import ReconBoost
from balance.relearn import Relearn
from balance.resample import Resample
from balance.umt import UMT
from models import MODELS, SLICED, MultimodalClassifier
from utils.errors import UserError
from utils.graphs import compiles_encoders

__all__ = ["METHODS", "Balance", "Context", "Method", "Option", "Step", "make_balance", "replace_heads", "settle"]

# Methods are applied in this order, regardless of their order in the flag. Relearn comes first: it changes encoders
# before an epoch, and PMR and G-Blend measure them after that.
METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(Relearn, MMCosine, OPM, AGM, PMR, GBlend, MMPareto, OGMGE),
        *(MLA, Resample, Greedy, ReconBoost, DGL, LFM, UMT, CML, MIDAS, InfoReg),
    )
}

# ---------------------------------------------------------------------------------------------------------- options


def parse(text: str) -> dict[str, dict[str, str]]:
    """The chosen methods, in the order of `METHODS`, each with the options given, as typed.

    `ogm_ge:alpha=0.8:noise=off,pmr` -> {"pmr": {}, "ogm_ge": {"alpha": "0.8", "noise": "off"}}. "+" separates methods
    as "," does, because `run_compare.sh --grid` splits its values at commas. Raises `UserError` for an unknown method
    or a malformed option.
    """
    found: dict[str, dict[str, str]] = {}
    for item in text.replace("+", ",").split(","):
        name, *pairs = item.split(":")
        if name not in (*METHODS, "none"):
            raise UserError(f"--balance {name}: unknown; allowed: none, {', '.join(METHODS)}")
        allowed = [] if name == "none" else [option.name for option in METHODS[name].options]
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if key not in allowed or not equals:
                of = f"its options: {', '.join(allowed)}" if allowed else "it has no options"
                raise UserError(f"--balance {name}: {pair!r} must be OPTION=VALUE; {of} (python -m balance)")
            found.setdefault(name, {})[key] = value
        found.setdefault(name, {})
    if "none" in found and len(found) > 1:
        raise UserError(f"--balance {text}: none cannot be combined with other methods")
    return {name: found[name] for name in METHODS if name in found}


def values_of(name: str, given: dict[str, str], dataset: str) -> dict:
    """Every option of a method with its value. Raises `UserError` naming the option whose value is wrong."""
    values = {}
    for option in METHODS[name].options:
        values[option.name] = option.default_for(dataset)
        if option.name in given:
            text = given[option.name]
            try:
                values[option.name] = option.type(text)
            except argparse.ArgumentTypeError as error:
                raise UserError(f"--balance {name}:{option.name}={text}: {error}") from None
            if option.choices and text not in option.choices:
                allowed = ", ".join(option.choices)
                raise UserError(f"--balance {name}:{option.name}={text}: unknown; allowed: {allowed}")
    return values


def settle(args: Namespace, names: tuple[str, ...]) -> None:
    """Write the canonical `--balance` and `balance_options` into `args`, given the dataset's modalities.

    Raises `UserError` for methods that cannot run under these flags.
    """
    given = parse(args.balance)
    words = (":".join([name, *(f"{key}={value}" for key, value in own.items())]) for name, own in given.items())
    args.balance = ",".join(words) or "none"
    args.balance_options = {name: values_of(name, own, args.dataset) for name, own in given.items()}
    for i, name in enumerate(given):
        _refuse(args, names, METHODS[name], [METHODS[other] for other in list(given)[:i]])


def _refuse(args: Namespace, names: tuple[str, ...], method: type[Method], others: list[type[Method]]) -> None:
    for other in others:
        why = method.conflicts.get(other.name) or other.conflicts.get(method.name)
        for one, splitting in ((method, other), (other, method)):
            if splitting.splits_joint and one.acts_in == ("joint",):
                why = why or f"{one.name} acts in joint batches, and {splitting.name} splits them by modality"
        if not why and (shared := method.owns & other.owns):
            why = f"both replace the {min(shared)}"
        if why:
            raise UserError(f"--balance {other.name},{method.name}: {why}; choose one")
    reason = None
    if args.method not in ("baseline", "remix"):
        reason = f"there is nothing to balance in --method {args.method}; use it with baseline or remix"
    elif method.two_modalities and len(names) > 2:
        reason = f"is defined for two modalities, and the dataset has {len(names)} ({', '.join(names)})"
    elif method.needs_heads and args.unimodal == "masked":
        reason = "needs unimodal heads, which --unimodal masked trains none of; leave the flag out"
    elif method.needs_fusion and not MODELS[args.model].fuses:
        reason = f"needs a joint head on the features alone, which --model {args.model} does not have"
    elif method.needs_slices and not MODELS[args.model].fuses:
        reason = (f"needs joint logits that are one part per modality, which --model {args.model} does not have; use "
                  "another --model")  # fmt: skip
    elif method.needs_slices and args.fusion_method not in SLICED:
        reason = (f"needs joint logits that are one part per modality, which --fusion_method {args.fusion_method} "
                  f"does not have; use --fusion_method {' or '.join(SLICED)}")  # fmt: skip
    elif args.train and not method.compiles and compiles_encoders(args.compile):
        reason = "cannot act in a compiled network; leave --compile out"
    elif args.train:
        reason = method.refuse(args, Namespace(**args.balance_options[method.name]))
    if reason:
        raise UserError(f"--balance {method.name}: {reason}")


def needs_validation(args: Namespace) -> list[str]:
    """The chosen methods that need a validation part."""
    return [name for name, own in args.balance_options.items() if METHODS[name].needs_validation(Namespace(**own))]


def modernise(config: dict) -> dict:
    """Convert a checkpoint's config: earlier versions stored the methods' options as flags, not in `balance`."""
    if "balance" not in config or "balance_options" in config:
        return config
    words = []
    for name in parse(config["balance"]):
        start = {"ogm_ge": "ogm"}.get(name, name)  # ogm_alpha, dr_every, ...
        found = {option.name: config.get(f"{start}_{option.name}") for option in METHODS[name].options}
        own = (f"{key}={str(value).replace(',', '/')}" for key, value in found.items() if value is not None)
        words.append(":".join([name, *own]))
    return config | {"balance": ",".join(words) or "none"}


def replace_heads(model: MultimodalClassifier, args: Namespace) -> None:
    """Install the heads of the chosen methods. Call it before weights are loaded, in training and in evaluation."""
    for name, own in args.balance_options.items():
        METHODS[name].replace_heads(model, Namespace(**own))


def make_balance(context: Context) -> Balance:
    """The methods chosen in `context.args`."""
    return Balance(METHODS[name](context) for name in context.args.balance_options)


def notes(args: Namespace) -> list[str]:
    """Notes printed before the run."""
    scaling = [name for name in args.balance_options if METHODS[name].scales_gradients]
    if not scaling or args.optimizer == "sgd":
        return []
    return [f"note: {', '.join(scaling)} scales gradients, and {args.optimizer} divides a constant scale out again: "
            "only its changes from step to step act; the papers use --optimizer sgd"]  # fmt: skip
