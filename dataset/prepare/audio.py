"""Audio files to waveforms, and waveforms to spectrograms of a fixed shape.

Recipes compute in float64 and store float32: the logarithm of an almost silent band amplifies float32 rounding errors
to more than 1e-4, so two machines would produce different datasets. librosa and PyAV are imported lazily: `fbank` and
`logmel` of a 16-bit WAV file need neither.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dataset.prepare import decode
from dataset.specs import AUDIO_RECIPES, AudioRecipe
from utils.errors import UserError

MAX_SECONDS = 600  # limit for one clip; the datasets have 10-second clips, so a larger value means a damaged header
RATES = (1_000, 400_000)  # Hz; outside it the header is damaged

LOGSTFT_SAMPLES = 66_150  # 3 s at 22,050 Hz
FBANK_MEAN, FBANK_STD = -4.503877, 5.141276  # of AudioSet, as in OGM-GE's preparation
LOGMEL_SAMPLES = 8_192  # 1.024 s at 8 kHz: with hop 256 exactly 32 columns


# ---------------------------------------------------------------------------------------------------------------------
# Waveforms


def load_wave(
    path: Path | str,
    rate: int | None = None,
    channels: str = "mean",
    start: float | None = None,
    end: float | None = None,
) -> tuple[np.ndarray, int]:
    """(wave float32 (n,), rate in Hz) of a sound file or of the first audio track of a video.

    `rate` resamples; None keeps the file's own. `channels`: "mean" averages them, "first" takes the first. `start` and
    `end` (seconds from the beginning of the file) cut it, exact to the sample. Raises `UserError` if there is no
    usable sound: no audio track, no samples, a broken file, or more than 10 minutes.
    """
    path = Path(path)
    if channels not in ("mean", "first"):
        raise ValueError(f"channels {channels!r}: 'mean' or 'first'")
    wave, found = _read_pcm16(path, start, end) or _read_track(path, start, end)
    if wave.size == 0:
        raise UserError(f"{path}: no samples in it; get the file again")
    if not np.isfinite(wave).all():
        raise UserError(f"{path}: NaN or infinite samples; get the file again")
    wave = wave.mean(axis=1, dtype=np.float32) if channels == "mean" else wave[:, 0]
    wave = np.ascontiguousarray(wave, dtype=np.float32)
    if rate is not None and rate != found:
        wave, found = resample(wave, found, rate), rate
    return wave, found


def _read_pcm16(path: Path, start: float | None = None, end: float | None = None) -> tuple[np.ndarray, int] | None:
    """(wave (n, channels), rate) of a 16-bit WAV, in plain Python; None for any other file, whatever its suffix."""
    import wave

    try:
        with wave.open(str(path), "rb") as file:
            rate, channels = file.getframerate(), file.getnchannels()
            if file.getsampwidth() != 2 or file.getcomptype() != "NONE":
                return None
            _check_rate(path, rate)
            cut = _Cut(path, rate, start, end)
            first = min(cut.first, file.getnframes())
            file.setpos(first)
            data = file.readframes(min(cut.last - cut.first, MAX_SECONDS * rate + 1))
    except (wave.Error, EOFError, OSError):
        return None
    samples = np.frombuffer(data[: len(data) // (2 * channels) * 2 * channels], dtype="<i2").reshape(-1, channels)
    if file.getnframes() == 0:
        return None
    cut.check(len(samples), first + len(samples))
    return samples.astype(np.float32) / 32_768, rate


def _read_track(path: Path, start: float | None, end: float | None) -> tuple[np.ndarray, int]:
    """(wave (n, channels), rate) of the first audio track of a file, by PyAV."""
    with decode.opened(path, "sound file") as container:
        stream = decode.find_stream(container, path, "audio")
        chunks, taken, cut, position, tally = [], 0, None, 0, decode.Tally(path)
        for time, rate, chunk in _decoded(container, stream, tally, start or 0.0):
            if cut is None:
                _check_rate(path, rate)
                cut = _Cut(path, rate, start, end)
                position = round(time * rate) if start or end else 0  # index of the first sample in the file
            if position >= cut.last:
                break
            kept = chunk[max(0, cut.first - position) : cut.last - position]
            position += len(chunk)
            if len(kept):
                chunks.append(kept)
                taken += len(kept)
                cut.check_length(taken)
    tally.check()
    if cut is None:
        raise UserError(f"{path}: no samples in it; get the file again")
    cut.check(taken, position)
    return np.concatenate(chunks), cut.rate


class _Cut:
    """The samples `first` to `last` of a file, at `rate` Hz."""

    def __init__(self, path: Path, rate: int, start: float | None, end: float | None):
        self.path, self.rate, self.start, self.end = path, rate, start, end
        self.first = round((start or 0.0) * rate)
        self.last = 2**62 if end is None else round(end * rate)

    def check_length(self, taken: int) -> None:
        if taken > MAX_SECONDS * self.rate:
            raise UserError(f"{self.path}: more than {MAX_SECONDS} s of sound; cut it to the clip")

    def check(self, taken: int, until: int) -> None:
        """Raise `UserError` if `taken` samples, of a file whose sound ends at sample `until`, are too few."""
        self.check_length(taken)
        ends = f"{self.path}: the sound ends at {until / self.rate:.2f} s"
        if taken == 0 and self.first > 0:
            raise UserError(f"{ends}, before the clip's start at {self.start:g} s")
        if self.end is not None and self.last - until > max(self.rate, (self.last - self.first) / 2):
            raise UserError(f"{ends}; the clip is {self.start or 0:g} to {self.end:g} s")


def _decoded(container, stream, tally: decode.Tally, start: float) -> Iterator[tuple[float, int, np.ndarray]]:
    """Yield (time in seconds, rate, samples (n, channels) float32), at the rate and number of channels of the first.

    Gaps in the time stamps are not filled with silence.
    """
    time, begin, rate, channels = 0.0, decode.beginning(container), 0, 0
    for frame in decode.decoded(container, stream, tally, start):
        block, found = _samples(frame), frame.sample_rate
        rate, channels = rate or found, channels or block.shape[1]
        if block.shape[1] != channels:  # both may change within a file
            block = block.mean(axis=1, keepdims=True, dtype=np.float32).repeat(channels, axis=1)
        if found != rate:
            block = np.stack([resample(np.ascontiguousarray(wave), found, rate) for wave in block.T], axis=1)
        time = time if frame.time is None else frame.time - begin
        yield time, rate, block


SAMPLE_TYPES = {"u8": np.uint8, "s16": np.int16, "s32": np.int32, "s64": np.int64, "flt": np.float32, "dbl": np.float64}


def _samples(frame) -> np.ndarray:
    """A decoded frame as (n, channels) float32, full scale 1.

    Planes are read one by one: for eight planar channels, PyAV's own conversion assumes a ninth plane and crashes.
    """
    kind, count = SAMPLE_TYPES[frame.format.packed.name], frame.layout.nb_channels
    if frame.format.is_planar:
        values = np.stack([np.frombuffer(frame.planes[c], kind)[: frame.samples] for c in range(count)], axis=1)
    else:
        values = np.frombuffer(frame.planes[0], kind)[: frame.samples * count].reshape(-1, count)
    if kind == np.uint8:
        return (values.astype(np.float32) - 128) / 128
    if values.dtype.kind == "i":
        return values.astype(np.float32) / np.float32(2 ** (8 * values.dtype.itemsize - 1))
    return values.astype(np.float32)


def _check_rate(path: Path, rate: int) -> None:
    if not rate or not RATES[0] <= rate <= RATES[1]:
        raise UserError(f"{path}: sampling rate {rate} Hz; the header is damaged, get the file again")


def resample(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """(n,) at `rate` to (ceil(n * wanted / rate),) at `wanted`, float32: librosa's default, soxr at high quality.

    librosa and soxr are what `librosa.load(sr=22050)` uses in OGM-GE's loader; where librosa is missing, an error.
    """
    if rate == wanted:
        return wave
    try:
        import librosa
    except ImportError:
        raise UserError(f"sound at {rate} Hz must be resampled to {wanted} Hz; pip install librosa") from None
    return librosa.resample(wave, orig_sr=rate, target_sr=wanted).astype(np.float32, copy=False)


# ---------------------------------------------------------------------------------------------------------------------
# Spectrograms


def spectrogram(wave: np.ndarray, rate: int, recipe: AudioRecipe) -> np.ndarray:
    """(n,) waveform to the float32 spectrogram of `recipe.shape`, resampled first where the recipe fixes a rate.

    Raises `UserError` for an empty waveform or one too short for a single window.
    """
    if wave.size == 0:
        raise UserError("no samples to make a spectrogram of")
    if recipe.name == "fbank":
        return fbank(wave, rate)
    wave = resample(wave, rate, recipe.rate or rate)
    return logmel(wave, recipe) if recipe.name == "logmel" else logstft(wave)


def logstft(wave: np.ndarray) -> np.ndarray:
    """(n,) at 22,050 Hz to (257, 188): log(|STFT| + 1e-7), librosa's centred STFT with a Hann window.

    The wave is repeated until it fills 3 s, then cut to 3 s and clipped to [-1, 1]. OGM-GE's loader repeats it exactly
    three times before it cuts, so that clips under 1 s give shorter spectrograms. Here all have the same shape.
    """
    import librosa

    wave = np.clip(_repeat(wave, LOGSTFT_SAMPLES), -1, 1).astype(np.float64)
    # The padding is written out because librosa changed its default (reflection before 0.10); 2 columns differ.
    stft = librosa.stft(wave, n_fft=512, hop_length=353, pad_mode="constant")
    return _checked(np.log(np.abs(stft) + 1e-7), AUDIO_RECIPES["logstft"])


def fbank(wave: np.ndarray, rate: int) -> np.ndarray:
    """(n,) at `rate` Hz to (1024, 128): Kaldi filter banks, 10 ms a row, zero-padded or cut to 1,024 rows, scaled.

    Padding comes before scaling, as in OGM-GE's preparation, so padded rows hold 4.503877 / (2 * 5.141276).
    """
    import torch
    from torchaudio.compliance import kaldi

    if len(wave) < round(0.025 * rate):
        raise UserError(f"{1000 * len(wave) / rate:.0f} ms of sound; fbank needs at least one window of 25 ms")
    samples = torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float64))[None]
    rows = kaldi.fbank(
        samples - samples.mean(),
        htk_compat=True,
        sample_frequency=rate,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
        frame_shift=10,
    )[:1024]  # (rows, 128)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, 1024 - len(rows)))
    return _checked(((rows - FBANK_MEAN) / (2 * FBANK_STD)).numpy(), AUDIO_RECIPES["fbank"])


def logmel(wave: np.ndarray, recipe: AudioRecipe = AUDIO_RECIPES["logmel"]) -> np.ndarray:
    """(n,) at `recipe.rate` to `recipe.shape` (bands, columns): log(mel power + 1e-6), our own small recipe.

    The wave is repeated or cut to `recipe.samples`; mel bands (HTK), window of two hops, centred, a column for each
    hop. By default, as for the demo: 8 kHz, 1.024 s, 32 bands, hop 256.
    """
    import torch

    assert recipe.samples is not None
    samples = torch.from_numpy(_repeat(wave, recipe.samples)).double()
    with torch.no_grad():
        power = _mel(recipe)(samples)[:, : recipe.shape[1]]
        return _checked(torch.log(power + 1e-6).numpy(), recipe)


@functools.cache  # the transform holds a filter bank that takes longer to make than to use
def _mel(recipe: AudioRecipe):
    from torchaudio.transforms import MelSpectrogram

    assert recipe.rate is not None and recipe.hop is not None
    window, bands = 2 * recipe.hop, recipe.shape[0]
    transform = MelSpectrogram(recipe.rate, n_fft=window, win_length=window, hop_length=recipe.hop, n_mels=bands)
    return transform.double()


def _repeat(wave: np.ndarray, samples: int) -> np.ndarray:
    """`wave` repeated from its start until it has `samples` samples, cut there."""
    return np.resize(wave, samples).astype(np.float32, copy=False)


def _checked(values: np.ndarray, recipe: AudioRecipe) -> np.ndarray:
    values = np.ascontiguousarray(values, dtype=np.float32)
    if values.shape != recipe.shape:
        raise ValueError(f"{recipe.name} made {values.shape}, not {recipe.shape}")
    return values
