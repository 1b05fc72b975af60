"""A run: consecutive blocks of a prompt, of all ranks, as one object.

What it says, in its envelope (`envelope.py`):

    0    8  KVBM run
    8    2  blocks, n
    10   2  ranks, r
    12   4  place of the first block in its prompt
    16   8  bytes of a block on one rank, b
    24   4  bytes of this header, a multiple of 64; the blocks follow
    28   2  bytes of what people call the model, m
    30   1  bytes of a key, at most 32
    31   1  1: the first block has one before it in its prompt
    32  32  SHA-256 of the namespace's fingerprint
    64  32  key of the block before the first, 0 where there is none
    96      n keys of 32 bytes, padded with 0
            n priorities, a byte each
            r * n checksums: xxh3-64 of each rank's part of each block
            m bytes of UTF-8
            0 up to the last eight bytes of the header
            8  xxh3-64 of the header before it

Then r parts of n blocks of b bytes. Numbers are little-endian. An object that has another number of blocks than the
reader's runs belongs to another namespace.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final, NamedTuple

import numpy as np
import xxhash

from kvbm.abc.store import Damaged
from kvbm.core.errors import Misuse
from kvbm.stores.checksum import Words
from kvbm.stores.objects.envelope import Envelope
from kvbm.stores.objects.names import Names

KEY_BYTES: Final = 32
_MAGIC: Final = b"KVBM run"
_FRONT: Final = struct.Struct("<8sHHIQIHBB32s32s")
_UNIT: Final = 64
_TOP: Final = 100
_LARGEST_HEADER: Final = 1 << 24
_MOST_TOKENS: Final = 512
_ABOUT_BYTES: Final = 8 << 20
MOST_ABOUT: Final = 1024
"""Bytes of what people call a model, at most."""


class Shape(NamedTuple):
    """Of one namespace's runs: blocks in each, ranks, bytes of a block on one rank."""

    blocks: int
    ranks: int
    block_bytes: int

    @property
    def data_bytes(self) -> int:
        """Of all blocks on all ranks."""
        return self.blocks * self.ranks * self.block_bytes


def run_blocks(block_bytes: int, block_tokens: int) -> int:
    """Blocks in a run, where one has so many bytes over all ranks: about 8 MB, at most 512 tokens (with more, requests
    that share less find nothing)."""
    return max(1, min(_ABOUT_BYTES // block_bytes, _MOST_TOKENS // block_tokens))


class Run(NamedTuple):
    """What a header says. `parent` is the key before the first block; `sums` has a row for each rank."""

    keys: tuple[bytes, ...]
    parent: bytes | None
    place: int
    priorities: bytes
    sums: Words


class Header(NamedTuple):
    """What an object says before its blocks: of the namespace, the digest of its fingerprint; what people call the
    model."""

    shape: Shape
    run: Run
    namespace: bytes
    model: str

    def names(self, envelope: Envelope) -> Names:
        """Of the namespace's runs."""
        return names_of(envelope, self.namespace, self.shape)


def digest_of(fingerprint: str) -> bytes:
    """Of a namespace's fingerprint."""
    return hashlib.sha256(fingerprint.encode()).digest()


def names_of(envelope: Envelope, namespace: bytes, shape: Shape) -> Names:
    """Of runs of this shape in the namespace whose fingerprint has this digest: the same for all instances that can use
    each other's."""
    return Names(envelope.key(f"names of {namespace.hex()} {shape.blocks} {shape.ranks} {shape.block_bytes}"))


class RunFormat:
    """Headers of one namespace's runs. `model` is what people call it."""

    def __init__(self, fingerprint: str, shape: Shape, model: str = "") -> None:
        self.shape = shape
        self._about = model.encode()[:MOST_ABOUT]
        self.namespace = digest_of(fingerprint)
        self.header_bytes = _header_bytes(shape, len(self._about))

    @property
    def plain_bytes(self) -> int:
        """What a run says, with its blocks."""
        return self.header_bytes + self.shape.data_bytes

    @property
    def most_bytes(self) -> int:
        """The same of any run of the namespace, whatever its writer calls the model."""
        return _header_bytes(self.shape, MOST_ABOUT) + self.shape.data_bytes

    def header(self, run: Run) -> bytes:
        """Raises Misuse: keys that differ in length, or are too long."""
        shape, lengths = self.shape, {len(key) for key in run.keys}
        if len(run.keys) != shape.blocks or len(lengths) != 1 or max(lengths) > KEY_BYTES or not min(lengths):
            raise Misuse(f"a run has {shape.blocks} keys of one length, at most {KEY_BYTES} bytes")
        front = _FRONT.pack(
            _MAGIC, shape.blocks, shape.ranks, run.place, shape.block_bytes, self.header_bytes, len(self._about),
            lengths.pop(), run.parent is not None, self.namespace, (run.parent or b"").ljust(KEY_BYTES, b"\0"),
        )  # fmt: skip
        keys = b"".join(key.ljust(KEY_BYTES, b"\0") for key in run.keys)
        sums = np.ascontiguousarray(run.sums, "<u8").tobytes()
        text = (front + keys + run.priorities + sums + self._about).ljust(self.header_bytes - 8, b"\0")
        return text + xxhash.xxh3_64_digest(text)

    def parse(self, plain: memoryview) -> Run:
        """The run of what an object says, blocks and all. Raises Damaged where it is no run of this namespace."""
        said, run, namespace, model = parse(plain)
        if said != self.shape:
            raise Damaged(f"its blocks, ranks and bytes are {tuple(said)}, not {tuple(self.shape)}")
        if namespace != self.namespace:
            raise Damaged("it belongs to another namespace")
        if len(plain) != _header_bytes(said, len(model.encode())) + said.data_bytes:
            raise Damaged(f"it has {len(plain)} bytes")
        return run

    def data_at(self, plain: memoryview) -> int:
        """Where the blocks of a run that was parsed begin."""
        return int(_FRONT.unpack_from(plain)[5])


def _header_bytes(shape: Shape, about: int) -> int:
    words = _FRONT.size + shape.blocks * (KEY_BYTES + 1 + 8 * shape.ranks) + about + 8
    return -(-words // _UNIT) * _UNIT


def parse(plain: memoryview) -> Header:
    """A header of any namespace. The blocks need not be there.

    Raises Damaged. Nothing is allocated that the object does not have.
    """
    if len(plain) < _FRONT.size:
        raise Damaged(f"it says {len(plain)} bytes")
    magic, n, ranks, place, block_bytes, header_bytes, about, key_bytes, follows, namespace, parent = (
        _FRONT.unpack_from(plain)
    )
    if magic != _MAGIC:
        raise Damaged("it is no run")
    shape = Shape(n, ranks, block_bytes)
    if not (n and ranks and block_bytes and 1 <= key_bytes <= KEY_BYTES and follows in (0, 1)):
        raise Damaged("its header makes no sense")
    if header_bytes != _header_bytes(shape, about) or not header_bytes <= min(len(plain), _LARGEST_HEADER):
        raise Damaged(f"its header has {min(header_bytes, len(plain))} bytes")
    text = plain[: header_bytes - 8]
    if xxhash.xxh3_64_digest(text) != plain[header_bytes - 8 : header_bytes]:
        raise Damaged("its header is damaged")
    keys_at = _FRONT.size
    priorities_at = keys_at + n * KEY_BYTES
    sums_at = priorities_at + n
    about_at = sums_at + 8 * ranks * n
    keys = tuple(bytes(text[at : at + key_bytes]) for at in range(keys_at, priorities_at, KEY_BYTES))
    priorities = bytes(text[priorities_at:sums_at])
    if max(priorities) > _TOP:
        raise Damaged("its header has a priority that there is not")
    if len(set(keys)) < n:
        raise Damaged("its header has a key twice")
    sums = np.frombuffer(text[sums_at:about_at], "<u8").astype(np.uint64).reshape(ranks, n)
    run = Run(keys, parent[:key_bytes] if follows else None, place, priorities, sums)
    return Header(shape, run, namespace, bytes(text[about_at : about_at + about]).decode(errors="replace"))
