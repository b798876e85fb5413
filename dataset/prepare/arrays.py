"""Array modalities (text features, embeddings, sensor data): one .npy file per clip, copied as float32."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dataset.inspect import LFS_HEADER, Problem, short
from dataset.specs import Modality
from utils.errors import UserError
from utils.files import atomic_path, remove_leftovers
from utils.progress import over

Source = Path | np.ndarray  # a .npy file, or the numbers themselves


def array_files(name: str, folder: Path | str, clips: list[str]) -> dict[str, Source]:
    """`<folder>/<clip>.npy` of each clip. Raises `UserError` if none of these files exists."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--arrays {name}={folder}: no such folder; give a folder of <clip>.npy")
    files: dict[str, Source] = {clip: folder / f"{clip}.npy" for clip in clips}
    if not any((folder / f"{clip}.npy").exists() for clip in clips):
        raise UserError(f"--arrays {name}={folder}: has none of the {len(clips):,} clips; expected {clips[0]}.npy, ...")
    return files


def write_arrays(
    out: Path, modality: Modality, sources: Mapping[str, Source], quiet: bool = False
) -> tuple[set[str], list[Problem]]:
    """Write `out/<folder>/<clip>.npy` as float32.

    Returns the clips written, and a problem for each clip without a usable array. Files that already have the right
    content are not rewritten, so a second run changes nothing.
    """
    folder = out / modality.folder
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    written, problems = set(), []
    for clip, source in over(sources.items(), modality.name, quiet=quiet):
        target = folder / f"{clip}.npy"
        values, reason = _read(source)
        if reason:
            target.unlink(missing_ok=True)  # it was made of something else
            kind = "missing_array" if reason == "no such file" else "bad_array"
            problems.append(Problem(kind, clip, str(source) if isinstance(source, Path) else "", reason, ""))
            continue
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(values, dtype=np.float32))
        data = buffer.getvalue()
        if not (target.exists() and target.stat().st_size == len(data) and target.read_bytes() == data):
            with atomic_path(target, sync=False) as temporary:
                temporary.write_bytes(data)
            written.add(clip)
    return written, problems


def kind_of(sources: Mapping[str, Source]) -> str:
    """Return "array" if all arrays have the same shape, "sequence" if arrays (L, D) differ only in their length L.

    Unreadable files are skipped here; `write_arrays` reports them.
    """
    shapes = {values.shape for source in sources.values() for values, reason in [_read(source)] if not reason}
    varied = len(shapes) > 1 and {len(shape) for shape in shapes} == {2} and len({shape[1] for shape in shapes}) == 1
    return "sequence" if varied else "array"


def _read(source: Source) -> tuple[np.ndarray, str]:
    """(values, '') or (nothing, reason)."""
    values = np.zeros(0, np.float32)
    if isinstance(source, np.ndarray):
        values = source
    else:
        try:
            data = source.read_bytes()
        except FileNotFoundError:
            return values, "no such file"
        except OSError as error:
            return values, f"cannot be read ({error.strerror})"
        if not data or data.startswith(LFS_HEADER):
            return values, "git-lfs pointer; run git lfs pull" if data else "empty file; get it again"
        try:
            values = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            return values, f"not a .npy file ({short(error)})"
        if not isinstance(values, np.ndarray):
            return np.zeros(0, np.float32), "an archive (.npz), not a .npy file"
    if values.dtype.kind not in "fiub":
        return values, f"array of type {values.dtype}; real numbers are needed"
    if values.ndim not in (1, 2) or 0 in values.shape:
        return values, f"array of shape {values.shape}; (D,), (F, W) or (L, D) is needed"
    if not np.isfinite(values).all() or (np.abs(values) > np.finfo(np.float32).max).any():
        return values, "NaN or infinity in it; make it again"
    return values, ""
