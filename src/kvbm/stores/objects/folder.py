"""Objects as files below a folder of any mounted file system that many machines share.

A file is written under a name of its own beside the final one and renamed: `rename` publishes, `unlink` frees, and
neither needs a lock. No link, no `RENAME_NOREPLACE`, no mapping: file systems that are mounted over a network lack or
break one or the other. Nothing is synchronised to the medium: checksums find what a crash has torn.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from typing_extensions import Buffer

from kvbm.abc.store import Absent, Denied, Full, Listed, ObjectStore
from kvbm.core.errors import Broken

_FLAGS: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""A link is not followed, and a FIFO does not block whoever opens it."""
_PAGE: Final = 1_000
_TEMPORARY: Final = ".part-"


class FolderStore(ObjectStore):
    """Below `folder`, which is made where it is missing, if its parent is there. Files are of `mode`, folders of the
    same with a right to enter for each right to read.

    A call may hang as long as the mount does.
    """

    def __init__(self, folder: Path, *, mode: int = 0o600) -> None:
        self._folder, self._mode = folder, mode
        self._folder_mode = mode | (mode & 0o444) >> 2
        self._below = _below(folder)

    def check(self) -> None:
        """Raises Broken where there is no such folder."""
        if not self._folder.is_dir():
            what = "is no folder" if self._folder.exists() else "does not exist"
            raise Broken(f"{self._folder} {what}")

    def put(self, name: str, data: Buffer) -> bool:
        return self._put(name, data, self._publish)

    def claim(self, name: str, data: Buffer) -> bool:
        return self._put(name, data, self._write)

    def _put(self, name: str, data: Buffer, write: Callable[[Path, Buffer], None]) -> bool:
        path = self._folder / name
        with _said(name):
            try:
                try:
                    write(path, data)
                except FileNotFoundError:
                    self._make(path.parent)
                    write(path, data)
            except FileExistsError:
                return False
            return True

    def _publish(self, path: Path, data: Buffer) -> None:
        if os.path.lexists(path):
            raise FileExistsError
        temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
        try:
            self._write(temporary, data)
            os.rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise

    def _write(self, path: Path, data: Buffer) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, self._mode)
        try:
            if os.fstat(descriptor).st_dev == self._below:
                os.unlink(path)
                raise OSError(errno.ENODEV, "nothing is mounted there any more")
            os.fchmod(descriptor, self._mode)  # whatever the process masks
            left = memoryview(data).cast("B")
            while left:
                left = left[os.write(descriptor, left) :]
        finally:
            os.close(descriptor)  # some file systems say only now that there is no room

    def _make(self, folder: Path) -> None:
        """The folders down to this one, each with its mode whatever the process masks."""
        if folder != self._folder:
            self._make(folder.parent)
        elif not folder.parent.exists():
            raise Broken(f"there is no folder {folder.parent}, in which KVBM would make {folder.name}")
        with suppress(FileExistsError):
            folder.mkdir(self._folder_mode)
            os.chmod(folder, self._folder_mode)

    def get(self, name: str) -> Buffer:
        return self._read(name, 0, None)

    def get_range(self, name: str, start: int, length: int) -> Buffer:
        return self._read(name, start, length)

    def _read(self, name: str, start: int, length: int | None) -> bytearray:
        with self._opened(name) as (descriptor, found):
            end = found.st_size if length is None else min(found.st_size, start + length)
            into = bytearray(max(0, end - start))
            left = memoryview(into)
            while left:
                got = os.preadv(descriptor, [left], end - len(left))
                if not got:  # cut meanwhile
                    return into[: len(into) - len(left)]
                left = left[got:]
            return into

    @contextmanager
    def _opened(self, name: str) -> Iterator[tuple[int, os.stat_result]]:
        """An ordinary file, open to be read. Raises Absent."""
        with _said(name):
            try:
                descriptor = os.open(self._folder / name, os.O_RDONLY | _FLAGS)
            except OSError as error:
                # A link, a socket, a device without a driver, or a file of somebody who keeps it to himself.
                if error.errno in (errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EACCES):
                    raise Absent(f"{name}: {error.strerror}") from None
                raise
            try:
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode):
                    raise Absent(f"{name} is no ordinary file")
                yield descriptor, found
            finally:
                os.close(descriptor)

    def list(self, prefix: str) -> Iterator[Sequence[Listed]]:
        page: list[Listed] = []
        with _said(prefix or "the folder"):
            for each in self._walk(self._folder / prefix, prefix):
                page.append(each)
                if len(page) == _PAGE:
                    yield page
                    page = []
        if page:
            yield page

    def _walk(self, folder: Path, prefix: str) -> Iterator[Listed]:
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(folder / entry.name, f"{prefix}{entry.name}/")
            elif entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):  # gone meanwhile
                    stat_ = entry.stat(follow_symlinks=False)
                    yield Listed(prefix + entry.name, stat_.st_size, stat_.st_mtime)

    def stat(self, name: str) -> Listed:
        with self._opened(name) as (_, found):
            return Listed(name, found.st_size, found.st_mtime)

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            path = self._folder / name
            with _said(name), suppress(FileNotFoundError):
                if stat.S_ISREG(os.lstat(path).st_mode):
                    os.unlink(path)

    def close(self) -> None:
        """Nothing is open between calls."""


def is_temporary(name: str) -> bool:
    """Whether a file of this name is being written, or was when its writer was killed."""
    return name.rpartition("/")[2].startswith(_TEMPORARY)


def _below(folder: Path) -> int | None:
    """The device that would be written to if what is mounted at or above this folder were not; None: nothing is."""
    there = folder.absolute()
    while not there.is_dir():
        there = there.parent
    while there != there.parent:
        if (device := there.parent.stat().st_dev) != there.stat().st_dev:
            return device
        there = there.parent
    return None


@contextmanager
def _said(what: str) -> Iterator[None]:
    """What the system says, in our words."""
    try:
        yield
    except FileNotFoundError:
        raise Absent(f"there is no {what}") from None
    except OSError as error:
        kind = Denied if isinstance(error, PermissionError) or error.errno == errno.EROFS else Broken
        kind = Full if error.errno in (errno.ENOSPC, errno.EDQUOT) else kind
        raise kind(f"{what}: {error.strerror or error}") from None
