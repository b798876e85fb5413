"""Generated raw files in the formats of the real downloads: FLV1 video, 16 kHz WAV, mp4 with an AAC track."""

from fractions import Fraction
from pathlib import Path

import numpy as np

SENTENCES = ("IEO", "TIE", "IOM", "IWW", "TAI", "MTI", "IWL", "ITH", "DFA", "ITS", "TSI", "WSI")
EMOTIONS = ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD")


def cremad_names(count: int, actors: int = 4) -> list[str]:
    """`count` different clip ids in CREMA-D's form, spread over actors, sentences and emotions."""
    names = [f"{1001 + a}_{s}_{e}_XX" for s in SENTENCES for e in EMOTIONS for a in range(actors)]
    if count > len(names):
        raise ValueError(f"at most {len(names)} ids with {actors} actors")
    return names[:count]


def picture(number: int, size: tuple[int, int], seed: int) -> np.ndarray:
    """(height, width, 3) uint8: a still room, a head that moves with `number`, sensor noise; compresses like a face."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    phase = 0.15 * number + seed
    head = ((x / width - 0.5 - 0.05 * np.sin(phase)) ** 2 + (y / height - 0.5 - 0.03 * np.cos(phase)) ** 2) < 0.05
    room = 90 + 50 * x / width + 40 * np.sin(y / 17 + seed)
    noise = np.random.default_rng(seed * 1000 + number).normal(0, 4, (height, width))
    grey = np.where(head, 190 + 20 * np.sin(x / 9 + phase), room) + noise
    return np.clip(np.stack([grey, grey * 0.85, grey * 0.7], -1), 0, 255).astype(np.uint8)


def tone(seconds: float, rate: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """(n, channels) float32: a gliding tone in a little noise, another one on each channel."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.02, (len(time), channels))
    waves = [0.3 * np.sin(2 * np.pi * (150 * (c + 1) + 10 * seed + 60 * time) * time) for c in range(channels)]
    return (np.stack(waves, -1) + noise).astype(np.float32)


def write_wav(path: Path, seconds: float = 2.5, rate: int = 16_000, channels: int = 1, seed: int = 0) -> Path:
    """A 16-bit WAV."""
    import soundfile  # late: offline packages, which training does not need

    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds, rate, channels, seed), rate, subtype="PCM_16")
    return path


def write_video(
    path: Path,
    seconds: float = 2.5,
    rate: Fraction | int = Fraction(30_000, 1001),
    size: tuple[int, int] = (480, 360),
    sound: np.ndarray | None = None,
    sound_rate: int = 44_100,
    seed: int = 0,
) -> Path:
    """A video as the name ends: .flv is FLV1 as in CREMA-D, .mp4 is MPEG-4; with `sound` (n, channels) an AAC track."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flv1" if path.suffix == ".flv" else "mpeg4", rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 800_000
        track = None
        if sound is not None:
            track = container.add_stream("aac", rate=sound_rate)
            track.layout = "mono" if sound.shape[1] == 1 else "stereo"
        for number in range(round(seconds * rate)):
            frame = av.VideoFrame.from_ndarray(picture(number, size, seed), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if track is not None and sound is not None:
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound.T), format="fltp", layout=track.layout.name)
            frame.sample_rate = sound_rate
            container.mux(track.encode(frame))
            container.mux(track.encode(None))
    return path
