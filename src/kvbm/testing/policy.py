"""What every policy has to pass. Subclass the suite for its kind in a test file and supply `make`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.abc.policy import Admission, Drop, EvictionOrder, Keep, Move, Placement
from kvbm.core.region import Slots

SCRIBBLE: Final = -77
INT64: Final = np.dtype(np.int64).str

Step = tuple[str, list[int]]
STEPS: Final = ("admit", "use", "add", "discard", "victims", "forget", "stay")


class Caller:
    """Calls an eviction order as a pool does, keeps the books, and checks what the order says against them.

    Arrays that are passed are read-only, and overwritten afterwards. Slots are given as plain lists in prompt order.
    """

    def __init__(self, order: EvictionOrder, num_slots: int, *, gives_all: bool = True) -> None:
        self.order = order
        self.num_slots = num_slots
        self.held: set[int] = set()
        self.idle: set[int] = set()
        self.given: set[int] = set()
        self._gives_all = gives_all
        self._results: deque[tuple[Slots, list[int]]] = deque(maxlen=8)
        self._tags = 0

    @property
    def free(self) -> set[int]:
        """Slots that hold no block."""
        return set(range(self.num_slots)) - self.held - self.idle - self.given

    def admit(self, slots: Sequence[int], parent: int = -1, tags: Sequence[int] | None = None) -> None:
        """New blocks of one prompt in free slots, after the block in `parent`; each with a tag of its own."""
        if tags is None:
            tags = range(self._tags, self._tags + len(slots))
            self._tags += len(slots)
        self._call(self.order.admit, slots, tags, [parent, *slots][: len(slots)])
        self.held.update(slots)

    def use(self, slots: Sequence[int]) -> None:
        """Held blocks were found."""
        self._call(self.order.use, slots)

    def add(self, slots: Sequence[int]) -> None:
        """Held or given blocks become idle."""
        self._call(self.order.add, slots)
        self.held.difference_update(slots)
        self.given.difference_update(slots)
        self.idle.update(slots)

    def discard(self, slots: Sequence[int]) -> None:
        """Idle blocks are held."""
        self._call(self.order.discard, slots)
        self.idle.difference_update(slots)
        self.held.update(slots)

    def forget(self, slots: Sequence[int]) -> None:
        """Held or given blocks are gone."""
        self._call(self.order.forget, slots)
        self.held.difference_update(slots)
        self.given.difference_update(slots)

    def victims(self, n: int) -> list[int]:
        """Take out up to `n`."""
        result = self.order.victims(n)
        assert (result.ndim, result.dtype) == (1, np.dtype(np.int64)), "victims are a one-dimensional array of int64"
        chosen: list[int] = result.tolist()
        assert len(set(chosen)) == len(chosen), f"a slot is given twice: {chosen}"
        assert set(chosen) <= self.idle, f"slots are given that are not in the order: {set(chosen) - self.idle}"
        assert len(chosen) <= n, f"{len(chosen)} slots are given for {n}"
        if self._gives_all:
            assert len(chosen) == min(n, len(self.idle)), f"{len(chosen)} of {len(self.idle)} are given for {n}"
        self.idle.difference_update(chosen)
        self.given.update(chosen)
        self._results.append((result, chosen))
        self.check()
        return chosen

    def insert(self, slots: Sequence[int]) -> None:
        """New blocks that are idle at once."""
        self.admit(slots)
        self.add(slots)

    def evict(self, n: int) -> list[int]:
        """Take out up to `n` and forget them."""
        chosen = self.victims(n)
        self.forget(chosen)
        return chosen

    def check(self) -> None:
        """Compare with the books."""
        assert len(self.order) == len(self.idle), f"{len(self.order)} slots are counted, {len(self.idle)} are there"
        for result, chosen in self._results:
            assert result.tolist() == chosen, "what victims returned was changed afterwards"

    def _call(self, method: Callable[..., None], *arguments: Sequence[int]) -> None:
        owned = [np.array(argument, np.int64) for argument in arguments]
        passed = [array[:] for array in owned]
        for view in passed:
            view.flags.writeable = False
        method(*passed)
        for array, argument in zip(owned, arguments, strict=True):
            assert array.tolist() == list(argument), "an argument was changed"
            array[:] = SCRIBBLE


class EvictionOrderTests:
    """The contract of `kvbm.abc.policy.EvictionOrder` as tests."""

    leaf_first: bool = True
    """Whether of blocks that were admitted, used and let go together the last one goes first."""

    gives_all: bool = True
    """Whether it gives everything it has, when asked."""

    num_slots: int = 64

    def make(self, num_slots: int) -> EvictionOrder:
        """An empty order for slots below `num_slots`."""
        raise NotImplementedError

    @pytest.fixture
    def caller(self) -> Caller:
        return self.call(self.make(self.num_slots))

    def call(self, order: EvictionOrder, num_slots: int | None = None) -> Caller:
        """The order with books."""
        return Caller(order, num_slots or self.num_slots, gives_all=self.gives_all)

    def test_a_new_order_is_empty(self, caller: Caller) -> None:
        caller.check()
        assert caller.victims(3) == []

    def test_empty_runs_change_nothing(self, caller: Caller) -> None:
        caller.insert([4, 5])
        for method in (caller.admit, caller.use, caller.add, caller.discard, caller.forget):
            method([])
        assert caller.victims(0) == []
        caller.check()

    def test_gives_each_slot_once(self, caller: Caller) -> None:
        for first in range(0, 40, 8):
            caller.insert(list(range(first, first + 8)))
        for n in (1, 7, 2, 30, 8):
            caller.evict(n)
        assert not self.gives_all or not caller.idle

    def test_asked_for_more_it_gives_what_it_has(self, caller: Caller) -> None:
        caller.insert([3, 1, 2])
        chosen = caller.victims(1 << 40)
        assert not self.gives_all or sorted(chosen) == [1, 2, 3]

    def test_a_leaf_goes_before_its_root(self, caller: Caller) -> None:
        if not self.leaf_first:
            pytest.skip("this order does not promise it")
        caller.insert([9, 3, 7, 1])
        assert caller.victims(3) + caller.victims(3) == [1, 7, 3, 9]

    def test_a_held_block_is_not_given(self, caller: Caller) -> None:
        caller.insert([0, 1, 2, 3])
        caller.admit([4, 5], 3)
        caller.discard([1, 2])
        caller.use([1, 2])
        caller.evict(10)  # what it gives is checked
        caller.add([4, 5])
        caller.add([1, 2])
        caller.evict(10)
        assert not self.gives_all or not caller.idle

    def test_a_slot_of_a_forgotten_block_is_like_new(self, caller: Caller) -> None:
        for _ in range(3):
            caller.insert([0, 1, 2, 3])
            caller.discard([1, 2])
            caller.use([1, 2])
            caller.forget([2, 1])
            caller.admit([2, 1], 0)
            caller.add([2, 1])
            for _ in range(5):
                caller.evict(1)
            if not self.gives_all:
                break
            assert not caller.idle

    def test_what_was_given_may_stay(self, caller: Caller) -> None:
        caller.insert([0, 1, 2])
        caller.insert([3, 4, 5])
        chosen = caller.victims(4)
        caller.add(chosen[:3][::-1])
        caller.forget(chosen[3:])
        caller.check()
        caller.discard(sorted(caller.idle)[:2])
        rest = caller.victims(6)
        assert not self.gives_all or len(rest) == 3

    def test_fresh_orders_are_independent(self, caller: Caller) -> None:
        caller.insert([0, 1, 2, 3])
        other = self.call(caller.order.fresh())
        other.check()
        other.insert([2, 3, 4])
        caller.discard([2])
        caller.forget([2])
        other.evict(2)
        caller.evict(2)
        other.check()
        caller.check()

    def test_more_slots(self, caller: Caller) -> None:
        caller.insert([0, 1, self.num_slots - 1])
        many = 3 * self.num_slots + 1
        caller.order.resize(many)
        caller.num_slots = many
        caller.insert([many - 1, self.num_slots, 2])
        caller.discard([1])
        caller.add([1])
        assert not self.gives_all or len(caller.evict(6)) == 6
        self.call(caller.order.fresh(), many).insert([many - 1])

    def test_any_sequence_of_calls(self) -> None:
        numbers = st.lists(st.integers(0, 23), min_size=1, max_size=10)
        steps = st.lists(st.tuples(st.sampled_from(STEPS), numbers), min_size=3, max_size=25)

        @settings(max_examples=60, deadline=None, database=None)
        @given(steps)
        def run(steps: list[Step]) -> None:
            caller = self.call(self.make(24), 24)
            for step, choice in steps * 4:  # what is drawn is short, and many mistakes show late
                _take(caller, step, choice)
                caller.check()
            caller.add(sorted(caller.held | caller.given))
            caller.evict(12)
            caller.evict(12)
            assert not self.gives_all or not caller.idle

        run()


def _take(caller: Caller, step: str, choice: list[int]) -> None:
    """One step on the slots that `choice` points at among those that allow it."""
    held, idle, given_ = (sorted(slots) for slots in (caller.held, caller.idle, caller.given))
    match step:
        case "admit":
            parents = [-1, *held, *idle]
            caller.admit(_pick(sorted(caller.free), choice), parents[sum(choice) % len(parents)])
        case "use":
            caller.use(_pick(held, choice))
        case "add":
            caller.add(_pick(held, choice))
        case "discard":
            caller.discard(_pick(idle, choice))
        case "victims":
            caller.victims(len(choice))
        case "forget":
            caller.forget(_pick(held + given_, choice))
        case _:
            caller.add(_pick(given_, choice))


def _pick(slots: list[int], choice: list[int]) -> list[int]:
    """Distinct ones, in the order of `choice`."""
    return list(dict.fromkeys(slots[at % len(slots)] for at in choice)) if slots else []


class AdmissionTests:
    """The contract of `kvbm.abc.policy.Admission` as tests."""

    copies_again: bool = False
    """Whether it may ask for a copy of what is there already."""

    def make(self, num_slots: int) -> Admission:
        """An admission for a tier of `num_slots`."""
        raise NotImplementedError

    def ask(self, admission: Admission, tags: Sequence[int], present: Sequence[bool]) -> list[bool]:
        """`admit`, with what can be checked of any."""
        owned, there = np.array(tags, np.int64), np.array(present, np.bool_)
        mask = admission.admit(_read_only(owned), _read_only(there))
        assert (mask.dtype, mask.shape) == (np.dtype(np.bool_), (len(tags),)), "the answer is one bool per block"
        assert (owned.tolist(), there.tolist()) == (list(tags), list(present)), "an argument was changed"
        answer: list[bool] = mask.tolist()
        owned[:], there[:] = SCRIBBLE, True
        assert mask.tolist() == answer, "the answer is not its own array"
        assert self.copies_again or not any(a and p for a, p in zip(answer, present, strict=True)), "copied twice"
        return answer

    def test_nothing_is_asked(self) -> None:
        admission = self.make(8)
        admission.use(np.empty(0, np.int64))
        assert self.ask(admission, [], []) == []

    def test_a_block_that_is_asked_for_again_and_again_is_admitted(self) -> None:
        admission = self.make(8)
        for _ in range(20):
            admission.use(np.array([5, -6], np.int64))
        assert self.ask(admission, [5, -6], [False, False]) == [True, True]

    def test_what_is_there_already(self) -> None:
        admission = self.make(8)
        for _ in range(20):
            admission.use(np.array([1, 2, 3], np.int64))
        self.ask(admission, [1, 2, 3], [True, False, True])

    def test_any_sequence_of_calls(self) -> None:
        tag = st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(0, 5)
        requests = st.lists(st.lists(st.tuples(tag, st.booleans(), st.booleans()), max_size=8), max_size=30)

        @settings(max_examples=40, deadline=None, database=None)
        @given(requests)
        def run(requests: list[list[tuple[int, bool, bool]]]) -> None:
            admission = self.make(4)
            for blocks in requests:
                admission.use(np.array([tag for tag, _, used in blocks if used], np.int64))
                self.ask(admission, [tag for tag, _, _ in blocks], [there for _, there, _ in blocks])

        run()


class PlacementTests:
    """The contract of `kvbm.abc.policy.Placement` as tests."""

    def make(self) -> Placement:
        """A placement."""
        raise NotImplementedError

    @pytest.fixture(params=[("g2",), ("g2", "g3"), ("g2", "g3", "g4", "archive")], ids=len)
    def tiers(self, request: pytest.FixtureRequest) -> tuple[str, ...]:
        tiers: tuple[str, ...] = request.param
        return tiers

    def test_a_new_block_goes_to_some_of_the_tiers(self, tiers: tuple[str, ...]) -> None:
        chosen = list(self.make().store(tiers))
        assert chosen, "a new block goes nowhere"
        assert len(set(chosen)) == len(chosen), "a tier is named twice"
        assert set(chosen) <= set(tiers), "there is no such tier"

    def test_tiers_may_be_a_list(self, tiers: tuple[str, ...]) -> None:
        names = list(tiers)
        assert list(self.make().store(names)) == list(self.make().store(tiers))
        assert self.make().evict(names[-1], names) == self.make().evict(tiers[-1], tiers)
        assert names == list(tiers)

    def test_a_lower_copy_stays_or_goes(self, tiers: tuple[str, ...]) -> None:
        for tier in tiers[1:]:
            assert isinstance(self.make().promote(tier, tiers), Keep | Drop)

    def test_an_evicted_block_sinks_or_goes(self, tiers: tuple[str, ...]) -> None:
        for at, tier in enumerate(tiers):
            fate = self.make().evict(tier, tiers)
            assert isinstance(fate, Drop | Move)
            assert isinstance(fate, Drop) or fate.tier in tiers[at + 1 :], "a block moves down, or it goes"


def _read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    view = array[:]
    view.flags.writeable = False
    return view
