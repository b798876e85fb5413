"""The pack: every frame of a part decoded once to uint8, every array modality in one array, all memory-mappable.

It lies in the training folder as `<root>/.pack/<part>-<key>/`, one `<modality>.npy` per modality. The key is a digest
of the sources (clips, and the size and time of each file): a changed source has another key, so an outdated pack is
never read. The folder is made under a temporary name and renamed when it is whole. `<root>/.pack/lock` is held
meanwhile, so whatever has a temporary name while nobody holds the lock was abandoned.

Shapes: N clips, K frames in all, H x W stored pixels. `sizes` (modality -> (H, W)) names the modalities of frames to
pack, `shapes` (modality -> shape of one clip's array) those of arrays.
"""

import errno
import hashlib
import json
import os
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from dataset.folder import Part
from dataset.inspect import frame_fault, short
from utils.distributed import local_processes
from utils.errors import UserError
from utils.files import Busy, atomic_folder, locked, remove_leftovers
from utils.memory import available_ram, gigabytes

KEPT_SECONDS = 24 * 3600  # a pack that no run has opened for so long is deleted when the next one is made
FORMAT = 2  # raise when the layout changes, so that older packs are made again

Sizes = dict[str, tuple[int, int]]
Shapes = dict[str, tuple[int, ...]]


class Pack(NamedTuple):
    """`arrays` by modality: frames (K, 3, H, W) uint8 RGB, others (N, *shape) float32.

    `first` and `counts` (N,) int64, of the modalities of frames: clip i has the rows first[i] ... first[i] + counts[i]
    - 1 of its array.
    """

    arrays: dict[str, np.ndarray]
    first: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]


# ---------------------------------------------------------------------------------------------------------------------
# One file


@cache  # asked for when the path is chosen, and again when the clips are opened
def frame_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels, from the file's header. Raises `UserError` if the file is not an image."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        try:
            reason = frame_fault(path.read_bytes()) or f"cannot be decoded ({short(error)})"
        except OSError as missing:
            reason = f"cannot be read ({missing.strerror})"
        raise _bad_frame(path, reason) from None


def read_frame(path: Path) -> np.ndarray:
    """One frame, (H, W, 3) uint8 RGB. Raises `UserError` unless it is a whole JPEG file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _bad_frame(path, f"cannot be read ({error.strerror})") from None
    if reason := frame_fault(data):
        raise _bad_frame(path, reason)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:  # more pixels than OpenCV allows
        image = None
    if image is None:
        raise _bad_frame(path, "cannot be decoded")
    return image


def read_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """One clip's array, float32 of `shape`. Raises `UserError` if the file is unreadable, misshapen or not finite."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:  # a header may claim more than there is memory
        raise _bad_file(path, f"cannot be read ({getattr(error, 'strerror', None) or short(error)})", 1) from None
    if array.shape != tuple(shape):
        raise _bad_file(path, f"array of shape {array.shape}, not {tuple(shape)}", 1)
    if not np.isfinite(array).all():
        raise _bad_file(path, "NaN or infinity in it", 1)
    return array.astype(np.float32, copy=False)


def _bad_frame(path: Path, reason: str) -> UserError:
    return _bad_file(path, reason, 2)


def _bad_file(path: Path, reason: str, depth: int) -> UserError:
    """The error for a file that lies `depth` folders below the training folder."""
    doctor = shlex.join(["python", "-m", "dataset.prepare", "--check", str(path.parents[depth])])
    return UserError(f"{path}: {reason}; {doctor} lists all; replace the file, or delete it and pass --allow_missing")


def stored_size(first_frames: Iterable[Path], short_side: int | None = None) -> tuple[int, int]:
    """Height and width that the pack keeps: the most common size of the clips' first frames, shrunk to `short_side`.

    Frames of another size are resized to it.
    """
    return shrink(Counter(frame_size(path) for path in first_frames).most_common(1)[0][0], short_side)


def shrink(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """`size` scaled down so that its shorter side is `short_side` pixels; unchanged if it is no longer, or for None."""
    if short_side is None or min(size) <= short_side:
        return size
    height, width = (round(side * short_side / min(size)) for side in size)
    return height, width


def fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A frame (H, W, 3) at `size` (height, width): by area where it shrinks, else bilinear."""
    if image.shape[:2] == size:
        return image
    shrinks = image.shape[0] > size[0]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


# ---------------------------------------------------------------------------------------------------------------------
# A pack


def pack_bytes(part: Part, sizes: Sizes, shapes: Shapes) -> int:
    """Bytes that the pack of a part takes in memory or on disk."""
    return sum(prod(shape) * np.dtype(kind).itemsize for shape, kind in _layout(part, sizes, shapes).values())


def open_pack(root: Path, name: str, part: Part, sizes: Sizes, shapes: Shapes) -> Pack:
    """The pack of part `name`, made now if there is none for these very files.

    Raises `UserError` for a file that cannot be read. Where `root` cannot be written, the arrays are held in memory
    instead, and a line says so; a `UserError` if they do not fit, once for each process of the machine.
    """
    counts = {name: np.array([len(paths) for paths in part.files[name]], dtype=np.int64) for name in sizes}
    first = {name: rows.cumsum() - rows for name, rows in counts.items()}
    folder = _folder(root, name, part, sizes, shapes)
    arrays = _load(folder, part, sizes, shapes)
    if arrays is None:
        try:
            _make(folder, name, part, sizes, shapes)
        except OSError as error:
            needed, free = local_processes() * pack_bytes(part, sizes, shapes), available_ram()
            if needed > free:
                raise UserError(
                    f"{root}: no pack written ({error.strerror}), and the clips take {gigabytes(needed)} of memory, "
                    f"of which {gigabytes(free)} are free; pass --cache none"
                ) from None
            print(f"{root}: no pack written ({error.strerror}); holding the clips in this process's memory instead")
            return Pack(_decode(part, sizes, shapes, lambda _, shape, kind: np.empty(shape, kind)), first, counts)
        arrays = _load(folder, part, sizes, shapes)
        if arrays is None:
            raise UserError(f"{folder}: unreadable right after it was written; delete it and run again")
    with suppress(OSError):  # marks it as in use; in a read-only folder nobody deletes packs either
        os.utime(folder / "pack.json")
    return Pack(arrays, first, counts)


def is_packed(root: Path, name: str, part: Part, sizes: Sizes, shapes: Shapes) -> bool:
    """Whether `open_pack` would find a whole pack and write nothing."""
    return _load(_folder(root, name, part, sizes, shapes), part, sizes, shapes) is not None


def room_for_packs(root: Path) -> int:
    """Bytes that packs of the training folder `root` may take on its disk, 0 where none can be written there.

    What killed processes left unfinished is deleted first: it can be as large as the disk is full.
    """
    packs = root / ".pack"
    place = packs if packs.exists() else root
    if not os.access(place, os.W_OK | os.X_OK):
        return 0
    if packs.is_dir():
        with suppress(Busy, OSError), locked(packs / "lock"):
            remove_leftovers(packs)
    return shutil.disk_usage(place).free


def _layout(part: Part, sizes: Sizes, shapes: Shapes) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shape and type of the array of each modality."""
    frames = {name: sum(len(paths) for paths in part.files[name]) for name in sizes}
    layout: dict[str, tuple[tuple[int, ...], type]] = {
        name: ((frames[name], 3, *size), np.uint8) for name, size in sizes.items()
    }
    return layout | {name: ((len(part.clips), *shape), np.float32) for name, shape in shapes.items()}


def _folder(root: Path, name: str, part: Part, sizes: Sizes, shapes: Shapes) -> Path:
    return root / ".pack" / f"{name}-{_key(part, sizes, shapes)}"


def _key(part: Part, sizes: Sizes, shapes: Shapes) -> str:
    digest = hashlib.sha256(f"{FORMAT} {sorted(sizes.items())} {sorted(shapes)}".encode())
    modalities = sorted([*sizes, *shapes])
    for i, clip in enumerate(part.clips):
        digest.update(clip.encode())
        for modality in modalities:
            files = part.files[modality][i]
            for path in files if modality in sizes else [files]:
                status = os.stat(path)
                digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _load(folder: Path, part: Part, sizes: Sizes, shapes: Shapes) -> dict[str, np.ndarray] | None:
    """The arrays, None where they are missing or damaged (a file cut short by hand or a failing disk)."""
    if not (folder / "pack.json").exists():
        return None
    arrays = {}
    for name, (shape, kind) in _layout(part, sizes, shapes).items():
        try:
            arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        if arrays[name].shape != shape or arrays[name].dtype != kind:
            return None
    return arrays


def _make(folder: Path, name: str, part: Part, sizes: Sizes, shapes: Shapes) -> None:
    """Write the pack and delete packs that were not used lately. Raises `OSError` where it cannot be written."""
    packs = folder.parent
    packs.mkdir(exist_ok=True)
    with locked(packs / "lock", f"{packs}: another process is making a pack, waiting for it"):
        if _load(folder, part, sizes, shapes) is not None:
            return  # that process made this very pack, and may have it open
        remove_leftovers(packs)  # before looking for room: they may be what fills the disk
        if pack_bytes(part, sizes, shapes) > shutil.disk_usage(packs).free:
            raise OSError(errno.ENOSPC, "not enough room on the disk")
        with atomic_folder(folder) as temporary:
            make_array = _mapped(temporary)
            for array in _decode(part, sizes, shapes, make_array).values():
                array.flush()
            about = {"clips": len(part.clips), "sizes": sizes, "shapes": shapes, "format": FORMAT}
            (temporary / "pack.json").write_text(json.dumps(about))
        for old in packs.glob(f"{name}-*/pack.json"):
            # Not younger ones: another run may be about to open its own, of another split of the same clips.
            if time.time() - old.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(old.parent, ignore_errors=True)


def _mapped(folder: Path) -> Callable[[str, tuple[int, ...], type], np.memmap]:
    """A function that makes an array of a modality as a memory-mapped file in `folder`."""

    def make_array(name: str, shape: tuple[int, ...], kind: type) -> np.memmap:
        path = folder / f"{name}.npy"
        array = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
        # Reserve the blocks: a disk that fills up under a mapped file ends the process without a message.
        if hasattr(os, "posix_fallocate"):
            with open(path, "rb+") as reserved:
                os.posix_fallocate(reserved.fileno(), 0, os.fstat(reserved.fileno()).st_size)
        return array

    return make_array


def _decode(part: Part, sizes: Sizes, shapes: Shapes, make_array: Callable) -> dict:
    """Read every file of the part into arrays that `make_array(modality, shape, type)` makes."""
    arrays = {name: make_array(name, *layout) for name, layout in _layout(part, sizes, shapes).items()}
    first = {name: np.cumsum([0, *(len(paths) for paths in part.files[name])]) for name in sizes}

    def decode(i: int) -> None:
        for name, size in sizes.items():
            for row, path in enumerate(part.files[name][i], start=first[name][i]):
                arrays[name][row] = fit(read_frame(path), size).transpose(2, 0, 1)
        for name, shape in shapes.items():
            arrays[name][i] = read_array(part.files[name][i], shape)

    # Threads suffice: OpenCV decodes outside Python's lock.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        jobs = pool.map(decode, range(len(part.clips)))
        for _ in tqdm(jobs, total=len(part.clips), desc="pack clips", unit="clip", leave=False):
            pass
    return arrays
