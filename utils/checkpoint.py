"""Checkpoints: written whole or not at all, read without running code, the official repository's included."""

import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from utils.errors import UserError
from utils.files import atomic_path, writing


def save_checkpoint(path: Path, state: dict, sync: bool = True) -> None:
    """Write `state` (tensors, numbers, strings, dicts, lists) to `path` atomically, flushed to disk with `sync`.

    Raises `UserError` naming the disk where there is no room; `path` is then what it was before.
    """
    # Through a file of ours: PyTorch's own does not say why a write failed.
    with writing(path, "continue with --resume"), atomic_path(path, sync) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)


def load_checkpoint(path: Path | str, mapped: bool = False) -> dict:
    """Read a checkpoint onto the CPU with `weights_only=True`. Raises `UserError` for what is missing or not one.

    With `mapped` tensors are read when they are used: for a look at what else is in it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give a .pth file, such as runs/NAME/best.pth")
    _refuse_bomb(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except Exception as error:  # torch raises a dozen types here, all of which mean the same to the user
        # Their own words advise to read it unsafely, and change from version to version.
        unsafe = "weights only" in str(error).lower() and "unsupported operand" not in str(error).lower()
        reason = "it holds more than tensors and plain values" if unsafe else "damaged, or no checkpoint at all"
        raise UserError(f"{path}: not a checkpoint that is safe to read ({reason}); use another one") from None
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{path}: no `model` entry; expected a checkpoint of this project or of the official code")
    return state


def _refuse_bomb(path: Path) -> None:
    """Raise `UserError` if `path` is an archive that unpacks to more than it is: PyTorch never compresses."""
    with suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
        unpacked, size = sum(entry.file_size for entry in archive.infolist()), path.stat().st_size
        if unpacked > size:
            raise UserError(f"{path}: unpacks to {unpacked:,} bytes from {size:,}; no checkpoint does, do not trust it")
