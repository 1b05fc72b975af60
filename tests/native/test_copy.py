import builtins
import errno
import importlib
import mmap
import os
import sys
import threading
import time
from array import array
from collections.abc import Iterator

import hypothesis.strategies as st
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings

import kvbm.native
from kvbm.native import XXH3_FROM, checksums, copy_rows, fill, prefer

Layout = tuple[np.ndarray, np.ndarray, np.ndarray]


def oracle(source: Layout, destination: Layout, rows: np.ndarray, pairs: list[tuple[int, int]]) -> None:
    """The same, row by row, on the arrays that the addresses point into."""
    for s, d in pairs:
        for plane, n in enumerate(rows):
            here = source[1][plane] + s * source[2][plane]
            there = destination[1][plane] + d * destination[2][plane]
            destination[0][there : there + n] = source[0][here : here + n]


def addresses(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    memory, offset, stride = layout
    return memory.ctypes.data + offset, stride


@st.composite
def layouts(draw: st.DrawFn, rows: list[int], slots: int) -> Layout:
    """Planes one after the other with any gaps, or all rows of a slot in one extent."""
    if draw(st.booleans()):
        pad = draw(st.integers(0, 70))
        slot = sum(rows) + pad
        offset = pad + np.concatenate(([0], np.cumsum(rows)[:-1]))
        stride, size = np.full(len(rows), slot), pad + slots * slot
    else:
        strides = [n + draw(st.integers(0, 70)) for n in rows]
        gaps = [draw(st.integers(0, 70)) for _ in rows]
        starts = np.cumsum([gap + slots * stride for gap, stride in zip(gaps, strides, strict=True)])
        offset = starts - slots * np.array(strides)
        stride, size = np.array(strides), int(starts[-1])
        if draw(st.booleans()):  # backwards
            offset, stride = offset + (slots - 1) * stride, -stride
    return np.zeros(size, np.uint8), offset.astype(np.int64), stride.astype(np.int64)


@st.composite
def copies(draw: st.DrawFn) -> tuple[Layout, Layout, np.ndarray, list[tuple[int, int]]]:
    # Below, at and above every length from which on a row is copied another way, one of them after another.
    short = st.integers(0, 130), st.integers(500, 530), st.integers(4000, 4200)
    row = st.one_of(*short, st.integers(8100, 8400), st.integers(16_300, 16_600), st.integers(24_500, 24_800))
    rows = draw(st.lists(row, min_size=1, max_size=5))
    slots = draw(st.integers(1, 6))
    numbers = st.integers(0, slots - 1)
    destinations = draw(st.lists(numbers, unique=True))
    pairs = [(draw(numbers), d) for d in destinations]
    return draw(layouts(rows, slots)), draw(layouts(rows, slots)), np.array(rows, np.int64), pairs


@settings(max_examples=150, deadline=None)
@given(copies(), st.integers(0, 7))
def test_copies_what_the_oracle_copies(
    copy: tuple[Layout, Layout, np.ndarray, list[tuple[int, int]]], chunk: int
) -> None:
    source, destination, rows, pairs = copy
    random = np.random.default_rng(0)
    source[0][:] = random.integers(0, 256, len(source[0]))
    destination[0][:] = random.integers(0, 256, len(destination[0]))
    before, expected = source[0].copy(), destination[0].copy()
    oracle(source, (expected, *destination[1:]), rows, pairs)
    slots = np.array(pairs, np.int64).reshape(-1, 2)
    arguments = (*addresses(source), *addresses(destination), rows, slots[:, 0].copy(), slots[:, 1].copy())
    shared = (np.zeros(2, np.int64), chunk) if chunk else ()
    sums = np.zeros(len(pairs), np.int64)
    summed = bool(shared) and rows.sum() >= XXH3_FROM
    assert copy_rows(*arguments, *shared, *((sums,) if summed else ())) == int(rows.sum()) * len(pairs)
    assert (destination[0] == expected).all()
    assert (source[0] == before).all()
    if summed:
        starts = [[int(offset + s * stride) for offset, stride in zip(*source[1:], strict=True)] for s, _ in pairs]
        blocks = [
            b"".join(source[0][at : at + n].tobytes() for at, n in zip(block, rows, strict=True)) for block in starts
        ]
        assert sums.view(np.uint64).tolist() == [xxhash.xxh3_64_intdigest(block) for block in blocks]


def one_plane(slots: int, row: int = 64) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    source = np.arange(slots * row, dtype=np.uint64).astype(np.uint8)
    destination = np.zeros_like(source)
    plane = [np.array([value], np.int64) for value in (source.ctypes.data, row, destination.ctypes.data, row, row)]
    numbers = np.arange(slots, dtype=np.int64)
    return source, destination, [*plane, numbers, numbers]


def test_threads_share_a_copy_and_every_block_is_copied_by_one_of_them() -> None:
    source, destination, arguments = one_plane(3000, 1000)
    control = np.zeros(2, np.int64)
    copied: list[int] = []
    threads = [threading.Thread(target=lambda: copied.append(copy_rows(*arguments, control, 7))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(copied) == len(source)
    assert (source == destination).all()


@pytest.fixture
def measured_anew() -> Iterator[None]:
    yield
    prefer(-1)


@pytest.mark.usefixtures("measured_anew")
@pytest.mark.parametrize("way", [0, 1])
@pytest.mark.parametrize("row", [16384, 16385, 65536 + 700, 3 * 16384 + 4096])
@pytest.mark.parametrize("shift", [0, 1, 40])
def test_long_rows_are_copied_right_either_way(way: int, row: int, shift: int) -> None:
    prefer(way)
    assert prefer() == way
    dice = np.random.default_rng(row)
    source, target = dice.integers(0, 256, 4 * row + shift, np.uint8), np.zeros(3 * row + shift + 64, np.uint8)
    one, slots, sums = np.ones(1, np.int64), np.array([2, 0]), np.zeros(2, np.int64)
    copied = copy_rows(
        one * (source.ctypes.data + shift), one * row, one * target.ctypes.data, one * (row + shift), one * row,
        slots, np.array([0, 1]), np.zeros(2, np.int64), 2, sums,
    )  # fmt: skip
    assert copied == 2 * row
    for place, slot in enumerate(slots):
        there = target[place * (row + shift) :][:row]
        assert (there == source[shift + slot * row :][:row]).all()
        assert np.uint64(sums[place]) == xxhash.xxh3_64_intdigest(there.tobytes())
    assert not target[row : row + shift].any()
    assert not target[2 * row + shift :].any()


@pytest.mark.usefixtures("measured_anew")
def test_the_faster_way_is_chosen_after_nine_turns_of_each() -> None:
    prefer(-1)
    memory, slots, one = np.ones(4 << 20, np.uint8), np.arange(16), np.ones(1, np.int64)
    there = np.zeros_like(memory)

    def copy(blocks: int) -> None:
        rows = one * (1 << 16)
        copy_rows(one * memory.ctypes.data, rows, one * there.ctypes.data, rows, rows, slots[:blocks], slots[:blocks])

    for _ in range(100):
        copy(15)  # less than a megabyte says little
    assert prefer() == -1
    for _ in range(17):
        copy(16)
        assert prefer() == -1
    copy(16)
    assert prefer() in (0, 1)
    with pytest.raises(ValueError, match="no way 3"):
        prefer(3)


def test_a_stopped_copy_can_be_resumed() -> None:
    source, destination, arguments = one_plane(10)
    control = np.array([4, 1], np.int64)
    assert copy_rows(*arguments, control, 3) == 0
    assert not destination.any()
    control[1] = 0
    assert copy_rows(*arguments, control, 3) == 6 * 64
    assert (destination[4 * 64 :] == source[4 * 64 :]).all()
    assert not destination[: 4 * 64].any()
    assert control[0] >= 10


def test_any_contiguous_int64_buffer_will_do() -> None:
    source, destination, arguments = one_plane(3)
    assert copy_rows(*(array("q", argument.tolist()) for argument in arguments)) == len(source)
    assert (source == destination).all()


BAD = {
    "int32": np.zeros(1, np.int32),
    "uint64": np.zeros(1, np.uint64),
    "float": np.zeros(1, np.float64),
    "other endian": np.zeros(1, ">i8"),
    "two-dimensional": np.zeros((1, 1), np.int64),
    "strided": np.zeros((2, 2), np.int64)[:, 0],
    "bytes": b"12345678",
    "no buffer": [0],
    "too long": np.zeros(3, np.int64),
}


@pytest.mark.parametrize("position", range(7))
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_bad_buffer_is_refused_before_anything_is_copied(position: int, bad: object) -> None:
    _, destination, arguments = one_plane(1)
    arguments[position] = bad  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"int64|entries"):
        copy_rows(*arguments)
    assert not destination.any()


def test_negative_rows_and_bad_controls_are_refused() -> None:
    _, destination, arguments = one_plane(1)
    readonly = np.zeros(2, np.int64)
    readonly.flags.writeable = False
    for control, chunk in (
        (np.zeros(2, np.int64), 0),
        (np.zeros(3, np.int64), 1),
        (np.array([-1, 0]), 1),
        (readonly, 1),
    ):
        with pytest.raises(ValueError, match="control"):
            copy_rows(*arguments, control, chunk)
    with pytest.raises(ValueError, match="negative"):
        copy_rows(*arguments[:4], np.array([-1]), *arguments[5:])
    with pytest.raises(TypeError):
        copy_rows(*arguments, np.zeros(2, np.int64))
    with pytest.raises(TypeError):
        copy_rows(*arguments, np.zeros(2, np.int64), "3")
    assert not destination.any()


@pytest.mark.parametrize("row", [XXH3_FROM, 1024, 1025, 16 << 10, 40_000])
def test_checksums_are_those_of_xxhash(row: int) -> None:
    source, _, arguments = one_plane(9, row)
    sums, copied = np.zeros(3, np.int64), np.zeros(9, np.int64)
    checksums(source.ctypes.data, row, row - (row > XXH3_FROM), np.array([8, 0, 3]), sums)
    blocks = [source[at * row : (at + 1) * row - (row > XXH3_FROM)].tobytes() for at in (8, 0, 3)]
    assert sums.view(np.uint64).tolist() == [xxhash.xxh3_64_intdigest(block) for block in blocks]
    copy_rows(*arguments, np.array([2, 0]), 2, copied)
    whole = [xxhash.xxh3_64_intdigest(source[at * row : (at + 1) * row].tobytes()) for at in range(9)]
    assert copied.view(np.uint64).tolist() == [0, 0, *whole[2:]]


def test_checksums_of_too_little_or_for_other_blocks_are_refused() -> None:
    _, destination, arguments = one_plane(3, XXH3_FROM)
    control, slots = np.zeros(2, np.int64), np.arange(3)
    with pytest.raises(ValueError, match="one per block"):
        copy_rows(*arguments, control, 1, np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="sums"):
        copy_rows(*arguments, control, 1, np.zeros(3, np.float64))
    assert not destination.any()
    for nbytes, sums in ((XXH3_FROM - 1, np.zeros(3, np.int64)), (XXH3_FROM, np.zeros(2, np.int64))):
        with pytest.raises(ValueError, match="one per slot"):
            checksums(destination.ctypes.data, XXH3_FROM, nbytes, slots, sums)
    _, _, small = one_plane(3, XXH3_FROM - 1)
    with pytest.raises(ValueError, match="at least 241"):
        copy_rows(*small, control, 1, np.zeros(3, np.int64))


GRANTED, DONE, OVER = range(3)


def test_fill_goes_as_far_as_it_is_granted_and_keeps_what_is_there() -> None:
    fd, size = os.memfd_create("test"), (5 << 20) - 7
    os.ftruncate(fd, size)
    os.pwrite(fd, b"kept", 100)
    with mmap.mmap(fd, size) as mapped:
        memory = np.frombuffer(mapped, np.uint8)
        control = np.array([3 << 20, 0, 0])
        assert fill(fd, memory.ctypes.data, control, False) == 0
        assert control.tolist() == [3 << 20, 3 << 20, 0]
        assert os.fstat(fd).st_blocks * 512 == 3 << 20
        control[GRANTED] = size
        assert fill(fd, memory.ctypes.data, control, False) == 0
        assert control[DONE] == size
        assert os.fstat(fd).st_blocks * 512 == 5 << 20
        assert memory[100:104].tobytes() == b"kept"
        assert np.count_nonzero(memory) == 4
        del memory
    os.close(fd)


def test_fill_waits_for_more_until_it_is_over() -> None:
    fd, size = os.memfd_create("test"), 4 << 20
    os.ftruncate(fd, size)
    mapped = mmap.mmap(fd, size)
    memory = np.frombuffer(mapped, np.uint8)
    control, ended = np.array([0, 0, 0]), list[int]()
    thread = threading.Thread(target=lambda: ended.append(fill(fd, memory.ctypes.data, control, True)))
    thread.start()
    for granted in (1 << 20, 3 << 20):
        control[GRANTED] = granted
        deadline = time.monotonic() + 30
        while control[DONE] < granted:
            assert time.monotonic() < deadline
        assert thread.is_alive()
    control[OVER] = 1
    control[GRANTED] = size
    thread.join(30)
    assert (ended, control[DONE]) == ([0], 3 << 20)
    os.close(fd)


def test_fill_says_what_the_kernel_refused() -> None:
    memory = np.zeros(4096, np.uint8)
    read_only = os.open("/dev/zero", os.O_RDONLY)
    control = np.array([4096, 0, 0])
    assert fill(read_only, memory.ctypes.data, control, True) == errno.EBADF
    assert control[DONE] == 0
    os.close(read_only)
    with pytest.raises(ValueError, match="three int64"):
        fill(read_only, memory.ctypes.data, np.zeros(2, np.int64), False)


def test_a_missing_extension_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: object) -> object:
        if name == "kvbm.native._copy":
            raise ImportError("no such file")
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.delitem(sys.modules, "kvbm.native")
    with pytest.raises(ImportError, match=r"C compiler.*pip install --force-reinstall --no-deps \."):
        importlib.import_module("kvbm.native")
    monkeypatch.undo()
    assert sys.modules["kvbm.native"] is kvbm.native
