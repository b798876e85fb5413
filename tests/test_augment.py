"""Frame choice, crops and resizing against the segment rule, torchvision and PIL."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ks_2samp
from sklearn.datasets import load_sample_images
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import RandomResizedCrop

from benchmarks.counting import Operations
from dataset import augment
from dataset.augment import (
    crop_resize,
    crop_resize_at_once,
    crop_resize_by_products,
    crop_resize_singly,
    draw_views,
    normalise,
    pick_frames,
    random_boxes,
)


@given(n=st.integers(1, 60), picks=st.integers(1, 6), seed=st.integers(0, 5))
def test_segment_rule(n, picks, seed):
    counts = torch.tensor([n])
    middle = pick_frames(counts, picks, None)[0].tolist()
    drawn = pick_frames(counts, picks, torch.Generator().manual_seed(seed))[0].tolist()
    seg = n // picks
    for i in range(picks):
        assert 0 <= middle[i] < n and 0 <= drawn[i] < n
        if seg:
            assert middle[i] == min(i * seg + seg // 2, n - 1)
            assert i * seg <= drawn[i] <= (i + 1) * seg - 1
    if not seg:  # frames repeat, in order, all of them used
        assert middle == drawn == sorted(middle) and set(middle) == set(range(n))


def test_training_reaches_every_frame_of_a_segment_alike():
    picks = pick_frames(torch.full((6000,), 10), 2, torch.Generator().manual_seed(0))
    counts = torch.bincount(picks[:, 1], minlength=10)[5:]
    assert torch.all((counts - 1200).abs() < 6 * 31)  # six standard deviations of a binomial


@pytest.mark.parametrize(("height", "width"), [(360, 480), (32, 32), (100, 900), (900, 100)])
def test_boxes_are_distributed_as_torchvisions(height, width):
    draws = 3000
    ours = random_boxes(torch.tensor([[height, width]]).expand(draws, 2), torch.Generator().manual_seed(0)).numpy()
    random.seed(0)
    torch.manual_seed(0)
    image = torch.zeros(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(draws)])
    for column, name in enumerate(("top", "left", "height", "width")):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3, name
    top, left, h, w = ours.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    assert (h > 0).all() and (w > 0).all()


def test_a_data_set_may_ask_for_larger_crops_and_no_mirror_images():
    counts, sizes = torch.full((2000,), 3), torch.full((2000, 2), 64)
    views = draw_views(counts, sizes, 2, torch.Generator().manual_seed(0), crop_area=(0.5, 1.0), mirror=False)
    area = views.boxes[..., 2:].prod(-1) / 64**2
    assert 0.47 < area.min() < 0.53 and not views.flips.any()


@pytest.mark.parametrize("way", [crop_resize_at_once, crop_resize_singly])
@pytest.mark.parametrize("size", [224, 600])
def test_pixels_equal_pils_antialiased_resize(size, way):
    for photograph in load_sample_images().images:
        height, width = photograph.shape[:2]
        boxes = random_boxes(torch.tensor([[height, width]]).expand(6, 2), torch.Generator().manual_seed(1))
        boxes[0] = torch.tensor([0, 0, height, width])
        flips = torch.tensor([False, True] * 3)
        frames = torch.from_numpy(photograph.copy()).permute(2, 0, 1).expand(6, -1, -1, -1)
        ours = way(frames, boxes, flips, size).permute(0, 2, 3, 1).numpy()
        for picture, (top, left, h, w), flip in zip(ours, boxes.tolist(), flips.tolist(), strict=True):
            image = Image.fromarray(photograph).crop((left, top, left + w, top + h))
            expected = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), dtype=float)
            expected = expected[:, ::-1] if flip else expected
            assert np.abs(picture - expected).mean() < 0.5  # PIL rounds to whole levels twice


@pytest.mark.parametrize("way", [crop_resize_at_once, crop_resize_singly])
@pytest.mark.parametrize("size", [17, 224])
def test_whole_levels_are_pils(size, way):
    """Rows, then columns, on noise: every level equals that of PIL's fixed-point arithmetic."""
    draw = np.random.default_rng(0)
    for height, width in ((37, 53), (240, 320), (300, 90)):
        image = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        boxes = random_boxes(torch.tensor([[height, width]]).expand(6, 2), torch.Generator().manual_seed(1))
        boxes[0] = torch.tensor([0, 0, height, width])
        flips = torch.tensor([False, True] * 3)
        frames = torch.from_numpy(image).permute(2, 0, 1).expand(6, -1, -1, -1)
        ours = way(frames, boxes, flips, size, as_pil=True).permute(0, 2, 3, 1).numpy()
        for picture, (top, left, h, w), flip in zip(ours, boxes.tolist(), flips.tolist(), strict=True):
            crop = Image.fromarray(image).crop((left, top, left + w, top + h))
            for shape in ((size, h), (size, size)):  # in one call Pillow 13 would choose the order of the axes
                crop = crop.resize(shape, Image.Resampling.BILINEAR)
            expected = np.asarray(crop)[:, ::-1] if flip else np.asarray(crop)
            assert np.array_equal(picture, expected)


@pytest.mark.parametrize("side", [32, 96])  # either way
def test_a_whole_frame_at_its_own_size_is_untouched(side):
    frames = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, side, side]]).expand(4, 4)
    torch.testing.assert_close(crop_resize(frames, boxes, torch.zeros(4, dtype=torch.bool), side), frames.float())


def test_evaluation_sees_the_whole_frame_unflipped():
    views = draw_views(torch.tensor([3, 5]), torch.tensor([[40, 50], [60, 70]]), 2, None)
    assert views.picks.tolist() == [[0, 1], [1, 3]]
    assert views.boxes.tolist() == [[[0, 0, 40, 50]] * 2, [[0, 0, 60, 70]] * 2]
    assert not views.flips.any()


def test_half_of_the_frames_are_flipped_each_on_its_own():
    flips = draw_views(torch.full((4000,), 3), torch.full((4000, 2), 32), 2, torch.Generator().manual_seed(0)).flips
    assert abs(flips.float().mean().item() - 0.5) < 0.04
    assert abs((flips[:, 0] == flips[:, 1]).float().mean().item() - 0.5) < 0.05


def test_normalise_is_imagenets():
    white = normalise(torch.full((1, 3, 2, 2), 255.0))[0, :, 0, 0]
    expected = [(1 - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    np.testing.assert_allclose(white.numpy(), expected, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.parametrize(("shape", "size"), [((48, 36), 32), ((40, 60), 64), ((5, 7), 16), ((96, 30), 8)])
def test_two_products_without_a_copy_give_the_same_pixels(shape, size):
    draw = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (40, 3, *shape), generator=draw, dtype=torch.uint8)
    boxes = random_boxes(torch.tensor([shape]).expand(40, 2), draw, (0.02, 1.0))
    boxes[0], boxes[1] = torch.tensor([0, 0, *shape]), torch.tensor([shape[0] - 1, shape[1] - 1, 1, 1])
    flips = torch.rand(40, generator=draw) < 0.5
    expected = crop_resize_at_once(frames, boxes, flips, size)
    torch.testing.assert_close(crop_resize_by_products(frames, boxes, flips, size), expected, rtol=0, atol=2e-3)
    rough = crop_resize_by_products(frames, boxes, flips, size, torch.bfloat16)
    assert (rough.float() - expected).abs().max() < 3  # of 255 levels


@pytest.mark.parametrize("channels", [2, 3])
def test_a_gpu_normalises_whole_levels_in_one_pass(channels, monkeypatch):
    pixels = torch.randint(0, 256, (2, channels, 4, 4), dtype=torch.uint8)
    expected = normalise(pixels.float())
    assert torch.equal(normalise(pixels), expected)
    monkeypatch.setattr(augment, "saves_traffic", lambda device: True)
    for dtype, off in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        for levels in (pixels, pixels.float(), pixels.float().transpose(2, 3).contiguous().transpose(2, 3)):
            ours = normalise(levels, dtype=dtype)
            assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(ours.float(), expected, rtol=off, atol=off)


def test_augmentation_on_a_gpu_moves_a_fifth_of_the_bytes():
    """64 clips of CREMA-D's shape, counted on fake tensors: 3.5 GB with a weight matrix per channel."""
    moved = {}
    with FakeTensorMode(), torch.device("cuda"):
        frames = torch.empty(128, 3, 360, 480, dtype=torch.uint8)
        boxes, flips = torch.empty(128, 4, dtype=torch.long), torch.empty(128, dtype=torch.bool)
        line = torch.empty(3, 1, 1)
        with Operations() as traffic:
            pixels = (crop_resize_at_once(frames, boxes, flips, 224) - line) / line
            pixels.contiguous(memory_format=torch.channels_last)
        moved["before"] = traffic.bytes
        for dtype in (torch.float32, torch.bfloat16):
            with Operations() as traffic:
                pixels = crop_resize(frames, boxes, flips, 224, dtype=dtype)
                out = torch.empty(pixels.shape, dtype=dtype, memory_format=torch.channels_last)
                torch.addcmul(line, pixels, line, out=out)
            moved[dtype] = traffic.bytes
    assert 3.3e9 < moved["before"] < 3.9e9, moved
    assert moved[torch.float32] < 1.55e9 and moved[torch.bfloat16] < 0.85e9, moved
