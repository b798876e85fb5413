"""`--preset official` against the official main loop, written down slowly, in float64.

`Official` is an independent transcription of DESIGN section 1: ResNet-18, BatchNorm, losses, Adam, SGD, StepLR, scoring
and evaluation are spelled out on a dictionary of tensors; autograd is PyTorch's. It shares with the product the initial
weights, the pixels of each batch and the order in which a seed shuffles the clips.
"""

import json
import math

import pytest
import torch
from helpers import make_folder
from torch import Tensor
from torch.nn import functional as F

import remix
import train
from dataset.clips import Clips, Feed, make_clips
from dataset.folder import load_folder
from dataset.specs import get_spec
from models import build_model
from models.checkpoint import model_weights
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
    def logits(self, clips: Clips) -> list[dict[str, Tensor]]:
        """Clip by clip."""
        return [self.forward(batch, False) for batch in clips.epoch(remix.batches_of(len(clips), 1, BOTH, None))]

    def partition(self, clips: Clips) -> list[str]:
        """The modality that each clip keeps; a tie keeps video."""
        kept = []
        for outputs in self.logits(clips):
            audio, video = (slow_kl(outputs[name][0].softmax(0).tolist()) for name in BOTH)
            kept.append("audio" if audio < video else "video")
        return kept

    def accuracies(self, clips: Clips) -> dict[str, float]:
        found, labels = self.logits(clips), clips.labels.tolist()
        right = {name: [int(o[name].argmax()) == y for o, y in zip(found, labels, strict=True)] for name in found[0]}
        return {name: sum(values) / len(clips) for name, values in right.items()}


def slow_kl(probabilities: list[float]) -> float:
    """KL from uniform in bits of float probabilities, clipped to [1e-9, 1], summed in float64."""
    p = [min(max(x, 1e-9), 1.0) for x in probabilities]
    return math.fsum(x * (math.log2(x) + math.log2(len(p))) for x in p)


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


def product(data, runs, monkeypatch, seed: int, *flags: str) -> tuple[dict, list, list[dict], dict]:
    """Initial weights, the partition of each Remix epoch, metrics and last.pth of a run in float64."""
    first, kept = {}, []

    def double_model(*arguments):
        model = build_model(*arguments).double()
        model.register_forward_pre_hook(lambda _, given: ({k: x.double() for k, x in given[0].items()}, *given[1:]))
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
