"""Batches of clips on the device, from resident arrays or from files read by worker processes.

Both data paths draw the same views for the same generator, so they feed the same images.

Shapes: N clips, B clips of a batch on this process, T frames, c channels, S x S pixels, (F, W) spectrogram.
"""

import signal
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataset.augment import FLOW_CHANNELS, Views, crop_resize, draw_views, normalise, pil_resize
from dataset.fixed import FixedFrames, Resized
from dataset.folder import Part
from dataset.pack import (
    Pack,
    Rows,
    common_size,
    fit,
    frame_sizes,
    is_packed,
    open_pack,
    pack_bytes,
    read_array,
    read_frame,
    room_for_packs,
    shrink,
)
from dataset.specs import Modality
from models.encoders import Sequences, steps_of
from utils.distributed import barrier, is_first_here, local_processes, lowest, rank, world_size
from utils.errors import UserError
from utils.memory import available_ram, gigabytes
from utils.signals import SIGNALS

CACHES = ("auto", "none", "ram", "device")
SLOWEST_FIRST = ("none", "ram", "device")
SHARE_OF_RAM = 0.5  # of what is free; the rest is for the run itself and its neighbours
SHARE_OF_DEVICE = 0.6


class ClipBatch(NamedTuple):
    """This process's share of one planned batch, on the device.

    clips (B,) indices into the part; fed: the modalities given to the network; inputs: images (B, T, c, S, S), arrays
    (B, 1, F, W), vectors (B, D) or `Sequences` by modality, masked ones only where they were asked for; labels (B,);
    total: clips of the batch over all processes; share: this process's part of the batch, all shares adding up to 1;
    mask (B, M) bool: in a mixed batch, which of the fed modalities each clip is given (None: all of them).
    """

    clips: Tensor
    fed: tuple[str, ...]
    inputs: dict[str, Tensor | Sequences]
    labels: Tensor
    total: int
    share: float
    mask: Tensor | None = None

    @property
    def weight(self) -> float:
        """Weight of each clip in a sum over processes: 1, or less if several processes have the same clip."""
        return self.share * self.total / len(self.clips)


class Job(NamedTuple):
    """One planned batch before it is loaded: indices (B,) and views by modality of images, on the CPU."""

    clips: Tensor
    views: dict[str, Views]
    fed: tuple[str, ...]
    load: tuple[str, ...]
    total: int
    share: float
    mask: Tensor | None


class Feed(NamedTuple):
    """Settings for feeding clips: their `modalities`, images at `image_size` pixels, to `device`.

    `crop_area` and `mirror` as in `draw_views`; `pack_size`, in pixels, is the shorter side frames are kept at (None:
    as stored), on either path alike. With `as_pil` frames are resized and normalised as PIL and torchvision do it, to
    the last bit. `dtype` is that of images on a GPU. With `keep_fixed` resident clips resize evaluation frames once.
    """

    modalities: tuple[Modality, ...]
    image_size: int
    device: torch.device
    cache: str
    workers: int = 0
    crop_area: tuple[float, float] = (0.08, 1.0)
    mirror: bool = True
    pack_size: int | None = None
    as_pil: bool = False
    dtype: torch.dtype = torch.float32
    keep_fixed: bool = True


class Clips:
    """A part of a training folder as batches. Subclasses say where frames and arrays come from."""

    def __init__(self, part: Part, feed: Feed):
        self.names, self.feed, self.device = part.clips, feed, feed.device
        self.modalities = {modality.name: modality for modality in feed.modalities}
        images = [modality for modality in feed.modalities if modality.kind == "frames"]
        self.counts = {modality.name: torch.as_tensor(part.files[modality.name].counts) for modality in images}
        # (N, 2) height and width of each clip's frames, pack_size applied; boxes are drawn in them. Modalities that
        # share their views share the sizes too.
        self.sizes = {
            modality.name: torch.tensor([shrink((height, width), feed.pack_size) for height, width in sizes.tolist()])
            for modality in images
            for sizes in [frame_sizes(part.files[modality.like or modality.name])]
        }
        self.labels = torch.as_tensor(part.labels).to(feed.device)
        self.copies = torch.cuda.Stream(feed.device) if feed.device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self.names)

    def epoch(
        self, plan: list, generator: torch.Generator | None = None, load_masked: bool = False
    ) -> Iterator[ClipBatch]:
        """Load the batches of `plan`, a list of (clip indices, fed modalities, mask), in order.

        With `generator` frames and crops are random (training), without it fixed (evaluation). `load_masked` loads the
        masked modalities' inputs too. Under torchrun each process gets every world_size-th clip of each batch, views
        being drawn for the whole plan, so that N processes see what one would. A batch of fewer clips than processes
        goes to all of them whole.
        """
        if not plan:
            return
        order = torch.cat([batch.clips for batch in plan])
        crops = self.feed.crop_area, self.feed.mirror
        views = {
            name: draw_views(counts[order], self.sizes[name][order], own.frames, generator, *crops, own.pick)
            for name, counts in self.counts.items()
            if (own := self.modalities[name]).like is None
        }
        views |= {name: views[other] for name in self.counts if (other := self.modalities[name].like) is not None}
        jobs, shares, start = [], [], 0  # a share: the places in `order` that are this process's
        for batch in plan:
            total, places = len(batch.clips), torch.arange(start, start + len(batch.clips))
            split = total >= world_size()
            mine = places[rank() :: world_size()] if split else places
            load = tuple(self.modalities) if load_masked else batch.fed
            seen = {name: values.rows(mine) for name, values in views.items()}
            share = len(mine) / total if split else 1 / world_size()
            mask = None if batch.mask is None else batch.mask[mine - start]
            jobs.append(Job(order[mine], seen, batch.fed, load, total, share, mask))
            shares.append(mine)
            start += total
        # To the device once for the whole epoch: a copy in each batch would make the host wait for it each time.
        clips = order[torch.cat(shares)].to(self.device)
        per_batch, loads = [len(mine) for mine in shares], self._load(jobs, generator is None)
        batches = zip(jobs, clips.split(per_batch), self.labels[clips].split(per_batch), loads, strict=True)
        for job, mine, labels, loaded in batches:
            inputs = {name: self._shaped(name, loaded[name]) for name in job.load}
            mask = None if job.mask is None else _send(job.mask, self.device)
            yield ClipBatch(mine, job.fed, inputs, labels, job.total, job.share, mask)

    def _shaped(self, name: str, values: Tensor | Sequences) -> Tensor | Sequences:
        """Pixels (B*T, c, S, S) in [0, 255], normalised: (B, T, c, S, S); arrays (B, F, W): (B, 1, F, W)."""
        if isinstance(values, Sequences):
            return values
        if name in self.counts:
            normalised = normalise(values, self.feed.as_pil, self.feed.dtype)
            return normalised.unflatten(0, (-1, self.modalities[name].frames))
        return values[:, None] if values.dim() == 3 else values

    def _upload(self, values: Tensor) -> Tensor:
        """`values` of the host on the device, on a GPU from pinned memory on a stream for copies.

        The copy does not wait for the step before, which may still run; the step that follows waits for the copy, and
        the host for nothing. The pinned memory is not used again before the copy is done: PyTorch's allocator sees to
        it.
        """
        if self.copies is None:
            return values.to(self.device)
        with torch.cuda.stream(self.copies):
            copied = values.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.copies)
        copied.record_stream(current)  # or a later copy could be given its memory while this step still reads it
        return copied

    def _load(self, jobs: list[Job], fixed: bool) -> Iterator[Mapping[str, Tensor | Sequences]]:
        """For each job and modality, arrays (B, ...), pixels (B*T, c, S, S) in [0, 255] or sequences, on the device.

        `fixed`: the views are those of evaluation, the same in every epoch.
        """
        raise NotImplementedError


class ResidentClips(Clips):
    """Clips held in memory: on the compute device, or (cache ram) on the host and gathered there batch by batch."""

    def __init__(self, part: Part, pack: Pack, feed: Feed):
        super().__init__(part, feed)
        self.store = store = feed.device if feed.cache == "device" else torch.device("cpu")
        self.arrays = {name: _Stored(array, store) for name, array in pack.arrays.items()}
        self.lengths = {name: torch.as_tensor(pack.counts[name]) for name in pack.counts if name not in self.counts}
        self.first = {name: torch.as_tensor(rows) for name, rows in pack.first.items()}
        self.strides = {name: torch.as_tensor(part.files[name].strides) for name in self.counts}  # of packed frames
        # Boxes are drawn in original coordinates, then rescaled to the packed size: (N, 2), None where they are equal.
        self.scale: dict[str, Tensor | None] = {}
        for name, sizes in self.sizes.items():
            kept = torch.tensor(self.arrays[name].shape[-2:])
            self.scale[name] = kept / sizes if (sizes != kept).any() else None
        size = feed.image_size
        self.resized = {name: Resized.of(tuple(self.arrays[name].shape[-2:]), size, feed.device, feed.as_pil)
                        for name in self.counts}  # fmt: skip
        # Evaluation frames that are worth keeping: those whose resize is work, and that uint8 holds.
        self.fixed: dict[str, FixedFrames] = {}
        for name, how in self.resized.items():
            if feed.keep_fixed and how.whole and not how.asis:
                frames = self.modalities[name].frames, self.arrays[name].shape[1], size, size
                self.fixed[name] = FixedFrames(len(self), frames, feed.device)

    def _load(self, jobs: list[Job], fixed: bool) -> Iterator[dict[str, Tensor | Sequences]]:
        clips = _to_device([job.clips for job in jobs], self.store)
        places = _to_device([job.clips for job in jobs], self.device) if fixed and self.fixed else clips
        kept = {name: own for name, own in self.fixed.items() if fixed}
        images = {name: self._placed(name, jobs) for name in self.counts
                  if name not in kept or not all(kept[name].have(job.clips) for job in jobs)}  # fmt: skip
        for i, (job, clip) in enumerate(zip(jobs, clips, strict=True)):
            loaded = {}
            for name in job.load:
                if name in self.lengths:
                    loaded[name] = self._sequences(name, job.clips)
                elif name in kept and kept[name].have(job.clips):
                    loaded[name] = kept[name].take(places[i])
                elif name in images:
                    row, box, flip = (values[i] for values in images[name])
                    loaded[name] = self._pixels(name, row, box, flip, fixed)
                    if name in kept:
                        kept[name].put(job.clips, places[i], loaded[name])
                else:
                    loaded[name] = self._take(self.arrays[name], clip)
            yield loaded

    def _pixels(self, name: str, rows: Tensor, boxes: Tensor, flips: Tensor, fixed: bool) -> Tensor:
        """Pixels (B*T, c, S, S) of frames of one modality; evaluation frames as uint8 where their levels are whole."""
        frames, how = self._take(self.arrays[name], rows), self.resized[name]
        if fixed and how.asis:
            return frames
        dtype = torch.float32 if fixed else self.feed.dtype
        pixels = crop_resize(frames, boxes, flips, self.feed.image_size, self.feed.as_pil, dtype)
        return pixels.round().to(torch.uint8) if fixed and how.whole else pixels

    def _placed(self, name: str, jobs: list[Job]) -> tuple[tuple[Tensor, ...], ...]:
        """Rows (B*T,), boxes (B*T, 4) and flips (B*T,) of one modality of images, for each job."""
        first, stride = self.first[name][:, None], self.strides[name][:, None]
        rows = [(first[job.clips] + job.views[name].picks // stride[job.clips]).flatten() for job in jobs]
        boxes = [self._boxes(name, job.clips, job.views[name]).flatten(0, 1) for job in jobs]
        flips = [job.views[name].flips.flatten() for job in jobs]
        return _to_device(rows, self.store), _to_device(boxes, self.device), _to_device(flips, self.device)

    def _boxes(self, name: str, clips: Tensor, views: Views) -> Tensor:
        """The boxes (B, T, 4) of `views` in whole pixels of the frames as they are packed."""
        scales = self.scale[name]
        if scales is None:
            return views.boxes
        start, extent = views.boxes.double().split(2, dim=2)  # (B, T, 2) each
        scale = scales[clips].double()[:, None]
        first, last = (start * scale).round(), ((start + extent) * scale).round()
        first = torch.minimum(first, torch.tensor(self.arrays[name].shape[-2:]).double() - 1)
        return torch.cat([first, (last - first).clamp(min=1)], dim=2).long()

    def _sequences(self, name: str, clips: Tensor) -> Sequences:
        lengths = self.lengths[name][clips]
        rows = self.first[name][clips].repeat_interleave(lengths) + steps_of(lengths)
        taken = self._take(self.arrays[name], _send(rows, self.store))
        places = Sequences.of(taken, lengths)
        return places._replace(lengths=_send(lengths, self.device), slots=_send(places.slots, self.device))

    def _take(self, array: "_Stored", rows: Tensor) -> Tensor:
        """Rows of `array` on the device, from the host by way of pinned memory on a GPU."""
        if self.store == self.device:
            return array.pick(rows)
        shape, pinned = (len(rows), *array.shape[1:]), None
        if self.copies is not None:
            pinned = torch.empty(shape, dtype=array.dtype, pin_memory=True)
        return self._upload(array.pick(rows, pinned))


class _Stored:
    """An array of a pack: one tensor on a GPU, memory-mapped shards on the host."""

    def __init__(self, array: Rows, store: torch.device):
        shards = [_as_tensor(shard) for shard in array.shards]
        self.shape, self.dtype, self.per_shard = array.shape, shards[0].dtype, array.per_shard
        if store.type != "cpu":
            whole, start = torch.empty(self.shape, dtype=self.dtype, device=store), 0
            for shard in shards:
                whole[start : start + len(shard)] = shard
                start += len(shard)
            shards = [whole]
        self.shards = shards

    def __getitem__(self, row: int) -> Tensor:
        return self.shards[row // self.per_shard][row % self.per_shard] if len(self.shards) > 1 else self.shards[0][row]

    def pick(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """The rows (B, ...) with these numbers, in `out` where it is given."""
        if len(self.shards) == 1:
            return self.shards[0][rows] if out is None else torch.index_select(self.shards[0], 0, rows, out=out)
        # Row by row: `out[mask] = ...` for each shard takes several times as long.
        return torch.stack([self[row] for row in rows.tolist()], out=out)


class FileClips(Clips):
    """Clips read from their files by `workers` processes on every epoch: the plain path, whose memory does not grow."""

    def __init__(self, part: Part, feed: Feed, shapes: dict[str, tuple[int, ...]]):
        super().__init__(part, feed)
        self.jobs: list[Job] = []
        self.loader = DataLoader(
            _JobReader(part, feed, shapes, {name: sizes.numpy() for name, sizes in self.sizes.items()}),
            sampler=self.jobs,  # refilled for each epoch, so that the workers persist
            batch_size=None,
            num_workers=feed.workers,
            persistent_workers=feed.workers > 0,
            worker_init_fn=_ignore_signals,
            # Its own, so that starting workers draws nothing from the global one: a resumed run starts them once more.
            generator=torch.Generator().manual_seed(0),
            pin_memory=feed.device.type == "cuda",
        )

    def _load(self, jobs: list[Job], fixed: bool) -> Iterator[dict[str, Tensor | Sequences]]:
        self.jobs[:] = jobs
        for loaded, mistake in self.loader:
            if mistake:
                raise UserError(mistake)
            yield {name: self._moved(values) for name, values in loaded.items()}

    def _moved(self, values: Tensor | Sequences) -> Tensor | Sequences:
        if isinstance(values, Sequences):
            lengths, slots = (_send(field, self.device) for field in (values.lengths, values.slots))
            return Sequences(self._upload(values.rows), lengths, slots, values.longest)
        return self._upload(values).float()


def _ignore_signals(_: int) -> None:
    """Ignore signals sent to the process group (Ctrl-C, a scheduler's SIGTERM); the parent ends its workers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class _JobReader(Dataset):
    """Reads a whole batch in a worker: arrays (B, ...), frames (B*T, c, S, S) uint8 and sequences, by modality."""

    def __init__(self, part: Part, feed: Feed, shapes: dict[str, tuple[int, ...]], sizes: dict[str, np.ndarray]):
        self.part, self.image_size, self.as_pil, self.shapes = part, feed.image_size, feed.as_pil, shapes
        self.sizes = sizes  # (height, width) the clip's boxes are for, which every frame of it is resized to

    def __getitem__(self, job: Job) -> tuple[dict[str, Tensor | Sequences], str]:
        try:
            return {name: self._images(name, job) if name in job.views else self._arrays(name, job)
                    for name in job.load}, ""  # fmt: skip
        except UserError as error:  # one line in the main process instead of a worker's stack trace
            return {}, str(error)

    def _arrays(self, name: str, job: Job) -> Tensor | Sequences:
        files, shape = self.part.files[name], self.shapes[name]
        if files.lengths is None:
            return torch.from_numpy(np.stack([read_array(files[i], shape) for i in job.clips.tolist()]))
        lengths = files.lengths[job.clips.numpy()]
        steps = [
            read_array(files[i], (n, *shape[1:])) for i, n in zip(job.clips.tolist(), lengths.tolist(), strict=True)
        ]
        return Sequences.of(torch.from_numpy(np.concatenate(steps)), torch.from_numpy(lengths))

    def _images(self, name: str, job: Job) -> Tensor:
        from torchvision.transforms.v2 import functional as vision  # late: importing it takes seconds

        frames, side, files = [], [self.image_size, self.image_size], self.part.files[name]
        rows = zip(job.clips.tolist(), *(field.tolist() for field in job.views[name]), strict=True)
        for clip, picks, boxes, flips in rows:
            paths, size = files[clip], tuple(self.sizes[name][clip].tolist())
            for pick, box, flip in zip(picks, boxes, flips, strict=True):
                image = torch.from_numpy(fit(read_frame(paths[pick]), size)).permute(2, 0, 1)[: files.channels]
                if self.as_pil:
                    image = pil_resize(vision.crop(image, *box), self.image_size)
                else:
                    image = vision.resized_crop(image, *box, size=side, antialias=True)
                image = image.flip(2) if flip else image
                if flip and files.channels == FLOW_CHANNELS:
                    image[0] = 255 - image[0]  # motion along x is reversed
                frames.append(image)
        return torch.stack(frames)


def make_clips(root: Path, name: str, part: Part, shapes: dict[str, tuple[int, ...]], feed: Feed) -> Clips:
    """Part `name` of a checked training folder on the data path of `feed`, whose `cache` must not be "auto"."""
    if feed.cache == "none":
        return FileClips(part, feed, shapes)
    if not is_first_here():
        barrier()  # one process of each machine makes the pack, the others map the same file
    pack = open_pack(root, name, part, stored_sizes(part, feed), shapes)
    if is_first_here():
        barrier()
    return ResidentClips(part, pack, feed)


def stored_sizes(part: Part, feed: Feed) -> dict[str, tuple[int, int]]:
    """Height and width at which the frames of each modality of images are packed."""
    images = [modality.name for modality in feed.modalities if modality.kind == "frames"]
    return {name: common_size(frame_sizes(part.files[name]), feed.pack_size) for name in images}


def step_bytes(batch_size: int, feed: Feed, shapes: dict[str, tuple[int, ...]]) -> float:
    """Estimated GPU memory in bytes of a run without the clips: weights, optimizer, CUDA, activations of a step.

    Per pixel or array value that is fed, ResNet-18 stores 450 bytes for the gradient in float32 (counted in
    tests/test_clips.py). Scoring, with batches four times as large, and its crops need more: 700 bytes. This is an
    overestimate for thinner networks and for bf16.
    """
    images = sum(modality.frames for modality in feed.modalities if modality.kind == "frames") * feed.image_size**2
    arrays = {modality.name for modality in feed.modalities if modality.kind == "array"}
    return 1.5e9 + 700 * batch_size * (images + sum(int(np.prod(shapes[name])) for name in arrays if name in shapes))


def choose_cache(
    root: Path, parts: dict[str, Part], shapes: dict[str, tuple[int, ...]], feed: Feed, step: float = 0
) -> tuple[str, str]:
    """The data path, and why it. For `auto` the fastest on which `parts` surely fit: GPU, host memory, else files.

    `step` is the GPU memory of training without the clips, in bytes. All processes agree on the slowest that any of
    them chooses. Raises `UserError` if `device` is asked for and the clips are larger than what the GPU has free.
    """
    cache, device = feed.cache, feed.device
    sizes = {name: stored_sizes(part, feed) for name, part in parts.items()}
    needed = sum(pack_bytes(part, sizes[name], shapes) for name, part in parts.items())
    on_gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    if cache == "device" and device.type == "cuda" and needed > on_gpu:
        raise UserError(f"--cache device: the clips take {gigabytes(needed)}, the GPU has {gigabytes(on_gpu)} free; "
                        "use --cache auto, or a smaller --pack_size")  # fmt: skip
    if cache != "auto":
        return cache, f"--cache {cache}"
    # One file that all processes map; where there is none and none can be written, each has to hold the clips itself,
    # if only until they are on its GPU.
    shared = room_for_packs(root) > needed
    shared = shared or all(is_packed(root, name, part, sizes[name], shapes) for name, part in parts.items())
    free, held = available_ram(), needed if shared else local_processes() * needed
    fits_memory = held < SHARE_OF_RAM * free
    if needed < SHARE_OF_DEVICE * on_gpu and needed + step < on_gpu and (shared or fits_memory):
        own, why = "device", f"{gigabytes(needed)}, {gigabytes(on_gpu)} free on the GPU"
    elif fits_memory:
        own, why = "ram", f"{gigabytes(needed)}, {gigabytes(free)} of memory free"
        why += f", only {gigabytes(on_gpu)} on the GPU" if device.type == "cuda" else ""
    else:
        own = "none"
        why = f"{gigabytes(held)} would be over {SHARE_OF_RAM:.0%} of the {gigabytes(free)} of memory free"
    agreed = SLOWEST_FIRST[lowest(SLOWEST_FIRST.index(own), device)]
    return agreed, f"--cache auto: {why}" if agreed == own else "--cache auto: another process has less memory free"


def room_for_fixed(parts: dict[str, Part], shapes: dict[str, tuple[int, ...]], feed: Feed, step: float) -> bool:
    """Whether the resized evaluation frames of `parts` fit beside the clips: on the GPU with a step of `step` bytes,
    else in half of the host's free memory, for every process of this machine."""
    packed = sum(pack_bytes(part, stored_sizes(part, feed), shapes) for part in parts.values())
    fixed = sum(len(part.clips) * modality.frames * part.files[modality.name].channels * feed.image_size**2
                for part in parts.values() for modality in feed.modalities if modality.kind == "frames")  # fmt: skip
    if feed.device.type == "cuda":
        held = packed if feed.cache == "device" else 0
        return held + fixed + step < torch.cuda.mem_get_info(feed.device)[0]
    return packed + local_processes() * fixed < SHARE_OF_RAM * available_ram()


def _as_tensor(array) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def _send(values: Tensor, device: torch.device) -> Tensor:
    """`values` of the host on the device, without the host waiting for the copy."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _to_device(parts: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Copy all `parts` to the device at once, then split them."""
    return torch.cat(parts).to(device).split([len(part) for part in parts])
