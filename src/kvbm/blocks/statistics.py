"""What a pool and a block look like at one instant."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Numbers of blocks. The first group are gauges, the second count since the pool was made."""

    total: int
    capacity: int
    """What `total` was at most."""
    free: int
    writable: int
    staged: int
    registered: int
    """Matchable: active + inactive."""
    active: int
    """Registered and held."""
    inactive: int
    """Registered and held by nobody: what can be evicted."""
    orphaned: int
    """Held, but not or no longer to be matched; free when the last holder lets go."""
    pinned: int
    """Held in somebody's name (`Pool.pin`); a block that is held twice counts twice."""
    generation: int

    allocations: int
    evictions: int
    registrations: int
    """Newly published."""
    duplicates: int
    """Offered for a key that was there already."""
    requested: int
    """Keys asked for by `match`."""
    returned: int
    """Blocks `match` gave."""
    expired: int
    """Removed because their time was over."""


@dataclass(frozen=True, slots=True)
class Block:
    """A registered block."""

    key: bytes
    slot: int
    parent: bytes | None
    """The key before it in its prompt, if its writer said so."""
    holds: int
    """Nobody can evict it while this is not 0."""
    priority: int
    expires: float | None
    """When, on the pool's clock."""
