"""Files that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp-"  # what the name of an unfinished file or folder starts with


@contextmanager
def atomic_path(path: Path | str, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path` (same suffix) that replaces it, flushed to disk, when the block ends well.

    After an exception or a kill, `path` is what it was before; a leftover starts with `.tmp-`. `sync=False` leaves
    the flush to the system: for thousands of small files whose reader checks them anyway.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    os.chmod(name, 0o666 & ~_umask())
    temporary = Path(name)
    try:
        yield temporary
        if sync:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path` that takes its place when the block ends well.

    After an exception or a kill, `path` is what it was before or absent, never half new. A folder that is already
    there is replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
    os.chmod(temporary, 0o777 & ~_umask())
    old = temporary.with_name(temporary.name + "-old")
    try:
        yield temporary
        if path.exists():
            os.rename(path, old)  # rename cannot replace a folder that holds files
        os.rename(temporary, path)
    finally:
        for leftover in (temporary, old):
            if leftover.exists():
                shutil.rmtree(leftover)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
