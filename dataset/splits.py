"""Splits without shared actors (or other groups of clips), and validation parts.

A split depends only on clip ids, labels and a seed, so it is the same on every machine. Random numbers come from
SHA-256, because the streams of NumPy's generators can change between versions.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from utils.errors import UserError

TRIALS = 500  # random choices of groups of which the most even one is taken; more gain < 0.1 point on CREMA-D

ACTOR_TEST_FRACTION = 0.1  # about what the published split has
VALIDATION_SEED = 0
ACTOR_SEED = 0  # fixed: there is one actor split, not one for every user


def actor_of(clip: str) -> str:
    """The actor of a CREMA-D clip: the first field of its id, `1001_DFA_ANG_XX` -> `1001`."""
    return clip.split("_", 1)[0]


def hold_out(labels: Sequence[int] | np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """(N,) bool, True for a random `fraction` of each class (rounded, but at least one clip where a class has two).

    Raises `UserError` unless 0 < fraction < 1 and both parts get a clip.
    """
    classes = np.asarray(labels)
    _check_fraction(fraction)
    held = np.zeros(len(classes), dtype=bool)
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label).tolist()
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held[_shuffled(members, f"{seed}")[:count]] = True
    _check_parts(held, fraction)
    return held


def hold_out_groups(groups: Sequence[str], labels: Sequence, fraction: float, seed: int) -> np.ndarray:
    """(N,) bool, True for all clips of about `fraction` of the groups (at least one); class shares as even as can be.

    groups, labels: of the N clips; their order does not matter. Of `TRIALS` seeded random choices of groups, the one
    whose class shares and size deviate least from the whole. Raises `UserError` where there are fewer than two groups.
    """
    _check_fraction(fraction)
    names = sorted(set(groups))
    if len(names) < 2:
        raise UserError(f"--val_fraction {fraction}: all {len(groups)} clips are of 1 group ({', '.join(names)}), and "
                        "none may be in two parts; leave the flag out, or correct groups.csv")  # fmt: skip
    classes = sorted(set(labels))
    row, column = {name: i for i, name in enumerate(names)}, {name: i for i, name in enumerate(classes)}
    table = np.zeros((len(names), len(classes)))  # clips of each group in each class
    for group, label in zip(groups, labels, strict=True):
        table[row[group], column[label]] += 1
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    choices = np.array([[row[name] for name in _shuffled(names, f"{seed}/{i}")[:count]] for i in range(TRIALS)])
    taken = table[choices].sum(1)  # (TRIALS, classes)
    shares = taken / taken.sum(1, keepdims=True)
    uneven = np.abs(shares - table.sum(0) / table.sum()).max(1) + np.abs(taken.sum(1) / table.sum() - fraction)
    chosen = {names[i] for i in choices[uneven.argmin()]}
    return np.array([group in chosen for group in groups])


def actor_test(clips: Sequence[str], labels: Sequence) -> np.ndarray:
    """(N,) bool, True for the clips of the actors that CREMA-D's actor split tests on: there is one such split."""
    return hold_out_groups([actor_of(clip) for clip in clips], labels, ACTOR_TEST_FRACTION, ACTOR_SEED)


def describe(parts: dict[str, list[tuple[str, str]]], by_actor: bool) -> dict:
    """Numbers for the record of a split: clips, class shares in percent and, by actor, actors and shared actors."""
    numbers: dict = {"clips": {part: len(rows) for part, rows in parts.items()}}
    numbers["class_percent"] = {
        part: {name: round(100 * count / len(rows), 2) for name, count in sorted(Counter(y for _, y in rows).items())}
        for part, rows in parts.items()
    }
    if by_actor:
        actors = {part: {actor_of(clip) for clip, _ in rows} for part, rows in parts.items()}
        numbers["actors"] = {part: len(names) for part, names in actors.items()}
        numbers["shared_actors"] = len(set.intersection(*actors.values()))
    return numbers


def _shuffled(items: list, seed: str) -> list:
    """The items in an order that depends on nothing but themselves and the seed."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed}/{item}".encode()).digest())


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise UserError(f"--val_fraction {fraction}: must be between 0 and 1, for example 0.1")


def _check_parts(held: np.ndarray, fraction: float) -> None:
    if held.all() or not held.any():
        raise UserError(f"--val_fraction {fraction}: leaves one part of {len(held)} clips empty")
