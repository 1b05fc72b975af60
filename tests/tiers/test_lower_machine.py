"""Random requests over G1, G2 and G3 with random answers in random order. The workers carry, instead of bytes, the key
whose bytes a slot has: every copy that is done moves it, one that is not leaves rubbish behind."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from random import Random
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import tests.before  # noqa: F401
from kvbm.core.outcome import Outcome
from kvbm.link.messages import Cancel, Copy, Result, unpack
from kvbm.tiers.disk.orders import Forget, Generation, Probe, Probed, Read, Write
from tests.leader.roles import DONE, FAILED, Stage, keys_of

CORRUPT, MISSING = Outcome.CORRUPT, Outcome.MISSING
G2, G3, IN_FLIGHT, MOST, G1 = 12, 10, 5, 6, 200
LAST = b"last".ljust(32)
RUBBISH = b"rubbish"
SELDOM = st.sampled_from([False, False, False, True])
# Prompts that share their beginnings.
ROOT = keys_of("root", 2)
PROMPTS: list[list[bytes]] = [[*ROOT, *keys_of(name, 4), LAST] for name in "abc"] + [[*keys_of("d", 5), LAST]]
Content = dict[int, tuple[bytes, int]]
"""Slot -> the key whose bytes it has, and the generation they were computed in."""


class Rank:
    """What one worker has in its memory and its file."""

    def __init__(self) -> None:
        self.g2: Content = {}
        self.g3: Content = {}
        self.generation = 0


class Now(Executor):
    """The folder's thread, so that the same steps always have the same end: done at once, heard of at the next tick."""

    def submit(self, call: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call(*args, **kwargs))
        return future


class Machine(RuleBasedStateMachine):
    @initialize(ranks=st.integers(1, 2), exclusive=SELDOM, admit=st.sampled_from(["all", "all", "frequency"]))
    def begin(self, ranks: int, exclusive: bool, admit: str) -> None:
        self.stage = Stage(
            G2, ranks=ranks, held_share=0.5, store_inflight_mb=6, store_deadline_s=9e3, load_deadline_s=9e3
        )
        self.stage.add_disk(G3, exclusive=exclusive, admit=admit, in_flight=IN_FLIGHT, batch=2, most=MOST)
        self.stage.tier._chores = Now()  # type: ignore[assignment]
        self.ranks = [Rank() for _ in range(ranks)]
        self.g1: Content = {}
        self.generation = 0
        self.born: dict[str, int] = {}
        self.prompts: dict[str, list[bytes]] = {}
        self.placed: dict[str, list[int]] = {}
        self.done: dict[str, int] = {}
        self.loading: dict[str, Copy] = {}
        self.pending: list[tuple[int, Any]] = []
        """What workers have been told and not answered: rank, message. `later`: what is about to be answered."""
        self.later: list[tuple[int, Any]] = []
        self.copies: dict[int, tuple[Copy, bool]] = {}
        self.numbers = iter(range(1_000_000))
        for prompt in PROMPTS[:2]:
            self.lives(prompt)
            self.many_answer(Random(0), 3)

    # ------------------------------------------------------------------ the engine

    @rule(prompt=st.sampled_from(PROMPTS), priority=st.sampled_from([0, 0, 3]), ttl=st.sampled_from([None, None, 20.0]))
    def arrives(self, prompt: list[bytes], priority: int, ttl: float | None) -> None:
        if len(self.prompts) < 6:
            name = f"r{next(self.numbers)}"
            self.prompts[name], self.born[name], self.done[name] = prompt, self.generation, 0
            self.stage.begin(name, prompt, priority=priority, ttl=ttl)

    @rule(prompt=st.sampled_from(PROMPTS))
    def lives(self, prompt: list[bytes]) -> None:
        """A request comes, and goes as fast as it can."""
        self.arrives(prompt, 0, None)
        name = next(reversed(self.prompts), None)
        if name is not None and name not in self.placed:
            self._schedule(name, placed=True)
        if name in self.placed and name not in self.loading:
            self._compute(name, len(prompt))
            self._end(name)

    @rule(prompt=st.sampled_from(PROMPTS), first=st.integers(0, 5))
    def loses(self, prompt: list[bytes], first: int) -> None:
        """Host memory was needed for others."""
        self.stage.pool.discard(prompt[first:])

    @rule(prompt=st.sampled_from(PROMPTS), random=st.randoms(use_true_random=False), rounds=st.integers(0, 4))
    def returns(self, prompt: list[bytes], random: Random, rounds: int) -> None:
        """A prompt comes again after host memory was needed for others, and is scheduled after a while."""
        self.stage.pool.discard(prompt)
        self.arrives(prompt, 0, None)
        self.hear()
        if rounds:
            self.many_answer(random, rounds - 1)
            name = next(reversed(self.prompts))
            if name not in self.placed:
                self._schedule(name, placed=True)

    @rule(data=st.data(), placed=st.sampled_from([True, True, False]))
    def is_scheduled(self, data: st.DataObject, placed: bool) -> None:
        if waiting := [name for name in self.prompts if name not in self.placed]:
            self._schedule(data.draw(st.sampled_from(waiting)), placed=placed)

    def _schedule(self, name: str, *, placed: bool) -> None:
        keys = self.prompts[name][:-1]
        found = self.stage.leader.match(name, 0, len(keys))
        self.hear()
        if found is None:
            return
        hold = self.stage.leader.requests[name].hold
        if found:
            assert hold is not None
            assert hold.keys == tuple(keys[:found])
            for key, slot in zip(hold.keys, hold.slots.tolist(), strict=True):
                for rank in self.ranks:
                    assert rank.g2[slot] == (key, self.generation), "promised what is not there"
        if placed:
            g1 = self._blocks(len(keys) + 1)
            if g1 is None:
                return
            self.placed[name] = g1
            self.stage.place(name, g1, found)
            self.done[name] = found
        self._step({})

    def _blocks(self, count: int) -> list[int] | None:
        taken = {block for g1 in self.placed.values() for block in g1}
        taken |= {block for copy, _ in self.copies.values() for block in copy.g1_slots().tolist()}
        free = [block for block in range(G1) if block not in taken]
        return free[:count] if len(free) >= count else None

    @rule(data=st.data(), blocks=st.integers(1, 7))
    def computes(self, data: st.DataObject, blocks: int) -> None:
        if ready := [name for name in self.placed if name not in self.loading]:
            self._compute(data.draw(st.sampled_from(ready)), blocks)

    def _compute(self, name: str, blocks: int) -> None:
        prompt = self.prompts[name]
        for at in range(self.done[name], min(self.done[name] + blocks, len(prompt))):
            self.g1[self.placed[name][at]] = (prompt[at], self.born[name])
        self.done[name] = min(self.done[name] + blocks, len(prompt))
        self._step({name: self.done[name]})

    def _step(self, complete: dict[str, int]) -> None:
        step = self.stage.step(complete)
        self.stage.clock.advance(0.01)
        if complete:
            self.stage.leader.stepped()
        for copy in step.loads:
            self.loading[copy.request] = copy
        for copy, load in [(copy, True) for copy in step.loads] + [(copy, False) for copy in step.stores]:
            self.copies[copy.job] = (copy, load)
            self.pending += [(rank, copy) for rank in range(len(self.ranks))]

    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        if names := [name for name in self.prompts if name not in self.loading]:
            self._end(data.draw(st.sampled_from(names)))

    def _end(self, name: str) -> None:
        self.stage.leader.finish(name, self.placed.pop(name, []), self.done.pop(name))
        del self.prompts[name]
        self._step({})

    @rule(really=SELDOM)
    def reset(self, really: bool) -> None:
        if really:
            self.generation += 1
            self.stage.leader.reset()

    # ------------------------------------------------------------------ the workers

    def hear(self) -> None:
        for rank in range(len(self.ranks)):
            for message in self.stage.hear(object, rank):
                match message:
                    case Forget():
                        for slot, key in zip(unpack(message.g3).tolist(), message.keys, strict=True):
                            if self.ranks[rank].g3.get(slot, (b"", 0))[0] == key:
                                del self.ranks[rank].g3[slot]
                    case Generation():
                        self.ranks[rank].generation = message.number
                        self.ranks[rank].g3.clear()
                    case Write() | Read():
                        self.pending.append((rank, message))
                    case Probe():
                        self.pending.append((rank, message))
                    case Cancel():
                        pass

    @rule(data=st.data(), how=st.sampled_from(["well", "well", "failed", "corrupt", "cancelled"]))
    @precondition(lambda self: self.pending)
    def one_answers(self, data: st.DataObject, how: str) -> None:
        self.answer(*self.pending.pop(data.draw(st.integers(0, len(self.pending) - 1))), how)

    @rule(random=st.randoms(use_true_random=False), rounds=st.integers(1, 3))
    @precondition(lambda self: self.pending)
    def many_answer(self, random: Random, rounds: int) -> None:
        """All that is asked of the workers ends, and what comes of that, in any order."""
        for _ in range(rounds):
            random.shuffle(self.pending)
            pending, self.pending = self.pending, []
            while pending:
                rank, message = pending.pop()
                self.later = pending
                self.answer(rank, message, "well")
            self.stage.leader.tick()
            self.hear()
        self.later = []

    def answer(self, number: int, message: Any, how: str) -> None:
        rank = self.ranks[number]
        match message:
            case Copy():
                _, load = self.copies[message.job]
                g1, g2 = message.g1_slots().tolist(), message.g2_slots().tolist()
                outcomes = [FAILED if how != "well" and at % 2 else DONE for at in range(len(g1))]
                for block, slot, outcome in zip(g1, g2, outcomes, strict=True):
                    if load and outcome == DONE:
                        self.g1[block] = rank.g2[slot]
                        request = self.prompts.get(message.request)
                        if request is not None:
                            expected = request[self.placed[message.request].index(block)]
                            assert rank.g2[slot][0] == expected, "the bytes of another block were loaded"
                    elif not load:
                        rank.g2[slot] = self.g1[block] if outcome == DONE else (RUBBISH, -1)
                others = [*self.pending, *self.later]
                last = not any(other.job == message.job for _, other in others if isinstance(other, Copy))
                if last:
                    del self.copies[message.job]
                if last and load and self.loading.get(message.request) is message:
                    del self.loading[message.request]
                    if any(outcomes):
                        self.done[message.request] = 0
            case Write():
                outcomes = self._write(rank, message, how)
            case Read():
                outcomes = self._read(rank, message, how)
            case Probe():
                self.stage.say(Probed(number, None if how == "well" else how, message.number), number)
                self.stage.leader.tick()
                return
        error = None if not any(outcomes) else "cancelled" if how == "cancelled" else how
        self.stage.say(Result(message.job, number, bytes(outcomes), len(outcomes), 0.001, error), number)

    def _write(self, rank: Rank, write: Write, how: str) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for slot, place, key in zip(unpack(write.g2).tolist(), unpack(write.g3).tolist(), write.keys, strict=True):
            rank.g3.pop(place, None)
            good = how == "well" and write.generation == rank.generation
            if good:
                assert rank.g2[slot][0] == key, "a slot was written that has other bytes"
                rank.g3[place] = rank.g2[slot]
            outcomes.append(DONE if good else FAILED)
        return outcomes

    def _read(self, rank: Rank, read: Read, how: str) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for slot, place, key in zip(unpack(read.g2).tolist(), unpack(read.g3).tolist(), read.keys, strict=True):
            rank.g2[slot] = (RUBBISH, -1)
            there = rank.g3.get(place)
            if there is None or there[0] != key:
                outcomes.append(MISSING)
            elif how == "well":
                rank.g2[slot] = there
                outcomes.append(DONE)
            elif how == "corrupt":
                del rank.g3[place]
                outcomes.append(CORRUPT)
            else:
                outcomes.append(FAILED)
        return outcomes

    # ------------------------------------------------------------------ time

    @rule(seconds=st.sampled_from([0.001, 0.01, 0.1, 1.0, 12.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.stage.tick(seconds)

    @rule(really=SELDOM, told=st.booleans())
    def pauses(self, really: bool, told: bool) -> None:
        if really:
            self.stage.leader.pause()
            if told:
                self.stage.leader.tick()
            self.stage.leader.resume()

    # ------------------------------------------------------------------ what always holds

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "stage"):
            return
        stage = self.stage
        assert stage.leader.problems == []
        self.hear()
        stage.pool.check()
        stage.disk.check()
        assert stage.demotion._in_flight <= IN_FLIGHT
        assert stage.leader.gate.reading <= IN_FLIGHT
        assert sum(staging.held for staging in stage.promotion._stagings) <= MOST
        assert set(stage.demotion._queued) == {key for run in stage.demotion._queue for key in run}
        assert len(stage.demotion._queued) <= G2
        for staging in stage.promotion._coming.values():
            assert staging in stage.promotion._stagings
        self._right(stage.pool, [rank.g2 for rank in self.ranks])
        if stage.tier.problem is None:
            self._right(stage.disk, [rank.g3 for rank in self.ranks], may_lack=True)

    def _right(self, pool: Any, contents: Sequence[Content], *, may_lack: bool = False) -> None:
        """What can be matched has the bytes of its key, of this generation, on every rank. A file may have lost a block
        that another request is just being told about."""
        for key in {key for prompt in PROMPTS for key in prompt}:
            if (block := pool.look(key)) is not None:
                for content in contents:
                    there = content.get(block.slot)
                    if there is None:
                        assert may_lack
                    else:
                        assert there == (key, self.generation), "a block has the bytes of another one"

    def teardown(self) -> None:
        if not hasattr(self, "stage"):
            return
        stage = self.stage
        stage.leader.paused = False
        for name in list(self.prompts):
            if name not in self.loading:
                self._end(name)
        for _ in range(200):
            stage.tick(1.0)
            stage.settle()
            self.hear()
            if not self.pending and stage.demotion.idle and stage.tier.problem is None:
                break
            for rank, message in self.pending[:]:
                self.pending.remove((rank, message))
                self.answer(rank, message, "well")
            for name in list(self.prompts):
                if name not in self.loading:
                    self._end(name)
        stage.tick(31.0)
        self.hear()
        assert stage.tier.problem is None
        assert stage.tier.in_flight() == (0, 0)
        assert not stage.promotion._stagings
        assert stage.pool.statistics().active == 0
        self.holds()
        stage.close()


Machine.TestCase.settings = settings(
    max_examples=30, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestLowerMachine = Machine.TestCase
