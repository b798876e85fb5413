"""Frame sampling, crops and flips: drawn for a whole epoch at once, applied per batch.

Drawing and applying are separate, so that all data paths (files or resident, host or GPU) use the same crops for the
same seed, and a resumed epoch uses the same crops as an uninterrupted one.

Shapes: N clips, T frames picked per clip, M frames in a call, c channels (3 RGB, 2 optical flow), H x W stored pixels,
S x S fed pixels.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FLOW_CHANNELS = 2
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
LARGE = 64 * 64  # pixels of a frame from which the CPU is faster frame by frame
FIXED = 22  # bits after the point of the weights that PIL resizes 8-bit images with


def saves_traffic(device: torch.device) -> bool:
    """Whether this device takes the ways that move the fewest bytes, at the cost of other last bits: CUDA GPUs."""
    return device.type == "cuda"


def one_by_one(device: torch.device, stored: tuple[int, ...]) -> bool:
    """Whether frames of `stored` (H, W) pixels are resized one by one, to whole levels: large ones on a CPU."""
    return device.type == "cpu" and stored[0] * stored[1] >= LARGE


class Views(NamedTuple):
    """Views of the clips: frame numbers (N, T), boxes (N, T, 4: top, left, height, width) and flips (N, T)."""

    picks: Tensor
    boxes: Tensor
    flips: Tensor

    def rows(self, rows) -> "Views":
        return Views(*(field[rows] for field in self))

    def to(self, device: torch.device) -> "Views":
        return Views(*(field.to(device, non_blocking=True) for field in self))


def pick_frames(counts: Tensor, picks: int, generator: torch.Generator | None, pick: str = "random") -> Tensor:
    """Frame numbers (N, picks) for clips of `counts` (N,) frames: the clip is cut in `picks` equal segments.

    random  with `generator` a random frame of each segment, without it the middle one: seg = floor(n / picks), pick i
            draws from [i*seg, (i+1)*seg - 1] or takes min(i*seg + floor(seg/2), n-1).
    first   the first frame of each segment, i*seg, with and without `generator`.

    A clip with fewer frames than picks repeats them in order.
    """
    n = counts[:, None]  # (N, 1)
    i = torch.arange(picks)[None, :]  # (1, T)
    seg = n // picks
    if pick == "first":
        inside = torch.zeros_like(seg)
    elif generator is None:
        inside = seg // 2
    else:
        draw = torch.rand(len(counts), picks, generator=generator, dtype=torch.float64)
        inside = (draw * seg).long()
    return torch.where(n < picks, i * n // picks, torch.minimum(i * seg + inside, n - 1))


def random_boxes(sizes: Tensor, generator: torch.Generator, crop_area: tuple[float, float] = (0.08, 1.0)) -> Tensor:
    """Crop boxes (M, 4) for frames of `sizes` (M, 2) as height, width: RandomResizedCrop's distribution, vectorised.

    Up to ten tries of an area share uniform in `crop_area` (torchvision's default) and a log-uniform aspect ratio; the
    first that fits is placed uniformly. If none fits, the largest centred box with the ratio clamped, as torchvision.
    """
    m, (low, high) = len(sizes), CROP_RATIO
    height, width = sizes.double().unbind(1)  # (M,)
    area = (height * width) * _uniform(CROP_ATTEMPTS, m, crop_area, generator)  # (tries, M)
    ratio = _uniform(CROP_ATTEMPTS, m, (math.log(low), math.log(high)), generator).exp()
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(0, keepdim=True)  # the first that fits
    w, h = w.gather(0, first)[0], h.gather(0, first)[0]

    frame_ratio = width / height
    none = ~fits.any(0)
    w = torch.where(none, torch.where(frame_ratio > high, (height * high).round(), width), w)
    h = torch.where(none, torch.where(frame_ratio < low, (width / low).round(), height), h)

    place = torch.rand(2, m, generator=generator, dtype=torch.float64)
    top = torch.where(none, ((height - h) / 2).floor(), (place[0] * (height - h + 1)).floor())
    left = torch.where(none, ((width - w) / 2).floor(), (place[1] * (width - w + 1)).floor())
    return torch.stack([top, left, h, w], dim=1).long()


def draw_views(
    counts: Tensor,
    sizes: Tensor,
    picks: int,
    generator: torch.Generator | None,
    crop_area: tuple[float, float] = (0.08, 1.0),
    mirror: bool = True,
    pick: str = "random",
) -> Views:
    """Views of N clips with `counts` (N,) frames of `sizes` (N, 2) pixels; without `generator` the evaluation's.

    `crop_area` and `mirror` say how training pictures may be cropped and whether half of them are flipped; `pick` is
    that of `pick_frames`.
    """
    n = len(counts)
    frames = pick_frames(counts, picks, generator, pick)
    per_frame = sizes.repeat_interleave(picks, dim=0)  # (N*T, 2)
    if generator is None:
        boxes = torch.cat([torch.zeros_like(per_frame), per_frame], dim=1)
        flips = torch.zeros(n, picks, dtype=torch.bool)
    else:
        boxes = random_boxes(per_frame, generator, crop_area)
        flips = (torch.rand(n, picks, generator=generator) < 0.5) & mirror
    return Views(frames, boxes.view(n, picks, 4), flips)


def crop_resize(
    frames: Tensor, boxes: Tensor, flips: Tensor, size: int, as_pil: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Cut a box out of each frame, resize it to `size` x `size` and mirror it where asked.

    frames (M, c, H, W) uint8, boxes (M, 4), flips (M,), all on one device -> (M, c, S, S) in [0, 255], float32, or on a
    GPU `dtype`.
    Bilinear with antialiasing as PIL's, by what is fastest there: on the CPU large frames one by one, small ones all at
    once; on a GPU all at once by two products that copy no operand. With `as_pil` levels are whole and equal PIL's
    (`pil_resize`) everywhere; without it they are within one level. In a mirrored flow the motion along x is reversed
    too.
    """
    if one_by_one(frames.device, frames.shape[-2:]):
        pixels = crop_resize_singly(frames, boxes, flips, size, as_pil)
    elif saves_traffic(frames.device) and not as_pil:
        pixels = crop_resize_by_products(frames, boxes, flips, size, dtype)
    else:
        pixels = crop_resize_at_once(frames, boxes, flips, size, as_pil)
    return reverse_flow(pixels, flips) if frames.shape[1] == FLOW_CHANNELS else pixels


def reverse_flow(pixels: Tensor, flips: Tensor) -> Tensor:
    """Optical flow (M, 2, S, S) in [0, 255] with the motion along x reversed where `flips` (M,): 255 - x, as mmaction2.

    A level p stands for a motion of (p - 127.5) * 40 / 255 pixels, so this is exactly the negative.
    """
    x, y = pixels.unbind(1)
    return torch.stack([torch.where(flips[:, None, None], 255 - x, x), y], dim=1)


def crop_resize_singly(frames: Tensor, boxes: Tensor, flips: Tensor, size: int, as_pil: bool = False) -> Tensor:
    """`crop_resize` frame by frame in whole levels of 255: work in proportion to the box, on the CPU.

    PyTorch's resize of 8-bit images has coarser weights than PIL's and can differ by one level; `as_pil` calls PIL.
    """
    pixels = torch.empty(*frames.shape[:2], size, size)
    for frame, (top, left, h, w), flip, out in zip(frames, boxes.tolist(), flips.tolist(), pixels, strict=True):
        box = frame[:, top : top + h, left : left + w]
        if as_pil:
            resized = pil_resize(box, size)
        else:
            resized = F.interpolate(box[None], (size, size), mode="bilinear", antialias=True)[0]  # (c, S, S) uint8
        out.copy_(resized.flip(2) if flip else resized)
    return pixels


def pil_resize(image: Tensor, size: int) -> Tensor:
    """An image (c, h, w) uint8 on the CPU resized to (c, S, S) uint8 by PIL, channel by channel.

    Rows first, then columns, in two calls: so did every Pillow before 13, which for some shapes takes columns first.
    """
    from PIL import Image  # late: only `as_pil` needs it

    height, bilinear = image.shape[1], Image.Resampling.BILINEAR
    wide = [Image.fromarray(channel).resize((size, height), bilinear) for channel in image.numpy()]
    return torch.from_numpy(np.stack([np.asarray(channel.resize((size, size), bilinear)) for channel in wide]))


def crop_resize_at_once(frames: Tensor, boxes: Tensor, flips: Tensor, size: int, as_pil: bool = False) -> Tensor:
    """`crop_resize` for a whole batch at once, without synchronising with the device.

    The filter is a triangle as wide as the reduction, over the pixels of the box. It is separable, so each axis is one
    matrix product with a weight matrix per frame; a mirror image is a reversed weight matrix. Levels are rounded only
    with `as_pil`, after each axis, in the order of `pil_resize`.
    """
    height, width = frames.shape[-2:]
    kind = torch.float64 if as_pil else torch.float32
    rows = resize_weights(boxes[:, 0], boxes[:, 2], height, size, kind)  # (M, S, H)
    columns = resize_weights(boxes[:, 1], boxes[:, 3], width, size, kind)  # (M, S, W)
    columns = torch.where(flips[:, None, None], columns.flip(1), columns)
    across, down = columns.transpose(1, 2)[:, None], rows[:, None]
    if as_pil:
        pixels = whole_levels(frames.float(), across)
        return whole_levels(pixels.transpose(2, 3), down.transpose(2, 3)).transpose(2, 3)  # (M, c, S, S)
    return down @ (frames.float() @ across)  # (M, c, S, S)


def crop_resize_by_products(
    frames: Tensor, boxes: Tensor, flips: Tensor, size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`crop_resize_at_once` in one product per axis for all channels, so that no weight matrix is copied per channel.

    The channels lie between rows and columns, (M, H, c, W): one batched product of (H c, W) by (W, S), one of (S, H) by
    (H, c S), both on views. The result is a view (M, c, S, S) of (M, S, c, S). In bfloat16 a level is off by 0.2 of 255
    on average, less than by rounding to whole levels.
    """
    channels, height, width = frames.shape[1:]
    rows = banded_weights(boxes[:, 0], boxes[:, 2], height, size, dtype)  # (M, S, H)
    columns = banded_weights(boxes[:, 1], boxes[:, 3], width, size, dtype, flips)  # (M, S, W)
    pixels = frames.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).flatten(1, 2)  # (M, H c, W)
    pixels = (pixels @ columns.mT).unflatten(1, (height, channels)).flatten(2)  # (M, H, c S)
    return (rows @ pixels).unflatten(2, (channels, size)).transpose(1, 2)


def banded_weights(
    start: Tensor, extent: Tensor, length: int, size: int, dtype: torch.dtype, flips: Tensor | None = None
) -> Tensor:
    """`resize_weights` computed only where a filter can reach, in float32; mirrored where `flips` (M,).

    Each output has a window of a few source pixels, as many as the strongest reduction needs, and zeros elsewhere.
    """
    start, extent = start.float()[:, None, None], extent.float()[:, None, None]
    scale = extent / size
    support = scale.clamp(min=1.0)
    taps = min(length, int(2 * max(1.0, length / size)) + 2)
    out = torch.arange(size, device=start.device)[None, :, None]
    out = out if flips is None else torch.where(flips[:, None, None], size - 1 - out, out)
    centre = start + (out + 0.5) * scale  # (M, S, 1)
    first = (centre - support).floor().clamp(0, length - taps)  # the window stays inside, so no pixel is in it twice
    window = first + torch.arange(taps, device=start.device)  # (M, S, taps)
    pixel = window + 0.5
    weights = (1 - (pixel - centre).abs() / support).clamp(min=0.0)
    weights = weights * ((pixel > start) & (pixel < start + extent))
    weights = weights / weights.sum(dim=2, keepdim=True)
    dense = weights.new_zeros(len(start), size, length, dtype=dtype)
    return dense.scatter_(2, window.long(), weights.to(dtype))


def whole_levels(pixels: Tensor, weights: Tensor) -> Tensor:
    """Integer pixels (..., h, w) times weights (..., w, S), rounded to integers as PIL does.

    PIL's arithmetic on 8-bit images: weights are rounded to 22 bits after the point, sums are exact, halves round up.
    Here the weights are split in two parts of 11 bits, so that float32 sums are exact too, up to a 16-fold reduction.
    """
    fixed = (weights * 2**FIXED + 0.5).floor().int()
    low = 2 ** (FIXED // 2)
    high_sums, low_sums = (pixels @ part.float() for part in (fixed // low, fixed % low))
    return ((high_sums.int() * low + low_sums.int() + 2 ** (FIXED - 1)) >> FIXED).clamp(max=255).float()


def resize_weights(start: Tensor, extent: Tensor, length: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights (M, S, length) that resize [start, start + extent) of an axis of `length` pixels to `size` pixels."""
    start, extent = start.to(dtype)[:, None, None], extent.to(dtype)[:, None, None]
    scale = extent / size
    support = scale.clamp(min=1.0)  # half the filter's width, in source pixels
    out = torch.arange(size, device=start.device)[None, :, None]
    pixel = torch.arange(length, device=start.device)[None, None, :] + 0.5
    centre = start + (out + 0.5) * scale
    weights = (1 - (pixel - centre).abs() / support).clamp(min=0.0)
    weights = weights * ((pixel > start) & (pixel < start + extent))
    return weights / weights.sum(dim=2, keepdim=True)


def normalise(pixels: Tensor, as_torchvision: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixels (M, c, S, S) in [0, 255], whole levels as uint8 or not, normalised.

    RGB to ImageNet's mean 0 and standard deviation 1 per channel; optical flow to [-1, 1], 0 for no motion. The last
    bit is that of torchvision's ToTensor and Normalize with `as_torchvision`, at the cost of one more pass. A GPU
    writes `dtype`, channels last, in a single pass; elsewhere the result is float32.
    """
    if as_torchvision and pixels.shape[-3] != FLOW_CHANNELS:
        mean, std, white = _imagenet(pixels.device, 1)
        return (pixels / white - mean) / std  # by a tensor: a GPU multiplies by the reciprocal of a number
    if saves_traffic(pixels.device) and not as_torchvision:
        factor, shift = _line(pixels.device, pixels.shape[-3])
        out = torch.empty(pixels.shape, dtype=dtype, device=pixels.device, memory_format=torch.channels_last)
        return torch.addcmul(shift, pixels, factor, out=out)
    if pixels.shape[-3] == FLOW_CHANNELS:
        return pixels / 127.5 - 1
    mean, std, _ = _imagenet(pixels.device, 255)
    return (pixels - mean) / std


@cache  # made once: a copy from the host in every batch would make the host wait for the GPU
def _imagenet(device: torch.device, white: int) -> tuple[Tensor, ...]:
    """Mean and standard deviation, (3, 1, 1) each, for pixels in [0, white]; the number 255."""
    with torch.inference_mode(False):  # or batches to train on could not use what evaluation made first
        mean = torch.tensor(IMAGENET_MEAN, device=device)[:, None, None] * white
        std = torch.tensor(IMAGENET_STD, device=device)[:, None, None] * white
        return mean, std, torch.tensor(255.0, device=device)


@cache
def _line(device: torch.device, channels: int) -> tuple[Tensor, Tensor]:
    """Factor and shift, (c, 1, 1) each: normalised = pixels * factor + shift."""
    with torch.inference_mode(False):
        if channels == FLOW_CHANNELS:
            return torch.full((2, 1, 1), 1 / 127.5, device=device), torch.full((2, 1, 1), -1.0, device=device)
        mean, std, _ = _imagenet(device, 255)
        return 1 / std, -mean / std


def _uniform(rows: int, columns: int, bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(rows, columns, generator=generator, dtype=torch.float64)
