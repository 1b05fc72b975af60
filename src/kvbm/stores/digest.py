"""The digest of a file's content. As a program it makes those of large files: a process of its own has no lock with the
engine's in common, and is the only one to end where a file is cut while it is mapped.

It is started with where `blake3` is, so that it needs no `site`, and imports little: otherwise its start takes a third
of the time that a GB takes. It reads a line, "threads processors bytes" (processors with commas between them), and so
many bytes: path and size of each file, each ended by NUL. It writes a line for each that is done ("=number digest"), or
for bytes that are ("+bytes"). It ends when its input does.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from contextlib import suppress

if __name__ == "__main__":
    sys.path.append(sys.argv[1])
from blake3 import blake3

SEGMENT = 32 << 20
"""Bytes that one thread digests in a row. Part of the digest's meaning."""
_PIECE, _STRIDE = 1 << 20, 4 << 20
"""Bytes that are read at once, and from one to the next that is looked for in the page cache."""


def joined(size: int, parts: list[bytes]) -> str:
    """A file's digest from those of its segments."""
    return str(blake3(size.to_bytes(8, "little") + b"".join(parts)).hexdigest())


def _say(line: str) -> None:
    """In one piece, whichever thread says it."""
    os.write(1, f"{line}\n".encode())


def _segment(path: str, size: int, at: int, ahead: int) -> bytes:
    length = min(SEGMENT, size - at)
    if not length:
        return bytes(blake3().digest())
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if at + ahead < size:
            os.posix_fadvise(file, at + ahead, SEGMENT, os.POSIX_FADV_WILLNEED)
        if not _cached(file, at, length):
            return _read(file, at, length)
        with mmap.mmap(file, length, prot=mmap.PROT_READ, offset=at) as mapped:
            mapped.madvise(mmap.MADV_SEQUENTIAL)
            return bytes(blake3(mapped).digest())
    finally:
        os.close(file)
        _say(f"+{length}")


def _cached(file: int, at: int, length: int) -> bool:
    """Whether a part of a file seems to be in the page cache, where mapping it copies nothing."""
    try:
        return all(os.preadv(file, [bytearray(1)], place, os.RWF_NOWAIT) for place in range(at, at + length, _STRIDE))
    except OSError:  # it would have to wait; or this file system cannot say
        return False


def _read(file: int, at: int, length: int) -> bytes:
    """Large reads keep a disk busier than the faults of a mapping do."""
    hasher, piece, end = blake3(), memoryview(bytearray(_PIECE)), at + length
    while at < end and (count := os.preadv(file, [piece[: end - at]], at)):
        hasher.update(piece[:count])
        at += count
    return bytes(hasher.digest())


def _main() -> None:
    count, cpus, length = sys.stdin.buffer.readline().split()
    threads, words = int(count), sys.stdin.buffer.read(int(length)).split(b"\0")[:-1]
    files = [(os.fsdecode(path), int(size)) for path, size in zip(words[::2], words[1::2], strict=True)]
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(1)), daemon=True).start()
    with suppress(OSError):
        os.sched_setaffinity(0, map(int, cpus.split(b",")))
    os.nice(10)  # behind what serves
    left = ((path, size, at) for path, size in files for at in range(0, max(1, size), SEGMENT))
    turn, made = threading.Lock(), dict[tuple[str, int], bytes]()

    def work() -> None:
        while True:
            with turn:
                task = next(left, None)
            if task is None:
                return
            path, size, at = task
            made[path, at] = _segment(path, size, at, threads * SEGMENT)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for number, (path, size) in enumerate(files):  # a thread that failed leaves a gap, and its file has no digest
        parts = [made.get((path, at)) for at in range(0, max(1, size), SEGMENT)]
        if None not in parts:
            _say(f"={number} {joined(size, [part for part in parts if part is not None])}")
    os._exit(0)


if __name__ == "__main__":
    _main()
