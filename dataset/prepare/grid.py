"""GRID (Cooke et al., JASA 2006): times of the words of a sentence, from `.align` files or a words.csv."""

import re
from pathlib import Path

from dataset.lists import check_clip_id, read_rows
from dataset.prepare.published import read_lines
from utils.errors import UserError

ROLES = ("command", "colour", "preposition", "letter", "digit", "adverb")  # the six words of every sentence, in order
ROLE_CLASSES = {"command": 4, "colour": 4, "preposition": 4, "letter": 25, "digit": 10, "adverb": 4}
TICKS = 25_000  # of an .align file, per second
MARGIN = 0.06  # seconds kept on both sides of a word: lips move before and after the sound
MOUTH = (100, 165, 120, 80)  # x, y, width, height in GRID's 360 x 288 pixels


def speaker_of(path: Path) -> str:
    """The speaker s1 to s34 in a path, '' where it names none."""
    found = [re.match(r"s\d{1,2}(?!\d)", part.lower()) for part in path.parts[:-1]]
    return next((match[0] for match in found if match), "")


def aligned_word(path: Path, role: str) -> tuple[str, float, float]:
    """(word, start, end) in seconds. The words of a sentence come in the order of `ROLES`, with silences anywhere."""
    words = []
    for line in read_lines(path):
        fields = line.split()
        if len(fields) == 3 and fields[0].isdecimal() and fields[1].isdecimal():
            if fields[2] not in ("sil", "sp"):
                words.append((fields[2], int(fields[0]) / TICKS, int(fields[1]) / TICKS))
        elif fields:
            raise UserError(f"{path}: {line[:80]!r} is not start end word")
    if len(words) != len(ROLES):
        raise UserError(f"{path}: words in it: {len(words)}; a sentence of GRID has {len(ROLES)}")
    return words[ROLES.index(role)]


def listed_words(path: Path, role: str, speaker: str) -> dict[tuple[str, str], tuple[str, float, float]]:
    """{(speaker, clip): (word, start, end)} of one role, from a table clip,role,word,start,end."""
    found = {}
    for line, row in read_rows(path):
        if line == 1 and row == ["clip", "role", "word", "start", "end"]:
            continue
        try:
            clip, found_role, word, start, end = row
            check_clip_id(clip)
            times = float(start), float(end)
            if not (found_role in ROLES and word and 0 <= times[0] < times[1]):
                raise ValueError
        except (ValueError, UserError):
            raise UserError(f"{path}, line {line}: {','.join(row)[:80]!r} is not clip,role,word,start,end") from None
        if found_role == role:
            found[speaker, clip] = (word, *times)
    return found
