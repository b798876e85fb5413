"""difficulty -> decouple -> reassemble for any number of modalities, against SciPy and plain loops."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

import remix

NAMES = ("audio", "video", "text", "depth", "flow", "touch")


def logits(min_clips: int = 1):
    shapes = st.tuples(st.integers(min_clips, 20), st.sampled_from([2, 6, 31, 309]))
    return shapes.flatmap(
        lambda shape: st.integers(0, 2**32 - 1).map(
            lambda seed: torch.from_numpy(np.random.default_rng(seed).normal(0, 5, shape).astype(np.float32))
        )
    )


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


@pytest.mark.parametrize("classes", [6, 31])
def test_certain_clips_are_told_apart_by_a_sum_in_float64(classes):
    """Margins up to 30: probabilities in float32, as the official code has them, and their sum in float64."""
    rng = np.random.default_rng(classes)
    columns = []
    for _ in range(2):
        x = rng.normal(0, 0.5, (2000, classes))
        x[np.arange(2000), rng.integers(0, classes, 2000)] += rng.uniform(12, 30, 2000)
        columns.append(torch.from_numpy(x.astype(np.float32)))
    uniform, exact, short = np.full(classes, 1 / classes), [], []
    for x in columns:
        p = x.softmax(1).double().numpy().clip(1e-9, 1)
        # entropy() is of p / S, S the sum: sum p log2(C p) = S (entropy + log2 S).
        total = p.sum(1)
        exact.append(total * (scipy.stats.entropy(p, uniform[None], base=2, axis=1) + np.log2(total)))
        single = x.softmax(1).clamp(1e-9, 1.0)
        short.append((single * (single.log2() + math.log2(classes))).sum(1))
        found = remix.kl_from_uniform(x)
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), exact[-1], rtol=0, atol=1e-13)
        assert np.abs(short[-1].double().numpy() - exact[-1]).max() > 1e-8
    kept = remix.decouple(remix.difficulty(columns))[:, 0].numpy()
    differs = (exact[0] < exact[1]) != (short[0] < short[1]).numpy()
    apart = np.abs(exact[0] - exact[1]) > 1e-13  # SciPy adds up in another order
    assert np.array_equal(kept[apart], (exact[0] < exact[1])[apart])
    assert (differs & apart).sum() > 20, "a float32 sum would choose the other modality"


def test_half_precision_logits_are_scored_in_float32():
    x = torch.randn(50, 6)
    torch.testing.assert_close(remix.kl_from_uniform(x.bfloat16()), remix.kl_from_uniform(x.bfloat16().float()))


@pytest.mark.parametrize("modalities", [2, 3, 6])
def test_difficulty_has_a_column_for_each_modality_in_order(modalities):
    unimodal = [torch.randn(7, 6) for _ in range(modalities)]
    columns = remix.difficulty(unimodal)
    assert columns.shape == (7, modalities)
    for m, values in enumerate(unimodal):
        torch.testing.assert_close(columns[:, m], remix.kl_from_uniform(values), rtol=0, atol=0)


def test_loss_score_is_low_where_the_head_is_wrong():
    labels = torch.tensor([0, 1])
    audio = torch.tensor([[5.0, 0], [5, 0]])  # right, wrong
    video = torch.tensor([[0.0, 5], [0, 5]])  # wrong, right
    values = remix.difficulty([audio, video], "loss", labels)
    expected = -np.log1p(np.exp([[-5.0, 5.0], [5.0, -5.0]]))
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-5)
    assert remix.decouple(values).tolist() == [[False, True], [True, False]]
    with pytest.raises(ValueError, match="needs labels"):
        remix.difficulty([audio, video], "loss")


@pytest.mark.parametrize("modalities", [2, 3, 6])
def test_random_score_needs_no_logits_and_repeats_with_its_generator(modalities):
    x = [torch.zeros(4000, 3)] * modalities
    first, second, other = (remix.difficulty(x, "random", generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    shares = remix.decouple(first).double().mean(dim=0).tolist()
    assert max(abs(share - 1 / modalities) for share in shares) < 0.05  # 6 standard errors


# ----------------------------------------------------------------------------------------------------------- decouple


def slow_keep(difficulty: np.ndarray, keep: str) -> list[list[bool]]:
    """Clip by clip over any number of columns; of equal ones the last."""
    found = []
    for row in difficulty.tolist():
        best = 0
        for m, value in enumerate(row):
            if (value <= row[best]) if keep == "hard" else (value >= row[best]):
                best = m
        found.append([keep == "all" or m == best for m in range(len(row))])
    return found


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ("hard", [[True, False], [False, True], [False, True]]),
        ("easy", [[False, True], [True, False], [False, True]]),
        ("all", [[True, True]] * 3),
    ],
)
def test_decouple_keeps_the_lower_and_ties_keep_video(keep, expected):
    difficulty = torch.tensor([[0.1, 0.2], [0.2, 0.1], [0.3, 0.3]])
    assert remix.decouple(difficulty, keep).tolist() == expected


@pytest.mark.parametrize(
    ("row", "hard", "easy"),
    [
        ([0.3, 0.1, 0.2], 1, 0),
        ([0.1, 0.1, 0.2], 1, 2),  # two are equally hard: the later one
        ([0.1, 0.2, 0.1], 2, 1),
        ([0.4, 0.4, 0.4], 2, 2),
        ([0.1, 0.2, 0.2], 0, 2),
        ([5.0, 4.0, 3.0, 2.0, 1.0, 0.0], 5, 0),
        ([0.0, 7.0, 0.0, 7.0, 0.0, 3.0], 4, 3),
        ([1.0] * 6, 5, 5),
    ],
)
def test_decouple_of_three_and_of_six_modalities(row, hard, easy):
    difficulty = torch.tensor([row])
    assert remix.decouple(difficulty, "hard")[0].nonzero().flatten().tolist() == [hard]
    assert remix.decouple(difficulty, "easy")[0].nonzero().flatten().tolist() == [easy]
    assert remix.decouple(difficulty, "all").all() and slow_keep(difficulty.numpy(), "hard")[0].index(True) == hard


@given(logits(min_clips=6), st.sampled_from([2, 3, 6]), st.sampled_from(remix.KEEP))
def test_decouple_equals_a_loop_over_clips(x, modalities, keep):
    difficulty = remix.difficulty([x.roll(m, 0) for m in range(modalities)])
    assert remix.decouple(difficulty, keep).tolist() == slow_keep(difficulty.numpy(), keep)


# --------------------------------------------------------------------------------------------------------- reassemble


def partitions():
    """(N, M) bool: clips keep one modality, some, all or none of M."""
    return st.sampled_from([2, 3, 6]).flatmap(
        lambda m: st.lists(st.lists(st.booleans(), min_size=m, max_size=m), min_size=1, max_size=120)
    )


@given(kept=partitions(), batch_size=st.integers(1, 70), order=st.sampled_from(remix.ORDERS), seed=st.integers(0, 10))
def test_every_clip_once_per_modality_it_keeps_and_no_mixed_batch(kept, batch_size, order, seed):
    names = NAMES[: len(kept[0])]
    plan = remix.reassemble(torch.tensor(kept), names, batch_size, order, seeded(seed))
    fed, sizes = {name: [] for name in names}, {name: [] for name in names}
    for batch in plan:
        assert 1 <= len(batch.clips) <= batch_size and len(batch.fed) == 1
        fed[batch.fed[0]] += batch.clips.tolist()
        sizes[batch.fed[0]].append(len(batch.clips))
    for m, name in enumerate(names):
        members = [i for i, row in enumerate(kept) if row[m]]
        assert sorted(fed[name]) == members
        assert len(sizes[name]) == -(-len(members) // batch_size)


def test_orders():
    kept = torch.tensor([[False, True]] * 40 + [[True, False]] * 20)

    def sequence(order, seed=0):
        return [batch.fed[0][0] for batch in remix.reassemble(kept, NAMES[:2], 5, order, seeded(seed))]

    assert "".join(sequence("sequential")) == "v" * 8 + "a" * 4
    assert "".join(sequence("alternate")) == "vavvavvavvav"
    assert sorted(sequence("shuffled")) == ["a"] * 4 + ["v"] * 8
    assert len({tuple(sequence("shuffled", seed)) for seed in range(5)}) > 1


def sequence_of(counts: tuple[int, ...], order: str, seed: int = 0) -> str:
    """Which modality each batch feeds, by its first letter, where modality m has counts[m] batches of five clips."""
    rows = [[m == own for m in range(len(counts))] for own, n in enumerate(counts) for _ in range(5 * n)]
    plan = remix.reassemble(torch.tensor(rows), "abcdef"[: len(counts)], 5, order, seeded(seed))
    return "".join(name for batch in plan for name in batch.fed)


def test_orders_of_three_and_of_six_modalities():
    assert sequence_of((2, 1, 3), "sequential") == "cccbaa"
    assert sequence_of((1, 2, 0, 1, 3, 1), "sequential") == "feeedbba"
    assert sequence_of((2, 2, 2), "alternate") == "cbacba"  # a tie begins with the last
    assert sequence_of((2, 1, 4), "alternate") == "cacbcac"
    assert sequence_of((1, 1, 1, 1, 1, 1), "alternate") == "fedcba"
    assert sequence_of((1, 2, 4), "alternate") == "cbcacbc"
    assert sorted(sequence_of((2, 1, 3), "shuffled")) == sorted("aabccc")
    assert len({sequence_of((2, 1, 3), "shuffled", seed) for seed in range(9)}) > 1


def slow_alternate(counts: tuple[int, ...]) -> str:
    """At each point of the epoch the modality whose next batch is due first; of equally due ones the last."""
    done, found = [0] * len(counts), ""
    while sum(done) < sum(counts):
        due = [((2 * done[m] + 1) / (2 * n), -m) for m, n in enumerate(counts) if done[m] < n]
        m = -min(due)[1]
        found += "abcdef"[m]
        done[m] += 1
    return found


@given(st.sampled_from([2, 3, 6]).flatmap(lambda m: st.tuples(*[st.integers(0, 12)] * m)).filter(any))
def test_alternate_spreads_every_modality_evenly(counts):
    found = sequence_of(counts, "alternate")
    assert found == slow_alternate(counts)
    total = len(found)
    for m, n in enumerate(counts):
        for end in range(total + 1):  # in every beginning of the epoch, its share but for one batch per modality
            assert abs(found[:end].count("abcdef"[m]) - n * end / total) < len(counts)


def test_an_empty_modality_leaves_the_other_ones_whole():
    plan = remix.reassemble(torch.tensor([[True, False]] * 9), NAMES[:2], 4, generator=seeded(0))
    assert [(len(batch.clips), batch.fed) for batch in plan] == [(4, ("audio",)), (4, ("audio",)), (1, ("audio",))]
    assert remix.batches_of(0, 4, NAMES[:2], None) == []
    for order in remix.ORDERS:
        plan = remix.reassemble(torch.tensor([[True, False, False]] * 5 + [[False, False, True]]), NAMES[:3], 4, order,
                                seeded(0))  # fmt: skip
        assert sorted(batch.fed for batch in plan) == [("audio",), ("audio",), ("text",)]


def test_clips_are_shuffled_within_a_modality_and_alike_for_one_seed():
    kept = torch.tensor([[True, False, False]] * 100)
    orders = [
        torch.cat([batch.clips for batch in remix.reassemble(kept, NAMES[:3], 10, generator=seeded(s))])
        for s in (0, 0, 1)
    ]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], torch.arange(100))


@pytest.mark.parametrize("call", [
    lambda: remix.difficulty([torch.zeros(1, 2)] * 2, "entropy"),
    lambda: remix.decouple(torch.zeros(1, 2), "soft"),
    lambda: remix.reassemble(torch.zeros(1, 2, dtype=torch.bool), NAMES[:2], 2, "random"),
])  # fmt: skip
def test_unknown_names_say_what_is_allowed(call):
    with pytest.raises(ValueError, match="allowed are"):
        call()
