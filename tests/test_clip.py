"""Raw clips through `--clip`: they get the probabilities that they have as clips of the training folder."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from benchmarks.raw_samples import tone, write_video, write_wav
from dataset.prepare import engine
from dataset.prepare.__main__ import main as prepare
from dataset.prepare.engine import Clip, Options, options_of, record_of
from dataset.prepare.given import given_clips
from dataset.specs import AUDIO_RECIPES, logmel
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    """Two films of 3 s with sound; their seconds are the clips."""
    raw = tmp_path_factory.mktemp("films")
    for i in range(2):
        write_video(raw / f"f{i}.mp4", 3, 20, (96, 64), tone(3, 16_000, 2), sound_rate=16_000, seed=i)
    rows = [f"f{i}.mp4,{'ab'[i]},{k}.25,{k + 1},{'test' if k == 2 else 'train'}" for i in range(2) for k in range(3)]
    (raw / "clips.csv").write_text("\n".join(["file,label,start,end,part", *rows]) + "\n")
    return raw


@pytest.fixture(scope="module")
def trained(films, tmp_path_factory) -> Path:
    """A network on sound, frames and their flow: everything that preparation makes, cropped and shrunk."""
    out = tmp_path_factory.mktemp("out")
    words = ["--fps", "8", "--frames", "2", "--crop", "8,4,80,56", "--size", "40", "--flow", "--workers", "1",
             "--audio_recipe", "logmel:rate=8000:bands=16:seconds=0.5"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_pooled", in_this_process)
        assert prepare(["--table", str(films / "clips.csv"), "--out", str(out / "data"), *words]) == 0
        patch.setattr("utils.summary.finish", lambda *_: None)
        train.main(["--train", "--dataset", "folder", "--data_root", str(out / "data"), "--log_path", str(out),
                    "--run_name", "r", "--epochs", "2", "--warmup", "1", "--batch_size", "4", "--pack_size", "36",
                    "--encoder", "resnet18_thin", "--device", "cpu", "--cache", "ram"])  # fmt: skip
    return out / "r" / "last.pth"


def in_this_process(clips, out, options, _):
    """Starting another process takes seconds."""
    return ((clip, engine.make_clip(clip, out, options)) for clip in clips)


def shown(out: str) -> dict[str, dict[str, list[float]]]:
    """{first line of a clip: {head: probabilities in the order of the classes}} of what was printed, of two classes."""
    found: dict = {}
    clip = ""
    for line in out.splitlines():
        if line.startswith("  "):
            head, *words = line.split()
            assert words[1] >= words[3]  # the most probable first
            found[clip][head] = [float(p) for _, p in sorted(zip(words[::2], words[1::2], strict=True))]
        else:
            clip = line
            found[clip] = {}
    return found


def test_a_clip_is_classified_as_the_training_folder_s(trained, films, tmp_path, capsys):
    """Cut out of its film; without the training folder, which the checkpoint describes."""
    checkpoint, words = str(trained), ["--device", "cpu"]
    train.main(["--checkpoint", checkpoint, "--predictions", str(tmp_path / "x.npz"), *words])
    found = np.load(tmp_path / "x.npz")
    logits = {"multimodal": found["test_logits_joint"]}
    logits |= {name: found[f"test_logits_{name}"] for name in ("audio", "video", "flow")}
    clips = [f"{films}/f{i}.mp4@2.25-3" for i in range(2)]
    data = trained.parents[1] / "data"
    moved = data.rename(data.with_name("moved"))
    try:
        capsys.readouterr()
        train.main(["--checkpoint", checkpoint, "--clip", *clips, *words])
    finally:
        moved.rename(data)
    answers = shown(capsys.readouterr().out)
    assert list(answers) == [f"f{i}@2.25-3: audio and video and flow" for i in range(2)]
    for i, heads in enumerate(answers.values()):
        assert found["test_clips"][i].startswith(f"f{i}") and list(heads) == list(logits)
        for head, values in heads.items():
            row = torch.from_numpy(logits[head][i]).softmax(0)
            np.testing.assert_allclose(values, row.numpy(), atol=5.01e-4)


def test_a_checkpoint_that_says_nothing_asks_the_training_folder(trained, films, tmp_path, capsys):
    old = load_checkpoint(trained)
    del old["input"], old["optimizer"]
    save_checkpoint(tmp_path / "old.pth", old)
    outputs = []
    for path in (trained, tmp_path / "old.pth"):
        train.main(["--checkpoint", str(path), "--clip", f"{films}/f0.mp4@2.25-3", "--device", "cpu"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    with pytest.raises(UserError, match="no such folder"):
        train.main(["--checkpoint", str(tmp_path / "old.pth"), "--data_root", "/nowhere", "--clip", f"{films}/f0.mp4"])


def test_a_clip_with_some_of_the_modalities(trained, films, tmp_path, capsys):
    """The others are masked, which is said: a sound, a silent film, and both as one clip by their names."""
    sound = write_wav(tmp_path / "a" / "x.wav", 0.7)
    film = write_video(tmp_path / "b" / "x.mp4", 1, 20, (96, 64))
    train.main(["--checkpoint", str(trained), "--clip", str(sound), "--device", "cpu"])
    train.main(["--checkpoint", str(trained), "--clip", str(film), "--device", "cpu"])
    train.main(["--checkpoint", str(trained), "--clip", str(film), str(sound), "--device", "cpu"])
    heard, seen, both = shown_all = [shown(block) for block in re_split(capsys.readouterr().out)]
    assert [list(found) for found in shown_all] == [["x: audio alone (video and flow masked)"],
                                                    ["x: video and flow alone (audio masked)"],
                                                    ["x: audio and video and flow"]]  # fmt: skip
    heads = [next(iter(found.values())) for found in (heard, seen, both)]
    assert [list(found) for found in heads] == [["multimodal", "audio"], ["multimodal", "video", "flow"],
                                                ["multimodal", "audio", "video", "flow"]]  # fmt: skip
    assert heads[2]["audio"] == heads[0]["audio"] and heads[2]["video"] == heads[1]["video"]


def re_split(out: str) -> list[str]:
    """What was printed, a block for each clip."""
    blocks: list[str] = []
    for line in out.splitlines():
        if line.startswith("  "):
            blocks[-1] += f"\n{line}"
        else:
            blocks.append(line)
    return blocks


def test_mistakes_are_one_line(trained, films, tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    (tmp_path / "empty.mp4").touch()
    sound = write_wav(tmp_path / "s.wav", 0.5)
    for clips, said in (
        ([tmp_path / "nowhere.mp4"], "nowhere.mp4: no such file"),
        ([tmp_path], "a folder; give its files"),
        ([tmp_path / "empty.mp4"], "empty file"),
        ([text], "no readable video or sound"),
        ([f"{films}/f0.mp4@2-1"], "ends before it starts"),
        ([f"{films}/f0.mp4@7-9"], "before the clip's start at 7 s"),
        ([films / "f0.mp4", films / "f0.mp4"], "second file of the clip f0"),
        ([sound, sound], "second file of the clip s"),
    ):
        with pytest.raises(UserError, match=said) as error:
            train.main(["--checkpoint", str(trained), "--clip", *map(str, clips), "--device", "cpu"])
        assert "\n" not in str(error.value)


def test_names_of_files(tmp_path, films):
    """A sound beside a film that has one of its own is the clip's sound; a name with @ is a name where there is one."""
    odd = tmp_path / "f0.mp4@1-2"
    shutil.copy(films / "f0.mp4", odd)
    sound = write_wav(tmp_path / "f0.wav", 0.5)
    film = films / "f0.mp4"
    assert given_clips([str(film), str(sound)]) == given_clips([str(sound), str(film)]) == [Clip("f0", film, sound)]
    assert given_clips([str(odd)]) == [Clip("f0", odd, odd)]
    assert given_clips([f"{film}@0.5-1.25"]) == [Clip("f0@0.5-1.25", film, film, 0.5, 1.25)]


@pytest.mark.parametrize("options", [
    Options(audio=AUDIO_RECIPES["fbank"], channels="first"),
    Options(29.97, 10, 64, (1, 2, 30, 40), logmel(16_000, 0.64, 64, 160), flow=True, channels="mean"),
    Options(1.0),
])  # fmt: skip
def test_prepare_json_tells_the_options(options):
    assert options_of(record_of(options)) == options
