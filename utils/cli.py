"""Flags: types with a range, and mistakes as one line."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from utils.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are a `UserError` instead of a page of usage."""

    def typed(self, argv: list[str] | None = None) -> set[str]:
        """The flags that stand on the command line, by name."""
        words = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
        return {action.dest for option, action in self._option_string_actions.items() if option in words}

    def error(self, message: str) -> None:
        raise UserError(f"{message}; all flags: --help")


def number(kind: type, low: float, high: float = float("inf"), open_low: bool = False) -> Callable[[str], float]:
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
        raise argparse.ArgumentTypeError(f"{text[:80]!a} is no name of a file or folder")
    return text


def id_list(text: str) -> str:
    """An argparse type: comma separated numbers, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 6 for part in parts) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"{text}: comma separated numbers are wanted, each once, such as 0,1")
    return text


def interval(text: str) -> str:
    """An argparse type: `5` or `5epochs`, or `200steps`; in full, as `interval_of` takes it apart."""
    unit = "steps" if text.endswith(("step", "steps")) else "epochs"
    count = text.removesuffix("s").removesuffix(unit[:-1])
    if not (count.isascii() and count.isdecimal() and 1 <= int(count[:10]) <= 10**9):
        raise argparse.ArgumentTypeError(f"{text!r}: epochs as in 5, or steps as in 200steps, are wanted, at least 1")
    return f"{int(count[:10])}{unit}"


def interval_of(text: str) -> tuple[int, str]:
    """What `interval` returned as (count, "epochs" or "steps")."""
    unit = "steps" if text.endswith("steps") else "epochs"
    return int(text.removesuffix(unit)), unit


def resume_command(words: list[str], run_name: str, own_launch: bool) -> str:
    """What to type to go on with the run that the flags `words` started.

    `own_launch`: train.py starts its processes itself (--gpu_ids), so there is no torchrun to type.
    """
    program = sys.argv[0] if Path(sys.argv[0]).name == "train.py" else "train.py"
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    start = ["python"] if own_launch or local == "1" else ["torchrun", f"--nproc_per_node={local}"]
    kept = [word for before, word in zip(["", *words], words, strict=False)
            if "--checkpoint" not in (before, word) and not word.startswith("--checkpoint=")]  # fmt: skip
    if not any(word == "--run_name" or word.startswith("--run_name=") for word in kept):
        kept += ["--run_name", run_name]
    return shlex.join([*start, program, *kept, *(["--resume"] if "--resume" not in kept else [])])
