import errno
import mmap
import os
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm.core.errors import Broken, Misuse
from kvbm.native import fill
from kvbm.stores import memory
from kvbm.stores.memory import Arena

PAGE = mmap.PAGESIZE


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(memory, "SLICE_BYTES", 4 * PAGE)
    monkeypatch.setattr(memory, "_LOOK_S", 0.01)
    return 4 * PAGE


def test_touch_allocates_everything_in_slices_and_keeps_what_is_there(slices: int) -> None:
    arena, seen = Arena(10 * PAGE - 7), []
    os.pwrite(arena.fd, b"kept", 100)
    assert os.fstat(arena.fd).st_blocks * 512 <= PAGE
    arena.touch(progress=lambda done, total: seen.append((done, total)))
    size = arena.size
    assert seen == [(slices, size), (2 * slices, size), (size, size)]
    assert os.fstat(arena.fd).st_blocks * 512 == 10 * PAGE
    assert os.pread(arena.fd, 10 * PAGE, 0) == bytes(100) + b"kept" + bytes(size - 104)
    arena.touch()
    arena.close()


def test_what_the_kernel_lets_be_huge_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SLICE_BYTES", 4 << 20)
    arena = Arena((9 << 20) + 5)
    os.pwrite(arena.fd, b"kept", 6 << 20)
    arena.touch()
    assert arena.address % (2 << 20) == 0
    assert os.fstat(arena.fd).st_blocks * 512 == (9 << 20) + PAGE
    assert os.pread(arena.fd, 6, (6 << 20) - 1) == b"\0kept\0"
    huge = huge_kib("kvbm-arena")
    arena.close()
    assert huge > 0 or not the_kernel_has_huge_pages()


def huge_kib(name: str) -> int:
    return int(Path("/proc/self/smaps").read_text().split(name)[-1].split("ShmemPmdMapped:")[1].split()[0])


def the_kernel_has_huge_pages() -> bool:
    """Whether it gives one to who asks for it (Linux 6.1, and memory that is not all in small pieces)."""
    fd = os.memfd_create("control")
    os.ftruncate(fd, 8 << 20)
    with mmap.mmap(fd, 8 << 20) as memory:
        memory.write(bytes(8 << 20))
        with suppress(OSError):
            memory.madvise(25)  # MADV_COLLAPSE, which Python has no name for
        huge = huge_kib("control")
    os.close(fd)
    return huge > 0


def test_other_mappings_of_the_fd_see_the_same_bytes() -> None:
    arena = Arena(3 * PAGE)
    region = arena.region([100, 28], 5)
    assert region.planes[1].address == arena.address + 100
    assert (region.num_slots, region.slot_bytes, region.kind, region.name) == (5, 128, "host", "G2")
    assert region.owner is arena
    assert not os.get_inheritable(arena.fd)
    with mmap.mmap(arena.fd, arena.size) as other:
        other[130] = 7
        there = (np.ctypeslib.ctypes.c_uint8 * arena.size).from_address(arena.address)
        assert there[130] == 7
    arena.close()
    arena.close()


def test_a_region_can_begin_anywhere_but_has_to_fit() -> None:
    arena = Arena(1000)
    assert arena.region([10], 90, name="tail", offset=100).planes[0].address == arena.address + 100
    for rows, slots, offset in (([10], 101, 0), ([10], 91, 100), ([10], 1, -1)):
        with pytest.raises(Misuse, match="do not fit"):
            arena.region(rows, slots, offset=offset)
    arena.close()


def test_a_dropped_arena_closes_its_fd() -> None:
    arena = Arena(PAGE)
    fd = arena.fd
    del arena
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_memory_that_is_not_there_is_said_before_it_is_taken(monkeypatch: pytest.MonkeyPatch, slices: int) -> None:
    left = iter([20 * PAGE, 3 * PAGE])  # somebody else takes some meanwhile
    monkeypatch.setattr(memory, "available_memory", lambda: next(left))
    arena = Arena(10 * PAGE)
    with pytest.raises(Broken, match=r"still to be allocated, 0.00 GiB are available"):
        arena.touch()
    assert os.fstat(arena.fd).st_blocks * 512 == slices
    arena.close()


def test_what_is_allocated_already_needs_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Arena(10 * PAGE)
    first.touch()
    monkeypatch.setattr(memory, "available_memory", lambda: 0)
    second = Arena(10 * PAGE, os.dup(first.fd))
    second.touch()
    assert second.touched == second.size
    first.close()
    second.close()


def test_a_refusal_of_the_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "fill", lambda *_: errno.ENOSPC)
    arena = Arena(PAGE)
    with pytest.raises(Broken, match="No space left"):
        arena.touch()
    arena.close()


def test_the_first_part_is_whole_slices(slices: int) -> None:
    arena = Arena(10 * PAGE)
    arena.touch(slices + 1)
    assert arena.touched == os.fstat(arena.fd).st_blocks * 512 == 2 * slices
    arena.touch(20 * PAGE)
    assert arena.touched == arena.size
    arena.close()


def test_the_rest_beside_what_else_goes_on(slices: int) -> None:
    arena, seen = Arena(10 * PAGE - 7), list[int]()
    arena.touch(1)
    os.pwrite(arena.fd, b"kept", 9 * PAGE)
    arena.touch_beside(threading.Event(), threading.Event(), seen.append)
    assert arena.touched == seen[-1] == arena.size
    assert os.fstat(arena.fd).st_blocks * 512 == 10 * PAGE
    assert os.pread(arena.fd, 4, 9 * PAGE) == b"kept"
    arena.close()


def test_it_runs_where_nobody_else_wants_the_processor(monkeypatch: pytest.MonkeyPatch, slices: int) -> None:
    classes: list[int] = []

    def filled(fd: int, address: int, control: Any, wait: bool) -> int:
        classes.append(os.sched_getscheduler(0))
        return int(fill(fd, address, control, wait))

    monkeypatch.setattr(memory, "fill", filled)
    arena = Arena(10 * PAGE)
    arena.touch(1)
    arena.touch_beside(threading.Event(), threading.Event(), lambda _: None)
    assert classes == [os.SCHED_OTHER, os.SCHED_IDLE]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    arena.close()


@pytest.mark.parametrize("late", [True, False])
def test_in_a_hurry_it_runs_like_everything_else(monkeypatch: pytest.MonkeyPatch, slices: int, late: bool) -> None:
    classes, hurry = list[int](), threading.Event()

    def filled(fd: int, address: int, control: Any, wait: bool) -> int:
        classes.append(os.sched_getscheduler(0))
        return int(fill(fd, address, control, wait))

    monkeypatch.setattr(memory, "fill", filled)
    monkeypatch.setattr(memory, "_MOST_AHEAD", slices)
    arena, seen = Arena(10 * PAGE), list[int]()
    os.pwrite(arena.fd, b"kept", 9 * PAGE)

    def progress(done: int) -> None:
        seen.append(done)
        hurry.set()

    if not late:
        hurry.set()
    arena.touch_beside(threading.Event(), hurry, progress)
    assert classes == [os.SCHED_IDLE, os.SCHED_OTHER][not late :]
    assert arena.touched == seen[-1] == arena.size
    assert os.fstat(arena.fd).st_blocks * 512 == 10 * PAGE
    assert os.pread(arena.fd, 4, 9 * PAGE) == b"kept"
    arena.close()


def test_memory_that_ends_on_the_way_leaves_what_is_there(monkeypatch: pytest.MonkeyPatch, slices: int) -> None:
    enough = memory.RESERVE_BYTES + 2 * slices
    left = iter([20 * PAGE, enough, enough - 1])
    monkeypatch.setattr(memory, "available_memory", lambda: next(left))
    arena = Arena(20 * PAGE)
    arena.touch(1)
    with pytest.raises(Broken, match=r"1.00 GiB are available to this process, 1.00 GiB of which are left to the eng"):
        arena.touch_beside(threading.Event(), threading.Event(), lambda _: None)
    assert slices <= arena.touched <= 3 * slices
    assert os.fstat(arena.fd).st_blocks * 512 == arena.touched
    assert memory.promised() == 0
    arena.close()


def test_what_the_kernel_refuses_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "fill", lambda *_: errno.ENOMEM)
    arena = Arena(10 * PAGE)
    with pytest.raises(Broken, match="Cannot allocate memory"):
        arena.touch_beside(threading.Event(), threading.Event(), lambda _: None)
    arena.close()


def test_it_ends_soon_after_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 60)
    monkeypatch.setattr(memory, "SLICE_BYTES", 1 << 29)
    arena, over = Arena(1 << 30), threading.Event()
    thread = threading.Thread(target=arena.touch_beside, args=(over, threading.Event(), lambda _: None))
    thread.start()
    while not arena.touched:
        time.sleep(0.001)
    begun = time.monotonic()
    over.set()
    thread.join(30)
    arena.close()
    assert time.monotonic() - begun < 1
    assert arena.touched < arena.size


def test_what_is_promised_is_what_somebody_still_touches(monkeypatch: pytest.MonkeyPatch, slices: int) -> None:
    """Whoever sizes an arena meanwhile must not count on it."""
    size = 1 << 30
    monkeypatch.setattr(memory, "available_memory", lambda: size)
    # Not more: tests that run beside this one believe it.
    before = memory.promised()
    arena = Arena(size)
    assert memory.promised() == before  # nobody touches it
    arena.touch(1)
    with subprocess.Popen(["sleep", "60"], pass_fds=[arena.fd]) as other:
        assert memory.promised() - before == size - slices  # once, though two processes have it open
        other.kill()
    arena.close()
    assert memory.promised() == before


@pytest.mark.parametrize("size", [1 << 62, 1 << 80])
def test_a_size_that_cannot_be_mapped_is_an_error(size: int) -> None:
    with pytest.raises(Broken, match="cannot map"):
        Arena(size)


def test_a_size_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        Arena(0)
