"""An exported network: read back from its file, it gives the logits of the network itself."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run

import train
from dataset.folder import Folder
from dataset.specs import SPECS, Modality, audio, video
from evaluation.export import example_inputs, export_network
from models import build_model
from report import export
from utils.errors import UserError

BOTH = ("audio", "video")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.summary.finish", lambda *_: None)
        flags = ("--epochs", "2", "--warmup", "1", "--balance", "mmcosine")
        return run(data, tmp_path_factory.mktemp("runs"), "r", *flags) / "best.pth"


def network_of(checkpoint: Path) -> tuple[Namespace, train.Data, torch.nn.Module]:
    args = train.parse_args(["--checkpoint", str(checkpoint), "--device", "cpu"])
    built = train.build_data(args, torch.device("cpu"), only=("test",))
    return args, built, train.make_model(args, built, torch.device("cpu")).eval()


@torch.inference_mode()
def check_logits(program, model, inputs):
    """All heads with all modalities, with each alone, and with one or the other by clip."""
    n = len(inputs["audio"])
    for fed in (BOTH, ("audio",), ("video",)):
        mask = torch.tensor([[name in fed for name in BOTH]]).expand(n, 2)
        found, output = program(inputs, mask), model({name: inputs[name] for name in fed}, fed)
        assert list(found) == ["joint", *BOTH]
        for head, values in output.heads.items():
            torch.testing.assert_close(found[head], values, rtol=1e-4, atol=1e-5)
    mixed = torch.tensor([[i % 2 == 0, i % 2 > 0 or i % 3 > 0] for i in range(n)])
    for head, values in model(inputs, BOTH, mixed).heads.items():
        torch.testing.assert_close(program(inputs, mixed)[head], values, rtol=1e-4, atol=1e-5)


def test_an_exported_network_says_what_the_trained_one_says(trained, tmp_path, capsys):
    """On the test clips, any number at a time; by PyTorch alone."""
    out = tmp_path / "model.pt2"
    export.main(["--checkpoint", str(trained), "--out", str(out)])
    said = capsys.readouterr().out
    assert said == f"{out}: 3 classes; inputs of a clip: audio (1, 33, 20), video (2, 3, 32, 32)\n"
    extra = {"about.json": ""}
    program = torch.export.load(out, extra_files=extra).module()
    about = json.loads(extra["about.json"])
    assert about["classes"] == ["a", "b", "c"] and list(about["modalities"]) == list(BOTH)
    assert about["modalities"]["audio"] == {"shape": [1, 33, 20]}
    _, built, model = network_of(trained)
    for size in (1, 15):
        plan = [train.remix.Batch(torch.arange(size), BOTH)]
        check_logits(program, model, next(built.clips["test"].epoch(plan)).inputs)
    with pytest.raises(UserError, match=r"model.pt2: already exists"):
        export.main(["--checkpoint", str(trained), "--out", str(out)])


def test_pixels_are_scaled_as_the_file_says(trained, data, tmp_path):
    """From a test clip's JPEG files to the network's input, by PIL and the mean and deviation in the file alone."""
    from PIL import Image

    out, extra = tmp_path / "model.pt2", {"about.json": ""}
    export.main(["--checkpoint", str(trained), "--out", str(out)])
    torch.export.load(out, extra_files=extra)
    own = json.loads(extra["about.json"])["modalities"]["video"]
    _, built, _ = network_of(trained)
    clips = built.clips["test"]
    batch = next(clips.epoch([train.remix.Batch(torch.tensor([0]), BOTH)]))
    files = sorted((data / "visual" / clips.names[0]).iterdir())
    for frame, path in zip(batch.inputs["video"][0], (files[0], files[1]), strict=True):  # 3 frames in 2 segments
        image = Image.open(path).resize((32, 32), Image.Resampling.BILINEAR)
        pixels = (np.asarray(image) / 255 - own["mean"]) / own["std"]
        np.testing.assert_allclose(frame.permute(1, 2, 0).numpy(), pixels, atol=0.1)


@pytest.mark.parametrize(("fusion", "bf16", "unimodal"), [
    ("sum", True, "heads"), ("film", False, "heads"), ("gated", False, "masked"), ("decision_drop", False, "heads"),
])  # fmt: skip
def test_every_kind_of_network_is_exported(fusion, bf16, unimodal):
    """One that trained in bf16 is exported in float32, and stays itself in bf16."""
    torch.manual_seed(0)
    modalities, shapes = (audio("logmel"), video(frames=2)), {"audio": (16, 8)}
    make = (modalities, shapes, 3, "resnet18_thin", fusion)
    model = build_model(*make, precision="bf16" if bf16 else "fp32", unimodal=unimodal)
    program = export_network(model, {"audio": torch.zeros(2, 1, 16, 8), "video": torch.zeros(2, 2, 3, 32, 32)}).module()
    assert model.bf16 == bf16 and model.training
    model.bf16 = False
    inputs = {"audio": torch.randn(5, 1, 16, 8), "video": torch.randn(5, 2, 3, 32, 32)}
    check_logits(program, model.eval(), inputs)


def test_what_cannot_be_exported():
    spec = SPECS["folder"]
    spec = spec.__class__(**{**vars(spec), "modalities": (audio("fbank"), Modality("text", "sequence", "text"))})
    folder = Folder(Path("x"), spec, ["a"], {}, {"audio": (1024, 128), "text": (5, 4)}, [], {}, None)
    with pytest.raises(UserError, match="text: sequences of any length cannot be exported"):
        example_inputs(folder, 32)
    for words, said in ((["--out", "x.pt2"], "--checkpoint: missing"),
                        (["--checkpoint", "x.pth", "--out", "x.bin"], "ends in .pt2"),
                        (["--checkpoint", "nowhere.pth"], "nowhere.pth: no such checkpoint")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            export.main(words)
