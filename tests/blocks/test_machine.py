"""The pool against a naive model: dicts and lists, one entry per block.

`python -m tests.blocks.test_machine STEPS` is the long run.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from kvbm.blocks import Pinned, Pool, Staged, Weak, Writable
from kvbm.core.events import Cleared, Event, Moved, Removed, Stored
from kvbm.policy import EVICTION_ORDERS, eviction_order
from kvbm.testing.clock import ManualClock

SLOTS = 8
NEVER = float("inf")
KEYS = [bytes([number]) * 32 for number in range(10)]
some = st.lists(st.sampled_from(KEYS), min_size=1, max_size=6, unique=True)
prompts = st.builds(lambda start, n: KEYS[start : start + n], st.integers(0, 5), st.integers(1, 6))
runs = prompts | prompts | some
priorities = st.sampled_from([0, 0, 50, 100])
ttls = st.sampled_from([None, None, 1.0, 5.0])
REFUSES = {"lineage"}
"""Orders that do not give every block they have."""


@dataclass(eq=False)
class Block:
    slot: int
    priority: int
    expiry: float
    holds: int = 1


@dataclass(eq=False)
class Model:
    """What is registered, and who holds which slots."""

    blocks: dict[bytes, Block] = field(default_factory=dict)
    orphans: list[Block] = field(default_factory=list)
    pins: list[tuple[str, list[Block], float]] = field(default_factory=list)
    generation: int = 0

    def alive(self, key: bytes, now: float) -> bool:
        return key in self.blocks and self.blocks[key].expiry > now

    def forget(self, key: bytes) -> None:
        block = self.blocks.pop(key)
        if block.holds:
            self.orphans.append(block)

    @property
    def pinned(self) -> int:
        return sum(len(blocks) for _, blocks, _ in self.pins)

    def prefix(self, keys: Sequence[bytes], now: float) -> int:
        misses = [at for at, key in enumerate(keys) if not self.alive(key, now)]
        return misses[0] if misses else len(keys)


@dataclass(eq=False)
class Held:
    """A handle and what the model knows about it."""

    handle: Writable | Staged | Pinned
    blocks: list[Block] = field(default_factory=list)
    generation: int = 0
    priority: int = 0
    ttl: float | None = None


class PoolMachine(RuleBasedStateMachine):
    writables = Bundle("writables")
    stageds = Bundle("stageds")
    pins = Bundle("pins")
    weaks = Bundle("weaks")

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.model = Model()
        self.heard: set[bytes] = set()
        self.states: dict[int, str] = {}
        self.total = self.capacity = SLOTS
        self.live: list[Held] = []

    @initialize(
        policy=st.sampled_from(sorted(EVICTION_ORDERS)), keep=st.booleans(), doubted=st.sampled_from([0, 0.25, 1])
    )
    def make(self, policy: str, keep: bool, doubted: float) -> None:
        self.policy, self.keep_duplicates = policy, keep
        self.pool = Pool(
            SLOTS,
            order=eviction_order(policy, SLOTS),
            clock=self.clock,
            observers=[self],
            duplicates="keep" if keep else "share",
            most_doubted=doubted,
        )
        self.pool.add_observer(Follower(self.states), transitions=True)

    def on_event(self, event: Event) -> None:
        if isinstance(event, Cleared):
            self.heard.clear()
        elif isinstance(event, Stored):
            assert self.heard.isdisjoint(event.keys)
            self.heard.update(event.keys)
        elif isinstance(event, Removed):
            assert self.heard.issuperset(event.keys)
            self.heard.difference_update(event.keys)

    def keep(self, held: Held) -> Held:
        self.live.append(held)
        return held

    def hold(self, handle: Pinned, blocks: list[Block] | None = None) -> Held:
        """The model's view of blocks that were held just now."""
        if blocks is None:
            blocks = [self.model.blocks[key] for key in handle.keys]
        assert handle.slots.tolist() == [block.slot for block in blocks]
        for block in blocks:
            block.holds += 1
        return self.keep(Held(handle, blocks))

    def settle(self) -> None:
        """Follow what the pool removed; nothing that is held may be evicted, nothing alive may vanish silently."""
        for key in [key for key in self.model.blocks if key not in self.heard]:
            block = self.model.blocks[key]
            assert block.holds == 0 or block.expiry <= self.clock()
            self.model.forget(key)

    # -- writing --

    @rule(target=writables, n=st.integers(1, 6))
    def allocate(self, n: int) -> object:
        before = {key: block for key, block in self.model.blocks.items() if not block.holds}
        free = self.pool.statistics().free
        handle = self.pool.allocate(n)
        gone = [before[key] for key in before if key not in self.heard]
        stayed = [before[key] for key in before if key in self.heard]
        self.settle()
        if handle is None:
            assert free + len(before) < n or self.policy in REFUSES
            return multiple()
        live_victims = [block for block in gone if block.expiry > self.clock()]
        if (
            live_victims and self.policy not in REFUSES
        ):  # the lowest priorities go, and none while an expired block still has a slot
            assert all(block.expiry > self.clock() for block in stayed)
            assert max(b.priority for b in live_victims) <= min((b.priority for b in stayed), default=100)
            assert free + len(gone) == n
        return self.keep(Held(handle, generation=self.model.generation))

    @rule(
        target=stageds,
        held=consumes(writables),
        start=st.integers(0, 4),
        priority=priorities,
        ttl=ttls,
    )
    def stage(self, held: Held, start: int, priority: int, ttl: float | None) -> Held:
        assert isinstance(held.handle, Writable)
        keys = KEYS[start : start + len(held.handle.slots)]
        staged = held.handle.stage(keys, priority=priority, ttl=ttl)
        self.live.remove(held)
        return self.keep(Held(staged, generation=held.generation, priority=priority, ttl=ttl))

    @rule(target=pins, held=consumes(stageds), done=st.none() | st.lists(st.booleans(), min_size=6, max_size=6))
    def register(self, held: Held, done: list[bool] | None) -> Held:
        assert isinstance(held.handle, Staged)
        slots, keys = held.handle.slots.tolist(), held.handle.keys
        mask = None if done is None else np.array(done[: len(keys)])
        pinned = held.handle.register(mask)
        self.live.remove(held)
        now = self.clock()
        expiry = NEVER if held.ttl is None else now + held.ttl
        published = [key for at, key in enumerate(keys) if mask is None or mask[at]]
        if held.generation != self.model.generation:
            published = []
        assert list(pinned.keys) == published
        for key in [key for key in self.model.blocks if not self.model.alive(key, now) and key in keys]:
            self.model.forget(key)
        blocks = []
        for key in published:
            slot = slots[keys.index(key)]
            if key in self.model.blocks and self.keep_duplicates:
                blocks.append(Block(slot, 0, NEVER, holds=0))
                self.model.orphans.append(blocks[-1])
                continue
            if key in self.model.blocks:
                block = self.model.blocks[key]
                block.priority, block.expiry = max(block.priority, held.priority), max(block.expiry, expiry)
            else:
                self.model.blocks[key] = Block(slot, held.priority, expiry, holds=0)
            blocks.append(self.model.blocks[key])
        return self.hold(pinned, blocks)

    @rule(keys=prompts, priority=priorities, ttl=ttls)
    def store(self, keys: list[bytes], priority: int, ttl: float | None) -> None:
        """All at once: without it few runs get as far as an eviction."""
        raw = self.allocate(len(keys))
        if isinstance(raw, Held):
            self.drop(self.register(self.stage(raw, KEYS.index(keys[0]), priority, ttl), None))

    @rule(keys=runs, priority=priorities, ttl=ttls, high=st.booleans())
    def adopt(self, keys: list[bytes], priority: int, ttl: float | None, high: bool) -> None:
        """Blocks that lie there already."""
        free = [slot for slot in range(self.total) if self.states.get(slot, "free") == "free"]
        keys = [key for key in keys if self.pool.absent([key])][: len(free)]
        self.settle()
        slots = free[::-1][: len(keys)] if high else free[: len(keys)]
        self.pool.adopt(
            np.array(slots, np.int64),
            keys,
            [None, *keys[:-1]][: len(keys)],
            priorities=np.full(len(keys), priority, np.uint8),
            ttls=None if ttl is None else np.full(len(keys), ttl),
        )
        end = NEVER if ttl is None else self.clock() + ttl
        self.model.blocks |= {key: Block(at, priority, end, 0) for key, at in zip(keys, slots, strict=True)}

    # -- reading --

    @rule(keys=runs)
    def present(self, keys: list[bytes]) -> None:
        assert self.pool.present(keys).tolist() == [self.model.alive(key, self.clock()) for key in keys]
        self.settle()

    @rule(target=pins, keys=runs, start=st.integers(0, 3))
    def match(self, keys: list[bytes], start: int) -> Held:
        expected = self.model.prefix(keys[start:], self.clock())
        assert self.pool.peek(keys, start) == expected
        pinned = self.pool.match(keys, start)
        self.settle()
        assert list(pinned.keys) == keys[start : start + expected]
        return self.hold(pinned)

    @rule(target=pins, keys=runs)
    def scan(self, keys: list[bytes]) -> Held:
        expected = [at for at, key in enumerate(keys) if self.model.alive(key, self.clock())]
        pinned, positions = self.pool.scan(keys)
        self.settle()
        assert positions == expected
        assert list(pinned.keys) == [keys[at] for at in positions]
        return self.hold(pinned)

    @rule(keys=runs)
    def doubt(self, keys: list[bytes]) -> None:
        self.pool.doubt(keys)

    @rule(keys=runs)
    def want(self, keys: list[bytes]) -> None:
        self.pool.want(keys)

    @rule(target=pins, n=st.integers(0, 6))
    def candidates(self, n: int) -> Held:
        pinned = self.pool.candidates(n)
        self.settle()
        assert len(pinned) <= n
        assert all(self.model.blocks[key].holds == 0 for key in pinned.keys)
        return self.hold(pinned)

    @rule(held=consumes(pins))
    def evict(self, held: Held) -> None:
        assert isinstance(held.handle, Pinned)
        last = {key: block for key, block in self.model.blocks.items() if block in held.blocks and block.holds == 1}
        assert held.handle.evict() == len(last)
        self.live.remove(held)
        self.let_go(held.blocks)
        for key in last:
            del self.model.blocks[key]

    @rule(keys=prompts, owner=st.sampled_from(["a", "b"]), ttl=st.sampled_from([1.0, 5.0]))
    def pin(self, keys: list[bytes], owner: str, ttl: float) -> None:
        allowed = max(0, self.total // 2 - self.model.pinned)
        expected = min(self.model.prefix(keys, self.clock()), allowed)
        assert self.pool.pin(keys, owner=owner, ttl=ttl) == expected
        self.settle()
        blocks = [self.model.blocks[key] for key in keys[:expected]]
        for block in blocks:
            block.holds += 1
        if blocks:
            self.model.pins.append((owner, blocks, self.clock() + ttl))

    @rule(owner=st.sampled_from(["a", "b"]))
    def unpin(self, owner: str) -> None:
        held = sum(len(blocks) for name, blocks, _ in self.model.pins if name == owner)
        assert self.pool.pins().get(owner, 0) == held
        assert self.pool.unpin(owner) == held
        self.end_pins(lambda name, _: name == owner)

    def end_pins(self, over: Callable[[str, float], bool]) -> None:
        ended = [pin for pin in self.model.pins if over(pin[0], pin[2])]
        self.model.pins = [pin for pin in self.model.pins if not over(pin[0], pin[2])]
        for _, blocks, _ in ended:
            self.let_go(blocks)

    @rule(num_slots=st.integers(1, 2 * SLOTS))
    def resize(self, num_slots: int) -> None:
        before = self.pool.statistics()
        inactive = {key for key, block in self.model.blocks.items() if not block.holds}
        dead = {key for key in inactive if not self.model.alive(key, self.clock())}
        total = self.pool.resize(num_slots)
        gone = inactive - self.heard
        self.settle()
        self.total, self.capacity = total, max(total, self.capacity)
        if total != num_slots:
            assert num_slots < total
            assert self.pool.statistics().free == 0
            assert not inactive & self.heard or self.policy in REFUSES
        elif all(self.model.alive(key, self.clock()) for key in inactive & self.heard):
            assert len(gone) == max(len(dead), before.total - total - before.free)

    @rule(keys=runs)
    def absent(self, keys: list[bytes]) -> None:
        staged = {
            key
            for held in self.live
            if isinstance(held.handle, Staged) and held.generation == self.model.generation
            for key in held.handle.keys
        }
        known = {key for key in keys if self.model.alive(key, self.clock())} | staged
        assert self.pool.absent(keys) == [at for at, key in enumerate(keys) if key not in known]
        self.settle()

    @rule(keys=runs)
    def touch(self, keys: list[bytes]) -> None:
        self.pool.touch(keys)
        self.settle()

    @rule(held=pins, n=st.integers(0, 6))
    def narrow(self, held: Held, n: int) -> None:
        if held in self.live and isinstance(held.handle, Pinned):
            n = min(n, len(held.handle))
            held.handle.narrow(n)
            self.let_go(held.blocks[n:])
            del held.blocks[n:]

    # -- letting go --

    def let_go(self, blocks: list[Block]) -> None:
        for block in blocks:
            block.holds -= 1
        self.model.orphans = [block for block in self.model.orphans if block.holds]

    @rule(held=st.one_of(consumes(writables), consumes(stageds), consumes(pins)))
    def drop(self, held: Held) -> None:
        held.handle.drop()
        self.live.remove(held)
        self.let_go(held.blocks)

    @rule(target=weaks, held=pins)
    def weaken(self, held: Held) -> object:
        assert isinstance(held.handle, Pinned)
        return (held.handle.weak(), held.handle.keys, list(held.blocks))

    @rule(target=pins, remembered=weaks)
    def upgrade(self, remembered: tuple[Weak, tuple[bytes, ...], list[Block]]) -> object:
        weak, keys, blocks = remembered
        pinned = weak.upgrade()
        now = self.clock()
        same = all(self.model.alive(key, now) for key in keys) and blocks == [self.model.blocks[key] for key in keys]
        if pinned is None:
            assert not same or not keys
            return multiple()
        assert all(self.model.alive(key, now) for key in keys)
        return self.hold(pinned)

    # -- un-publishing --

    @rule(keys=runs)
    def discard(self, keys: list[bytes]) -> None:
        registered = [key for key in keys if key in self.model.blocks]
        assert self.pool.discard(keys) == len(registered)
        for key in registered:
            self.model.forget(key)

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        self.end_pins(lambda *_: True)
        self.model.generation += 1
        for key in list(self.model.blocks):
            self.model.forget(key)

    @rule(seconds=st.sampled_from([0.5, 1.0, 4.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.end_pins(lambda _, until: until <= self.clock())

    # -- always --

    @invariant()
    def consistent(self) -> None:
        seen, model = self.pool.statistics(), self.model
        self.pool.check()
        self.settle()
        assert seen.total == self.pool.total == self.total
        assert seen.capacity == self.pool.capacity == self.capacity >= self.total
        assert seen.pinned == model.pinned
        assert seen.free + seen.writable + seen.staged + seen.registered + seen.orphaned == seen.total
        assert self.heard == set(model.blocks)
        assert seen.registered == len(model.blocks)
        assert seen.orphaned == len(model.orphans)
        assert seen.active == sum(block.holds > 0 for block in model.blocks.values())
        assert seen.writable == sum(len(h.handle.slots) for h in self.live if isinstance(h.handle, Writable))
        assert seen.staged == sum(len(h.handle.slots) for h in self.live if isinstance(h.handle, Staged))
        used = [block.slot for block in (*model.blocks.values(), *model.orphans)]
        for held in self.live:
            if not isinstance(held.handle, Pinned):
                used += held.handle.slots.tolist()
        assert len(set(used)) == len(used) == self.total - seen.free
        followed = Counter(self.states.values())
        assert followed["active"] == seen.active
        assert len(self.states) - followed["retired"] <= seen.total
        assert followed["inactive"] == seen.inactive
        assert followed["writable"] == seen.writable
        assert followed["staged"] == seen.staged
        assert followed["orphaned"] == seen.orphaned
        for key, block in model.blocks.items():
            found = self.pool.look(key) if model.alive(key, self.clock()) else None
            assert found is None or (found.slot, found.holds, found.priority) == (
                block.slot,
                block.holds,
                block.priority,
            )

    def teardown(self) -> None:
        for held in self.live:
            held.handle.drop()
        self.pool.clear()
        assert self.pool.statistics().free == self.total
        assert set(self.states.values()) <= {"free", "retired"}


class Follower:
    """Knows the state of every slot from events alone."""

    def __init__(self, states: dict[int, str]) -> None:
        self.states = states

    def on_event(self, event: Event) -> None:
        if isinstance(event, Moved):
            for slot in event.slots:
                assert self.states.get(slot, "free") == event.source
                self.states[slot] = event.target


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def long_run(steps: int) -> None:
    """As many steps, in runs of 200; fails like the test does."""
    started = time.monotonic()
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        PoolMachine,
        settings=settings(
            max_examples=steps // 200,
            stateful_step_count=200,
            deadline=None,
            database=None,
            suppress_health_check=checks,
        ),
    )
    print(f"{steps:,} steps, every order, no difference from the model: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    long_run(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
