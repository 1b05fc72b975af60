"""Leader and workers whose host memory is touched while they serve."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path

import pytest

from kvbm.stores import memory
from tests.build.whole import Engine
from tests.leader.roles import keys_of

FIRST = keys_of("first", 3)
MANY = keys_of("many", 12)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Four slots are touched at the start; the others once it is set."""
    event, fill = threading.Event(), memory.fill

    def later(fd: int, address: int, control: object, wait: bool) -> int:
        if wait:
            event.wait(30)
        return fill(fd, address, control, wait)  # type: ignore[arg-type]

    monkeypatch.setattr(memory, "SLICE_BYTES", 4 * 12288)
    monkeypatch.setattr(memory, "fill", later)
    monkeypatch.setattr(memory, "_LOOK_S", 0.01)
    return event


@pytest.mark.parametrize(("ranks", "replicated"), [(1, False), (2, False), (3, True)])
def test_hits_before_and_after(tmp_path: Path, gate: threading.Event, ranks: int, replicated: bool) -> None:
    with closing(Engine(tmp_path, ranks, replicated=replicated, strict=False)) as engine:
        pool = engine.leader.core.pool
        assert (pool.total, pool.capacity) == (4, 16)
        assert [engine.serve(FIRST), engine.serve(FIRST)] == [0, 2]  # holds are half of what is there
        gate.set()
        engine.until(lambda: pool.total == 16)
        assert engine.serve(FIRST) == 3
        assert [engine.serve(MANY), engine.serve(MANY[:8])] == [0, 8]
        assert engine.leader.core.health.problems == []
        engine.settle()
        pool.check()


def test_once_it_is_full_it_hurries(tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, start, stop = list[bool](), memory.Arena._start_filling, memory.Arena._stop_filling

    def started(arena: memory.Arena, ended: list[int], *, idle: bool) -> threading.Thread:
        begun.append(idle)
        return start(arena, ended, idle=idle)

    monkeypatch.setattr(memory.Arena, "_start_filling", started)

    def stopped(arena: memory.Arena, seconds: float | None = None) -> None:
        gate.set()
        stop(arena, seconds)

    monkeypatch.setattr(memory.Arena, "_stop_filling", stopped)
    with closing(Engine(tmp_path, 2, strict=False)) as engine:
        assert [engine.serve(FIRST), engine.serve(FIRST)] == [0, 2]
        assert begun == [True, True]  # three of four slots are in use
        engine.serve(MANY[:4])
        engine.until(lambda: engine.leader.core.pool.total == 16)
        assert begun == [True, True, False, False]
        engine.settle()


def test_a_start_with_more_on_disk_than_host_memory_has_yet(tmp_path: Path, gate: threading.Event) -> None:
    with closing(Engine(tmp_path, strict=True)) as engine:
        assert engine.serve(MANY) == 0
        engine.settle()
    with closing(Engine(tmp_path, strict=False)) as engine:
        assert engine.leader.core.pool.total == 4
        assert engine.serve(MANY) == 2
        gate.set()
        engine.until(lambda: engine.leader.core.pool.total == 16)
        assert engine.serve(MANY[:8]) == 8
        engine.settle()


def test_the_end_before_all_is_touched(tmp_path: Path, gate: threading.Event) -> None:
    with closing(Engine(tmp_path, strict=False)) as engine:
        assert engine.serve(FIRST) == 0
        engine.settle()
    gate.set()


def test_strict_waits(tmp_path: Path, gate: threading.Event) -> None:
    with closing(Engine(tmp_path, strict=True)) as engine:
        assert engine.leader.core.pool.total == 16
