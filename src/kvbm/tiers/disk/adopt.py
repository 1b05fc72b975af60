"""What a folder held becomes the blocks of a pool."""

from __future__ import annotations

import time

import numpy as np

from kvbm.blocks import Pool
from kvbm.core.region import Slots
from kvbm.stores.disk.format import heads
from kvbm.stores.disk.recovery import Recovered


def adopt(pool: Pool, found: Recovered) -> None:
    """Have a pool that is empty hold what lies on disk. What was written first is the first to go, but never before
    what follows it in a prompt: that would be lost with it."""
    keys, known = found.key_list(), heads(found.keys, found.tails)
    by_head = np.argsort(known)
    places = np.searchsorted(known, found.parents, sorter=by_head)
    above = by_head[np.minimum(places, len(by_head) - 1)] if len(by_head) else by_head
    above = np.where((found.parents != 0) & (known[above] == found.parents), above, -1)
    order = leaves_first(above)
    pool.adopt(
        found.slots[order],
        [keys[at] for at in order.tolist()],
        [keys[at] if at >= 0 else None for at in above[order].tolist()],
        priorities=np.clip(found.priorities, 0, 100).astype(np.uint8)[order],
        ttls=np.maximum(found.expires - time.time(), 1e-3)[order],
    )


def leaves_first(above: Slots) -> Slots:
    """The order in which blocks, the oldest first, have to go. `above[i]` is the block before block `i` in its prompt,
    -1 where there is none.

    A prompt is written batch by batch, its root first. So a block is as young as the youngest that follows it, however
    far: that is handed up 1, 2, 4, ... blocks at a time.
    """
    youngest, depth, above = np.arange(len(above)), (above >= 0).astype(np.int64), above.copy()
    for _ in range(len(above).bit_length()):
        below = np.flatnonzero(above >= 0)
        if not len(below):
            break
        over = above[below]
        np.maximum.at(youngest, over, youngest[below])
        depth[below] += depth[over]
        above[below] = above[over]
    order: Slots = np.lexsort((-depth, youngest))
    return order
