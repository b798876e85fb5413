"""Atomic files and folders, locks, and error messages for failed writes."""

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from utils.errors import UserError

TEMPORARY = ".tmp-"  # what the name of an unfinished file or folder starts with
UMASK = os.umask(0)  # asked for once: for the moment of asking, files of any other thread would be open to all
os.umask(UMASK)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(path: Path | str, go_on: str = "run the same command again") -> Iterator[None]:
    """Convert an `OSError` while writing `path` into a `UserError` that names the file, the disk and its free space.

    `go_on` says how to continue once there is space. PyTorch reports a full disk as a `RuntimeError` with the `OSError`
    as its context; this is handled as well.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None or cause.errno is None:
            raise
        raise UserError(_refusal(Path(path), cause, go_on)) from None


def _refusal(path: Path, error: OSError, go_on: str) -> str:
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    mount = folder.resolve()
    while not os.path.ismount(mount):
        mount = mount.parent
    free = shutil.disk_usage(mount).free
    room = f"{free / 2**20:,.0f} MB free" if free >= 2**20 else f"{free / 2**10:,.0f} kB free"
    advice = "free some room" if error.errno in NO_ROOM else "make it writable"
    if error.errno == errno.EFBIG:
        advice = "the process may not write files so large: raise ulimit -f"
    elif error.errno == errno.EDQUOT:
        advice = "the quota is used up: free some room"
    return f"{path}: cannot be written ({error.strerror}; disk {mount}, {room}); {advice} and {go_on}"


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of a killed process in `folder`. No other process may be writing there."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path | str, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `path` (same suffix). It is flushed and replaces `path` if the block succeeds.

    After an exception or a kill, `path` is unchanged; leftovers start with `.tmp-`. `sync=False` leaves the flush to
    the system: for thousands of small files whose reader checks them anyway.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    os.chmod(name, 0o666 & ~UMASK)
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
    """Yield an empty temporary folder next to `path`. It replaces `path` if the block succeeds.

    After an exception or a kill, `path` is unchanged or absent, never incomplete. An existing folder is replaced. The
    temporary names depend only on `path`, so the next call removes the leftovers of a killed one. The caller must
    ensure, with `locked`, that no other process makes the same folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.with_name(f"{TEMPORARY}{word}-{path.name}") for word in ("new", "old"))
    try:
        _remove_folders(new, old)
        new.mkdir()
        yield new
        if path.exists():
            os.rename(path, old)  # rename cannot replace a folder that holds files
        os.rename(new, path)
    finally:
        _remove_folders(new, old)


def _remove_folders(*folders: Path) -> None:
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)


class Busy(Exception):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path | str, waiting: str | None = None) -> Iterator[None]:
    """Hold the lock file `path` during the block. The lock ends with the process, also when that is killed.

    While another process holds it, print `waiting` on standard error and wait; without `waiting`, raise `Busy`. Raises
    `OSError` where the file cannot be made or its file system has no locks.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except NotImplementedError:
        raise OSError(errno.ENOSYS, "no file locks on this file system", str(path)) from None
    except Timeout:
        if waiting is None:
            raise Busy(str(path)) from None
        print(waiting, file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
