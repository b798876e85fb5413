"""The product against a slow, plain transcription of DESIGN section 1, with both encoders always run.

The transcription shares with the product only the initial weights, the batches' pixels and the order of the clips.
"""

import argparse
import math

import numpy as np
import pytest
import torch
from helpers import make_folder
from torch import nn

import remix
import train
from dataset.clips import Feed, make_clips
from dataset.folder import load_folder
from dataset.specs import get_spec
from models import AVClassifier
from models.encoders import Trunk
from utils.seeding import epoch_generator

CLASSES, BATCH, SEED = 3, 8, 5


class PlainNet(nn.Module):
    """Two thin trunks and three linear heads; a masked feature is overwritten with zeros after its encoder.

    The trunk is the product's: test_models holds it against torchvision's ResNet-18.
    """

    def __init__(self):
        super().__init__()
        self.audio_net, self.visual_net = Trunk(1, 8), Trunk(3, 8)
        self.head, self.head_audio, self.head_video = (nn.Linear(n, CLASSES) for n in (128, 64, 64))

    def forward(self, audio, video, masked=None):
        batch, frames = video.shape[:2]
        pool = nn.AdaptiveAvgPool2d(1)
        a = pool(self.audio_net(audio)).flatten(1)
        v = pool(self.visual_net(video.reshape(batch * frames, *video.shape[2:]))).reshape(batch, frames, 64).mean(1)
        if masked is not None:
            (a if masked == "audio" else v)[:] = 0.0
        return self.head(torch.cat([a, v], 1)), self.head_audio(a), self.head_video(v)


class DoubleClassifier(AVClassifier):
    """In float64, where rounding cannot grow: Adam turns a gradient of pure rounding error into a full step."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.double()

    def forward(self, audio, video, kept="both"):
        return super().forward(*(x.double() if x is not None else None for x in (audio, video)), kept)


def plain_kl(logits: np.ndarray) -> float:
    exp = [math.exp(x - max(logits)) for x in logits]
    p = [min(max(e / sum(exp), 1e-9), 1.0) for e in exp]
    return sum(x * math.log2(x * len(p)) for x in p)


def plain_loss(net, audio, video, labels, kept, weights=(0.5, 0.5, 1.0, 1.0)):
    alpha, beta, gamma1, gamma2 = weights
    ce = nn.CrossEntropyLoss()
    if kept == "both":
        joint, out_audio, out_video = net(audio, video)
        return ce(joint, labels) + alpha * ce(out_audio, labels) + beta * ce(out_video, labels)
    if kept == "video":
        joint, _, out_video = net(audio, video, masked="audio")
        return ce(joint, labels) + gamma1 * ce(out_video, labels)
    joint, out_audio, _ = net(audio, video, masked="video")
    return ce(joint, labels) + gamma2 * ce(out_audio, labels)


def plain_partition(net, clips, dtype=torch.float32) -> list[int]:
    """Clip by clip; a tie keeps video."""
    net.eval()
    kept = []
    for i in range(len(clips)):
        (batch,) = clips.epoch([remix.Batch(torch.tensor([i]), "both")])
        with torch.no_grad():
            _, audio, video = net(batch.audio.to(dtype), batch.video.to(dtype))
        kept.append(remix.AUDIO if plain_kl(audio[0].tolist()) < plain_kl(video[0].tolist()) else remix.VIDEO)
    return kept


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"), train=26, test=6)


@pytest.fixture(scope="module")
def clips(data):
    folder = load_folder(data, get_spec("folder"))
    feed = Feed(frames=2, image_size=32, device=torch.device("cpu"), cache="ram", workers=0)
    return make_clips(folder.root, "train", folder.parts["train"], folder.audio_shape, feed)


def twins(seed: int = 0) -> tuple[AVClassifier, PlainNet]:
    torch.manual_seed(seed)
    ours, plain = AVClassifier(CLASSES, "resnet18_thin"), PlainNet()
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def official_args(**changes) -> argparse.Namespace:
    args = train.parse_args(["--train", "--dataset", "folder", "--preset", "official", "--random_seed", str(SEED)])
    vars(args).update(changes)
    return args


def test_partition_from_the_same_weights(clips):
    ours, plain = twins()
    # trained a little first: at initialisation both heads are equally unsure
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-3) for net in (ours, plain)]
    train.train_epoch(ours, clips, remix.batches_of(26, 13, "both", None), optimizers[0], 0, official_args())
    plain.load_state_dict(ours.state_dict())
    logits = train.predict(ours, clips, "both", 7, "score")
    kept = remix.decouple(remix.difficulty(logits["audio"], logits["video"])).tolist()
    assert kept == plain_partition(plain, clips)
    assert 0 < sum(kept) < 26  # both modalities occur


@pytest.mark.parametrize("kept", ["both", "audio", "video"])
@pytest.mark.parametrize("masked_encoder", ["run", "skip"])
def test_loss_and_gradients_on_the_same_batch(clips, kept, masked_encoder):
    ours, plain = (net.train() for net in twins())
    plan = [remix.Batch(torch.arange(10), kept)]
    (full,) = clips.epoch([remix.Batch(torch.arange(10), "both")])
    (batch,) = clips.epoch(plan, load_masked=masked_encoder == "run")
    loss = sum(train.loss_terms(ours(batch.audio, batch.video, kept), batch.labels, kept, official_args()).values())
    expected = plain_loss(plain, full.audio, full.video, full.labels, kept)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        masked = kept != "both" and name.startswith({"audio": "visual_net", "video": "audio_net"}[kept])
        if masked and masked_encoder == "skip":
            assert p.grad is None and torch.all(q.grad == 0), name
        elif q.grad is None:  # the masked modality's own head
            assert p.grad is None, name
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_three_epochs_of_the_official_preset(data, clips, tmp_path, monkeypatch):
    """Warm-up, then two Remix epochs through the command line: weights and BatchNorm statistics agree to 1e-5."""
    flags = ["--train", "--dataset", "folder", "--data_root", str(data), "--preset", "official", "--epochs", "3"]
    flags += ["--model", "resnet18_thin", "--image_size", "32", "--batch_size", str(BATCH), "--warmup", "1"]
    flags += ["--lr_decay_step", "2", "--random_seed", str(SEED), "--log_path", str(tmp_path), "--run_name", "official"]
    monkeypatch.setattr(train, "AVClassifier", DoubleClassifier)
    train.main(flags)
    result = torch.load(tmp_path / "official" / "last.pth", weights_only=True)
    assert result["config"]["masked_encoder"] == "run" and result["config"]["learning_rate"] == 5e-5

    net = twins(SEED)[1].double()
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4)
    for epoch in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 5e-5 * (0.1 if epoch >= 2 else 1.0)
        order = epoch_generator(SEED, epoch, "plan")
        if epoch == 0:
            plan = remix.batches_of(26, BATCH, "both", order)
        else:
            kept = plain_partition(net, clips, torch.float64)
            plan = remix.reassemble(torch.tensor(kept), BATCH, "sequential", order)
            assert [b.kept for b in plan] == sorted((b.kept for b in plan), reverse=True)  # video, then audio
        net.train()
        for batch in clips.epoch(plan, epoch_generator(SEED, epoch, "views"), load_masked=True):
            optimizer.zero_grad()
            plain_loss(net, batch.audio.double(), batch.video.double(), batch.labels, batch.kept).backward()
            optimizer.step()
    assert result["kept"].tolist() == kept
    for name, value in net.state_dict().items():
        torch.testing.assert_close(result["model"][name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("kept", ["both", "audio", "video"])
def test_each_loss_weight_acts_in_its_own_batches(clips, kept):
    ours, plain = (net.train() for net in twins())
    weights = {"alpha": 0.3, "beta": 0.7, "gamma1": 1.9, "gamma2": 2.3}
    (full,) = clips.epoch([remix.Batch(torch.arange(10), "both")])
    audio, video = (None if kept == other else x for x, other in ((full.audio, "video"), (full.video, "audio")))
    terms = train.loss_terms(ours(audio, video, kept), full.labels, kept, official_args(**weights))
    expected = plain_loss(plain, full.audio, full.video, full.labels, kept, tuple(weights.values()))
    assert sum(terms.values()).item() == pytest.approx(expected.item(), abs=1e-5)


def test_encoder_lr_decay_scales_the_encoders_rate_alone():
    net = AVClassifier(CLASSES, "resnet18_thin")
    optimizer = train.make_optimizer(net, official_args(encoder_lr_decay=0.25, learning_rate=1e-2))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in net.named_parameters():
        assert rates[id(parameter)] == (1e-2 if name.startswith("head") else 2.5e-3), name


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("kept", ["audio", "video"])
def test_skip_leaves_the_masked_encoder_untouched_and_run_does_not(clips, kept, optimizer):
    masked = "visual_net" if kept == "audio" else "audio_net"

    def masked_state(net, optim):
        state = {k: v.clone() for k, v in net.state_dict().items() if k.startswith(masked)}
        for name, parameter in net.named_parameters():
            if name.startswith(masked):
                kept_by_optim = optim.state[parameter].items()
                state |= {f"{name}/{k}": v.clone() for k, v in kept_by_optim if torch.is_tensor(v)}
        return state

    for masked_encoder in ("skip", "run"):
        args = official_args(masked_encoder=masked_encoder, optimizer=optimizer, learning_rate=1e-3)
        torch.manual_seed(0)
        net = AVClassifier(CLASSES, "resnet18_thin")
        optim = train.make_optimizer(net, args)
        train.train_epoch(net, clips, remix.batches_of(26, 13, "both", None), optim, 0, args)  # fills the momenta
        before = masked_state(net, optim)
        assert len(before) > 150
        train.train_epoch(net, clips, [remix.Batch(torch.arange(9), kept)], optim, 1, args)
        after = masked_state(net, optim)
        same = [torch.equal(before[name], after[name]) for name in before]
        if masked_encoder == "skip":
            assert all(same)
        else:  # the official side effects: statistics move, momentum and weight decay step
            assert not torch.equal(before[f"{masked}.bn1.running_mean"], after[f"{masked}.bn1.running_mean"])
            assert not torch.equal(before[f"{masked}.conv1.weight"], after[f"{masked}.conv1.weight"])
