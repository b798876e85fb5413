"""Properties that hold for any input: the three steps of Remix, the segment rule, the parsers of lists and flags."""

import csv
import tempfile
from argparse import ArgumentTypeError
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import remix
from dataset.augment import draw_views
from dataset.lists import MAX_CLIP_BYTES, check_clip_id, read_classes, scan_clips
from utils.cli import id_list, interval, interval_of, number, path_name
from utils.errors import UserError

settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("quick")

SHAPES = arrays.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=12)
LOGITS = arrays.arrays(np.float64, SHAPES, elements=st.floats(-50, 50, width=32))
PARTITIONS = st.lists(st.sampled_from([remix.AUDIO, remix.VIDEO, remix.BOTH]), min_size=1, max_size=60)


@given(LOGITS)
def test_difficulty_is_the_divergence_from_uniform(logits):
    scores = remix.kl_from_uniform(torch.from_numpy(logits)).numpy()
    p = np.exp(logits - logits.max(1, keepdims=True))
    p = np.clip(p / p.sum(1, keepdims=True), 1e-9, 1)
    np.testing.assert_allclose(scores, (p * np.log2(p * logits.shape[1])).sum(1), atol=1e-6)
    assert (scores > -1e-6).all() and (scores < np.log2(logits.shape[1]) + 1e-6).all()


@given(LOGITS, st.floats(-20, 20), st.randoms(use_true_random=False))
def test_difficulty_knows_neither_the_classes_order_nor_a_shift(logits, shift, random):
    order = list(range(logits.shape[1]))
    random.shuffle(order)
    scores, other = (remix.kl_from_uniform(torch.from_numpy(x)) for x in (logits, logits[:, order] + shift))
    assert torch.allclose(scores, other, atol=1e-6)


@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 30), st.just(2)), elements=st.floats(0, 4, width=16)))
def test_decouple_keeps_the_lower_and_video_at_a_tie(scores):
    kept = {name: remix.decouple(torch.from_numpy(scores), name).tolist() for name in remix.KEEP}
    for row, (audio, video) in enumerate(scores.tolist()):
        assert kept["hard"][row] == (remix.AUDIO if audio < video else remix.VIDEO)
        assert kept["easy"][row] == (remix.AUDIO if audio > video else remix.VIDEO)
        assert kept["all"][row] == remix.BOTH


@given(PARTITIONS, st.integers(1, 9), st.sampled_from(remix.ORDERS), st.integers(0, 99))
def test_reassemble_feeds_every_clip_as_often_as_it_keeps(kept, size, order, seed):
    plan = remix.reassemble(torch.tensor(kept), size, order, torch.Generator().manual_seed(seed))
    fed = {
        name: sorted(i for batch in plan if batch.kept == name for i in batch.clips.tolist()) for name in remix.NAMES
    }
    assert fed["both"] == []
    for modality in (remix.AUDIO, remix.VIDEO):
        assert fed[remix.NAMES[modality]] == [i for i, m in enumerate(kept) if m in (modality, remix.BOTH)]
        sizes = [len(batch.clips) for batch in plan if batch.kept == remix.NAMES[modality]]
        assert all(1 <= n <= size for n in sizes) and sum(n < size for n in sizes) <= 1
    if order == "sequential":
        assert [batch.kept for batch in plan] == sorted((batch.kept for batch in plan), reverse=True)


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
    for parse in (interval, id_list, path_name):
        try:
            value = parse(text)
        except ArgumentTypeError:
            continue
        if parse is interval:
            assert interval(value) == value and interval_of(value)[0] >= 1
        if parse is id_list:
            assert len({int(part) for part in value.split(",")}) == len(value.split(","))
