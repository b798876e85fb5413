"""difficulty -> decouple -> reassemble against SciPy and plain loops."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

import remix


def logits(min_clips: int = 1):
    shapes = st.tuples(st.integers(min_clips, 20), st.sampled_from([2, 6, 31, 309]))
    return shapes.flatmap(
        lambda shape: st.integers(0, 2**32 - 1).map(
            lambda seed: torch.from_numpy(np.random.default_rng(seed).normal(0, 5, shape).astype(np.float32))
        )
    )


@given(logits())
def test_kl_equals_scipy(x):
    p = scipy.special.softmax(x.double().numpy(), axis=1).clip(1e-9, 1)
    uniform = np.full(x.shape[1], 1 / x.shape[1])
    # entropy() normalises its arguments; the clipped p sums to 1 within C * 1e-9, which the tolerance covers
    expected = [scipy.stats.entropy(row, uniform, base=2) for row in p]
    np.testing.assert_allclose(remix.kl_from_uniform(x).numpy(), expected, atol=2e-5)


def test_kl_bounds_and_clipping():
    certain = torch.tensor([[1000.0, 0, 0, 0]])
    flat = torch.zeros(1, 4)
    assert remix.kl_from_uniform(flat).item() == pytest.approx(0, abs=1e-6)
    # 1 * log2(1 / (1/4)) + 3 * 1e-9 * log2(1e-9 * 4), by hand
    assert remix.kl_from_uniform(certain.double()).item() == pytest.approx(2 + 3e-9 * np.log2(4e-9), abs=1e-12)
    assert torch.isfinite(remix.kl_from_uniform(torch.full((1, 309), -1e4).index_fill(1, torch.tensor([3]), 1e4))).all()


def test_half_precision_logits_are_scored_in_float32():
    x = torch.randn(50, 6)
    torch.testing.assert_close(remix.kl_from_uniform(x.bfloat16()), remix.kl_from_uniform(x.bfloat16().float()))


def test_difficulty_columns_are_audio_then_video():
    audio, video = torch.randn(7, 6), torch.randn(7, 6)
    both = remix.difficulty(audio, video)
    torch.testing.assert_close(both[:, 0], remix.kl_from_uniform(audio))
    torch.testing.assert_close(both[:, 1], remix.kl_from_uniform(video))


def test_loss_score_is_low_where_the_head_is_wrong():
    labels = torch.tensor([0, 1])
    audio = torch.tensor([[5.0, 0], [5, 0]])  # right, wrong
    video = torch.tensor([[0.0, 5], [0, 5]])  # wrong, right
    values = remix.difficulty(audio, video, "loss", labels)
    expected = -np.log1p(np.exp([[-5.0, 5.0], [5.0, -5.0]]))
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-5)
    assert remix.decouple(values).tolist() == [remix.VIDEO, remix.AUDIO]


def test_random_score_needs_no_logits_and_repeats_with_its_generator():
    x = torch.zeros(4000, 3)
    first, second = (remix.difficulty(x, x, "random", generator=torch.Generator().manual_seed(s)) for s in (1, 1))
    assert torch.equal(first, second)
    share = (remix.decouple(first) == remix.AUDIO).float().mean().item()
    assert abs(share - 0.5) < 0.05  # 6 standard errors


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ("hard", [remix.AUDIO, remix.VIDEO, remix.VIDEO]),
        ("easy", [remix.VIDEO, remix.AUDIO, remix.VIDEO]),
        ("all", [remix.BOTH] * 3),
    ],
)
def test_decouple_keeps_the_lower_and_ties_keep_video(keep, expected):
    difficulty = torch.tensor([[0.1, 0.2], [0.2, 0.1], [0.3, 0.3]])
    assert remix.decouple(difficulty, keep).tolist() == expected


@given(logits(min_clips=2))
def test_decouple_equals_a_loop_over_clips(x):
    audio, video = x, x.flip(0)
    difficulty = remix.difficulty(audio, video)
    loop = [remix.AUDIO if a < v else remix.VIDEO for a, v in difficulty.tolist()]
    assert remix.decouple(difficulty).tolist() == loop


@given(
    kept=st.lists(st.sampled_from([remix.AUDIO, remix.VIDEO, remix.BOTH]), min_size=1, max_size=200),
    batch_size=st.integers(1, 70),
    order=st.sampled_from(remix.ORDERS),
    seed=st.integers(0, 10),
)
def test_every_clip_once_per_modality_it_keeps_and_no_mixed_batch(kept, batch_size, order, seed):
    plan = remix.reassemble(torch.tensor(kept), batch_size, order, torch.Generator().manual_seed(seed))
    fed = {"audio": [], "video": []}
    for batch in plan:
        assert 1 <= len(batch.clips) <= batch_size
        fed[batch.kept] += batch.clips.tolist()
    for code, name in ((remix.AUDIO, "audio"), (remix.VIDEO, "video")):
        assert sorted(fed[name]) == [i for i, m in enumerate(kept) if m in (code, remix.BOTH)]
    for code, name in ((remix.AUDIO, "audio"), (remix.VIDEO, "video")):
        sizes = [len(batch.clips) for batch in plan if batch.kept == name]
        members = sum(m in (code, remix.BOTH) for m in kept)
        assert len(sizes) == -(-members // batch_size)


def test_orders():
    kept = torch.tensor([remix.VIDEO] * 40 + [remix.AUDIO] * 20)

    def sequence(order, seed=0):
        return [batch.kept[0] for batch in remix.reassemble(kept, 5, order, torch.Generator().manual_seed(seed))]

    assert "".join(sequence("sequential")) == "v" * 8 + "a" * 4
    assert "".join(sequence("alternate")) == "vavvavvavvav"
    assert sorted(sequence("shuffled")) == ["a"] * 4 + ["v"] * 8
    assert len({tuple(sequence("shuffled", seed)) for seed in range(5)}) > 1


def test_an_empty_modality_leaves_the_other_one_whole():
    plan = remix.reassemble(torch.tensor([remix.AUDIO] * 9), 4, generator=torch.Generator().manual_seed(0))
    assert [(len(batch.clips), batch.kept) for batch in plan] == [(4, "audio"), (4, "audio"), (1, "audio")]
    assert remix.batches_of(0, 4, "both", None) == []


def test_clips_are_shuffled_within_a_modality_and_alike_for_one_seed():
    kept = torch.zeros(100, dtype=torch.long)
    orders = [
        torch.cat([batch.clips for batch in remix.reassemble(kept, 10, generator=torch.Generator().manual_seed(s))])
        for s in (0, 0, 1)
    ]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], torch.arange(100))


@pytest.mark.parametrize("call", [
    lambda: remix.difficulty(torch.zeros(1, 2), torch.zeros(1, 2), "entropy"),
    lambda: remix.decouple(torch.zeros(1, 2), "soft"),
    lambda: remix.reassemble(torch.zeros(1, dtype=torch.long), 2, "random"),
])  # fmt: skip
def test_unknown_names_say_what_is_allowed(call):
    with pytest.raises(ValueError, match="allowed are"):
        call()
