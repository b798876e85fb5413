"""Compare the model's difficulty on CREMA-D with human votes on voice and face.

    python -m report --people summaryTable.csv --partition runs/NAME/partition.csv

The votes are CREMA-D's `processedResults/summaryTable.csv` (Cao et al., IEEE Transactions on Affective Computing
2014): for each clip the emotion most people named from the voice alone, the face alone and both, several joined by
":" where the vote was tied, with the mean intensity (0 to 100) of each. The model's difficulty and what Remix keeps
come from a run's partition.csv, whose KL is LOW for hard clips.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from dataset.specs import AUDIO, VIDEO
from report.partition import Clip, read_csv
from utils.errors import UserError

SENSES = {"voice": "Voice", "face": "Face", "both": "MultiModal"}  # -> the first part of the table's column names
SENSE_OF = {AUDIO: "voice", VIDEO: "face"}


class Vote(NamedTuple):
    """Human votes on one clip from one sense.

    right: the intended emotion's share among the emotions with most votes: 1 if it is the only one, 1/k in a tie of k,
    0 if it is not among them. level: `right` times the perceived intensity, in [0, 1]; finer, so it has fewer ties.
    """

    right: float
    level: float


# ---------------------------------------------------------------------------------------------------------- reading


def read_votes(path: Path) -> dict[str, dict[str, Vote]]:
    """{clip: {"voice" | "face" | "both": Vote}} of summaryTable.csv. Raises `UserError` for what is not that table."""
    rows = read_csv(path, ["FileName", *(f"{s}{what}" for s in SENSES.values() for what in ("Vote", "Level"))])
    votes = {}
    for line, row in rows:
        try:
            emotion = row["FileName"].split("_")[2][0]  # 1001_IEO_ANG_HI -> A
            votes[row["FileName"]] = {
                sense: _vote(emotion, row[f"{column}Vote"], row[f"{column}Level"]) for sense, column in SENSES.items()
            }
        except (IndexError, ValueError):
            raise UserError(f"{path}, line {line}: not a clip with its votes; download the table again") from None
    return votes


def _vote(emotion: str, named: str, levels: str) -> Vote:
    """named: `A`, or `A:D` for a tie; levels: a number for each. Raises ValueError if they do not match."""
    by_name = dict(zip(named.split(":"), map(float, levels.split(":")), strict=True))
    right = 1 / len(by_name) if emotion in by_name else 0.0
    return Vote(right, right * by_name.get(emotion, 0.0) / 100)


def recognition(votes: dict[str, dict[str, Vote]]) -> dict[str, float]:
    """Share of clips whose emotion people named, by sense; a tied vote counts as wrong."""
    return {sense: float(np.mean([vote[sense].right == 1 for vote in votes.values()])) for sense in SENSES}


# -------------------------------------------------------------------------------------------------------- comparing


def compare_with_people(clips: dict[str, Clip], votes: dict[str, dict[str, Vote]]) -> dict:
    """Rank correlations and agreement over the clips that both know; see `correlations` and `agreement`.

    Raises `UserError` when they share no clip.
    """
    shared = [name for name in clips if name in votes]
    if not shared:
        raise UserError(f"--partition: none of its clips ({next(iter(clips), 'it is empty')}, ...) is in the table of "
                        "--people; give the partition.csv of a CREMA-D run")  # fmt: skip
    pairs = [(clips[name], votes[name]) for name in shared]
    both = {measure: agreement(pairs, measure) for measure in Vote._fields}
    return {"clips": len(shared), "unknown": len(clips) - len(shared), "correlations": correlations(pairs)} | both


def correlations(pairs: list[tuple[Clip, dict[str, Vote]]]) -> list[dict]:
    """Spearman's rho between the model's confidence (KL) and the human votes, for each modality and each sense.

    `rho` is over all clips. `within` is the mean over emotions of rho within one emotion, weighted by clips, because
    emotions that are hard for both would alone cause a correlation. Positive: clips that are easy for people are easy
    for the model. None if either side is constant.
    """
    labels = np.array([clip.label for clip, _ in pairs])
    rows = []
    for modality in SENSE_OF:
        kl = np.array([clip.kl[modality] for clip, _ in pairs])
        for sense in ("voice", "face"):
            row: dict[str, str | float | None] = {"modality": modality, "sense": sense}
            for measure in Vote._fields:
                ease = np.array([getattr(vote[sense], measure) for _, vote in pairs])
                row[f"rho_{measure}"] = _spearman(kl, ease)
                parts = [(_spearman(kl[labels == x], ease[labels == x]), (labels == x).sum()) for x in set(labels)]
                parts = [(rho, count) for rho, count in parts if rho is not None]
                clips = sum(count for _, count in parts)
                row[f"within_{measure}"] = float(sum(rho * n for rho, n in parts) / clips) if parts else None
            rows.append(row)
    return rows


def _spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(stats.spearmanr(x, y).statistic)  # pyright: ignore[reportAttributeAccessIssue]


def agreement(pairs: list[tuple[Clip, dict[str, Vote]]], measure: str) -> dict:
    """How often Remix keeps the modality that is harder for people, over the clips where one is harder.

    `agrees` is that share. `chance` is its expected value if the kept modality were independent of the votes, given how
    often audio is kept (`keeps_audio`) and how often the voice is harder (`voice_harder`, also the share that always
    keeping audio would reach). `kappa` is (agrees - chance) / (1 - chance), `p` from Fisher's exact test, two-sided.
    """
    told = [(clip.kept[0], vote["voice"], vote["face"]) for clip, vote in pairs if len(clip.kept) == 1]
    told = [(kept, getattr(voice, measure) < getattr(face, measure)) for kept, voice, face in told
            if getattr(voice, measure) != getattr(face, measure)]  # fmt: skip
    table = [[sum(found == (kept, harder) for found in told) for harder in (True, False)] for kept in SENSE_OF]
    n = len(told)
    row = {"n": n, "equal_for_people": len(pairs) - n, "counts": table}
    if not n:
        return row | dict.fromkeys(("agrees", "chance", "kappa", "keeps_audio", "voice_harder", "p"))
    agrees, keeps_audio = (table[0][0] + table[1][1]) / n, sum(table[0]) / n
    voice_harder = (table[0][0] + table[1][0]) / n
    chance = keeps_audio * voice_harder + (1 - keeps_audio) * (1 - voice_harder)
    kappa = (agrees - chance) / (1 - chance) if chance < 1 else None
    p = float(stats.fisher_exact(table).pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    return row | {"agrees": agrees, "chance": chance, "kappa": kappa, "keeps_audio": keeps_audio,
                  "voice_harder": voice_harder, "p": p}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ words


def people_markdown(found: dict[str, dict], votes: dict[str, dict[str, Vote]], table: Callable) -> str:
    """The comparison in words and tables; `found` by partition, `table` (head, rows) -> Markdown."""
    shares = recognition(votes)
    parts = ["# CREMA-D against people"]
    parts += [
        f"{len(votes):,} clips. People name the intended emotion of {shares['voice']:.1%} from the voice alone, "
        f"{shares['face']:.1%} from the face alone, {shares['both']:.1%} from both (a tied vote counts as wrong)."
    ]
    for name, result in found.items():
        unknown = f"; {result['unknown']:,} more are not in the table" if result["unknown"] else ""
        parts += [f"## {name}", f"{result['clips']:,} clips{unknown}."]
        rows = [[f"{row['modality']} KL, {row['sense']} alone",
                 *(_number(row[f"{kind}_{measure}"]) for measure in Vote._fields for kind in ("rho", "within"))]
                for row in result["correlations"]]  # fmt: skip
        head = ["Spearman's rho", "people right", "within emotions", "people right x intensity", "within emotions"]
        parts += [table(head, rows), "Positive: clips people find easy are clips the model is sure of."]
        head = ["people's ease by", "clips", "keeps the harder", "by chance", "always audio", "kappa", "p", "equal"]
        rows = []
        for measure, words in (("right", "right"), ("level", "right x intensity")):
            row = result[measure]
            shares = [_number(row[key], "{:.1%}") for key in ("agrees", "chance", "voice_harder")]
            tests = [_number(row["kappa"]), _number(row["p"], "{:.1g}")]
            rows.append([words, f"{row['n']:,}", *shares, *tests, f"{row['equal_for_people']:,}"])
        parts += [table(head, rows), "Keeps the harder: share of the clips of which Remix keeps the modality that "
                  "people found harder; clips equally hard in both for people are left out and counted under equal. By "
                  "chance: the same if what is kept had nothing to do with people."]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _number(value: float | None, form: str = "{:+.3f}") -> str:
    return "–" if value is None else form.format(value)
