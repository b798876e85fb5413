"""The demo data: what is drawn is what `clips.csv` says, the split is clean, and `data/demo` is whole or absent."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
import wave
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dataset.folder import load_folder, split_validation
from dataset.prepare import demo
from dataset.prepare.demo import DemoSettings, ensure_demo
from dataset.specs import get_spec
from utils.errors import UserError

RATE = 8_000
TINY = DemoSettings(limit=40)
RECORDINGS = Path(__file__).resolve().parents[2] / "shared" / "data" / "spoken_digits" / "recordings"
REPO = Path(__file__).resolve().parents[1]


def read_wav(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, RATE)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def lists(root: Path) -> dict[str, list[str]]:
    return {part: (root / f"{part}.csv").read_text().splitlines() for part in ("train", "test")}


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def goertzel(sound: np.ndarray, frequency: float) -> float:
    """Power of `sound` at one frequency, by the recurrence telephone exchanges use."""
    turn = 2 * np.cos(2 * np.pi * frequency / RATE)
    before = last = 0.0
    for sample in sound.tolist():
        before, last = last, sample + turn * last - before
    return last**2 + before**2 - turn * last * before


TRUE = demo.Machine(1.0, [])  # runs at the right speed and is silent


def heard_key(sound: np.ndarray) -> str:
    rows, columns = (697, 770, 852, 941), (1209, 1336, 1477)
    row = max(range(4), key=lambda i: goertzel(sound, rows[i]))
    column = max(range(3), key=lambda i: goertzel(sound, columns[i]))
    return ("123", "456", "789", "*0#")[row][column]


def measured_snr_db(sound: np.ndarray, digit: str, machine: demo.Machine = TRUE) -> float:
    """Tones fitted by least squares; what they and the machine's hum leave over is the noise."""
    time = np.arange(len(sound)) / RATE
    pitches = [f * machine.speed for f in demo.DTMF[digit]] + [f for f, _ in machine.hum]
    waves = [shape(2 * np.pi * f * time) for f in pitches for shape in (np.sin, np.cos)]
    basis = np.stack(waves, axis=1)
    parts = basis * np.linalg.lstsq(basis, sound, rcond=None)[0]
    return 10 * np.log10(np.mean(parts[:, :4].sum(1) ** 2) / np.mean((sound - parts.sum(1)) ** 2))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "tiny"
    assert ensure_demo(root, settings=TINY, quiet=True)
    return root


# ------------------------------------------------------------------------------------------------ sound


@pytest.mark.parametrize("digit", "0123456789")
def test_a_key_sounds_its_row_and_column(digit):
    settings = DemoSettings(tone_snr_db=(15.0, 15.0))
    sound, truth = demo.draw_tone(digit, TRUE, settings, np.random.default_rng(5))
    assert heard_key(sound) == digit
    assert truth == {"snr_db": 15.0, "speed": 1.0}
    assert np.sqrt(np.mean(sound**2)) == pytest.approx(settings.level)


@pytest.mark.parametrize("wanted", [10.0, 0.0, -8.0, -16.0])
def test_tone_snr_is_what_was_asked(wanted):
    settings = DemoSettings(tone_snr_db=(wanted, wanted))
    sounds = [demo.draw_tone("7", TRUE, settings, np.random.default_rng(seed))[0] for seed in range(8)]
    assert np.mean([measured_snr_db(sound, "7") for sound in sounds]) == pytest.approx(wanted, abs=0.5)


def test_a_slow_machine_makes_another_key():
    settings = DemoSettings(tone_snr_db=(15.0, 15.0))
    slow = demo.Machine(697 / 770, [])
    assert heard_key(demo.draw_tone("5", slow, settings, np.random.default_rng(5))[0]) == "1"


def test_a_machine_hums_its_own_tones_beside_the_keys():
    settings = DemoSettings(tone_snr_db=(30.0, 30.0), speed=(1.0, 1.0), hum_db=(-6.0, -6.0))
    machine = demo.draw_machine(3, settings)
    sound, _ = demo.draw_tone("7", machine, settings, np.random.default_rng(5))
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), 8 * len(sound)))
    heights = [spectrum[round(f * 8 * len(sound) / RATE)] for f, _ in machine.hum]
    assert len(heights) == 6
    key = np.mean([spectrum[round(f * 8 * len(sound) / RATE)] for f in demo.DTMF["7"]])
    # two hums may lie close together, and then beat: the median is spared that
    assert 20 * np.log10(np.median(heights) / key) == pytest.approx(-6, abs=1)


def test_machines_differ_between_the_parts_and_cover_the_speeds():
    settings = DemoSettings()
    slow, fast = settings.speed
    machines = [demo.draw_machine(number, settings) for number in range(2 * settings.machines)]
    assert len({machine.speed for machine in machines}) == len({tuple(m.hum) for m in machines}) == len(machines)
    for part in (machines[: settings.machines], machines[settings.machines :]):
        steps = [int((m.speed - slow) / (fast - slow) * settings.machines) for m in part]
        assert steps == list(range(settings.machines))

    _, labels = demo.load_scans()
    clips = demo.plan_clips(labels, None, settings)
    used = {part: {clip.machine for clip in clips if clip.part == part} for part in ("train", "test")}
    assert used == {"train": set(range(6)), "test": set(range(6, 12))}
    for part in used:
        for digit in demo.DIGITS:
            counts = Counter(clip.machine for clip in clips if (clip.part, clip.digit) == (part, digit))
            assert max(counts.values()) - min(counts.values()) <= 1, (part, digit)


def test_speech_is_placed_whole_and_its_snr_counts_only_its_own_length():
    speech = np.sin(np.arange(2000) * 0.3)
    settings = DemoSettings(speech_snr_db=(20.0, 20.0), level=0.1)
    sound, _ = demo.draw_speech(speech, settings, np.random.default_rng(1))
    assert sound.shape == (settings.samples,)
    match = np.correlate(sound, speech, "valid")
    start = int(match.argmax())
    gain = match[start] / (speech @ speech)
    noise = sound - np.pad(gain * speech, (start, settings.samples - start - 2000))
    assert 10 * np.log10(np.mean((gain * speech) ** 2) / np.mean(noise**2)) == pytest.approx(20.0, abs=0.3)


def test_speech_longer_than_a_clip_keeps_its_loudest_stretch():
    speech = np.concatenate([np.full(8000, 0.01), np.sin(np.arange(4000) * 0.3), np.full(8000, 0.01)])
    settings = DemoSettings(speech_snr_db=(40.0, 40.0))
    sound, _ = demo.draw_speech(speech, settings, np.random.default_rng(1))
    assert sound.shape == (settings.samples,)
    assert np.sum(np.abs(sound) > 2 * settings.level / 3) > 2000


# ------------------------------------------------------------------------------------------------ pictures


def test_the_digit_stays_inside_and_moves():
    scans, _ = demo.load_scans()
    for seed in range(50):
        settings = DemoSettings(drift=(6.0, 6.0))
        ink = demo._drifting_ink(scans[seed], settings, np.random.default_rng(seed))
        mass = ink.sum((1, 2))
        assert mass.min() > 0.97 * mass.max()  # nothing slides out of the picture
        places = np.indices(ink.shape[1:]).reshape(2, -1)
        centre = (ink.reshape(len(ink), -1) @ places.T) / mass[:, None]
        assert np.linalg.norm(centre[-1] - centre[0]) > 2


def test_contrast_and_occluder_are_what_the_truth_says():
    scans, _ = demo.load_scans()
    plain = DemoSettings(clutter=(0.0, 0.0), occluder=(0.0, 0.0), grain=0.0, contrast=(0.5, 0.5))
    frames, truth = demo.draw_video(scans[0], plain, np.random.default_rng(0))
    assert frames.shape == (8, 32, 32, 3)
    assert frames.dtype == np.uint8
    assert (truth["contrast"], truth["hidden"]) == (0.5, 0.0)
    light = frames.astype(float).mean(-1) / 255
    assert light.max() - light.min() == pytest.approx(0.5, abs=0.06)
    covered = [demo.draw_video(scans[0], replace(plain, occluder=(s, s)), np.random.default_rng(0))[1] for s in (6, 12)]
    assert 0 < covered[0]["hidden"] < covered[1]["hidden"] < 1


# ------------------------------------------------------------------------------------------------ split


def test_the_whole_demo_is_split_1347_to_450_and_stratified():
    _, labels = demo.load_scans()
    plan = demo.plan_clips(labels, None, DemoSettings())
    parts = {part: [clip for clip in plan if clip.part == part] for part in ("train", "test")}
    assert {part: len(clips) for part, clips in parts.items()} == {"train": 1347, "test": 450}
    assert not {c.scan for c in parts["train"]} & {c.scan for c in parts["test"]}
    assert {c.scan for c in plan} == set(range(1797))
    assert all(clip.digit == labels[clip.scan] for clip in plan)
    for digit in demo.DIGITS:
        assert abs(sum(c.digit == digit for c in parts["test"]) - 0.25 * labels.count(digit)) <= 1
    assert plan != demo.plan_clips(labels, None, DemoSettings(seed=1))


def make_speech(folder: Path, takes: int = 8) -> Path:
    """Recordings of nobody: a burst per digit and take."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for digit in demo.DIGITS:
        for take in range(takes):
            speaker = ("ada", "bob")[take % 2]
            demo.write_wav(0.3 * rng.standard_normal(1500 + 100 * take), folder / f"{digit}_{speaker}_{take // 2}.wav")
    return folder


def check_speech_plan(folder: Path) -> list[demo.DemoClip]:
    _, labels = demo.load_scans()
    recordings = demo.find_recordings(folder)
    plan = demo.plan_clips(labels, recordings, DemoSettings())
    assert sorted(clip.recording for clip in plan) == recordings
    assert len({clip.name for clip in plan}) == len(recordings)
    for clip in plan:
        assert clip.digit == labels[clip.scan] == clip.recording.name[0]
    train, test = ({c.scan for c in plan if c.part == part} for part in ("train", "test"))
    assert not train & test
    return plan


def test_speech_shares_no_scan_and_no_recording(tmp_path):
    plan = check_speech_plan(make_speech(tmp_path / "speech"))
    assert sum(clip.part == "test" for clip in plan) == 20


def test_real_speech_shares_no_scan_and_no_recording():
    if not RECORDINGS.is_dir():
        pytest.skip("the spoken digits are not beside the repository (shared/data/spoken_digits)")
    plan = check_speech_plan(RECORDINGS)
    assert len(plan) == 3000
    assert sum(clip.part == "test" for clip in plan) == 750
    assert {clip.scan for clip in plan} == set(range(1797))


# ------------------------------------------------------------------------------------------------ the folder


def test_the_folder_has_the_training_layout(tiny):
    rows = read_csv(tiny / "clips.csv")
    names = {row["clip"] for row in rows}
    assert {path.name for path in (tiny / "visual").iterdir()} == names
    assert {path.stem for path in (tiny / "audio").iterdir()} == names
    assert (tiny / "stat.csv").read_text().split() == list(demo.DIGITS)
    for part, lines in lists(tiny).items():
        assert sorted(lines) == sorted(f"{r['clip']},{r['digit']}" for r in rows if r["part"] == part)
        assert {line[-1] for line in lines} == set(demo.DIGITS)
    for name in names:
        assert len(list((tiny / "visual" / name).glob("*.jpg"))) == TINY.seconds
        spectrogram = np.load(tiny / "audio" / f"{name}.npy")
        assert (spectrogram.shape, spectrogram.dtype) == ((32, 32), np.float32)


def test_a_validation_part_is_of_other_machines(tmp_path):
    root = tmp_path / "demo"
    settings = replace(TINY, limit=120)
    ensure_demo(root, settings=settings, quiet=True)
    machine = {row["clip"]: row["machine"] for row in read_csv(root / "clips.csv")}
    folder = load_folder(root, get_spec("demo"))
    train, val = split_validation(folder.parts["train"], 0.1, folder.groups)
    parts = {"train": train, "val": val, "test": folder.parts["test"]}
    used = {name: {machine[clip] for clip in part.clips} for name, part in parts.items()}
    assert [len(used[name]) for name in ("train", "val", "test")] == [5, 1, 6]
    assert not used["train"] & used["val"] and not used["test"] & (used["train"] | used["val"])
    (root / "groups.csv").unlink()
    assert ensure_demo(root, settings=settings, quiet=True) and (root / "groups.csv").is_file()


def test_raw_files_are_what_clips_csv_says(tiny):
    import cv2

    for row in read_csv(tiny / "clips.csv"):
        sound = read_wav(tiny / "raw" / "audio" / f"{row['clip']}.wav")
        assert len(sound) == TINY.samples
        # 16-bit rounding is 60 dB below; the fit itself errs by more the weaker the tone is
        machine = demo.draw_machine(int(row["machine"]), TINY)
        assert f"{machine.speed:.4f}" == row["speed"]
        assert measured_snr_db(sound, row["digit"], machine) == pytest.approx(float(row["snr_db"]), abs=1.5)
        video = cv2.VideoCapture(str(tiny / "raw" / "video" / f"{row['clip']}.avi"))
        assert video.get(cv2.CAP_PROP_FPS) == TINY.fps
        frames = 0
        while (found := video.read())[0]:
            assert found[1].shape == (TINY.side, TINY.side, 3)
            frames += 1
        assert frames == TINY.fps * TINY.seconds


def test_made_twice_it_is_the_same_byte_by_byte(tiny, tmp_path):
    assert ensure_demo(tmp_path / "again", settings=TINY, quiet=True)
    first, second = contents(tiny), contents(tmp_path / "again")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert {path.name for path in tmp_path.iterdir()} == {"again", ".again.lock"}


def test_another_seed_draws_other_clips_and_another_tone_range_the_same_pictures(tiny, tmp_path):
    ensure_demo(tmp_path / "seed", settings=replace(TINY, seed=1), quiet=True)
    assert lists(tmp_path / "seed") != lists(tiny)
    ensure_demo(tmp_path / "tones", settings=replace(TINY, tone_snr_db=(-16.0, -4.0)), quiet=True)
    first, second = contents(tiny), contents(tmp_path / "tones")
    assert all(first[name] == second[name] for name in first if name.endswith((".avi", ".jpg")))
    assert not any(first[name] == second[name] for name in first if name.endswith((".wav", ".npy")))


def test_it_is_made_once_and_again_when_something_changes(tmp_path):
    root = tmp_path / "demo"
    assert ensure_demo(root, settings=TINY, quiet=True)
    assert not ensure_demo(root, settings=TINY, quiet=True)
    assert ensure_demo(root, settings=replace(TINY, grain=0.05), quiet=True)
    assert not ensure_demo(root, settings=replace(TINY, grain=0.05), quiet=True)
    next((root / "audio").iterdir()).unlink()
    assert ensure_demo(root, settings=replace(TINY, grain=0.05), quiet=True)


def test_older_code_s_data_is_made_again(tmp_path, monkeypatch):
    root = tmp_path / "demo"
    ensure_demo(root, settings=TINY, quiet=True)
    monkeypatch.setattr(demo, "VERSION", demo.VERSION + 1)
    assert ensure_demo(root, settings=TINY, quiet=True)


def test_without_settings_a_chosen_seed_is_kept(tmp_path, monkeypatch):
    """`prepare_demo.sh --seed 7` and then `run_train.sh` trains on seed 7."""
    root = tmp_path / "demo"
    monkeypatch.setattr(demo, "DemoSettings", type("Few", (DemoSettings,), {"__init__": few_clips}))
    ensure_demo(root, settings=demo.DemoSettings(seed=7), quiet=True)
    assert not ensure_demo(root, quiet=True)
    assert json.loads((root / demo.RECORD).read_text())["settings"]["seed"] == 7


def few_clips(self, **values):
    DemoSettings.__init__(self, **{"limit": 20} | values)


def test_a_killed_run_is_not_taken_for_data(tmp_path):
    """A real kill in the middle of the raw clips: nothing stands where training looks, and the next call makes it."""
    root = tmp_path / "demo"
    code = (
        f"from dataset.prepare.demo import *; ensure_demo({str(root)!r}, settings=DemoSettings(limit=400), quiet=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPO)
    deadline = time.time() + 120
    while not list(tmp_path.glob(".tmp-new-demo/raw/audio/*.wav")) and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob(".tmp-new-demo/raw/audio/*.wav"))
    assert not root.exists()
    assert ensure_demo(root, settings=TINY, quiet=True)
    assert not (tmp_path / ".tmp-new-demo").exists()


def test_two_at_once_make_it_once(tmp_path):
    settings = "DemoSettings(limit=100)"
    code = f"from dataset.prepare.demo import *; print(ensure_demo({str(tmp_path / 'demo')!r}, settings={settings}))"
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(process.communicate()[0].split()[-1] for process in both) == ["False", "True"]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: no worker processes")
def test_a_script_without_a_main_guard_ends_with_what_to_do(tmp_path):
    """The workers of the preparation import it again and would wait for their parent, which waits for them."""
    script = tmp_path / "script.py"
    call = f"ensure_demo({str(tmp_path / 'demo')!r}, settings=DemoSettings(limit=210), quiet=True)"
    script.write_text(f"from dataset.prepare.demo import *\n{call}\n")
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    child = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120)
    assert child.returncode and "call ensure_demo under: if __name__ == '__main__'" in child.stderr


def test_a_failure_while_remaking_keeps_the_old_data(tmp_path, monkeypatch):
    root = tmp_path / "demo"
    ensure_demo(root, settings=TINY, quiet=True)
    before = contents(root)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "write_wav", full)
    with pytest.raises(UserError, match="disk is full"):
        ensure_demo(root, settings=replace(TINY, seed=3), quiet=True)
    assert contents(root) == before
    assert not (tmp_path / ".tmp-new-demo").exists()


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(UserError, match=r"photos: contains files that are not complete demo data.*choose another"):
        ensure_demo(tmp_path / "photos", settings=TINY, quiet=True)
    assert contents(tmp_path / "photos") == {"cat.jpg": b"cat"}


# ------------------------------------------------------------------------------------------------ speech


def test_speech_goes_through_the_same_preparation(tmp_path):
    speech = make_speech(tmp_path / "speech", takes=4)
    root = tmp_path / "demo_speech"
    assert ensure_demo(root, speech, TINY, quiet=True)
    assert not ensure_demo(root, speech, TINY, quiet=True)
    rows = read_csv(root / "clips.csv")
    assert {row["speaker"] for row in rows} == {"ada", "bob"}
    assert all(
        row["clip"] == f"digit{row['digit']}_{row['speaker']}_{row['take']}_{int(row['scan']):04d}" for row in rows
    )
    assert len(list((root / "audio").iterdir())) == len(rows) == 40
    demo.write_wav(np.full(2000, 0.5), speech / "0_ada_0.wav")
    assert ensure_demo(root, speech, TINY, quiet=True)  # another recording under the same name


def test_a_link_stays_a_link_and_what_it_points_to_is_made(tmp_path):
    (tmp_path / "large disk").mkdir()
    link, real = tmp_path / "demo", tmp_path / "large disk" / "demo"
    link.symlink_to(real)
    for settings in (TINY, replace(TINY, grain=0.05)):  # made, then made again
        assert ensure_demo(link, settings=settings, quiet=True)
        assert link.is_symlink() and (real / "demo.json").is_file() and not real.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"demo", "large disk"}
    assert {path.name for path in real.parent.iterdir()} == {"demo", ".demo.lock"}


def test_speech_data_is_not_replaced_by_tones_unasked(tmp_path, monkeypatch):
    speech = make_speech(tmp_path / "speech", takes=2)
    root = tmp_path / "demo"
    ensure_demo(root, speech, quiet=True)
    assert not ensure_demo(root, quiet=True)
    monkeypatch.setattr(demo, "VERSION", demo.VERSION + 1)
    with pytest.raises(UserError, match=r"made from recordings.*--speech DIR"):
        ensure_demo(root, quiet=True)


def test_recordings_at_another_rate_and_in_stereo_are_converted(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    pytest.importorskip("librosa")
    time = np.arange(16_000) / 16_000
    soundfile.write(tmp_path / "0_ada_0.wav", np.stack([np.sin(2 * np.pi * 500 * time)] * 2, axis=1), 16_000)
    sound = demo.read_recording(tmp_path / "0_ada_0.wav")
    assert sound.shape == (8000,)
    assert np.abs(np.fft.rfft(sound)).argmax() == 500


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "0_ada_0.wav").rename(folder / "zero.wav"), r"zero\.wav is not named \{digit\}_"),
        (lambda folder: (folder / "0_ada_0.wav").write_bytes(b"version https://git-lfs"), r"0_ada_0\.wav"),
        (lambda folder: demo.write_wav(np.zeros(900), folder / "0_ada_0.wav"), r"0_ada_0\.wav is silent"),
        (lambda folder: [path.unlink() for path in folder.glob("4_*")], r"fewer than 2 recordings of digit 4"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], r"no \.wav file in it"),
    ],
)
def test_unusable_recordings_are_one_line(tmp_path, spoil, message):
    folder = make_speech(tmp_path / "speech", takes=2)
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        ensure_demo(tmp_path / "demo", folder, quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "demo").exists()


def run_command(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "dataset.demo", *flags], cwd=REPO, capture_output=True, text=True)


def test_the_command_makes_what_its_flags_say(tmp_path, monkeypatch, capsys):
    made = ensure_demo
    monkeypatch.setattr(
        demo, "ensure_demo", lambda root, speech, s: made(root, speech, replace(TINY, seed=s.seed), True)
    )
    assert demo.main(["--out", str(tmp_path / "there"), "--seed", "7"]) == 0
    assert demo.read_record(tmp_path / "there")["settings"]["seed"] == 7
    assert f"--data_root {tmp_path / 'there'}" in capsys.readouterr().out


def test_the_command_names_a_missing_folder():
    result = run_command("--speech", "no/such/folder")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --speech no/such/folder: no such folder")
    assert result.stderr.count("\n") == 1


def test_importing_it_needs_neither_librosa_nor_av():
    code = (
        "import sys; import dataset.prepare.demo; print(sorted({'librosa', 'av', 'cv2', 'sklearn'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
