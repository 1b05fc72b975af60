"""What happened to blocks: frozen values, for any number of observers."""

from __future__ import annotations

import msgspec


class Stored(msgspec.Struct, frozen=True):
    """Blocks became matchable in `tier`. `parent` is the key before `keys[0]` in its prompt, if known."""

    tier: str
    keys: tuple[bytes, ...]
    parent: bytes | None
    group: int = 0


class Removed(msgspec.Struct, frozen=True):
    """Blocks can no longer be matched in `tier` (evicted, un-published or expired)."""

    tier: str
    keys: tuple[bytes, ...]
    group: int = 0


class Cleared(msgspec.Struct, frozen=True):
    """Everything of layer group `group` in `tier` is gone: a new `generation` begins."""

    tier: str
    generation: int
    group: int = 0


class Moved(msgspec.Struct, frozen=True):
    """Slots went from one state to another. Only for observers that ask for every transition.

    States: free, writable, staged, active (registered and held), inactive, orphaned (held, cannot be matched), retired.
    A `Stored` or `Removed` of the same transition comes after it.
    """

    tier: str
    slots: tuple[int, ...]
    source: str
    target: str
    group: int = 0


class Copied(msgspec.Struct, frozen=True):
    """A copy ended on every rank; bytes of all ranks, seconds of the slowest.

    `source` and `target` are places: the engine's memory is "g1", host memory "g2", a tier has its name.
    """

    source: str
    target: str
    blocks: int
    """Those that were copied."""
    failed: int
    nbytes: int
    seconds: float


class Gated(msgspec.Struct, frozen=True):
    """So many blocks were left on disk or with a peer, because computing them was faster, or (`tier` "g2") in host
    memory."""

    blocks: int
    tier: str = "below"


class Admitted(msgspec.Struct, frozen=True):
    """A request that may read got its blocks: so many tokens of its prompt, held by the engine itself, promised from
    host memory.

    `sources` says how many of the latter had been brought up for it, by tier. Another instance computed `pulled_tokens`
    for this very request: nobody was spared them, so they are none of the others.
    """

    prompt_tokens: int
    device_tokens: int
    g2_tokens: int
    pulled_tokens: int = 0
    sources: dict[str, int] = {}


class Unread(msgspec.Struct, frozen=True):
    """A request got its blocks that may not read what is stored, or asked not to: neither a hit nor a miss."""


Event = Stored | Removed | Cleared | Moved | Copied | Gated | Admitted | Unread
