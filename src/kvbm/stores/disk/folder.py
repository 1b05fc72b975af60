"""The disk tier's folder, as its leader sees it: one process's at a time, bounded, a part for each namespace."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import final

import msgspec

from kvbm.core.errors import Broken, ConfigError, Misuse, Newer
from kvbm.core.folders import check_folder
from kvbm.stores.disk.files import allocated, reported
from kvbm.stores.disk.format import FORMAT, padded
from kvbm.stores.disk.lock import Lock
from kvbm.stores.disk.meta import (
    OVERHEAD_BYTES,
    PASSING,
    DiskPlace,
    Listing,
    Meta,
    as_facts,
    delete,
    folder_name,
    following,
    listed,
    place_of,
    read_meta,
    slots_in,
)
from kvbm.stores.disk.recovery import Recovered, recover

logger = logging.getLogger(__name__)


@final
class Folder:
    """A folder that this process has for itself. Threads: any, one at a time."""

    def __init__(self, path: Path, lock: Lock, clock: Callable[[], float]) -> None:
        """Not for callers: use `claim`."""
        self.path, self._lock, self._clock = path, lock, clock

    @classmethod
    def claim(cls, path: Path, engine: str, *, clock: Callable[[], float] = time.time) -> Folder:
        """Make `path` where it is missing and take its lock for `engine`, until `close` or the process's end.

        Raises:
            ConfigError: it is not a folder.
            Busy: another process has it.
            Broken: it cannot be made or written.
        """
        check_folder("g3_dir", path)
        with reported(f"make the folder {path}"):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return cls(path, Lock(path, engine), clock)

    def namespace(
        self,
        fingerprint: str,
        facts: Mapping[str, object],
        *,
        ranks: int,
        block_bytes: int,
        bound_bytes: int,
        encryption: str = "",
        zerofill: bool = False,
    ) -> NamespaceFolder:
        """Open the part for one namespace, of which each of `ranks` keeps blocks of `block_bytes`, or make it.

        All that lies in this folder stays within `bound_bytes`, space being taken now. Other namespaces keep what they
        have up to half of that: beyond, those used least recently lose their last slots, or all. A namespace whose
        size changes keeps what is in the slots that remain. One in an older format, damaged, or of other ranks or
        sizes is made anew. `encryption` is the id of the key (`Cipher.id`), see `NamespaceFolder.place` for the rest.

        One that cannot grow keeps its size.

        Raises:
            ConfigError: the bound is too small for a single block.
            Newer: a later version wrote it.
            Broken: there is not enough space, or another error of the operating system.
        """
        with reported(f"write in {self.path}"):
            path = self.path / folder_name(fingerprint, encryption)
            old = read_meta(path)
            if path.exists() and not (old and (old.fingerprint, old.encryption) == (fingerprint, encryption)):
                logger.warning("disk tier: %s is damaged or in an older format; it begins anew", path)
                delete(path)
                old = None
            elif old and (old.ranks, old.block_bytes) != (ranks, block_bytes):
                logger.warning("disk tier: %s is of other ranks or sizes; it begins anew", path)
                delete(path)
                old = None
            room = self._make_room(path, bound_bytes)
            num_slots = slots_in(room, ranks, padded(block_bytes))
            if num_slots < 1:
                if slots_in(bound_bytes - OVERHEAD_BYTES, ranks, padded(block_bytes)):
                    raise Broken(
                        f"disk tier: what other models keep in {self.path} leaves no room for a block of this one"
                        " (kvbm disk purge)"
                    )
                raise ConfigError(
                    "g3_gb",
                    f"{room:,} of {bound_bytes:,} bytes are left for this model, too few for one block"
                    f" ({ranks} x {padded(block_bytes):,} bytes)",
                    remedy=f"Give it more, or delete what else is in {self.path} (kvbm disk purge)",
                )
            now = self._clock()
            meta = Meta(
                format=FORMAT,
                fingerprint=fingerprint,
                facts=as_facts(facts),
                ranks=ranks,
                block_bytes=block_bytes,
                num_slots=num_slots,
                generation=_at_start(old) if old else 0,
                created=old.created if old else now,
                last_used=now,
                encryption=encryption,
            )
            namespace = NamespaceFolder(self, path, meta, zerofill)
            namespace.resize(old)
            return namespace

    def restore(self) -> None:
        """Make the folder and its lock again if somebody deleted them. Raises as `claim`."""
        with reported(f"make the folder {self.path}"):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock.take()

    def close(self) -> None:
        """Let others have it. May be called again."""
        self._lock.release()

    def _make_room(self, mine: Path, bound: int) -> int:
        """Bytes that the namespace in `mine` may have, at least half of `bound` where others can be made smaller."""
        others = [one for one in listed(self.path) if one.path != mine]
        taken = sum(one.allocated for one in others)
        # Folder, lock; and what others take that cannot be understood.
        room = bound - OVERHEAD_BYTES - taken
        disk, has = os.statvfs(self.path), allocated(mine)
        for one in reversed(others):
            if (missing := bound // 2 - room) <= 0:
                break
            if one.newer:
                continue
            if bound // 2 - has - missing > disk.f_bavail * disk.f_frsize:
                # What others lost would be lost for nothing.
                logger.warning("disk tier: other namespaces keep what they have: the disk itself has too little room")
                break
            room += self._shrink(one, one.allocated - missing)
        return room

    def _shrink(self, one: Listing, nbytes: int) -> int:
        """Bytes that are free because of it."""
        one.shrink(nbytes)
        after = next((again.allocated for again in listed(self.path) if again.path == one.path), 0)
        what = "lost its last slots" if after else "was deleted"
        logger.warning(
            "disk tier: namespace %s, last used %.1f days ago, %s: %d MiB are needed by the one in use",
            one.path.name,
            (self._clock() - one.last_used) / 86400,
            what,
            (one.allocated - after) >> 20,
        )
        return one.allocated - after


@final
class NamespaceFolder:
    """The part of a folder that is one namespace's. Made by `Folder.namespace`. Threads: any, one at a time."""

    def __init__(self, folder: Folder, path: Path, meta: Meta, zerofill: bool) -> None:
        """Not for callers."""
        self.path, self._folder, self._meta, self._zerofill = path, folder, meta, zerofill

    @property
    def meta(self) -> Meta:
        """What is written down about it."""
        return self._meta

    @property
    def place(self) -> DiskPlace:
        """What a rank has to be told to open its shard: paths, sizes, generation, and how space is reserved."""
        return place_of(self.path, self._meta, zerofill=self._zerofill)

    @property
    def num_slots(self) -> int:
        """Blocks it can hold: the same on every rank."""
        return self._meta.num_slots

    @property
    def generation(self) -> int:
        """Rises with every `clear`."""
        return self._meta.generation

    def recover(self) -> Recovered:
        """The blocks it has, on all ranks (see `kvbm.stores.disk.recovery`). No rank may write meanwhile. Raises
        Broken."""
        return recover(self.place, self._folder._clock())

    def clear(self, *, lasting: bool = True) -> int:
        """Have none of its blocks ever found again, and return the new generation. Ranks are told by the caller.

        What is written in a generation that is not `lasting` is found by this process only.

        Raises:
            Broken: it could not be written down; the old generation lasts.
        """
        meta = msgspec.structs.replace(self._meta, generation=following(self._meta.generation, lasting=lasting))
        with reported(f"clear {self.path}"):
            meta.write(self.path)
        self._meta = meta
        return meta.generation

    def restore(self) -> None:
        """Make again what was deleted or cut while in use; blocks that were in it are gone. Then ranks `reopen`.

        Raises:
            Busy: another process has taken the folder meanwhile.
            Broken: it does not work yet.
        """
        self._folder.restore()
        with reported(f"make {self.path} again"):
            self._prepare()
            self._meta.write(self.path)

    def resize(self, old: Meta | None) -> None:
        """Bring the files from what `old` says to what this says. Called once, when it is made. Raises OSError."""
        if old and old.num_slots > self.num_slots:
            # What is cut off may not be believed to be there; what is added may be there unknown.
            self._meta.write(self.path)
        try:
            self._prepare()
        except OSError as error:
            if old is None or old.num_slots >= self.num_slots:
                raise
            logger.warning(
                "disk tier: %s cannot grow from %d to %d blocks, and keeps its size: %s",
                self.path, old.num_slots, self.num_slots, error.strerror or error,
            )  # fmt: skip
            self._meta = msgspec.structs.replace(self._meta, num_slots=old.num_slots)
            self._prepare()
        try:
            self._meta.write(self.path)
        except OSError as error:
            if old is None or msgspec.structs.replace(self._meta, last_used=old.last_used).sealed() != old:
                raise
            logger.warning("disk tier: %s cannot note when it was used: %s", self.path, error.strerror or error)

    def close(self) -> None:
        """Note when it was used last, and let others have the folder. A failure is logged."""
        try:
            with reported(f"write in {self.path}"):
                if read_meta(self.path) == self._meta.sealed():
                    self._meta = msgspec.structs.replace(self._meta, last_used=self._folder._clock())
                    self._meta.write(self.path)
        except (Broken, Newer, Misuse) as error:
            logger.warning("%s", error)
        self._folder.close()

    def _prepare(self) -> None:
        for rank in range(self._meta.ranks):
            self.place.prepare(rank)


def _at_start(old: Meta) -> int:
    """The generation that a process finds."""
    return following(old.generation) if old.generation & PASSING else old.generation
