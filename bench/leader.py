"""What the leader costs the engine's thread: microseconds of each call for a request of 500 blocks that nobody has, of
one that host memory has, and of one whose blocks are below it. Ranks, disk and peers are played: no byte moves.

Rounds of all cases alternate, and the first case is there twice (A/A). Two checkouts are compared by running this in
both, one after the other, several times.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from bench.harness import Bench
from kvbm.blocks import LayerGroup
from kvbm.core.events import Admitted
from kvbm.tiers.disk.orders import Read
from tests.leader.roles import BLOCK_TOKENS, Stage, keys_of

BLOCKS, SLOTS, ROUNDS = 500, 4096, 40
WINDOW = LayerGroup("window", BLOCK_TOKENS, 32 * BLOCK_TOKENS + 1)
GROUPS = (LayerGroup("full", BLOCK_TOKENS), WINDOW)


def stage(*, groups: bool = False) -> Stage:
    return Stage(SLOTS, groups=GROUPS if groups else (), store_inflight_mb=100_000, held_share=1.0)


def with_disk() -> Stage:
    return stage().add_disk(SLOTS, in_flight=1024, batch=64, most=2 * BLOCKS)


def with_peers() -> Stage:
    made = stage().add_peers()
    made.network.peers = ("other",)
    return made


class Case:
    """One leader; `times` are the seconds of each call."""

    def __init__(self, make: Callable[[], Stage]) -> None:
        self.stage = make()
        self.groups = GROUPS if make is with_groups else ()
        self.times: dict[str, list[float]] = defaultdict(list)

    def run(self, name: str) -> None:
        """One request that finds nothing, the same again, and again when only what is below has it."""
        keys = keys_of(name, BLOCKS)
        self._request(f"{name} new", keys, "new")
        self._request(f"{name} there", keys, "in G2")
        if self._disk:
            self.stage.pool.discard(keys)
            self._request(f"{name} below", keys, "on disk")
        self.stage.pool.clear()

    @property
    def _disk(self) -> bool:
        return self.stage.leader.core.lower.stack is not None and "g3" in self.stage.leader.core.lower.stack.tiers

    def _timed(self, what: str, call: Callable[..., Any], *args: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        result = call(*args, **named)
        self.times[what].append(time.perf_counter() - begun)
        return result

    def _request(self, name: str, keys: list[bytes], kind: str) -> None:
        leader = self.stage.leader
        self._timed(f"{kind}: begin", self.stage.begin, name, keys, tokens=BLOCKS * BLOCK_TOKENS + 1)
        found = self._timed(f"{kind}: match", leader.match, name, 0, BLOCKS)
        if found is None:  # others are asked, or it comes from disk
            for search in () if self._disk else self.stage.network.searches:
                search.ended = True
            while reads := self.stage.hear(Read):
                for read in reads:
                    self.stage.moved(read)
                self.stage.tick()
            found = leader.match(name, 0, BLOCKS)
        assert found == (0 if kind == "new" else BLOCKS), (kind, found)
        tables = [[*range(1, BLOCKS + 1)], *([*range(BLOCKS + 1, 2 * BLOCKS + 1)] for _ in self.groups[1:])]
        if found:
            tables[1:] = [[0] * WINDOW.first(BLOCKS) + table[WINDOW.first(BLOCKS) :] for table in tables[1:]]
        tokens = Admitted(BLOCKS * BLOCK_TOKENS, 0, found * BLOCK_TOKENS)
        self._timed(f"{kind}: place", leader.place, name, tables[0], found, tokens, tables[1:])
        if not found:
            self._timed(f"{kind}: advance", leader.advance, name, BLOCKS)
        step = self._timed(f"{kind}: seal", leader.seal, tokens=0 if found else BLOCKS * BLOCK_TOKENS)
        for copy in [*step.loads, *step.stores]:
            self.stage.answer(copy)
        self.stage.tick()
        self._timed(f"{kind}: finish", leader.finish, name, tables[0], BLOCKS, tables[1:])
        for copy in leader.seal(tokens=0).stores:
            self.stage.answer(copy)
        if self._disk:
            self.stage.write_all()
        self.stage.hear(object)


def with_groups() -> Stage:
    return stage(groups=True)


def main() -> int:
    """See the module."""
    cases = {
        "G2 alone": Case(stage), "G2 alone again": Case(stage), "disk": Case(with_disk),
        "layer groups": Case(with_groups), "peers": Case(with_peers),
    }  # fmt: skip
    for number in range(ROUNDS):
        for name, case in cases.items():
            case.run(f"{name} {number}")
    bench = Bench("leader")
    bench.info("blocks", BLOCKS)
    bench.info("rounds", ROUNDS)
    base = {what: statistics.median(times) * 1e6 for what, times in cases["G2 alone"].times.items()}
    for name, case in cases.items():
        for what, times in case.times.items():
            against = f"G2 alone, {base[what]:.0f} µs" if what in base and name != "G2 alone" else ""
            label = f"{what}, µs, {name}" + (" (A/A)" if name.endswith("again") else "")
            bench.row(label, against, statistics.median(times) * 1e6)
    return bench.write()


if __name__ == "__main__":
    sys.exit(main())
