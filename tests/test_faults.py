"""Planted faults: in data, files, numbers and surroundings. tests/faults.md holds the expected output of each.

PYTHONPATH=. python tests/test_faults.py     # rewrites tests/faults.md after a message was changed
"""

import errno
import gc
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from helpers import make_folder

import train
from dataset import lists, pack
from dataset.prepare import audio
from dataset.specs import get_spec
from models import build_model
from models.checkpoint import model_weights
from utils.errors import run_main

DOC = Path(__file__).with_name("faults.md")
PAGE = DOC.parents[1] / "docs" / "reliability.md"
TINY = [
    "--dataset",
    "folder",
    "--encoder",
    "resnet18_thin",
    "--image_size",
    "32",
    "--batch_size",
    "4",
    "--cache",
    "ram",
]
EARLY = ["--method", "audio", "--epochs", "1"]  # the cheapest run


class Skip(Exception):
    """This machine cannot plant that fault."""


class Stage:
    """A sound folder of 6 training and 4 test clips to spoil, a place for runs, and train.py in this process."""

    def __init__(self, base: Path, root: Path, patch: pytest.MonkeyPatch, capsys):
        self.data, self.runs, self.root, self.patch, self.capsys = root / "data", root / "runs", root, patch, capsys
        shutil.copytree(base, self.data)
        # Pictures take a second of every run and nothing here is about them.
        patch.setattr("utils.summary.finish", lambda *_: print("done"))

    def train(self, *flags: str) -> str:
        words = [*TINY, "--train", "--data_root", str(self.data), "--log_path", str(self.runs), "--run_name", "r"]
        return self.main(*words, *EARLY, *flags)

    def main(self, *words: str) -> str:
        return self.call(lambda: train.main(list(words)))

    def call(self, function: Callable) -> str:
        """What a user sees of it: the last line, and the exit status."""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_main(function)
        out, err = self.capsys.readouterr()
        if end.value.code == 0:
            told = [line for line in out.splitlines() if line.startswith(("warning", "epoch ", str(self.data), "left"))]
            told = [line for line in told if "  CE " not in line and "load average" not in line]
            return "continues" + (f": {self.plain(told[-1])}" if told else "")
        lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
        assert end.value.code == 2 and len(lines) == 1 and "Traceback" not in err, err
        return self.plain(lines[0])

    def plain(self, text: str) -> str:
        """Without what differs from machine to machine."""
        for place, name in ((self.data, "DATA"), (self.runs, "RUNS"), (self.root, "TMP")):
            text = text.replace(str(place), name)
        text = re.sub(r"disk [^,]*, [\d,]+ [MkG]B free", "disk MOUNT, N MB free", text)
        return re.sub(r" +", " ", re.sub(r" at 0x[0-9a-f]+", "", text))

    def clip(self, name: str = "train_0001") -> tuple[Path, Path]:
        """First frame and spectrogram of a clip."""
        return self.data / "visual" / name / "frame_00001.jpg", self.data / "audio" / f"{name}.npy"

    def in_epoch(self, spoil: Callable[[], None], at: int = 1) -> None:
        """Let `spoil` happen before step `at`."""
        real, steps = train.loss_terms, []

        def terms(*args):
            steps.append(0)
            if len(steps) == at:
                spoil()
            return real(*args)

        self.patch.setattr(train, "loss_terms", terms)


class Fault(NamedTuple):
    place: str
    planted: str
    happen: Callable[[Stage], str]


FAULTS: list[Fault] = []


def fault(place: str, planted: str):
    def note(function):
        FAULTS.append(Fault(place, planted, function))
        return function

    return note


def wrong(place: str, planted: str, *flags: str):
    """A fault that is all in the command line."""
    FAULTS.append(Fault(place, planted, lambda stage: stage.train(*flags)))


def written(planted: str, name: str, content: str | bytes | None, place: str = "Lists"):
    """A file of the training folder replaced (None: deleted)."""

    def happen(stage: Stage) -> str:
        path = stage.data / name
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return stage.train()

    FAULTS.append(Fault(place, planted, happen))


# ------------------------------------------------------------------------------------------------------- folder, lists

wrong("Lists", "the data folder is not there", "--data_root", "/nowhere")
wrong("Lists", "`--data_root` is a file", "--data_root", "/proc/version")
written("no stat.csv", "stat.csv", None)
written("empty stat.csv", "stat.csv", "")
written("a class twice", "stat.csv", "a\nb\na\n")
written("two columns in stat.csv", "stat.csv", "a,b\n")
written("no train.csv", "train.csv", None)
written("empty train.csv", "train.csv", "")
written("empty test.csv", "test.csv", "\n\n")
written("a list that is no text", "train.csv", b"\xff\xfe\x00\x80")
written("a label that is no class", "train.csv", "train_0000,a\ntrain_0001,z\n")
written("a clip listed twice", "train.csv", "train_0000,a\ntrain_0000,a\n")
written("a clip in train and in test", "test.csv", "train_0000,a\n")
written("three columns", "train.csv", "train_0000,a,1\n")
written("a clip called `../outside`", "train.csv", "../outside,a\n")
written("a clip called `/etc/passwd`", "train.csv", "/etc/passwd,a\n")
written("a clip called `x/../../outside`", "train.csv", "x/../../outside,a\n")
written("NUL in a clip's name", "train.csv", "a\0b,a\n")
written("a clip's name of 300 characters", "train.csv", f"{'x' * 300},a\n")
written("a field of 200,000 characters", "train.csv", f"{'x' * 200_000},a\n")
written("split.json cut short", "split.json", '{"name": "act')
written("prepare.json with an unknown recipe", "prepare.json", '{"audio_recipe": "mp3"}')
wrong("Lists", "`--n_classes` other than the data's", "--n_classes", "6")


@fault("Lists", "10 million lines")
def ten_million_lines(stage: Stage) -> str:
    stage.patch.setattr(lists, "MAX_ROWS", 20_000)  # the real bound takes seconds to reach
    (stage.data / "train.csv").write_text("x\n" * 50_000)
    return stage.train().replace("20,000", "2,000,000")


@fault("Lists", "a list of 100 GB")
def huge_list(stage: Stage) -> str:
    os.truncate(stage.data / "train.csv", 100 * 2**30)  # sparse: no disk is filled
    return stage.train()


@fault("Lists", "a class without clips in test")
def class_missing(stage: Stage) -> str:
    (stage.data / "test.csv").write_text("test_0000,a\ntest_0001,b\n")
    return stage.train()


@fault("Lists", "val.csv and `--val_fraction`")
def two_validations(stage: Stage) -> str:
    rows = (stage.data / "test.csv").read_text().splitlines()
    (stage.data / "test.csv").write_text("\n".join(rows[:2]))
    (stage.data / "val.csv").write_text("\n".join(rows[2:]))
    return stage.train("--val_fraction", "0.2")


# --------------------------------------------------------------------------------------------------------------- clips


def spoiled(planted: str, which: int, content: bytes | None):
    """The frame (0) or spectrogram (1) of a clip replaced (None: deleted)."""

    def happen(stage: Stage) -> str:
        path = stage.clip()[which]
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        return stage.train()

    FAULTS.append(Fault("Clips", planted, happen))


def npy(header: str, data: bytes = b"") -> bytes:
    """A .npy file of version 1.0 with that header, or of that shape."""
    text = header.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data


def described(kind: str, shape: tuple[int, int]) -> str:
    return f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}"


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
BOMB = b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xdc\xff\xdc\x03" + bytes(9) + b"\xff\xd9"
spoiled("an empty frame", 0, b"")
spoiled("a git-lfs pointer for a frame", 0, POINTER)
spoiled("a GIF called .jpg", 0, b"GIF89a" + bytes(100))
spoiled("a PNG cut short", 0, b"\x89PNG\r\n\x1a\n" + bytes(100))
spoiled("a JPEG cut short", 0, b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(100))
spoiled("a decompression bomb: a JPEG of 65,500 x 65,500", 0, BOMB)
spoiled("no spectrogram", 1, None)
spoiled("an empty spectrogram", 1, b"")
spoiled("a git-lfs pointer for a spectrogram", 1, POINTER)
spoiled(
    "a .npy whose header claims 4 TB", 1, npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000)}")
)
spoiled("a .npy cut short", 1, npy("{'descr': '<f4', 'fortran_order': False, 'shape': (33, 20)}", bytes(100)))
spoiled(
    "a .npy that holds a pickle", 1, npy("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1)}", pickle.dumps([1]))
)
spoiled("a .npy whose header is code", 1, npy("__import__('os').system('false')"))


@fault("Clips", "a folder without frames")
def no_frames(stage: Stage) -> str:
    shutil.rmtree(stage.clip()[0].parent)
    return stage.train()


@fault("Clips", "a spectrogram of complex numbers")
def complex_numbers(stage: Stage) -> str:
    np.save(stage.clip()[1], np.zeros((33, 20), np.complex64))
    return stage.train()


@fault("Clips", "a spectrogram of another shape")
def misshapen(stage: Stage) -> str:
    np.save(stage.clip()[1], np.zeros((33, 21), np.float32))
    return stage.train()


@fault("Clips", "NaN in a spectrogram")
def nan_in_spectrogram(stage: Stage) -> str:
    np.save(stage.clip()[1], np.full((33, 20), np.nan, np.float32))
    return stage.train()


@fault("Clips", "a broken clip with `--allow_missing`")
def allowed(stage: Stage) -> str:
    stage.clip()[1].unlink()
    return stage.train("--allow_missing")


@fault("Clips", "every test clip broken, with `--allow_missing`")
def all_missing(stage: Stage) -> str:
    for path in (stage.data / "audio").glob("test_*"):
        path.unlink()
    return stage.train("--allow_missing")


@fault("Clips", "one frame in each clip")
def one_frame(stage: Stage) -> str:
    for path in (stage.data / "visual").glob("*/frame_0000[23].jpg"):
        path.unlink()
    return stage.train("--method", "video")


@fault("Clips", "ten frames in one clip, three in the others")
def ten_frames(stage: Stage) -> str:
    frame = stage.clip()[0]
    for k in range(4, 11):
        shutil.copy(frame, frame.with_name(f"frame_{k:05d}.jpg"))
    return stage.train("--method", "video")


@fault("Clips", "a picture of other dimensions")
def other_size(stage: Stage) -> str:
    cv2.imwrite(str(stage.clip()[0]), np.zeros((90, 20, 3), np.uint8))
    return stage.train("--method", "video")


def wav(stage: Stage, content: bytes) -> str:
    path = stage.root / "x.wav"
    path.write_bytes(content)
    return stage.call(lambda: audio.load_wave(path) and None)


def wav_header(claimed: int) -> bytes:
    sizes = struct.pack("<I", 36 + claimed), struct.pack("<I", claimed)
    return b"RIFF" + sizes[0] + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16) + b"data" + sizes[1]


@fault("Raw files", "a WAV whose header claims 4 GB and holds nothing")
def wav_of_4_gb(stage: Stage) -> str:
    return wav(stage, wav_header(2**32 - 40))


@fault("Raw files", "a WAV that is a git-lfs pointer")
def wav_pointer(stage: Stage) -> str:
    return wav(stage, POINTER)


@fault("Raw files", "a WAV with a sampling rate of 1 Hz")
def wav_of_1_hz(stage: Stage) -> str:
    return wav(stage, wav_header(4).replace(struct.pack("<I", 8000), struct.pack("<I", 1)) + bytes(4))


# --------------------------------------------------------------------------------------------------------- checkpoints


def checkpoint(planted: str, make: Callable[[Path], None]):
    def happen(stage: Stage) -> str:
        path = stage.root / "x.pth"
        make(path)
        return stage.main(*TINY, "--data_root", str(stage.data), "--checkpoint", str(path))

    FAULTS.append(Fault("Checkpoints", planted, happen))


class Trap:
    def __reduce__(self):
        return os.system, ("exit 1",)


def zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10**6))


checkpoint("no checkpoint at `--checkpoint`", lambda path: None)
checkpoint("`--checkpoint` is a folder", lambda path: path.mkdir())
checkpoint("an empty checkpoint", lambda path: path.write_bytes(b""))
checkpoint("a checkpoint cut short", lambda path: path.write_bytes(b"PK\x03\x04" + bytes(50)))
checkpoint("a checkpoint that runs a command", lambda path: torch.save({"model": Trap()}, path))
checkpoint("a zip bomb for a checkpoint", zip_bomb)
checkpoint("a checkpoint without weights", lambda path: torch.save({"epoch": 1}, path))
checkpoint("a checkpoint of another network", lambda path: torch.save({"model": {"w": torch.zeros(1)}}, path))


@fault("Checkpoints", "the run's folder is there already")
def existing(stage: Stage) -> str:
    (stage.runs / "r").mkdir(parents=True)
    (stage.runs / "r" / "notes.txt").write_text("mine")
    return stage.train()


@fault("Checkpoints", "`--resume` without a run")
def nothing_to_resume(stage: Stage) -> str:
    return stage.train("--resume", str(stage.runs / "r"))


@fault("Checkpoints", "`--resume` with another `--alpha`")
def other_flag(stage: Stage) -> str:
    stage.train()
    return stage.train("--resume", "auto", "--alpha", "0.7")


@fault("Checkpoints", "`--resume` with other labels")
def other_labels(stage: Stage) -> str:
    stage.train()
    rows = (stage.data / "train.csv").read_text()
    (stage.data / "train.csv").write_text(rows.replace("train_0000,a", "train_0000,b"))
    return stage.train("--resume", "auto")


@fault("Checkpoints", "`--resume` with a last.pth of the official code")
def foreign_last(stage: Stage) -> str:
    stage.train()
    torch.save({"model": {}, "optimizer": {}}, stage.runs / "r" / "last.pth")
    return stage.train("--resume", "auto")


@fault("Checkpoints", "`--resume` with a damaged last.pth")
def damaged_last(stage: Stage) -> str:
    stage.train()
    os.truncate(stage.runs / "r" / "last.pth", 1000)
    return stage.train("--resume", "auto")


# ---------------------------------------------------------------------------------------------------------- bad numbers


@fault("Numbers", "a loss that is NaN, in the second step")
def nan_loss(stage: Stage) -> str:
    real, steps = train.loss_terms, []

    def terms(*args):
        steps.append(0)
        return {name: term * (float("nan") if len(steps) == 2 else 1) for name, term in real(*args).items()}

    stage.patch.setattr(train, "loss_terms", terms)
    said = stage.train()
    assert len(steps) == 2 and not (stage.runs / "r" / "last.pth").exists()
    return said


@fault("Numbers", "a spectrogram of 3e38 in one test clip")
def infinite_logits(stage: Stage) -> str:
    np.save(stage.clip("test_0002")[1], np.full((33, 20), 3e38, np.float32))
    return stage.train()


@fault("Numbers", "weights that are NaN, with `--checkpoint`")
def nan_weights(stage: Stage) -> str:
    model = build_model(get_spec("folder").modalities, {"audio": (33, 20)}, 3, "resnet18_thin")
    weights = {name: value * float("nan") for name, value in model_weights(model).items()}
    torch.save({"model": weights}, stage.root / "x.pth")
    return stage.main(*TINY, "--data_root", str(stage.data), "--checkpoint", str(stage.root / "x.pth"))


@fault("Numbers", "a partition that keeps no audio")
def one_modality(stage: Stage) -> str:
    stage.patch.setattr(
        train.remix, "decouple", lambda scores, keep: torch.tensor([[False, True]]).expand(len(scores), 2)
    )
    return stage.train("--method", "remix", "--warmup", "0")


@fault("Numbers", "a last batch of one clip")
def lone_clip(stage: Stage) -> str:
    rows = (stage.data / "train.csv").read_text().splitlines()[:5]  # 4 + 1
    (stage.data / "train.csv").write_text("\n".join(rows))
    return stage.train("--method", "baseline")


@fault("Numbers", "2 classes")
def two_classes(stage: Stage) -> str:
    (stage.data / "stat.csv").write_text("a\nb\n")
    for name in ("train", "test"):
        text = (stage.data / f"{name}.csv").read_text()
        (stage.data / f"{name}.csv").write_text(text.replace(",c", ",b"))
    return stage.train("--method", "remix", "--warmup", "0")


@fault("Numbers", "309 classes, 306 of them without clips")
def many_classes(stage: Stage) -> str:
    (stage.data / "stat.csv").write_text("".join(f"{name}\n" for name in ["a", "b", "c", *range(1000, 1306)]))
    stage.patch.undo()  # the pictures too
    return stage.train()


# ---------------------------------------------------------------------------------------------------------- environment


@fault("Environment", "a file-size limit (`ulimit -f`) below a checkpoint's size")
def size_limit(stage: Stage) -> str:
    stage.train()
    before = (stage.runs / "r" / "last.pth").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        said = stage.train("--resume", "auto", "--epochs", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (stage.runs / "r" / "last.pth").read_bytes() == before
    assert sorted(p.name for p in (stage.runs / "r").glob("*.pth")) == ["best.pth", "last.pth"]
    assert stage.train("--resume", "auto", "--epochs", "2") == "continues"
    return re.sub(r"(last|best)\.pth", "last.pth", said)


def mounted(stage: Stage, options: str) -> None:
    stage.runs.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(stage.runs)], capture_output=True)
    if done.returncode:
        raise Skip("mounting needs root")


@fault("Environment", "a disk of 1 MB for the runs (tmpfs)")
def full_disk(stage: Stage) -> str:
    mounted(stage, "size=1m")
    try:
        return re.sub(r"RUNS/r/\S+", "RUNS/r/FILE", stage.train())
    finally:
        subprocess.run(["umount", str(stage.runs)], check=True)


@fault("Environment", "runs on a disk mounted read-only")
def read_only(stage: Stage) -> str:
    mounted(stage, "size=1m,ro")
    try:
        return stage.train()
    finally:
        subprocess.run(["umount", str(stage.runs)], check=True)


@fault("Environment", "a disk that fills up under metrics.jsonl")
def full_metrics(stage: Stage) -> str:
    path = stage.runs / "r" / "metrics.jsonl"
    stage.in_epoch(lambda: (path.unlink(), path.symlink_to("/dev/full")))
    return stage.train()


@fault("Environment", "a disk that fills up under TensorBoard's events")
def full_events(stage: Stage) -> str:
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stage.patch.setattr("torch.utils.tensorboard.SummaryWriter.flush", refuse)
    return re.sub(r"events\S+", "EVENTS", stage.train())


@fault("Environment", "no room for the pack")
def no_room(stage: Stage) -> str:
    usage = shutil.disk_usage("/")
    stage.patch.setattr(pack.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    return stage.train()


@fault("Environment", "a pack cut short")
def damaged_pack(stage: Stage) -> str:
    stage.train()
    for path in (stage.data / ".pack").glob("*/video.npy"):
        os.truncate(path, path.stat().st_size // 2)
    said = stage.train("--run_name", "again")
    assert all(np.load(path, mmap_mode="r").nbytes for path in (stage.data / ".pack").glob("*/video.npy"))
    return said


@fault("Environment", "what a killed run left of a pack")
def abandoned_pack(stage: Stage) -> str:
    left = stage.data / ".pack" / ".tmp-left"
    left.mkdir(parents=True)
    (left / "video.npy").write_bytes(bytes(1000))
    said = stage.train()
    assert not left.exists()
    return said


@fault("Environment", "`--log_path` is a file")
def log_is_file(stage: Stage) -> str:
    stage.runs.write_text("")
    return stage.train()


@fault("Environment", "a frame that vanishes in the middle of an epoch")
def vanished_frame(stage: Stage) -> str:
    stage.in_epoch(lambda: [path.unlink() for path in (stage.data / "visual").glob("train_*/*.jpg")])
    said = stage.train("--method", "video", "--cache", "none", "--num_workers", "0")
    return re.sub(r"train_\d+/frame_\d+", "CLIP/FRAME", said)


@fault("Environment", "a spectrogram overwritten in the middle of an epoch")
def overwritten(stage: Stage) -> str:
    claims = npy(described("<f4", (10**8, 10**8)))
    stage.in_epoch(lambda: [path.write_bytes(claims) for path in (stage.data / "audio").glob("train_*")])
    said = stage.train("--cache", "none", "--num_workers", "0")
    return re.sub(r"\(.*\)", "(WHY)", re.sub(r"train_\d+", "CLIP", said))


@fault("Environment", "a worker killed in the middle of an epoch")
def killed_worker(stage: Stage) -> str:
    def kill() -> None:
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            if int(child) not in before:
                os.kill(int(child), signal.SIGKILL)
        time.sleep(60)  # until the news of its end interrupts it

    before = {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}
    stage.in_epoch(kill)
    said = stage.train("--cache", "none", "--num_workers", "1")
    gc.collect()  # the loader, before another child's end reminds it of its worker
    return said


@fault("Environment", "no memory left")
def no_memory(stage: Stage) -> str:
    def refuse() -> None:
        raise MemoryError("Unable to allocate 9 GiB")

    stage.in_epoch(refuse)
    return stage.train()


@fault("Environment", "a tensor larger than memory")
def large_tensor(stage: Stage) -> str:
    stage.in_epoch(lambda: torch.empty(2**60, dtype=torch.uint8))
    return stage.train()


@fault("Environment", "no GPU memory left")
def no_gpu_memory(stage: Stage) -> str:
    def refuse() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nAnd more lines.")

    stage.in_epoch(refuse)
    return stage.train()


@fault("Environment", "`--device cuda` without CUDA")
def no_cuda(stage: Stage) -> str:
    stage.patch.setattr(torch.cuda, "device_count", lambda: 0)
    return stage.train("--device", "cuda")


@fault("Environment", "`--gpu_ids 0,5` with 2 GPUs")
def too_many_gpus(stage: Stage) -> str:
    stage.patch.setattr(torch.cuda, "device_count", lambda: 2)
    stage.patch.setattr(torch.cuda, "init", lambda: None)
    stage.patch.setattr(torch.cuda, "get_device_capability", lambda gpu: (9, 0))
    return stage.train("--gpu_ids", "0,5")


# ------------------------------------------------------------------------------------------------------------- the test


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("base") / "data", train=6, test=4)


def rows(text: str) -> dict[str, str]:
    """Planted fault -> what happens, from the table."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[1]: row[2].replace("\\|", "|") for row in cells if len(row) == 3}


def short(case: Fault) -> str:
    return re.sub(r"\W+", "_", case.planted).strip("_")[:50]


@pytest.mark.parametrize("case", FAULTS, ids=short)
def test_fault(case, base, tmp_path, monkeypatch, capsys):
    try:
        happened = case.happen(Stage(base, tmp_path, monkeypatch, capsys))
    except Skip as reason:
        pytest.skip(str(reason))
    assert happened == rows(DOC.read_text())[case.planted].strip("`")


def test_the_document_tells_of_no_fault_that_is_not_planted():
    assert list(rows(DOC.read_text())) == ["what is planted", *(case.planted for case in FAULTS)]
    assert len(FAULTS) >= 60


def test_the_page_on_reliability_names_every_fault_once():
    """In the cells of its tables, separated by semicolons."""
    cells = [line.split(" | ")[0].strip("| ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    named = [name for cell in cells for name in cell.split("; ")]
    assert [case.planted for case in FAULTS if named.count(case.planted) != 1] == []


def write_document() -> None:
    """Plant everything and write down what happened."""
    happened = {}

    class Plugin:
        @pytest.hookimpl(tryfirst=True)
        def pytest_pyfunc_call(self, pyfuncitem):
            values = pyfuncitem.funcargs
            if "case" in values:
                stage = Stage(*(values[name] for name in ("base", "tmp_path", "monkeypatch", "capsys")))
                happened[values["case"].planted] = values["case"].happen(stage)
            return True

    if pytest.main(["-q", "-x", "-p", "no:cacheprovider", __file__], plugins=[Plugin()]) or len(happened) < len(FAULTS):
        sys.exit("a fault could not be planted: see above")
    text = """# Expected output of every planted fault

Written by `PYTHONPATH=. python tests/test_faults.py` and compared by [test_faults.py](test_faults.py). `error:` lines
are the only output on standard error, with exit status 2 and no stack trace. `continues` means that the run succeeds,
and what it prints. [docs/reliability.md](../docs/reliability.md) has the overview.

| where | what is planted | what happens |
|---|---|---|
"""
    for place, planted, _ in FAULTS:
        text += f"| {place} | {planted} | `{happened[planted].replace('|', chr(92) + '|')}` |\n"
    DOC.write_text(text)


if __name__ == "__main__":
    write_document()
