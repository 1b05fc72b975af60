"""What instances tell each other beside the runs: what was written and deleted (feed), and what was read (touch).

A note is two counts of four bytes, little-endian, and so many names of runs (16 bytes each): those that came, and those
that went. It lies in an envelope with a checksum (`Envelope.wrap`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from kvbm.abc.store import Damaged
from kvbm.stores.objects.names import NAME_BYTES

_COUNTS: Final = struct.Struct("<II")
MOST: Final = 100_000
"""Names in one note, of either kind."""
MOST_BYTES: Final = 8 + _COUNTS.size + 2 * MOST * NAME_BYTES
"""What a note says, at most."""


class Note(NamedTuple):
    """Names of runs that came, and of those that went."""

    came: Sequence[bytes]
    went: Sequence[bytes] = ()

    def encode(self) -> bytes:
        return _COUNTS.pack(len(self.came), len(self.went)) + b"".join(self.came) + b"".join(self.went)


def decode(text: bytes) -> Note:
    """Raises Damaged."""
    if len(text) < _COUNTS.size:
        raise Damaged(f"a note of {len(text)} bytes")
    came, went = _COUNTS.unpack_from(text)
    if max(came, went) > MOST or len(text) != _COUNTS.size + (came + went) * NAME_BYTES:
        raise Damaged(f"a note of {len(text)} bytes")
    digests = [text[at : at + NAME_BYTES] for at in range(_COUNTS.size, len(text), NAME_BYTES)]
    return Note(digests[:came], digests[came:])
