"""The network: official names and shapes, initialisation, and what masking a modality means."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from models import FUSIONS, AVClassifier

REPO = Path(__file__).resolve().parents[1]


def official_shapes(classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official state dict, written out from torchvision's ResNet-18 naming."""
    shapes = {}

    def norm(name: str, channels: int) -> None:
        for field in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{field}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    for net, inputs in (("audio_net", 1), ("visual_net", 3)):
        shapes[f"{net}.conv1.weight"] = (64, inputs, 7, 7)
        norm(f"{net}.bn1", 64)
        before = 64
        for stage, channels in ((1, 64), (2, 128), (3, 256), (4, 512)):
            for block in (0, 1):
                name = f"{net}.layer{stage}.{block}"
                shapes[f"{name}.conv1.weight"] = (channels, before, 3, 3)
                norm(f"{name}.bn1", channels)
                shapes[f"{name}.conv2.weight"] = (channels, channels, 3, 3)
                norm(f"{name}.bn2", channels)
                if block == 0 and stage > 1:
                    shapes[f"{name}.downsample.0.weight"] = (channels, before, 1, 1)
                    norm(f"{name}.downsample.1", channels)
                before = channels
    for head, inputs in (("head", 1024), ("head_audio", 512), ("head_video", 512)):
        shapes[f"{head}.weight"], shapes[f"{head}.bias"] = (classes, inputs), (classes,)
    return shapes


@pytest.mark.parametrize("classes", [6, 31])
def test_state_dict_is_the_official_one(classes):
    model = AVClassifier(classes)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == official_shapes(classes)
    assert sum(p.numel() for p in model.audio_net.parameters()) == 11_170_240
    assert sum(p.numel() for p in model.visual_net.parameters()) == 11_176_512


def test_video_trunk_computes_torchvisions_resnet18():
    """In training, in evaluation, and where evaluation needs no gradient and BatchNorm goes into the convolutions."""
    torch.manual_seed(0)
    trunk = AVClassifier(6).visual_net.double()
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    reference = resnet18(weights=None).double()
    reference.load_state_dict(trunk.state_dict(), strict=False)
    reference.avgpool = reference.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(trunk(x).flatten(1), reference(x))
    trunk.eval(), reference.eval()
    torch.testing.assert_close(trunk(x).flatten(1), reference(x))

    ran = []
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda *_: ran.append(1))
    with torch.inference_mode():
        torch.testing.assert_close(trunk(x).flatten(1), reference(x))
        assert not ran
    trunk(x)
    assert len(ran) == 20


def test_initialisation():
    torch.manual_seed(0)
    model = AVClassifier(6)
    for net in (model.audio_net, model.visual_net):
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * module.kernel_size[0] ** 2
                assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name
            if isinstance(module, nn.BatchNorm2d):
                assert torch.all(module.bias == 0)
                assert not torch.all(module.weight == 1)
        scales = torch.cat([m.weight for m in net.modules() if isinstance(m, nn.BatchNorm2d)])
        assert scales.mean().item() == pytest.approx(1.0, abs=0.002)
        assert scales.std().item() == pytest.approx(0.02, rel=0.1)
    bound = 1024**-0.5  # PyTorch's default for Linear
    assert model.head.weight.abs().max().item() <= bound
    assert model.head.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def small(fusion: str = "concat", seed: int = 0) -> AVClassifier:
    torch.manual_seed(seed)
    return AVClassifier(4, "resnet18_thin", fusion)


def inputs(batch: int = 3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 1, 33, 20, generator=generator), torch.randn(batch, 2, 3, 32, 32, generator=generator)


def test_frames_share_the_trunk_and_are_averaged_after_it():
    model = small().eval()
    audio, video = inputs()
    frames = [model.visual_net(video[:, t]).mean(dim=(2, 3)) for t in range(2)]
    torch.testing.assert_close(model(audio, video).video_features, (frames[0] + frames[1]) / 2)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("kept", ["audio", "video"])
@pytest.mark.parametrize("masked_runs", [False, True])
def test_masked_modality_contributes_nothing(fusion, kept, masked_runs):
    model = small(fusion).train()
    audio, video = inputs()
    other = torch.randn_like(video if kept == "audio" else audio)
    outputs, gradients = [], []
    for masked in (video if kept == "audio" else audio, other):
        model.zero_grad()
        given = (audio, masked) if kept == "audio" else (masked, video)
        if not masked_runs:
            given = (audio, None) if kept == "audio" else (None, video)
        output = model(*given, kept)
        output.joint.square().sum().backward()
        outputs.append(output)
        net = model.visual_net if kept == "audio" else model.audio_net
        gradients.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(outputs[0].joint, outputs[1].joint, rtol=0, atol=0)
    assert (outputs[0].video if kept == "audio" else outputs[0].audio) is None
    masked_features = outputs[0].video_features if kept == "audio" else outputs[0].audio_features
    assert torch.all(masked_features == 0)
    for grads in gradients:
        # official: the encoder runs and its gradients are zeros; ours: it does not run and has none
        assert all((g is not None and torch.all(g == 0)) if masked_runs else g is None for g in grads)


@pytest.mark.parametrize("kept", ["audio", "video"])
def test_masking_the_concat_head_equals_its_half_of_the_weights(kept):
    model = small().eval()
    audio, video = inputs()
    both = model(audio, video)
    features = both.audio_features if kept == "audio" else both.video_features
    width = features.shape[1]
    half = model.head.weight[:, :width] if kept == "audio" else model.head.weight[:, width:]
    expected = features @ half.T + model.head.bias
    masked = model(audio if kept == "audio" else None, video if kept == "video" else None, kept)
    torch.testing.assert_close(masked.joint, expected)
    torch.testing.assert_close(masked.audio if kept == "audio" else masked.video,
                               both.audio if kept == "audio" else both.video)  # fmt: skip


def test_fusion_heads_follow_their_definitions():
    torch.manual_seed(0)
    a, v = torch.randn(5, 8), torch.randn(5, 8)
    heads = {name: fusion(8, 3) for name, fusion in FUSIONS.items()}

    def linear(layer, x):
        return x @ layer.weight.T + layer.bias

    film, gated, summed = heads["film"], heads["gated"], heads["sum"]
    gamma, beta = linear(film.fc, a)[:, :8], linear(film.fc, a)[:, 8:]
    gate = 1 / (1 + torch.exp(-linear(gated.fc_x, a)))
    expected = {
        "concat": linear(heads["concat"], torch.cat([a, v], 1)),
        "sum": linear(summed.fc_x, a) + linear(summed.fc_y, v),
        "film": linear(film.fc_out, gamma * v + beta),
        "gated": linear(gated.fc_out, gate * linear(gated.fc_y, v)),
    }
    for name, head in heads.items():
        torch.testing.assert_close(head(a, v), expected[name])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_masked_audio_does_not_silence_video(fusion):
    """The kept video must move the joint logits about as much as it does beside an average audio."""
    torch.manual_seed(0)
    head = FUSIONS[fusion](64, 5)
    v, a = torch.randn(200, 64), torch.randn(200, 64)
    alone = head(torch.zeros_like(a), v, "video").std(dim=0).mean()
    beside = head(a[:1].expand_as(a), v, "both").std(dim=0).mean()
    assert alone > 0.5 * beside


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("kept", ["both", "audio", "video"])
def test_every_fusion_trains_the_kept_encoders(fusion, kept):
    model = small(fusion).train()
    audio, video = inputs()
    output = model(audio if kept != "video" else None, video if kept != "audio" else None, kept)
    output.joint.logsumexp(1).sum().backward()
    for name, net in (("audio", model.audio_net), ("video", model.visual_net)):
        moved = any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
        assert moved == (kept in ("both", name))


def test_a_thin_trunk_leaves_the_heap_whole():
    """With two threads, 6 maps of 16 x 12: where oneDNN's strided convolution of 8 channels wrote past its buffer."""
    script = """
import torch
from models.encoders import ENCODERS
torch.set_num_threads(2)
trunk = ENCODERS["resnet18_thin"][0](1).to(memory_format=torch.channels_last).train()
for batch in [*range(2, 9)] * 4:
    trunk(torch.randn(batch, 1, 64, 48)).sum().backward()
"""
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
