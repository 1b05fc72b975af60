"""What stands in the index files of the disk tier, byte for byte (docs/disk.md), and how it is checked.

An index is a page with a header, then a record of 128 bytes per slot. A record says whose bytes the slot holds and
checks itself with a checksum that is seeded with the namespace, so that a record of another namespace or, since it
contains its slot, from another place is none. 128 zero bytes are an empty slot, as in a file that was only reserved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvbm.core.errors import Misuse
from kvbm.core.region import Slots
from kvbm.stores.checksum import Words

FORMAT: Final = 1
PAGE: Final = 4096
"""The header's size, and what slots are padded to, so that they can be read and written directly."""
KEY_BYTES: Final = 32
"""Bytes of a key that lie together; one more may follow elsewhere."""

RECORD: Final = np.dtype(
    [
        ("key", "<u8", (4,)),  # its first 32 bytes, padded with zeros
        ("parent", "<u8"),  # the head of the parent's key, see `heads`; 0: none
        ("checksum", "<u8"),  # xxh3-64 of the block's bytes, before encryption
        ("sequence", "<u8"),  # the leader's number of this write: the same on all ranks, and rising
        ("written_at", "<f8"),  # unix seconds
        ("expires", "<f8"),  # unix seconds; inf: never
        ("length", "<u4"),  # the block's bytes
        # The key's length, and 256 times its 33rd byte; 0: no block, but a mark that one was found to be bad here.
        ("key_tail", "<u4"),
        ("nonce", "u1", (12,)),  # of the encryption; 0: none
        ("tag", "u1", (16,)),
        ("priority", "<i4"),
        ("generation", "<u4"),
        ("slot", "<u4"),
        ("check", "<u8"),  # of the 120 bytes before, see `Seal`
    ]
)
assert RECORD.itemsize == 128

Records = npt.NDArray[Any]
"""An array of `RECORD`."""
Mask = npt.NDArray[np.bool_]

_BATCH: Final = 1 << 10
"""Records that are checked at once: few enough for the processor's cache."""


class Seal:
    """The self-check of one namespace's records.

    Of each of the record's 15 words, XORed with its own 64 bits of SHAKE-128 over the fingerprint, SplitMix64's
    finaliser is taken; their sum is the check. Any change within one word changes it, any other with a probability
    of 1 - 2^-64. A million records take a tenth of a second, as numpy arrays.
    """

    def __init__(self, fingerprint: str) -> None:
        bits = hashlib.shake_128(f"kvbm index {FORMAT} {fingerprint}".encode()).digest(15 * 8)
        self._seeds = np.frombuffer(bits, dtype="<u8")

    def checks(self, records: Records) -> Words:
        """The check that belongs to each record."""
        words = _words(records)
        sums = np.zeros(len(records), dtype=np.uint64)
        for start in range(0, len(records), _BATCH):
            batch = slice(start, start + _BATCH)
            np.sum(_mixed(words[batch, :15] ^ self._seeds), axis=1, out=sums[batch])
        return sums

    def close(self, records: Records) -> None:
        """Write its check into each record."""
        records["check"] = self.checks(records)

    def intact(self, records: Records) -> Mask:
        """Which records are as they were closed."""
        intact: Mask = self.checks(records) == records["check"]
        return intact


def _words(records: Records) -> Words:
    words: Words = records.view("<u8").reshape(len(records), 16)
    return words


def _mixed(words: Words) -> Words:
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """What is written down with the blocks of one job, besides their bytes.

    Per block: the key (at most 33 bytes), the parent's key (empty: none), the priority, and when it `expires` (unix
    seconds, inf: never). The last block's write has the number `sequence`, those before it higher ones: what has the
    lowest is the first to go after a restart, and a prompt's leaf goes before its root.
    """

    keys: Sequence[bytes]
    parents: Sequence[bytes]
    priorities: npt.NDArray[np.int32]
    expires: npt.NDArray[np.float64]
    sequence: int
    generation: int


def pack(slots: Slots, labels: Labels, checksums: Words, length: int, now: float) -> Records:
    """Records of blocks of `length` bytes in these slots, written `now`; not closed yet.

    Raises:
        Misuse: a key that is empty or too long, or labels of another length.
    """
    lengths = {len(of) for of in (slots, labels.keys, labels.parents, labels.priorities, labels.expires, checksums)}
    if len(lengths) > 1:
        raise Misuse(f"labels, slots and checksums are of as many blocks: {sorted(lengths)}")
    records = np.zeros(len(slots), dtype=RECORD)
    records["key"], records["key_tail"] = packed_keys(labels.keys)
    known = [at for at, parent in enumerate(labels.parents) if parent]
    records["parent"][known] = heads(*packed_keys([labels.parents[at] for at in known]))
    records["checksum"] = checksums
    records["sequence"] = labels.sequence + np.arange(len(slots), dtype=np.uint64)[::-1]
    records["written_at"], records["expires"] = now, labels.expires
    records["length"], records["priority"] = length, labels.priorities
    records["generation"], records["slot"] = labels.generation, slots
    return records


def packed_keys(keys: Sequence[bytes]) -> tuple[Words, npt.NDArray[np.uint32]]:
    """Keys as four words each, padded with zeros, and their tails.

    Raises:
        Misuse: a key that is empty or too long.
    """
    tails = np.fromiter(map(len, keys), dtype=np.uint32, count=len(keys))
    least, most = tails.min(initial=KEY_BYTES), tails.max(initial=0)
    if least < 1 or most > KEY_BYTES + 1:
        raise Misuse(f"the disk tier's keys have 1 to {KEY_BYTES + 1} bytes, not {least} or {most}")
    if most > KEY_BYTES:
        tails |= np.fromiter((key[KEY_BYTES] if len(key) > KEY_BYTES else 0 for key in keys), np.uint32, len(keys)) << 8
        keys = [key[:KEY_BYTES] for key in keys]
    text = b"".join(key.ljust(KEY_BYTES, b"\0") for key in keys)
    return np.frombuffer(text, dtype="<u8").reshape(len(keys), 4), tails


def heads(keys: Words, tails: npt.NDArray[np.uint32]) -> Words:
    """What tells keys apart well enough to find a parent: the first 8 bytes, XORed with the 33rd."""
    return keys[:, 0] ^ (tails >> 8).astype(np.uint64)


def unpacked_keys(keys: Words, tails: npt.NDArray[np.uint32]) -> list[bytes]:
    """The keys as they were given."""
    text, ends = keys.tobytes(), [bytes([end]) for end in range(256)]
    return [
        text[at : at + KEY_BYTES] + ends[tail >> 8] if tail & 0xFF > KEY_BYTES else text[at : at + tail]
        for at, tail in zip(range(0, len(text), KEY_BYTES), tails.tolist(), strict=True)
    ]


def marks(slots: Slots, generation: int, now: float) -> Records:
    """Records, not closed yet, which say that a bad block was found in these slots."""
    records = np.zeros(len(slots), dtype=RECORD)
    records["written_at"], records["generation"], records["slot"] = now, generation, slots
    return records


@dataclass(frozen=True, slots=True, eq=False)
class Parsed:
    """What a stretch of an index says. Slots that are in no mask belong to an earlier generation.

    `blocks` hold a block, `empty` nothing; in `bad` a damaged block was found, and `damaged` records are not intact.
    """

    blocks: Mask
    empty: Mask
    bad: Mask
    damaged: Mask


def parse(records: Records, first_slot: int, seal: Seal, generation: int, length: int) -> Parsed:
    """Tell the records of slots from `first_slot` on apart; blocks are of `generation` and have `length` bytes."""
    empty = is_empty(records)
    slots = np.arange(first_slot, first_slot + len(records))
    intact = seal.intact(records) & (records["slot"] == slots) & (records["key_tail"] & 0xFF <= KEY_BYTES + 1)
    current, marked = intact & (records["generation"] == generation), records["key_tail"] == 0
    blocks = current & ~marked & (records["length"] == length)
    return Parsed(blocks, empty, current & marked, ~intact & ~empty)


def is_empty(records: Records) -> Mask:
    """Which records are all zeros."""
    empty: Mask = _words(records).max(axis=1, initial=0) == 0
    return empty


def header(fingerprint: str, rank: int, ranks: int, block_bytes: int) -> bytes:
    """The first page of an index. One that differs does not belong to an index of these."""
    facts = {"format": FORMAT, "fingerprint": fingerprint, "rank": rank, "ranks": ranks, "block_bytes": block_bytes}
    return b"KVBM index " + json.dumps(facts).encode().ljust(PAGE - 12, b" ") + b"\n"


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE
