"""What a worker does about adapters; the test plays vLLM's manager of them."""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import Any

import pytest

from kvbm.link.messages import Adapter, Adapters, Copy, Expected, Foresee, Foreseen, Step, Unlike, Used
from kvbm.worker.residents import Residents

ONE, TWO = b"1" * 32, b"2" * 32
AWAITED = [(1, ONE)]


class Fake:
    """Adapters are the digests themselves. `on_disk` is what is read under a number."""

    def __init__(self) -> None:
        self.there: dict[int, bytes] = {}
        self.on_disk: dict[int, bytes] = {1: ONE, 2: TWO}
        self.needed: list[set[int]] = []
        self.room = True

    def held(self, number: int) -> Any:
        return self.there.get(number)

    def digest(self, number: int) -> bytes:
        return self.there.get(number, b"")

    def admit(self, adapter: Adapter, needed: Collection[int]) -> None:
        self.needed.append(set(needed))
        if self.room and adapter.number not in self.there:
            self.there[adapter.number] = self.on_disk[adapter.number]

    def restore(self, number: int, held: Any, needed: Collection[int]) -> None:
        self.needed.append(set(needed))
        self.there[number] = held

    def give_up(self, number: int) -> None:
        del self.there[number]

    def foresee(self, adapter: Adapter) -> bytes:
        return self.there.get(adapter.number) or self.on_disk[adapter.number]


class Side:
    """A worker's side with what it told."""

    def __init__(self, *, reachable: bool = True) -> None:
        self.fake = Fake()
        self.told: list[Used | Foreseen | Unlike] = []
        self.residents = Residents(self.fake if reachable else None, 0, self.told.append)

    def load(self, digest: bytes = ONE, *, sync: bool = False) -> bool:
        """Whether a load for adapter 1 may start."""
        adapters = Adapters(1, [2], {5: Expected(Adapter(1, "one", b""), digest)}, [(1, digest)], [1, 2])
        step = Step(loads=[Copy.of(5, "r", [0], [0])], adapters=adapters, sync=sync)
        self.residents.before_step(adapters)
        return not self.residents.before_loads(step)


@pytest.fixture
def side() -> Side:
    return Side()


def test_a_load_has_the_engine_hold_its_adapter(side: Side) -> None:
    assert side.load()
    assert side.fake.there == {1: ONE}
    assert side.fake.needed == [{1, 2}]
    assert not side.residents.differs("r")
    assert not side.told


def test_a_load_does_not_start_where_another_adapter_is_held(side: Side) -> None:
    side.fake.there[1] = TWO
    assert not side.load()
    assert side.fake.there == {1: TWO}
    assert side.told == [Unlike(0, "r", TWO)]


def test_a_load_does_not_start_where_files_have_changed(side: Side) -> None:
    side.fake.on_disk[1] = TWO
    assert not side.load()
    assert side.told == [Unlike(0, "r", TWO)]


@pytest.mark.parametrize("missing", ["room", "files", "manager"])
def test_a_load_does_not_start_where_nothing_can_be_held(missing: str) -> None:
    side = Side(reachable=missing != "manager")
    side.fake.room = missing != "room"
    if missing == "files":
        del side.fake.on_disk[1]
    assert not side.load()
    assert side.told == [Unlike(0, "r", b"")]


def test_a_load_fails_where_the_adapter_was_another_at_its_end(side: Side) -> None:
    assert side.load()
    side.fake.there[1] = TWO
    assert side.residents.differs("r")
    assert side.told == [Unlike(0, "r", TWO)]
    assert not side.residents.differs("r")  # it is over


def test_a_load_inside_the_step_is_not_looked_at_again(side: Side) -> None:
    assert side.load(sync=True)
    side.fake.there[1] = TWO
    assert not side.residents.differs("r")


@pytest.mark.parametrize("scheduled", [[], [1]])
@pytest.mark.parametrize("after", [None, Adapters(4, [2], {}, [], [2])])
def test_an_adapter_that_was_given_up_is_put_back_for_who_loaded_with_it(
    side: Side, after: Adapters | None, scheduled: list[int]
) -> None:
    assert side.load()
    del side.fake.there[1]
    side.fake.on_disk[1] = TWO
    assert not side.residents.differs("r")  # what the request will be computed with is kept
    side.residents.before_step(Adapters(2, [1], {}, AWAITED, [1, 3], scheduled))
    assert side.fake.there == {1: ONE}
    assert side.fake.needed[-1] == ({1} if scheduled else {1, 3})
    side.residents.before_step(Adapters(3, [1], {}, [], [1]))
    assert side.fake.there == {1: ONE}
    side.residents.before_step(after)
    assert side.fake.there == {}


def test_what_the_engine_loaded_since_is_not_given_up(side: Side) -> None:
    assert side.load()
    del side.fake.there[1]
    side.residents.before_step(Adapters(2, [1], {}, AWAITED, [1]))
    side.fake.there[1] = TWO
    side.residents.before_step(None)
    assert side.fake.there == {1: TWO}


def test_what_is_held_instead_is_left_alone(side: Side) -> None:
    """vLLM may have activated it already for this step."""
    assert side.load()
    side.fake.there[1] = TWO
    side.residents.before_step(Adapters(2, [1], {}, AWAITED))
    assert side.fake.there == {1: TWO}


@pytest.mark.parametrize("then", [None, Adapters(2, [2], {}, [(2, TWO)])])
def test_nothing_is_kept_that_nobody_waits_for(side: Side, then: Adapters | None) -> None:
    assert side.load()
    side.residents.before_step(then)
    del side.fake.there[1]
    side.residents.before_step(Adapters(3, [1], {}, AWAITED))
    assert side.fake.there == {}


def test_each_step_says_what_it_was_computed_with(side: Side) -> None:
    side.fake.there = {1: ONE, 3: TWO}
    side.residents.after_forward(Adapters(9, [1, 2, 3]))
    side.residents.after_forward(Adapters(10, []))
    side.residents.after_forward(None)
    assert side.told == [Used(0, 9, [ONE, b"", TWO])]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_question_is_answered_without_holding_anything(side: Side, number: int) -> None:
    side.fake.there[2] = ONE
    side.residents.foresee(Foresee(4, Adapter(number, "", b"")))
    for thread in threading.enumerate():
        if thread.name == "kvbm-adapter":
            thread.join(10)
    assert side.told == [Foreseen(4, b"" if number == 3 else ONE)]
    assert side.fake.there == {2: ONE}
