"""What files contain, as digests: made once on a node, by several threads, and remembered where that is safe."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from select import poll
from typing import Final

import blake3 as _blake3
import msgspec
from blake3 import blake3

from kvbm.core import cpus
from kvbm.stores import digest
from kvbm.stores.disk.files import opened, write_all
from kvbm.stores.stamps import Changed, Stamp, Start, ends, lasting, survey

log = logging.getLogger(__name__)

_APART: Final = 64 << 20
"""So many bytes are worth a process of their own."""
_PIECE: Final = 1 << 20
"""Bytes that are read at once."""
_YOUNG_NS: Final = 2_000_000_000
"""A file that changed so shortly before its digest began may change again without a new time."""
_KEPT: Final = 4096
_MOST_BYTES: Final = 16 << 20
_REPORT_S: Final = 5.0
_WAIT_S: Final = 0.1
VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Chosen:
    """What an engine reads of one model. `files` are pairs of what a file is called (empty: it does not matter) and its
    path, in an order that says something. `folders` are those whose entries decided which; `watched` what else did.
    `facts` says how they are read."""

    files: tuple[tuple[str, str], ...] = ()
    folders: tuple[str, ...] = ()
    watched: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()


class _Memory(msgspec.Struct, frozen=True):
    """The file in which digests are remembered: of each path (device, inode, size, mtime, ctime) and the digest."""

    version: int
    files: dict[str, tuple[int, int, int, int, int, str]]
    check: str = ""

    def sealed(self) -> _Memory:
        text = msgspec.json.encode(msgspec.structs.replace(self, check=""))
        return msgspec.structs.replace(self, check=hashlib.sha256(text).hexdigest())


class Contents:
    """Digests of files; `folder` is where they are remembered. One that cannot be used costs time, nothing else."""

    def __init__(self, folder: Path, *, threads: int | None = None, stop: threading.Event | None = None) -> None:
        self._path, self._lock = folder / "digests.json", folder / "digests.lock"
        self._threads = threads or max(4, min(8, len(cpus.given())))
        self._stop = stop or threading.Event()
        self.digested = 0
        """Bytes that were read for it."""
        self._all, self._reported = 0, 0.0

    def identify(self, choose: Callable[[], Sequence[Chosen]], start: Start) -> str:
        """A digest of all that is chosen. Raises Changed where it may not be what an engine that began at `start` has
        loaded, and what `choose` raises."""
        try:
            chosen = choose()
            paths = [path for each in chosen for _, path in each.files]
            way = [*paths, *(path for each in chosen for path in (*each.folders, *each.watched))]
            strict = {ends(folder, {}) for each in chosen for folder in each.folders}
            before = survey(way)
            start.check(before, strict)
            digests = self.digests(paths, before)
            after = survey(way)
            if choose() != chosen:
                raise Changed("other files are there than before they were digested")
            for path, mark in after.items():
                entries = mark.kind != "d" or path in strict
                if path not in before or before[path].replaced_by(mark, entries=entries):
                    raise Changed(f"{path} was changed while it was digested")
        except OSError as error:
            raise Changed(f"the files cannot be read: {error}") from error
        parts = [[each.facts, [(_text(name), digests[path]) for name, path in each.files]] for each in chosen]
        return str(blake3(msgspec.json.encode([VERSION, parts])).hexdigest())

    def digests(self, paths: Sequence[str], found: Mapping[str, Stamp]) -> dict[str, str]:
        """Of each of these files, which were `found` so. Raises Changed, OSError."""
        left: dict[str, tuple[str, Stamp]] = {}
        for path in dict.fromkeys(paths):
            end = ends(path, found)
            left[path] = end, found[end]
            if found[end].kind != "f":
                raise Changed(f"{path} is not a file")
        said = self._remembered(left)
        if left.keys() <= said.keys():
            return said
        with self._turn():
            said |= self._remembered(left)
            said |= self._make({path: each for path, each in left.items() if path not in said})
        return said

    # ------------------------------------------------------------------ making them

    def _make(self, left: Mapping[str, tuple[str, Stamp]]) -> dict[str, str]:
        if not left:
            return {}
        begun, clock = time.time_ns(), time.monotonic()
        self.digested, self._all = 0, sum(mark.size for _, mark in left.values())
        self._reported = clock
        found = dict(left.values())
        made = self._apart(found) if self._all >= _APART else {end: self._here(end, found[end]) for end in found}
        for end, mark in found.items():
            if end not in made or Stamp.of(os.lstat(end)) != mark:
                raise Changed(f"{end} was changed while it was digested")
        if (seconds := time.monotonic() - clock) > 1.0:
            log.info("KVBM: digested %.1f GB of weights in %.1f s", self._all / 1e9, seconds)
        self._remember({(end, mark): made[end] for end, mark in found.items()}, begun)
        return {path: made[end] for path, (end, _) in left.items()}

    def _apart(self, found: Mapping[str, Stamp]) -> dict[str, str]:
        """Has a process of its own do it (`stores/digest.py`)."""
        numbered = list(found)
        order = b"".join(b"%s\0%d\0" % (os.fsencode(end), mark.size) for end, mark in found.items())
        command = [sys.executable, "-P", "-S", digest.__file__, str(Path(str(_blake3.__file__)).parents[1])]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        made: dict[str, str] = {}
        with subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe, stderr=null) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            output = poll()
            output.register(child.stdout)
            try:
                where = ",".join(map(str, sorted(cpus.given()))).encode()
                child.stdin.write(b"%d %s %d\n" % (self._threads, where, len(order)) + order)
                while not self._stop.is_set():
                    if not output.poll(_WAIT_S * 1e3):
                        continue
                    if not (line := child.stdout.readline()):
                        break
                    if line.startswith(b"+"):
                        self._report(int(line))
                    else:
                        number, said = line[1:].decode().split()
                        made[numbered[int(number)]] = said
            finally:
                child.kill()
        if self._stop.is_set():
            raise Changed("the engine ended before its weights were digested")
        return made

    def _here(self, path: str, mark: Stamp) -> str:
        """Of small files, which a thread of this process reads: nothing is mapped."""
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            parts = [self._segment(file, at, mark.size) for at in range(0, max(1, mark.size), digest.SEGMENT)]
        finally:
            os.close(file)
        return digest.joined(mark.size, parts)

    def _segment(self, file: int, at: int, size: int) -> bytes:
        hasher, end = blake3(), min(at + digest.SEGMENT, size)
        while at < end and (piece := os.pread(file, min(_PIECE, end - at), at)):
            hasher.update(piece)
            at += len(piece)
        return bytes(hasher.digest())

    def _report(self, length: int) -> None:
        self.digested += length
        now = time.monotonic()
        if now - self._reported > _REPORT_S:
            self._reported = now
            log.info("KVBM: digested %.1f of %.1f GB of weights", self.digested / 1e9, self._all / 1e9)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One process of a node digests; the others wait, and find what it remembered."""
        try:
            self._lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = opened(self._lock, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            log.debug("KVBM: digests of weights are made without a lock: %s", error)
            yield
            return
        try:
            told = False
            while not _locked(file):
                if not told:
                    log.info("KVBM: another process digests the same weights, and KVBM waits for its result")
                told = True
                if self._stop.wait(_WAIT_S):
                    raise Changed("the engine ended before its weights were digested")
            yield
        finally:
            os.close(file)

    # ------------------------------------------------------------------ remembering them

    def _remembered(self, wanted: Mapping[str, tuple[str, Stamp]]) -> dict[str, str]:
        known = self._load()
        return {
            path: known[_text(end)][5]
            for path, (end, mark) in wanted.items()
            if _text(end) in known and known[_text(end)][:5] == mark[1:] and mark.by_kernel and lasting(end)
        }

    def _load(self) -> dict[str, tuple[int, int, int, int, int, str]]:
        try:
            with open(opened(self._path, os.O_RDONLY), "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_uid != os.geteuid() or status.st_mode & 0o022 or status.st_size > _MOST_BYTES:
                    return {}
                memory = msgspec.json.decode(file.read(_MOST_BYTES), type=_Memory)
        except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
            return {}
        return memory.files if memory.version == VERSION and memory.check == memory.sealed().check else {}

    def _remember(self, made: Mapping[tuple[str, Stamp], str], begun: int) -> None:
        """What was digested from `begun` on. The oldest are forgotten."""
        files = self._load()
        for (end, mark), said in made.items():
            files.pop(_text(end), None)
            if mark.ctime < begun - _YOUNG_NS and mark.by_kernel and lasting(end):
                files[_text(end)] = (*mark[1:], said)
        new = self._path.with_name(f"{self._path.name}.{os.getpid()}.{threading.get_native_id()}")
        try:
            memory = _Memory(VERSION, dict(list(files.items())[-_KEPT:])).sealed()
            file = opened(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            try:
                write_all(file, msgspec.json.encode(memory), 0)
            finally:
                os.close(file)
            os.replace(new, self._path)
        except OSError as error:
            log.debug("KVBM: digests of weights are not remembered: %s", error)
            with suppress(OSError):
                new.unlink()


def _text(name: str) -> str:
    """A file's name as JSON can have it: the bytes of one that is not UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return f"\0{os.fsencode(name).hex()}"
    return name


def _locked(file: int) -> bool:
    """Whether it is locked now, or cannot be: on a file system without locks each process digests by itself."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.debug("KVBM: digests of weights are made without a lock: %s", error)
    return True


def folder_digest(folder: Path) -> str:
    """A digest of every regular file in `folder` by name and content. Raises OSError."""
    digest = blake3()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = blake3(path.read_bytes()).digest()
            digest.update(f"{path.relative_to(folder)}\0".encode() + content)
    return str(digest.hexdigest())
