"""Clips as batches on the device: one interface, two paths (resident arrays, or files read by workers).

Both draw the same views for the same generator, so they feed the same pictures.

Shapes: N clips, B clips of a batch on this process, T frames, S x S pixels, (F, W) spectrogram.
"""

import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as vision

from dataset.augment import Views, crop_resize, draw_views, normalise
from dataset.folder import Part
from dataset.pack import (
    Pack,
    fit,
    frame_size,
    is_packed,
    open_pack,
    pack_bytes,
    read_frame,
    read_spectrogram,
    room_for_packs,
    shrink,
    stored_size,
)
from utils.distributed import barrier, is_first_here, local_processes, lowest, rank, world_size
from utils.errors import UserError
from utils.interrupt import SIGNALS
from utils.memory import available_ram, gigabytes

CACHES = ("auto", "none", "ram", "device")
SLOWEST_FIRST = ("none", "ram", "device")
SHARE_OF_RAM = 0.5  # of what is free; the rest is for the run itself and its neighbours
SHARE_OF_DEVICE = 0.6


class ClipBatch(NamedTuple):
    """This process's share of one planned batch, on the device.

    clips (B,) indices into the part; kept: both, audio or video; audio (B, 1, F, W) and video (B, T, 3, S, S), None
    where it is masked and not asked for; labels (B,); total: clips of the batch over all processes; share: this
    process's part of them, 0 if it got none and repeats one to keep step with the others.
    """

    clips: Tensor
    kept: str
    audio: Tensor | None
    video: Tensor | None
    labels: Tensor
    total: int
    share: float


class Job(NamedTuple):
    """One planned batch before it is loaded: indices (B,) and views on the CPU."""

    clips: Tensor
    views: Views
    kept: str
    audio: bool
    video: bool
    total: int
    share: float


class Clips:
    """A part of a training folder as batches. Subclasses say where frames and spectrograms come from."""

    def __init__(self, part: Part, feed: "Feed", sizes: Tensor):
        self.names = part.clips
        self.frames, self.image_size, self.device = feed.frames, feed.image_size, feed.device
        self.crops = (feed.crop_area, feed.mirror)
        self.counts = torch.tensor([len(f) for f in part.frames])
        self.sizes = sizes  # (N, 2) height and width of each clip's frames, pack_size applied
        self.labels = torch.as_tensor(part.labels).to(feed.device)

    def __len__(self) -> int:
        return len(self.names)

    def epoch(
        self, plan: list, generator: torch.Generator | None = None, load_masked: bool = False, first: int = 0
    ) -> Iterator[ClipBatch]:
        """Load the batches of `plan`, a list of (clip indices, kept modality), in order, from batch `first` on.

        With `generator` frames and crops are random (training), without it fixed (evaluation). `load_masked` gives
        the masked modality's input too. Under torchrun each process gets every world_size-th clip of each batch, the
        views having been drawn for the whole plan, so that N processes see what one would.
        """
        if not plan:
            return
        order = torch.cat([batch.clips for batch in plan])
        views = draw_views(self.counts[order], self.sizes[order], self.frames, generator, *self.crops)
        jobs, shares, start = [], [], 0  # a share: the places in `order` that are this process's
        for batch in plan:
            total = len(batch.clips)
            mine = torch.arange(start, start + total)[rank() :: world_size()]
            share = len(mine) / total
            mine = mine if len(mine) else torch.tensor([start])
            audio, video = (load_masked or batch.kept in ("both", name) for name in ("audio", "video"))
            jobs.append(Job(order[mine], views.rows(mine), batch.kept, audio, video, total, share))
            shares.append(mine)
            start += total
        # To the device once for the whole epoch: a copy in each batch would make the host wait for it each time.
        jobs, shares = jobs[first:], shares[first:]
        if not jobs:
            return
        clips = order[torch.cat(shares)].to(self.device)
        per_batch = [len(mine) for mine in shares]
        batches = zip(jobs, clips.split(per_batch), self.labels[clips].split(per_batch), self._load(jobs), strict=True)
        for job, mine, labels, (audio, pixels) in batches:
            video = normalise(pixels).unflatten(0, (-1, self.frames)) if pixels is not None else None  # (B, T, 3, S, S)
            audio = audio[:, None] if audio is not None else None  # (B, 1, F, W)
            yield ClipBatch(mine, job.kept, audio, video, labels, job.total, job.share)

    def _load(self, jobs: list[Job]) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """Of each job audio (B, F, W) and pixels (B*T, 3, S, S) in [0, 255], float32 on the device."""
        raise NotImplementedError


class ResidentClips(Clips):
    """Clips held in memory: on the compute device, or (cache ram) on the host and gathered there batch by batch."""

    def __init__(self, part: Part, pack: Pack, feed: "Feed"):
        # Views are drawn for the frames as they were, as on the other path, and found again in frames kept at one size.
        sizes = torch.tensor([shrink(frame_size(paths[0]), feed.pack_size) for paths in part.frames])
        super().__init__(part, feed, sizes)
        kept = torch.tensor(pack.frames.shape[-2:])
        self.scale = kept / sizes if (sizes != kept).any() else None  # (N, 2)
        self.store = store = feed.device if feed.cache == "device" else torch.device("cpu")
        # Memory-mapped arrays are read-only, which PyTorch warns of; nothing here writes to them.
        self.pixels = _as_tensor(pack.frames).to(store)  # (K, 3, H, W)
        self.spectrograms = _as_tensor(pack.spectrograms).to(store)  # (N, F, W)
        self.first = torch.as_tensor(pack.first)

    def _load(self, jobs: list[Job]) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        clips = [job.clips for job in jobs]
        rows = [(self.first[job.clips][:, None] + job.views.picks).flatten() for job in jobs]  # (B*T,) each
        boxes = [self._boxes(job).flatten(0, 1) for job in jobs]
        flips = [job.views.flips.flatten() for job in jobs]
        placed = (_to_device(clips, self.store), _to_device(rows, self.store),
                  _to_device(boxes, self.device), _to_device(flips, self.device))  # fmt: skip
        for job, clip, row, box, flip in zip(jobs, *placed, strict=True):
            audio = self._take(self.spectrograms, clip) if job.audio else None
            pixels = crop_resize(self._take(self.pixels, row), box, flip, self.image_size) if job.video else None
            yield audio, pixels

    def _boxes(self, job: Job) -> Tensor:
        """Where the boxes (B, T, 4) of the job's views lie in the frames as they are kept, in whole pixels."""
        if self.scale is None:
            return job.views.boxes
        start, extent = job.views.boxes.double().split(2, dim=2)  # (B, T, 2) each
        scale = self.scale[job.clips].double()[:, None]
        first, last = (start * scale).round(), ((start + extent) * scale).round()
        first = torch.minimum(first, torch.tensor(self.pixels.shape[-2:]).double() - 1)
        return torch.cat([first, (last - first).clamp(min=1)], dim=2).long()

    def _take(self, array: Tensor, rows: Tensor) -> Tensor:
        """Rows of `array` on the device, from the host by way of pinned memory: the host need not wait for the copy."""
        if self.store == self.device:
            return array[rows]
        pinned = torch.empty(len(rows), *array.shape[1:], dtype=array.dtype, pin_memory=True)
        torch.index_select(array, 0, rows, out=pinned)
        return pinned.to(self.device, non_blocking=True)


class FileClips(Clips):
    """Clips read from their files by `workers` processes on every epoch: the plain path, whose memory does not grow."""

    def __init__(self, part: Part, feed: "Feed", audio_shape: tuple[int, int]):
        sizes = [shrink(frame_size(paths[0]), feed.pack_size) for paths in part.frames]
        super().__init__(part, feed, torch.tensor(sizes))
        self.jobs: list[Job] = []
        self.loader = DataLoader(
            _JobReader(part, feed.image_size, audio_shape, sizes),
            sampler=self.jobs,  # filled anew for each epoch, so that the workers live on
            batch_size=None,
            num_workers=feed.workers,
            persistent_workers=feed.workers > 0,
            worker_init_fn=_ignore_signals,
            # Its own, so that starting workers draws nothing from the global one: a resumed run starts them once more.
            generator=torch.Generator().manual_seed(0),
            pin_memory=feed.device.type == "cuda",
        )

    def _load(self, jobs: list[Job]) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        self.jobs[:] = jobs
        for audio, pixels, mistake in self.loader:
            if mistake:
                raise UserError(mistake)
            audio, pixels = (x.to(self.device, non_blocking=True) if x is not None else None for x in (audio, pixels))
            yield audio, pixels.float() if pixels is not None else None


def _ignore_signals(_: int) -> None:
    """A worker outlives the signals sent to the whole group (Ctrl-C, a scheduler's SIGTERM); its parent ends it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class _JobReader(Dataset):
    """Reads a whole batch in a worker: spectrograms (B, F, W) float32 and frames (B*T, 3, S, S) uint8."""

    def __init__(self, part: Part, image_size: int, audio_shape: tuple[int, int], sizes: list[tuple[int, int]]):
        self.part, self.image_size, self.audio_shape = part, image_size, audio_shape
        self.sizes = sizes  # (height, width) the clip's boxes are for, which every frame of it is brought to

    def __getitem__(self, job: Job) -> tuple[Tensor | None, Tensor | None, str]:
        try:
            audio = self._audio(job) if job.audio else None
            return audio, self._video(job) if job.video else None, ""
        except UserError as error:  # one line in the main process instead of a worker's stack trace
            return None, None, str(error)

    def _audio(self, job: Job) -> Tensor:
        paths = (self.part.spectrograms[i] for i in job.clips.tolist())
        return torch.stack([torch.from_numpy(read_spectrogram(path, self.audio_shape)) for path in paths])

    def _video(self, job: Job) -> Tensor:
        frames, side = [], [self.image_size, self.image_size]
        rows = zip(job.clips.tolist(), *(field.tolist() for field in job.views), strict=True)
        for clip, picks, boxes, flips in rows:
            for pick, box, flip in zip(picks, boxes, flips, strict=True):
                image = fit(read_frame(self.part.frames[clip][pick]), self.sizes[clip])
                image = torch.from_numpy(image).permute(2, 0, 1)
                image = vision.resized_crop(image, *box, size=side, antialias=True)
                frames.append(image.flip(2) if flip else image)
        return torch.stack(frames)


class Feed(NamedTuple):
    """How clips are fed: `frames` of each at `image_size` pixels, to `device`.

    `crop_area` and `mirror` as in `draw_views`; `pack_size`, in pixels, is the shorter side frames are kept at (None:
    as stored), on either path alike.
    """

    frames: int
    image_size: int
    device: torch.device
    cache: str
    workers: int
    crop_area: tuple[float, float] = (0.08, 1.0)
    mirror: bool = True
    pack_size: int | None = None


def make_clips(root: Path, name: str, part: Part, audio_shape: tuple[int, int], feed: Feed) -> Clips:
    """Part `name` of a checked training folder on the data path of `feed`, whose `cache` is not auto any more."""
    if feed.cache == "none":
        return FileClips(part, feed, audio_shape)
    size = stored_size(part, feed.pack_size)
    if not is_first_here():
        barrier()  # one process of each machine makes the pack, the others map the same file
    pack = open_pack(root, name, part, size, audio_shape)
    if is_first_here():
        barrier()
    return ResidentClips(part, pack, feed)


def step_bytes(batch_size: int, frames: int, image_size: int, audio_shape: tuple[int, int]) -> float:
    """About what a run takes on a GPU beside the clips: weights, optimizer and CUDA itself, and the step's activations.

    Per pixel or spectrogram value that is fed, ResNet-18 keeps 450 bytes for the gradient in float32 (counted in
    tests/test_clips.py); scoring, at four times the batch, and the crops it is fed take more: 700. That is too much for
    thinner trunks and for bf16.
    """
    return 1.5e9 + 700 * batch_size * (frames * image_size**2 + audio_shape[0] * audio_shape[1])


def choose_cache(
    cache: str,
    root: Path,
    parts: dict[str, Part],
    audio_shape: tuple[int, int],
    device: torch.device,
    pack_size: int | None = None,
    step: float = 0,
) -> tuple[str, str]:
    """The data path, and why it. For `auto` the fastest on which `parts` surely fit: GPU, host memory, else files.

    `step` is what training takes on the GPU beside the clips, in bytes. All processes agree on the slowest that any of
    them chooses. Raises `UserError` if `device` is asked for and the clips are larger than what the GPU has free.
    """
    sizes = {name: stored_size(part, pack_size) for name, part in parts.items()}
    needed = sum(pack_bytes(part, sizes[name], audio_shape) for name, part in parts.items())
    on_gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    if cache == "device" and device.type == "cuda" and needed > on_gpu:
        raise UserError(f"--cache device: the clips take {gigabytes(needed)}, the GPU has {gigabytes(on_gpu)} free; "
                        "type --cache auto, or a smaller --pack_size")  # fmt: skip
    if cache != "auto":
        return cache, f"--cache {cache}"
    # One file that all processes map; where there is none and none can be written, each has to hold the clips itself,
    # if only until they are on its GPU.
    shared = room_for_packs(root) > needed
    shared = shared or all(is_packed(root, name, part, sizes[name], audio_shape) for name, part in parts.items())
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


def _as_tensor(array) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def _to_device(parts: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """All `parts` in one copy, then apart again."""
    return torch.cat(parts).to(device).split([len(part) for part in parts])
