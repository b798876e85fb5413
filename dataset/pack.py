"""Pack: memory-mapped files with the frames of a part decoded to uint8, and its arrays and sequences.

Frames that no epoch can feed (`dataset.files.fed_frames`) are left out.

A pack is the folder `<root>/.pack/<part>-<key>/` with shards `<modality>-<number>.npy` of at most `SHARD` bytes each.
The key is a digest of the sources (clips, names, sizes and times of the files that are packed) and of the rule that
picks frames, so an outdated pack is never read. Finding a pack opens none of the sources. The folder
is built under a temporary name and renamed when it is complete. `<root>/.pack/lock` is held while a pack is built:
temporary folders are leftovers if nobody holds the lock.

Memory does not grow with the number of clips: a few clips at a time are decoded and appended to the open shard.

Shapes: N clips, K packed frames or steps in all, H x W stored pixels, c channels (3 RGB, 2 optical flow). `sizes`
(modality -> (H, W)) names the modalities of frames to pack, `shapes` (modality -> shape of a clip's array) the others.
"""

import errno
import hashlib
import json
import os
import shlex
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import cv2
import numpy as np

from dataset.files import FrameFiles
from dataset.folder import Part
from dataset.headers import FrameHeader
from dataset.inspect import frame_fault, short
from utils.errors import UserError
from utils.files import Busy, atomic_folder, locked, remove_leftovers
from utils.memory import available_ram, gigabytes, usable_cores
from utils.progress import over

KEPT_SECONDS = 24 * 3600  # a pack that no run has opened for so long is deleted when the next one is made
SHARD = 2 * 10**9  # bytes of a file at most, but for a single row that is larger
FORMAT = 4  # raise when the layout changes, so that older packs are rebuilt

Sizes = dict[str, tuple[int, int]]
Shapes = dict[str, tuple[int, ...]]
T = TypeVar("T")
R = TypeVar("R")


class Rows:
    """An array (K, ...) in shards: `shards[i]` holds the rows from `i * per_shard` on."""

    def __init__(self, shards: list[np.ndarray], per_shard: int):
        self.shards, self.per_shard = shards, per_shard

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(map(len, self.shards)), *self.shards[0].shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.shards[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        """Rows by number, slice or array of numbers from 0 on."""
        if isinstance(index, (int, np.integer)):
            return self.shards[index // self.per_shard][index % self.per_shard]
        rows = np.arange(len(self))[index] if isinstance(index, slice) else np.asarray(index)
        picked = np.empty((len(rows), *self.shape[1:]), self.dtype)
        shard = rows // self.per_shard
        for i in np.unique(shard):
            picked[shard == i] = self.shards[i][rows[shard == i] - i * self.per_shard]
        return picked

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        whole = np.concatenate(self.shards)
        return whole if dtype is None else whole.astype(dtype)


class Pack(NamedTuple):
    """`arrays` by modality: frames (K, c, H, W) uint8, sequences (K, D) float32, others (N, *shape) float32.

    `first` and `counts` (N,) int64, of the modalities of frames and sequences: clip i has the rows first[i] ...
    first[i] + counts[i] - 1 of its array.
    """

    arrays: dict[str, Rows]
    first: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]


class Layout(NamedTuple):
    """The array of one modality: number of rows, shape and type of each."""

    rows: int
    row: tuple[int, ...]
    kind: type

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def row_bytes(self) -> int:
        return prod(self.row) * np.dtype(self.kind).itemsize

    @property
    def per_shard(self) -> int:
        return max(1, SHARD // max(1, self.row_bytes))

    @property
    def shards(self) -> list[int]:
        """The number of rows in each shard."""
        return [min(self.per_shard, self.rows - start) for start in range(0, self.rows, self.per_shard)]


# ---------------------------------------------------------------------------------------------------------------------
# One file


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
    """One frame, (H, W, 3) uint8 RGB. Raises `UserError` unless it is a whole JPEG or PNG file."""
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


# NumPy parses headers by `ast.literal_eval`, which in several threads of Python 3.11 can raise SystemError ("AST
# constructor recursion depth mismatch", python/cpython#106905).
_PARSER = threading.Lock()


def read_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """One clip's array of `shape`, cast to float32. Raises `UserError` if it is unreadable, misshapen or not finite."""
    try:
        with _PARSER:
            array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:  # a header may claim more than there is memory
        raise _bad_file(path, f"cannot be read ({getattr(error, 'strerror', None) or short(error)})", 1) from None
    if array.shape != tuple(shape):
        raise _bad_file(path, f"array of shape {array.shape}, not {tuple(shape)}", 1)
    if array.dtype.kind not in "fiub":
        raise _bad_file(path, f"array of type {array.dtype}", 1)
    with np.errstate(over="ignore"):  # a float64 that float32 cannot hold is infinite then, and named below
        values = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(values).all():
        finite = array.dtype.kind != "f" or np.isfinite(array).all()
        raise _bad_file(path, "a number too large for float32 in it" if finite else "NaN or infinity in it", 1)
    return values


def _bad_frame(path: Path, reason: str) -> UserError:
    return _bad_file(path, reason, 2)


def _bad_file(path: Path, reason: str, depth: int) -> UserError:
    """The error for a file `depth` folders below the training folder."""
    doctor = shlex.join(["python", "-m", "dataset.prepare", "--check", str(path.parents[depth])])
    return UserError(f"{path}: {reason}; {doctor} lists all; replace the file, or delete it and pass --allow_missing")


def frame_sizes(files: FrameFiles) -> np.ndarray:
    """Height and width (N, 2) of each clip's first frame, from their headers, kept in `files`.

    A file is opened only if it is new or has changed since a run noted its size.
    """
    if files.sizes is None:
        sizes = [_first_size(files, i) for i in range(len(files))]
        files.sizes = np.array(sizes, dtype=np.int32).reshape(-1, 2)
    return files.sizes


def _first_size(files: FrameFiles, clip: int) -> tuple[int, int]:
    path = Path(files.paths(clip)[0])
    if files.known is None:
        return frame_size(path)
    try:
        status = os.stat(path)
    except OSError:
        return frame_size(path)  # which says why
    folder, name = os.path.basename(files.folder), files.clips[clip]
    header = files.known.find(folder, name, status)
    if not isinstance(header, FrameHeader) or header.name != path.name:
        header = FrameHeader(path.name, *frame_size(path))
        files.known.note(folder, name, status, header)
    return header.height, header.width


def stored_size(first_frames: Iterable[Path], short_side: int | None = None) -> tuple[int, int]:
    """`common_size` of frames by their paths."""
    return common_size(np.array([frame_size(path) for path in first_frames]), short_side)


def common_size(sizes: np.ndarray, short_side: int | None = None) -> tuple[int, int]:
    """Height and width that the pack keeps: the most common of `sizes` (N, 2), shrunk to `short_side`.

    Frames of another size are resized to it.
    """
    return shrink(Counter(map(tuple, sizes.tolist())).most_common(1)[0][0], short_side)


def shrink(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """`size` scaled down so that its shorter side is `short_side` pixels; unchanged if it is no longer, or for None."""
    if short_side is None or min(size) <= short_side:
        return size
    height, width = (round(side * short_side / min(size)) for side in size)
    return height, width


def fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A frame (H, W, c) at `size` (height, width): by area where it shrinks, else bilinear."""
    if image.shape[:2] == size:
        return image
    shrinks = image.shape[0] > size[0]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


# ---------------------------------------------------------------------------------------------------------------------
# A pack


def pack_bytes(part: Part, sizes: Sizes, shapes: Shapes) -> int:
    """Bytes that the pack of a part takes in memory or on disk."""
    return sum(layout.bytes for layout in _layouts(part, sizes, shapes).values())


def open_pack(root: Path, name: str, part: Part, sizes: Sizes, shapes: Shapes) -> Pack:
    """The pack of part `name`, made now if there is none for these very files.

    Raises `UserError` for a file that cannot be read. Where `root` cannot be written, the arrays are held in memory
    instead, and a line says so; a `UserError` if they do not fit, once for each process of the machine.
    """
    counts = {name: part.files[name].rows for name in sizes}
    counts |= {name: part.files[name].lengths for name in shapes if part.files[name].lengths is not None}
    first = {name: rows.cumsum() - rows for name, rows in counts.items()}
    folder = _folder(root, name, part, sizes, shapes)
    arrays = _load(folder, part, sizes, shapes)
    if arrays is None:
        try:
            _make(folder, name, part, sizes, shapes)
        except OSError as error:
            from utils.distributed import local_processes  # late: importing PyTorch would slow preparation

            needed, free = local_processes() * pack_bytes(part, sizes, shapes), available_ram()
            if needed > free:
                raise UserError(
                    f"{root}: no pack written ({error.strerror}), and the clips take {gigabytes(needed)} of memory, "
                    f"of which {gigabytes(free)} are free; pass --cache none"
                ) from None
            print(f"{root}: no pack written ({error.strerror}); holding the clips in this process's memory instead")
            return Pack(_held(part, sizes, shapes), first, counts)
        arrays = _load(folder, part, sizes, shapes)
        if arrays is None:
            raise UserError(f"{folder}: unreadable right after it was written; delete it and run again")
    with suppress(OSError):  # marks it as in use; in a read-only folder packs are not deleted either
        os.utime(folder / "pack.json")
    return Pack(arrays, first, counts)


def is_packed(root: Path, name: str, part: Part, sizes: Sizes, shapes: Shapes) -> bool:
    """Whether a complete pack exists, so that `open_pack` would write nothing."""
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


def _layouts(part: Part, sizes: Sizes, shapes: Shapes) -> dict[str, Layout]:
    layouts = {}
    for name, size in sizes.items():
        files = part.files[name]
        layouts[name] = Layout(int(files.rows.sum()), (files.channels, *size), np.uint8)
    for name, shape in shapes.items():
        lengths = part.files[name].lengths
        ragged = lengths is not None
        layouts[name] = Layout(
            int(lengths.sum()) if ragged else len(part.clips), shape[1:] if ragged else shape, np.float32
        )
    return layouts


def _folder(root: Path, name: str, part: Part, sizes: Sizes, shapes: Shapes) -> Path:
    return root / ".pack" / f"{name}-{_key(part, sizes, shapes)}"


def _key(part: Part, sizes: Sizes, shapes: Shapes) -> str:
    frames = {name: part.files[name] for name in sorted(sizes)}
    rules = {name: (files.channels, files.picks, files.pick) for name, files in frames.items()}
    ragged = [name for name in sorted(shapes) if part.files[name].lengths is not None]
    digest = hashlib.sha256(f"{FORMAT} {SHARD} {sorted(sizes.items())} {rules} {sorted(shapes)} {ragged}".encode())
    modalities = [part.files[name] for name in sorted([*sizes, *shapes])]
    for i, clip in enumerate(part.clips):
        digest.update(clip.encode())
        for files in modalities:
            for path in files.paths(i):
                status = os.stat(path)
                digest.update(f"{os.path.basename(path)} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _shard(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}-{number:05d}.npy"


def _load(folder: Path, part: Part, sizes: Sizes, shapes: Shapes) -> dict[str, Rows] | None:
    """The arrays, None where they are missing or damaged (a file cut short by hand or a failing disk)."""
    if not (folder / "pack.json").exists():
        return None
    arrays = {}
    for name, layout in _layouts(part, sizes, shapes).items():
        shards = []
        for number, rows in enumerate(layout.shards):
            try:
                shard = np.load(_shard(folder, name, number), mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError):
                return None
            if shard.shape != (rows, *layout.row) or shard.dtype != layout.kind:
                return None
            shards.append(shard)
        arrays[name] = Rows(shards, layout.per_shard)
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
            _write(temporary, part, sizes, shapes)
            about = {"clips": len(part.clips), "sizes": sizes, "shapes": shapes, "format": FORMAT}
            (temporary / "pack.json").write_text(json.dumps(about))
        for old in packs.glob(f"{name}-*/pack.json"):
            # Not younger ones: another run may be about to open its own, of another split of the same clips.
            if time.time() - old.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(old.parent, ignore_errors=True)


class _Writer:
    """Appends rows to the shards of one modality, each opened when the one before it is full."""

    def __init__(self, folder: Path, name: str, layout: Layout):
        self.folder, self.name, self.layout = folder, name, layout
        self.left = list(layout.shards)[::-1]  # rows of the shards not opened yet, the next one last
        self.number, self.room = 0, 0
        self.file: BinaryIO | None = None

    def append(self, rows: np.ndarray) -> None:
        """Write rows (k, ...) in their order. Raises `OSError`."""
        while len(rows):
            file = self.file if self.file is not None and self.room else self._open()
            now = rows[: self.room]
            file.write(np.ascontiguousarray(now, dtype=self.layout.kind).data)
            self.room, rows = self.room - len(now), rows[len(now) :]

    def _open(self) -> BinaryIO:
        self.close()
        self.room = self.left.pop()
        self.file = file = open(_shard(self.folder, self.name, self.number), "wb")  # noqa: SIM115  (closed by `close`)
        descr = np.lib.format.dtype_to_descr(np.dtype(self.layout.kind))
        shape = (self.room, *self.layout.row)
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        self.number += 1
        return file

    def close(self) -> None:
        """Flush the open shard to disk."""
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None


def _write(folder: Path, part: Part, sizes: Sizes, shapes: Shapes) -> None:
    with ExitStack() as stack:
        writers = {name: _Writer(folder, name, layout) for name, layout in _layouts(part, sizes, shapes).items()}
        for writer in writers.values():
            stack.callback(writer.close)
        for rows in _decoded(part, sizes, shapes):
            for name, values in rows.items():
                writers[name].append(values)


def _held(part: Part, sizes: Sizes, shapes: Shapes) -> dict[str, Rows]:
    """The arrays in this process's memory."""
    layouts = _layouts(part, sizes, shapes)
    arrays = {name: np.empty((layout.rows, *layout.row), layout.kind) for name, layout in layouts.items()}
    filled = dict.fromkeys(arrays, 0)
    for rows in _decoded(part, sizes, shapes):
        for name, values in rows.items():
            arrays[name][filled[name] : filled[name] + len(values)] = values
            filled[name] += len(values)
    return {name: Rows([array], max(1, len(array))) for name, array in arrays.items()}


def _decoded(part: Part, sizes: Sizes, shapes: Shapes) -> Iterator[dict[str, np.ndarray]]:
    """The rows of each clip by modality, in the order of the clips."""

    def decode(i: int) -> dict[str, np.ndarray]:
        rows = {name: read_frames(part.files[name], i, size) for name, size in sizes.items()}
        for name, shape in shapes.items():
            files = part.files[name]
            if files.lengths is None:
                rows[name] = read_array(files[i], shape)[None]
            else:
                rows[name] = read_array(files[i], (int(files.lengths[i]), *shape[1:]))
        return rows

    # Threads suffice: OpenCV decodes outside Python's lock.
    threads = min(16, usable_cores())
    with ThreadPoolExecutor(threads) as pool:
        clips = in_order(pool, decode, range(len(part.clips)), 2 * threads)
        yield from over(clips, "pack clips", len(part.clips))


def read_frames(files: FrameFiles, clip: int, size: tuple[int, int]) -> np.ndarray:
    """The frames of a clip that can be fed, at `size`, (T, c, H, W) uint8."""
    frames = [fit(read_frame(Path(path))[..., : files.channels], size) for path in files.paths(clip)]
    return np.stack(frames).transpose(0, 3, 1, 2)


def in_order(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """`pool.map` with at most `ahead` items begun or waiting, so that memory does not grow with their number."""
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
