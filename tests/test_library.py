"""`remix` as a library: one call for a plan, the batch sampler, installed alone, in a loop of one's own."""

import doctest
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import remix

REPO = Path(__file__).resolve().parents[1]


def logits(n: int, names=("a", "b", "c"), classes: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: 3 * torch.randn(n, classes, generator=draw) for name in names}


def hardest(found: dict[str, torch.Tensor]) -> np.ndarray:
    """By entropy in NumPy: KL from uniform is log2(C) minus it, so the hardest modality has the highest."""
    columns = []
    for values in found.values():
        e = np.exp(values.double().numpy() - values.double().numpy().max(1, keepdims=True))
        p = e / e.sum(1, keepdims=True)
        columns.append(-(p * np.log2(p)).sum(1))
    return np.argmax(columns, axis=0)


def test_doctests():
    module = sys.modules["remix.loader"]
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.attempted >= 5 and results.failed == 0


def test_a_plan_feeds_each_clip_in_its_hardest_modality():
    found = logits(100)
    plan = remix.plan(found, 16, generator=torch.Generator().manual_seed(3))
    fed = {clip: batch.fed for batch in plan for clip in batch.clips.tolist()}
    assert sum(len(batch.clips) for batch in plan) == 100 and max(len(batch.clips) for batch in plan) == 16
    assert [fed[i] for i in range(100)] == [(list(found)[m],) for m in hardest(found)]


def test_the_sampler_is_joint_then_homogeneous_and_shuffles_each_epoch():
    sampler = remix.RemixBatchSampler(100, 16, ("a", "b", "c"))
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        assert set(sampler.fed) == {("a", "b", "c")} and len(sampler) == 7
        orders.append([clip for batch in sampler for clip in batch])
        assert sorted(orders[-1]) == list(range(100))
    assert orders[0] != orders[1]
    found = logits(100)
    sampler.remix(found)
    for fed, batch in zip(sampler.fed, sampler, strict=True):
        assert all(list(found)[m] == fed[0] for m in hardest(found)[batch])
    first = list(sampler)
    sampler.set_epoch(2)
    sampler.remix(found)
    assert sorted(map(sorted, first)) != sorted(map(sorted, sampler))  # other batches of the same clips


def test_processes_share_each_batch_and_feed_the_same():
    found = logits(101)
    whole = remix.RemixBatchSampler(101, 16, tuple(found))
    ranks = [remix.RemixBatchSampler(101, 16, tuple(found), rank=r, world_size=3) for r in range(3)]
    for sampler in (whole, *ranks):
        sampler.set_epoch(5)
        sampler.remix(found)
    kept = [(fed, sorted(batch)) for fed, batch in zip(whole.fed, whole, strict=True) if len(batch) >= 3]
    shared = [sorted(clip for part in parts for clip in part) for parts in zip(*ranks, strict=True)]
    assert [clips for _, clips in kept] == shared
    assert all(sampler.fed == [fed for fed, _ in kept] for sampler in ranks)


def test_mistakes():
    sampler = remix.RemixBatchSampler(10, 4, ("a", "b"))
    with pytest.raises(ValueError, match="10 clips are needed for a, b"):
        sampler.remix(logits(10, ("b", "a")))
    with pytest.raises(ValueError, match="10 clips"):
        sampler.remix(logits(9, ("a", "b")))
    with pytest.raises(ValueError, match="less than one clip"):
        remix.RemixBatchSampler(10, 2, ("a", "b"), world_size=3)


def test_the_example_runs_and_remix_is_installed_alone(tmp_path):
    """Installed into an empty folder, `import remix` finds nothing else of the repository."""
    source, installed = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(REPO / "remix", source / "remix")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(installed), str(source)]
    built = subprocess.run(pip, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert {p.name for p in installed.iterdir() if p.name.isidentifier()} == {"remix"}
    assert (installed / "remix" / "py.typed").is_file()
    example, env = str(REPO / "examples" / "own_loop.py"), {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, cwd=tmp_path, env=os.environ | env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 21 and "batches joint" in lines[4] and "'slow'" in lines[5]
    assert float(lines[-1].split()[-1]) > 0.5  # chance is 0.2
