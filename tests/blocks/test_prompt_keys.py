"""Keys of a prompt, computed a second time from what the docstring says."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from kvbm.blocks import Pool, prompt_keys
from kvbm.core.errors import Misuse
from kvbm.policy import LRU

PARTS = st.lists(st.binary(max_size=3), max_size=3)


def u(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


def parts(given: Sequence[bytes]) -> bytes:
    return b"".join(u(len(part), 8) + part for part in given)


def oracle(
    tokens: Sequence[int], size: int, namespace: Sequence[bytes], extras: Mapping[int, Sequence[bytes]]
) -> list[bytes]:
    key, keys = hashlib.sha256(b"kvbm prompt keys 1" + u(size, 8) + parts(namespace)).digest(), []
    for n in range(len(tokens) // size):
        words = b"".join(u(token, 4) for token in tokens[n * size : (n + 1) * size])
        key = hashlib.sha256(key + words + parts(extras.get(n, ()))).digest()
        keys.append(key)
    return keys


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_keys_are_what_the_docstring_says(data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, (1 << 32) - 1), max_size=100))
    size, namespace = data.draw(st.integers(1, 20)), data.draw(PARTS)
    extras = data.draw(st.dictionaries(st.integers(0, -(-len(tokens) // size) - 1), PARTS)) if tokens else {}
    keys = prompt_keys(tokens, size, namespace=namespace, extras=extras)
    assert keys == oracle(tokens, size, namespace, extras)
    cut = data.draw(st.integers(0, len(keys)))  # going on after a prompt gives what the whole would
    if cut:
        rest = {number - cut: given for number, given in extras.items() if number >= cut}
        assert prompt_keys(tokens[cut * size :], size, extras=rest, parent=keys[cut - 1]) == keys[cut:]


def test_keys_stay_what_they_are() -> None:
    # What is stored under a key outlives the program that computed it.
    assert [key.hex()[:16] for key in prompt_keys(range(32), 16)] == ["3c4ad6383d13f8e7", "61d194444538ed66"]
    both = prompt_keys(range(16), 16, namespace=[b"model", b"salt"], extras={0: [b"image"]})
    assert both[0].hex()[:16] == "47b83944af691503"


def test_what_differs_has_other_keys() -> None:
    tokens = list(range(64))
    different: list[tuple[Any, int, dict[str, Any]]] = [
        (tokens, 16, {}),
        (tokens, 32, {}),
        ([1, *tokens[1:]], 16, {}),
        *((tokens, 16, {"namespace": each}) for each in ([b""], [b"ab", b"c"], [b"a", b"bc"], [b"abc"], [b"", b""])),
        *((tokens, 16, {"extras": {0: each}}) for each in ([b""], [b"ab", b"c"], [b"a", b"bc"], [b"abc"])),
        (tokens, 16, {"extras": {0: [np.arange(16, 32, dtype=np.uint32).tobytes()]}}),
    ]
    seen = [key for tokens, size, rest in different for key in prompt_keys(tokens, size, **rest)]
    assert len(set(seen)) == len(seen)


def test_parts_from_an_iterator_count() -> None:
    keys = prompt_keys(range(16), 16, namespace=iter([b"tenant"]), extras={0: iter([b"x"])})  # type: ignore[arg-type,dict-item]
    assert keys == oracle(range(16), 16, [b"tenant"], {0: [b"x"]})


def test_an_extra_changes_its_block_and_those_after() -> None:
    plain, other = prompt_keys(range(64), 16), prompt_keys(range(64), 16, extras={2: [b"image"]})
    assert [a == b for a, b in zip(plain, other, strict=True)] == [True, True, False, False]


def test_an_unfinished_block_has_no_key_and_its_extra_no_effect() -> None:
    plain = prompt_keys(range(32), 16)
    assert prompt_keys(range(40), 16, extras={2: [b"image"]}) == plain
    assert prompt_keys(range(32), 16, extras={0: []}) == plain
    assert prompt_keys(range(15), 16) == prompt_keys([], 16) == []


@pytest.mark.parametrize("kind", ["i1", "u1", "i2", ">i2", "i4", "u4", "i8", "u8", ">i8", ">u4"])
def test_arrays_of_every_integer(kind: str) -> None:
    tokens = np.arange(100, dtype=kind)
    assert prompt_keys(tokens, 16) == prompt_keys(list(range(100)), 16)
    assert prompt_keys(tokens[::-3], np.int64(8)) == prompt_keys(list(range(99, -1, -3)), 8)  # type: ignore[arg-type]


def test_a_pool_takes_them() -> None:
    pool, keys = Pool(4, order=LRU(4)), prompt_keys(range(32), 16)
    raw = pool.allocate(2)
    assert raw is not None
    raw.stage(keys).register().drop()
    assert pool.peek(prompt_keys(range(48), 16)) == 2


@pytest.mark.parametrize(
    ("message", "tokens", "size", "rest"),
    [
        (r"tokens\[1\] is -1", [0, -1], 16, {}),
        (r"tokens\[1\] is 4294967296", np.array([0, 1 << 32]), 16, {}),
        (r"tokens\[0\] must be an int", [1.5], 16, {}),
        (r"tokens\[0\] must be an int", "words", 16, {}),
        ("tokens must be a sequence", {1, 2}, 16, {}),
        ("one-dimensional integers, got float64", np.zeros(4), 16, {}),
        ("one-dimensional integers, got bool", np.zeros(4, bool), 16, {}),
        (r"one-dimensional integers, got int64 of shape \(2, 2\)", np.zeros((2, 2), np.int64), 16, {}),
        ("as a buffer", b"12345678", 16, {}),
        ("at least one token, not 0", [], 0, {}),
        ("at least one token, not -1", [], -1, {}),
        ("integer", [], 16.0, {}),
        ("cannot fit", [], 1 << 63, {}),
        ("too big", [], 1 << 64, {}),
        ("namespace must be a sequence", [], 16, {"namespace": b"one"}),
        ("namespace must be a sequence", [], 16, {"namespace": ["text"]}),
        ("not iterable", [], 16, {"namespace": 5}),
        (r"extras\[0\] must be a sequence", range(16), 16, {"extras": {0: b"one"}}),
        ("extras for block 1, and there are 1", range(16), 16, {"extras": {1: [b"x"]}}),
        ("extras for block -1", range(16), 16, {"extras": {0: [b"x"], -1: [b"x"]}}),
        ("extras for block 0.5", range(16), 16, {"extras": {0.5: [b"x"]}}),
        ("parent must be bytes", [], 16, {"parent": b"short"}),
        ("give one", [], 16, {"parent": bytes(32), "namespace": [b"x"]}),
    ],
)
def test_anything_else_is_misuse(message: str, tokens: Any, size: Any, rest: dict[str, Any]) -> None:
    with pytest.raises(Misuse, match=message):
        prompt_keys(tokens, size, **rest)
