"""What a namespace's folder says about itself, and its files per rank."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from kvbm.core.errors import Newer
from kvbm.stores.disk.files import allocated, opened, replace, reported, reserve, sync_folder, write_all
from kvbm.stores.disk.format import FORMAT, PAGE, RECORD, header, padded

META: Final = "meta.json"
OVERHEAD_BYTES: Final = 16 * PAGE
"""What a namespace takes besides its slots: folder, `meta.json` and its successor."""


PASSING: Final = 1 << 31
"""Set in the number of a generation that ends with the process which began it."""


def following(generation: int, *, lasting: bool = True) -> int:
    """The number of the next generation. No two have the same without `PASSING`."""
    number = (generation + 1) % PASSING
    return number if lasting else number | PASSING


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of ``meta.json``. `facts` are for people; the `fingerprint` covers them.

    `encryption` is the id of the key the blocks are encrypted with, empty where they are not. Times in unix seconds.
    """

    format: int
    fingerprint: str
    facts: dict[str, Any]
    ranks: int
    block_bytes: int
    num_slots: int
    generation: int
    created: float
    last_used: float
    encryption: str = ""
    check: str = ""
    """Over all the rest, so that a change by accident is noticed."""

    def __post_init__(self) -> None:
        if min(self.ranks, self.block_bytes, self.num_slots) < 1 or not 0 <= self.generation < 1 << 32:
            raise ValueError("sizes are positive")

    @property
    def slot_bytes(self) -> int:
        """A block's bytes in whole pages: slot i of a data file begins at i times this."""
        return padded(self.block_bytes)

    def write(self, folder: Path) -> None:
        """Put this into `folder`, durably and at once. Raises OSError."""
        replace(folder / META, msgspec.json.encode(self.sealed()))

    def sealed(self) -> Meta:
        """This with its `check`."""
        text = msgspec.json.encode(msgspec.structs.replace(self, check=""))
        return msgspec.structs.replace(self, check=hashlib.sha256(text).hexdigest()[:16])


def read_meta(folder: Path) -> Meta | None:
    """What `folder` says about itself; None if nothing that can be understood, or in an older format.

    Raises:
        Newer: a later version wrote it.
        Broken: it cannot be read.
    """
    with reported(f"read {folder / META}"):
        try:
            text = (folder / META).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
    try:
        if (version := msgspec.json.decode(text, type=_Version).format) > FORMAT:
            raise Newer(
                f"disk tier: {folder} is in format {version}, written by a later version of KVBM; this one knows"
                f" format {FORMAT}. It stays as it is. Use another directory, or the later version."
            )
        meta = msgspec.json.decode(text, type=Meta)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return meta if meta.format == FORMAT and meta.check == meta.sealed().check else None


class _Version(msgspec.Struct):
    format: int


@dataclass(frozen=True, slots=True)
class DiskPlace:
    """Where one namespace's blocks lie: all that a rank has to know to open its files."""

    folder: str
    fingerprint: str
    ranks: int
    block_bytes: int
    num_slots: int
    generation: int
    zerofill: bool = False

    @property
    def slot_bytes(self) -> int:
        """A block's bytes in whole pages."""
        return padded(self.block_bytes)

    @property
    def data_bytes(self) -> int:
        """A data file's size: the slots, and a page to try writing on."""
        return self.num_slots * self.slot_bytes + PAGE

    @property
    def index_bytes(self) -> int:
        """An index file's size."""
        return PAGE + self.num_slots * RECORD.itemsize

    def data(self, rank: int) -> Path:
        """A rank's data file."""
        return Path(self.folder) / f"rank{rank}.data"

    def index(self, rank: int) -> Path:
        """A rank's index file."""
        return Path(self.folder) / f"rank{rank}.index"

    def files(self, rank: int) -> tuple[tuple[Path, int], ...]:
        """A rank's files and their sizes. The index comes first, so that no record outlives its slot."""
        return (self.index(rank), self.index_bytes), (self.data(rank), self.data_bytes)

    def header(self, rank: int) -> bytes:
        """The page a rank's index has to begin with."""
        return header(self.fingerprint, rank, self.ranks, self.block_bytes)

    def prepare(self, rank: int) -> None:
        """Make a rank's files where they are missing, and reserve or cut them to size.

        An index that is not this namespace's begins anew. Raises OSError.
        """
        Path(self.folder).mkdir(mode=0o700, exist_ok=True)
        for path, size in self.files(rank):
            fd = opened(path, os.O_RDWR | os.O_CREAT)
            try:
                if path == self.index(rank) and os.pread(fd, PAGE, 0) != self.header(rank):
                    os.ftruncate(fd, 0)
                    reserve(fd, size, zerofill=self.zerofill)
                    write_all(fd, self.header(rank), 0)
                else:
                    reserve(fd, size, zerofill=self.zerofill)
            finally:
                os.close(fd)
        sync_folder(Path(self.folder))


def slots_in(nbytes: int, ranks: int, slot_bytes: int) -> int:
    """How many slots a namespace of `nbytes` in all can have."""
    per_rank = (nbytes - OVERHEAD_BYTES) // ranks - 3 * PAGE  # header, page to try on, the index's last page
    return max(0, min(per_rank // (slot_bytes + RECORD.itemsize), (1 << 32) - 1))


def bytes_of(num_slots: int, ranks: int, slot_bytes: int) -> int:
    """The bytes in all of a folder whose one namespace has so many slots."""
    return 2 * OVERHEAD_BYTES + ranks * (num_slots * (slot_bytes + RECORD.itemsize) + 3 * PAGE)


@dataclass(frozen=True, slots=True)
class Listing:
    """A namespace's folder as it is found. `meta` is None where it cannot be understood; `newer` says why."""

    path: Path
    meta: Meta | None
    newer: bool
    allocated: int

    @property
    def last_used(self) -> float:
        """Unix seconds; 0 where that is unknown."""
        return self.meta.last_used if self.meta else 0.0

    def shrink(self, nbytes: int) -> None:
        """Let it take at most `nbytes`: what is in its last slots is lost, or all of it. Raises OSError."""
        slots = slots_in(nbytes, self.meta.ranks, self.meta.slot_bytes) if self.meta else 0
        if self.meta is None or slots < 1:
            delete(self.path)
        elif slots < self.meta.num_slots:
            msgspec.structs.replace(self.meta, num_slots=slots).write(self.path)
            place = place_of(self.path, self.meta, slots)
            for rank in range(self.meta.ranks):
                for path, size in place.files(rank):
                    if path.is_file() and path.stat().st_size > size:
                        os.truncate(path, size)


def listed(folder: Path) -> list[Listing]:
    """The namespaces in a folder, the one used last first; folders that are not ours are left out.

    Raises:
        Broken: it cannot be read.
    """
    found = []
    with reported(f"list {folder}"):
        for path in folder.iterdir() if folder.is_dir() else ():
            if not _is_name(path.name) or not path.is_dir() or path.is_symlink():
                continue
            try:
                meta, newer = read_meta(path), False
            except Newer:
                meta, newer = None, True
            found.append(Listing(path, meta, newer, allocated(path)))
    return sorted(found, key=lambda one: -one.last_used)


def folder_name(fingerprint: str, encryption: str) -> str:
    """The name of a namespace's folder; blocks of another encryption key lie in another."""
    return fingerprint[:16] + (f"-{encryption[:8]}" if encryption else "")


def _is_name(name: str) -> bool:
    first, _, key = name.partition("-")
    return len(first) == 16 and len(key) in (0, 8) and set(first + key) <= set("0123456789abcdef")


def place_of(path: Path, meta: Meta, num_slots: int | None = None, *, zerofill: bool = False) -> DiskPlace:
    """The place that `meta`, found in `path`, speaks of."""
    return DiskPlace(
        str(path),
        meta.fingerprint,
        meta.ranks,
        meta.block_bytes,
        meta.num_slots if num_slots is None else num_slots,
        meta.generation,
        zerofill,
    )


def delete(path: Path) -> None:
    """Delete a namespace's folder, its description first, so that half a folder is never taken for a whole one.

    Raises OSError.
    """
    (path / META).unlink(missing_ok=True)
    shutil.rmtree(path)
    sync_folder(path.parent)


def as_facts(facts: Mapping[str, object]) -> dict[str, Any]:
    """Facts as JSON has them, so that they are equal to themselves once read back."""
    decoded: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(dict(facts), enc_hook=str))
    return decoded
