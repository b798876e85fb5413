"""The examples run: the loop, the same in Lightning (skipped without it), the notebook from top to bottom."""

import os
import re
import runpy

import nbclient
import nbformat
import pytest
from helpers import REPO, TINY

EXAMPLES = REPO / "examples"
# The notebook on a tiny folder, or as it is: REMIX_NOTEBOOK=whole (minutes).
WHOLE = os.environ.get("REMIX_NOTEBOOK") == "whole"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(EXAMPLES / "remix.ipynb", as_version=4)


def test_the_loop_fits_on_a_page():
    """tests/test_library.py runs it."""
    assert len((EXAMPLES / "own_loop.py").read_text(encoding="utf-8").splitlines()) < 80


def test_lightning_trains_the_same_network(monkeypatch, capsys):
    """Bit for bit the batches of the plain loop, so the accuracy is the same."""
    pytest.importorskip("lightning", reason="examples/lightning_module.py needs Lightning: pip install '.[examples]'")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    plain = runpy.run_path(str(EXAMPLES / "own_loop.py"))["main"]()
    found = runpy.run_path(str(EXAMPLES / "lightning_module.py"))["main"]()
    assert found["accuracy/joint"] == pytest.approx(plain, abs=1e-6)
    assert found["clips/fast"] + found["clips/slow"] == 600
    kept = re.search(r"epoch 20/20  batches \{'fast': (\d+), 'slow': (\d+)\}", capsys.readouterr().out)
    assert kept is not None
    for count, batches in zip((found["clips/fast"], found["clips/slow"]), kept.groups(), strict=True):
        assert -(-count // 32) == int(batches)


def test_the_notebook_is_committed_without_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 6 and all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert [cell.metadata.get("tags") for cell in code].count(["parameters"]) == 1


def test_the_notebook_runs_from_top_to_bottom(notebook, data, tmp_path):
    """On a tiny folder two epochs, one of them Remix. Every clip keeps the modality that is hardest for it."""
    clips = 1347
    if not WHOLE:
        place = next(i for i, cell in enumerate(notebook.cells) if cell.metadata.get("tags") == ["parameters"])
        flags = [*TINY, "--data_root", str(data), "--epochs", "2", "--warmup", "1", "--device", "cpu"]
        cell = nbformat.v4.new_code_cell(f"FLAGS, RUNS = {flags}, {str(tmp_path)!r}")
        notebook.cells.insert(place + 1, cell)
        clips = 34
    where = {"metadata": {"path": str(EXAMPLES)}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert f"demo: {clips} train" in text if WHOLE else f"folder: {clips} train" in text
    assert len(re.findall(r"^epoch .* remix ", text, re.MULTILINE)) == (12 if WHOLE else 1)
    scored = re.findall(r"^\S+ +(\d+\.\d\d) +(\d+\.\d\d)   (audio|video)$", text, re.MULTILINE)
    assert len(scored) == 6
    for audio, video, kept in scored:  # the hardest has the lowest KL
        assert float(audio) == float(video) or (kept == "audio") == (float(audio) < float(video))
    table = text.split("class ")[-1].splitlines()[1:]
    counts = [list(map(int, match.groups())) for line in table if (match := re.match(r"\S+ +(\d+) +(\d+)$", line))]
    assert sum(map(sum, counts)) == clips
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1 and len(pictures[0]) > 10_000
