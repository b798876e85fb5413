"""Encoders by name and per modality, timm's, weights from files, frozen encoders and layer-wise learning rates."""

import argparse
import copy
import json

import numpy as np
import pytest
import timm
import torch
import torchvision
from helpers import in_two_processes, run
from networks import AUDIO, SHAPES, VIDEO
from safetensors.torch import save_file
from timm.optim import param_groups_layer_decay
from torch import nn

import train
from dataset.specs import Modality
from models import MultimodalClassifier, build_model
from models.batchnorm import SyncedBatchNorm, batchnorm_of_one_clip, reestimate, synchronise_batchnorm
from models.encoders import Sequences, Transformer, make_encoder
from models.pretrained import adapt_channels, load_pretrained
from models.rates import depths, parameter_groups
from models.timm_encoders import Resize
from utils.cli import agree, factors, per_modality
from utils.errors import UserError

CPU = torch.device("cpu")
CLASSES = ["a", "b", "c"]


def network(encoder: str, **options) -> MultimodalClassifier:
    return build_model((AUDIO, VIDEO), SHAPES, len(CLASSES), encoder, image_size=32, **options)


def inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {"audio": torch.randn(batch, 1, *SHAPES["audio"], generator=rng),
            "video": torch.randn(batch, 2, 3, 32, 32, generator=rng)}  # fmt: skip


# -------------------------------------------------------------------------------------------------- names and shapes


@pytest.mark.parametrize(("text", "found"), [
    ("resnet18", {"": "resnet18"}),
    ("audio=resnet18,video=timm:vit_tiny", {"audio": "resnet18", "video": "timm:vit_tiny"}),
    ("resnet18,text=gru", {"": "resnet18", "text": "gru"}),
    ("a,b/c=d.pth,audio=x,y=z.pth", {"": "a,b/c=d.pth", "audio": "x", "y": "z.pth"}),
    ("runs/lr=1,seed-2/best.pth", {"": "runs/lr=1,seed-2/best.pth"}),
])  # fmt: skip
def test_a_flag_may_name_modalities(text, found):
    assert per_modality(text) == found


@pytest.mark.parametrize("text", ["", " ", "audio=", "audio=a,audio=b", "audio=a,video="])
def test_a_flag_that_names_modalities_wrongly(text):
    with pytest.raises(argparse.ArgumentTypeError):
        per_modality(text)


def test_what_the_flags_say_of_a_modality():
    assert factors(0.5, ("audio", "video")) == {"audio": 0.5, "video": 0.5}
    assert factors("audio=0,video=0.1", ("audio", "video", "text")) == {"audio": 0, "video": 0.1, "text": 1}
    assert factors("0.2,audio=0", ("audio", "video")) == {"audio": 0, "video": 0.2}
    recorded = "resnet18,audio=resnet34"
    assert agree("audio=resnet34", recorded) and agree("resnet18", recorded) and agree(recorded, recorded)
    assert not agree("video=resnet18", recorded) and not agree("resnet34", recorded) and not agree("", recorded)


def test_encoders_per_modality_go_before_dataset_json_and_that_before_the_default():
    own = Modality("video", "frames", "visual", encoder="resnet18_thin")
    text = Modality("text", "sequence", "text", encoder="mean")
    shapes = SHAPES | {"text": (9, 7)}
    for encoder, widths in (
        ("resnet34", {"audio": 512, "video": 128, "text": 128}),
        ("resnet18_thin,video=resnet34", {"audio": 128, "video": 512, "text": 128}),
        ("audio=resnet18_thin,text=transformer", {"audio": 128, "video": 128, "text": 128}),
    ):
        model = build_model((AUDIO, own, text), shapes, 3, encoder, image_size=32)
        assert model.widths == widths and model.head.weight.shape == (3, sum(widths.values()))
    assert isinstance(model.encoders["text"], Transformer)
    with pytest.raises(UserError, match="encoder gru of video: takes sequences, the clips have frames"):
        build_model((AUDIO, own, text), shapes, 3, "video=gru")


@pytest.mark.parametrize(("name", "width"), [("resnet34", 512), ("resnet50", 2048)])
def test_resnets_compute_torchvisions(name, width):
    torch.manual_seed(0)
    encoder, features = make_encoder(name, (3, 32, 32))
    encoder.eval()
    reference = getattr(torchvision.models, name)(num_classes=1)
    assert reference.load_state_dict(encoder.state_dict(), strict=False).missing_keys == ["fc.weight", "fc.bias"]
    reference.fc = nn.Identity()
    x = torch.randn(2, 3, 32, 32)
    assert features == width and encoder(x).shape == (2, width)
    torch.testing.assert_close(encoder(x), reference.eval()(x))


def test_the_transformer_is_the_textbooks():
    """Against a slow transcription in NumPy, one sequence after another, without padding."""
    torch.manual_seed(0)
    encoder, lengths = Transformer(5).double().eval(), torch.tensor([4, 7, 1])
    encoder.norm.running_mean.normal_(), encoder.norm.running_var.uniform_(0.5, 2)
    rows = torch.randn(12, 5, dtype=torch.float64)
    ends, w = lengths.cumsum(0), {name: value.numpy() for name, value in encoder.state_dict().items()}

    def norm(x, name):
        return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[
            f"{name}.bias"
        ]

    def layer(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    expected = []
    for sequence in torch.tensor_split(rows, ends[:-1]):
        x = (sequence.numpy() - w["norm.running_mean"]) / np.sqrt(w["norm.running_var"] + 1e-5)
        x = layer(x * w["norm.weight"] + w["norm.bias"], "embed")
        for place in range(len(x)):
            for column in range(128):
                angle = place / 10_000 ** ((column // 2 * 2) / 128)
                x[place, column] += np.cos(angle) if column % 2 else np.sin(angle)
        for own in ("layers.layers.0", "layers.layers.1"):
            qkv = norm(x, f"{own}.norm1") @ w[f"{own}.self_attn.in_proj_weight"].T + w[f"{own}.self_attn.in_proj_bias"]
            heads = []
            for h in range(4):
                q, k, v = (part[:, 32 * h : 32 * h + 32] for part in np.split(qkv, 3, axis=1))
                weights = np.exp(q @ k.T / np.sqrt(32))
                heads.append(weights / weights.sum(1, keepdims=True) @ v)
            x = x + layer(np.concatenate(heads, 1), f"{own}.self_attn.out_proj")
            x = x + layer(np.maximum(layer(norm(x, f"{own}.norm2"), f"{own}.linear1"), 0), f"{own}.linear2")
        expected.append(norm(x, "layers.norm").mean(0))
    found = encoder(Sequences.of(rows, lengths)).detach().numpy()
    np.testing.assert_allclose(found, np.stack(expected), rtol=0, atol=2e-6)  # positions and means are float32


# --------------------------------------------------------------------------------------------------------------- timm


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "test_convnext"])
def test_a_timm_encoder_computes_what_timm_does(name):
    torch.manual_seed(0)
    model = network(f"timm:{name}").eval()
    given = inputs()
    sized = {"img_size": 32} if "vit" in name else {}
    reference = timm.create_model(name, num_classes=0, **sized)
    reference.load_state_dict(model.encoders["video"].state_dict())
    expected = torch.stack([reference.eval()(given["video"][:, t]) for t in range(2)]).mean(0)
    torch.testing.assert_close(model(given, model.names).features["video"], expected, rtol=1e-4, atol=1e-5)
    assert model.widths["video"] == expected.shape[1] == model.heads["video"].weight.shape[1]


def test_a_size_that_a_timm_model_does_not_take_is_resized():
    model = network("audio=timm:test_vit,video=timm:test_resnet").eval()
    (hook,) = model.encoders["audio"]._forward_pre_hooks.values()
    assert isinstance(hook, Resize) and hook.size == (64, 32)  # the spectrograms are 33 x 20
    assert not model.encoders["video"]._forward_pre_hooks
    x = inputs()["audio"]
    reference = timm.create_model("test_vit", num_classes=0, in_chans=1, img_size=(64, 32)).eval()
    reference.load_state_dict(model.encoders["audio"].state_dict())
    resized = nn.functional.interpolate(x, (64, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(model.encode("audio", x), reference(resized))


@pytest.mark.parametrize(("encoder", "message"), [
    ("timm:test_vi", r"timm:test_vi: timm [\d.]+ has no such model; similar ones: test_vi"),
    ("video=timm:test_mambaout2", "has no such model"),
])  # fmt: skip
def test_a_timm_model_that_is_not_there(encoder, message):
    with pytest.raises(UserError, match=message) as caught:
        network(encoder)
    assert "\n" not in str(caught.value)


def test_without_timm_its_models_are_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match="--encoder timm:test_vit: timm is not installed; pip install timm"):
        network("timm:test_vit")


def test_a_model_that_takes_no_such_image_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: nn.Conv2d(1, 4, 3))
    with pytest.raises(UserError, match=r"does not take images of 1 x 33 x 20 \(its output is no vector\)"):
        network("timm:test_resnet")


def test_synchronised_batchnorm_keeps_timms_activation(monkeypatch):
    torch.manual_seed(0)
    plain = make_encoder("timm:test_efficientnet", (3, 32, 32))[0].train()
    synced = copy.deepcopy(plain)
    monkeypatch.setattr("models.batchnorm.world_size", lambda: 2)
    monkeypatch.setattr("models.batchnorm.all_reduce", lambda x: x)  # of one process
    synchronise_batchnorm(synced, CPU)
    assert any(isinstance(module, SyncedBatchNorm) for module in synced.modules())
    assert synced.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(synced(x), plain(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(synced.eval()(x), plain.eval()(x), rtol=1e-3, atol=1e-4)


# -------------------------------------------------------------------------------------------------- weights from files


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_channels_are_adapted_by_timms_rule(channels):
    weight = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    found = adapt_channels(weight, channels)
    torch.testing.assert_close(found, timm.models.adapt_input_conv(channels, weight.clone()))
    by_hand = torch.stack([weight[:, c % 3] * 3 / channels for c in range(channels)], dim=1)
    torch.testing.assert_close(found, weight[:, :1] + weight[:, 1:2] + weight[:, 2:] if channels == 1 else by_hand)


def test_torchvision_weights_from_a_file(tmp_path, capsys):
    torch.manual_seed(1)
    reference = torchvision.models.resnet34()
    torch.save(reference.state_dict(), tmp_path / "resnet34.pth")
    model = network("resnet34")
    load_pretrained(model, str(tmp_path / "resnet34.pth"), CLASSES)
    audio, video = capsys.readouterr().out.splitlines()
    assert audio.startswith("pretrained audio: 216 of 216 tensors from ") and video.endswith("; left out: fc (2)")
    assert "conv1.weight adapted from 3 to 1 channels" in audio and "adapted" not in video
    reference.fc = nn.Identity()
    x = inputs()["video"][:, 0]
    torch.testing.assert_close(model.encoders["video"].eval()(x), reference.eval()(x), rtol=1e-4, atol=1e-4)
    grey = torch.randn(2, 1, 33, 20)  # an image whose three channels are the same has the response it had
    torch.testing.assert_close(model.encoders["audio"].eval()(grey), reference(grey.expand(2, 3, 33, 20)),
                               rtol=1e-3, atol=1e-3)  # fmt: skip


def test_timm_weights_of_another_image_size_from_safetensors(tmp_path, capsys):
    torch.manual_seed(1)
    published = timm.create_model("test_vit")  # 160 x 160 pixels, 1000 classes
    save_file(published.state_dict(), tmp_path / "vit.safetensors")
    model = network("timm:test_vit")
    load_pretrained(model, f"video={tmp_path}/vit.safetensors", CLASSES)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("pretrained video: ") and line.endswith("left out: head (2)")
    overlay = {"file": str(tmp_path / "vit.safetensors")}
    sizes = {"num_classes": 0, "img_size": 32}
    reference = timm.create_model("test_vit", pretrained=True, pretrained_cfg_overlay=overlay, **sizes).eval()
    x = inputs()["video"][:, 0]
    torch.testing.assert_close(model.encoders["video"].eval()(x), reference(x))


def test_weights_of_a_run_of_this_project(tmp_path, capsys):
    torch.manual_seed(1)
    trained, model = network("resnet18_thin"), network("resnet18_thin")
    before = copy.deepcopy(model.state_dict())
    torch.save({"model": train.model_weights(trained), "classes": CLASSES, "config": {}}, tmp_path / "best.pth")
    load_pretrained(model, f"audio={tmp_path}/best.pth", CLASSES)
    assert "its head loaded" in capsys.readouterr().out
    for name, value in model.state_dict().items():
        source = trained.state_dict() if name.startswith(("encoders.audio.", "heads.audio.")) else before
        assert torch.equal(value, source[name]), name
    load_pretrained(model, f"{tmp_path}/best.pth", CLASSES)
    assert "pretrained joint head: 2 of 2 tensors from " in capsys.readouterr().out
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in model.state_dict().items())
    other = network("resnet18_thin")
    heads = {name: value.clone() for name, value in other.state_dict().items() if name.startswith("head")}
    load_pretrained(other, f"{tmp_path}/best.pth", ["x", "y", "z"])  # as many classes, other ones
    assert capsys.readouterr().out.count("its head as initialised") == 2
    assert all(torch.equal(other.state_dict()[name], value) for name, value in heads.items())
    assert torch.equal(other.encoders["video"].conv1.weight, trained.encoders["video"].conv1.weight)


@pytest.mark.parametrize(("content", "message"), [
    (lambda: torchvision.models.resnet18().state_dict(), r"does not fit the encoder of audio: .* missing \(.* and \d+"),
    (lambda: {"model": {"audio_net.conv1.weight": torch.zeros(1)}}, "does not fit the encoder of audio: "),
    (lambda: {"model": {"visual_net.conv1.weight": torch.zeros(1)}}, "has no encoder of audio"),
    (lambda: {"epoch": 3}, "holds no weights"),
    (lambda: [1, 2], "holds no weights"),
    (lambda: {"model": nn.Linear(2, 2)}, "not a checkpoint that is safe to read"),
])  # fmt: skip
def test_files_that_do_not_fit_are_refused_in_one_line(content, message, tmp_path):
    torch.save(content(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(network("resnet34"), f"audio={tmp_path}/weights.pth", CLASSES)
    assert "\n" not in str(caught.value) and "weights.pth" in str(caught.value) and len(str(caught.value)) < 500


def test_files_that_are_not_there_or_damaged(tmp_path):
    (tmp_path / "damaged.safetensors").write_bytes(b"not weights")
    for name, message in (("none.pth", "no such checkpoint; give a .pth or .safetensors file"),
                          ("none.safetensors", "no such checkpoint"), ("damaged.safetensors", "damaged")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            load_pretrained(network("resnet18_thin"), str(tmp_path / name), CLASSES)


# ------------------------------------------------------------------------------------- frozen encoders, rates by layer


def test_a_frozen_encoder_stays_as_it_is():
    torch.manual_seed(0)
    args = train.parse_args(["--train", "--encoder_lr_decay", "audio=0,video=0.1", "--optimizer", "sgd"])
    model = network("resnet18_thin")
    model.freeze(["audio"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = train.make_optimizer(model, args)
    for _ in range(2):
        model.train()
        output = model(inputs(), model.names)
        optimizer.zero_grad()
        sum(logits.logsumexp(1).sum() for logits in output.heads.values()).backward()
        optimizer.step()
        with batchnorm_of_one_clip(model, False):
            pass
    assert all(p.grad is None for p in model.encoders["audio"].parameters())
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert not any(id(p) in rates for p in model.encoders["audio"].parameters())
    assert {rates[id(p)] for p in model.encoders["video"].parameters()} == {0.1 * args.learning_rate}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("encoders.audio."), name
    assert not any(module.training for module in model.encoders["audio"].modules())
    assert all(module.training for module in model.encoders["video"].modules())


def test_re_estimation_leaves_the_statistics_of_a_frozen_encoder(data):
    words = ["--train", "--dataset", "folder", "--data_root", str(data), "--encoder", "resnet18_thin"]
    args = train.parse_args([*words, "--image_size", "32", "--encoder_lr_decay", "video=0", "--cache", "ram"])
    built = train.build_data(args, CPU)
    model = train.make_model(args, built, CPU)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reestimate(model, built.clips["train"], model.names, 8, 0, 0)
    for name, value in model.state_dict().items():
        changed = name.startswith("encoders.audio.") and "running" in name
        assert torch.equal(value, before[name]) != changed, name


def test_layer_decay_is_beits_from_the_heads_down():
    model = network("audio=resnet18_thin,video=timm:test_vit")
    groups = parameter_groups(model, 0.1, "video=0.5", 0.8)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        if name.startswith("encoders.audio."):
            stage = int(name.split("layer")[1][0]) if "layer" in name else 0
            assert rates[id(p)] == pytest.approx(0.1 * 0.8 ** (5 - stage)), name
        elif name.startswith("head"):
            assert rates[id(p)] == 0.1
    reference = param_groups_layer_decay(model.encoders["video"], layer_decay=0.8)
    for group in reference:  # timm's last layer has 1, and the heads are one layer above it
        for p in group["params"]:
            assert rates[id(p)] == pytest.approx(0.1 * 0.5 * 0.8 * group["lr_scale"])
    assert len(rates) == len(list(model.parameters()))
    assert set(depths(make_encoder("mlp", (7,))[0])) == {0}


def test_official_rates_are_two_groups_as_before():
    model = network("resnet18_thin")
    groups = train.make_optimizer(model, train.parse_args(["--train", "--encoder_lr_decay", "0.1"])).param_groups
    assert [len(group["params"]) for group in groups] == [len(list(model.encoders.parameters())), 6]
    assert [group["lr"] for group in groups] == pytest.approx([2e-4, 2e-3])


# ---------------------------------------------------------------------------------------------------------- whole runs

RUN = ("--encoder", "audio=timm:test_resnet,video=timm:test_vit", "--encoder_lr_decay", "audio=0,video=0.5",
       "--layer_decay", "0.9", "--warmup", "1", "--batchnorm", "refreshed")  # fmt: skip


def weights_of(folder, name="last.pth"):
    return torch.load(folder / name, weights_only=True)["model"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "test_resnet.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    return path


def test_a_run_with_all_of_it_resumes_and_is_evaluated(data, source, tmp_path, capsys):
    flags = (*RUN, "--pretrained", f"audio={source}", "--method", "remix", "--balance", "mmpareto")
    whole = run(data, tmp_path, "whole", *flags, "--epochs", "3")
    assert "pretrained audio: " in capsys.readouterr().out
    run(data, tmp_path, "parts", *flags, "--epochs", "2")
    source.rename(source.with_suffix(".moved"))  # resume does not read it again
    capsys.readouterr()
    parts = run(data, tmp_path, "parts", *flags, "--epochs", "3", "--resume", "auto")
    assert "pretrained" not in capsys.readouterr().out
    source.with_suffix(".moved").rename(source)
    first, second = weights_of(whole), weights_of(parts)
    assert all(torch.equal(first[name], second[name]) for name in first)
    published = torch.load(source, weights_only=True)
    assert torch.equal(first["audio_net.layer1.0.conv1.weight"], published["layer1.0.conv1.weight"])
    assert torch.equal(first["audio_net.bn1.running_mean"], published["bn1.running_mean"])
    config = json.loads((whole / "config.json").read_text())
    assert config["encoder"] == "resnet18,audio=timm:test_resnet,video=timm:test_vit"
    assert config["pretrained"] == f"audio={source}" and config["encoder_lr_decay"] == "audio=0,video=0.5"
    capsys.readouterr()
    train.main(["--checkpoint", str(whole / "best.pth"), "--data_root", str(data), "--dataset", "folder"])
    assert "best.pth" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--encoder video=resnet34: .* was trained with --encoder "):
        train.parse_args(["--checkpoint", str(whole / "best.pth"), "--encoder", "video=resnet34"])
    typed = train.parse_args(["--checkpoint", str(whole / "best.pth"), "--encoder", "video=timm:test_vit"])
    assert typed.encoder == config["encoder"]


def test_two_processes_train_as_one(data, source, tmp_path):
    flags = [*RUN, "--pretrained", f"audio={source}", "--epochs", "2", "--method", "remix"]
    words = ["train.py", "--train", "--dataset", "folder", "--data_root", str(data), "--image_size", "32",
             "--batch_size", "8", "--cache", "ram", "--log_path", str(tmp_path), *flags]  # fmt: skip
    (done,) = in_two_processes(tmp_path / "ranks", [*words, "--run_name", "pair"])
    assert done[0] == [0, 0], done[2][-2000:]
    one = run(data, tmp_path, "one", *flags)
    first, second = weights_of(one), weights_of(tmp_path / "pair")
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0.05, atol=0.02, msg=name)


@pytest.mark.parametrize("words", [
    "--encoder smell=resnet18", "--pretrained smell=x.pth", "--encoder_lr_decay smell=0",
    "--pretrained x.pth --checkpoint y.pth",
])  # fmt: skip
def test_flags_that_do_not_go_together(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "y.pth").touch()
    with pytest.raises(UserError, match=words.split()[0]):
        train.parse_args(["--train", "--data_root", str(tmp_path), *words.split()])
