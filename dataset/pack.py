"""The pack: every frame of a part decoded once to uint8 and every spectrogram in one array, both memory-mappable.

Written beside the training folder as `<root>/.pack/<part>-<key>/`, where the key is a digest of what it was made from
(clips, and the size and time of each file): a changed source has another key, so an outdated pack is never read. The
folder is made under a temporary name and renamed when whole, so neither is half of one.

Shapes: N clips, K frames in all, H x W stored pixels, (F, W) spectrogram.
"""

import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from dataset.folder import Part
from utils.distributed import local_processes
from utils.errors import UserError
from utils.files import TEMPORARY
from utils.memory import available_ram, gigabytes

KEPT_SECONDS = 24 * 3600  # a pack that no run has opened for so long goes when the next one is made
MEND = "prepare the clip anew, or delete the file and type --allow_missing"
FORMAT = 1  # raise when the layout changes, so that older packs are made anew


class Pack(NamedTuple):
    """frames (K, 3, H, W) uint8 RGB; spectrograms (N, F, W) float32; first, counts (N,): a clip's rows in `frames`."""

    frames: np.ndarray
    spectrograms: np.ndarray
    first: np.ndarray
    counts: np.ndarray


@cache  # asked for when the path is chosen, and again when the clips are opened
def frame_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels, from the file's header."""
    from PIL import Image

    with Image.open(path) as image:
        return image.height, image.width


def stored_size(part: Part, short_side: int | None = None) -> tuple[int, int]:
    """Height and width the pack keeps: the most common size of the clips' first frames, shrunk to `short_side`.

    Frames of another size are resized to it.
    """
    return shrink(Counter(frame_size(frames[0]) for frames in part.frames).most_common(1)[0][0], short_side)


def shrink(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """`size` scaled down so that its shorter side is `short_side` pixels; as it is if it is no longer, or for None."""
    if short_side is None or min(size) <= short_side:
        return size
    return tuple(round(side * short_side / min(size)) for side in size)


def fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A frame (H, W, 3) at `size` (height, width): by area where it shrinks, else bilinear."""
    if image.shape[:2] == size:
        return image
    shrinks = image.shape[0] > size[0]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def pack_bytes(part: Part, size: tuple[int, int], audio_shape: tuple[int, int]) -> int:
    """What the pack of a part takes in memory or on disk."""
    frames = sum(len(frames) for frames in part.frames)
    return frames * 3 * size[0] * size[1] + len(part.clips) * 4 * audio_shape[0] * audio_shape[1]


def open_pack(root: Path, name: str, part: Part, size: tuple[int, int], audio_shape: tuple[int, int]) -> Pack:
    """The pack of part `name`, made now if there is none for these very files.

    Raises `UserError` for a frame or spectrogram that cannot be read. Where `root` cannot be written, the arrays are
    held in memory instead, and a line says so; a `UserError` if they do not fit, once for each process of the machine.
    """
    counts = np.array([len(frames) for frames in part.frames], dtype=np.int64)
    first = np.concatenate([[0], counts.cumsum()[:-1]]) if len(counts) else counts
    folder = _folder(root, name, part, size)
    arrays = _load(folder, part, size, audio_shape)
    if arrays is None:
        try:
            _write(folder, name, part, size, audio_shape)
        except OSError as error:
            needed, free = local_processes() * pack_bytes(part, size, audio_shape), available_ram()
            if needed > free:
                why = (
                    f"no pack written ({error.strerror}), and of {gigabytes(free)} of free memory the clips would take"
                )
                raise UserError(f"{root}: {why} {gigabytes(needed)}; type --cache none") from None
            print(f"{root}: no pack written ({error.strerror}); holding the clips in this process's memory instead")
            return Pack(*_decode(part, size, audio_shape, np.empty), first, counts)
        arrays = _load(folder, part, size, audio_shape)
        if arrays is None:
            raise UserError(f"{folder}: unreadable right after it was written; delete it and run again")
    with suppress(OSError):  # a read-only folder's packs are not ours to clear either
        os.utime(folder / "pack.json")
    return Pack(*arrays, first, counts)


def is_packed(root: Path, name: str, part: Part, size: tuple[int, int], audio_shape: tuple[int, int]) -> bool:
    """Whether `open_pack` would find a whole pack and write nothing."""
    return _load(_folder(root, name, part, size), part, size, audio_shape) is not None


def room_for_packs(root: Path) -> int:
    """Bytes that packs of the training folder `root` may take on its disk, 0 where none can be written there.

    What killed processes left unfinished is deleted first.
    """
    packs = root / ".pack"
    place = packs if packs.exists() else root
    if not os.access(place, os.W_OK | os.X_OK):
        return 0
    _remove_abandoned(packs)
    return shutil.disk_usage(place).free


def _folder(root: Path, name: str, part: Part, size: tuple[int, int]) -> Path:
    return root / ".pack" / f"{name}-{_key(part, size)}"


def _load(
    folder: Path, part: Part, size: tuple[int, int], audio_shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray] | None:
    """frames and spectrograms, None where they are missing or damaged (a file cut short by hand or a failing disk)."""
    if not (folder / "pack.json").exists():
        return None
    try:
        frames, spectrograms = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("frames", "spectrograms")
        )
    except (OSError, ValueError, EOFError):
        return None
    whole = (sum(len(paths) for paths in part.frames), 3, *size), (len(part.clips), *audio_shape)
    return (frames, spectrograms) if (frames.shape, spectrograms.shape) == whole else None


def read_frame(path: Path) -> np.ndarray:
    """One frame, (H, W, 3) uint8 RGB. Raises `UserError` if it cannot be decoded."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    if image is None:
        look = shlex.join(["python", "-m", "dataset.prepare", "--check", str(path.parents[2])])
        raise UserError(f"{path}: not a readable JPEG; {look} lists all; delete what is broken, then --allow_missing")
    return image


def read_spectrogram(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """One spectrogram, float32 of `shape`. Raises `UserError` if the file is unreadable, misshapen or not finite."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:  # a header may claim more than there is memory
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise UserError(f"{path}: unreadable spectrogram ({why}); {MEND}") from None
    if array.shape != tuple(shape):
        raise UserError(f"{path}: spectrogram of shape {array.shape}, expected {tuple(shape)}; prepare the folder anew")
    if not np.isfinite(array).all():
        raise UserError(f"{path}: spectrogram with NaN or infinite values; {MEND}")
    return array.astype(np.float32, copy=False)


def _key(part: Part, size: tuple[int, int]) -> str:
    digest = hashlib.sha256(f"{FORMAT} {size}".encode())
    for clip, frames, spectrogram in zip(part.clips, part.frames, part.spectrograms, strict=True):
        digest.update(clip.encode())
        for path in (*frames, spectrogram):
            status = os.stat(path)
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _write(folder: Path, name: str, part: Part, size: tuple[int, int], audio_shape: tuple[int, int]) -> None:
    folder.parent.mkdir(exist_ok=True)
    _remove_abandoned(folder.parent)  # before looking for room: they may be what fills the disk
    if pack_bytes(part, size, audio_shape) > shutil.disk_usage(folder.parent).free:
        raise OSError(errno.ENOSPC, "not enough room on the disk")
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder.parent))
    held = _hold(temporary)
    try:

        def make_array(shape: tuple[int, ...], dtype: type) -> np.ndarray:
            file = "frames.npy" if dtype is np.uint8 else "spectrograms.npy"
            array = np.lib.format.open_memmap(temporary / file, mode="w+", dtype=dtype, shape=shape)
            # Reserve the blocks: a disk that fills up under a mapped file ends the process without a word.
            if hasattr(os, "posix_fallocate"):
                with open(temporary / file, "rb+") as reserved:
                    os.posix_fallocate(reserved.fileno(), 0, os.fstat(reserved.fileno()).st_size)
            return array

        for array in _decode(part, size, audio_shape, make_array):
            array.flush()
        (temporary / "pack.json").write_text(json.dumps({"clips": len(part.clips), "size": size, "format": FORMAT}))
        os.chmod(temporary, 0o755)
        if _load(folder, part, size, audio_shape) is not None:
            return  # another process made the same pack meanwhile, and may have it open: use that one
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one, if any
        try:
            temporary.rename(folder)
        except OSError:
            if _load(folder, part, size, audio_shape) is None:
                raise
    finally:
        os.close(held)
        shutil.rmtree(temporary, ignore_errors=True)
    for old in folder.parent.glob(f"{name}-*/pack.json"):
        # Not younger ones: a run beside this one may be about to open its own, of another split of the same clips.
        if time.time() - old.stat().st_mtime > KEPT_SECONDS:
            shutil.rmtree(old.parent, ignore_errors=True)


def _hold(folder: Path) -> int:
    """Lock `folder` until the descriptor is closed or this process ends, however it ends. Raises OSError if it is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_abandoned(packs: Path) -> None:
    """Delete the packs that killed processes left unfinished: they can be as large as the disk is full."""
    for leftover in packs.glob(f"{TEMPORARY}*"):
        with suppress(OSError):  # somebody is at work in it, or just finished
            os.close(_hold(leftover))
            shutil.rmtree(leftover, ignore_errors=True)


def _decode(part: Part, size: tuple[int, int], audio_shape: tuple[int, int], make_array) -> tuple[np.ndarray, ...]:
    total = sum(len(frames) for frames in part.frames)
    frames = make_array((total, 3, *size), np.uint8)
    spectrograms = make_array((len(part.clips), *audio_shape), np.float32)
    first = np.concatenate([[0], np.cumsum([len(f) for f in part.frames])])

    def decode(i: int) -> None:
        for row, path in enumerate(part.frames[i], start=first[i]):
            frames[row] = fit(read_frame(path), size).transpose(2, 0, 1)
        spectrograms[i] = read_spectrogram(part.spectrograms[i], audio_shape)

    # Threads do: OpenCV decodes outside Python's lock.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        jobs = pool.map(decode, range(len(part.clips)))
        for _ in tqdm(jobs, total=len(part.clips), desc="pack clips", unit="clip", leave=False):
            pass
    return frames, spectrograms
