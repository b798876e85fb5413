"""`--preset official` against the official main loop, written down slowly, in float64.

`Official` is an independent transcription of the method and of the official settings (docs/fidelity.md): ResNet-18,
BatchNorm, losses, Adam, SGD, StepLR, scoring and evaluation are spelled out on a dictionary of tensors; autograd is
PyTorch's. It shares with the product the initial weights, the pixels of each batch and the order in which a seed
shuffles the clips.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import REPO, make_folder
from networks import network
from PIL import Image
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms import functional as vision

import remix
import train
from dataset.augment import IMAGENET_MEAN, IMAGENET_STD, draw_views
from dataset.clips import Clips, Feed, make_clips
from dataset.folder import load_folder
from dataset.specs import description, get_spec, spec_of
from models import build_model
from models.batchnorm import batchnorm_of_one_clip
from models.checkpoint import model_weights
from utils.acceleration import PRECISIONS, set_precision
from utils.distributed import fill_gradients, parallel
from utils.run import Run
from utils.seeding import epoch_generator

BATCH, EPOCHS, WARMUP, STEP, RATE = 8, 3, 1, 2, 5e-5
AUDIO, VIDEO, BOTH = ("audio",), ("video",), ("audio", "video")  # what a batch feeds
TOLERANCE = 3e-13


class Official:
    """Weights and BatchNorm buffers under their official names, and the optimizer's state."""

    def __init__(self, weights: dict[str, Tensor], optimizer: str, data_parallel: bool):
        self.w = {name: value.clone() for name, value in weights.items()}
        self.trained = [name for name in self.w if "running" not in name and "tracked" not in name]
        for name in self.trained:
            self.w[name].requires_grad_()
        self.state: dict[str, dict] = {name: {} for name in self.trained}
        self.step = self.adam if optimizer == "adam" else self.sgd
        self.data_parallel = data_parallel

    # network

    def batchnorm(self, x: Tensor, name: str, training: bool) -> Tensor:
        mean, var = self.w[f"{name}.running_mean"], self.w[f"{name}.running_var"]
        if training:
            n = x.numel() / x.shape[1]
            assert n > 1, "PyTorch raises for a single value per channel"
            batch_mean = x.mean(dim=(0, 2, 3))
            batch_var = (x - batch_mean[:, None, None]).square().mean(dim=(0, 2, 3))
            self.w[f"{name}.running_mean"] = 0.9 * mean + 0.1 * batch_mean.detach()
            self.w[f"{name}.running_var"] = 0.9 * var + 0.1 * batch_var.detach() * n / (n - 1)
            self.w[f"{name}.num_batches_tracked"] += 1
            mean, var = batch_mean, batch_var
        scale = self.w[f"{name}.weight"] / (var + 1e-5).sqrt()
        return (x - mean[:, None, None]) * scale[:, None, None] + self.w[f"{name}.bias"][:, None, None]

    def trunk(self, x: Tensor, net: str, training: bool) -> Tensor:
        """ResNet-18 of any width: (B, c, H, W) -> (B, D, h, w)."""

        def conv_norm(x, conv, norm, stride=1, padding=1):
            x = F.conv2d(x, self.w[f"{net}.{conv}.weight"], stride=stride, padding=padding)
            return self.batchnorm(x, f"{net}.{norm}", training)

        x = F.max_pool2d(conv_norm(x, "conv1", "bn1", 2, 3).relu(), 3, stride=2, padding=1)
        for block in (f"layer{layer}.{i}" for layer in range(1, 5) for i in range(2)):
            halve = block.endswith(".0") and block != "layer1.0"
            out = conv_norm(x, f"{block}.conv1", f"{block}.bn1", 2 if halve else 1).relu()
            out = conv_norm(out, f"{block}.conv2", f"{block}.bn2")
            same = conv_norm(x, f"{block}.downsample.0", f"{block}.downsample.1", 2, 0) if halve else x
            x = (out + same).relu()
        return x

    def forward(self, batch, training: bool, masked: str = "") -> dict[str, Tensor]:
        """Both encoders run; the feature of the `masked` modality is then overwritten with zeros."""
        audio, video = (batch.inputs[name].double() for name in BOTH)
        b, t = video.shape[:2]
        a = self.trunk(audio, "audio_net", training).mean(dim=(2, 3))
        v = self.trunk(video.flatten(0, 1), "visual_net", training)
        v = v.unflatten(0, (b, t)).mean(dim=(1, 3, 4))  # over frames and places
        a, v = a * float(masked != "audio"), v * float(masked != "video")

        def linear(x, name):
            return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

        outputs = {"joint": linear(torch.cat([a, v], dim=1), "head")}
        return outputs | {"audio": linear(a, "head_audio"), "video": linear(v, "head_video")}

    # one step

    def train_batch(self, batch, fed: tuple[str, ...], rate: float) -> None:
        masked = next((name for name in BOTH if name not in fed), "")
        outputs = self.forward(batch, True, masked)

        def cross_entropy(name):
            logits, rows = outputs[name], torch.arange(len(batch.labels))
            return (logits.exp().sum(dim=1).log() - logits[rows, batch.labels]).mean()

        weight = 0.5 if fed == BOTH else 1.0
        loss = cross_entropy("joint") + sum(weight * cross_entropy(name) for name in fed)
        gradients = torch.autograd.grad(loss, [self.w[name] for name in self.trained], allow_unused=True)
        with torch.no_grad():
            for name, gradient in zip(self.trained, gradients, strict=True):
                if gradient is None and self.data_parallel:
                    gradient = torch.zeros_like(self.w[name])
                if gradient is not None:
                    self.w[name] -= rate * self.step(self.state[name], gradient + 1e-4 * self.w[name])

    @staticmethod
    def adam(state: dict, gradient: Tensor) -> Tensor:
        t = state["t"] = state.get("t", 0) + 1
        state["m"] = 0.9 * state.get("m", 0) + 0.1 * gradient
        state["v"] = 0.999 * state.get("v", 0) + 0.001 * gradient**2
        return state["m"] / (1 - 0.9**t) / ((state["v"] / (1 - 0.999**t)).sqrt() + 1e-8)

    @staticmethod
    def sgd(state: dict, gradient: Tensor) -> Tensor:
        state["m"] = 0.9 * state.get("m", 0) + gradient
        return state["m"]

    # evaluation mode

    @torch.no_grad()
    def logits(self, clips: Clips) -> dict[str, Tensor]:
        """(N, C) of each head, clips in their order."""
        (batch,) = clips.epoch(remix.batches_of(len(clips), len(clips), BOTH, None))
        return self.forward(batch, False)

    def partition(self, clips: Clips) -> list[str]:
        """The modality that each clip keeps; a tie keeps video."""
        outputs = self.logits(clips)
        audio, video = (map(slow_kl, outputs[name].softmax(dim=1).tolist()) for name in BOTH)
        return ["audio" if a < v else "video" for a, v in zip(audio, video, strict=True)]

    def accuracies(self, clips: Clips) -> dict[str, float]:
        labels = clips.labels.tolist()
        hits = {name: [row.index(max(row)) for row in rows.tolist()] for name, rows in self.logits(clips).items()}
        return {name: sum(map(int.__eq__, found, labels)) / len(labels) for name, found in hits.items()}


def slow_kl(probabilities: list[float], least: float = 1e-9) -> float:
    """KL from uniform in bits, class by class in Python floats; probabilities are clipped to [least, 1]."""
    total = 0.0
    for p in probabilities:
        p = min(max(p, least), 1.0)
        total += p * math.log2(p / (1 / len(probabilities)))
    return total


def official_plan(kept: list[str] | None, epoch: int, seed: int, clips: int) -> list[remix.Batch]:
    """The epoch's batches: joint in the warm-up, then all of video's, then all of audio's, each list shuffled."""
    draw = epoch_generator(seed, epoch, "plan")
    plan = []
    for fed in (BOTH,) if kept is None else (VIDEO, AUDIO):
        own = torch.tensor([i for i in range(clips) if kept is None or kept[i] == fed[0]])
        own = own[torch.randperm(len(own), generator=draw)]
        plan += [remix.Batch(own[i : i + BATCH], fed) for i in range(0, len(own), BATCH)]
    return plan


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """25 training clips: the last joint batch is a single clip, and so is the last one of audio's or video's."""
    return make_folder(tmp_path_factory.mktemp("data"), train=25, test=11, size=(72, 80), audio_shape=(65, 70))


@pytest.fixture(scope="module")
def clips(data) -> dict[str, Clips]:
    folder = load_folder(data, get_spec("folder"))
    feed = Feed(folder.spec.modalities, 64, torch.device("cpu"), "ram", as_pil=True)
    return {name: make_clips(folder.root, name, folder.parts[name], folder.shapes, feed) for name in ("train", "test")}


def in_double(model: nn.Module) -> nn.Module:
    """The network in float64, where rounding cannot grow: Adam turns a gradient of pure rounding error into a step."""
    model.double().register_forward_pre_hook(
        lambda _, given: ({name: x.double() for name, x in given[0].items()}, *given[1:])
    )
    return model


def product(data, runs, monkeypatch, seed: int, *flags: str) -> tuple[dict, list, list[dict], dict]:
    """Initial weights, the partition of each Remix epoch, metrics and last.pth of a run in float64."""
    first, kept = {}, []

    def double_model(*arguments):
        model = in_double(build_model(*arguments))
        first.update({name: value.clone() for name, value in model_weights(model).items()})
        return model

    def partition(run, epoch, names, labels, kl, keep):
        kept.append([BOTH[row.index(True)] for row in keep.tolist()])

    monkeypatch.setattr(train, "build_model", double_model)
    monkeypatch.setattr(Run, "partition", partition)
    words = f"--train --dataset folder --data_root {data} --preset official --encoder resnet18_thin --image_size 64"
    words += f" --cache ram --batch_size {BATCH} --epochs {EPOCHS} --warmup {WARMUP} --lr_decay_step {STEP}"
    words += f" --random_seed {seed} --log_path {runs} --run_name official"
    train.main([*words.split(), *flags])
    metrics = [json.loads(line) for line in (runs / "official" / "metrics.jsonl").read_text().splitlines()]
    return first, kept, metrics, torch.load(runs / "official" / "last.pth", weights_only=True)


@pytest.mark.parametrize(("optimizer", "masked_encoder"), [("adam", "run"), ("sgd", "run_heads")])
def test_three_epochs_of_the_official_main_loop(data, clips, tmp_path, monkeypatch, optimizer, masked_encoder):
    seed = 2  # whose partitions change and leave a last batch of one clip
    flags = [] if masked_encoder == "run" else ["--masked_encoder", masked_encoder]  # `run` is the preset's
    first, kept, metrics, last = product(data, tmp_path, monkeypatch, seed, "--optimizer", optimizer, *flags)
    assert last["config"]["masked_encoder"] == masked_encoder and last["config"]["learning_rate"] == RATE

    slow, partitions, lone = Official(first, optimizer, masked_encoder == "run_heads"), [], []
    for epoch in range(EPOCHS):
        rate = RATE * 0.1 ** (epoch // STEP)
        if epoch >= WARMUP:
            partitions.append(slow.partition(clips["train"]))
        plan = official_plan(partitions[-1] if partitions else None, epoch, seed, len(clips["train"]))
        for batch in clips["train"].epoch(plan, epoch_generator(seed, epoch, "views"), load_masked=True):
            slow.train_batch(batch, batch.fed, rate)
            lone += [batch.fed] if len(batch.clips) == 1 else []
        found = metrics[epoch]
        assert found["lr"] == pytest.approx(rate, rel=1e-15)
        for name, accuracy in slow.accuracies(clips["test"]).items():
            assert found["test_acc" if name == "joint" else f"test_acc_{name}"] == pytest.approx(accuracy, abs=1e-6)

    assert partitions == kept and partitions[0] != partitions[1]
    assert all(set(partition) == set(BOTH) for partition in partitions)
    assert BOTH in lone and len(set(lone)) > 1, "batches of one clip, joint and of one modality"
    assert set(slow.w) == set(last["model"])
    worst = {name: (last["model"][name] - value).abs().max().item() for name, value in slow.w.items()}
    print(f"{optimizer}, {masked_encoder}: largest difference {max(worst.values()):.1e}")
    assert max(worst.values()) < TOLERANCE, max(worst, key=worst.__getitem__)


def small_steps(clips: Clips, plan: list[remix.Batch], words: str) -> tuple[dict, dict, Official]:
    """Weights before and after one epoch of `train_epoch` over `plan` in float64, and the transcription's."""
    args = train.parse_args(["--train", "--dataset", "folder", "--preset", "official", *words.split()])
    args.joint_weights, args.alone_weights = train.loss_weights(args, BOTH)
    torch.manual_seed(0)
    net = in_double(network(3))
    first = {name: value.clone() for name, value in model_weights(net).items()}
    slow = Official(first, args.optimizer, args.masked_encoder == "run_heads")
    train.train_epoch(net, clips, plan, train.make_optimizer(net, args), 0, args)
    for batch in clips.epoch(plan, epoch_generator(args.random_seed, 0, "views"), load_masked=True):
        slow.train_batch(batch, batch.fed, args.learning_rate)
    return first, model_weights(net), slow


@pytest.mark.parametrize("masked_encoder", ["run", "run_heads"])
def test_the_masked_head_is_stepped_under_data_parallel_alone(clips, masked_encoder):
    """In a batch of video alone, first with audio's head as it was drawn, then with momentum from a joint step."""
    words = f"--masked_encoder {masked_encoder}"
    video = remix.Batch(torch.arange(6), VIDEO)
    first, after, _ = small_steps(clips["train"], [video], words)
    for name in ("head_audio.weight", "head_audio.bias"):
        assert torch.equal(first[name], after[name]) == (masked_encoder == "run")
    _, after, slow = small_steps(clips["train"], [remix.Batch(torch.arange(8, 16), BOTH), video], words)
    for name, value in slow.w.items():
        assert (after[name] - value).abs().max() < TOLERANCE, name


def test_several_processes_leave_the_masked_head_without_a_gradient(clips, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        net = network(3)
        parallel(net)
        (batch,) = clips["train"].epoch([remix.Batch(torch.arange(4), VIDEO)], load_masked=True)
        output = net(batch.inputs, VIDEO)
        (output.joint.sum() + output.logits["video"].sum()).backward()
    finally:
        dist.destroy_process_group()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    without = {name for name, gradient in gradients.items() if gradient is None}
    assert without == {"heads.audio.weight", "heads.audio.bias"}
    assert not gradients["encoders.audio.conv1.weight"].any()
    fill_gradients(net)
    assert not any(net.get_parameter(name).grad.any() for name in without)


@pytest.mark.parametrize("fed", [BOTH, AUDIO, VIDEO])
def test_a_batch_of_one_clip_takes_its_own_statistics_under_the_preset(clips, fed):
    first, after, slow = small_steps(clips["train"], [remix.Batch(torch.tensor([3]), fed)], "")
    assert (after["visual_net.bn1.running_mean"] - first["visual_net.bn1.running_mean"]).abs().max() > 1e-3
    for name, value in slow.w.items():  # without AVX-512, sums over a single clip differ by up to 6e-13
        assert (after[name] - value).abs().max() < 1e-12, name


def test_a_batch_of_one_clip_leaves_the_running_statistics_alone_by_default(clips):
    first, after, _ = small_steps(clips["train"], [remix.Batch(torch.tensor([3]), BOTH)], "--batchnorm refreshed")
    for name, value in first.items():
        assert ("running" in name or "tracked" in name) == torch.equal(after[name], value), name


def test_a_layer_with_one_value_per_channel_uses_the_running_statistics():
    """Where PyTorch, and with it the official code, raises: maps of 1 x 1 of one clip."""
    net = torch.nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3)).train()
    x = torch.randn(1, 3, 4, 4)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        net(x)
    net[2].running_mean.fill_(2.0)
    steps = [int(net[i].num_batches_tracked) for i in (0, 2)]
    with batchnorm_of_one_clip(net, own=True):
        out = net(x)
    own = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    expected = (own.mean((2, 3), keepdim=True) - 2.0) / math.sqrt(1 + 1e-5)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert [int(net[i].num_batches_tracked) for i in (0, 2)] == [steps[0] + 1, steps[1]]
    assert all(layer.training for layer in net) and not net[0]._forward_pre_hooks


# Arithmetic ---------------------------------------------------------------------------------------------------------

STATE = "torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32"


def test_a_gpu_computes_as_pytorch_does_by_default(monkeypatch):
    """Convolutions in TF32, matrix products in float32, as the official code, which sets cuDNN's determinism alone."""
    assert train.parse_args(["--train", "--preset", "official"]).precision == "official"
    fresh = subprocess.run([sys.executable, "-c", f"import torch; print(({STATE}))"], capture_output=True, text=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    matmul, found = torch.get_float32_matmul_precision(), {}
    with torch.backends.cudnn.flags():  # puts cuDNN's flags back
        for precision in PRECISIONS:
            set_precision(precision, torch.device("cuda"))
            found[precision] = str(eval(STATE))
            # Both of PyTorch's interfaces can be read, and say the same.
            newer = [kind.fp32_precision for kind in (torch.backends.cudnn.conv, torch.backends.cuda.matmul)]
            assert [state == "tf32" for state in newer] == [precision != "fp32", precision in ("tf32", "bf16")]
            assert torch.backends.cudnn.deterministic == (precision == "official")
    torch.set_float32_matmul_precision(matmul)
    assert found["official"] == fresh.stdout.strip() == "(True, 'highest', False)"
    assert [name for name, state in found.items() if state == found["official"]] == ["official"]


def other_sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same KL (N,) in float32 throughout, and in float64 added up by `torch.sum`, which goes in another order."""
    p, share = logits.softmax(dim=1).clamp(1e-9, 1), 1 / logits.shape[1]
    return (p * (p / share).log2()).sum(dim=1), (p.double() * (p.double() / share).log2()).sum(dim=1)


@pytest.mark.parametrize("classes", [3, 6, 31])
def test_saturated_clips_are_assigned_as_by_the_official_arithmetic(classes):
    """Logits with margins up to 30: float32 softmax and clipping, a float64 sum class by class; no clip moves.

    Beyond a margin of about 20 both heads are certain, and KLs differ in their last bits alone.
    """
    moved, ours_moved, least = {}, 0, float(np.float32(1e-9))
    for margin in (2, 10, 14, 16, 18, 20, 25, 30):
        draw = torch.Generator().manual_seed(margin)
        logits = [torch.randn(3000, classes, generator=draw) for _ in BOTH]
        for values in logits:
            top = torch.randint(classes, (3000,), generator=draw)
            values[torch.arange(3000), top] = values.max(dim=1).values + margin
        audio, video = ([slow_kl(row, least) for row in values.softmax(dim=1).tolist()] for values in logits)
        expected = torch.tensor([a < v for a, v in zip(audio, video, strict=True)])
        ours_moved += int((remix.decouple(remix.difficulty(logits))[:, 0] != expected).sum())
        others = zip(*map(other_sums, logits), strict=True)
        moved[margin] = [int(((a < v) != expected).sum()) for a, v in others]
    print(f"{classes} classes, of 3,000 clips moved by float32 and by torch.sum, by margin: {moved}")
    assert ours_moved == 0
    assert moved[2] == [0, 0] and moved[18][0] > 100


# Frames -------------------------------------------------------------------------------------------------------------


def official_frame(path, box=None, flip=False, size=64) -> Tensor:
    """A frame as torchvision's transforms make it of a PIL image; `box` (top, left, height, width) is a random crop."""
    image = Image.open(path).convert("RGB")
    if box is not None:
        image = vision.hflip(vision.crop(image, *box)) if flip else vision.crop(image, *box)
        # Pillow before 13 resizes rows first; 13 takes columns first for some shapes. In two calls the order is fixed.
        image = image.resize((size, image.height), Image.Resampling.BILINEAR)
    image = transforms.Resize(size=(size, size))(image)
    return transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)(transforms.ToTensor()(image))


@pytest.mark.parametrize("cache", ["ram", "none"])
@pytest.mark.parametrize("seed", [None, 4])
def test_frames_equal_torchvisions_to_the_last_bit(data, cache, seed):
    folder = load_folder(data, get_spec("folder"))
    feed = Feed(folder.spec.modalities, 64, torch.device("cpu"), cache, as_pil=True)
    part = folder.parts["train"]
    own = make_clips(folder.root, "train", part, folder.shapes, feed)
    plan = [remix.Batch(torch.arange(25), BOTH)]
    draws = [None if seed is None else torch.Generator().manual_seed(seed) for _ in range(2)]
    (batch,) = own.epoch(plan, draws[0])
    views = draw_views(own.counts["video"], own.sizes["video"], 2, draws[1])
    for clip in range(25):
        for k in range(2):
            path = part.files["video"][clip][int(views.picks[clip, k])]
            box = None if seed is None else views.boxes[clip, k].tolist()
            expected = official_frame(path, box, bool(views.flips[clip, k]))
            assert torch.equal(batch.inputs["video"][clip, k], expected), (clip, k)


@pytest.fixture(scope="module")
def ten_frames(tmp_path_factory):
    """Four clips of ten frames, each frame of one grey level: ten times its number."""
    root = make_folder(tmp_path_factory.mktemp("ten"), train=4, test=2, frames=10)
    for path in root.glob("visual/*/*.jpg"):
        Image.new("RGB", (48, 40), (10 * int(path.stem[-5:]),) * 3).save(path, quality=100)
    return root


@pytest.mark.parametrize("cache", ["ram", "none"])
@pytest.mark.parametrize(("pick", "evaluated"), [("first", [1, 4, 7]), ("random", [2, 5, 8])])
def test_ogm_ges_frames_are_1_4_and_7_of_10(ten_frames, cache, pick, evaluated):
    """`"pick": "first"` in training and in evaluation; the default draws one of each three in training."""
    modalities = [{"name": "audio", "kind": "array", "folder": "audio"},
                  {"name": "video", "kind": "frames", "folder": "visual", "frames": 3, "pick": pick}]  # fmt: skip
    (ten_frames / "dataset.json").write_text(json.dumps({"modalities": modalities}))
    folder = load_folder(ten_frames, spec_of("folder", ten_frames))
    assert description(folder.spec)["modalities"][1].get("pick", "random") == pick
    feed = Feed(folder.spec.modalities, 32, torch.device("cpu"), cache)
    clips = make_clips(ten_frames, "train", folder.parts["train"], folder.shapes, feed)

    def numbers(generator) -> list[list[int]]:
        (batch,) = clips.epoch([remix.Batch(torch.arange(4), BOTH)], generator)
        red = batch.inputs["video"][:, :, 0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]  # (4, 3, 32, 32) in [0, 1]
        return (red.mean(dim=(2, 3)) * 255 / 10).round().int().tolist()

    assert numbers(None) == [evaluated] * 4
    drawn = [row for seed in range(8) for row in numbers(torch.Generator().manual_seed(seed))]
    seen = [sorted(set(column)) for column in zip(*drawn, strict=True)]
    assert seen == ([[1], [4], [7]] if pick == "first" else [[1, 2, 3], [4, 5, 6], [7, 8, 9]])


def test_kinetics_sounds_is_fed_as_data_remixing_feeds_its_frames():
    assert get_spec("KineticSound").modality("video").pick == "random"


def test_fidelity_md_names_tests_that_exist():
    document = (REPO / "docs" / "fidelity.md").read_text()
    default = Path(__file__).read_text()
    for cell in re.findall(r"\| ([^|]*) \|$", document, re.MULTILINE):
        source = default
        for name in re.findall(r"`(test_\w+(?:\.py)?)`", cell):
            if name.endswith(".py"):
                source = (REPO / "tests" / name).read_text()
            else:
                assert f"def {name}(" in source, name
    assert document.count("`test_") > 30
