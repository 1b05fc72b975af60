"""The slot table against its Python form, and everything it refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from kvbm.blocks.slots import FREE, ORPHANED, REGISTERED, RETIRED, STAGED, WRITABLE
from kvbm.native import Table

LARGEST = 1 << 29
GAUGES = ("capacity", "free", "writable", "staged", "registered", "active", "orphaned", "retired")


def require(condition: object) -> None:
    if not condition:
        raise ValueError


class Slot:
    def __init__(self) -> None:
        self.state = FREE
        self.key: bytes | None = None
        self.parent: bytes | None = None

    def forget(self) -> None:
        self.key = self.parent = None

    @property
    def registered(self) -> bool:
        return REGISTERED <= self.state < ORPHANED

    @property
    def held(self) -> bool:
        return self.state > REGISTERED and self.state != ORPHANED


class Plain:
    """The same, as one would write it down: no index, no counters; slots as lists."""

    def __init__(self, capacity: int) -> None:
        self.slots = [Slot() for _ in range(capacity)]
        self.stack = list(range(capacity))[::-1]

    def gauges(self) -> dict[str, int]:
        states = [slot.state for slot in self.slots]
        counted = {"free": FREE, "writable": WRITABLE, "staged": STAGED, "retired": RETIRED}
        return {name: states.count(state) for name, state in counted.items()} | {
            "capacity": len(states),
            "registered": sum(slot.registered for slot in self.slots),
            "active": sum(slot.registered and slot.held for slot in self.slots),
            "orphaned": sum(state > ORPHANED for state in states),
        }

    def _all(self, slots: list[int], fits: Callable[[Slot], bool]) -> list[Slot]:
        """Those slots, each in the right state and there once."""
        require(len(set(slots)) == len(slots) and all(fits(self.slots[slot]) for slot in slots))
        return [self.slots[slot] for slot in slots]

    def _free(self, slot: int) -> None:
        self.slots[slot].state = FREE
        self.slots[slot].forget()
        self.stack.append(slot)

    def _hold(self, slots: list[int]) -> list[int]:
        first = []
        for slot in slots:
            self.slots[slot].state += 1
            if self.slots[slot].state == REGISTERED + 1:
                first.append(slot)
        return first

    def _find(self, key: bytes) -> int:
        return next((at for at, slot in enumerate(self.slots) if slot.registered and slot.key == key), -1)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        return [self._find(key) for key in keys]

    def peek(self, keys: Sequence[bytes], start: int) -> int:
        require(start >= 0)
        found = self.find(keys[start:])
        return found.index(-1) if -1 in found else len(found)

    def match(self, keys: Sequence[bytes], start: int) -> tuple[list[int], list[int]]:
        n = self.peek(keys, start)
        slots = self.find(keys[start : start + n])
        return slots, self._hold(slots)

    def absent(self, keys: Sequence[bytes]) -> list[int]:
        known = {slot.key for slot in self.slots}
        return [at for at, key in enumerate(keys) if key not in known]

    def take(self, n: int) -> list[int]:
        require(0 <= n <= len(self.stack))
        taken = self.stack[len(self.stack) - n :][::-1]
        del self.stack[len(self.stack) - n :]
        for slot in taken:
            self.slots[slot].state = WRITABLE
        return taken

    def claim(self, slots: list[int]) -> None:
        for slot in self._all(slots, lambda slot: slot.state == FREE):
            slot.state = WRITABLE
        self.stack = [slot for slot in self.stack if slot not in slots]

    def stage(
        self, slots: list[int], keys: tuple[bytes, ...] | None, parent: bytes | tuple[bytes | None, ...] | None
    ) -> None:
        parents = parent if isinstance(parent, tuple) else (parent, *(keys or ())[:-1])
        chosen = self._all(slots, lambda slot: slot.state == WRITABLE)
        require(keys is None or len(set(keys)) == len(keys))
        for at, slot in enumerate(chosen):
            slot.state = STAGED
            if keys is not None:
                slot.key, slot.parent = keys[at], parents[at]

    def register(
        self, slots: list[int], done: bytes | None, keep: bool
    ) -> tuple[list[int], list[int] | None, list[int], list[int]]:
        chosen = self._all(slots, lambda slot: slot.state == STAGED and slot.key is not None)
        require(len({slot.key for slot in chosen}) == len(chosen))
        held, positions, twins, idle = [], [], [], []
        for at, (number, slot) in enumerate(zip(slots, chosen, strict=True)):
            assert slot.key is not None
            twin = self._find(slot.key)
            if done is not None and not done[at]:
                self._free(number)
            elif twin < 0:
                slot.state = REGISTERED + 1
                held.append(number)
                positions.append(at)
            elif keep:
                slot.state = ORPHANED + 1
                slot.forget()
                held.append(number)
            else:
                self._free(number)
                held.append(twin)
                twins.append(twin)
                idle += self._hold([twin])
        return held, None if len(positions) == len(slots) else positions, twins, idle

    def hold(self, slots: list[int]) -> list[int]:
        require(all(self.slots[slot].registered for slot in slots))
        return self._hold(slots)

    def release(self, slots: list[int]) -> list[int]:
        for slot in set(slots):
            require(self.slots[slot].held and self.slots[slot].state % ORPHANED >= slots.count(slot))
        idle = []
        for slot in slots:
            self.slots[slot].state -= 1
            if self.slots[slot].state == ORPHANED:
                self._free(slot)
            elif self.slots[slot].state == REGISTERED:
                idle.append(slot)
        return idle

    def give_back(self, slots: list[int]) -> None:
        self._all(slots, lambda slot: slot.state in (WRITABLE, STAGED))
        for slot in reversed(slots):
            self._free(slot)

    def evict(self, slots: list[int]) -> tuple[tuple[bytes | None, ...], list[int]]:
        chosen = self._all(slots, lambda slot: slot.state == REGISTERED)
        keys = self.keys(slots)
        for slot in chosen:
            slot.state = WRITABLE
            slot.forget()
        return keys, slots[::-1]

    def unpublish(self, slots: list[int]) -> tuple[bytes | None, ...]:
        self._all(slots, lambda slot: slot.registered)
        keys = self.keys(slots)
        for slot in reversed(slots):
            self._unpublish(slot)
        return keys

    def _unpublish(self, slot: int) -> None:
        if self.slots[slot].held:
            self.slots[slot].state += ORPHANED
            self.slots[slot].forget()
        else:
            self._free(slot)

    def clear(self) -> None:
        for number, slot in reversed(list(enumerate(self.slots))):
            if slot.registered:
                self._unpublish(number)
            slot.forget()

    def idle(self, slots: list[int]) -> list[int]:
        return [slot for slot in slots if self.slots[slot].state == REGISTERED]

    def keys(self, slots: list[int]) -> tuple[bytes | None, ...]:
        return tuple(self.slots[slot].key for slot in slots)

    def parents(self, slots: list[int]) -> tuple[bytes | None, ...]:
        return tuple(self.slots[slot].parent for slot in slots)

    def tags(self, slots: list[int]) -> list[int]:
        return [0 if key is None else hash(key) for key in self.keys(slots)]

    def parent_slots(self, slots: list[int]) -> list[int]:
        return [-1 if parent is None else self._find(parent) for parent in self.parents(slots)]

    def grow(self, capacity: int) -> None:
        require(len(self.slots) <= capacity <= LARGEST)
        new = range(len(self.slots), capacity)
        self.slots += [Slot() for _ in new]
        self.stack = [*reversed(new), *self.stack]

    def retire(self, n: int) -> list[int]:
        require(0 <= n <= len(self.stack))
        if n:
            self.stack.sort(reverse=True)
        gone = self.stack[:n]
        for slot in gone:
            self.slots[slot].state = RETIRED
        del self.stack[:n]
        return gone

    def restore(self, n: int) -> list[int]:
        retired = [at for at, slot in enumerate(self.slots) if slot.state == RETIRED]
        require(0 <= n <= len(retired))
        for slot in reversed(retired[:n]):
            self._free(slot)
        return retired[:n]


def run(*slots: int) -> bytes:
    return np.array(slots, np.int64).tobytes()


def plain(value: Any) -> Any:
    """A result of the table as the Python form has it: runs are lists."""
    if isinstance(value, bytes):
        return np.frombuffer(value, np.int64).tolist()
    return value


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except ValueError:
        return ValueError


STATES = {"claim": (FREE,), "hold": (0, 1), "give_back": (-2, -1), "evict": (0,), "unpublish": (0, 1)}
SLOT_RUNS = {"claim", "stage", "register", "hold", "release", "give_back", "evict", "unpublish"}
LOOKS = ("idle", "keys", "parents", "tags", "parent_slots")
# Of different lengths, and some whose beginnings are the same.
KEYS = [b"", b"a", b"ab", b"ab\0", bytes(32), bytes(33), *(bytes([at]) * 16 for at in range(1, 8))]


class Both:
    """Does everything twice and compares everything."""

    def __init__(self, capacity: int) -> None:
        self.table, self.plain = Table(capacity), Plain(capacity)

    def __call__(self, name: str, *args: Any) -> Any:
        expected = outcome(lambda: getattr(self.plain, name)(*args))
        if name in SLOT_RUNS:
            args = (run(*args[0]), *args[1:])
        got = outcome(lambda: getattr(self.table, name)(*args))
        if name == "evict" and got is not ValueError:
            got = (got[0], plain(got[1]))  # these bytes are keys
        elif isinstance(got, tuple) and name != "unpublish":
            got = tuple(plain(part) for part in got)
        assert plain(got) == expected
        self.compare()
        return expected

    def compare(self) -> None:
        table, slots = self.table, self.plain.slots
        numbers = list(range(len(slots)))
        assert {name: getattr(table, name) for name in GAUGES} == self.plain.gauges()
        assert np.frombuffer(table.states(), np.int32).tolist() == [slot.state for slot in slots]
        assert [table.state(slot) for slot in numbers] == [slot.state for slot in slots]
        assert plain(table.free_slots()) == self.plain.stack
        assert plain(table.registered_slots()) == [slot for slot in numbers if slots[slot].registered]
        assert plain(table.find(KEYS)) == self.plain.find(KEYS)
        assert table.absent(KEYS) == self.plain.absent(KEYS)
        for name in LOOKS:
            assert plain(getattr(table, name)(run(*numbers))) == getattr(self.plain, name)(numbers)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 7), st.data())
def test_does_what_the_python_form_does(capacity: int, data: st.DataObject) -> None:
    both = Both(capacity)
    keys = st.lists(st.sampled_from(KEYS), max_size=6)

    def slots(*states: int) -> list[int]:
        """Mostly some that are in the right state, else any; now and then one twice."""
        good = [at for at, slot in enumerate(both.plain.slots) if min(slot.state, 1) in states]
        good += [at for at, slot in enumerate(both.plain.slots) if slot.state > ORPHANED and ORPHANED in states]
        if good and data.draw(st.integers(0, 9)):
            chosen = data.draw(st.lists(st.sampled_from(good), max_size=6, unique=True))
            return chosen + (chosen[:1] if not data.draw(st.integers(0, 9)) else [])
        return data.draw(st.lists(st.integers(0, len(both.plain.slots) - 1), max_size=4))

    def step(name: str) -> None:
        draw = data.draw
        match name:
            case "take" | "retire" | "restore":
                both(name, draw(st.integers(-1, 4)))
            case "grow":
                both(name, len(both.plain.slots) + draw(st.integers(-1, 3)))
            case "match" | "peek":
                both(name, draw(keys), draw(st.integers(-1, 2)))
            case "stage":
                chosen = slots(WRITABLE)
                one = st.none() | st.sampled_from(KEYS)
                parent = draw(one | st.tuples(*[one] * len(chosen)))
                names = draw(st.lists(st.sampled_from(KEYS), min_size=len(chosen), max_size=len(chosen)))
                both(name, chosen, tuple(names) if draw(st.integers(0, 9)) else None, parent)
            case "register":
                chosen = slots(STAGED)
                done = draw(st.none() | st.binary(min_size=len(chosen), max_size=len(chosen)))
                both(name, chosen, done, draw(st.booleans()))
            case "release":
                both(name, slots(1, ORPHANED))
            case "clear":
                both(name)
            case _:
                both(name, slots(*STATES[name]))

    names = ["take", "stage", "stage", "register", "register", "match", "peek", "hold", "release", "release"]
    names += ["claim", "give_back", "evict", "unpublish", "grow", "retire", "restore"]
    for name in data.draw(st.lists(st.sampled_from([*names, *names, "clear"]), min_size=10, max_size=40)):
        step(name)


@pytest.mark.parametrize("seed", range(4))
def test_long_chains_of_probes(seed: int) -> None:
    """Half-full tables of every small size, filled and emptied in any order: removals close gaps over the edge."""
    random = np.random.default_rng(seed)
    for capacity in (1, 2, 3, 4, 8, 64, 200):
        table, there = Table(capacity), dict[bytes, int]()
        names = [random.bytes(int(random.integers(1, 9))) for _ in range(3 * capacity)]
        for _ in range(12 * capacity):
            name = names[int(random.integers(len(names)))]
            if name in there:
                assert table.unpublish(run(there.pop(name))) == (name,)
            elif table.free:
                slot = table.take(1)
                table.stage(slot, (name,), None)
                table.register(slot, None, False)
                table.release(slot)
                there[name] = plain(slot)[0]
            if table.free == 0 or len(there) < 4:
                assert plain(table.find(names)) == [there.get(name, -1) for name in names]
        assert plain(table.find(names)) == [there.get(name, -1) for name in names]


def colliding(n: int, bits: int) -> list[bytes]:
    """Keys that all begin their search at one place of a table of this many bits, the last."""
    keys = (b"%d" % at for at in range(1 << 20))
    return [key for key, _ in zip((key for key in keys if hash(key) & bits == bits), range(n), strict=False)]


def test_keys_that_collide() -> None:
    keys = colliding(8, 15)
    for gone in range(8):
        table = Table(8)
        slots = table.take(8)
        table.stage(slots, tuple(keys), None)
        table.register(slots, None, False)
        numbers = plain(slots)
        assert table.find(keys) == slots
        table.unpublish(run(numbers[gone]))
        numbers[gone] = -1
        assert plain(table.find(keys)) == numbers
        assert table.absent([*keys, b"x"]) == [gone, 8]
        table.grow(9)  # another size of the index
        assert plain(table.find(keys)) == numbers
        assert table.peek(keys, 0) == gone


@pytest.fixture
def table() -> Iterator[Table]:
    """Slots 0 free, 1 writable, 2 staged, 3 registered, 4 held, 5 orphaned, 6 retired; what is refused changes none."""
    table = Table(7)
    table.retire(1)
    slots = plain(table.take(6))
    assert slots == [0, 1, 2, 3, 4, 5]
    table.stage(run(2), (b"2",), None)
    table.stage(run(3, 4, 5), (b"3", b"4", b"5"), b"2")
    table.register(run(3, 4, 5), None, False)
    table.release(run(3))
    table.unpublish(run(5))
    table.give_back(run(0))
    before = everything(table)
    yield table
    assert everything(table) == before


def everything(table: Table) -> list[object]:
    numbers = run(*range(table.capacity))
    return [table.states(), table.keys(numbers), table.parents(numbers), table.free_slots(), table.find(KEYS[:1])] + [
        getattr(table, name) for name in GAUGES
    ]


ACCEPTS = {
    "claim": {0},
    "hold": {3, 4},
    "release": {4, 5},
    "give_back": {1, 2},
    "evict": {3},
    "unpublish": {3, 4},
    "stage": {1},
    "register": {2},
}
MORE: dict[str, tuple[Any, ...]] = {"stage": (None, None), "register": (None, False)}


@pytest.mark.parametrize("name", ACCEPTS)
@pytest.mark.parametrize("slot", range(7))
def test_a_slot_in_another_state_is_refused(table: Table, name: str, slot: int) -> None:
    if slot in ACCEPTS[name]:
        return
    method = getattr(table, name)
    for good in ACCEPTS[name]:  # after and before a right one
        for slots in ((slot,), (good, slot), (slot, good)):
            more = ((b"x", b"y")[: len(slots)], None) if name == "stage" else MORE.get(name, ())
            with pytest.raises(ValueError, match=rf"slot {slot} is in state"):
                method(run(*slots), *more)


@pytest.mark.parametrize("name", ["claim", "release", "give_back", "evict", "unpublish", "stage", "register"])
def test_a_slot_that_is_twice_is_refused(table: Table, name: str) -> None:
    for slot in ACCEPTS[name]:
        more = ((b"x", b"y"), None) if name == "stage" else MORE.get(name, ())
        with pytest.raises(ValueError, match=rf"slot {slot} is (twice|in state .* that often)"):
            getattr(table, name)(run(slot, slot), *more)


@pytest.mark.parametrize("name", [*ACCEPTS, *LOOKS])
@pytest.mark.parametrize(
    ("slots", "error", "text"),
    [
        (run(7), ValueError, "slot 7 is not in 0..6"),
        (run(-1), ValueError, "slot -1 is not in 0..6"),
        (run(1 << 40), ValueError, "is not in 0..6"),
        (b"1234567", TypeError, "bytes of int64"),
        (bytearray(8), TypeError, "bytearray"),
        ([3], TypeError, "list"),
        (None, TypeError, "NoneType"),
    ],
)
def test_what_is_no_run_is_refused(table: Table, name: str, slots: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        getattr(table, name)(slots, *MORE.get(name, ()))


class Text(bytes):
    pass


@pytest.mark.parametrize("key", ["2", 2, None, bytearray(b"2"), Text(b"2")])
def test_what_is_no_key_is_refused(table: Table, key: Any) -> None:
    for call in (
        lambda: table.match([b"4", key], 0),
        lambda: table.peek([b"4", key], 0),
        lambda: table.find([b"4", key]),
        lambda: table.absent([b"4", key]),
        lambda: table.stage(run(1), (key,), None),
    ):
        with pytest.raises(TypeError, match="a key must be bytes"):
            call()
    if key is not None:
        with pytest.raises(TypeError, match="a parent must be bytes or None"):
            table.stage(run(1), (b"x",), key)


@pytest.mark.parametrize(
    "keys", [(), (b"x", b"y"), [b"x"], b"x"], ids=["too few", "too many", "a list", "one key alone"]
)
def test_a_stage_needs_a_tuple_of_as_many_keys(table: Table, keys: Any) -> None:
    with pytest.raises(TypeError, match="needs a tuple of 1 keys or None"):
        table.stage(run(1), keys, None)


@pytest.mark.parametrize("parents", [(), (b"x", b"y"), (b"x", None, b"z")])
def test_a_stage_needs_as_many_parents(table: Table, parents: Any) -> None:
    with pytest.raises(TypeError, match="needs a tuple of 1 parents"):
        table.stage(run(1), (b"x",), parents)
    with pytest.raises(TypeError, match="a parent must be bytes or None"):
        table.stage(run(1), (b"x",), ("y",))  # type: ignore[arg-type]


def test_a_key_twice_in_a_stage_changes_nothing() -> None:
    table = Table(4)
    table.stage(run(*plain(table.take(1))), (b"a",), None)
    slots = table.take(3)
    before = everything(table)
    for keys in ((b"a", b"b", b"a"), (b"b", b"c", b"c"), (b"b", b"b", b"c")):
        with pytest.raises(ValueError, match="a key is twice"):
            table.stage(slots, keys, None)
        assert everything(table) == before
        assert table.absent([b"a", b"b", b"c"]) == [1, 2]
    table.stage(slots, (b"a", b"b", b"c"), None)


def test_one_key_staged_twice_is_not_registered_twice_at_once() -> None:
    table = Table(3)
    a, b, c = plain(table.take(3))
    for slot, key in ((a, b"x"), (b, b"x"), (c, b"y")):
        table.stage(run(slot), (key,), None)
    before = everything(table)
    for slots in (run(a, b), run(b, c, a)):
        with pytest.raises(ValueError, match="a key is twice"):
            table.register(slots, None, False)
        assert everything(table) == before
    assert table.register(run(a, c), None, False)[1] is None
    assert plain(table.register(run(b), None, False)[2]) == [a]


@pytest.mark.parametrize("done", [b"", b"\1\1", [True], np.ones(1, np.bool_), bytearray(1)])
def test_done_needs_a_byte_per_slot(table: Table, done: Any) -> None:
    with pytest.raises(TypeError, match="done must be None or 1 bytes"):
        table.register(run(2), done, False)


def test_without_keys_a_staged_slot_can_only_be_given_back() -> None:
    table = Table(1)
    slots = table.take(1)
    table.stage(slots, None, None)
    with pytest.raises(ValueError, match="staged with a key"):
        table.register(slots, None, False)
    table.give_back(slots)
    assert table.free == 1


class Odd:
    """Cannot be understood as an argument."""

    def __bool__(self) -> bool:
        raise KeyError("odd")

    def __index__(self) -> int:
        raise KeyError("odd")

    def __iter__(self) -> Iterator[bytes]:
        raise KeyError("odd")


@pytest.mark.parametrize(
    "call",
    [
        lambda table, odd: table.register(run(2), None, odd),
        lambda table, odd: table.match(odd, 0),
        lambda table, odd: table.match([b"4"], odd),
        lambda table, odd: table.peek(odd, 0),
        lambda table, odd: table.peek([b"4"], odd),
        lambda table, odd: table.find(odd),
        lambda table, odd: table.absent(odd),
        lambda table, odd: table.take(odd),
        lambda table, odd: table.state(odd),
        lambda table, odd: table.grow(odd),
        lambda table, odd: table.retire(odd),
        lambda table, odd: table.restore(odd),
    ],
)
def test_an_argument_that_raises_changes_nothing(table: Table, call: Callable[[Table, Odd], object]) -> None:
    with pytest.raises(KeyError, match="odd"):
        call(table, Odd())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda table: table.take(-1), "-1 slots of 1"),
        (lambda table: table.take(2), "2 slots of 1"),
        (lambda table: table.retire(-1), "-1 slots of 1"),
        (lambda table: table.retire(2), "2 slots of 1"),
        (lambda table: table.restore(-1), "-1 slots of 1"),
        (lambda table: table.restore(2), "2 slots of 1"),
        (lambda table: table.grow(6), r"6 is not in 7\.\."),
        (lambda table: table.grow(-1), r"-1 is not in 7\.\."),
        (lambda table: table.grow(LARGEST + 1), "is not in"),
        (lambda table: table.state(-1), "slot -1"),
        (lambda table: table.state(7), "slot 7"),
        (lambda table: table.match([b"4"], -1), "start -1 is negative"),
        (lambda table: table.peek([b"4"], -1), "start -1 is negative"),
        (lambda table: table.match([b"4"], -(1 << 62)), "is negative"),
        (lambda table: table.__init__(3), "given once"),
    ],
)
def test_numbers_out_of_bounds(table: Table, call: Callable[[Table], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(table)


@pytest.mark.parametrize("name", [*ACCEPTS, *LOOKS, "match", "peek", "find", "absent", "take", "state", "grow"])
def test_the_wrong_number_of_arguments(table: Table, name: str) -> None:
    with pytest.raises(TypeError, match="arguments"):
        getattr(table, name)()
    with pytest.raises(TypeError, match="arguments"):
        getattr(table, name)(1, 2, 3, 4)


@pytest.mark.parametrize("capacity", [0, -1, LARGEST + 1])
def test_a_capacity_out_of_bounds(capacity: int) -> None:
    with pytest.raises(ValueError, match="capacity must be in"):
        Table(capacity)


def test_a_table_whose_init_never_ran_is_empty() -> None:
    table = Table.__new__(Table)
    assert (table.capacity, table.find([b"a"]), table.peek([b"a"], 0)) == (0, run(-1), 0)
    assert table.match([b"a"], 0) == (b"", b"")
    table.clear()
    with pytest.raises(TypeError, match="capacity"):
        Table()  # type: ignore[call-arg]
    table.__init__(2)  # type: ignore[misc]
    assert table.free == 2


def test_any_sequence_of_keys_and_any_start() -> None:
    table = Table(40)
    keys = tuple(b"%d" % at for at in range(40))
    slots = table.take(40)
    table.stage(slots, keys, None)
    table.register(slots, None, False)
    for start in (0, 1, 15, 16, 17, 39, 40, 41, 1 << 40):
        assert table.peek(keys, start) == max(0, 40 - start)
        for form in (keys, list(keys), iter(keys), dict.fromkeys(keys)):
            assert table.match(form, start) == (slots[8 * start :], b"")  # type: ignore[arg-type]


def test_a_key_that_is_repeated_is_held_as_often() -> None:
    table = Table(2)
    slots = table.take(2)
    table.stage(slots, (b"a", b"b"), None)
    table.register(slots, None, False)
    table.release(slots)
    a, b = plain(slots)
    assert tuple(map(plain, table.match([b"a", b"b", b"a"], 0))) == ([a, b, a], [a, b])
    assert (table.state(a), table.active) == (2, 2)
    assert plain(table.release(run(a))) == []
    assert plain(table.release(run(b, a))) == [b, a]
    assert plain(table.hold(run(a, a))) == [a]
    with pytest.raises(ValueError, match="that often"):
        table.release(run(a, a, a))
    assert plain(table.release(run(a, a))) == [a]
    table.hold(run(a, a))
    table.unpublish(run(a))
    assert plain(table.release(run(a, a))) == []
    assert (table.free, table.orphaned) == (1, 0)


def test_no_reference_is_lost_or_kept() -> None:
    keys, parent = tuple(b"key %d" % at for at in range(4)), b"the parent"
    before = [sys.getrefcount(key) for key in (*keys, parent)]

    def once(table: Table) -> None:
        for done, keep in ((None, False), (None, False), (None, True), (b"\1\0\1\0", False), (b"\0\0\1\1", True)):
            slots = table.take(4)
            with pytest.raises(ValueError, match="twice"):
                table.stage(slots, (*keys[:3], keys[0]), parent)
            table.stage(slots, keys, (parent, None, *keys[:2]) if keep else parent)
            table.release(table.register(slots, done, keep)[0])
        table.release(table.match(keys, 0)[0])
        table.find(keys), table.absent([*keys, parent])
        everywhere = run(*range(table.capacity))
        table.keys(everywhere), table.parents(everywhere), table.tags(everywhere), table.parent_slots(everywhere)
        for bad in ([*keys, 7], [7, *keys]):
            for look in (table.find, table.absent, lambda keys: table.match(keys, 0), lambda keys: table.peek(keys, 0)):
                with pytest.raises(TypeError):
                    look(bad)
        table.grow(table.capacity + 9)
        table.give_back(table.evict(table.find(keys[:1]))[1])
        table.unpublish(table.find(keys[1:2]))
        held = table.match(keys[2:], 0)[0]
        staged = table.take(4)
        table.stage(staged, keys, parent)
        table.clear()
        table.release(held)
        table.give_back(staged)

    table = Table(9)
    for _ in range(3):
        once(table)
        assert table.free == table.capacity
        assert [sys.getrefcount(key) for key in (*keys, parent)] == before
    slots = table.take(4)
    table.stage(slots, keys, parent)
    assert [sys.getrefcount(key) for key in (*keys, parent)] != before
    del table
    assert [sys.getrefcount(key) for key in (*keys, parent)] == before
