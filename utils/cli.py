"""Command-line parsing: types with ranges, abbreviations, one-line errors."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

from utils.errors import UserError

OTHER_NAMES = {"lr": "learning_rate", "seed": "random_seed", "bs": "batch_size", "workers": "num_workers",
               "gpus": "gpu_ids", "name": "run_name", "root": "data_root"}  # fmt: skip
FIGURE_FORMATS = ("png", "pdf", "svg")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are a `UserError` of one line, and which suggests the nearest flag."""

    def __init__(self, *args: Any, abbreviated: Sequence[str] = (), **kwargs: Any):
        """`abbreviated`: flags that may be typed as any of their unambiguous beginnings."""
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.abbreviated = tuple(abbreviated)

    @cached_property
    def names(self) -> set[str]:
        """Every flag's name, as of the first use: flags are added before. A positional argument must be optional."""
        return set(vars(super().parse_known_args([])[0]))

    def typed(self, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """The flags that are on the command line, with their values."""
        nothing = object()
        found = self.parse_args(argv, argparse.Namespace(**dict.fromkeys(self.names, nothing)))
        return {name: value for name, value in vars(found).items() if value is not nothing}

    # It accepts what each overload of the base class accepts.
    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        words = [self._whole(word) for word in (sys.argv[1:] if args is None else args)]
        found, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self.error(self._unknown(unknown))
        return found

    def _whole(self, word: str) -> str:
        """An abbreviated flag in full."""
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name or name in self.names:
            return word
        matches = [flag for flag in self.abbreviated if flag.startswith(name)]
        return f"--{matches[0]}{equals}{value}" if len(matches) == 1 else word

    def _unknown(self, words: list[str]) -> str:
        flags = [word for word in words if word.startswith("-")]
        name = (flags or words)[0].lstrip("-").partition("=")[0]
        names = sorted(self.names)
        longer = [flag for flag in names if flag.startswith(name)] if len(name) > 2 else []
        near = OTHER_NAMES.get(name) or next(iter(longer + difflib.get_close_matches(name, names)), None)
        suggestion = f"; did you mean --{near}?" if near in names else ""
        return f"unrecognized arguments: {' '.join(words)}{suggestion}"

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; all flags: --help")


Parse = Callable[[str], Any]


def number(kind: Parse, low: float, high: float = float("inf"), open_low: bool = False) -> Parse:
    """An argparse type: an int or float in [low, high], or in (low, high] with `open_low`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
        if not (low <= value <= high) or (open_low and value == low) or value == float("inf"):
            at_most = f" and {high} at most" if high < float("inf") else ""
            raise argparse.ArgumentTypeError(f"{text}: must be {'above' if open_low else 'at least'} {low}{at_most}")
        return value

    return parse


def path_name(text: str) -> str:
    """An argparse type: something that can name a file or folder. Whether it is there is its reader's business."""
    if not text.strip() or "\0" in text or len(os.fsencode(text)) > 4095:
        raise argparse.ArgumentTypeError(f"{text[:80]!a} cannot name a file or folder")
    return text


def id_list(text: str) -> str:
    """An argparse type: comma separated numbers, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 6 for part in parts) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"{text}: must be comma separated numbers, each once, such as 0,1")
    return text


def format_list(text: str) -> tuple[str, ...]:
    """An argparse type: formats of figures, such as png,pdf. Each once; at least one."""
    names = tuple(dict.fromkeys(name.strip().lower() for name in text.split(",")))
    if unknown := [name for name in names if name not in FIGURE_FORMATS]:
        raise argparse.ArgumentTypeError(f"{text}: unknown format {unknown[0]!r}; allowed: {', '.join(FIGURE_FORMATS)}")
    return names


def per_modality(text: str) -> dict[str, str]:
    """`VALUE`, `audio=VALUE,video=VALUE` or both as {modality: value}; the value of all others is that of "".

    A value may hold commas and equals signs, as paths do: only a comma before `NAME=` starts the next entry. Raises
    `argparse.ArgumentTypeError` for an empty value, or a modality that is there twice.
    """
    found: dict[str, str] = {}
    for entry in re.split(r",(?=[^\W\d]\w*=)", text):
        match = re.match(r"([^\W\d]\w*)=(.*)", entry, re.DOTALL)
        name, value = match.groups() if match else ("", entry)
        if not value.strip():
            raise argparse.ArgumentTypeError(f"{text!r}: a value is missing; give VALUE, or NAME=VALUE,NAME=VALUE")
        if name in found:
            raise argparse.ArgumentTypeError(f"{text}: {name or 'the value of all modalities'} is there twice")
        found[name] = value
    return found


def each(parse: Parse) -> Parse:
    """An argparse type: one value of the type `parse`, or values of modalities, which stay a string."""

    def parse_all(text: str) -> Any:
        values = {name: parse(value) for name, value in per_modality(text).items()}
        return values[""] if tuple(values) == ("",) else text

    return parse_all


def factors(value: float | str, names: Sequence[str]) -> dict[str, float]:
    """Values per modality of a flag of the type `each(number(float, ...))`; 1 for modalities it does not name."""
    given = per_modality(str(value))
    return {name: float(given.get(name, given.get("", 1.0))) for name in names}


def with_default(text: str, default: str) -> str:
    """`default,audio=VALUE` of `audio=VALUE`: what the modalities that it does not name have is said as well."""
    return text if "" in per_modality(text) else f"{default},{text}"


def agree(given: Any, recorded: Any) -> bool:
    """Whether the value of a flag says nothing other than the recorded one, for some modalities or for all."""
    if isinstance(given, str) and isinstance(recorded, str) and given:
        return per_modality(given).items() <= per_modality(recorded).items()
    return given == recorded


def check_modalities(args: argparse.Namespace, names: Sequence[str], *flags: str) -> None:
    """Raise `UserError` where the value of one of `flags` names a modality that is not one of `names`."""
    for flag in flags:
        for name in per_modality(str(vars(args)[flag])):
            if name not in ("", *names):
                raise UserError(
                    f"--{flag} {vars(args)[flag]}: the dataset has no modality {name}; it has {', '.join(names)}"
                )
