"""One process at a time may use a folder, and the others can say which one it is."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from kvbm.core.errors import Broken, Busy
from kvbm.stores.disk.files import opened, reported, write_all

NAME: Final = "lock"
_ATTEMPTS: Final = 5
_PAUSE_S: Final = 0.02
"""`holder_of` has the lock for a moment; that is not somebody else."""


@final
class Lock:
    """A folder's lock, held until `release` or the end of the process, however that comes.

    The file says who has it. A child process that is forked lets go of its copy at once, so that it cannot keep the
    lock of a parent that died. Threads: any, one at a time.
    """

    def __init__(self, folder: Path, engine: str) -> None:
        """Take the lock of `folder` for the engine of that name.

        Raises:
            Busy: a living process has it.
            Broken: the file cannot be used.
        """
        self._path = folder / NAME
        self._engine = engine
        self._fd: int | None = None
        self.take()
        _locks.add(self)

    def take(self) -> None:
        """Take the lock again if its file was deleted; nothing if it is still held. Raises as the constructor."""
        with reported(f"lock {self._path}"):
            if self._held():
                return
            self.release()
            fd = opened(self._path, os.O_RDWR | os.O_CREAT)
            try:
                if not _flock(fd, fcntl.LOCK_EX):
                    raise Busy(f"disk tier: {self._path.parent} is in use by {_who(_read(fd))}")
                about = {
                    "pid": os.getpid(),
                    "engine": self._engine,
                    "host": socket.gethostname(),
                    "since": time.time(),
                }
                os.ftruncate(fd, 0)
                write_all(fd, json.dumps(about).encode(), 0)
            except BaseException:
                os.close(fd)
                raise
            self._fd = fd
            if not self._held():
                raise Broken(f"disk tier: {self._path} was deleted while it was being locked")

    def release(self) -> None:
        """Let go. May be called again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _held(self) -> bool:
        """Whether the lock that is held is the one that others find."""
        try:
            return self._fd is not None and os.path.samestat(os.fstat(self._fd), os.stat(self._path))
        except FileNotFoundError:
            return False


_locks = weakref.WeakSet[Lock]()


def _let_go() -> None:
    for lock in _locks:
        lock.release()


os.register_at_fork(after_in_child=_let_go)


@dataclass(frozen=True, slots=True)
class LockHolder:
    """A living process that has a lock; as text, a sentence's part about it."""

    engine: str
    """Empty where the lock does not say."""
    text: str

    def __str__(self) -> str:
        return self.text


def holder_of(folder: Path) -> LockHolder | None:
    """Which living process has the lock of `folder`; None if nobody.

    Raises:
        Broken: its file cannot be read.
    """
    with reported(f"read {folder / NAME}"):
        try:
            fd = opened(folder / NAME, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            if _flock(fd, fcntl.LOCK_SH):
                return None
            about = _read(fd)
            return LockHolder(str(about.get("engine") or ""), _who(about))
        finally:
            os.close(fd)


def _flock(fd: int, mode: int) -> bool:
    for _ in range(_ATTEMPTS):
        try:
            fcntl.flock(fd, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE_S)
        else:
            return True
    return False


def _read(fd: int) -> dict[str, Any]:
    try:
        about = json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def _who(about: dict[str, Any]) -> str:
    if not about:
        return "another process (its lock does not say which)"
    since = about.get("since")
    when = time.strftime(" since %Y-%m-%d %H:%M:%S", time.localtime(since)) if isinstance(since, float) else ""
    return f"engine {about.get('engine')}, process {about.get('pid')} on {about.get('host')}{when}"
