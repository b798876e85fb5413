"""The demo dataset: videos of handwritten digits, with the digit's keypad tone (or a recording of it) as audio.

    python -m dataset.demo                                  # keypad tones   -> data/demo
    python -m dataset.demo --speech DIR                     # spoken digits  -> data/demo_speech

Video: scikit-learn's 1,797 scans of 8 x 8 pixels, moving over clutter behind an occluding square. Audio: DTMF tones in
noise, recorded by simulated answering machines, each with its own speed and hum. Training and test clips use different
machines, as in a speaker-independent test. So audio is learned quickly, but much of it applies to known machines only;
video is learned slowly, but is informative. This is the imbalance that Data Remixing addresses. The raw files
(`raw/video/*.avi`, `raw/audio/*.wav`) go through the same preparation as a real dataset. `clips.csv` records the
difficulty of each clip.
"""

import csv
import errno
import hashlib
import json
import math
import multiprocessing
import re
import shlex
import shutil
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset.prepare.audio import LOGMEL_SAMPLES, load_wave
from dataset.specs import AUDIO, AUDIO_RECIPES, SPECS, VIDEO
from utils.cli import Parser
from utils.errors import UserError, run_main
from utils.files import Busy, atomic_folder, atomic_path, locked
from utils.progress import over

# Increase it when the code below changes the data for the same settings: older data are then regenerated.
VERSION = 3

DIGITS = SPECS["demo"].classes or ()
RATE = AUDIO_RECIPES["logmel"].rate or 0  # Hz
SPEECH_ROOT = SPECS["demo"].root.with_name("demo_speech")
FEW = 200  # number of clips; for fewer, starting worker processes takes longer than the work itself
RECORD = "demo.json"  # written last: a folder without it is not a whole demo dataset

# The telephone keypad (ITU-T Q.23): a key sounds its row's and its column's frequency together, in Hz.
ROWS, COLUMNS = (697, 770, 852, 941), (1209, 1336, 1477)
KEYPAD = ("123", "456", "789", "*0#")
DTMF = {key: (ROWS[r], COLUMNS[c]) for r, keys in enumerate(KEYPAD) for c, key in enumerate(keys) if key in DIGITS}


# ----------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class DemoSettings:
    """Everything that decides what is drawn. A pair is a range that each clip draws from uniformly.

    Change a value and the next `ensure_demo` makes the data again.
    """

    seed: int = 0
    test_share: float = 0.25  # rounded up: 1,347 train and 450 test clips of the 1,797
    limit: int | None = None  # make only about this many clips (tests); None = all

    # video: brightness runs from 0 (black) to 1 (white), lengths are in pixels
    side: int = 32  # side of a frame; equals the network's input size (DatasetSpec.image_size), so nothing is resampled
    fps: int = 4
    seconds: int = 2  # frames are kept at 1 per second: this is their number too
    digit_side: tuple[float, float] = (18.5, 25.0)
    drift: tuple[float, float] = (1.0, 6.0)  # pixels per second, in any direction
    contrast: tuple[float, float] = (0.18, 0.8)  # of the digit's ink over the background
    clutter: tuple[float, float] = (0.035, 0.14)  # standard deviation of the background
    occluder: tuple[float, float] = (0.0, 10.0)  # side of the square that stands before the digit
    grain: float = 0.03  # standard deviation of the camera's noise, drawn for every frame

    # audio: signal-to-noise ratios are those of the whole clip's mean powers, in dB
    samples: int = LOGMEL_SAMPLES  # 1.024 s at 8 kHz: the spectrogram takes all of it
    tone_snr_db: tuple[float, float] = (-12.0, 2.0)
    machines: int = 6  # answering machines in each part; the clips of a digit are distributed evenly among them
    speed: tuple[float, float] = (0.93, 1.08)  # tape speed: factor on a key's frequencies, 1 is the original
    hum_db: tuple[float, float] = (-6.0, 3.0)  # of each tone that a machine hums, over one of a key's two
    speech_snr_db: tuple[float, float] = (-5.0, 10.0)  # of the recording's own length, not of the padding around it
    level: float = 0.1  # root mean square of what is written, where 1 is full scale


@dataclass
class DemoClip:
    """One clip, and how hard it was made. The fields after `recording` are filled in while it is drawn."""

    name: str
    digit: str
    part: str
    scan: int
    recording: Path | None
    machine: int | None  # see `draw_machine`; None with a recording
    truth: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, str | int | float]:
        """The clip's line of `clips.csv`; `speaker` and `take` are empty for tones, `machine` for recordings."""
        _, speaker, take = parse_recording(self.recording) if self.recording else ("", "", "")
        start = {"clip": self.name, "digit": self.digit, "part": self.part, "scan": self.scan}
        origin = {"speaker": speaker, "take": take, "machine": "" if self.machine is None else self.machine}
        return start | origin | {key: f"{value:.4f}" for key, value in self.truth.items()}


# ----------------------------------------------------------------------------------------------------- pictures


def draw_video(scan: np.ndarray, settings: DemoSettings, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """A digit moving over clutter behind a static square.

    scan: (8, 8) ink in [0, 1]. Returns frames (T, side, side, 3) uint8 RGB, T = fps * seconds, and how hard they are:
    `contrast`, `clutter`, `occluder` as drawn (see `DemoSettings`), `hidden` the share of the ink behind the square,
    averaged over the frames.
    """
    contrast, clutter = rng.uniform(*settings.contrast), rng.uniform(*settings.clutter)
    occluder = rng.uniform(*settings.occluder)
    ink = _drifting_ink(scan, settings, rng)  # (T, side, side)
    tint = rng.uniform(0.6, 1.0, 3)
    tint /= tint.mean()
    ground = rng.uniform(0.2, 0.4) + clutter * _clutter_texture(settings.side, rng)  # (side, side, 3)
    frames = ground + contrast * ink[..., None] * tint  # (T, side, side, 3)

    square = _square_before(ink, occluder, settings, rng)  # (side, side) bool
    frames[:, square] = rng.uniform(0.1, 0.7, 3)
    frames += settings.grain * rng.standard_normal(frames.shape)
    truth = {"contrast": contrast, "clutter": clutter, "occluder": occluder}
    truth["hidden"] = float((ink[:, square].sum(1) / ink.sum((1, 2))).mean())
    return np.rint(frames.clip(0, 1) * 255).astype(np.uint8), truth


def _drifting_ink(scan: np.ndarray, settings: DemoSettings, rng: np.random.Generator) -> np.ndarray:
    """The scan enlarged, at its place in each frame: (T, side, side) in [0, 1]. It never leaves the picture."""
    import cv2

    count, side = settings.fps * settings.seconds, settings.side
    size = rng.uniform(*settings.digit_side)
    speed, heading = rng.uniform(*settings.drift), rng.uniform(0, 2 * np.pi)
    path = np.arange(count)[:, None] / settings.fps * speed * np.array([np.cos(heading), np.sin(heading)])  # (T, 2)
    path += rng.uniform(0, 1, 2) * np.maximum(side - size - np.ptp(path, axis=0), 0) - path.min(axis=0)
    path = path.clip(0, side - size)
    zoom = size / scan.shape[0]
    ink = np.zeros((count, side, side))
    for frame, (x, y) in zip(ink, path, strict=True):
        # pixel centres: the middle of scan pixel 0 lands half an enlarged pixel inside the digit's corner
        shift = np.array([[zoom, 0, x + zoom / 2 - 0.5], [0, zoom, y + zoom / 2 - 0.5]])
        cv2.warpAffine(scan, shift, (side, side), dst=frame, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    return ink


def _clutter_texture(side: int, rng: np.random.Generator) -> np.ndarray:
    """Coloured blobs and pen-like strokes, mean 0 and standard deviation 1: (side, side, 3).

    Strokes as wide as the digits' own are what makes clutter confusable; blobs alone are filtered out at once.
    """
    import cv2

    blobs = cv2.resize(rng.standard_normal((side // 6, side // 6, 3)), (side, side), interpolation=cv2.INTER_CUBIC)
    strokes = np.zeros((side, side, 3))
    for _ in range(6):
        start, bend, end = rng.integers(-4, side + 4, (3, 2))
        points = np.array([start, (start + bend + end) // 3, end], np.int32)
        cv2.polylines(strokes, [points], False, (rng.standard_normal(3) + 0.5).tolist(), 2, cv2.LINE_8)
    texture = blobs + 1.5 * strokes
    return (texture - texture.mean()) / texture.std()


def _square_before(ink: np.ndarray, size: float, settings: DemoSettings, rng: np.random.Generator) -> np.ndarray:
    """Mask of the square: (side, side) bool, centred within the digit's box in a random frame."""
    mask = np.zeros(ink.shape[1:], bool)
    ys, xs = np.nonzero(ink[rng.integers(len(ink))] > 0.1)
    corner = np.array([rng.uniform(ys.min(), ys.max()), rng.uniform(xs.min(), xs.max())]) - size / 2
    y, x = np.rint(corner).astype(int).clip(0, settings.side)
    end = np.rint(corner + size).astype(int).clip(0, settings.side)
    mask[y : end[0], x : end[1]] = True
    return mask


# ----------------------------------------------------------------------------------------------------- sounds


class Machine(NamedTuple):
    """An answering machine: its tape speed (1 is the original) and the tones of its hum, each (Hz, amplitude)."""

    speed: float
    hum: list[tuple[float, float]]


def draw_machine(number: int, settings: DemoSettings) -> Machine:
    """Machines 0 ... n - 1 recorded the training clips, n ... 2 n - 1 the test clips, with n = `settings.machines`.

    Each part's speeds are spread over the whole range, one machine to each n-th of it. At an unknown speed some keys
    cannot be distinguished: 5 played a tenth too slow sounds like 1. A machine is known by its hum, two tones below the
    keys' and four above.
    """
    rng = np.random.default_rng([settings.seed, 3, number])
    slow, fast = settings.speed
    speed = slow + (fast - slow) * (number % settings.machines + rng.uniform()) / settings.machines
    pitches = np.concatenate([rng.uniform(100, 600, 2), rng.uniform(1700, 3900, 4)])
    amplitudes = 10 ** (rng.uniform(*settings.hum_db, len(pitches)) / 20)
    return Machine(speed, list(zip(pitches.tolist(), amplitudes.tolist(), strict=True)))


def draw_tone(
    digit: str, machine: Machine, settings: DemoSettings, rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, float]]:
    """The key's two tones, of amplitude 1, at the machine's speed, in white noise and the machine's hum.

    All phases are random. Returns (samples,) float64, and {"snr_db", "speed"}; the hum counts neither as signal nor as
    noise.
    """
    time = np.arange(settings.samples) / RATE
    key = _sines([(f * machine.speed, 1.0) for f in DTMF[digit]], time, rng)
    snr_db = rng.uniform(*settings.tone_snr_db)
    sound = key + _sines(machine.hum, time, rng)
    truth = {"snr_db": snr_db, "speed": machine.speed}
    return _in_noise(sound, float(np.mean(key**2)), snr_db, settings.level, rng), truth


def _sines(tones: list[tuple[float, float]], time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The sum of sines of these (frequency in Hz, amplitude), at random phases."""
    waves = (a * np.sin(2 * np.pi * f * time + rng.uniform(0, 2 * np.pi)) for f, a in tones)
    return sum(waves, np.zeros(len(time)))


def draw_speech(speech: np.ndarray, settings: DemoSettings, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """A recording at a random place of the clip (its loudest stretch if it is longer), in white noise.

    speech: (n,) float at the demo's rate, not silent. Returns (samples,) float64, and {"snr_db"}.
    """
    room = settings.samples - len(speech)
    if room < 0:
        energy = np.concatenate([[0], np.cumsum(speech**2)])
        start = int(np.argmax(energy[settings.samples :] - energy[: -settings.samples]))
        speech, room = speech[start : start + settings.samples], 0
    before = int(rng.integers(room + 1))
    snr_db = rng.uniform(*settings.speech_snr_db)
    clip = np.pad(speech, (before, room - before))
    return _in_noise(clip, float(np.mean(speech**2)), snr_db, settings.level, rng), {"snr_db": snr_db}


def _in_noise(signal: np.ndarray, power: float, snr_db: float, level: float, rng: np.random.Generator) -> np.ndarray:
    """`signal` plus noise of exactly `power` / 10^(snr_db / 10), the sum scaled to `level` (root mean square).

    All clips have the same level. Otherwise loudness would reveal the amount of noise, and loud tones would clip.
    """
    noise = rng.standard_normal(len(signal))
    noise *= np.sqrt(power / 10 ** (snr_db / 10) / np.mean(noise**2))
    mixed = signal + noise
    return level * mixed / np.sqrt(np.mean(mixed**2))


def parse_recording(path: Path) -> tuple[str, str, str]:
    """(digit, speaker, take) from `{digit}_{speaker}_{take}.wav`. Raises `UserError` for another name."""
    match = re.fullmatch(r"(\d)_([^_]+)_(\w+)", path.stem)
    if not match:
        raise UserError(f"--speech: {path} is not named {{digit}}_{{speaker}}_{{take}}.wav; rename it or move it away")
    return match[1], match[2], match[3]


def find_recordings(folder: Path) -> list[Path]:
    """The folder's .wav files, sorted. Raises `UserError` unless there are two recordings of every digit."""
    if not folder.is_dir():
        raise UserError(
            f"--speech {folder}: no such folder; give the one with {{digit}}_{{speaker}}_{{take}}.wav files"
        )
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".wav" and not p.name.startswith("."))
    if not files:
        raise UserError(
            f"--speech {folder}: no .wav file in it; give the one with {{digit}}_{{speaker}}_{{take}}.wav files"
        )
    said = [parse_recording(path)[0] for path in files]
    scarce = [digit for digit in DIGITS if said.count(digit) < 2]
    if scarce:
        raise UserError(
            f"--speech {folder}: fewer than 2 recordings of digit {', '.join(scarce)}; "
            "one is needed to train and one to test, add them"
        )
    return files


def read_recording(path: Path) -> np.ndarray:
    """A recording as (n,) float32 at the demo's rate, channels averaged. Raises `UserError` if broken or silent."""
    sound, _ = load_wave(path, RATE)
    if not np.any(sound):
        raise UserError(f"--speech: {path} is silent; replace it or move it away")
    return sound


# ----------------------------------------------------------------------------------------------------- split


def split_indices(labels: list[str], test_share: float, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """(train, test) indices, sorted, disjoint and stratified by class; ceil(n * test_share) are for test.

    Clips left over by rounding go to the classes with the largest remainders.
    """
    of_clip = np.array(labels)
    classes, counts = np.unique(of_clip, return_counts=True)
    exact = counts * test_share
    quota = np.floor(exact).astype(int)
    left = math.ceil(len(labels) * test_share) - quota.sum()
    quota[np.argsort(quota - exact, kind="stable")[:left]] += 1
    quota = quota.clip(1, counts - 1)
    test = np.concatenate(
        [rng.permutation(np.nonzero(of_clip == c)[0])[:n] for c, n in zip(classes, quota, strict=True)]
    )
    train = np.setdiff1d(np.arange(len(labels)), test)
    return train.tolist(), np.sort(test).tolist()


def plan_clips(scan_labels: list[str], recordings: list[Path] | None, settings: DemoSettings) -> list[DemoClip]:
    """Every clip to make: one per scan, or one per recording.

    There are more recordings than scans, so the scans of a part are reused in turn, each time with a newly drawn
    difficulty. No scan and no recording is in both parts.
    """
    rng = np.random.default_rng([settings.seed, 0])
    parts = zip(("train", "test"), split_indices(scan_labels, settings.test_share, rng), strict=True)
    scans_of = {name: {d: [i for i in part if scan_labels[i] == d] for d in DIGITS} for name, part in parts}
    if recordings is None:
        plan = [
            DemoClip(f"digit{digit}_{scan:04d}", digit, part, scan, None, machine)
            for part, by_digit in scans_of.items()
            for digit, scans in by_digit.items()
            for scan, machine in zip(scans, _share_machines(len(scans), part, settings, rng), strict=True)
        ]
    else:
        plan = _pair_recordings(recordings, scans_of, settings.test_share, rng)
    plan.sort(key=lambda clip: clip.name)
    return plan if settings.limit is None else _thin(plan, settings.limit)


def _share_machines(count: int, part: str, settings: DemoSettings, rng: np.random.Generator) -> list[int]:
    """A machine of the part for each of `count` clips, at random, each machine as often as the others or once more."""
    first = settings.machines if part == "test" else 0
    return rng.permutation(first + np.resize(rng.permutation(settings.machines), count)).tolist()


def _pair_recordings(recordings: list[Path], scans_of: dict, test_share: float, rng) -> list[DemoClip]:
    said = [parse_recording(path) for path in recordings]
    plan = []
    for part, indices in zip(("train", "test"), split_indices([s[0] for s in said], test_share, rng), strict=True):
        for digit in DIGITS:
            chosen = [i for i in indices if said[i][0] == digit]
            turns = np.resize(rng.permutation(scans_of[part][digit]), len(chosen)).tolist()
            for i, scan in zip(chosen, turns, strict=True):
                name = f"digit{digit}_{said[i][1]}_{said[i][2]}_{scan:04d}"
                plan.append(DemoClip(name, digit, part, scan, recordings[i], None))
    return plan


def _thin(plan: list[DemoClip], limit: int) -> list[DemoClip]:
    """Evenly spaced clips of each part, which the order by name makes evenly spaced over the digits too."""
    kept = []
    for part in ("train", "test"):
        clips = [clip for clip in plan if clip.part == part]
        count = min(max(len(DIGITS), round(limit * len(clips) / len(plan))), len(clips))
        kept += [clips[i] for i in np.linspace(0, len(clips) - 1, count).round().astype(int)]
    return sorted(kept, key=lambda clip: clip.name)


# ----------------------------------------------------------------------------------------------------- files


def write_video(frames: np.ndarray, fps: int, path: Path) -> None:
    """(T, H, W, 3) uint8 RGB to Motion-JPEG, which every OpenCV build can write and read. Raises `OSError`."""
    import cv2

    height, width = frames.shape[1:3]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), fps, (width, height))
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))  # OpenCV wants BGR
    writer.release()
    # OpenCV raises no error on a full disk; the file is missing or too short
    if not path.is_file() or path.stat().st_size < 256 * len(frames):
        raise OSError(errno.ENOSPC, "video not written whole", str(path))


def write_wav(sound: np.ndarray, path: Path) -> None:
    """(n,) float in [-1, 1] to 16-bit mono at the demo's rate."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(np.rint(sound.clip(-1, 1) * 32767).astype("<i2").tobytes())


def _raw(out: Path) -> tuple[Path, Path]:
    """The folders of raw videos and sounds in the folder that is made."""
    return out / "raw" / VIDEO, out / "raw" / AUDIO


def _write_raw(plan: list[DemoClip], scans: np.ndarray, out: Path, settings: DemoSettings, quiet: bool) -> None:
    video, audio = _raw(out)
    video.mkdir(parents=True)
    audio.mkdir(parents=True)
    for i, clip in enumerate(over(plan, "demo: raw clips", quiet=quiet, keep=True)):
        # two streams per clip: another tone range then leaves every picture as it was
        see, hear = (np.random.default_rng([settings.seed, stream, i]) for stream in (1, 2))
        frames, looks = draw_video(scans[clip.scan], settings, see)
        if clip.recording is not None:
            sound, sounds = draw_speech(read_recording(clip.recording), settings, hear)
        elif clip.machine is not None:
            sound, sounds = draw_tone(clip.digit, draw_machine(clip.machine, settings), settings, hear)
        else:
            raise ValueError(f"{clip.name}: neither a recording nor a machine")
        clip.truth = sounds | looks
        write_video(frames, settings.fps, video / f"{clip.name}.avi")
        write_wav(sound, audio / f"{clip.name}.wav")


def _write_clips_csv(plan: list[DemoClip], path: Path) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        rows = [clip.row() for clip in plan]
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def load_scans() -> tuple[np.ndarray, list[str]]:
    """scikit-learn's bundled digits: scans (1797, 8, 8) float64 ink in [0, 1], and their class names."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    return digits.images / 16, [str(d) for d in digits.target]


# ----------------------------------------------------------------------------------------------------- making


def ensure_demo(
    root: Path | str,
    speech: Path | str | None = None,
    settings: DemoSettings | None = None,
    quiet: bool = False,
) -> bool:
    """Make the demo data in `root` unless it is complete and has these settings. Returns True if it was made.

    speech: a folder of recordings to use instead of tones. settings: None takes the defaults, but keeps the seed or the
    recordings that the data in `root` was made with. Raises `UserError` for a folder that holds something else,
    unusable recordings, or a full disk.
    """
    root = Path(root)
    root = root.resolve() if root.is_symlink() else root  # what it points to is replaced, on the disk it is on
    record = read_record(root)
    if settings is None and record is not None:
        settings = replace(DemoSettings(), seed=record["settings"]["seed"])
        if record["speech"] and speech is None:
            _check_speech_record(root, record, settings)
            return False
    settings = settings or DemoSettings()
    if record is not None and speech is None and record["speech"] is None:
        current = _record(settings, None, record["clips"])  # without scikit-learn, whose import takes seconds
        if record == current and _is_whole(root, record):
            return False
    recordings = find_recordings(Path(speech)) if speech is not None else None
    wanted = _make_record(settings, recordings)
    with _alone(root):
        record = read_record(root)
        if record is not None and record == wanted and _is_whole(root, record):
            return False
        _refuse_foreign(root, record)
        if not quiet:
            print(f"{root}: {'making the demo data again (settings changed)' if record else 'making the demo data'}")
        _make(root, recordings, settings, wanted, quiet)
    return True


def _check_speech_record(root: Path, record: dict, settings: DemoSettings) -> None:
    """Data made from recordings cannot be regenerated without them: raise `UserError` unless complete and current."""
    current = _record(settings, record["speech"], record["clips"])
    if record != current or not _is_whole(root, record):
        raise UserError(
            f"{root}: made from recordings, but incomplete or with settings other than the current ones; "
            f"run: bash scripts/prepare_demo.sh --out {root} --speech DIR"
        )


def read_record(root: Path) -> dict | None:
    """Settings of the demo data in `root` (`demo.json`), or None if it has no complete demo dataset."""
    try:
        record = json.loads((root / RECORD).read_text(encoding="utf-8"))
        return record if record["settings"]["seed"] is not None and {"speech", "clips"} <= record.keys() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _make_record(settings: DemoSettings, recordings: list[Path] | None) -> dict:
    speech = None
    if recordings is not None:
        digest = hashlib.sha256()
        for path in recordings:
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        speech = {"recordings": len(recordings), "sha256": digest.hexdigest()}
    _, labels = load_scans()
    return _record(settings, speech, len(plan_clips(labels, recordings, settings)))


def _record(settings: DemoSettings, speech: dict | None, clips: int) -> dict:
    """The content of demo.json."""
    # through JSON and back, so that it compares equal to what is read from disk (tuples become lists)
    record = json.loads(
        json.dumps({"settings": asdict(settings), "speech": speech, "clips": clips, "version": VERSION})
    )
    return record | {"hash": _hash(record)}


def _hash(record: dict) -> str:
    content = {key: value for key, value in record.items() if key != "hash"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_whole(root: Path, record: dict) -> bool:
    """Whether the data are complete: the lists exist, and the number of clips is unchanged."""
    folders = [modality.folder for modality in SPECS["demo"].modalities]
    try:
        counts = {len(list((root / folder).iterdir())) for folder in folders}
    except OSError:
        return False
    lists = ["train", "test", "stat"] + (["groups"] if record["speech"] is None else [])
    return counts == {record["clips"]} and all((root / f"{name}.csv").is_file() for name in lists)


def _refuse_foreign(root: Path, record: dict | None) -> None:
    if record is None and root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(
            f"{root}: contains files that are not complete demo data; delete the folder, or choose another one"
        )


def _make(root: Path, recordings: list[Path] | None, settings: DemoSettings, record: dict, quiet: bool) -> None:
    """Generate the dataset next to `root`, then rename it: a killed run leaves no incomplete data in `root`."""
    from dataset.prepare.engine import IN_THIS_PROCESS, Clip, Options, prepare_clips
    from dataset.prepare.lists import write_lists

    scans, labels = load_scans()
    plan = plan_clips(labels, recordings, settings)
    try:
        with atomic_folder(root) as making:
            _write_raw(plan, scans, making, settings, quiet)
            video, audio = _raw(making)
            clips = [Clip(c.name, video / f"{c.name}.avi", audio / f"{c.name}.wav") for c in plan]
            workers = IN_THIS_PROCESS if len(clips) < FEW else None
            options = Options(audio=AUDIO_RECIPES["logmel"], workers=workers)
            skipped = prepare_clips(clips, making, options, quiet=quiet).skipped
            if skipped:  # we wrote these files a moment ago: only a full disk or a broken installation spoils them
                raise UserError(f"{skipped[0].path}: {skipped[0].reason}; is there room on the disk? run this again")
            shutil.rmtree(making / ".prepare")  # only needed for resuming; contains clock times
            parts = {part: [(c.name, c.digit) for c in plan if c.part == part] for part in ("train", "test")}
            # A validation part with known machines would give far too high accuracies; speakers are in both parts.
            groups = None if recordings else [(c.name, f"machine{c.machine}") for c in plan]
            write_lists(making, list(DIGITS), parts, {"source": "demo", "seed": settings.seed}, groups)
            _write_clips_csv(plan, making / "clips.csv")
            with atomic_path(making / RECORD) as temporary:
                temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{root}: the disk is full; the demo data needs about 200 MB, free some and run again"
        ) from None


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Only one process makes `root` at a time; a second one waits and then finds it made."""
    root = root.absolute()
    lock, waiting = root.with_name(f".{root.name}.lock"), f"{root}: another process makes the demo data, waiting for it"
    # A worker process that imports a script without a __main__ guard would deadlock with its parent.
    worker = multiprocessing.current_process().name != "MainProcess"
    try:
        with locked(lock, None if worker else waiting):
            yield
    except Busy:
        raise RuntimeError("call ensure_demo under: if __name__ == '__main__'") from None


# ----------------------------------------------------------------------------------------------------- command


def main(argv: list[str] | None = None) -> int:
    """`python -m dataset.demo`."""
    parser = Parser(prog="python -m dataset.demo", description="Make the demo dataset.")
    parser.add_argument(
        "--out", type=Path, help=f"folder to create (default: {SPECS['demo'].root}, speech: {SPEECH_ROOT})"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=DemoSettings.seed,
        help="seed of the split and the difficulty (default: %(default)s)",
    )
    parser.add_argument(
        "--speech", type=Path, metavar="DIR", help="recordings {digit}_{speaker}_{take}.wav (default: keypad tones)"
    )
    args = parser.parse_args(argv)
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must be 0 or more")
    out = args.out or (SPEECH_ROOT if args.speech else SPECS["demo"].root)
    made = ensure_demo(out, args.speech, DemoSettings(seed=args.seed))
    counts = {part: len((out / f"{part}.csv").read_text(encoding="utf-8").splitlines()) for part in ("train", "test")}
    print(f"{out}: {counts['train']} train + {counts['test']} test clips, {'made' if made else 'already there'}")
    where = "" if out == SPECS["demo"].root else f" --dataset demo --data_root {shlex.quote(str(out))}"
    print(f"train on it: bash scripts/run_train.sh{where}")
    return 0


if __name__ == "__main__":
    run_main(main)
