"""Parsers for structured flags: recipes with parameters, boxes, named folders."""

import argparse
from pathlib import Path
from typing import NamedTuple

from dataset.specs import AUDIO_RECIPES, RESERVED, AudioRecipe, logmel
from utils.cli import path_name

RATE, BANDS = 16_000, 64  # defaults of `--audio_recipe logmel`
LOGMEL_TYPES = {"rate": int, "seconds": float, "bands": int, "hop": int}


class RecipeFlag(NamedTuple):
    """`--audio_recipe`: a name of `AUDIO_RECIPES` or "none", and the parameters given with `logmel`."""

    name: str
    fields: dict

    def recipe(self, seconds: float) -> AudioRecipe | None:
        """The recipe, None for "none". `seconds` is the length of `logmel` where the flag gives none."""
        if self.name != "logmel":
            return AUDIO_RECIPES.get(self.name)
        fields = {"rate": RATE, "seconds": seconds, "bands": BANDS} | self.fields
        fields.setdefault("hop", max(1, round(fields["rate"] / 100)))
        return logmel(**fields)


def recipe_flag(text: str) -> RecipeFlag:
    """An argparse type: `fbank`, `logstft`, `none`, `logmel` or `logmel:rate=16000:seconds=1:bands=64:hop=160`."""
    name, *options = text.split(":")
    if name not in (*AUDIO_RECIPES, "none"):
        raise argparse.ArgumentTypeError(f"{name!r} is unknown; allowed: {', '.join(AUDIO_RECIPES)}, none")
    fields = {}
    for option in options:
        key, equals, value = option.partition("=")
        if name != "logmel" or key not in LOGMEL_TYPES or not equals:
            allowed = ", ".join(f"{key}=" for key in LOGMEL_TYPES) if name == "logmel" else "none"
            raise argparse.ArgumentTypeError(f"{option!r} is no parameter of {name}; allowed: {allowed}")
        try:
            fields[key] = LOGMEL_TYPES[key](value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{key} {value!r} is no number") from None
    flag = RecipeFlag(name, fields)
    try:
        flag.recipe(seconds=1.0)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return flag


def box(text: str) -> tuple[int, int, int, int]:
    """An argparse type: `x,y,width,height` in pixels of the source."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4 or not all(part.isascii() and part.isdecimal() and len(part) < 6 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not x,y,width,height in pixels, such as 100,165,120,80")
    x, y, width, height = map(int, parts)
    if min(width, height) < 8:
        raise argparse.ArgumentTypeError(f"{text!r}: width and height are at least 8 pixels")
    return x, y, width, height


class ArraysFlag(NamedTuple):
    """`--arrays NAME=DIR[,KIND]`. `kind` is "array" or "sequence", None for "as the files are"."""

    name: str
    folder: Path
    kind: str | None


def arrays_flag(text: str) -> ArraysFlag:
    """An argparse type: `text=DIR`, `text=DIR,sequence` or `text=DIR,array`."""
    name, equals, rest = text.partition("=")
    if not (equals and rest and name.isidentifier()) or name in RESERVED:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR with a plain word as name, such as text=features")
    folder, _, kind = rest.rpartition(",")
    if kind not in ("array", "sequence") or not folder:
        folder, kind = rest, None
    return ArraysFlag(name, Path(path_name(folder)), kind)
