"""Waveforms and spectrograms: against independent computations, and against files that lie about themselves."""

import struct
import subprocess
import sys
import wave as wave_module
from pathlib import Path

import av
import librosa
import numpy as np
import pytest
import scipy.signal
import soundfile

from benchmarks.raw_samples import tone, write_video, write_wav
from dataset import specs
from dataset.prepare import audio
from dataset.prepare.audio import fbank, load_wave, logmel, logstft, resample, spectrogram
from dataset.prepare.video import packet_fault
from dataset.specs import AUDIO_RECIPES
from utils.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SPEECH, MEDIA = SHARED / "spoken_digits" / "recordings", SHARED / "media"


def sound(seconds, rate, seed=0):
    """Speech-like: a glide with harmonics whose loudness changes, in noise."""
    time = np.arange(round(seconds * rate)) / rate
    rng = np.random.default_rng(seed)
    voice = sum(np.sin(2 * np.pi * k * (120 + 30 * time) * time) / k for k in range(1, 8))
    return (0.2 * voice * (1 + np.sin(7 * time)) + 0.01 * rng.normal(size=len(time))).astype(np.float32)


# Recipes against numpy ------------------------------------------------------------------------------------------------


def frames_of(wave, window, hop):
    count = 1 + (len(wave) - window) // hop
    return np.stack([wave[i * hop : i * hop + window] for i in range(count)]).astype(np.float64)


def reference_logstft(wave):
    """(n,) at 22,050 Hz: repeat to 3 s, clip, zero-padded centred STFT with a periodic Hann window, log."""
    wave = np.tile(wave, -(-66_150 // len(wave)))[:66_150].clip(-1, 1)
    window = scipy.signal.get_window("hann", 512, fftbins=True)
    return np.log(np.abs(np.fft.rfft(frames_of(np.pad(wave, 256), 512, 353) * window)).T + 1e-7)


def reference_fbank(wave, rate):
    """Kaldi's filter banks from its documentation: 25 ms frames, DC removed, pre-emphasis .97, 128 mel triangles."""
    wave = wave.astype(np.float64) - wave.mean(dtype=np.float64)
    size, hop = int(rate * 0.025), int(rate * 0.010)
    frames = frames_of(wave, size, hop)
    frames = frames - frames.mean(1, keepdims=True)
    frames = frames - 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], 1)
    padded = 1 << (size - 1).bit_length()
    power = np.abs(np.fft.rfft(frames * np.hanning(size), padded)) ** 2

    def mel(f):
        return 1127 * np.log(1 + f / 700)

    edges = np.linspace(mel(20), mel(rate / 2), 130)
    bins = mel(np.arange(padded // 2) * rate / padded)
    low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bank = np.maximum(0, np.minimum((bins - low) / (mid - low), (high - bins) / (high - mid)))
    rows = np.log(np.maximum(power[:, :-1] @ bank.T, np.finfo(np.float32).eps))[:1024]
    rows = np.pad(rows, ((0, 1024 - len(rows)), (0, 0)))
    return (rows + 4.503877) / (2 * 5.141276)


def reference_logmel(wave):
    """8 kHz, 8,192 samples, reflected edges, HTK mel triangles 0 to 4,000 Hz."""
    wave = np.tile(wave, -(-8_192 // len(wave)))[:8_192]
    window = scipy.signal.get_window("hann", 512, fftbins=True)
    power = np.abs(np.fft.rfft(frames_of(np.pad(wave, 256, "reflect"), 512, 256) * window)) ** 2
    bank = librosa.filters.mel(sr=8_000, n_fft=512, n_mels=32, htk=True, norm=None, dtype=np.float64)
    return np.log(bank @ power.T[:, :32] + 1e-6)


@pytest.mark.parametrize("seconds", [0.4, 0.999, 1.0, 2.5, 3.0, 5.0])
def test_logstft(seconds):
    wave = sound(seconds, 22_050)
    values = logstft(wave)
    assert values.dtype == np.float32 and values.shape == (257, 188)
    assert np.abs(values - reference_logstft(wave)).max() < 1e-4


def test_logstft_clips_and_repeats():
    loud = sound(1.3, 22_050) * 20
    assert np.abs(loud).max() > 1
    assert np.abs(logstft(loud) - logstft(loud.clip(-1, 1))).max() == 0
    assert np.abs(logstft(loud) - logstft(np.concatenate([loud] * 4))).max() == 0


@pytest.mark.parametrize(("seconds", "rate"), [(2.0, 16_000), (6.0, 44_100), (10.0, 48_000), (10.4, 16_000)])
def test_fbank(seconds, rate):
    wave = sound(seconds, rate)
    values = fbank(wave, rate)
    assert values.dtype == np.float32 and values.shape == (1024, 128)
    assert np.abs(values - reference_fbank(wave, rate)).max() < 1e-4


def test_fbank_pads_before_scaling():
    assert np.allclose(fbank(sound(1, 16_000), 16_000)[200:], 4.503877 / (2 * 5.141276))
    with pytest.raises(UserError, match="25 ms"):
        fbank(sound(0.02, 16_000), 16_000)


@pytest.mark.parametrize("seconds", [0.3, 1.024, 2.0])
def test_logmel(seconds):
    wave = sound(seconds, 8_000)
    values = logmel(wave)
    assert values.dtype == np.float32 and values.shape == (32, 32)
    assert np.abs(values - reference_logmel(wave)).max() < 1e-4


def test_the_whole_way_from_a_file_equals_librosa(tmp_path):
    """16 kHz WAV to spectrogram, against librosa.load as in OGM-GE's loader."""
    path = write_wav(tmp_path / "a.wav", 2.5, 16_000)
    expected = reference_logstft(librosa.load(path, sr=22_050)[0])
    values = spectrogram(*load_wave(path), AUDIO_RECIPES["logstft"])
    assert np.abs(np.exp(values) - np.exp(expected)).max() < 1e-4


def test_resampling_keeps_a_tone():
    time = np.arange(16_000) / 16_000
    wanted = np.sin(2 * np.pi * 440 * np.arange(22_050) / 22_050)
    found = resample(np.sin(2 * np.pi * 440 * time).astype(np.float32), 16_000, 22_050)
    assert found.dtype == np.float32 and len(found) == 22_050
    assert np.abs(found - wanted)[500:-500].max() < 1e-3
    assert np.abs(found - scipy.signal.resample_poly(np.sin(2 * np.pi * 440 * time), 441, 320))[500:-500].max() < 2e-3


@pytest.mark.skipif(not SPEECH.is_dir(), reason="the spoken digits are not on this machine")
def test_real_speech():
    paths = sorted(SPEECH.glob("*_0.wav"))[:20]
    assert paths
    for path in paths:
        wave, rate = load_wave(path)
        assert rate == 8_000 and np.isfinite(logmel(wave)).all()
        # Recordings are far quieter in some bands than in others, and torchaudio's filter bank itself is float32.
        assert np.abs(logmel(wave) - reference_logmel(wave)).max() < 2e-4


# Files ----------------------------------------------------------------------------------------------------------------


def test_channels_are_averaged_or_the_first_is_taken(tmp_path):
    both = tone(0.5, 44_100, 2)
    soundfile.write(tmp_path / "a.wav", both, 44_100, subtype="FLOAT")
    mean, rate = load_wave(tmp_path / "a.wav")
    assert rate == 44_100 and mean.dtype == np.float32 and np.allclose(mean, both.mean(1), atol=1e-7)
    assert np.array_equal(load_wave(tmp_path / "a.wav", channels="first")[0], both[:, 0])
    assert abs(len(load_wave(tmp_path / "a.wav", rate=22_050)[0]) - 11_025) <= 1


@pytest.mark.parametrize("channels", [1, 2])
def test_the_track_inside_a_video_is_exact(tmp_path, channels):
    """PCM in a QuickTime file comes back sample for sample."""
    wave = (tone(1.0, 16_000, channels) * 32_767).astype(np.int16)
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        track = container.add_stream("pcm_s16le", rate=16_000)
        track.layout = "mono" if channels == 1 else "stereo"
        frame = av.AudioFrame.from_ndarray(wave.reshape(1, -1), format="s16", layout=track.layout.name)
        frame.sample_rate = 16_000
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    found, rate = load_wave(tmp_path / "a.mov", channels="first")
    assert rate == 16_000 and np.array_equal(found, wave[:, 0].astype(np.float32) / 32_768)
    assert np.allclose(load_wave(tmp_path / "a.mov")[0], wave.mean(1) / 32_768, atol=1e-6)


def test_a_compressed_track(tmp_path):
    wave = tone(2.0, 44_100, 2)
    path = write_video(tmp_path / "a.mp4", 2.0, 25, (64, 48), wave)
    found, rate = load_wave(path, channels="first")
    assert rate == 44_100 and abs(len(found) - len(wave)) < 4_096
    start = 4_096
    lag = np.argmax(scipy.signal.correlate(found[start : start + 22_050], wave[:22_050, 0], "full")) - 22_049 + start
    assert np.corrcoef(found[5_000 + lag : 40_000 + lag], wave[5_000:40_000, 0])[0, 1] > 0.98


def test_a_title_in_latin_1_does_not_lose_the_clip(tmp_path):
    path = write_video(tmp_path / "a.mp4", 1.0, 25, (64, 48), tone(1.0, 16_000), 16_000)
    data = path.read_bytes()
    assert b"Lavf" in data  # the name of the writing program, one of the texts in the header
    path.write_bytes(data.replace(b"Lavf", b"L\xe4vf"))
    assert len(load_wave(path)[0]) > 15_000
    assert packet_fault(path, needs_sound=True) == ("", "")


def test_a_video_without_sound(tmp_path):
    with pytest.raises(UserError, match="no audio track"):
        load_wave(write_video(tmp_path / "a.mp4", 0.5, 25, (64, 48)))


@pytest.mark.parametrize(("start", "end"), [(0.25, 0.75), (None, 0.5), (1.3, None), (0.0, 2.0)])
@pytest.mark.parametrize("name", ["a.wav", "b.wav", "a.mov"])
def test_cuts_are_exact_to_the_sample(tmp_path, name, start, end):
    """16 bit by Python, 24 bit and a PCM track by PyAV: the samples round(start * rate) to round(end * rate)."""
    path, wave = tmp_path / name, tone(2, 16_000)
    if name == "a.mov":
        with av.open(str(path), "w") as container:
            track = container.add_stream("pcm_s16le", rate=16_000)
            track.layout = "mono"
            values = (wave * 32_767).astype(np.int16).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(values, format="s16", layout="mono")
            frame.sample_rate = 16_000
            container.mux(track.encode(frame))
            container.mux(track.encode(None))
    else:
        soundfile.write(path, wave, 16_000, subtype="PCM_16" if name == "a.wav" else "PCM_24")
    whole, rate = load_wave(path)
    cut, _ = load_wave(path, start=start, end=end)
    assert np.array_equal(cut, whole[round((start or 0) * rate) : round((2 if end is None else end) * rate)])


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
def test_a_late_start_gives_the_same_samples(tmp_path, name):
    """Sought, and decoded from 5 s before: equal to the whole track cut, by the clock of the file."""
    path = write_video(tmp_path / name, 40, 10, (64, 48), tone(40, 16_000), 16_000)
    whole, rate = load_wave(path)
    cut, _ = load_wave(path, start=31.3, end=32.5)
    with av.open(str(path)) as container:
        late = round(next(container.decode(audio=0)).time * rate)  # Matroska's sound begins after the encoder's delay
    assert len(cut) == round(1.2 * rate)
    assert np.abs(cut - whole[round(31.3 * rate) - late : round(32.5 * rate) - late]).max() < 1e-6


def test_cuts_outside_the_sound_are_one_line_errors(tmp_path):
    for path in (
        write_wav(tmp_path / "a.wav", 2),
        write_video(tmp_path / "a.mp4", 2, 10, (64, 48), tone(2, 16_000), 16_000),
    ):
        with pytest.raises(UserError, match=r"the sound ends at 2\.\d\d s, before the clip's start at 5 s"):
            load_wave(path, start=5, end=6)
        with pytest.raises(UserError, match=r"the sound ends at 2\.\d\d s; the clip is 0 to 9 s"):
            load_wave(path, end=9)
        assert 7_900 < len(load_wave(path, start=1.5, end=2.3)[0]) < 12_900, "a second too few is no reason to lose it"


def encoded(path, codec, layout, values, form, rate=48_000):
    """A sound file of `values` (channels, n) or (1, n * channels) as `form` says."""
    with av.open(str(path), "w") as container:
        track = container.add_stream(codec, rate=rate)
        track.layout, track.format = layout, form
        frame = av.AudioFrame.from_ndarray(values, format=form, layout=layout)
        frame.sample_rate = rate
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return path


@pytest.mark.parametrize(
    ("codec", "form", "scale"),
    [("pcm_u8", "u8", 128), ("pcm_s16le", "s16", 2**15), ("pcm_s32le", "s32", 2**31), ("pcm_f32le", "flt", 1),
     ("pcm_f64le", "dbl", 1)],
)  # fmt: skip
def test_every_kind_of_sample(tmp_path, codec, form, scale):
    wave = tone(0.2, 48_000, 2).astype(np.float64)
    kind = audio.SAMPLE_TYPES[form]
    values = wave * (scale - 1) if scale > 1 else wave
    stored = (np.rint(values + 128 if form == "u8" else values) if scale > 1 else values).astype(kind)
    path = encoded(
        tmp_path / "a.mov" if form != "u8" else tmp_path / "a.mkv", codec, "stereo", stored.reshape(1, -1), form
    )
    found, rate = load_wave(path, channels="first")
    assert rate == 48_000 and np.abs(found[: len(wave)] - wave[:, 0]).max() < (1 / 100 if form == "u8" else 1e-4)
    expected = soundfile.read(write_same(tmp_path / "b.wav", wave), dtype="float32")[0][:, 0]
    assert np.abs(found[: len(wave)] - expected).max() < (1 / 100 if form == "u8" else 1e-4)


def write_same(path, wave):
    soundfile.write(path, wave, 48_000, subtype="DOUBLE")
    return path


@pytest.mark.skipif(not MEDIA.is_dir(), reason="the shared data are not on this machine")
@pytest.mark.parametrize("name", ["sample_dts_hd_ma.mp4", "sample_with_dts_hd_ma.mkv", "sample_dthd.mp4"])
def test_eight_channels_of_32_bits(name):
    """A segmentation fault in PyAV's own conversion of such frames."""
    wave, rate = load_wave(MEDIA / name)
    assert rate == 48_000 and len(wave) > 20_000 and np.isfinite(wave).all()


def test_a_wav_that_holds_another_format(tmp_path):
    """By what is in the file and not by its name: FLAC, Ogg and an AAC track called .wav, a WAV called .mp4."""
    wave = tone(1.0, 16_000)
    for kind in ("FLAC", "OGG"):
        soundfile.write(tmp_path / "a.wav", wave, 16_000, format=kind)
        expected = soundfile.read(tmp_path / "a.wav", dtype="float32")[0]
        found, rate = load_wave(tmp_path / "a.wav")
        assert rate == 16_000 and np.abs(found - expected[: len(found)]).max() < 1e-3 and len(found) >= len(wave) - 1
    write_video(tmp_path / "a.mp4", 1.0, 25, (64, 48), wave, 16_000).rename(tmp_path / "b.wav")
    assert len(load_wave(tmp_path / "b.wav")[0]) > 15_000
    soundfile.write(tmp_path / "c.wav", wave, 16_000, subtype="IMA_ADPCM")
    expected = soundfile.read(tmp_path / "c.wav", dtype="float32")[0]
    found = load_wave(tmp_path / "c.wav")[0]
    assert np.abs(found - expected).max() < 3e-3, "equal since FFmpeg 8; earlier versions round steps otherwise"
    write_wav(tmp_path / "d.wav", 1.0).rename(tmp_path / "d.mp4")
    assert np.array_equal(load_wave(tmp_path / "d.mp4")[0], soundfile.read(tmp_path / "d.mp4", dtype="float32")[0])


@pytest.mark.parametrize(
    ("rate", "seconds", "bands", "hop"), [(16_000, 1.5, 64, None), (16_000, 0.6, 40, 160), (22_050, 3, 80, 512)]
)
def test_logmel_of_any_rate_length_and_bands(rate, seconds, bands, hop):
    recipe = specs.logmel(rate, seconds, bands, hop)
    wave = sound(1.0, 44_100)
    values = spectrogram(wave, 44_100, recipe)
    assert (
        values.shape == recipe.shape == (bands, -(-round(rate * seconds) // recipe.hop)) and values.dtype == np.float32
    )
    samples = np.resize(resample(wave, 44_100, rate), round(rate * seconds))
    window = scipy.signal.get_window("hann", 2 * recipe.hop, fftbins=True)
    frames = frames_of(np.pad(samples, recipe.hop, "reflect"), 2 * recipe.hop, recipe.hop)
    bank = librosa.filters.mel(sr=rate, n_fft=2 * recipe.hop, n_mels=bands, htk=True, norm=None, dtype=np.float64)
    reference = np.log(bank @ (np.abs(np.fft.rfft(frames * window)) ** 2).T + 1e-6)[:, : recipe.shape[1]]
    assert np.abs(values - reference).max() < 2e-4


def wav_header(data_bytes, channels=1, rate=16_000, bits=16):
    block = channels * bits // 8
    fmt = struct.pack("<HHIIHH", 1, channels, rate, min(rate * block, 2**32 - 1), block % 65_536, bits)
    size = min(data_bytes + 36, 2**32 - 1)
    return (
        b"RIFF"
        + struct.pack("<I", size)
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + fmt
        + b"data"
        + struct.pack("<I", data_bytes)
    )


def test_memory_follows_the_file_and_not_its_header(tmp_path):
    """A header that promises 4 GB over one second of sound, read where only 1.5 GB are to be had."""
    path = tmp_path / "a.wav"
    path.write_bytes(wav_header(0xFFFFFFF0) + np.zeros(16_000, "<i2").tobytes())
    code = (
        "import resource, sys, soundfile, numpy\n"
        "from dataset.prepare.audio import load_wave, _read_pcm16\n"
        "now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + 1_500_000_000,) * 2)\n"
        "from pathlib import Path\n"
        "print(len(load_wave(sys.argv[1])[0]), len(_read_pcm16(Path(sys.argv[1]))[0]))\n"
    )
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc to limit memory")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["16000", "16000"], done.stderr


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"RIFF",
        b"version https://git-lfs.github.com/spec/v1\n",
        wav_header(0),
        wav_header(0xFFFFFFF0, rate=3) + b"\0" * 64,
        wav_header(0xFFFFFFF0, rate=4_000_000_000) + b"\0" * 64,
        wav_header(64, channels=0) + b"\0" * 64,
        wav_header(64, channels=60_000) + b"\0" * 64,
        np.random.default_rng(0).bytes(5_000),
    ],
)
@pytest.mark.parametrize("name", ["a.wav", "a.mp4"])
def test_broken_sounds_are_one_line_errors(tmp_path, data, name):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        load_wave(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_too_long_and_not_finite(tmp_path, monkeypatch):
    path = write_wav(tmp_path / "a.wav", 3)
    monkeypatch.setattr(audio, "MAX_SECONDS", 2)
    with pytest.raises(UserError, match="more than 2 s"):
        load_wave(path)
    soundfile.write(tmp_path / "b.wav", np.full(1_000, np.nan), 16_000, subtype="FLOAT")
    with pytest.raises(UserError, match="NaN"):
        load_wave(tmp_path / "b.wav")
    with pytest.raises(UserError, match="no samples"):
        spectrogram(np.zeros(0, np.float32), 16_000, AUDIO_RECIPES["fbank"])


def test_without_pyav_16_bit_wav_still_reads(tmp_path, monkeypatch):
    path = write_wav(tmp_path / "a.wav", 0.5, channels=2)
    expected = soundfile.read(path, dtype="float32")[0].mean(1)
    monkeypatch.setitem(sys.modules, "av", None)
    assert np.array_equal(load_wave(path)[0], expected)
    with wave_module.open(str(tmp_path / "b.wav"), "wb") as file:
        file.setparams((1, 1, 8_000, 0, "NONE", ""))
        file.writeframes(b"\x80" * 100)
    with pytest.raises(UserError, match="pip install av"):
        load_wave(tmp_path / "b.wav")


def test_demo_and_training_need_neither_librosa_nor_av(tmp_path):
    path = write_wav(tmp_path / "a.wav", 1, 8_000)
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('librosa', 'av')))\n"
        "import dataset.folder, dataset.pack, dataset.prepare.__main__\n"
        "assert 'torch' not in sys.modules, 'every worker of the preparation would import it'\n"
        "from dataset.prepare.audio import load_wave, logmel, fbank\n"
        "wave, rate = load_wave(sys.argv[1]); print(logmel(wave).shape, fbank(wave, rate).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.stdout == "(32, 32) (1024, 128)\n", done.stderr
