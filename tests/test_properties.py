"""Properties that hold for any input: the three steps of Remix, the segment rule, parsers of lists, flags, methods."""

import csv
import tempfile
from argparse import ArgumentTypeError
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import balance
import remix
from dataset.augment import draw_views
from dataset.lists import MAX_CLIP_BYTES, check_clip_id, read_classes, scan_clips
from utils.cli import id_list, number, path_name
from utils.errors import UserError

settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("quick")

SHAPES = arrays.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=12)
LOGITS = arrays.arrays(np.float64, SHAPES, elements=st.floats(-50, 50, width=32))
NAMES = ("audio", "video", "text", "depth", "flow", "touch")
MODALITIES = st.sampled_from([2, 3, 6])
PARTITIONS = MODALITIES.flatmap(  # a clip may keep none: under no `keep` of ours, but a partition may be anyone's
    lambda m: arrays.arrays(np.bool_, st.tuples(st.integers(1, 60), st.just(m)))
)


def slow_divergence(logits: np.ndarray) -> np.ndarray:
    """KL from uniform in bits of softmax(logits), clipped, in float64; (N, C) -> (N,)."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p = np.clip(p / p.sum(1, keepdims=True), 1e-9, 1)
    return (p * np.log2(p * logits.shape[1])).sum(1)


@given(LOGITS)
def test_difficulty_is_the_divergence_from_uniform(logits):
    scores = remix.kl_from_uniform(torch.from_numpy(logits)).numpy()
    np.testing.assert_allclose(scores, slow_divergence(logits), atol=1e-6)
    assert (scores > -1e-6).all() and (scores < np.log2(logits.shape[1]) + 1e-6).all()


@given(LOGITS, st.floats(-20, 20), st.randoms(use_true_random=False))
def test_difficulty_knows_neither_the_classes_order_nor_a_shift(logits, shift, random):
    order = list(range(logits.shape[1]))
    random.shuffle(order)
    scores, other = (remix.kl_from_uniform(torch.from_numpy(x)) for x in (logits, logits[:, order] + shift))
    assert torch.allclose(scores, other, atol=1e-6)


@given(MODALITIES.flatmap(lambda m: st.lists(LOGITS, min_size=m, max_size=m)))
def test_scoring_and_decoupling_are_a_slow_argmin_over_the_columns(logits):
    clips, classes = (min(x.shape[axis] for x in logits) for axis in (0, 1))
    logits = [x[:clips, :classes] for x in logits]
    slow = np.stack([slow_divergence(x) for x in logits], axis=1)
    scores = remix.difficulty([torch.from_numpy(x) for x in logits])
    np.testing.assert_allclose(scores.numpy(), slow, atol=1e-6)
    kept = remix.decouple(scores)
    lowest = slow.min(1, keepdims=True)
    assert (kept.sum(1) == 1).all() and (slow[kept.numpy()] <= lowest[:, 0] + 1e-6).all()
    second = np.sort(slow, axis=1)[:, 1:2]
    clear = (second - lowest > 1e-6)[:, 0]  # elsewhere rounding may decide
    assert np.array_equal(kept.numpy().argmax(1)[clear], slow.argmin(1)[clear])


FEW = st.sampled_from([0, 0.5, 1, 2.25, -3])  # so that there are ties


@given(MODALITIES.flatmap(lambda m: arrays.arrays(np.float32, st.tuples(st.integers(1, 30), st.just(m)), elements=FEW)))
def test_decouple_keeps_the_lower_and_the_last_at_a_tie(scores):
    kept = {name: remix.decouple(torch.from_numpy(scores), name).tolist() for name in remix.KEEP}
    m = scores.shape[1]
    for i, row in enumerate(scores):
        hard, easy = (m - 1 - int(np.argmin(values[::-1])) for values in (row, -row))  # argmin takes the first
        assert kept["hard"][i] == [own == hard for own in range(m)]
        assert kept["easy"][i] == [own == easy for own in range(m)]
        assert kept["all"][i] == [True] * m


@given(PARTITIONS, st.integers(1, 9), st.sampled_from(remix.ORDERS), st.integers(0, 99))
def test_reassemble_feeds_every_clip_as_often_as_it_keeps(kept, size, order, seed):
    names = NAMES[: kept.shape[1]]
    plan = remix.reassemble(torch.from_numpy(kept), names, size, order, torch.Generator().manual_seed(seed))
    assert all(len(batch.fed) == 1 for batch in plan)
    pairs = sorted((int(i), name) for batch in plan for i in batch.clips for name in batch.fed)
    assert pairs == sorted((i, names[m]) for i, m in np.argwhere(kept).tolist())
    for name in names:
        sizes = [len(batch.clips) for batch in plan if batch.fed == (name,)]
        assert all(1 <= n <= size for n in sizes) and sum(n < size for n in sizes) <= 1
    order_of = [names.index(batch.fed[0]) for batch in plan]
    if order == "sequential":
        assert order_of == sorted(order_of, reverse=True)
    if order == "alternate":  # the i-th of n batches stands where (i + 1/2) / n of the epoch is
        n = {m: order_of.count(m) for m in set(order_of)}
        due = sorted(((i + 0.5) / n[m], -m) for m in n for i in range(n[m]))
        assert order_of == [-m for _, m in due]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 10), st.integers(0, 99))
def test_frames_are_picked_by_the_segment_rule(counts, picks, seed):
    sizes = torch.full((len(counts), 2), 16)
    drawn = draw_views(torch.tensor(counts), sizes, picks, torch.Generator().manual_seed(seed), (0.5, 1.0), True).picks
    fixed = draw_views(torch.tensor(counts), sizes, picks, None, (0.5, 1.0), True).picks
    assert drawn.shape == fixed.shape == (len(counts), picks)
    for n, random_row, fixed_row in zip(counts, drawn.tolist(), fixed.tolist(), strict=True):
        segment = n // picks
        for i, (drawn_pick, fixed_pick) in enumerate(zip(random_row, fixed_row, strict=True)):
            assert 0 <= drawn_pick < n and 0 <= fixed_pick < n
            if segment:
                assert i * segment <= drawn_pick <= (i + 1) * segment - 1
                assert fixed_pick == min(i * segment + segment // 2, n - 1)


ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=300)
CLIP = st.from_regex(r"[A-Za-z0-9_\-]{1,40}", fullmatch=True)
CLASSES = st.lists(st.from_regex(r"[A-Za-z]{1,8}( [a-z]{1,5})?", fullmatch=True), min_size=1, max_size=8, unique=True)


@given(ANY_TEXT)
def test_a_clip_id_that_is_taken_stays_in_the_folder(text):
    try:
        check_clip_id(text)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        path = Path("/data/visual") / text
        assert path.parent == Path("/data/visual") and path.name == text and "\0" not in text
        assert len(text.encode()) <= MAX_CLIP_BYTES


@settings(max_examples=20)  # two files each
@given(CLASSES, st.lists(st.tuples(CLIP, st.integers(0, 7)), max_size=20), st.booleans(), st.booleans(), st.booleans())
def test_lists_are_read_as_they_were_written(classes, rows, bom, crlf, quotes):
    rows = [(clip, classes[i % len(classes)]) for clip, i in dict(rows).items()]
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (("train", rows), ("stat", [(name,) for name in classes])):
            with open(Path(folder, f"{name}.csv"), "w", newline="", encoding="utf-8-sig" if bom else "utf-8") as file:
                end, quoting = "\r\n" if crlf else "\n", csv.QUOTE_ALL if quotes else csv.QUOTE_MINIMAL
                csv.writer(file, lineterminator=end, quoting=quoting).writerows(content)
        found = read_classes(Path(folder, "stat.csv"))
        assert found == sorted(classes)
        assert scan_clips(Path(folder, "train.csv"), found) == (rows, [])


@given(st.binary(max_size=200))
def test_any_bytes_are_a_list_or_one_line(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.csv")
        path.write_bytes(content)
        try:
            rows, faults = scan_clips(path, ["a", "b"])
        except UserError as error:
            assert "\n" not in str(error).replace(folder, "")
        else:
            assert len({clip for clip, _ in rows}) == len(rows) and all(label in ("a", "b") for _, label in rows)
            assert all("\n" not in fault.reason for fault in faults)


@given(st.one_of(ANY_TEXT, st.integers(-5, 10**12).map(str), st.floats().map(str)))
def test_flags_take_a_value_in_range_or_refuse(text):
    for kind in (int, float):
        try:
            value = number(kind, 1, 1000)(text)
        except ArgumentTypeError:
            continue
        assert isinstance(value, kind) and 1 <= value <= 1000
    for parse in (id_list, path_name):
        try:
            value = parse(text)
        except ArgumentTypeError:
            continue
        if parse is id_list:
            assert len({int(part) for part in value.split(",")}) == len(value.split(","))


OPTIONS = {name: [option.name for option in method.options] for name, method in balance.METHODS.items()}
PAIRS = st.sampled_from([(name, option) for name, options in OPTIONS.items() for option in options])


@given(st.lists(st.tuples(PAIRS, st.from_regex(r"[0-9a-z./-]{0,6}", fullmatch=True)), max_size=8), st.randoms())
def test_methods_are_parsed_from_any_order_into_theirs(given, random):
    expected: dict[str, dict] = {}
    for (name, option), value in given:
        expected.setdefault(name, {})[option] = value  # the last of one option counts
    typed = [
        ":".join([name, *(f"{option}={value}" for option, value in own.items())]) for name, own in expected.items()
    ]
    random.shuffle(typed)
    found = balance.parse(random.choice(",+").join(typed) or "none")
    assert found == expected and list(found) == [name for name in balance.METHODS if name in expected]


@given(st.one_of(ANY_TEXT, st.text("agmopr_:=,+.10none", max_size=20)))
def test_any_text_is_methods_or_one_line(text):
    try:
        found = balance.parse(text)
    except UserError as error:
        assert str(error).startswith("--balance ") and str(error).count("\n") <= text.count("\n")
    else:
        assert all(name in OPTIONS and set(own) <= set(OPTIONS[name]) for name, own in found.items())
