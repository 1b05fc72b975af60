"""An engine that changes its adapters at random, on each rank for itself, and finds blocks in its own cache by the
prompt alone. Whatever is stored is what its key says."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest

from kvbm.core.events import Admitted
from kvbm.leader.requests import Request
from kvbm.leader.variants import Variants
from kvbm.link.messages import Copy, Expected, Foresee, Foreseen, Unlike, Used
from tests.leader.roles import FAILED, Stage
from tests.leader.test_variants import BLOCKS, begin, keys_with

PROMPTS = "pqr"
DIGESTS = [bytes([number]) * 32 for number in (1, 2, 3)]
RANKS = (0, 1)


def value(prompt: str, digest: bytes, before: Any) -> Any:
    """What a block is that this adapter computes behind another one."""
    return prompt, digest, before


def pairs(copy: Copy) -> Iterator[tuple[int, int]]:
    return zip(copy.g1_slots().tolist(), copy.g2_slots().tolist(), strict=True)


class Engine:
    """Blocks are values; a request is what it has computed of which prompt, and where."""

    def __init__(self, stage: Stage, dice: random.Random) -> None:
        self.stage, self.dice = stage, dice
        self.held = [{1: DIGESTS[0], 2: DIGESTS[1]} for _ in RANKS]
        self.g1: list[dict[int, Any]] = [{} for _ in RANKS]
        self.g2: list[dict[int, Any]] = [{} for _ in RANKS]
        self.cache: dict[str, list[int]] = {}
        self.free, self.names = list(range(40)), 0
        self.running: dict[str, dict[str, Any]] = {}
        self.owed: list[Callable[[], None]] = []
        self.hits = self.refused = 0

    def change(self) -> None:
        """Another adapter under a number; mostly on both ranks."""
        digest, number = self.dice.choice(DIGESTS), self.dice.choice([1, 2])
        for rank in RANKS if self.dice.random() < 0.8 else [self.dice.choice(RANKS)]:
            self.held[rank][number] = digest

    def arrive(self) -> None:
        self.names += 1
        name, prompt, number = f"r{self.names}", self.dice.choice(PROMPTS), self.dice.choice([1, 2])
        begin(self.stage, name, prompt, number=number, files=self.dice.choice(["old", "new"]))
        found = self.cache.get(prompt, [])[: self.dice.randrange(BLOCKS)]
        for question in self.stage.hear(Foresee):
            guess = self.dice.choice([self.held[0][question.adapter.number], *DIGESTS])
            self.stage.say(Foreseen(question.question, guess))
        matched = self.stage.leader.match(name, len(found), BLOCKS - 1)
        if matched is None:  # another one loads the same: it is aborted
            self.stage.leader.finish(name, [], 0)
            return
        fresh = [self.free.pop(self.dice.randrange(len(self.free))) for _ in range(BLOCKS - len(found))]
        for blocks in self.cache.values():  # whoever had them
            del blocks[next((at for at, block in enumerate(blocks) if block in fresh), len(blocks)) :]
        table = found + fresh
        self.stage.leader.place(name, table, matched, Admitted(1, 0, 0))
        done = len(found)
        step = self.stage.leader.seal(tokens=0)
        if self.dice.random() < 0.2:
            self.change()
        for copy in step.loads:
            assert step.adapters is not None
            done += self._load(copy, step.adapters.loads[copy.job])
        self.stage.leader.grow(name, table, replace=True, found=done)
        self.stage.leader.reuse(table[done:])
        self.running[name] = {"prompt": prompt, "number": number, "table": table, "done": done, "fresh": fresh}

    def _load(self, copy: Copy, expected: Expected) -> int:
        """Blocks that it brought."""
        good = True
        for rank in RANKS:
            held = self.held[rank][expected.adapter.number]
            if held == expected.digest:
                self.g1[rank].update((g1, self.g2[rank][g2]) for g1, g2 in pairs(copy))
            else:
                good = False
                self.stage.say(Unlike(rank, copy.request, held), rank)
                self.stage.answer(copy, *[FAILED] * len(copy.g1_slots()), rank=rank)
        self.hits += good
        self.refused += not good
        return len(copy.g1_slots()) if good else 0

    def step(self) -> None:
        active = [name for name in self.running if self.dice.random() < 0.8]
        for name in active:
            request = self.running[name]
            more = min(BLOCKS, request["done"] + self.dice.randrange(3))
            for at in range(request["done"], more):
                for rank in RANKS:
                    before = self.g1[rank][request["table"][at - 1]] if at else None
                    held = self.held[rank][request["number"]]
                    self.g1[rank][request["table"][at]] = value(request["prompt"], held, before)
            request["done"] = more
            if more > len(self.cache.get(request["prompt"], [])):
                self.cache[request["prompt"]] = request["table"][:more]
            self.stage.leader.advance(name, more)
        step = self.stage.leader.seal(tokens=len(active))
        if step.adapters is not None and step.adapters.used:
            for rank in RANKS:
                digests = [self.held[rank][number] for number in step.adapters.used]
                self.owed.append(partial(self.stage.say, Used(rank, step.adapters.step, digests), rank))
        self._copy(step.stores)

    def _copy(self, stores: list[Copy]) -> None:
        for copy in stores:
            for rank in RANKS:
                self.g2[rank].update((g2, self.g1[rank][g1]) for g1, g2 in pairs(copy))
            self.owed.append(partial(self.stage.answer, copy))
        while self.owed and self.dice.random() < 0.7:  # in order, and later than the engine goes on
            self.owed.pop(0)()

    def leave(self) -> None:
        if self.running:
            name = self.dice.choice(list(self.running))
            request = self.running.pop(name)
            self.stage.leader.finish(name, request["table"], request["done"])
            self._copy(self.stage.leader.seal(tokens=0).stores)
            self.free += request["fresh"]

    def look(self) -> int:
        """How many blocks are stored; each is what its key says."""
        self.stage.leader.core.tick()
        count = 0
        for prompt in PROMPTS:
            for digest in DIGESTS:
                expected = None
                for key in keys_with(prompt, digest):
                    expected = value(prompt, digest, expected)
                    with self.stage.pool.match([key]) as held:
                        for slot in held.slots.tolist():
                            count += 1
                            assert [self.g2[rank][slot] for rank in RANKS] == [expected, expected]
        return count


def believes(_: Variants, request: Request, held: Mapping[int, bytes]) -> bool:
    """Takes the first digest that is said for all."""
    variant = request.variant
    assert variant is not None
    if not variant.digest:
        variant.digest = held[variant.adapter.number] or DIGESTS[0]
        variant.keys.under(variant.digest)
    variant.seen = True
    return True


@pytest.mark.parametrize("checked", [True, False], ids=["", "control"])
def test_whatever_is_stored_is_what_its_key_says(
    make_stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    if not checked:
        monkeypatch.setattr(Variants, "same", believes)
    stored = hits = refused = wrong = 0
    for seed in range(20):
        stage = make_stage(ranks=len(RANKS))
        dice = random.Random(seed)
        engine = Engine(stage, dice)
        try:
            for _ in range(80):
                dice.choices([engine.arrive, engine.step, engine.leave, engine.change], [3, 6, 3, 0.7])[0]()
                while len(engine.running) > 4:
                    engine.leave()
                stored = max(stored, engine.look())
        except AssertionError:
            wrong += 1
        hits, refused = hits + engine.hits, refused + engine.refused
        for say in engine.owed:
            say()
        for name in list(engine.running):
            stage.leader.finish(name, [], 0)
    if checked:
        assert wrong == 0
        assert stored >= 12
        assert hits > 20
        assert refused > 10
    else:
        assert wrong > 0
