"""Lists over slots: compared with the same in Python, step by step; and what must not corrupt memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.native import Lists


class Block:
    """What is in a slot."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.level = self.uses = self.blocked = 0
        self.parent: Block | None = None
        self.listed = self.waits = self.given = self.gone = False


class Oracle:
    """`Lists` in Python."""

    def __init__(self, num_slots: int, num_lists: int) -> None:
        self.blocks = [Block(slot) for slot in range(num_slots)]
        self.lists: list[list[Block]] = [[] for _ in range(num_lists)]

    def _parents(self, block: Block) -> list[Block]:
        return [block.parent] if block.parent and not block.parent.gone else []

    def _insert(self, block: Block, at_front: bool) -> None:
        here = self.lists[block.level]
        here.insert(0 if at_front else len(here), block)
        block.listed, block.waits = True, False

    def _remove(self, block: Block) -> None:
        self.lists[block.level].remove(block)
        block.listed = False

    def _unblock(self, block: Block) -> None:
        block.blocked -= 1
        if not block.blocked and block.waits:
            self._insert(block, True)

    def _take_back(self, block: Block) -> None:
        block.given = False
        for parent in self._parents(block):
            parent.blocked += 1

    def _forget(self, block: Block) -> int:
        level = block.level if block.given else 255
        if block.listed:
            self._remove(block)
        if not block.given:
            for parent in self._parents(block):
                self._unblock(parent)
        block.gone = True
        self.blocks[block.slot] = Block(block.slot)
        return level

    def _each(self, slots: Iterable[int]) -> Iterable[Block]:
        for slot in slots:
            yield self.blocks[slot]

    def append(self, slots: list[int]) -> None:
        for block in self._each(slots[::-1]):
            require(not block.listed and not block.waits)
            if block.given:
                self._take_back(block)
            self._insert(block, False)

    def remove(self, slots: list[int]) -> None:
        for block in self._each(slots):
            require(block.listed or block.waits)
            if block.listed:
                self._remove(block)
            block.waits = False

    def hold(self, slots: list[int]) -> None:
        for block in self._each(slots):
            block.blocked += 1

    def release(self, slots: list[int]) -> None:
        for block in self._each(slots):
            if block.given:
                self._take_back(block)
            else:
                require(block.blocked > 0)
                block.blocked -= 1
            if not block.blocked and not block.listed:
                self._insert(block, True)

    def place(self, slots: list[int], levels: bytes) -> None:
        for block, level in zip(self._each(slots), levels, strict=True):
            require(level < len(self.lists) and not block.listed)
            block.level = level

    def climb(self, slots: list[int]) -> None:
        for block in self._each(slots):
            require(not block.listed)
            block.level = min(block.level + 1, len(self.lists) - 1)

    def use(self, slots: list[int], most: int) -> None:
        for block in self._each(slots):
            block.uses += block.uses < most

    def adopt(self, slots: list[int], parents: list[int]) -> None:
        for slot in slots:
            self._forget(self.blocks[slot])
        for slot, parent in zip(slots, parents, strict=True):
            if parent >= 0:
                require(slot != parent and self.blocks[slot].parent is None)
                self.blocks[slot].parent = self.blocks[parent]
                self.blocks[parent].blocked += 1

    def forget(self, slots: list[int]) -> bytes:
        return bytes([self._forget(self.blocks[slot]) for slot in slots])

    def pop(self, which: int, n: int, above: int = 255, to: int = 0) -> list[int]:
        chosen: list[int] = []
        here = self.lists[which]
        while len(chosen) < n and here:
            block = here[0]
            self._remove(block)
            if block.blocked:
                block.waits = True
            elif block.uses > above:
                block.uses = block.uses - 1 if to == which else 0
                block.level = to
                self._insert(block, False)
            else:
                chosen.append(block.slot)
                block.given = True
                for parent in self._parents(block):
                    self._unblock(parent)
        return chosen

    def halve(self) -> None:
        lists = self.lists
        for level in range(1, len(lists)):
            lists[level >> 1] += lists[level]
            lists[level] = []
        for block in self.blocks:
            block.level >>= 1


def require(allowed: bool) -> None:
    if not allowed:
        raise ValueError


def run(*slots: int) -> np.ndarray:
    return np.array(slots, np.int64)


def numbers(data: bytes) -> list[int]:
    return np.frombuffer(data, np.int64).tolist()


def both(
    native: Callable[[], Any], oracle: Callable[[], Any], read: Callable[[Any], Any] = lambda result: result
) -> None:
    """The same result, or both refuse."""
    try:
        expected = oracle()
    except ValueError:
        with pytest.raises(ValueError, match="slot"):
            native()
    else:
        assert read(native()) == expected


SLOTS = st.lists(st.integers(0, 11), max_size=6)
STEP = st.one_of(
    st.tuples(st.sampled_from(["append", "remove", "hold", "release", "climb"]), SLOTS),
    st.tuples(st.just("forget"), SLOTS),
    st.tuples(st.just("use"), SLOTS, st.integers(0, 4)),
    st.tuples(st.just("place"), SLOTS, st.integers(0, 3)),
    st.tuples(st.just("adopt"), SLOTS.map(lambda slots: list(dict.fromkeys(slots))), st.integers(-1, 11)),
    st.tuples(st.just("pop"), st.integers(0, 2), st.integers(0, 8), st.integers(0, 3), st.integers(0, 2)),
    st.tuples(st.just("pop"), st.integers(0, 2), st.integers(0, 8)),
    st.tuples(st.just("halve")),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEP, max_size=60))
def test_does_what_the_python_form_does(steps: list[tuple[Any, ...]]) -> None:
    lists, oracle = Lists(12, 3), Oracle(12, 3)
    for name, *arguments in steps:
        native, model = getattr(lists, name), getattr(oracle, name)
        match name:
            case "append" | "remove" | "hold" | "release" | "climb" | "forget":
                both(lambda: native(run(*arguments[0])), lambda: model(arguments[0]))  # noqa: B023
            case "use":
                both(lambda: native(run(*arguments[0]), arguments[1]), lambda: model(*arguments))  # noqa: B023
            case "place":
                levels = bytes((arguments[1] + at) % 4 for at in range(len(arguments[0])))
                both(lambda: native(run(*arguments[0]), levels), lambda: model(arguments[0], levels))  # noqa: B023
            case "adopt":
                parents = [arguments[1], *arguments[0]][: len(arguments[0])]
                both(
                    lambda: native(run(*arguments[0]), run(*parents)),  # noqa: B023
                    lambda: model(arguments[0], parents),  # noqa: B023
                )
            case "pop":
                both(lambda: native(*arguments), lambda: model(*arguments), numbers)  # noqa: B023
            case _:
                both(native, model)
        assert [lists.size(level) for level in range(3)] == [len(level) for level in oracle.lists]
        assert len(lists) == sum(map(len, oracle.lists))
    for _ in range(13):  # what is blocked by what is in a list, comes once that is gone
        for level in range(3):
            assert numbers(lists.pop(level, 12)) == oracle.pop(level, 12)


def test_a_run_is_appended_leaf_first() -> None:
    lists = Lists(9)
    lists.append(run(0, 1, 2))
    lists.append(run(5, 4))
    assert numbers(lists.pop(0, 9)) == [2, 1, 0, 4, 5]


def test_a_parent_follows_its_last_child_in_the_same_call() -> None:
    lists = Lists(9)
    lists.adopt(run(0, 1, 2, 3), run(-1, 0, 1, 1))
    for slot in range(4):
        lists.append(run(slot))
    assert numbers(lists.pop(0, 3)) == [2, 3, 1]
    lists.append(run(3))
    lists.append(run(1))
    assert numbers(lists.pop(0, 1)) == [3]


def test_a_stale_child_does_not_unblock_the_successor_of_its_parent() -> None:
    lists = Lists(4)
    lists.adopt(run(0, 1), run(-1, 0))
    lists.forget(run(0))
    lists.adopt(run(0, 2), run(-1, 0))
    lists.append(run(0, 1))
    assert numbers(lists.pop(0, 4)) == [1]
    lists.forget(run(2))
    assert numbers(lists.pop(0, 4)) == [0]


def test_second_chances_are_bounded() -> None:
    lists = Lists(10_000)
    everything = np.arange(9999, -1, -1)
    lists.append(everything)
    lists.use(everything, 1)
    assert numbers(lists.pop(0, 5, 0, 0)) == []
    assert numbers(lists.pop(0, 1)) == [4101]


def test_slots_come_in_any_int64_buffer() -> None:
    lists = Lists(9)
    for slots in (run(1), run(2).tobytes(), memoryview(run(3)), np.frombuffer(run(4).tobytes(), np.int64)):
        lists.append(slots)
    assert numbers(lists.pop(0, 9)) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "slots",
    [np.zeros(2), np.zeros(2, np.int32), np.zeros((2, 2), np.int64), run(1, 2, 3, 4)[::2], b"1234567", [1], None],
)
def test_other_arguments_are_refused(slots: Any) -> None:
    lists = Lists(9)
    for call in (
        lists.append,
        lists.remove,
        lists.hold,
        lists.release,
        lists.climb,
        lists.forget,
        lambda slots: lists.use(slots, 3),
        lambda slots: lists.place(slots, b""),
        lambda slots: lists.adopt(slots, run(1)),
        lambda slots: lists.adopt(run(1), slots),
    ):
        with pytest.raises(ValueError, match="slots must be bytes of int64"):
            call(slots)


@pytest.mark.parametrize("bad", [-1, 9, 1 << 31, 1 << 40, -(1 << 63), (1 << 63) - 1])
def test_a_slot_that_does_not_exist_changes_nothing(bad: int) -> None:
    lists = Lists(9)
    slots = run(1, bad)
    for call in (lists.append, lists.remove, lists.hold, lists.release, lists.climb, lists.forget):
        with pytest.raises(ValueError, match=r"is not in 0\.\.8"):
            call(slots)
    for call in (lists.use, lists.place, lists.adopt):
        with pytest.raises(ValueError, match=r"is not in 0\.\.8"):
            call(slots, 1 if call == lists.use else b"" if call == lists.place else run(0, 0))
    if bad != -1:
        with pytest.raises(ValueError, match=r"is not in 0\.\.8"):
            lists.adopt(run(2, 1), slots)
    lists.append(run(1))
    assert numbers(lists.pop(0, 9)) == [1]


def test_other_misuse_is_refused() -> None:
    lists = Lists(9, 2)
    for call in (
        lambda: lists.place(run(1), b"\2"),
        lambda: lists.place(run(1), b""),
        lambda: lists.place(run(1), [0]),
        lambda: lists.adopt(run(1), run(1)),
        lambda: lists.adopt(run(1), run(1, 2)),
        lambda: lists.adopt(run(1, 1), run(2, 3)),
        lambda: lists.use(run(1), 255),
        lambda: lists.use(run(1), -1),
        lambda: lists.pop(2, 1),
        lambda: lists.pop(-1, 1),
        lambda: lists.pop(0, -1),
        lambda: lists.pop(0, 1, 256),
        lambda: lists.pop(0, 1, 1, 2),
        lambda: lists.size(2),
        lambda: lists.resize(8),
        lambda: lists.resize(1 << 31),
        lambda: Lists(-1),
        lambda: Lists(1 << 31),
        lambda: Lists(1, 0),
        lambda: Lists(1, 65),
    ):
        with pytest.raises(ValueError):  # noqa: PT011  each says something else
            call()
    for call in (
        lambda: lists.pop(0),
        lambda: lists.pop("0", 1),
        lambda: lists.use(run(1)),
        lambda: lists.place(run(1)),
        lambda: lists.adopt(run(1)),
        lambda: Lists(),
    ):
        with pytest.raises(TypeError):
            call()


def test_no_slots() -> None:
    lists = Lists(0)
    lists.append(run())
    assert (numbers(lists.pop(0, 5)), len(lists), lists.num_slots) == ([], 0, 0)


def test_more_slots_keep_what_was() -> None:
    lists = Lists(3, 2)
    lists.place(run(1), b"\1")
    lists.append(run(0, 1, 2))
    lists.resize(2000)
    assert lists.num_slots == 2000
    lists.append(run(1999, 3))
    assert numbers(lists.pop(0, 9)) == [2, 0, 3, 1999]
    assert numbers(lists.pop(1, 9)) == [1]


def test_nothing_is_leaked() -> None:
    slots = run(0, 1, 2)
    before = sys.getrefcount(slots)
    for _ in range(100):
        lists = Lists(3)
        lists.append(slots)
        lists.pop(0, 3)
        lists.forget(slots)
        lists.adopt(slots, run(-1, 0, 1))
        with pytest.raises(ValueError, match="slot"):
            lists.remove(slots)
        with pytest.raises(ValueError, match="slot"):
            lists.adopt(slots, run(7, 7, 7))
    assert sys.getrefcount(slots) == before
