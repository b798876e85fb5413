"""Greedy against a slow version: the rule recomputed from the gradients of a network that this file steps itself."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers import make_folder
from networks import network
from test_balance import BATCH, BOTH, CLASSES, Trained, flags_of

import remix
import train
from dataset.clips import Feed, make_clips
from dataset.folder import load_folder
from dataset.specs import get_spec
from utils.errors import UserError
from utils.seeding import epoch_generator

STAGES = ("layer2", "layer3", "layer4")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = load_folder(make_folder(tmp_path_factory.mktemp("data"), train=32, test=6), get_spec("folder"))
    feed = Feed(folder.spec.modalities, 32, torch.device("cpu"), "ram")
    return {"train": make_clips(folder.root, "train", folder.parts["train"], folder.shapes, feed)}


class InDouble:
    """The clips in float64: in float32, gradients near zero follow the rounding of the processor."""

    def __init__(self, clips):
        self.clips = clips

    def __getattr__(self, name: str):
        return getattr(self.clips, name)

    def epoch(self, *arguments):
        for batch in self.clips.epoch(*arguments):
            yield batch._replace(inputs={name: x.double() for name, x in batch.inputs.items()})


def trained(clips, text: str, dtype: torch.dtype = torch.float32) -> Trained:
    return Trained(clips, f"--model mmtm --batch_size 4 {text}", dtype)


def epoch(t: Trained, number: int, fed=BOTH) -> Trained:
    plan = remix.batches_of(32, 4, fed, epoch_generator(42, number, "plan"))
    t.balance.start_epoch(number)
    t.numbers = train.train_epoch(t.net, t.clips["train"], plan, t.optimizer, number, t.args, t.balance)
    return t


def parameters(t: Trained) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in t.net.named_parameters()}


def mu(net, prefixes: tuple[str, ...]) -> float:
    own = [(p.grad, p) for name, p in net.named_parameters() if name.startswith(prefixes)]
    g, theta = (sum(float(x.detach().double().square().sum()) for x in column) for column in zip(*own, strict=True))
    return g / theta


class Slow:
    """The rule step by step. `asked` is what each step replaced, "" a regular one."""

    def __init__(self, clips, alpha: float, steps: int):
        torch.manual_seed(0)
        self.net = network(CLASSES, model="mmtm").double()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        self.alpha, self.steps, self.clips = alpha, steps, clips["train"]
        self.sums, self.asked, self.wanted = {}, [], []
        self.gates = {(stage, name): [] for stage in STAGES for name in BOTH}  # of regular steps

    def hook(self, stage: str, replaced: str):
        def gated(module, given, out):
            for name in BOTH:
                if not replaced:
                    self.gates[stage, name].append(out[name].detach())
            if replaced:
                mean = torch.cat(self.gates[stage, replaced]).mean(0)
                return out | {replaced: mean.expand_as(out[replaced])}
            return out

        return gated

    def epoch(self, number: int, warmup: int) -> None:
        plan = remix.batches_of(32, 4, BOTH, epoch_generator(42, number, "plan"))
        for batch in self.clips.epoch(plan, epoch_generator(42, number, "views")):
            replaced = self.wanted.pop(0) if self.wanted else ""
            self.asked.append(replaced)
            hooks = [self.net.mmtm[stage].register_forward_hook(self.hook(stage, replaced)) for stage in STAGES]
            self.net.train()
            output = self.net(batch.inputs, BOTH)
            [hook.remove() for hook in hooks]
            self.optimizer.zero_grad()
            entropy = torch.nn.functional.cross_entropy
            joint, audio, video = (entropy(logits, batch.labels) for logits in output.heads.values())
            (joint + 0.5 * audio + 0.5 * video).backward()
            if not replaced:
                for name in BOTH:
                    squeezes = tuple(f"mmtm.{stage}.squeeze" for stage in STAGES)
                    bypass = squeezes + tuple(f"mmtm.{stage}.gates.{name}" for stage in STAGES)
                    main = (f"encoders.{name}", f"heads.{name}")
                    for kind, prefixes in (("bypass", bypass), ("main", main)):
                        self.sums[name, kind] = self.sums.get((name, kind), 0) + mu(self.net, prefixes)
                s = {name: math.log10(self.sums[name, "bypass"] / self.sums[name, "main"]) for name in BOTH}
                self.difference = s["audio"] - s["video"]
                if number >= warmup and abs(self.difference) > self.alpha:
                    self.wanted = [max(s, key=s.get)] * self.steps
            self.optimizer.step()


def test_greedy_is_its_rule(clips):
    clips = {"train": InDouble(clips["train"])}
    ours = trained(clips, "--balance greedy:alpha=0.0001:steps=3", torch.float64)
    slow = Slow(clips, 0.0001, 3)
    replaced = []
    (method,) = ours.balance.methods
    outputs = method.outputs
    method.outputs = lambda output, step: replaced.append(method.name_of(method.replaced)) or outputs(output, step)
    for number in (0, 1):
        epoch(ours, number)
        slow.epoch(number, warmup=1)
    assert replaced == slow.asked
    # a warm-up epoch of 8 steps, one regular step, then exactly 3 re-balancing steps between two regular ones
    assert [bool(name) for name in replaced] == [False] * 8 + [False, True, True, True] * 2
    assert ours.numbers["balance/greedy_d"] != 0 and slow.difference * (1 if replaced[-1] == "audio" else -1) > 0
    found, expected = ours.net.state_dict(), slow.net.state_dict()
    for name, value in expected.items():
        if "past_gates" not in name:
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)
    for stage in STAGES:
        for name in BOTH:
            mean = torch.cat(slow.gates[stage, name]).mean(0)
            torch.testing.assert_close(ours.net.mmtm[stage].mean_gate(name), mean, rtol=1e-3, atol=1e-5)
            assert ours.net.mmtm[stage].replace is None and not ours.net.mmtm[stage].record


@pytest.mark.parametrize(("speeds", "ahead"), [((3.0, 1.0), "audio"), ((1.0, 3.0), "video")])
def test_the_modality_that_learns_through_the_other_gets_the_mean_gate(speeds, ahead, clips):
    t = trained(clips, "--balance greedy:steps=2")
    (method,) = t.balance.methods
    t.batch()
    sums = torch.tensor([[1e9 * speeds[0], 1e9], [1e9 * speeds[1], 1e9]], dtype=torch.double)
    method.load_state_dict({"mu": sums, "left": 0, "ahead": ""})
    t.batch(index=1)
    assert (method.name_of(method.ahead), int(method.left)) == (ahead, 2)
    t.optimizer.step()
    for left in (1, 0):
        before = method.mu
        t.batch(index=2)
        assert (method.name_of(method.replaced), int(method.left)) == (ahead, left) and torch.equal(method.mu, before)
        other = next(name for name in BOTH if name != ahead)
        gates = t.net.mmtm["layer3"].gates
        assert not gates[ahead].weight.grad.any() and gates[other].weight.grad.any()
        weights = {name: gates[name].weight.detach().clone() for name in BOTH}
        states = [value.clone() for value in t.optimizer.state[gates[ahead].weight].values()]
        t.optimizer.step()  # does not move them, by momentum or weight decay either
        assert torch.equal(gates[ahead].weight, weights[ahead]) and not torch.equal(gates[other].weight, weights[other])
        assert all(map(torch.equal, states, t.optimizer.state[gates[ahead].weight].values()))
    t.batch(index=3)
    assert method.name_of(method.replaced) == ""


def test_neutral_settings_are_mmtm_bit_for_bit_in_joint_and_homogeneous_batches(clips):
    plain = trained(clips, "--warmup 2")
    neutral = trained(clips, "--warmup 2 --balance greedy:alpha=1e9")
    acting = trained(clips, "--warmup 2 --balance greedy:alpha=0")
    for t in (plain, neutral, acting):
        epoch(t, 0)
        epoch(t, 1)
    states = [parameters(t) for t in (plain, neutral, acting)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])
    (method,) = acting.balance.methods
    sums = method.mu.clone()
    method.load_state_dict({"mu": sums, "left": 3, "ahead": "audio"})
    plain.net.load_state_dict(acting.net.state_dict())
    plain.optimizer.load_state_dict(copy.deepcopy(acting.optimizer.state_dict()))
    for t in (plain, acting):
        epoch(t, 2, ("audio",))
    assert all(torch.equal(parameters(plain)[name], value) for name, value in parameters(acting).items())
    assert torch.equal(method.mu, sums) and method.left == 3, (
        "off in homogeneous batches: nothing counted, nothing done"
    )


def test_what_it_keeps_resumes_bit_for_bit(clips):
    """Between two re-balancing steps: 8 steps an epoch, 1 regular and 4 re-balancing ones in turn from epoch 1 on."""
    text = "--balance greedy:alpha=0:steps=4"
    whole, part, resumed = (trained(clips, text) for _ in range(3))
    for number in (0, 1, 2):
        epoch(whole, number)
    for number in (0, 1):
        epoch(part, number)
    assert part.balance.methods[0].state_dict()["left"] == 2
    resumed.net.load_state_dict(part.net.state_dict())
    resumed.optimizer.load_state_dict(part.optimizer.state_dict())
    resumed.balance.load_state_dict(part.balance.state_dict())
    epoch(resumed, 2)
    assert all(torch.equal(value, resumed.net.state_dict()[name]) for name, value in whole.net.state_dict().items())
    assert whole.numbers == resumed.numbers


def test_random_policy_takes_each_kind_of_step_a_third_of_the_time(clips):
    t = trained(clips, "--balance greedy:policy=random")
    (method,) = t.balance.methods
    kinds = []
    for index in range(300):
        step = train.Step(1 if index >= 10 else 0, index, None, True)
        method.before_forward(step)
        kinds.append(method.name_of(method.replaced))
    assert kinds[:10] == [""] * 10
    assert all(75 <= kinds[10:].count(kind) <= 120 for kind in ("", "audio", "video"))


def test_decay_forgets_old_speeds(clips):
    t = trained(clips, "--balance greedy:decay=0.5")
    (method,) = t.balance.methods
    method.mu = torch.full((2, 2), 8.0, dtype=torch.double)
    t.batch()
    fresh = [[mu(t.net, ("mmtm.layer2.squeeze", "mmtm.layer3.squeeze", "mmtm.layer4.squeeze",
                         *(f"mmtm.{stage}.gates.{name}" for stage in STAGES))),
              mu(t.net, (f"encoders.{name}", f"heads.{name}"))] for name in BOTH]  # fmt: skip
    np.testing.assert_allclose(method.mu, 4 + np.array(fresh), rtol=1e-5)


@pytest.mark.parametrize(("flags", "message"), [
    ("--balance greedy", "--balance greedy: acts on the gates between encoders; use --model mmtm"),
    ("--balance greedy:warmup=10 --model mmtm", r"--balance greedy: acts in joint batches from epoch 10 \(warmup=10\)"),
    ("--balance resample --model mmtm", "--balance resample: values .* masks nothing in --model mmtm"),
    ("--balance mla --model mmtm", "--balance mla: has a head of its own on separate encoders; leave --model"),
])  # fmt: skip
def test_mistakes_are_one_line(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        flags_of(flags)
    assert "\n" not in str(caught.value) and BATCH
