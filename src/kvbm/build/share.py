"""How much of host memory is held for what is below it."""

from __future__ import annotations

import time
from functools import partial
from typing import Final

from kvbm.blocks import Pool
from kvbm.build.parts import MOVE_BYTES
from kvbm.core.config import Settings
from kvbm.leader.core import Core
from kvbm.tiers.demote import Budget
from kvbm.tiers.promote import Promotion

_UNMEASURED: Final = 16
"""The first moves, while nothing is known about a place, are this part of later ones."""


def budget(mb_s: float | None, gb_day: float | None) -> Budget:
    """What may be written to a tier: so much a second, averaged over an hour, or else so much a day."""
    if mb_s is not None:
        return Budget(mb_s * 1e6 * 3600, 3600, time.monotonic)
    return Budget(None if gb_day is None else gb_day * 1e9, 86_400, time.monotonic)


def held(settings: Settings, g2: Pool) -> int:
    """Blocks that waiting requests, or other instances, may hold of those that G2 has now."""
    return max(1, int(g2.total * settings.held_share))


def promotion(settings: Settings, core: Core, block_bytes: int) -> Promotion:
    """What brings blocks up to host memory. `block_bytes` are those of a block over all ranks."""
    batch = max(1, MOVE_BYTES // block_bytes)
    in_flight = max(1, settings.g3_inflight_mb * 1_000_000 // block_bytes)
    return Promotion(
        core.host, most=partial(held, settings, core.pool), in_flight=in_flight, batch=batch,
        unmeasured=min(batch, in_flight) // _UNMEASURED, emit=core.emit, clock=time.monotonic,
    )  # fmt: skip
