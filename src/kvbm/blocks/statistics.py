"""What a pool looks like at one instant."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Numbers of blocks. The first group are gauges, the second count since the pool was made."""

    total: int
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
    """Un-published but still held; free when the last holder lets go."""
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
