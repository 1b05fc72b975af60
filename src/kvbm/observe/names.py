"""What metrics, `kvbm status` and `kvbm explain` call the ways that blocks go, and the places that they come from.

A tier that has no row here shows under its own name.
"""

from __future__ import annotations

from typing import Final, NamedTuple

DISK: Final = "g3"
PEERS: Final = "peers"
OBJECTS: Final = "g4"
"""The tiers that have rows here, and the one that shows under its own name."""


class Way(NamedTuple):
    """From one place to another, in words too. The engine's memory is g1, host memory g2."""

    source: str
    target: str
    text: str


WAYS: Final = {
    "offload": Way("g1", "g2", "from the engine to host memory"),
    "onboard": Way("g2", "g1", "from host memory to the engine"),
    "demote": Way("g2", DISK, "from host memory to disk"),
    "promote": Way(DISK, "g2", "from disk to host memory"),
    "fetch": Way(PEERS, "g2", "from other instances to host memory"),
}

SHOWN: Final = (DISK, PEERS)
"""Tiers that status and explain name although nothing comes from there."""
_KEYS: Final = {PEERS: "peer"}


def json_key(tier: str) -> str:
    """What JSON calls blocks and tokens that come from a tier."""
    return _KEYS.get(tier, tier)
