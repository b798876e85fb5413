"""Raw folders with planted faults to training folders: every fault is handled or named, and nothing else is lost."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import soundfile

from benchmarks.raw_samples import EMOTIONS, cremad_names, tone, write_video, write_wav
from dataset import specs
from dataset.folder import load_folder
from dataset.prepare import audio, engine, video
from dataset.prepare.__main__ import main
from dataset.prepare.engine import Clip, Options, prepare_clips
from dataset.prepare.lists import write_lists
from dataset.specs import AUDIO_RECIPES, get_spec
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
POINTER = ROOT.parent / "shared" / "data" / "cremad" / "lfs_pointer_example.flv"
POINTER_TEXT = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"1" * 64 + b"\nsize 265922\n"
SIZE = (96, 64)
LOGSTFT = AUDIO_RECIPES["logstft"]


POOLED = engine._pooled


@pytest.fixture(autouse=True)
def without_processes(monkeypatch):
    """Make clips in this process, for speed and so that patches reach them; some tests undo it."""
    monkeypatch.setattr(
        engine,
        "_pooled",
        lambda clips, out, options, _: ((clip, engine.make_clip(clip, out, options)) for clip in clips),
    )


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder` with its SHA-256."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def make_cremad(raw: Path, count: int = 12, actors: int = 4, size: tuple[int, int] = SIZE) -> list[str]:
    """A sound CREMA-D look-alike; the videos are copies of three, the sounds all differ."""
    names = cremad_names(count, actors)
    models = [write_video(raw / f"model{i}.flv", 2.5, size=size, seed=i) for i in range(3)]
    (raw / "VideoFlash").mkdir()
    for i, name in enumerate(names):
        shutil.copy(models[i % 3], raw / "VideoFlash" / f"{name}.flv")
        write_wav(raw / "AudioWAV" / f"{name}.wav", 1.5, seed=i)
    for model in models:
        model.unlink()
    return names


def make_lists(folder: Path, names: list[str], test: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{name},{name.split('_')[2]}\r\n" for name in names]
    (folder / "train.csv").write_text("".join(rows[test:]))
    (folder / "test.csv").write_text("".join(rows[:test]))
    (folder / "stat.csv").write_text("\ufeff" + "".join(f"{name}\r\n" for name in EMOTIONS))
    return folder


def cremad(raw: Path, out: Path, lists: Path, *flags: str) -> int:
    return main(
        [
            "--dataset",
            "CREMAD",
            "--raw",
            str(raw),
            "--out",
            str(out),
            "--split_dir",
            str(lists),
            "--workers",
            "1",
            *flags,
        ]
    )


@pytest.fixture
def faulty(tmp_path):
    """(raw folder, lists, clip of each fault) of a CREMA-D look-alike with everything that goes wrong in it."""
    raw = tmp_path / "raw"
    names = make_cremad(raw, 17)
    kinds = ("pointer", "silent", "short", "empty_video", "empty_sound", "truncated", "stereo", "cd_rate")
    kinds += ("no_video", "no_sound", "noise", "thirty")
    at = dict(zip(kinds, names, strict=False))
    flv = {kind: raw / "VideoFlash" / f"{name}.flv" for kind, name in at.items()}
    wav = {kind: raw / "AudioWAV" / f"{name}.wav" for kind, name in at.items()}
    flv["pointer"].write_bytes(POINTER.read_bytes() if POINTER.exists() else POINTER_TEXT)
    soundfile.write(wav["silent"], np.zeros(24_000, np.float32), 16_000, subtype="PCM_16")
    write_video(flv["short"], 0.4, size=SIZE)
    write_wav(wav["short"], 0.4)
    flv["empty_video"].write_bytes(b"")
    wav["empty_sound"].write_bytes(b"")
    whole = write_video(flv["truncated"], 4, size=SIZE).read_bytes()
    flv["truncated"].write_bytes(whole[: len(whole) // 4])
    write_wav(wav["stereo"], channels=2)
    write_wav(wav["cd_rate"], rate=44_100)
    flv["no_video"].unlink()
    wav["no_sound"].unlink()
    wav["noise"].write_bytes(random.Random(0).randbytes(20_000))
    write_video(flv["thirty"], 2.5, rate=30, size=SIZE)
    return raw, make_lists(tmp_path / "lists", names), at


def test_every_planted_fault_of_cremad(faulty, tmp_path, capsys):
    raw, lists, at = faulty
    out = tmp_path / "out"
    assert cremad(raw, out, lists) == 1
    printed = capsys.readouterr().out
    bad = {
        "pointer": "git-lfs pointer",
        "empty_video": "empty file",
        "empty_sound": "empty file",
        "truncated": "breaks off after",
        "no_video": "no such file",
        "no_sound": "no such file",
        "noise": "no readable sound file",
    }
    skipped = {line.split(",")[0]: line for line in (out / "skipped.csv").read_text().splitlines()[1:]}
    assert set(skipped) == {at[kind] for kind in bad}
    for kind, reason in bad.items():
        assert reason in skipped[at[kind]] and at[kind] in printed
    assert "silent sound" in printed and "shorter than 1 s" in printed
    assert "10 of 17 clips ready" in printed and "--allow_missing" in printed
    folder = load_folder(out, get_spec("CREMAD"), allow_missing=True)
    assert {problem.clip for problem in folder.missing} == set(skipped), "the lists keep every clip"
    assert sum(len(part.clips) for part in folder.parts.values()) == 10
    assert folder.shapes == {"audio": (257, 188)} and folder.split["name"] == "given"
    with pytest.raises(UserError, match="7 problem"):
        load_folder(out, get_spec("CREMAD"))


def test_the_files_of_a_clip_are_those_of_the_recipe(faulty, tmp_path):
    raw, lists, at = faulty
    out = tmp_path / "out"
    cremad(raw, out, lists)
    frames = {
        kind: sorted(p.name for p in (out / "visual" / at[kind]).iterdir()) for kind in ("thirty", "short", "stereo")
    }
    assert len(frames["thirty"]) == len(frames["stereo"]) == 3 and len(frames["short"]) == 1
    for kind in ("stereo", "cd_rate", "short", "silent"):
        wave, rate = audio.load_wave(raw / "AudioWAV" / f"{at[kind]}.wav")
        stored = np.load(out / "audio" / f"{at[kind]}.npy", allow_pickle=False)
        assert stored.dtype == np.float32 and stored.shape == (257, 188)
        assert np.array_equal(stored, audio.spectrogram(wave, rate, LOGSTFT))
    assert np.ptp(np.load(out / "audio" / f"{at['silent']}.npy")) == 0


def test_mended_files_are_made_and_nothing_else(faulty, tmp_path, capsys):
    raw, lists, at = faulty
    cremad(raw, tmp_path / "out", lists)
    good_flv, good_wav = raw / "VideoFlash" / f"{at['thirty']}.flv", raw / "AudioWAV" / f"{at['thirty']}.wav"
    for name in at.values():
        for good in (good_flv, good_wav):
            target = good.with_name(name + good.suffix)
            if target != good and (not target.exists() or name not in (at["stereo"], at["cd_rate"], at["silent"])):
                shutil.copy(good, target)
    before = contents(tmp_path / "out" / "audio")
    capsys.readouterr()
    assert cremad(raw, tmp_path / "out", lists) == 0
    printed = capsys.readouterr().out
    assert "17 of 17 clips ready" in printed and "(8 made now, 9 found finished)" in printed  # 7 broken, 1 too short
    assert not (tmp_path / "out" / "skipped.csv").exists()
    kept = [name for name in before if name != f"{at['short']}.npy"]
    assert all(contents(tmp_path / "out" / "audio")[name] == before[name] for name in kept)
    cremad(raw, tmp_path / "fresh", lists)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_twice_is_byte_identical_and_a_second_run_makes_nothing(tmp_path, capsys, monkeypatch):
    raw, lists = tmp_path / "raw", make_lists(tmp_path / "lists", make_cremad(tmp_path / "raw"))
    assert cremad(raw, tmp_path / "one", lists) == 0
    assert (
        main(["--dataset", "CREMAD", "--raw", str(raw), "--out", str(tmp_path / "two"), "--split_dir", str(lists)]) == 0
    )
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "two")
    assert not [name for name in one if ".tmp-" in name]
    monkeypatch.setattr(engine, "make_clip", None)
    capsys.readouterr()
    assert cremad(raw, tmp_path / "one", lists) == 0
    assert "(0 made now, 12 found finished)" in capsys.readouterr().out
    assert contents(tmp_path / "one") == one


def test_the_actor_split_needs_no_lists(tmp_path, capsys):
    make_cremad(tmp_path / "raw")
    flags = ["--dataset", "CREMAD", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*flags, "--split", "actor"]) == 0
    assert "actors in both parts: 0" in capsys.readouterr().out
    folder = load_folder(tmp_path / "out", get_spec("CREMAD"))
    assert folder.split["name"] == "actor" and folder.split["complete"] is False
    assert [len(folder.parts[part].clips) for part in ("train", "test")] == [9, 3]
    with pytest.raises(UserError, match="--split_dir: not used by --split actor"):
        main([*flags, "--split", "actor", "--split_dir", str(tmp_path)])


# Kinetics-Sounds ------------------------------------------------------------------------------------------------------


@pytest.fixture
def kinetics(tmp_path):
    """(raw folder, lists): mp4 in class folders and flat, faults included, one under the archive's longer name."""
    raw, lists = tmp_path / "raw", tmp_path / "lists"
    sound = tone(10, 44_100, 2)
    whole = write_video(raw / "playing drums" / "--4-0ihtnBU_000058_000068.mp4", 10, 30, SIZE, sound)
    write_video(raw / "short___clip_000000_000010.mp4", 6, 25, SIZE, tone(6, 44_100, 1))
    write_video(raw / "nosound_____000000_000010.mp4", 2, 25, SIZE)
    (raw / "corrupt_____000000_000010.mp4").write_bytes(random.Random(0).randbytes(5_000))
    (raw / "cut_________000000_000010.mp4").write_bytes(whole.read_bytes()[:-40_000])  # the index is at the end
    shutil.copy(whole, raw / "-3Mwkq-7TV4_000002_000012.mp4")
    lists.mkdir()
    train = ["--4-0ihtnBU", "nosound____", "corrupt____", "cut________"]
    (lists / "my_train.txt").write_text(
        "".join(f"{name}_{'000058_000068' if name[0] == '-' else '000000_000010'},10,4\n" for name in train)
    )
    (lists / "my_test.txt").write_text("short___clip_000000_000010,10,30\n-3Mwkq-7TV4_2,10,0\n")
    return raw, lists


def test_every_planted_fault_of_kinetics_sounds(kinetics, tmp_path, capsys):
    raw, lists = kinetics
    out = tmp_path / "out"
    flags = ["--dataset", "KineticSound", "--raw", str(raw), "--out", str(out), "--split_dir", str(lists)]
    assert main(flags) == 1
    printed = capsys.readouterr().out
    assert "3 of 6 clips ready" in printed and "shorter than 10 s (6 frames)" in printed
    skipped = {row.split(",")[0]: row.split(",")[1] for row in (out / "skipped.csv").read_text().splitlines()[1:]}
    assert skipped == {
        "nosound_____000000_000010": "no_audio_track",
        "corrupt_____000000_000010": "broken_sound",
        "cut_________000000_000010": "broken_sound",
    }
    folder = load_folder(out, get_spec("KineticSound"), allow_missing=True)
    assert folder.classes == [f"{i:02d}" for i in range(31)] and folder.shapes == {"audio": (1024, 128)}
    assert folder.parts["test"].labels.tolist() == [30, 0]
    assert [len(frames) for frames in folder.parts["test"].files["video"]] == [6, 10]
    wave, rate = audio.load_wave(raw / "playing drums" / "--4-0ihtnBU_000058_000068.mp4", channels="first")
    assert np.array_equal(np.load(folder.parts["train"].files["audio"][0]), audio.fbank(wave, rate))


def test_the_other_recipe(tmp_path):
    raw, lists = tmp_path / "raw", make_lists(tmp_path / "lists", make_cremad(tmp_path / "raw"))
    assert cremad(raw, tmp_path / "out", lists) == 0
    assert cremad(raw, tmp_path / "out", lists, "--audio_recipe", "fbank") == 0
    folder = load_folder(tmp_path / "out", get_spec("CREMAD"))
    assert folder.shapes["audio"] == (1024, 128) == np.load(folder.parts["test"].files["audio"][0]).shape


# Folders that OGM-GE's scripts left -----------------------------------------------------------------------------------


def jpegs(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        cv2.imwrite(str(folder / name), np.full((*SIZE, 3), 20 * i, np.uint8))


def test_frames_of_ogm_ge_are_taken_over(tmp_path, monkeypatch):
    raw, names = tmp_path / "raw", cremad_names(12)
    for i, name in enumerate(names):
        jpegs(raw / "Image-01-FPS" / name, ["00000.jpg", "00001.jpg"])
        write_wav(raw / "AudioWAV" / f"{name}.wav", 1, seed=i)
    monkeypatch.setattr(video, "extract_frames", None)
    assert cremad(raw, tmp_path / "out", make_lists(tmp_path / "lists", names)) == 0
    folder = load_folder(tmp_path / "out", get_spec("CREMAD"))
    assert [path.name for path in folder.parts["train"].files["video"][0]] == ["00000.jpg", "00001.jpg"]
    source = raw / "Image-01-FPS" / folder.parts["train"].clips[0] / "00001.jpg"
    assert folder.parts["train"].files["video"][0][1].read_bytes() == source.read_bytes()


def test_kinetics_frames_of_ogm_ge_are_taken_over(tmp_path, monkeypatch):
    """Its script names the folders like the videos; sounds are WAV files that another script extracted."""
    raw, lists = tmp_path / "raw", tmp_path / "lists"
    lists.mkdir()
    for part, clip in (("train", "clip_one___"), ("test", "clip_two___")):
        (lists / f"my_{part}.txt").write_text(f"{clip}_000001_000011,10,7\n")
        jpegs(raw / f"{part}-img" / "Image-01-FPS" / f"{clip}_000001_000011.mp4", ["00000.jpg", "00030.jpg"])
        write_wav(raw / f"{part}_wav" / f"{clip}_000001_000011.wav", 10)
    monkeypatch.setattr(video, "extract_frames", None)
    flags = ["--raw", str(raw), "--out", str(tmp_path / "out"), "--split_dir", str(lists)]
    assert main(["--dataset", "KineticSound", *flags]) == 0
    assert load_folder(tmp_path / "out", get_spec("KineticSound")).parts["test"].labels.tolist() == [7]


def test_frames_and_spectrograms_are_taken_over(tmp_path, monkeypatch, capsys):
    raw, names = tmp_path / "raw", cremad_names(12)
    (raw / "audio").mkdir(parents=True)
    for i, name in enumerate(names):
        jpegs(raw / "visual" / name, ["frame_00001.jpg", "frame_00002.jpg", "frame_00003.jpg"])
        np.save(raw / "audio" / f"{name}.npy", np.full((257, 188), i, np.float32))
    np.save(raw / "audio" / f"{names[5]}.npy", np.zeros((1024, 128), np.float32))
    np.save(raw / "audio" / f"{names[6]}.npy", np.full((257, 188), np.nan, np.float32))
    np.save(raw / "audio" / f"{names[7]}.npy", np.array([{}], dtype=object))
    frame = raw / "visual" / names[8] / "frame_00002.jpg"
    frame.write_bytes(frame.read_bytes()[:-10])
    monkeypatch.setattr(video, "extract_frames", None)
    monkeypatch.setattr(audio, "load_wave", None)
    assert cremad(raw, tmp_path / "out", make_lists(tmp_path / "lists", names)) == 1
    rows = [row.split(",") for row in (tmp_path / "out" / "skipped.csv").read_text().splitlines()[1:]]
    assert sorted(row[0] for row in rows) == sorted(names[5:9])
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("see --audio_recipe", "NaN", "truncated JPEG", "8 of 12"))
    assert np.load(tmp_path / "out" / "audio" / f"{names[3]}.npy")[0, 0] == 3


# What the engine promises ---------------------------------------------------------------------------------------------


def options(recipe=LOGSTFT, **changes) -> Options:
    return Options(audio=recipe, workers=engine.IN_THIS_PROCESS, **changes)


def clips_of(raw: Path, names: list[str]) -> list[Clip]:
    return [Clip(name, raw / "VideoFlash" / f"{name}.flv", raw / "AudioWAV" / f"{name}.wav") for name in names]


def test_a_changed_source_or_recipe_is_made_again(tmp_path):
    names = make_cremad(tmp_path / "raw", 4)
    clips, out = clips_of(tmp_path / "raw", names), tmp_path / "out"
    assert prepare_clips(clips, out, options(LOGSTFT), quiet=True)[:2] == (4, 0)
    assert prepare_clips(clips, out, options(LOGSTFT), quiet=True)[:2] == (0, 4)
    write_wav(clips[0].audio, 2, seed=99)
    assert prepare_clips(clips, out, options(LOGSTFT), quiet=True)[:2] == (1, 3)
    frame = out / "visual" / names[1] / "frame_00001.jpg"
    frame.write_bytes(frame.read_bytes()[:-7])
    (out / "audio" / f"{names[2]}.npy").unlink()
    (out / "visual" / names[3] / "frame_00002.jpg").unlink()
    assert prepare_clips(clips, out, options(LOGSTFT), quiet=True)[:2] == (3, 1)
    assert prepare_clips(clips, out, options(AUDIO_RECIPES["fbank"]), quiet=True)[:2] == (4, 0)
    assert prepare_clips(clips, out, options(AUDIO_RECIPES["fbank"], stored_frames=1), quiet=True)[:2] == (4, 0)
    clips[3].video.write_bytes(POINTER_TEXT)
    summary = prepare_clips(clips, out, options(AUDIO_RECIPES["fbank"], stored_frames=1), quiet=True)
    assert summary[:2] == (0, 3) and summary.skipped[0].kind == "lfs_pointer"
    assert not (out / "visual" / names[3]).exists(), "files of another source would pass for this one's"
    clips[2].video.unlink()
    assert prepare_clips(clips[:3], out, options(AUDIO_RECIPES["fbank"], stored_frames=1), quiet=True)[:2] == (0, 3)


def test_leftovers_of_a_kill_are_removed_and_cut_records_not_trusted(tmp_path):
    names = make_cremad(tmp_path / "raw", 4)
    clips, out = clips_of(tmp_path / "raw", names), tmp_path / "out"
    prepare_clips(clips, out, options(LOGSTFT), quiet=True)
    whole = contents(out)
    journal = out / ".prepare" / "clips.jsonl"
    journal.write_bytes(journal.read_bytes()[:-30])
    (out / "visual" / ".tmp-abc").mkdir()
    (out / "visual" / ".tmp-abc" / "frame_00001.jpg").write_bytes(b"half")
    (out / "audio" / ".tmp-abc.npy").write_bytes(b"half")
    assert prepare_clips(clips, out, options(LOGSTFT), quiet=True)[:2] == (1, 3)
    assert contents(out) == whole


def test_two_runs_in_one_folder(tmp_path):
    names = make_cremad(tmp_path / "raw", 1)
    with engine._locked(tmp_path / "out"), pytest.raises(UserError, match="another preparation is running"):
        prepare_clips(clips_of(tmp_path / "raw", names), tmp_path / "out", options(LOGSTFT), quiet=True)


def test_a_surprise_in_one_clip_is_a_fault_of_that_clip(tmp_path, monkeypatch):
    names = make_cremad(tmp_path / "raw", 3)
    real = audio.spectrogram
    waves = iter([0, 1, 2])

    def surprise(*args):
        if next(waves) == 1:
            raise ZeroDivisionError("odd\nfile")
        return real(*args)

    monkeypatch.setattr(audio, "spectrogram", surprise)
    summary = prepare_clips(clips_of(tmp_path / "raw", names), tmp_path / "out", options(LOGSTFT), quiet=True)
    assert summary[:2] == (2, 0) and summary.skipped[0].reason == "ZeroDivisionError: odd file"


def test_a_full_disk_stops_with_one_line(tmp_path, monkeypatch):
    names = make_cremad(tmp_path / "raw", 2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match="No space left"):
        prepare_clips(clips_of(tmp_path / "raw", names), tmp_path / "out", options(LOGSTFT), quiet=True)


def test_unsafe_or_repeated_names(tmp_path):
    clip = Clip("../x", tmp_path / "a.flv", tmp_path / "a.wav")
    with pytest.raises(UserError, match="clip id"):
        prepare_clips([clip], tmp_path / "out", options(LOGSTFT), quiet=True)
    with pytest.raises(UserError, match="listed twice"):
        prepare_clips([clip._replace(name="a")] * 2, tmp_path / "out", options(LOGSTFT), quiet=True)


class Planted:
    """Calls `function` in the process that unpickles it, as a decoder that crashes or hangs would behave there."""

    def __init__(self, function, *args):
        self.what = function, args

    def __reduce__(self):
        return self.what

    def __str__(self):
        return "planted.flv"


def die(status):
    os._exit(status)


def crash(number):
    os.kill(os.getpid(), number)


def test_decoders_that_die_or_hang_take_only_their_own_clips(tmp_path, monkeypatch):
    names = make_cremad(tmp_path / "raw", 14)
    clips, out = clips_of(tmp_path / "raw", names), tmp_path / "out"
    planted = {4: (die, 9), 5: (crash, int(signal.SIGSEGV)), 9: (crash, int(signal.SIGABRT)), 11: (time.sleep, 600)}
    for i, (function, value) in planted.items():
        clips[i] = clips[i]._replace(video=Planted(function, value))
    monkeypatch.setattr(engine, "HANG", 8)
    outcomes = dict(POOLED(clips, out, options(None), 2))
    assert len(outcomes) == 14
    faults = {clip.name: outcome.fault for clip, outcome in outcomes.items() if outcome.fault}
    assert set(faults) == {names[i] for i in planted}
    assert [faults[names[i]].kind for i in planted] == ["decoder_crash"] * 3 + ["decoder_hang"]
    for i, words in zip(planted, ("exit status 9", "SIGSEGV", "SIGABRT", "hangs"), strict=True):
        assert words in faults[names[i]].reason and faults[names[i]].path == "planted.flv"
    assert len(list((out / "visual").iterdir())) == 10


def test_a_busy_parent_takes_no_clip_for_hanging(tmp_path, monkeypatch):
    """Messages that wait in the pipe while the parent does other things count."""
    clips = clips_of(tmp_path / "raw", make_cremad(tmp_path / "raw", 6))
    monkeypatch.setattr(engine, "HANG", 2)
    faults = []
    for _, outcome in POOLED(clips, tmp_path / "out", options(None), 2):
        faults.append(outcome.fault)
        if len(faults) < 3:
            time.sleep(3)
    assert faults == [None] * 6


def test_a_crash_is_counted_and_the_clip_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_pooled", POOLED)
    monkeypatch.setattr(engine, "_source_fault", lambda clip: None)
    names = make_cremad(tmp_path / "raw", 3)
    clips, out = clips_of(tmp_path / "raw", names), tmp_path / "out"
    bad = [clips[0], clips[1]._replace(audio=Planted(die, 1)), clips[2]]
    monkeypatch.setattr(engine, "_stamps", lambda clip: [])
    summary = prepare_clips(bad, out, options()._replace(workers=1), quiet=True)
    assert summary[:2] == (2, 0) and summary.skipped[0].kind == "decoder_crash"
    assert prepare_clips(clips, out, options()._replace(workers=1), quiet=True)[:2] == (1, 2)


def test_an_error_in_a_worker_is_not_taken_for_a_crash(tmp_path):
    names = make_cremad(tmp_path / "raw", 1)
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(OSError):
        list(POOLED(clips_of(tmp_path / "raw", names), tmp_path / "out", options(), 1))


def test_the_pool_and_this_process_make_the_same_files(tmp_path, monkeypatch):
    names = make_cremad(tmp_path / "raw", 6)
    clips = [clip._replace(start=0.2, end=1.3) for clip in clips_of(tmp_path / "raw", names)]
    chosen = options(fps=5, size=48, crop=(8, 4, 80, 60), flow=True)
    prepare_clips(clips, tmp_path / "one", chosen, quiet=True)
    monkeypatch.setattr(engine, "_pooled", POOLED)
    prepare_clips(clips, tmp_path / "two", chosen._replace(workers=2), quiet=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert {len(list((tmp_path / "one" / "flow" / name).iterdir())) for name in names} == {6}


# Cuts, sound alone, flow ----------------------------------------------------------------------------------------------


def test_several_clips_out_of_one_file(tmp_path):
    path = write_video(tmp_path / "a.mp4", 4, 25, SIZE, tone(4, 16_000), 16_000)
    recipe = specs.logmel(16_000, 0.5, 20, 160)
    clips = [Clip(f"word{i}", path, path, 0.5 * i, 0.5 * i + 0.4) for i in range(7)]
    clips.append(Clip("far", path, path, 9.0, 9.5))
    summary = prepare_clips(clips, tmp_path / "out", options(recipe, fps=25), quiet=True)
    assert summary[:2] == (7, 0) and [fault.clip for fault in summary.skipped] == ["far"]
    assert "before the clip's start" in summary.skipped[0].reason
    for i in range(7):
        assert len(list((tmp_path / "out" / "visual" / f"word{i}").iterdir())) == 10
        wave, rate = audio.load_wave(path, start=0.5 * i, end=0.5 * i + 0.4)
        stored = np.load(tmp_path / "out" / "audio" / f"word{i}.npy")
        assert np.array_equal(stored, audio.spectrogram(wave, rate, recipe)) and stored.shape == recipe.shape
    moved = [clips[0]._replace(end=0.3), *clips[1:7]]
    assert prepare_clips(moved, tmp_path / "out", options(recipe, fps=25), quiet=True)[:2] == (1, 6)


def test_options_decide_what_is_there(tmp_path):
    path = write_video(tmp_path / "a.mp4", 2, 10, SIZE, tone(2, 16_000), 16_000)
    out, both = tmp_path / "out", [Clip("a", path, path), Clip("b", path, None), Clip("c", None, path)]
    prepare_clips(both, out, options(flow=True, fps=2), quiet=True)
    found = {folder: sorted(file.stem for file in (out / folder).iterdir()) for folder in ("visual", "flow", "audio")}
    assert found == {"visual": ["a", "b"], "flow": ["a", "b"], "audio": ["a", "c"]}
    assert prepare_clips(both, out, options(flow=True, fps=2), quiet=True)[:2] == (0, 3)
    assert prepare_clips(both, out, options(fps=2), quiet=True)[:2] == (3, 0)
    assert not list((out / "flow").iterdir()), "flow of other options would pass for asked for"
    (out / "flow" / "a").mkdir()
    assert prepare_clips(both, out, options(fps=1), quiet=True)[:2] == (3, 0)
    assert (out / "flow" / "a").exists(), "what an earlier run did not make is left alone"


@pytest.mark.parametrize(
    ("clip", "changes", "words"),
    [
        (Clip("a", Path("a.mp4"), None, 2.0, 1.0), {}, "the end must be after the start"),
        (Clip("a", Path("a.mp4"), None, -1.0), {}, "the end must be after the start"),
        (Clip("a", None, None), {}, "neither frames nor sound"),
        (Clip("a", Path("a.mp4"), None), {"fps": 0}, "fps 0"),
        (Clip("a", Path("a.mp4"), None), {"fps": float("nan")}, "fps nan"),
        (Clip("a", Path("a.mp4"), None), {"size": -3}, "size -3"),
    ],
)
def test_mistakes_of_clips_and_options(tmp_path, clip, changes, words):
    with pytest.raises(UserError, match=words) as error:
        prepare_clips([clip], tmp_path / "out", options(**changes), quiet=True)
    assert "\n" not in str(error.value)


def test_lists_are_whole_or_refused(tmp_path):
    parts = {"train": [("c1", "a")], "test": [("c2", "b")], "val": [("c3", "a")]}
    write_lists(tmp_path, ["b", "a"], parts, {"name": "official"})
    assert (tmp_path / "stat.csv").read_text() == "a\nb\n" and (tmp_path / "val.csv").read_text() == "c3,a\n"
    del parts["val"]
    write_lists(tmp_path, ["b", "a"], parts, {"name": "official"})
    assert not (tmp_path / "val.csv").exists()
    with pytest.raises(UserError, match="among the classes"):
        write_lists(tmp_path, ["a"], parts, {})
    with pytest.raises(UserError, match="clip id"):
        write_lists(tmp_path, ["a"], {"train": [("a/b", "a")]}, {})


# The command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "nothing to do"),
        (["--dataset", "CREMAD"], "nothing to do"),
        (["--dataset", "demo", "--raw", "."], "prepare_demo.sh"),
        (["--dataset", "folder", "--raw", "."], "allowed: CREMAD, KineticSound"),
        (["--dataset", "cremad", "--raw", "."], "unknown; allowed: CREMAD"),
        (["--dataset", "CREMAD", "--raw", "nowhere"], "nowhere: no such folder"),
        (["--dataset", "CREMAD", "--raw", "{raw}", "--out", "{raw}"], "is the raw folder itself"),
        (["--dataset", "CREMAD", "--raw", "{raw}", "--out", "{raw}/o", "--split", "actor"], "no file named like"),
        (["--dataset", "CREMAD", "--raw", "{raw}", "--out", "{raw}/o", "--split_dir", "{lists}"], "wrong folder?"),
        (["--dataset", "KineticSound", "--raw", "{raw}", "--split", "actor"], "contain no actor"),
        (["--dataset", "CREMAD", "--raw", ".", "--workers", "0"], "--workers"),
        (["--dataset", "CREMAD", "--raw", ".", "--audio_recipe", "mfcc"], "logstft"),
        (["--check", "nowhere"], "no such folder"),
        (["--check", "{raw}"], "neither a training folder"),
        (["--check", ".", "--out", "x"], "--check: only reads a folder"),
        (["--dataset", "CREMAD", "--raw", ".", "--json"], "--json: only valid with --check"),
    ],
)
def test_mistakes_are_one_line(tmp_path, flags, words):
    places = {"raw": tmp_path / "raw", "lists": make_lists(tmp_path / "lists", cremad_names(8))}
    places["raw"].mkdir()
    with pytest.raises(UserError) as error:
        main([flag.format(**places) for flag in flags])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_clone_without_lfs_files_stops_at_once(tmp_path):
    names = make_cremad(tmp_path / "raw", 8)
    for name in names[1:]:
        (tmp_path / "raw" / "VideoFlash" / f"{name}.flv").write_bytes(POINTER_TEXT)
    with pytest.raises(UserError, match=r"7 of 8 videos are git-lfs pointers.*lfs pull"):
        cremad(tmp_path / "raw", tmp_path / "out", make_lists(tmp_path / "lists", names))


def test_the_script_takes_paths_as_typed(tmp_path):
    make_lists(tmp_path / "lists", make_cremad(tmp_path / "raw", 8))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "prepare_cremad.sh"), "raw", "out", "--split_dir", "lists", "--workers", "1"],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "8 of 8 clips ready" in done.stdout and (tmp_path / "out" / "stat.csv").exists()
    assert done.stderr == "", "no progress bar without a terminal"


# Killed at any moment -------------------------------------------------------------------------------------------------


def test_killed_at_random_moments_the_result_is_the_same(tmp_path):
    """SIGKILL and start again; REMIX_KILLS=10 for the full measurement, fewer by default."""
    kills = int(os.environ.get("REMIX_KILLS", "2"))
    make_cremad(tmp_path / "raw", 30, size=(160, 120))
    command = [sys.executable, "-m", "dataset.prepare", "--dataset", "CREMAD", "--raw", str(tmp_path / "raw")]
    command += ["--split", "actor", "--workers", "2", "--out"]

    def start(out):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([*command, str(tmp_path / out)], cwd=ROOT, start_new_session=True, **quiet)

    assert start("whole").wait(400) == 0
    dice, finished = random.Random(100 + kills), []
    journal = tmp_path / "killed" / ".prepare" / "clips.jsonl"
    for wanted in sorted(dice.sample(range(24), kills)):
        process = start("killed")
        while _lines(journal) < wanted and process.poll() is None:
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.02 if wanted else 3))
        assert process.poll() is None, "it was done before it was killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        finished.append(_lines(journal))
        _wait_for_the_workers(process.pid)
    assert start("killed").wait(400) == 0
    print(f"{kills} kills, clips of 30 finished at each: {finished}")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def _lines(journal: Path) -> int:
    return journal.read_text().count("{") if journal.exists() else 0


def _wait_for_the_workers(group: int) -> None:
    """Workers end with their parent, so none writes beside the next run."""
    for _ in range(600):  # 30 s: one that is still importing is slow on a busy machine
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("workers outlive their parent")
