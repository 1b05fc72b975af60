"""What is left of a namespace after its process ended, however that was: the blocks that every rank has."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvbm.core.region import Slots
from kvbm.stores.checksum import Words
from kvbm.stores.disk.files import opened, read_up_to, reported
from kvbm.stores.disk.format import PAGE, RECORD, Mask, Records, Seal, parse, unpacked_keys
from kvbm.stores.disk.meta import DiskPlace

_STRETCH: Final = 1 << 16
"""Records that are read at once: 8 MiB."""
_UNREADABLE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR)

_OPAQUE: Final = np.dtype((np.void, RECORD.itemsize))
"""A record that numpy copies as a whole, not field by field."""


@dataclass(frozen=True, slots=True, eq=False)
class Recovered:
    """The blocks of a namespace, the oldest write first; arrays of one entry per block.

    `keys` and `tails` are as `packed_keys` makes them; `parents` the head of each parent's key, 0 where there is none;
    `expires` and `written_at` unix seconds. New writes begin with
    `next_sequence`. `damaged` and `bad` count records that are not intact and slots in which a bad block was found,
    over all ranks.
    """

    slots: npt.NDArray[np.int64]
    keys: Words
    tails: npt.NDArray[np.uint32]
    parents: Words
    sequences: Words
    priorities: npt.NDArray[np.int32]
    expires: npt.NDArray[np.float64]
    written_at: npt.NDArray[np.float64]
    next_sequence: int
    damaged: int
    bad: int

    def key_list(self) -> list[bytes]:
        """The keys as they were given."""
        return unpacked_keys(self.keys, self.tails)


def recover(place: DiskPlace, now: float) -> Recovered:
    """Read the index of every rank, once and in order, a few MiB at a time.

    A block counts if all ranks have an intact record of it, written by the same write, of this generation and not
    expired; of several with one key the last written. An index that is missing, short or not this namespace's has no
    records; one that cannot be read is an error.

    Raises:
        Broken: the operating system's error.
    """
    seal = Seal(place.fingerprint)
    kept = [np.zeros(0, dtype=_OPAQUE)]
    last = damaged = bad = 0
    for first, ranks in _stretches(place):
        parsed = [parse(records, first, seal, place.generation, place.block_bytes) for records in ranks]
        damaged += sum(int(one.damaged.sum()) for one in parsed)
        bad += sum(int(one.bad.sum()) for one in parsed)
        common = parsed[0].blocks & (ranks[0]["expires"] > now)
        for records, one in zip(ranks, parsed, strict=True):
            # Any write there ever was, so that no number is used twice.
            last = max(last, int(records["sequence"][~one.damaged].max(initial=0)))
            if records is ranks[0]:
                continue
            common &= one.blocks & (records["sequence"] == ranks[0]["sequence"])
            common &= (records["key"] == ranks[0]["key"]).all(axis=1)
            common &= records["key_tail"] == ranks[0]["key_tail"]
        kept.append(ranks[0].view(_OPAQUE)[common])
    blocks = np.concatenate(kept).view(RECORD)
    del kept
    order = np.argsort(blocks["sequence"], kind="stable")
    order = order[_last_of_each(blocks, order)]
    return Recovered(
        slots=blocks["slot"][order].astype(np.int64),
        keys=blocks["key"][order],
        tails=blocks["key_tail"][order],
        parents=blocks["parent"][order],
        sequences=blocks["sequence"][order],
        priorities=blocks["priority"][order],
        expires=blocks["expires"][order],
        written_at=blocks["written_at"][order],
        next_sequence=last + 1,
        damaged=damaged,
        bad=bad,
    )


def read_records(fd: int, first: int, into: Records) -> None:
    """Read the records of slots from `first` on; what the file does not have is empty. Raises OSError."""
    octets = into.view(np.uint8)
    got = read_up_to(fd, octets.data, PAGE + first * RECORD.itemsize)
    octets[got:] = 0


def open_index(place: DiskPlace, rank: int, stack: ExitStack, flags: int = os.O_RDONLY) -> int | None:
    """A rank's index, open until `stack` ends; None if it is missing or not this namespace's. Raises OSError."""
    try:
        fd = opened(place.index(rank), flags)
    except OSError as error:
        if error.errno in _UNREADABLE:
            return None
        raise
    stack.callback(os.close, fd)
    return fd if os.pread(fd, PAGE, 0) == place.header(rank) else None


def _stretches(place: DiskPlace) -> Iterator[tuple[int, list[Records]]]:
    """The first slot of each stretch, and its records of every rank. The arrays are used again."""
    with ExitStack() as stack, reported(f"read the index in {place.folder}"):
        files = [open_index(place, rank, stack) for rank in range(place.ranks)]
        buffers = [np.zeros(min(_STRETCH, place.num_slots), dtype=RECORD) for _ in files]
        for first in range(0, place.num_slots, _STRETCH):
            stretch = [buffer[: place.num_slots - first] for buffer in buffers]
            for fd, records in zip(files, stretch, strict=True):
                if fd is not None:
                    read_records(fd, first, records)
            yield first, stretch


def _last_of_each(blocks: Records, order: Slots) -> Mask:
    """Which of the blocks, taken in `order`, are the last one with their key."""
    last = np.ones(len(order), dtype=np.bool_)
    heads = blocks["key"][:, 0][order]
    sort = np.argsort(heads, kind="stable")
    same = np.flatnonzero(heads[sort][1:] == heads[sort][:-1])
    # Keys are hashes: two that begin alike are nearly always the same, and there are few.
    newest: dict[tuple[bytes, int], int] = {}
    for place in np.unique(np.concatenate([sort[same], sort[same + 1]])).tolist():
        block = blocks[order[place]]
        key = block["key"].tobytes(), int(block["key_tail"])
        if key in newest:
            last[newest[key]] = False
        newest[key] = place
    return last
