"""What a replay should come to, in the plainest words: lists of ids, looked through from end to end."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby

Prompts = Sequence[Sequence[int]]


class Tier:
    """`order`: what is there, the first to go first."""

    def __init__(self, capacity: int, policy: str) -> None:
        self.capacity, self.policy = capacity, policy
        self.order: list[int] = []
        self.held: set[int] = set()
        self.runs: list[list[int]] = []
        """What is held, as it will be let go: run by run."""
        self.passed: set[int] = set()
        self.hits = self.written = self.evictions = 0

    def victims(self, n: int) -> list[int]:
        """What has to go for `n` more; fewer where the rest is held."""
        idle = sum(block not in self.held for block in self.order)
        short, found = min(idle, max(0, len(self.order) + n - self.capacity)), []
        for block in self.order:
            if len(found) == short:
                break
            if block in self.held:
                self.passed.add(block)
            else:
                found.append(block)
        return found

    def remove(self, blocks: Sequence[int]) -> None:
        self.order = [block for block in self.order if block not in blocks]
        self.held -= set(blocks)
        self.evictions += len(blocks)

    def add(self, run: Sequence[int]) -> None:
        """A run in prompt order: its leaf goes first."""
        assert len(self.order) + len(run) <= self.capacity
        self.order += reversed(run)
        self.written += len(run)

    def hold(self, run: Sequence[int]) -> None:
        self.held.update(run)
        if run:
            self.runs.append(list(run))

    def release(self, prompt: Sequence[int]) -> None:
        used = [block for block in reversed(prompt) if block in self.held]
        if self.policy == "lru":
            self.order = [block for block in self.order if block not in self.held] + used
        else:  # one whose turn had come is first once it is let go; the run of the root is let go last
            for run in sorted(self.runs, key=lambda run: prompt.index(run[0]), reverse=True):
                for block in run:
                    if block in self.passed and block in self.order:
                        self.order.remove(block)
                        self.order.insert(0, block)
        self.held.clear()
        self.runs.clear()
        self.passed.clear()


class Cache:
    """One tier or two; write-through: new blocks go to both, exclusive: a block is in one."""

    def __init__(self, capacities: Sequence[int], policy: str = "lru", placement: str = "write-through") -> None:
        self.tiers = [Tier(capacity, policy) for capacity in capacities]
        self.top, self.bottom = self.tiers[0], self.tiers[-1]
        self.exclusive = placement == "exclusive" and len(self.tiers) == 2
        self.parents: dict[int, int | None] = {}

    def replay(self, prompts: Prompts) -> Cache:
        for prompt in prompts:
            self.request(prompt)
        return self

    def request(self, prompt: Sequence[int]) -> None:
        self.parents.update(zip(prompt, [None, *prompt], strict=False))
        prefix = self.prefix(prompt)
        runs = [(tier, [block for block, _ in run]) for tier, run in groupby(prefix, key=lambda pair: pair[1])]
        for tier, run in runs:
            tier.hold(run)
        for run in [run for tier, run in runs if tier is not self.top]:
            if not self.promote(run):
                break
        rest = prompt[len(prefix) :]
        for tier in [self.top] if self.exclusive else self.tiers:
            self.store(tier, rest)
        if self.exclusive:
            self.bottom.remove([block for block in rest if block in self.top.held and block in self.bottom.order])
        for tier in self.tiers:
            tier.release(prompt)
            assert len(tier.order) == len(set(tier.order)) <= tier.capacity

    def prefix(self, prompt: Sequence[int]) -> list[tuple[int, Tier]]:
        found = []
        for block in prompt:
            tier = next((tier for tier in self.tiers if block in tier.order), None)
            if tier is None:
                break
            found.append((block, tier))
            tier.hits += 1
            tier.held.add(block)
        return found

    def promote(self, run: list[int]) -> bool:
        there = run[: self.room(self.top, len(run))]
        self.top.add(there)
        self.top.hold(there)
        if self.exclusive:
            self.bottom.remove(there)
        return bool(there)

    def store(self, tier: Tier, rest: Sequence[int]) -> None:
        for there, group in groupby(rest, key=lambda block: block in tier.order):
            if there:
                tier.hold([*group])
        for present, group in groupby(rest, key=lambda block: block in tier.held):
            if present:
                continue
            run = list(group)
            there = run[: self.room(tier, len(run))]
            tier.add(there)
            tier.hold(there)
            if len(there) < len(run):
                return

    def room(self, tier: Tier, n: int) -> int:
        """Makes room; how much there is then, at most `n`."""
        victims = tier.victims(n)
        if self.exclusive and tier is self.top:
            self.demote([block for block in victims if block not in self.bottom.order])
        tier.remove(victims)
        return min(n, tier.capacity - len(tier.order))

    def demote(self, victims: list[int]) -> None:
        chains: list[list[int]] = []
        for block in victims:
            if chains and self.parents[chains[-1][0]] == block:
                chains[-1].insert(0, block)
            else:
                chains.append([block])
        for chain in chains:
            there = chain[: self.room(self.bottom, len(chain))]
            self.bottom.add(there)
            if not there:
                return


def min_hits(prompts: Prompts, capacity: int, *, leaf_first: bool) -> int:
    """MIN as the docstring of `kvbm.cli.replay.bounds.Min` says it."""
    uses: dict[int, list[int]] = {}
    for at, prompt in enumerate(prompts):
        for block in prompt:
            uses.setdefault(block, []).append(at)
    cached: list[int] = []  # referenced longest ago first
    hits = 0
    for now, prompt in enumerate(prompts):
        missing = [at for at, block in enumerate(prompt) if block not in cached]
        hits += missing[0] if missing else len(prompt)
        waiting = set(prompt)

        def need(block: int, now: int = now, waiting: set[int] = waiting) -> tuple[int, int]:
            """Which request needs it next, and (where that counts) as which of its blocks."""
            if block in waiting:
                return now, 0
            later = uses[block][bisect_right(uses[block], now) :]
            if not later:
                return len(prompts), 0
            return later[0], prompts[later[0]].index(block) if leaf_first else 0

        for block in reversed(prompt) if leaf_first else prompt:
            waiting.remove(block)
            cached = [*(other for other in cached if other != block), block]
            if len(cached) > capacity:
                cached.remove(max(cached, key=need))  # of equals the first
    return hits
