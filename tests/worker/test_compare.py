"""Whether blocks are the same, as numbers."""

from __future__ import annotations

import queue

import numpy as np
import pytest

from kvbm.abc.transport import Completion
from kvbm.core.outcome import Outcome
from kvbm.core.region import Region, packed
from kvbm.link.messages import Compare, Result, pack
from kvbm.stores.checksum import checksums, verified
from kvbm.worker.compare import BOUNDS, Comparisons, Unknown, decoded, distances

VALUES = 512


def region(*blocks: np.ndarray) -> Region:  # type: ignore[type-arg]
    """Blocks of two rows each."""
    memory = np.ascontiguousarray(np.stack(blocks))
    size = memory.nbytes // len(blocks)
    return packed("g2", memory.ctypes.data, [size - size // 4, size // 4], len(blocks), owner=memory)


def apart(dtype: str, a: np.ndarray, b: np.ndarray) -> float:  # type: ignore[type-arg]
    return float(distances(region(a, b), np.array([0]), np.array([1]), dtype)[0])


@pytest.fixture
def dice() -> np.random.Generator:
    return np.random.default_rng(1)


def bfloat16(values: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """Rounded to nearest, as two bytes each."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


MAKE = {"float32": lambda x: x.astype(np.float32), "float16": lambda x: x.astype(np.float16), "bfloat16": bfloat16}


@pytest.mark.parametrize("dtype", MAKE)
def test_rounding_is_the_same_and_another_block_is_not(dtype: str, dice: np.random.Generator) -> None:
    make, a, b = MAKE[dtype], dice.normal(size=VALUES), dice.normal(size=VALUES)
    step = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    assert apart(dtype, make(a), make(a)) == 0
    assert 0 < apart(dtype, make(a), make(a * (1 + step * dice.normal(size=VALUES)))) < BOUNDS[dtype]
    assert apart(dtype, make(a), make(b)) > 1 > BOUNDS[dtype]
    assert apart(dtype, make(a), make(0 * a)) == pytest.approx(2)


@pytest.mark.parametrize("dtype", MAKE)
def test_the_worst_row_counts(dtype: str, dice: np.random.Generator) -> None:
    make, a = MAKE[dtype], dice.normal(size=VALUES)
    for row in (slice(0, VALUES * 3 // 4), slice(VALUES * 3 // 4, None)):
        b = a.copy()
        b[row] = dice.normal(size=len(b[row]))
        assert apart(dtype, make(a), make(b)) > 1


@pytest.mark.parametrize("dtype", MAKE)
def test_numbers_are_what_they_are(dtype: str, dice: np.random.Generator) -> None:
    a = MAKE[dtype](dice.normal(size=(3, 8)))
    exact = a.astype(np.float64) if dtype != "bfloat16" else (a.astype(np.uint32) << 16).view(np.float32)
    assert (decoded(a.view(np.uint8), dtype) == exact).all()


@pytest.mark.parametrize(
    ("dtype", "code", "value"),
    [
        ("float8_e4m3fn", 0b0_0111_000, 1.0), ("float8_e4m3fn", 0b1_1111_110, -448.0),
        ("float8_e4m3fn", 0b0_0000_001, 2.0**-9), ("float8_e4m3fn", 0x7F, np.nan),
        ("float8_e5m2", 0b0_01111_00, 1.0), ("float8_e5m2", 0b1_11110_11, -57344.0),
        ("float8_e5m2", 0b0_00000_01, 2.0**-16), ("float8_e5m2", 0b0_11111_00, np.inf), ("float8_e5m2", 0x7F, np.nan),
    ],
)  # fmt: skip
def test_eight_bits(dtype: str, code: int, value: float) -> None:
    (got,) = decoded(np.array([code], np.uint8), dtype)
    assert got == value or (np.isnan(got) and np.isnan(value))


def test_what_is_not_finite(dice: np.random.Generator) -> None:
    a = dice.normal(size=VALUES).astype(np.float32)
    b = a.copy()
    b[7] = np.nan
    assert apart("float32", a, b) == np.inf
    assert apart("float32", b, b) == 0
    b[7] = np.inf
    assert apart("float32", b, a) == np.inf
    assert apart("float32", 0 * a, 0 * a) == 0


def test_many_blocks_in_several_pieces(monkeypatch: pytest.MonkeyPatch, dice: np.random.Generator) -> None:
    monkeypatch.setattr("kvbm.worker.compare.AT_ONCE", 4 * VALUES * 3)
    blocks = [dice.normal(size=VALUES).astype(np.float32) for _ in range(10)]
    memory = region(*blocks, *blocks[:9], blocks[0])
    found = distances(memory, np.arange(10), np.arange(10, 20), "float32")
    assert (found[:9] == 0).all()
    assert found[9] > 1


@pytest.mark.parametrize("dtype", ["", "int8"])
def test_what_cannot_be_compared(dtype: str) -> None:
    with pytest.raises(Unknown, match=dtype or "unknown"):
        apart(dtype, np.zeros(8, np.uint8), np.zeros(8, np.uint8))


def _answer(dtype: str, memory: Region, copied: Completion) -> Result:
    told: queue.Queue[Result] = queue.Queue()
    Comparisons(2, dtype, told.put).close()
    comparisons = Comparisons(2, dtype, told.put)
    comparisons.start(Compare(7, "r", b"", pack([0, 1, 2]), pack([3, 4, 5])), memory, copied)
    result = told.get(timeout=10)
    comparisons.close()
    assert told.empty()
    return result


def test_a_comparison_answers_block_by_block(dice: np.random.Generator) -> None:
    blocks = [dice.normal(size=VALUES).astype(np.float32) for _ in range(4)]
    memory = region(*blocks[:3], blocks[0], blocks[3], blocks[2])
    copied = Completion(1, np.array([Outcome.DONE, Outcome.DONE, Outcome.FAILED], np.uint8), "injected", 0.1, 1)
    result = _answer("float32", memory, copied)
    assert (result.job, result.rank, result.error) == (7, 2, "injected")
    assert result.outcomes == bytes([Outcome.DONE, Outcome.CORRUPT, Outcome.FAILED])
    errors = np.frombuffer(result.errors, np.float32)
    assert errors[0] == 0 < 1 < errors[1]
    result = _answer("int8", memory, copied)
    assert result.outcomes == bytes([Outcome.FAILED] * 3)


def test_a_load_is_verified_with_the_checksums_of_its_slots(dice: np.random.Generator) -> None:
    memory = np.frombuffer(dice.bytes(4 * 100), np.uint8).reshape(4, 100).copy()
    host = packed("g2", memory.ctypes.data, [100], 4, owner=memory)
    sums = checksums(host, np.arange(4), 100)
    copied = Completion(1, np.array([Outcome.DONE, Outcome.FAILED, Outcome.DONE], np.uint8), "late", 0.1, 1)
    slots = np.array([3, 0, 1])
    assert verified(copied, host, slots, sums, 100) is copied
    memory[3, 99] ^= 1
    memory[0, 0] ^= 1
    again = verified(copied, host, slots, sums, 100)
    assert again.outcomes.tolist() == [Outcome.CORRUPT, Outcome.FAILED, Outcome.DONE]
    assert again.error == "late"
    good = Completion(1, np.zeros(1, np.uint8), None, 0.1, 1)
    assert verified(good, host, slots[:1], sums, 100).error == "1 blocks in host memory changed"
