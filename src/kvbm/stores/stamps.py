"""Whether files are still those that a process read when it began: every file, link and folder on the way to them.

A process that writes a file, or puts another in its place by name or by link, leaves a new inode or a new ctime, which
nobody can set back. So what had the same stamps before the process began and after its files were digested was the same
meanwhile.
"""

from __future__ import annotations

import ctypes
import json
import os
import stat
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from kvbm.core.errors import Broken
from kvbm.stores.disk.files import opened, write_all

_MOST_LINKS: Final = 40
_MOST_ENTRIES: Final = 100_000
_TICK_NS: Final = 10_000_000
"""What the kernel's clock for files may be behind: a tick of the slowest kernels."""
_COARSE: Final = 5
"""CLOCK_REALTIME_COARSE."""
_SKEW_NS: Final = 300 * 1_000_000_000
"""What another machine's clock, which stamps files on network file systems, may be off."""
# Not squashfs and erofs, whose images keep no ctime: two of one layout may have all times, sizes and inodes alike.
_LASTING: Final = frozenset(
    {
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # xfs
        0x9123683E,  # btrfs
        0xF2F52010,  # f2fs
        0x2FC12FC1,  # zfs
        0xCA451A4E,  # bcachefs
    }
)
# What is written through a mapping gets no new time on the first two, and the third may lie over anything.
_LOCAL: Final = _LASTING | {
    0x01021994,  # tmpfs
    0x858458F6,  # ramfs
    0x794C7630,  # overlay
}
_libc = ctypes.CDLL(None, use_errno=True)


class Changed(Broken):
    """Files are not those that were read, or nobody can say."""


class Stamp(NamedTuple):
    """What `lstat` says of a file ("f"), link ("l"), folder ("d") or anything else ("?"). Times in nanoseconds."""

    kind: str
    device: int
    inode: int
    size: int
    mtime: int
    ctime: int

    @staticmethod
    def of(status: os.stat_result) -> Stamp:
        mode = status.st_mode
        kind = "f" if stat.S_ISREG(mode) else "l" if stat.S_ISLNK(mode) else "d" if stat.S_ISDIR(mode) else "?"
        size = 0 if kind == "d" else status.st_size
        return Stamp(kind, status.st_dev, status.st_ino, size, status.st_mtime_ns, status.st_ctime_ns)

    @property
    def by_kernel(self) -> bool:
        """Whether its ctime seems to be a kernel's. What makes an image of a file system writes whole seconds, of its
        choice, and gives files of one layout the same inodes: two images are alike."""
        return self.ctime % 1_000_000_000 != 0

    def replaced_by(self, other: Stamp, *, entries: bool = True) -> bool:
        """Whether what is there now is something else. Of a folder on the way (not `entries`) what is in it does not
        matter, but what it is does: who is renamed has a ctime that is not its mtime."""
        if self.kind == other.kind == "d" and not entries:
            same = (self.device, self.inode) == (other.device, other.inode)
            return not same or (self.ctime != other.ctime and other.ctime != other.mtime)
        return self != other

    def younger(self, then: int, *, entries: bool = True) -> bool:
        """Whether it has been changed, or put here, since `then` (nanoseconds, by `now`)."""
        if self.kind == "d" and not entries and self.ctime == self.mtime:
            return False
        return self.ctime >= then


def absolute(path: str) -> str:
    """From the root on, and not shorter than it is: behind a link `..` leads where the link leads."""
    return path if os.path.isabs(path) else os.path.join(os.getcwd(), path)


def survey(paths: Iterable[str]) -> dict[str, Stamp]:
    """The stamps of all that is on the way to these, themselves included: folders, links and where they lead. Raises
    OSError."""
    found: dict[str, Stamp] = {}
    for path in paths:
        _walk(path, found)
    return found


def ends(path: str, found: Mapping[str, Stamp]) -> str:
    """Where a surveyed path leads."""
    return _walk(path, dict(found))


def _walk(path: str, found: dict[str, Stamp]) -> str:
    at, left, followed = "/", deque(absolute(path).split("/")), 0
    while left:
        part = left.popleft()
        if part in ("", "."):
            continue
        if part == "..":
            at = os.path.dirname(at)
            continue
        at = os.path.join(at, part)
        if (mark := found.get(at)) is None:
            mark = found[at] = Stamp.of(os.lstat(at))
        if mark.kind == "l":
            followed += 1
            if followed > _MOST_LINKS:
                raise OSError(f"too many links on the way to {path}")
            target = os.readlink(at)
            left.extendleft(reversed(target.split("/")))
            at = "/" if target.startswith("/") else os.path.dirname(at)
    return at


@dataclass(frozen=True, slots=True)
class Start:
    """What was known before an engine's process began: when that was, and where `kvbm serve` started it, what was
    there. `folders` are those all of whose entries `seen` has."""

    then: int
    """Nanoseconds since 1970; 0: unknown."""
    seen: Mapping[str, Stamp] = field(default_factory=dict)
    folders: tuple[str, ...] = ()

    def check(self, there: Mapping[str, Stamp], folders: Iterable[str]) -> None:
        """Raises Changed unless what is there now is what was there then. What is in `folders` decided which files
        were read: they may have got or lost nothing."""
        strict = set(folders)
        far: dict[int, bool] = {}
        for path, mark in there.items():
            entries = mark.kind != "d" or path in strict
            if (before := self.seen.get(path)) is not None:
                if before.replaced_by(mark, entries=entries):
                    raise Changed(f"{path} was changed or replaced after `kvbm serve` began")
                continue
            if any(path.startswith(f"{folder}/") for folder in self.folders):
                raise Changed(f"{path} was not there when `kvbm serve` began")
            if not self.then:
                raise Changed("nobody knows when the engine's process began")
            if mark.device not in far:
                far[mark.device] = not local(path if mark.kind != "l" else os.path.dirname(path))
            if mark.younger(self.then - far[mark.device] * _SKEW_NS, entries=entries):
                what = "an entry of it was changed, or " if mark.kind == "d" and entries else ""
                raise Changed(
                    f"{path} is not older than the process that loaded the weights ({what}it was changed or replaced)"
                    + (": on a network file system five minutes are wanted" if far[mark.device] else "")
                )


def local(path: str) -> bool:
    """Whether a path lies on a file system that no other machine can change, so that what it says of a file is so."""
    return _kind(path) in _LOCAL


def lasting(path: str) -> bool:
    """Whether, besides, a file there that has the same stamp as at any time before has the same content."""
    return _kind(path) in _LASTING


def _kind(path: str) -> int:
    """A file system's magic number; 0: unknown."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        return 0
    return int.from_bytes(buffer.raw[: ctypes.sizeof(ctypes.c_long)], "little") & 0xFFFFFFFF


def process_start() -> int:
    """When this process began, in nanoseconds since 1970, rather too early than too late; 0: unknown."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0
    boot = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return boot + ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK") - _TICK_NS


def now() -> int:
    """The time by the clock that stamps files: what is changed from now on has this ctime or a later one."""
    return time.clock_gettime_ns(_COARSE)


# ---------------------------------------------------------------------- from `kvbm serve` to its engine


def record(paths: Iterable[str], file: Path) -> None:
    """Write down what is on the way to these and, of folders, in them. Raises OSError."""
    folders: list[str] = []
    found: dict[str, Stamp] = {}
    for path in paths:
        end = _walk(path, found)
        if found[end].kind != "d":
            _walk(os.path.dirname(end), found)
            continue
        folders.append(end)
        for folder, names, files in os.walk(end):
            for name in (*names, *files):
                if len(found) < _MOST_ENTRIES:
                    try:
                        _walk(os.path.join(folder, name), found)
                    except FileNotFoundError:  # a link that leads nowhere
                        continue
        if len(found) >= _MOST_ENTRIES:
            return
    file.unlink(missing_ok=True)
    descriptor = opened(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        write_all(descriptor, json.dumps({"folders": folders, "seen": found}).encode(), 0)
    finally:
        os.close(descriptor)


def recorded(file: Path | None, then: int) -> Start:
    """What `record` wrote, or where there is nothing (of ours alone) only the time."""
    if file is None:
        return Start(then)
    try:
        with open(opened(file, os.O_RDONLY), "rb") as opened_file:
            status = os.fstat(opened_file.fileno())
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                return Start(then)
            content = json.load(opened_file)
        seen = {str(path): Stamp(str(kind), *map(int, rest)) for path, (kind, *rest) in content["seen"].items()}
        return Start(then, seen, tuple(map(str, content["folders"])))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return Start(then)
