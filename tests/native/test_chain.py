"""Chained keys against hashlib, with the processor's instructions and without."""

from __future__ import annotations

import hashlib
import struct
import sys
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from kvbm.native import chain

ROOT = bytes(range(32))
MOST = (1 << 32) - 1
PATHS = pytest.mark.parametrize("portable", [False, True])
TOKENS = st.lists(st.integers(0, MOST) | st.integers(0, 3), max_size=200)


def oracle(parent: bytes, tokens: Sequence[int], size: int, extras: tuple[bytes, ...]) -> list[bytes]:
    keys = []
    for block in range(len(tokens) // size):
        words = struct.pack(f"<{size}I", *tokens[block * size : (block + 1) * size])
        extra = extras[block] if block < len(extras) else b""
        parent = hashlib.sha256(parent + words + extra).digest()
        keys.append(parent)
    return keys


@PATHS
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_it_is_hashlib(portable: bool, data: st.DataObject) -> None:
    tokens, size = data.draw(TOKENS), data.draw(st.integers(1, 40))
    parent = data.draw(st.binary(min_size=32, max_size=32))
    extras = tuple(data.draw(st.lists(st.binary(max_size=150), max_size=len(tokens) // size)))
    keys = oracle(parent, tokens, size, extras)
    assert chain(parent, tokens, size, extras, portable) == keys
    assert chain(parent, np.array(tokens, np.uint32), size, extras, portable) == keys


@PATHS
def test_every_length_of_a_message(portable: bool) -> None:
    # Where padding begins depends on the length modulo 64.
    for length in range(200):
        extra = (bytes(length),)
        assert chain(ROOT, [1], 1, extra, portable) == oracle(ROOT, [1], 1, extra)
    long = (bytes(1 << 20),)
    assert chain(ROOT, [1], 1, long, portable) == oracle(ROOT, [1], 1, long)


@PATHS
def test_a_long_prompt_in_several_threads(portable: bool) -> None:
    tokens = np.random.default_rng(1).integers(0, MOST, 100_000)
    keys, found = oracle(ROOT, tokens.tolist(), 16, ()), []
    threads = [
        threading.Thread(target=lambda: found.append(chain(ROOT, tokens, 16, (), portable) == keys)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


class Number:
    """Not an int, but usable as one."""

    def __init__(self, value: int, before: Callable[[], object] = lambda: None) -> None:
        self.value, self.before = value, before

    def __index__(self) -> int:
        self.before()
        return self.value


class Plain(Sequence[int]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, at: Any) -> Any:
        return range(5)[at]


@pytest.mark.parametrize(
    "tokens",
    [
        (0, 1, 2, 3, 4),
        range(5),
        deque(range(5)),
        Plain(),
        [False, True, np.int64(2), np.uint8(3), Number(4)],
        array("i", range(5)),
        array("L", range(5)),
        memoryview(array("q", range(5))),
        *(np.arange(5, dtype=kind) for kind in ("i4", "u4", "i8", "u8", "<i8")),
        np.frombuffer(b"x" + np.arange(5).tobytes(), np.int64, 5, 1),  # not aligned
    ],
    ids=lambda tokens: type(tokens).__name__,
)
def test_tokens_come_as_any_sequence_or_buffer(tokens: Any) -> None:
    assert chain(ROOT, tokens, 2, ()) == oracle(ROOT, range(5), 2, ())


def test_the_largest_token() -> None:
    assert chain(ROOT, [MOST], 1, ()) == chain(ROOT, np.array([MOST]), 1, ()) == oracle(ROOT, [MOST], 1, ())


@pytest.mark.parametrize("size", [6, MOST, sys.maxsize])
def test_a_prompt_without_a_whole_block_has_no_key(size: int) -> None:
    assert chain(ROOT, range(5), size, ()) == []
    assert chain(ROOT, [], size, ()) == chain(ROOT, np.array([], np.int64), size, ()) == []


@pytest.mark.parametrize(
    ("token", "shown"),
    [(-1, "-1"), (MOST + 1, "4294967296"), (1 << 63, "9223372036854775808"), (-(1 << 200), str(-(1 << 200)))],
)
def test_a_token_out_of_range_is_refused_also_behind_the_last_block(token: int, shown: str) -> None:
    message = rf"tokens\[2\] is {shown}, not in 0\.\.4294967295"
    for item in (token, Number(token)):
        with pytest.raises(ValueError, match=message):
            chain(ROOT, [1, 2, item], 2, ())  # type: ignore[list-item]
    for kind in ("i4", "i8", "u8"):
        if np.iinfo(kind).min <= token <= np.iinfo(kind).max:
            with pytest.raises(ValueError, match=message):
                chain(ROOT, np.array([1, 2, token], kind), 2, ())


def test_a_number_too_long_to_show_is_refused() -> None:
    with pytest.raises(ValueError, match="digits"):
        chain(ROOT, [1 << 100_000], 1, ())


@pytest.mark.parametrize("item", ["1", None, 1.0, b"1", np.float32(1), [1]])
def test_an_item_that_is_no_int_is_refused(item: Any) -> None:
    with pytest.raises(TypeError, match=r"tokens\[1\] must be an int, not \w+"):
        chain(ROOT, (1, item), 1, ())


def test_a_list_that_changes_under_its_own_items_is_refused() -> None:
    def clear() -> None:
        tokens.clear()

    tokens: list[Any] = [Number(1, clear), *range(1000)]
    with pytest.raises(ValueError, match="changed"):
        chain(ROOT, tokens, 1, ())

    class Spiteful(int):
        def __str__(self) -> str:
            spiteful.clear()
            return "x"

    spiteful: list[Any] = [1, Spiteful(-1)]
    with pytest.raises(ValueError, match=r"tokens\[1\]"):
        chain(ROOT, spiteful, 1, ())


def test_an_error_of_the_items_own_passes() -> None:
    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        chain(ROOT, [Number(1, fail)], 1, ())


class Empty:
    def __len__(self) -> int:
        return 1

    def __getitem__(self, at: int) -> int:
        raise RuntimeError("no items")


def broken() -> Iterator[tuple[type[Exception], str, tuple[Any, ...]]]:
    """Every argument, wrong in every way."""
    good = (ROOT, [1, 2], 1, (), False)

    def but(at: int, value: object) -> tuple[Any, ...]:
        return (*good[:at], value, *good[at + 1 :])

    for count in (0, 1, 3, 6):
        yield TypeError, "4 or 5 arguments", (*good, 1)[:count]
    for parent in (None, "x" * 32, b"", ROOT[:31], ROOT + b"x", bytearray(32), memoryview(ROOT)):
        yield ValueError, "parent", but(0, parent)
    for tokens in (None, 5, {1, 2}, {1: 2}, iter([1]), 1.5):
        yield TypeError, "tokens must be a sequence", but(1, tokens)
    for buffer in (b"12345678", bytearray(8), array("h", [1]), array("d", [1]), memoryview(b"abcd"), *arrays()):
        yield ValueError, "tokens as a buffer", but(1, buffer)
    yield ValueError, "contiguous", but(1, np.arange(8)[::2])
    yield RuntimeError, "no items", but(1, Empty())
    for size in (None, "1", 1.0, []):
        yield TypeError, "integer", but(2, size)
    for size in (0, -1, -(1 << 63)):
        yield ValueError, "block_tokens", but(2, size)
    for size in (1 << 63, 1 << 200):
        yield ValueError, "cannot fit", but(2, size)
    for extras in (None, [], b"", {}):
        yield TypeError, "extras must be a tuple", but(3, extras)
    for extra in (None, "x", 1, bytearray(1)):
        yield TypeError, r"extras\[1\] must be bytes", but(3, (b"", extra))
    yield ValueError, "3 extras for 2 blocks", but(3, (b"", b"", b""))
    yield ValueError, "ambiguous", but(4, np.zeros(2))


def arrays() -> list[Any]:
    return [
        np.array(1),
        np.zeros((2, 2), np.int64),
        *(np.zeros(2, kind) for kind in ("f4", "f8", "i2", "u1", "?", ">i4", ">u8", "c8", "S4", "i4,i4")),
    ]


@pytest.mark.parametrize(("error", "message", "arguments"), list(broken()))
def test_wrong_arguments_are_refused(error: type[Exception], message: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(error, match=message):
        chain(*arguments)


def test_nothing_is_leaked() -> None:
    memory, extra, item = array("q", range(64)), b"extra" * 10, Number(1 << 20)
    tokens, extras, wrong = [item, 1 << 20, -1 << 40], (extra,), (extra, None)
    objects = [ROOT, memory, extra, item, tokens, extras, wrong, *tokens]
    control = [bytes([n] * 32) for n in range(4)]
    before = [sys.getrefcount(each) for each in objects]
    for portable in (False, True):
        for _ in range(100):
            keys = chain(ROOT, memory, 16, extras, portable)
            assert [sys.getrefcount(key) for key in keys] == [sys.getrefcount(key) for key in control]
            for bad in (tokens, array("d", [1]), np.arange(8)[::2], "ab"):
                with pytest.raises((ValueError, TypeError)):
                    chain(ROOT, bad, 1, extras, portable)  # type: ignore[arg-type]
            with pytest.raises(TypeError):
                chain(ROOT, memory, 16, wrong, portable)  # type: ignore[arg-type]
    del keys
    assert [sys.getrefcount(each) for each in objects] == before
    memory.append(1)  # would raise if its buffer were still exported
