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
from functools import cached_property
from pathlib import Path
from typing import Final

from typing_extensions import Buffer

from kvbm.abc.store import MOST_BYTES, Absent, Damaged, Denied, Full, Listed, ObjectStore
from kvbm.core.errors import Broken

_FLAGS: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""A link is not followed, and opening a FIFO does not block."""
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_PARENT: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
"""What may be entered, and need not be readable."""
_NOTHING_THERE: Final = (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ENODEV, errno.EACCES)
"""What is said of a link, a file where a folder should be, a socket, a device without a driver, somebody's own file."""
_ATTEMPTS: Final = 3
_DEEP: Final = 100
"""Folders below each other, as many as a name of 200 characters has."""
_PAGE: Final = 1_000
_TEMPORARY: Final = ".part-"


class FolderStore(ObjectStore):
    """Below `folder`, which is made where it is missing, if its parent is there. Files are of `mode`, folders of the
    same with a right to enter for each right to read.

    A call may hang as long as the mount does.
    """

    def __init__(self, folder: Path, *, mode: int = 0o600) -> None:
        """Touches nothing."""
        self._folder, self._mode = folder, mode
        self._folder_mode = mode | (mode & 0o444) >> 2

    @cached_property
    def _below(self) -> int | None:
        """The device that would be written to if what is mounted at or above the folder were not; None: nothing is."""
        there = self._folder.absolute()
        while not there.is_dir():
            there = there.parent
        while there != there.parent:
            if (device := there.parent.stat().st_dev) != there.stat().st_dev:
                return device
            there = there.parent
        return None

    def check(self) -> None:
        """Raises Broken where there is no such folder."""
        with _said(f"folder {self._folder}"):
            os.close(os.open(self._folder, _DIRECTORY))

    @contextmanager
    def _within(self, name: str) -> Iterator[tuple[int, str]]:
        """The open folder in which this file lies, reached by folders and no links, and its name there."""
        *parts, last = name.split("/")
        descriptor = os.open(self._folder, _DIRECTORY)
        try:
            for part in parts:
                try:
                    deeper = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
                except OSError as error:
                    if error.errno == errno.ELOOP:
                        raise NotADirectoryError(errno.ENOTDIR, "a link is where a folder should be") from None
                    raise
                os.close(descriptor)
                descriptor = deeper
            yield descriptor, last
        finally:
            os.close(descriptor)

    def put(self, name: str, data: Buffer) -> bool:
        return self._put(name, data, self._publish)

    def claim(self, name: str, data: Buffer) -> bool:
        return self._put(name, data, self._write)

    def _put(self, name: str, data: Buffer, write: Callable[[int, str, Buffer], None]) -> bool:
        with _said(name):
            _ = self._below  # before anything is made
            for attempt in range(_ATTEMPTS):
                try:
                    if attempt:
                        self._make(name)
                    with self._within(name) as (folder, last):
                        write(folder, last, data)
                    return True
                except FileExistsError:
                    return False
                except NotADirectoryError:  # a link or a file is where one of our folders should be
                    if self._folder.is_dir():
                        return False
                    raise
                except OSError as error:  # another instance may delete a folder that is empty
                    if error.errno not in (errno.ENOENT, errno.ESTALE):
                        raise
            raise Broken(f"{name}: its folder cannot be made, or is deleted again and again")

    def _publish(self, folder: int, name: str, data: Buffer) -> None:
        with suppress(FileNotFoundError):
            os.lstat(name, dir_fd=folder)
            raise FileExistsError
        temporary = f"{_TEMPORARY}{secrets.token_hex(8)}"
        try:
            self._write(folder, temporary, data)
            os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise

    def _write(self, folder: int, name: str, data: Buffer) -> None:
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, self._mode, dir_fd=folder)
        try:
            if os.fstat(descriptor).st_dev == self._below:
                os.unlink(name, dir_fd=folder)
                raise OSError(errno.ENODEV, "nothing is mounted there any more")
            os.fchmod(descriptor, self._mode)  # whatever the process masks
            left = memoryview(data).cast("B")
            while left:
                left = left[os.write(descriptor, left) :]
        finally:
            os.close(descriptor)  # some file systems say only now that there is no room

    def _make(self, name: str) -> None:
        """The folders down to this file, each with its mode whatever the process masks."""
        if not self._folder.parent.exists():
            raise Broken(f"there is no folder {self._folder.parent}, in which KVBM would make {self._folder.name}")
        descriptor = os.open(self._folder.parent, _PARENT)
        try:
            for part, follow in [(self._folder.name, 0), *((part, os.O_NOFOLLOW) for part in name.split("/")[:-1])]:
                made = True
                try:
                    os.mkdir(part, self._folder_mode, dir_fd=descriptor)
                except FileExistsError:
                    made = False
                deeper = os.open(part, _DIRECTORY | follow, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = deeper
                if made:  # a folder that passes its group on goes on doing so
                    os.fchmod(descriptor, self._folder_mode | (os.fstat(descriptor).st_mode & stat.S_ISGID))
        finally:
            os.close(descriptor)

    def get(self, name: str, most: int = MOST_BYTES) -> Buffer:
        return self._read(name, 0, None, most)

    def get_range(self, name: str, start: int, length: int) -> Buffer:
        return self._read(name, start, length, length)

    def _read(self, name: str, start: int, length: int | None, most: int) -> bytearray:
        with self._opened(name) as (descriptor, found):
            end = found.st_size if length is None else min(found.st_size, start + length)
            if end - start > most:
                raise Damaged(f"it has {end - start} bytes")
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
                with self._within(name) as (folder, last):
                    descriptor = os.open(last, os.O_RDONLY | _FLAGS, dir_fd=folder)
            except OSError as error:
                if error.errno in _NOTHING_THERE:
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
            for each in self._walk(prefix):
                page.append(each)
                if len(page) == _PAGE:
                    yield page
                    page = []
        if page:
            yield page

    def _walk(self, prefix: str, depth: int = 0) -> Iterator[Listed]:
        """Files below it, but for what lies deeper than any of ours, and what may not be entered."""
        try:
            with self._within(prefix) as (folder, _), os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
                files = [*self._files(prefix, entries)]
                folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except (FileNotFoundError, NotADirectoryError):
            return
        except PermissionError:
            if not depth:
                raise
            return
        yield from files
        for name in folders if depth < _DEEP else ():
            yield from self._walk(f"{prefix}{name}/", depth + 1)

    @staticmethod
    def _files(prefix: str, entries: Sequence[os.DirEntry[str]]) -> Iterator[Listed]:
        for entry in entries:
            with suppress(FileNotFoundError):  # gone meanwhile
                if entry.is_file(follow_symlinks=False):
                    found = entry.stat(follow_symlinks=False)
                    yield Listed(prefix + entry.name, found.st_size, found.st_mtime)

    def stat(self, name: str) -> Listed:
        with self._opened(name) as (_, found):
            return Listed(name, found.st_size, found.st_mtime)

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            with _said(name), suppress(FileNotFoundError, NotADirectoryError), self._within(name) as (folder, last):
                if stat.S_ISREG(os.lstat(last, dir_fd=folder).st_mode):
                    os.unlink(last, dir_fd=folder)
        for parent in dict.fromkeys(name.rpartition("/")[0] for name in names):
            with suppress(OSError), self._within(parent) as (folder, last):
                os.rmdir(last, dir_fd=folder)  # where it is empty now

    def close(self) -> None:
        """Nothing is open between calls."""


def is_temporary(name: str) -> bool:
    """Whether a file of this name is being written, or was when its writer was killed."""
    return name.rpartition("/")[2].startswith(_TEMPORARY)


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
