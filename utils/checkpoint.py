"""Checkpoint files: atomic writes, and safe reading (`weights_only`), including those of the official code."""

import argparse
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import atomic_path, writing


def save_checkpoint(path: Path, state: dict, sync: bool = True) -> None:
    """Write `state` (tensors, numbers, strings, dicts, lists) to `path` atomically, flushed to disk with `sync`.

    Raises `UserError` that names the disk if it is full; `path` is then unchanged.
    """
    # Through a file of ours: PyTorch's own does not say why a write failed.
    with writing(path, "continue with --resume"), atomic_path(path, sync) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)


def load_checkpoint(path: Path | str, mapped: bool = False) -> dict:
    """Read a checkpoint onto the CPU with `weights_only=True`. Raises `UserError` for what is missing or not one.

    With `mapped` tensors are read when they are used: for a look at what else is in it.
    """
    state = _read(Path(path), mapped)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{path}: no `model` entry; expected a checkpoint of this project or of the official code")
    return state


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict]:
    """The weights in a file, and the metadata of a checkpoint of this project (`classes`, `config`).

    A state dict, bare or inside a checkpoint as timm, torchvision or this project write them, or a .safetensors file
    (read where the package is installed). Raises `UserError` for what is missing or holds no weights.
    """
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file():
        return _read_safetensors(path), {}
    with torch.serialization.safe_globals([argparse.Namespace]):  # timm keeps its flags in one
        state = _read(path, False, "give a .pth or .safetensors file")
    keys = ("state_dict_ema", "model_ema", "state_dict", "model")  # averaged weights first, as timm does
    inside = next((state[key] for key in keys if isinstance(state, dict) and isinstance(state.get(key), dict)), state)
    if not isinstance(inside, dict) or not inside or not all(isinstance(value, Tensor) for value in inside.values()):
        raise UserError(f"{path}: holds no weights; expected a state dict of torchvision or timm, or a checkpoint")
    return inside, {} if inside is state else state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path}: the package safetensors is not installed; pip install safetensors") from None
    try:
        return load_file(path)
    except (SafetensorError, ValueError):
        raise UserError(f"{path}: damaged, or no .safetensors file; use another one") from None


def _read(path: Path, mapped: bool, advice: str = "give a .pth file, such as runs/NAME/best.pth") -> Any:
    """Load a file of `torch.save` on the CPU. Raises `UserError`."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; {advice}")
    _refuse_bomb(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except Exception as error:  # torch raises a dozen types here, all of which mean the same to the user
        # Their own words advise to read it unsafely, and change from version to version.
        unsafe = "weights only" in str(error).lower() and "unsupported operand" not in str(error).lower()
        reason = "it holds more than tensors and plain values" if unsafe else "damaged, or no checkpoint at all"
        raise UserError(f"{path}: not a checkpoint that is safe to read ({reason}); use another one") from None


def _refuse_bomb(path: Path) -> None:
    """Raise `UserError` if `path` is an archive that unpacks to more than it is: PyTorch never compresses."""
    with suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
        unpacked, size = sum(entry.file_size for entry in archive.infolist()), path.stat().st_size
        if unpacked > size:
            raise UserError(f"{path}: unpacks to {unpacked:,} bytes from {size:,}; no checkpoint does, do not trust it")
