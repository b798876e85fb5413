"""Datasets of the studies (`report.study`): training folders made from published sources, some with noise added.

Sources are folders of one parent (`--sources`): `grid_s1` (videos and words.csv of GRID's speaker 1), `mosi`,
`multiview_digits` and `spoken_digits`. Each recipe runs `dataset.prepare` as a user would. A folder is made under a
temporary name and renamed at the end, so an interrupted one is made again.
"""

import csv
import json
import os
import shutil
import wave
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from dataset.prepare import __main__ as prepare
from dataset.prepare.audio import load_wave, resample
from dataset.prepare.demo import DemoSettings, ensure_demo
from dataset.prepare.grid import MARGIN, MOUTH, listed_words
from utils.errors import UserError

RATE = 16_000  # Hz, of the sound with noise
TALKERS = 6  # other recordings in the babble of a clip
TEST_FRACTION = 0.25
SPLIT_SEED = 20_261_127  # of the test clips and of the babble; nothing else is drawn from it
# Small inputs, since the studies run on two CPU cores: 32 x 32 pixels, 32 mel bands every 20 ms.
GRID_FLAGS = ("--fps", "25", "--frames", "2", "--size", "32", "--crop", ",".join(map(str, MOUTH)),
              "--audio_recipe", f"logmel:rate={RATE}:seconds=0.64:bands=32:hop=320")  # fmt: skip


def babble(own: int, waves: Sequence[np.ndarray], snr: float, rng: np.random.Generator) -> np.ndarray:
    """Recording `own` with the sum of `TALKERS` other recordings, at `snr` dB over its whole length.

    Each talker starts at a random place and is repeated to the length of the recording. Returns (samples,) float32,
    scaled down only if it would clip.
    """
    speech = waves[own].astype(np.float64)
    others = rng.choice([i for i in range(len(waves)) if i != own], TALKERS, replace=False)
    noise = np.zeros_like(speech)
    for i in others:
        talker = np.resize(np.roll(waves[i], -int(rng.integers(len(waves[i])))), len(speech))
        noise += talker / max(np.sqrt(np.mean(talker.astype(np.float64) ** 2)), 1e-9)  # talkers are equally loud
    power = np.mean(speech**2) / 10 ** (snr / 10)
    mixed = speech + noise * np.sqrt(power / np.mean(noise**2))
    return (mixed / max(1.0, np.abs(mixed).max() / 0.99)).astype(np.float32)


def grid(sources: Path, out: Path, role: str, snr: float | None, flow: bool = False) -> None:
    """One word of each GRID sentence: mouth frames around the word, and its sound, clean or with babble.

    The parts are stratified. The babble of a clip is made of recordings of its own part, so no sound is in two parts.
    """
    raw = sources / "grid_s1"
    words = listed_words(raw / "words.csv", role, "")
    clips = sorted(clip for _, clip in words)
    rng = np.random.default_rng(SPLIT_SEED)
    part = parts([words["", clip][0] for clip in clips], rng)
    folder = out.with_name(out.name + ".raw")
    folder.mkdir(exist_ok=True)
    if snr is not None:
        for name in ("train", "test"):
            own = [i for i, found in enumerate(part) if found == name]
            waves = [sound(raw / "video" / f"{clips[i]}.mp4") for i in own]
            for k, i in enumerate(own):
                write_wave(folder / f"{clips[i]}.wav", babble(k, waves, snr, np.random.default_rng([SPLIT_SEED, i])))
    with open(folder / "clips.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["clip", "file", "audio", "label", "start", "end", "part"])
        for clip, own_part in zip(clips, part, strict=True):
            word, start, end = words["", clip]
            audio = "" if snr is None else os.path.relpath(folder / f"{clip}.wav", raw)
            times = [f"{max(0, start - MARGIN):.3f}", f"{end + MARGIN:.3f}"]
            table.writerow([clip, f"video/{clip}.mp4", audio, word, *times, own_part])
    run(["--table", folder / "clips.csv", "--raw", raw, "--out", out, *GRID_FLAGS, *(["--flow"] if flow else [])])
    shutil.rmtree(folder)
    describe(out, image_size=32, encoder="resnet18_thin", crop_area=[0.6, 1.0])


def parts(labels: Sequence[str], rng: np.random.Generator) -> list[str]:
    """ "train" or "test" for each clip: `TEST_FRACTION` of each class, drawn by `rng`."""
    found = ["train"] * len(labels)
    for label in sorted(set(labels)):
        own = [i for i, value in enumerate(labels) if value == label]
        for i in rng.permutation(own)[: round(TEST_FRACTION * len(own))].tolist():
            found[i] = "test"
    return found


def sound(path: Path) -> np.ndarray:
    """The sound of a video, (samples,) float32 at `RATE`."""
    samples, rate = load_wave(path)
    return resample(samples, rate, RATE)


def write_wave(path: Path, samples: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples * 32767).astype("<i2").tobytes())


def run(words: Sequence[object]) -> None:
    """`python -m dataset.prepare` with these words. Raises `UserError` unless the folder is valid."""
    if prepare.main([str(word) for word in words]):
        raise UserError(f"{words[-1]}: not prepared (see above)")


def describe(out: Path, **fields: object) -> None:
    """Change fields of dataset.json, the description of a training folder."""
    path = out / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=2) + "\n")


def published(sources: Path, out: Path, dataset: str, folder: str, views: Sequence[str] = ()) -> None:
    """A published dataset of features; `views` are the modalities to keep, all of them if empty."""
    run(["--dataset", dataset, "--raw", sources / folder, "--out", out])
    if views:
        modalities = json.loads((out / "dataset.json").read_text())["modalities"]
        describe(out, modalities=[modality for modality in modalities if modality["name"] in views])


def drawn_demo(sources: Path, out: Path, draw: int) -> None:
    """The demo made from another seed."""
    ensure_demo(out, settings=DemoSettings(seed=draw))


def speech(sources: Path, out: Path) -> None:
    """The demo's handwriting with real recordings of spoken digits."""
    ensure_demo(out, speech=sources / "spoken_digits" / "recordings")


SNRS = {"clean": None, "p10": 10.0, "0": 0.0, "m10": -10.0}  # dB
RECIPES: dict[str, Callable[[Path, Path], None]] = {
    **{f"grid_{role}s_{name}": partial(grid, role=role, snr=snr) for role in ("digit", "letter")
       for name, snr in SNRS.items()},
    "grid_flow_m10": partial(grid, role="digit", snr=-10.0, flow=True),
    "mosi": partial(published, dataset="MOSI", folder="mosi"),
    "views3": partial(published, dataset="MVDigits", folder="multiview_digits", views=("fourier", "zernike", "shape")),
    "views6": partial(published, dataset="MVDigits", folder="multiview_digits"),
    "speech": speech,
    **{f"demo_draw{draw}": partial(drawn_demo, draw=draw) for draw in range(3)},
}  # fmt: skip


def make(name: str, sources: Path, root: Path) -> Path:
    """The training folder of a recipe, made if it does not exist yet.

    Raises `UserError` if the source is missing.
    """
    out = root / name
    if out.exists():
        return out
    if not sources.is_dir():
        raise UserError(f"--sources {sources}: no such folder; give the parent of grid_s1, mosi, multiview_digits and "
                        "spoken_digits")  # fmt: skip
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    RECIPES[name](sources, temporary)
    temporary.rename(out)
    return out
