"""Flags: types with a range, and mistakes as one line."""

import argparse
from collections.abc import Callable

from utils.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are a `UserError` instead of a page of usage."""

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
