"""Files of the disk tier: reserved, replaced and written whole, and errors that say what to do."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvbm.core.errors import Broken
from kvbm.native import run_io

logger = logging.getLogger(__name__)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

_REMEDIES: Final = {
    errno.ENOSPC: "Free some space there, or give the disk tier less.",
    errno.EDQUOT: "The quota is used up: give the disk tier less.",
    errno.EROFS: "The file system is mounted read-only.",
    errno.EACCES: "This user may not do that: check the owner and the permissions.",
    errno.EPERM: "This user may not do that: check the owner and the permissions.",
    errno.EIO: "The disk reports errors: look into the kernel's log.",
}


@contextmanager
def reported(what: str) -> Iterator[None]:
    """Turn an operating system's error into `Broken`: "disk tier: cannot `what`: why"."""
    try:
        yield
    except OSError as error:
        remedy = f" {_REMEDIES[error.errno]}" if error.errno in _REMEDIES else ""
        raise Broken(f"disk tier: cannot {what}: {error.strerror or error}.{remedy}") from error


def opened(path: Path, flags: int) -> int:
    """An open file that no child process inherits and nobody else may read; made where `flags` say so."""
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def reserve(fd: int, size: int, *, zerofill: bool = False) -> None:
    """Give a file exactly `size` bytes, the new ones zero and their space taken now.

    A file system that cannot take space without writing gets zeros if `zerofill` is set; else the file is sparse,
    with a warning. If there is no room the file is as it was.

    Raises:
        OSError: no room, or anything else that files do.
    """
    old = os.fstat(fd).st_size
    if old > size:
        os.ftruncate(fd, size)
        return
    try:
        # The C library's posix_fallocate would write a byte into every block where the file system cannot do it.
        if _libc.fallocate(fd, 0, 0, size) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(code, os.strerror(code))
        if zerofill:
            zeros = bytes(1 << 20)
            for offset in range(old, size, len(zeros)):
                write_all(fd, zeros[: size - offset], offset)
        elif old < size:
            os.ftruncate(fd, size)
            logger.warning("disk tier: this file system cannot reserve space: it may run out of it later")
    except OSError:
        with suppress(OSError):
            os.ftruncate(fd, old)
        raise


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data)
    while view:
        if not (written := os.pwrite(fd, view, offset)):
            raise OSError(errno.EIO, "nothing was written")
        view, offset = view[written:], offset + written


def write_rows(fd: int, rows: npt.NDArray[Any], numbers: npt.NDArray[np.int64], start: int) -> None:
    """Write rows of a table that begins at `start`, by their numbers, which ascend; what is adjacent goes at once."""
    if not len(rows):
        return
    rows, size = np.ascontiguousarray(rows), rows.itemsize
    first = np.append(np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 2) != 1), len(rows))
    lengths = np.diff(first) * size
    segments = np.stack((rows.ctypes.data + first[:-1] * size, lengths), axis=1).ravel()
    results, control = np.zeros(len(lengths), dtype=np.int64), np.zeros(2, dtype=np.int64)
    run_io(fd, True, start + numbers[first[:-1]] * size, np.arange(len(first)), segments, results, control)
    if (wrong := results[results != lengths]).size:
        code = max(-int(wrong[0]), 0) or errno.EIO
        raise OSError(code, os.strerror(code))


def read_up_to(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset` on as far as the file goes; returns how far."""
    filled = 0
    while filled < len(buffer) and (count := os.preadv(fd, [buffer[filled:]], offset + filled)):
        filled += count
    return filled


def replace(path: Path, data: bytes) -> None:
    """Give a file new contents such that after a crash, too, it has either the old or the new ones."""
    new = path.with_name(path.name + ".new")
    fd = opened(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        write_all(fd, data, 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(new, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make what was created, renamed and deleted in a folder survive a loss of power."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def allocated(path: Path) -> int:
    """Bytes of disk that a folder's files take."""
    return sum(file.stat().st_blocks * 512 for file in path.rglob("*") if not file.is_symlink() and file.is_file())
