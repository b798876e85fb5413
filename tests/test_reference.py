"""The product against a slow, plain transcription of the method (README), with both encoders always run.

The transcription shares with the product only the initial weights, the batches' pixels and the order of the clips.
tests/test_official.py replays whole runs of `--preset official`.
"""

import argparse
import math

import numpy as np
import pytest
import torch
from helpers import make_folder
from networks import network
from torch import nn

import remix
import train
from dataset.clips import Feed, make_clips
from dataset.folder import load_folder
from dataset.specs import get_spec
from models import MultimodalClassifier
from models.checkpoint import model_weights, official_name
from models.encoders import ENCODERS
from models.inference import predict

CLASSES, SEED = 3, 5
AUDIO, VIDEO, BOTH = ("audio",), ("video",), ("audio", "video")  # what a batch feeds


class PlainNet(nn.Module):
    """Two thin trunks and three linear heads; a masked feature is overwritten with zeros after its encoder.

    The trunk is the product's: test_models holds it against torchvision's ResNet-18.
    """

    def __init__(self):
        super().__init__()
        self.audio_net, self.visual_net = (ENCODERS["resnet18_thin"].make(channels) for channels in (1, 3))
        for trunk in (self.audio_net, self.visual_net):
            trunk.avgpool = nn.Identity()
        self.head, self.head_audio, self.head_video = (nn.Linear(n, CLASSES) for n in (256, 128, 128))

    def forward(self, audio, video, masked=None):
        batch, frames = video.shape[:2]
        pool = nn.AdaptiveAvgPool2d(1)
        a = pool(self.audio_net(audio)).flatten(1)
        v = pool(self.visual_net(video.reshape(batch * frames, *video.shape[2:]))).reshape(batch, frames, 128).mean(1)
        if masked is not None:
            (a if masked == "audio" else v)[:] = 0.0
        return self.head(torch.cat([a, v], 1)), self.head_audio(a), self.head_video(v)


def plain_kl(logits: np.ndarray) -> float:
    exp = [math.exp(x - max(logits)) for x in logits]
    p = [min(max(e / sum(exp), 1e-9), 1.0) for e in exp]
    return sum(x * math.log2(x * len(p)) for x in p)


def plain_loss(net, audio, video, labels, fed, weights=(0.5, 0.5, 1.0, 1.0)):
    alpha, beta, gamma1, gamma2 = weights
    ce = nn.CrossEntropyLoss()
    if fed == BOTH:
        joint, out_audio, out_video = net(audio, video)
        return ce(joint, labels) + alpha * ce(out_audio, labels) + beta * ce(out_video, labels)
    if fed == VIDEO:
        joint, _, out_video = net(audio, video, masked="audio")
        return ce(joint, labels) + gamma1 * ce(out_video, labels)
    joint, out_audio, _ = net(audio, video, masked="video")
    return ce(joint, labels) + gamma2 * ce(out_audio, labels)


def plain_partition(net, clips) -> list[list[bool]]:
    """Clip by clip; a tie keeps video."""
    net.eval()
    kept = []
    for i in range(len(clips)):
        (batch,) = clips.epoch([remix.Batch(torch.tensor([i]), BOTH)])
        with torch.no_grad():
            _, audio, video = net(*batch.inputs.values())
        hard_audio = plain_kl(audio[0].tolist()) < plain_kl(video[0].tolist())
        kept.append([hard_audio, not hard_audio])
    return kept


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"), train=26, test=6)


@pytest.fixture(scope="module")
def clips(data):
    folder = load_folder(data, get_spec("folder"))
    feed = Feed(folder.spec.modalities, 32, torch.device("cpu"), "ram")
    return make_clips(folder.root, "train", folder.parts["train"], folder.shapes, feed)


def twins(seed: int = 0) -> tuple[MultimodalClassifier, PlainNet]:
    torch.manual_seed(seed)
    ours, plain = network(CLASSES), PlainNet()
    plain.load_state_dict(model_weights(ours))
    return ours, plain


def official_args(**changes) -> argparse.Namespace:
    args = train.parse_args(["--train", "--dataset", "folder", "--preset", "official", "--random_seed", str(SEED)])
    vars(args).update(changes)
    args.joint_weights, args.alone_weights = train.loss_weights(args, BOTH)
    return args


def our_loss(output, labels, args) -> torch.Tensor:
    weights = args.joint_weights if len(output.logits) > 1 else args.alone_weights
    return sum(train.loss_terms(train.cross_entropies(output, labels), weights).values())


def test_partition_from_the_same_weights(clips):
    ours, plain = twins()
    # trained a little first: at initialisation both heads are equally unsure
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-3) for net in (ours, plain)]
    train.train_epoch(ours, clips, remix.batches_of(26, 13, BOTH, None), optimizers[0], 0, official_args())
    plain.load_state_dict(model_weights(ours))
    logits = predict(ours, clips, BOTH, 7, "score")
    kept = remix.decouple(remix.difficulty([logits["audio"], logits["video"]])).tolist()
    assert kept == plain_partition(plain, clips)
    assert 0 < sum(audio for audio, _ in kept) < 26  # both modalities occur


@pytest.mark.parametrize("fed", [BOTH, AUDIO, VIDEO])
@pytest.mark.parametrize("masked_encoder", ["run", "skip"])
def test_loss_and_gradients_on_the_same_batch(clips, fed, masked_encoder):
    ours, plain = (net.train() for net in twins())
    (full,) = clips.epoch([remix.Batch(torch.arange(10), BOTH)])
    (batch,) = clips.epoch([remix.Batch(torch.arange(10), fed)], load_masked=masked_encoder == "run")
    loss = our_loss(ours(batch.inputs, fed), batch.labels, official_args())
    expected = plain_loss(plain, *full.inputs.values(), full.labels, fed)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    theirs = dict(plain.named_parameters())
    assert len(theirs) == len(list(ours.parameters()))
    for inside, p in ours.named_parameters():
        name = official_name(inside)
        q = theirs[name]
        masked = fed != BOTH and name.startswith({AUDIO: "visual_net", VIDEO: "audio_net"}[fed])
        if masked and masked_encoder == "skip":
            assert p.grad is None and torch.all(q.grad == 0), name
        elif q.grad is None:  # the masked modality's own head
            assert p.grad is None, name
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("fed", [BOTH, AUDIO, VIDEO])
def test_each_loss_weight_acts_in_its_own_batches(clips, fed):
    ours, plain = (net.train() for net in twins())
    weights = {"alpha": 0.3, "beta": 0.7, "gamma1": 1.9, "gamma2": 2.3}
    (full,) = clips.epoch([remix.Batch(torch.arange(10), BOTH)])
    output = ours({name: full.inputs[name] for name in fed}, fed)
    expected = plain_loss(plain, *full.inputs.values(), full.labels, fed, tuple(weights.values()))
    assert our_loss(output, full.labels, official_args(**weights)).item() == pytest.approx(expected.item(), abs=1e-5)


def test_encoder_lr_decay_scales_the_encoders_rate_alone():
    net = network(CLASSES)
    optimizer = train.make_optimizer(net, official_args(encoder_lr_decay=0.25, learning_rate=1e-2))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in net.named_parameters():
        assert rates[id(parameter)] == (2.5e-3 if name.startswith("encoders.") else 1e-2), name


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("fed", [AUDIO, VIDEO])
def test_skip_leaves_the_masked_encoder_untouched_and_run_does_not(clips, fed, optimizer):
    masked = f"encoders.{'video' if fed == AUDIO else 'audio'}"

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
        net = network(CLASSES)
        optim = train.make_optimizer(net, args)
        train.train_epoch(net, clips, remix.batches_of(26, 13, BOTH, None), optim, 0, args)  # fills the momenta
        before = masked_state(net, optim)
        assert len(before) > 150
        train.train_epoch(net, clips, [remix.Batch(torch.arange(9), fed)], optim, 1, args)
        after = masked_state(net, optim)
        same = [torch.equal(before[name], after[name]) for name in before]
        if masked_encoder == "skip":
            assert all(same)
        else:  # the official side effects: statistics move, momentum and weight decay step
            assert not torch.equal(before[f"{masked}.bn1.running_mean"], after[f"{masked}.bn1.running_mean"])
            assert not torch.equal(before[f"{masked}.conv1.weight"], after[f"{masked}.conv1.weight"])
