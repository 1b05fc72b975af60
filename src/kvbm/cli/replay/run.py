"""One replay: a workload through the pools of one configuration."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kvbm.abc.policy import Admission, EvictionOrder, Placement
from kvbm.blocks import Pool
from kvbm.blocks.cascade import Tiers
from kvbm.cli.replay.bounds import Advance, stepwise
from kvbm.cli.replay.trace import Workload
from kvbm.core.events import Event, Removed, Stored


@dataclass(slots=True)
class TierResult:
    """What one tier did. Hits count where the block was when it was asked for."""

    name: str
    capacity: int
    hit_blocks: int = 0
    hit_tokens: int = 0
    written: int = 0
    """Blocks that became matchable in it: new ones, promoted and demoted ones."""
    evictions: int = 0
    """Blocks that left it: evicted, or moved up or down."""

    def on_event(self, event: Event) -> None:
        """Counts, as an observer of the tier's pool."""
        match event:
            case Stored(keys=keys):
                self.written += len(keys)
            case Removed(keys=keys):
                self.evictions += len(keys)


@dataclass(frozen=True, slots=True)
class Result:
    """One policy with one choice of tiers. Seconds are spent in the pools, per request, events included."""

    policy: str
    tiers: tuple[TierResult, ...]
    cut: int
    """Requests with more blocks than the fastest tier: only the first ones fit there."""
    seconds: np.ndarray[tuple[int], np.dtype[np.float64]] = field(repr=False)

    @property
    def capacity(self) -> int:
        """Blocks of all tiers."""
        return sum(tier.capacity for tier in self.tiers)

    @property
    def hit_blocks(self) -> int:
        return sum(tier.hit_blocks for tier in self.tiers)

    @property
    def hit_tokens(self) -> int:
        return sum(tier.hit_tokens for tier in self.tiers)


def replay(
    workload: Workload,
    capacities: dict[str, int],
    policy: str,
    order: Callable[[int], EvictionOrder],
    placement: Placement,
    advance: Advance,
    admission: Callable[[int], Admission] | None = None,
) -> Result:
    """Every prompt in turn: match it, promote what lies below, store the rest, let go.

    `capacities` in blocks by the name of the tier, the fastest first; `order` makes an eviction order for a
    number of slots, and `admission` the guard of each tier below the fastest.
    """
    results = tuple(TierResult(*entry) for entry in capacities.items())
    by_name = {result.name: result for result in results}
    pools = {}
    for result in results:
        # A pool that holds everything never evicts: a larger one would only take memory.
        slots = min(result.capacity, max(1, workload.unique))
        pools[result.name] = Pool(slots, order=order(slots), tier=result.name, observers=[result])
    below = results[1:] if admission else ()
    tiers = Tiers(pools, placement, admissions={tier.name: admission(tier.capacity) for tier in below if admission})
    seconds = np.empty(len(workload.prompts))
    for at, prompt in enumerate(stepwise(workload.prompts, advance)):
        keys = [workload.keys[number] for number in prompt.blocks.tolist()]
        begin = time.perf_counter()
        with tiers.match(keys) as held:
            tiers.promote(keys, held)
            tiers.store(keys, held)
        seconds[at] = time.perf_counter() - begin
        for tier, first, length in held.prefix:
            by_name[tier].hit_blocks += length
            by_name[tier].hit_tokens += prompt.tokens_of(first, first + length)
    cut = sum(len(prompt.blocks) > results[0].capacity for prompt in workload.prompts)
    return Result(policy, results, cut, seconds)
