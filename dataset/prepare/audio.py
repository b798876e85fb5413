"""Sound files to waveforms, waveforms to spectrograms of one fixed shape.

Recipes compute in float64 and store float32: the logarithm of an almost silent band magnifies the rounding of float32
to more than 1e-4, and two machines would then make two datasets. librosa and PyAV are imported only where they are
needed: `fbank` and `logmel` of a WAV file work without both.
"""

import os
from pathlib import Path

import numpy as np

from dataset.specs import AUDIO_RECIPES, AudioRecipe
from utils.errors import UserError

MAX_SECONDS = 600  # per clip; the datasets have 10-second clips, so a longer one is a damaged header
RATES = (1_000, 400_000)  # Hz; outside it the header is damaged
NO_TRACK = "no audio track"
BLOCK = 2**18  # samples read at a time, so that memory follows what is in the file and not what its header promises

LOGSTFT_SAMPLES = 66_150  # 3 s at 22,050 Hz
FBANK_MEAN, FBANK_STD = -4.503877, 5.141276  # of AudioSet, as in OGM-GE's preparation
LOGMEL_SAMPLES = 8_192  # 1.024 s at 8 kHz: with hop 256 exactly 32 columns


# ---------------------------------------------------------------------------------------------------------------------
# Waveforms


def load_wave(path: Path | str, rate: int | None = None, channels: str = "mean") -> tuple[np.ndarray, int]:
    """(wave float32 (n,), rate in Hz) of a WAV file or of the audio track of a video.

    `rate` resamples; None keeps the file's own. `channels`: "mean" averages them, "first" takes the first. Raises
    `UserError` where there is no sound to be had: no audio track, no samples, a broken file, over 10 minutes.
    """
    path = Path(path)
    if channels not in ("mean", "first"):
        raise ValueError(f"channels {channels!r}: 'mean' or 'first'")
    wave, found = _read_wav(path) if path.suffix.lower() == ".wav" else _read_track(path)
    if wave.size == 0:
        raise UserError(f"{path}: no samples in it; get the file again")
    if not np.isfinite(wave).all():
        raise UserError(f"{path}: NaN or infinite samples; get the file again")
    wave = wave.mean(axis=1, dtype=np.float32) if channels == "mean" else wave[:, 0]
    wave = np.ascontiguousarray(wave, dtype=np.float32)
    if rate is not None and rate != found:
        wave, found = resample(wave, found, rate), rate
    return wave, found


def _read_wav(path: Path) -> tuple[np.ndarray, int]:
    """(wave (n, channels), rate) by libsndfile, block by block."""
    try:
        import soundfile
    except ImportError:
        return _read_pcm16(path)
    try:
        with soundfile.SoundFile(str(path)) as file:
            _check_rate(path, file.samplerate)
            most, size = MAX_SECONDS * file.samplerate, max(1, BLOCK // file.channels)
            blocks: list[np.ndarray] = [np.zeros((0, file.channels), dtype=np.float32)]
            total = 0
            while total <= most and len(block := file.read(size, dtype="float32", always_2d=True)):
                blocks.append(block)
                total += len(block)
            _check_length(path, total, file.samplerate)
            return np.concatenate(blocks), file.samplerate
    except (soundfile.SoundFileError, OSError) as error:
        raise UserError(f"{path}: no readable sound file ({_short(error)}); get the file again") from None


def _read_pcm16(path: Path) -> tuple[np.ndarray, int]:
    """(wave (n, channels), rate) of a 16-bit WAV with Python alone, for machines without soundfile."""
    import wave

    try:
        with wave.open(str(path), "rb") as file:
            if file.getsampwidth() != 2:
                raise UserError(f"{path}: {8 * file.getsampwidth()}-bit samples; pip install soundfile to read it")
            _check_rate(path, file.getframerate())
            data = file.readframes(min(file.getnframes(), MAX_SECONDS * file.getframerate() + 1))
            channels, rate = file.getnchannels(), file.getframerate()
    except (wave.Error, EOFError, OSError) as error:
        raise UserError(f"{path}: no readable WAV file ({_short(error)}); get the file again") from None
    samples = np.frombuffer(data[: len(data) // (2 * channels) * 2 * channels], dtype="<i2").reshape(-1, channels)
    _check_length(path, len(samples), rate)
    return samples.astype(np.float32) / 32_768, rate


def _read_track(path: Path) -> tuple[np.ndarray, int]:
    """(wave (n, channels), rate) of the first audio track of a video, by PyAV. Damaged packets are passed over."""
    import av
    from av.error import FFmpegError

    try:
        # Titles in Latin-1 are common on the web and no reason to lose a clip.
        with av.open(os.path.abspath(path), metadata_errors="replace") as container:
            if not container.streams.audio:
                raise UserError(f"{path}: {NO_TRACK}")
            stream = container.streams.audio[0]
            _check_rate(path, stream.rate)
            chunks, total = [], 0
            for chunk in _decode(av, container, stream):
                chunks.append(chunk)
                total += len(chunk)
                _check_length(path, total, stream.rate)
            return np.concatenate(chunks or [np.zeros((0, 1), dtype=np.float32)]), stream.rate
    except (FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{path}: no readable audio track ({_short(error)}); get the file again") from None


def _decode(av, container, stream):
    """Yield (n, channels) float32 blocks at the track's own rate and number of channels."""
    resampler = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.InvalidDataError:
            continue  # as players do: the packets around a damaged one are good
        for frame in frames:
            frame.pts = None  # gaps in the time stamps are not filled with silence
            for part in resampler.resample(frame):
                yield part.to_ndarray().T
    for part in resampler.resample(None):
        yield part.to_ndarray().T


def _check_rate(path: Path, rate: int) -> None:
    if not rate or not RATES[0] <= rate <= RATES[1]:
        raise UserError(f"{path}: sampling rate {rate} Hz; the header is damaged, get the file again")


def _check_length(path: Path, samples: int, rate: int) -> None:
    if samples > MAX_SECONDS * rate:
        raise UserError(f"{path}: more than {MAX_SECONDS} s of sound; cut it to the clip")


def _short(error: BaseException) -> str:
    """What went wrong in a few words, without the path: the line names it already."""
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or error
    return " ".join(str(text).split())[:120]


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
    return {"logstft": logstft, "logmel": logmel}[recipe.name](wave)


def logstft(wave: np.ndarray) -> np.ndarray:
    """(n,) at 22,050 Hz to (257, 188): log(|STFT| + 1e-7), librosa's centred STFT with a Hann window.

    The wave is repeated until it fills 3 s, cut there and clipped to [-1, 1]. OGM-GE's loader repeats it three times
    and cuts, which leaves a clip shorter than 1 s shorter than the others; this one is never shorter.
    """
    import librosa

    wave = np.clip(_repeat(wave, LOGSTFT_SAMPLES), -1, 1).astype(np.float64)
    # The padding is written out because librosa changed its default (reflection before 0.10); 2 columns differ.
    stft = librosa.stft(wave, n_fft=512, hop_length=353, pad_mode="constant")
    return _checked(np.log(np.abs(stft) + 1e-7), "logstft")


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
    return _checked(((rows - FBANK_MEAN) / (2 * FBANK_STD)).numpy(), "fbank")


def logmel(wave: np.ndarray) -> np.ndarray:
    """(n,) at 8 kHz to (32, 32): log(mel power + 1e-6), our own small recipe for the demo.

    The wave is repeated or cut to 8,192 samples; 32 mel bands, window 512, hop 256, centred, the first 32 columns.
    """
    import torch

    samples = torch.from_numpy(_repeat(wave, LOGMEL_SAMPLES)).double()
    with torch.no_grad():
        return _checked(torch.log(_mel()(samples)[:, :32] + 1e-6).numpy(), "logmel")


_MEL = []  # the transform holds a filter bank that takes longer to make than to use


def _mel():
    if not _MEL:
        from torchaudio.transforms import MelSpectrogram

        _MEL.append(MelSpectrogram(sample_rate=8_000, n_fft=512, win_length=512, hop_length=256, n_mels=32).double())
    return _MEL[0]


def _repeat(wave: np.ndarray, samples: int) -> np.ndarray:
    """`wave` repeated from its start until it has `samples` samples, cut there."""
    return np.resize(wave, samples).astype(np.float32, copy=False)


def _checked(values: np.ndarray, recipe: str) -> np.ndarray:
    values = np.ascontiguousarray(values, dtype=np.float32)
    if values.shape != AUDIO_RECIPES[recipe].shape:
        raise ValueError(f"{recipe} made {values.shape}, not {AUDIO_RECIPES[recipe].shape}")
    return values
