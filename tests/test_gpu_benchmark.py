"""`python -m benchmarks.gpu`, rehearsed on the CPU and on the pretended GPU: the whole command with tiny shapes."""

import ast
import contextlib
import io
import json

import pytest
import torch
from helpers import REPO
from pretended_gpu import PretendedGPU

import train
from benchmarks import common, gpu, saving
from utils.errors import UserError

OFFLINE = ("librosa", "av", "soundfile", "soxr", "numba")  # packages that only preparation needs


def imported_at_once(path, seen: set) -> set:
    """Packages that importing the module at `path` imports, from the source of it and of the project's modules."""
    if path in seen:
        return set()
    seen.add(path)
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            file = REPO / name.replace(".", "/")
            own = [p for p in (file.with_suffix(".py"), file / "__init__.py") if p.is_file()]
            found |= {name.split(".")[0]} if not own else imported_at_once(own[0], seen)
    return found


@pytest.fixture
def rehearse(tmp_path, monkeypatch):
    """The command in this process, its run of train.py too; returns the result file's content."""

    def run_command(words, seconds):
        train.main(words)

    def rehearsed(*words: str) -> dict:
        with contextlib.redirect_stdout(io.StringIO()):
            gpu.main(["--small", *words])
        (file,) = (tmp_path / "results").glob("*.json")
        assert file.with_suffix(".md").is_file()
        return json.loads(file.read_text())

    monkeypatch.setattr(gpu, "run_command", run_command)
    monkeypatch.setattr(saving, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "save", lambda name, *given: common.save("gpu", *given))  # a rehearsal saves nothing
    monkeypatch.setattr("utils.summary.finish", lambda *_: None)
    return rehearsed


def test_it_is_importable_without_the_packages_of_preparation():
    found = imported_at_once(REPO / "benchmarks" / "gpu.py", set())
    assert {"torch", "cv2", "numpy"} <= found and not found & set(OFFLINE)


def test_without_a_gpu_there_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"benchmarks\.gpu: PyTorch sees no CUDA device here; rehearse with"):
        gpu.main([])
    with pytest.raises(UserError, match="--settings tf64: unknown; allowed: all, fp32, tf32, bf16"):
        gpu.main(["--settings", "tf64"])


def test_the_whole_command_on_the_cpu(rehearse, monkeypatch):
    """With a setting more, which is one line, and one that fails, which costs no other."""
    monkeypatch.setitem(gpu.ROWS, "again", gpu.Row(("--precision", "fp32", "--cache", "ram"), 1.0, 2.0, 3.0))
    monkeypatch.setitem(gpu.ROWS, "broken", gpu.Row(("--precision", "fp64"), 1.0))
    found = rehearse("--device", "cpu", "--settings", "fp32,again,broken")
    assert [row["setting"] for row in found["Settings"]] == ["fp32", "again", "broken"]
    assert found["Settings"][0]["joint epoch s"] and found["Settings"][2]["joint epoch s"] is None
    errors = found["Correctness against the CPU"]
    assert [(row["setting"], row["batch"]) for row in errors] == [("all", "joint"), *(
        (name, kind) for name in ("fp32", "again") for kind in ("joint", "audio", "video"))]  # fmt: skip
    assert all(row["within"] == "yes" for row in errors)
    assert {row["phase"] for row in found["Phases"]} == set(gpu.PHASES)
    assert all(row["kernels"] > 100 for row in found["A training step"])
    (whole,) = found["Whole run"]
    assert whole["epochs"] == 2 and float(whole["wall s"]) > 0
    broken = [note for note in found["Notes"] if "failed" in note["note"]]
    assert {note["part"] for note in broken} == {"correctness: broken", "setting broken"}
    assert all("--precision" in note["note"] for note in broken)


def test_the_whole_command_on_the_pretended_gpu(rehearse, monkeypatch):
    with PretendedGPU() as pretended:
        assert gpu.launches(lambda: None, torch.device("cuda")) == (0, 0)  # its profiler sees no kernel

        def launches(function, device):
            before = pretended.kernels.total()
            function()
            return pretended.kernels.total() - before, None

        monkeypatch.setattr(gpu, "launches", launches)
        found = rehearse("--settings", "tf32")
    assert found["machine"]["device"] == "pretended GPU" and pretended.layouts == []
    assert found["Notes"][1:] == []  # the first is the pack
    assert all(row["within"] == "yes" for row in found["Correctness against the CPU"])
    assert found["Settings"][0]["peak memory GB"] == "0.00" and len(found["Whole run"]) == 1


def test_a_wrong_result_of_the_device_is_not_within_its_limit(rehearse, monkeypatch):
    own = gpu.first_steps
    monkeypatch.setattr(gpu, "first_steps", lambda args, data, clips, *rest: {
        name: value * (1.0 if isinstance(clips["train"], gpu.HostCopy) else 1.1)
        for name, value in own(args, data, clips, *rest).items()})  # fmt: skip
    monkeypatch.setattr(gpu.Benchmark, "measure", lambda *_: None)
    found = rehearse("--device", "cpu", "--settings", "fp32")
    assert [row["within"] for row in found["Correctness against the CPU"]] == ["yes", "NO", "NO", "NO"]


def test_no_time_left_is_told(rehearse, monkeypatch):
    monkeypatch.setattr(gpu.Timer, "left", lambda self: -1.0)
    found = rehearse("--device", "cpu", "--settings", "fp32")
    assert {note["note"] for note in found["Notes"]} == {"not measured: the time limit was reached"}
    assert [note["part"] for note in found["Notes"]] == ["pack", "correctness", "setting fp32", "whole run"]
