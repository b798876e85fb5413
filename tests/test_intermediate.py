"""MMTM and CentralNet, against slow references: loops over clips, frames and channels."""

import json

import numpy as np
import pytest
import torch
from helpers import TINY, make_folder, run
from networks import AUDIO, SHAPES, VIDEO, network
from torch import Tensor, nn

import train
from dataset.specs import Modality
from models import MultimodalClassifier, build_model
from models.checkpoint import load_weights, model_weights
from models.intermediate import MMTM, STAGES
from utils.errors import UserError

NAMES = ("audio", "video")
BOTH = ("mmtm", "centralnet")
DEPTH = Modality("depth", "array", "depth")  # a third modality of images


def small(model: str, three: bool = False, fusion: str = "concat", **options) -> MultimodalClassifier:
    torch.manual_seed(0)
    modalities = (AUDIO, VIDEO, DEPTH) if three else (AUDIO, VIDEO)
    shapes = SHAPES | {"depth": (20, 33)}
    return build_model(modalities, shapes, 4, "resnet18_thin", fusion, model=model, **options).double()


def inputs(clips: int = 3, three: bool = False) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    sizes = {"audio": (1, 33, 20), "video": (2, 3, 32, 32)} | ({"depth": (1, 20, 33)} if three else {})
    return {name: torch.randn(clips, *size, generator=rng, dtype=torch.float64) for name, size in sizes.items()}


def only(given: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: given[name] for name in names}


def array(x: Tensor) -> np.ndarray:
    return x.detach().numpy()


def linear(layer: nn.Module, x: np.ndarray) -> np.ndarray:
    weight, bias = array(layer.weight), array(layer.bias)
    return np.array([sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)])


def slow_gates(mmtm: MMTM, squeezes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The gates of one clip from the squeezes (C_m,) of all modalities."""
    hidden = np.maximum(linear(mmtm.squeeze, np.concatenate([squeezes[name] for name in mmtm.gates])), 0)
    return {name: mmtm.k / (1 + np.exp(-linear(mmtm.gates[name], hidden))) for name in mmtm.gates}


def slow_stages(model: MultimodalClassifier, given: dict[str, Tensor], i: int, others: dict[str, list]) -> dict:
    """Clip i in evaluation mode, frame by frame: each stage's pooled maps (C_m,) by modality, after the gates.

    `others` holds for each gated stage the squeezes of the modalities that are not in `given`.
    """
    frames, found = {}, {name: [] for name in given}
    for name, x in given.items():
        net, images = model.encoders[name], x[i][None] if x.dim() == 4 else x[i]
        frames[name] = [net.maxpool(net.relu(net.bn1(net.conv1(image[None])))) for image in images]
    for stage in STAGES:
        frames = {name: [getattr(model.encoders[name], stage)(f) for f in own] for name, own in frames.items()}
        means = {
            name: np.array([np.mean([array(f)[0, c].mean() for f in own]) for c in range(own[0].shape[1])])
            for name, own in frames.items()
        }
        if hasattr(model, "mmtm") and stage in model.mmtm:
            gates = slow_gates(model.mmtm[stage], means | {name: own[stage] for name, own in others.items()})
            for name, own in frames.items():
                frames[name] = [f * torch.tensor(gates[name])[None, :, None, None] for f in own]
                means[name] = means[name] * gates[name]
        for name in given:
            found[name].append(means[name])
    return found


# ------------------------------------------------------------------------------------------------------------ MMTM


def test_mmtm_has_the_official_sizes():
    model = network(6, "resnet18", model="mmtm")
    counts = {stage: sum(p.numel() for p in mmtm.parameters()) for stage, mmtm in model.mmtm.items()}
    assert counts == {"layer2": 65_920, "layer3": 262_912, "layer4": 1_050_112}


@pytest.mark.parametrize("three", [False, True])
def test_mmtm_equals_the_slow_reference_in_joint_and_homogeneous_batches(three):
    model, given = small("mmtm", three).eval(), inputs(2, three)
    whole = model(given, model.names)
    zeros = {name: {s: np.zeros(m.gates[name].out_features) for s, m in model.mmtm.items()} for name in model.names}
    for fed in (model.names, ("audio",), *([("video", "depth")] if three else [("video",)])):
        output = whole if fed == model.names else model(only(given, *fed), fed)
        masked = {name: zeros[name] for name in model.names if name not in fed}
        for i in range(2):
            z = slow_stages(model, only(given, *fed), i, masked)
            features = [z[name][-1] if name in fed else np.zeros(128) for name in model.names]
            np.testing.assert_allclose(array(output.joint[i]), linear(model.head, np.concatenate(features)), atol=1e-9)
            if len(fed) == 1:
                np.testing.assert_allclose(array(output.logits[fed[0]][i]), linear(model.heads[fed[0]], z[fed[0]][-1]))


def test_mmtm_without_weights_equals_two_separate_networks_bit_for_bit():
    """W_m = b_m = 0 and k = 2: the gates are 1. Features, logits, gradients and BatchNorm statistics."""
    gated, late, given = small("mmtm").float(), small("late").float(), inputs()
    given = {name: x.float() for name, x in given.items()}
    load_weights(late, {n: v for n, v in model_weights(gated).items() if not n.startswith("mmtm.")}, "late")
    for mmtm in gated.mmtm.values():
        mmtm.k = 2.0
        for gate in mmtm.gates.values():
            nn.init.zeros_(gate.weight), nn.init.zeros_(gate.bias)
    for mode in (False, True):
        outputs = [model.train(mode)(given, NAMES).heads for model in (gated, late)]
        for head in ("joint", *NAMES):
            assert torch.equal(outputs[0][head], outputs[1][head])
    for heads in outputs:
        sum(logits.square().sum() for logits in heads.values()).backward()
    buffers = dict(gated.named_buffers())
    assert all(torch.equal(buffers[name], value) for name, value in late.named_buffers())
    parameters = dict(gated.named_parameters())
    assert all(torch.equal(parameters[name].grad, p.grad) for name, p in late.named_parameters())


def test_permuting_frames_changes_nothing():
    model, given = small("mmtm").train(), inputs()
    turned = given | {"video": given["video"].flip(1)}
    torch.testing.assert_close(model(given, NAMES).joint, model(turned, NAMES).joint, rtol=1e-10, atol=1e-12)
    swapped = given | {"video": given["video"].flip(0)}
    assert (model(given, NAMES).joint - model(swapped, NAMES).joint).abs().max() > 1e-3


def test_unimodal_logits_in_evaluation_are_of_one_modality_alone():
    """By the running means of the other modalities' squeezes; in training they see the joint pass."""
    model, given = small("mmtm", three=True).train(), inputs(3, three=True)
    output = model(given, model.names)
    features = output.features
    torch.testing.assert_close(output.logits["audio"], model.heads["audio"](features["audio"]))
    other = model.eval()(given, model.names)
    moved = model(given | {"video": -given["video"], "depth": 2 * given["depth"]}, model.names)
    assert torch.equal(moved.logits["audio"], other.logits["audio"])
    assert not torch.equal(moved.features["audio"], other.features["audio"])
    means = {name: {s: array(m.mean_squeeze(name)) for s, m in model.mmtm.items()} for name in ("video", "depth")}
    assert all(value.any() for own in means.values() for value in own.values())
    z = slow_stages(model, only(given, "audio"), 1, means)["audio"][-1]
    np.testing.assert_allclose(array(other.logits["audio"][1]), linear(model.heads["audio"], z), atol=1e-9)


def test_the_mean_squeeze_is_that_of_recent_training_passes_over_the_clips_given():
    mmtm = MMTM({"a": 4, "b": 4}).train()
    rng = torch.Generator().manual_seed(0)
    total, weight = {"a": np.zeros(4), "b": np.zeros(4)}, {"a": 0.0, "b": 0.0}
    assert not mmtm.mean_squeeze("a").any()
    for step in range(6):
        squeezes = {name: torch.rand(5, 4, generator=rng) for name in "ab"}
        mask = torch.rand(5, 2, generator=rng) < 0.5
        if step == 3:
            mask[:, 1] = False  # of no clip
        given = dict(zip("ab", mask.split(1, dim=1), strict=True))
        mmtm(squeezes, given)
        for name in "ab":
            rows = array(squeezes[name])[array(given[name])[:, 0]]
            if len(rows):
                total[name] = 0.9 * total[name] + 0.1 * rows.mean(axis=0)
                weight[name] = 0.9 * weight[name] + 0.1
    mmtm.eval()({"a": torch.ones(5, 4)}, given)
    for name in "ab":
        np.testing.assert_allclose(array(mmtm.mean_squeeze(name)), total[name] / weight[name], rtol=1e-5)


def test_the_gate_of_a_modality_is_replaced_by_the_mean_of_those_recorded():
    mmtm = MMTM({"a": 4, "b": 6}).train()
    given = dict.fromkeys("ab", torch.ones(5, 1, dtype=torch.bool))
    seen = []
    for step in range(4):
        mmtm.record = step != 1
        squeezes = {"a": torch.rand(5, 4), "b": torch.rand(5, 6)}
        gates = mmtm(squeezes, given)
        seen += [gates["a"]] if mmtm.record else []
    mmtm.eval()({"a": torch.ones(5, 4), "b": torch.ones(5, 6)}, given)  # evaluation is not recorded
    mmtm.train().record, mmtm.replace = False, {"a": torch.tensor(True), "b": torch.tensor(False)}
    torch.testing.assert_close(mmtm.mean_gate("a"), torch.cat(seen).mean(dim=0))
    replaced = mmtm(squeezes, given)
    torch.testing.assert_close(replaced["a"], mmtm.mean_gate("a").expand(5, 4))
    (gradient,) = torch.autograd.grad(replaced["a"].sum(), mmtm.gates["a"].weight)
    assert not gradient.any() and torch.equal(replaced["b"], gates["b"])
    mmtm.replace = None
    assert torch.equal(mmtm(squeezes, given)["a"], gates["a"])


def test_recorded_gates_count_the_clips_given():
    mmtm = MMTM({"a": 4, "b": 4}).train()
    mmtm.record = True
    squeezes, column = {"a": torch.rand(3, 4), "b": torch.rand(3, 4)}, torch.tensor([[True], [False], [True]])
    gates = mmtm(squeezes, {"a": column, "b": ~column})
    torch.testing.assert_close(mmtm.mean_gate("a"), gates["a"][[0, 2]].mean(dim=0))
    torch.testing.assert_close(mmtm.mean_gate("b"), gates["b"][1])


# ------------------------------------------------------------------------------------------------------- CentralNet


def slow_central(model: MultimodalClassifier, pooled: dict[str, list[np.ndarray]]) -> np.ndarray:
    """The joint logits (C,) of one clip."""
    head = model.head
    before = np.zeros(0)
    for i, size in enumerate(head.sizes):
        u = np.zeros(size)
        for name, p in pooled.items():
            for c, value in enumerate(p[i]):
                u[c] += head.weights[name][i].item() * value
        if i > 0:
            u += head.carry[i - 1].item() * np.maximum(linear(head.layers[i - 1], before), 0)
        before = u
    return linear(head.out, u)


@pytest.mark.parametrize("three", [False, True])
def test_centralnet_equals_the_slow_reference_in_joint_and_homogeneous_batches(three):
    model, given = small("centralnet", three).eval(), inputs(2, three)
    for fed in (model.names, ("audio",), ("video",)):
        output = model(only(given, *fed), fed)
        for i in range(2):
            pooled = slow_stages(model, only(given, *fed), i, {})
            np.testing.assert_allclose(array(output.joint[i]), slow_central(model, pooled), atol=1e-9)
            for name in fed:
                expected = linear(model.heads[name], pooled[name][-1])
                np.testing.assert_allclose(array(output.logits[name][i]), expected, atol=1e-9)


def test_the_central_network_of_resnet18_and_of_encoders_of_unequal_width():
    model = network(6, "resnet18", model="centralnet")
    assert [(layer.in_features, layer.out_features) for layer in model.head.layers] == [
        (64, 128),
        (128, 256),
        (256, 512),
    ]
    assert model.head.out.weight.shape == (6, 512) and not list(model.head.buffers())
    scalars = torch.cat([*model.head.weights.values(), model.head.carry])
    assert len(scalars) == 11 and 0 <= scalars.min() < 0.5 < scalars.max() < 1
    thin = Modality("video", "frames", "visual", encoder="resnet18_thin")
    model = build_model((AUDIO, thin), SHAPES, 3, "resnet18", model="centralnet").double().eval()
    given = inputs(1)
    pooled = slow_stages(model, given, 0, {})
    assert [len(p) for p in pooled["video"]] == [16, 32, 64, 128]
    np.testing.assert_allclose(array(model(given, NAMES).joint[0]), slow_central(model, pooled), atol=1e-9)


def test_without_the_video_weights_the_joint_logits_do_not_depend_on_video():
    model, given = small("centralnet").eval(), inputs()
    other = given | {"video": torch.randn_like(given["video"])}
    assert not torch.equal(model(given, NAMES).joint, model(other, NAMES).joint)
    nn.init.zeros_(model.head.weights["video"])
    assert torch.equal(model(given, NAMES).joint, model(other, NAMES).joint)


# ------------------------------------------------------------------------------------------------- masking, of both


@pytest.mark.parametrize("masked_runs", [False, True])
@pytest.mark.parametrize("fed", NAMES)
@pytest.mark.parametrize("model", BOTH)
def test_a_masked_modality_has_no_part_and_no_gradient(model, fed, masked_runs):
    net, given = small(model).train(), inputs()
    (masked,) = set(NAMES) - {fed}
    joints = []
    for x in (given, given | {masked: torch.randn_like(given[masked])}):
        net.zero_grad()
        output = net(x if masked_runs else only(x, fed), (fed,))
        sum(logits.square().sum() for logits in output.heads.values()).backward()
        joints.append(output.joint)
    assert torch.equal(joints[0], joints[1]) and tuple(output.logits) == (fed,)
    assert not output.features[masked].any() and output.features[fed].any()
    private = [f"encoders.{masked}.", f"gates.{masked}.", f"heads.{masked}.", f"weights.{masked}"]
    for name, parameter in net.named_parameters():
        if any(part in name for part in private):
            grad = parameter.grad
            assert grad is None or (masked_runs and not grad.any()), name
            assert not masked_runs or "encoders." not in name or grad is not None, name
    assert all(parameter.grad.any() for name, parameter in net.named_parameters() if f"encoders.{fed}.conv1" in name)


@pytest.mark.parametrize("three", [False, True])
@pytest.mark.parametrize("model", BOTH)
def test_each_clip_of_a_mixed_batch_is_masked_for_itself(model, three):
    """In evaluation mode the clips do not see each other: logits equal those of homogeneous batches of one clip."""
    net = small(model, three)
    net.train()(inputs(4, three), net.names)  # running means of squeezes that are not zero
    net.eval()
    names, kept = net.names, [1, 0, 0, 1] if not three else [2, 0, 1, 2]
    given, mask = inputs(4, three), torch.nn.functional.one_hot(torch.tensor(kept), len(net.names)).bool()
    with torch.no_grad():
        mixed = net(given, names, mask)
        for i, m in enumerate(kept):
            alone = net({names[m]: given[names[m]][i : i + 1]}, (names[m],))
            torch.testing.assert_close(mixed.joint[i : i + 1], alone.joint, rtol=1e-9, atol=1e-12)
            for values, expected in ((mixed.logits, alone.logits), (mixed.features, alone.features)):
                torch.testing.assert_close(values[names[m]][i : i + 1], expected[names[m]], rtol=1e-9, atol=1e-12)
            assert all(not mixed.features[name][i].any() for name in names if name != names[m])
        ones = net(given, names, torch.ones_like(mask))
        assert torch.equal(ones.joint, net(given, names).joint)


@pytest.mark.parametrize("model", BOTH)
def test_a_mixed_batch_of_one_kind_has_the_gradients_of_the_homogeneous_one(model):
    gradients, given = [], inputs()
    for mask in (None, torch.tensor([[False, True]] * 3)):
        net = small(model).train()
        output = net(given, ("video",) if mask is None else NAMES, mask)
        (output.joint.square().sum() + output.logits["video"].square().sum()).backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    for name, grad in gradients[0].items():
        other = gradients[1][name]
        none = torch.zeros(())
        torch.testing.assert_close(
            *torch.broadcast_tensors(none if grad is None else grad, none if other is None else other),
            rtol=1e-9, atol=1e-12, msg=name,
        )  # fmt: skip


@pytest.mark.parametrize("model", BOTH)
def test_unimodal_predictions_of_the_masked_joint_head_are_those_of_homogeneous_batches(model):
    net, given = small(model, unimodal="masked"), inputs()
    assert net.train()(given, NAMES).logits == {}
    with torch.no_grad():
        output = net.eval()(given, NAMES)
        for name in NAMES:
            alone = net(only(given, name), (name,))
            torch.testing.assert_close(output.logits[name], alone.joint, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(alone.logits[name], alone.joint, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fusion", ["decision", "gated"])
def test_every_fusion_head_stands_on_mmtm(fusion):
    net, given = small("mmtm", fusion=fusion).eval(), inputs()
    output = net(given, NAMES)
    torch.testing.assert_close(output.joint, net.head(output.features, NAMES))


@pytest.mark.parametrize("model", BOTH)
def test_bfloat16_is_of_the_encoders_alone(model):
    net = small(model, precision="bf16").float().eval()
    given = {name: x.float() for name, x in inputs().items()}
    seen = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda m, x, y, name=name: seen.update({name: getattr(y, "dtype", None)}))
    output = net(given, NAMES)
    assert seen["encoders.audio.layer3"] == torch.bfloat16
    inner = "mmtm.layer3.squeeze" if model == "mmtm" else "head.layers.1"
    assert seen[inner] == output.joint.dtype == output.logits["audio"].dtype == torch.float32
    plain = small(model).float().eval()(given, NAMES)
    torch.testing.assert_close(output.joint, plain.joint, rtol=0.1, atol=0.05)


# --------------------------------------------------------------------------------------------------- flags and runs


def test_encoders_without_stages_are_refused_in_one_line():
    for model in BOTH:
        with pytest.raises(UserError, match=r"encoder mlp of text: has no stages .*--model late.*resnet18") as caught:
            network(three=True, model=model)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("words", "message"), [
    ("--model centralnet --fusion_method sum", "--fusion_method sum: --model centralnet has its own joint head"),
    ("--model mmtm --compile", "--compile: --model mmtm runs encoders stage by stage"),
    ("--model centralnet --balance ogm_ge --method baseline", "--balance ogm_ge: needs .*--model centralnet does"),
])  # fmt: skip
def test_flags_that_do_not_go_together_are_refused(words, message):
    with pytest.raises(UserError, match=message) as caught:
        train.parse_args(["--train", *words.split()])
    assert "\n" not in str(caught.value)
    train.parse_args(["--train", "--model", "mmtm", "--balance", "ogm_ge", "--method", "baseline"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("intermediate"), train=16, test=6, frames=1)


@pytest.mark.parametrize(("model", "flags"), [
    ("mmtm", ["--reassemble", "off"]),
    ("mmtm", ["--balance", "ogm_ge", "--masked_encoder", "run"]),
    ("centralnet", ["--unimodal", "masked", "--diagnose"]),
])  # fmt: skip
def test_runs_resume_and_evaluate(model, flags, data, tmp_path, capsys):
    flags = ["--epochs", "2", "--warmup", "1", "--model", model, *flags]
    whole = run(data, tmp_path, "whole", *flags)
    run(data, tmp_path, "part", *flags[:1], "1", *flags[2:])
    run(data, tmp_path, "part", *flags, "--resume", "auto")
    states = [torch.load(tmp_path / name / "last.pth", weights_only=True)["model"] for name in ("whole", "part")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(name.startswith("mmtm." if model == "mmtm" else "head.layers.") for name in states[0])
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["phase"] == "remix" and last["n_audio"] + last["n_video"] == 16
    assert not [name for name in last if "shapley" in name]  # a game of zeroed features, which do not mask here
    capsys.readouterr()
    train.main([*TINY[:2], "--data_root", str(data), "--checkpoint", str(whole / "last.pth"), "--cache", "ram"])
    assert f"{last['test_acc']:.4f}" in capsys.readouterr().out
