"""The network: official names and shapes, initialisation, and what masking a modality means."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import AUDIO, SHAPES, TEXT, VIDEO, network
from torch import nn
from torchvision.models import resnet18

from dataset.specs import Modality
from models import FUSIONS, SLICED, MultimodalClassifier, build_model
from models.checkpoint import load_weights, model_weights
from models.fusion import Decision, Fusion, make_fusion
from utils.errors import UserError

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
def test_a_checkpoint_has_the_official_names(classes):
    model = network(classes, "resnet18")
    assert {name: tuple(value.shape) for name, value in model_weights(model).items()} == official_shapes(classes)
    assert sum(p.numel() for p in model.encoders["audio"].parameters()) == 11_170_240
    assert sum(p.numel() for p in model.encoders["video"].parameters()) == 11_176_512


def test_video_encoder_computes_torchvisions_resnet18():
    """In training and in evaluation."""
    torch.manual_seed(0)
    encoder = network(6, "resnet18").encoders["video"].double()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    reference = resnet18(weights=None).double()
    reference.load_state_dict(encoder.state_dict(), strict=False)
    reference.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(encoder(x), reference(x))
    encoder.eval(), reference.eval()
    torch.testing.assert_close(encoder(x), reference(x))


def test_initialisation():
    torch.manual_seed(0)
    model = network(6, "resnet18")
    for net in model.encoders.values():
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


def small(fusion: str = "concat", seed: int = 0, three: bool = False) -> MultimodalClassifier:
    torch.manual_seed(seed)
    return network(4, fusion=fusion, three=three)


def inputs(batch: int = 3, three: bool = False) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    shapes = {"audio": (1, 33, 20), "video": (2, 3, 32, 32)} | ({"text": (7,)} if three else {})
    return {name: torch.randn(batch, *shape, generator=rng) for name, shape in shapes.items()}


def only(given: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: x for name, x in given.items() if name in names}


def test_official_checkpoints_load_back_with_their_names_and_three_modalities_have_names_of_their_own():
    ours, other, three = small(), small(seed=1), small(three=True)
    weights = {f"module.{name}": value for name, value in model_weights(ours).items()}  # as DataParallel saves
    load_weights(other, weights, "official.pth")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in ours.state_dict().items())
    parts = {name.rpartition(".")[0].split(".layer")[0] for name in model_weights(three)}
    assert {"audio_net", "visual_net", "head_audio", "head_video", "head", "encoders.text.1", "heads.text"} <= parts
    load_weights(other := small(seed=1, three=True), model_weights(three), "three.pth")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in three.state_dict().items())
    with pytest.raises(UserError, match=r"three\.pth: does not fit.*unknown.*\(encoders\.text"):
        load_weights(ours, model_weights(three), "three.pth")


def test_frames_share_the_encoder_and_are_averaged_after_it():
    model = small().eval()
    given = inputs()
    frames = [model.encoders["video"](given["video"][:, t]) for t in range(2)]
    torch.testing.assert_close(model(given, model.names).features["video"], (frames[0] + frames[1]) / 2)


CASES = [(fusion, fed, False) for fusion in FUSIONS for fed in (("audio",), ("video",))]
CASES += [(fusion, fed, True) for fusion in SLICED for fed in (("audio",), ("text",), ("audio", "text"))]


@pytest.mark.parametrize(("fusion", "fed", "three"), CASES)
@pytest.mark.parametrize("masked_runs", [False, True])
def test_masked_modalities_contribute_nothing(fusion, fed, three, masked_runs):
    model = small(fusion, three=three).train()
    given = inputs(three=three)
    masked = [name for name in model.names if name not in fed]
    outputs, gradients = [], []
    for x in (given, given | {name: torch.randn_like(given[name]) for name in masked}):
        model.zero_grad()
        output = model(x if masked_runs else only(x, *fed), fed)
        output.joint.square().sum().backward()
        outputs.append(output)
        gradients.append([p.grad for name in masked for p in model.encoders[name].parameters()])
    torch.testing.assert_close(outputs[0].joint, outputs[1].joint, rtol=0, atol=0)
    assert tuple(outputs[0].logits) == fed and tuple(outputs[0].features) == model.names
    assert all(torch.all(outputs[0].features[name] == 0) for name in masked)
    assert all(outputs[0].features[name].any() for name in fed)
    for grads in gradients:
        # official: the encoder runs and its gradients are zeros; ours: it does not run and has none
        assert all((g is not None and torch.all(g == 0)) if masked_runs else g is None for g in grads)


@pytest.mark.parametrize(("fed", "three"), [("audio", False), ("video", False), ("audio", True), ("text", True)])
def test_masking_the_concat_head_equals_its_part_of_the_weights(fed, three):
    model = small(three=three).eval()
    given = inputs(three=three)
    whole = model(given, model.names)
    start = 128 * model.names.index(fed)
    expected = whole.features[fed] @ model.head.weight[:, start : start + 128].T + model.head.bias
    masked = model(only(given, fed), (fed,))
    torch.testing.assert_close(masked.joint, expected)
    torch.testing.assert_close(masked.logits[fed], whole.logits[fed])
    slices = model.head.slices(whole.features)
    torch.testing.assert_close(slices[fed], expected - model.head.bias + model.head.bias / len(model.names))
    torch.testing.assert_close(sum(slices.values()), whole.joint)


def fusion_head(name: str, widths: dict[str, int], classes: int) -> Fusion:
    head = make_fusion(name, widths, classes)
    if isinstance(head, Decision):
        head.shared.append(nn.ModuleDict({own: nn.Linear(width, classes) for own, width in widths.items()}))
    return head


def test_fusion_heads_follow_their_definitions():
    torch.manual_seed(0)
    a, v, t = torch.randn(5, 8), torch.randn(5, 8), torch.randn(5, 6)
    heads = {name: fusion_head(name, {"audio": 8, "video": 8}, 3) for name in FUSIONS}

    def linear(layer, x):
        return x @ layer.weight.T + layer.bias

    def sigmoid(x):
        return 1 / (1 + torch.exp(-x))

    film, gated, summed, both = heads["film"], heads["gated"], heads["sum"], heads["bigated"]
    late = heads["decision"].shared[0]
    gamma, beta = linear(film.fc, a)[:, :8], linear(film.fc, a)[:, 8:]
    u, w = linear(both.maps["audio"], a), linear(both.maps["video"], v)
    expected = {
        "concat": linear(heads["concat"], torch.cat([a, v], 1)),
        "sum": linear(summed.maps["audio"], a) + linear(summed.maps["video"], v),
        "decision": (linear(late["audio"], a) + linear(late["video"], v)) / 2,
        "film": linear(film.fc_out, gamma * v + beta),
        "gated": linear(gated.fc_out, sigmoid(linear(gated.fc_x, a)) * linear(gated.fc_y, v)),
        "bigated": linear(both.fc_out, torch.cat([sigmoid(w) * u, sigmoid(u) * w], 1)),
    }
    plain = [name for name in FUSIONS if not name.endswith(("_bias1", "_drop"))]  # those differ at the start alone
    assert set(plain) == set(expected)
    for name in plain:
        torch.testing.assert_close(heads[name]({"audio": a, "video": v}, ("audio", "video")), expected[name])
    three = {"audio": a, "video": v, "text": t}
    widths = {name: z.shape[1] for name, z in three.items()}
    concat, summed, late = (fusion_head(name, widths, 3) for name in ("concat", "sum", "decision"))
    torch.testing.assert_close(concat(three), linear(concat, torch.cat([a, v, t], 1)))
    torch.testing.assert_close(summed(three), sum(linear(summed.maps[name], z) for name, z in three.items()))
    expected = sum(linear(late.shared[0][name], z) for name, z in three.items()) / 3
    torch.testing.assert_close(late(three), expected)
    torch.testing.assert_close(sum(late.slices(three).values()), expected)


@pytest.mark.parametrize("name", ["decision", "decision_drop"])
def test_decision_fusion_of_masked_modalities_clip_by_clip(name):
    """Zero features leave the head's bias in the mean; `drop` takes the mean over what the clip is given."""
    torch.manual_seed(0)
    names = ("audio", "video", "text")
    head = fusion_head(name, dict.fromkeys(names, 4), 3)
    mask = torch.tensor([[True, False, False], [False, True, True], [True, True, True], [False, False, True]])
    features = {own: torch.randn(4, 4) * mask[:, m, None] for m, own in enumerate(names)}
    for fed in (names, ("video",), ("audio", "text")):
        rows = []
        for i in range(4):
            given = [own for m, own in enumerate(names) if (mask[i, m] if fed == names else own in fed)]
            logits = []
            for own in given if name == "decision_drop" else names:
                layer = head.shared[0][own]
                z = features[own][i] if own in given else torch.zeros(4)
                logits.append([(layer.weight[c] @ z + layer.bias[c]).item() for c in range(3)])
            rows.append([sum(column) / len(logits) for column in zip(*logits, strict=True)])
        masked = {own: z if own in fed else torch.zeros_like(z) for own, z in features.items()}
        found = head(masked, fed, mask if fed == names else None)
        torch.testing.assert_close(found.detach(), torch.tensor(rows))


def test_decision_fusion_shares_the_unimodal_heads():
    model = small("decision").train()
    assert not list(model.head.parameters())
    plain = {name for name in small().state_dict() if not name.startswith("head.")}
    assert set(model.state_dict()) == plain
    output = model(inputs(), model.names)
    torch.testing.assert_close(output.joint, sum(output.logits.values()) / 2)
    output.joint.square().sum().backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in model.heads.values())


def test_bias1_lets_a_lone_modality_reach_the_output_layer():
    """At the start, logits must vary over clips with one modality fed about as much as they do with both."""
    found = {}
    for name in ("film", "film_bias1", "gated", "gated_bias1", "bigated", "bigated_bias1"):
        torch.manual_seed(0)
        head, z = make_fusion(name, {"audio": 128, "video": 128}, 5), torch.randn(2, 400, 128).relu()
        spreads = []
        for fed in (("audio", "video"), ("audio",), ("video",)):
            given = {own: z[m] if own in fed else torch.zeros_like(z[m]) for m, own in enumerate(("audio", "video"))}
            spreads.append(head(given, fed).std(dim=0).mean().item())
        found[name] = min(spreads[1:]) / spreads[0]
    assert found["gated"] < 0.05
    assert all(share > 0.3 for name, share in found.items() if name != "gated")
    opened = [make_fusion(f"{name}_bias1", {"audio": 6, "video": 4}, 2) for name in ("film", "gated", "bigated")]
    assert opened[0].fc.bias[:4].tolist() == [1.0] * 4 and not (opened[0].fc.bias[4:] == 1).any()
    assert opened[1].fc_y.bias.tolist() == [1.0] * 6 and not (opened[1].fc_x.bias == 1).any()
    assert all(layer.bias.tolist() == [1.0] * 6 for layer in opened[2].maps.values())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_masked_audio_does_not_silence_video(fusion):
    """The fed video must move the joint logits about as much as it does beside an average audio."""
    torch.manual_seed(0)
    head = fusion_head(fusion, {"audio": 64, "video": 64}, 5)
    v, a = torch.randn(200, 64), torch.randn(200, 64)
    alone = head({"audio": torch.zeros_like(a), "video": v}, ("video",)).std(dim=0).mean()
    beside = head({"audio": a[:1].expand_as(a), "video": v}, ("audio", "video")).std(dim=0).mean()
    assert alone > 0.5 * beside


@pytest.mark.parametrize("three", [False, True])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_trains_the_fed_encoders(fusion, three):
    if three and fusion not in SLICED:
        needs = "2 modalities" if fusion.startswith("bigated") else "the modalities audio and video"
        with pytest.raises(UserError, match=f"--fusion_method {fusion}: defined for {needs}, .*; use concat or sum"):
            small(fusion, three=True)
        return
    model = small(fusion, three=three).train()
    given = inputs(three=three)
    for fed in (model.names, *((name,) for name in model.names)):
        model.zero_grad()
        model(only(given, *fed), fed).joint.logsumexp(1).sum().backward()
        for name, encoder in model.encoders.items():
            moved = any(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())
            assert moved == (name in fed)


@pytest.mark.parametrize(("modality", "shape", "message"), [
    (Modality("text", "array", "text", encoder="bert"), (7,), "encoder bert of text: unknown; allowed: resnet18, "),
    (Modality("text", "array", "text", encoder="resnet18"), (7,), "takes images, the clips have arrays of shape"),
    (Modality("text", "array", "text", encoder="mlp"), (7, 7), "takes vectors, the clips have arrays of shape"),
    (Modality("text", "array", "text"), (2, 7, 7), r"text: takes vectors, the clips have arrays of shape \(2, 7, 7\)"),
    (Modality("text", "frames", "text", encoder="mlp"), (), "mlp of text: takes vectors, the clips have frames"),
])  # fmt: skip
def test_an_encoder_that_does_not_fit_its_input_is_refused_in_one_line(modality, shape, message):
    with pytest.raises(UserError, match=message) as caught:
        build_model((AUDIO, modality), SHAPES | {"text": shape}, 3)
    assert "\n" not in str(caught.value)


def test_a_modality_s_own_encoder_goes_before_the_runs():
    own = Modality("video", "frames", "visual", encoder="resnet18_thin")
    model = build_model((AUDIO, own, TEXT), SHAPES, 3, "resnet18")
    assert model.widths == {"audio": 512, "video": 128, "text": 128} and model.head.weight.shape == (3, 768)
    assert model.encoders["audio"].conv1.weight.shape == (64, 1, 7, 7)
    assert model.encoders["video"].conv1.weight.shape == (16, 3, 7, 7)
    assert build_model((VIDEO, AUDIO), SHAPES, 3).names == ("video", "audio")  # the dataset's order


def test_a_thin_encoder_leaves_the_heap_whole():
    """With two threads, 6 maps of 16 x 12: where oneDNN's strided convolution of 8 channels wrote past its buffer."""
    script = """
import torch
from models.encoders import ENCODERS
torch.set_num_threads(2)
trunk = ENCODERS["resnet18_thin"].make(1).to(memory_format=torch.channels_last).train()
for batch in [*range(2, 9)] * 4:
    trunk(torch.randn(batch, 1, 64, 48)).sum().backward()
"""
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
