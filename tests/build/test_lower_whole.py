"""Leader and workers as the composition roots build them, with files."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import tests.before  # noqa: F401
from kvbm.transfer import file
from tests.build.whole import PATIENCE, Engine
from tests.leader.roles import keys_of


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(ranks: int = 1, **settings: Any) -> Engine:
        engines.append(Engine(tmp_path, ranks, **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


Start = Callable[..., Engine]


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_was_computed_is_there_after_a_restart(start: Start, ranks: int, tmp_path: Path) -> None:
    keys = keys_of("a", 6)
    with closing(Engine(tmp_path, ranks)) as engine:
        assert engine.disk.statistics().total == 32
        assert engine.serve(keys) == 0
        engine.settle()
    engine = start(ranks)
    assert engine.disk.peek(keys) == 6
    assert engine.disk.look(keys[3]).parent == keys[2]  # type: ignore[union-attr]
    assert engine.serve(keys) == 6
    assert engine.leader.records["r0"].staged == {"g3": 6}
    assert engine.leader.pool.statistics().active == 0


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("moves", ["reads", "writes"])
@pytest.mark.parametrize("of", ["the transport", "the store"])
def test_a_thread_that_copies_to_disk_and_dies_costs_the_disk_tier_alone(
    start: Start, ranks: int, moves: str, of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """That of the last rank."""
    keys, more = keys_of("a", 4), keys_of("b", 4)
    problem = f"rank {ranks - 1}: a thread that copies to and from disk died"
    original = file.run_io

    def dies(fd: int, *args: Any) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(f"rank{ranks - 1}.data"):
            raise MemoryError("none left")
        original(fd, *args)

    with closing(Engine(tmp_path, ranks)) as engine:
        engine.serve(keys)
        engine.settle()
        if moves == "reads":
            engine.leader.pool.discard(keys)
        if of == "the transport":
            monkeypatch.setattr(file, "run_io", dies)
        else:
            shard = engine.workers[-1]._disk.disk.shard
            monkeypatch.setattr(shard, "expect" if moves == "reads" else "commit", lambda *_: sys.exit("injected"))
        assert engine.serve(keys if moves == "reads" else more) == 0
        engine.until(engine.leader.degraded)
        monkeypatch.undo()
        health = engine.side.control.health()
        assert (health["healthy"], health["degraded"]) == (True, {"g3": problem})
        assert caplog.text.count(problem) == 1
        assert engine.disk.peek(more) == 0
        disk = engine.leader.disk
        assert disk is not None
        engine.until(lambda: disk.tier.in_flight() == engine.leader.in_flight() == (0, 0))
        engine.serve(keys)  # the first may have ended while they were still on their way
        engine.until(lambda: engine.leader.in_flight() == (0, 0))
        assert engine.serve(keys) == 4, "host memory goes on"
        assert engine.serve(keys_of("c", 3)) == 0
        assert engine.serve(keys_of("c", 3)) == 3
        assert disk.tier.in_flight() == (0, 0)
    engine = start(ranks)
    assert engine.serve(keys) == 4, "what was on disk before still is"
    assert engine.serve(more) == 0


@pytest.mark.parametrize("moves", ["reads", "writes"])
def test_the_end_of_a_move_that_raises_turns_all_off(start: Start, moves: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leaves undone would be waited for."""
    engine, keys = start(1), keys_of("a", 4)
    engine.serve(keys)
    engine.settle()
    engine.leader.pool.discard(keys)
    disk = engine.workers[0]._disk
    assert disk is not None

    def broken(*_: Any) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(disk, "_read" if moves == "reads" else "_report", broken)
    begun = time.monotonic()
    assert engine.serve(keys if moves == "reads" else keys_of("b", 4)) == 0
    engine.until(lambda: engine.leader.off)
    assert time.monotonic() - begun < 5, "nobody waits for its deadline"
    assert "the end of a move raised RuntimeError('injected')" in str(engine.leader.off)
    lower = engine.leader.disk
    assert lower is not None
    engine.until(lambda: lower.tier.in_flight() == (0, 0))


@pytest.mark.parametrize("bad", [0, 1])
def test_a_flipped_bit_on_one_rank_is_computed_again(start: Start, bad: int) -> None:
    engine, keys = start(2), keys_of("a", 5)
    engine.serve(keys)
    engine.settle()
    engine.leader.pool.discard(keys)
    engine.spoil(keys[2], bad)
    assert engine.serve(keys) == 2
    lower = engine.leader.disk
    assert lower is not None
    assert lower.tier.corrupt == 1
    engine.settle()
    engine.leader.pool.discard(keys)
    assert engine.serve(keys) == 5  # written again


def test_a_drain_leaves_nothing_only_in_memory(start: Start, tmp_path: Path) -> None:
    with closing(Engine(tmp_path, 1, g3_admission="frequency")) as engine:
        for name in "ab":
            engine.serve(keys_of(name, 4))
        engine.settle()
        assert engine.disk.statistics().registered == 0
        engine.side.drain(PATIENCE)
    engine = start()
    assert [engine.serve(keys_of(name, 4)) for name in "ab"] == [4, 4]


@pytest.mark.parametrize("purge", [True, False])
def test_a_reset_lasts_through_a_restart(start: Start, tmp_path: Path, purge: bool) -> None:
    """And nothing after it does: the engine may have got other weights then, which the next start does not have. A
    purge changes no weights."""
    keys, new = keys_of("a", 4), keys_of("new", 2)
    with closing(Engine(tmp_path, 2)) as engine:
        engine.serve(keys)
        engine.settle()
        if not purge:
            engine.leader.reset()
            assert engine.serve(keys) == 0
            engine.settle()
        with engine.leader.below() as lower:
            assert lower is not None
            lower.clear_disk() if purge else engine.leader.reset()
        engine.settle()
        engine.serve(new)
        engine.settle()
    engine = start(2)
    assert engine.serve(keys) == 0
    assert engine.serve(new) == (2 if purge else 0)
    if not purge:
        engine.settle()
        engine.close()
        engine = start(2)
        assert engine.serve(new) == 2, "what was written after the restart lasts again"


@pytest.mark.parametrize("placement", ["write-through", "exclusive"])
def test_more_than_both_tiers_hold_is_never_wrong(start: Start, placement: str) -> None:
    """32 blocks on disk, 16 in memory, 90 in use; also while prompts share their beginnings."""
    engine, root = start(2, placement=placement), keys_of("root", 2)
    loaded = 0
    for i in range(45):
        loaded += engine.serve([*root, *keys_of(f"{i * i % 15}", 6)])
    assert loaded > 90  # more than the root alone
    engine.settle()
    engine.leader.pool.check()
    engine.disk.check()
    now = engine.disk.statistics()
    assert (now.active, now.staged, now.orphaned) == (0, 0, 0)


def test_files_that_are_deleted_while_in_use(start: Start) -> None:
    engine, keys = start(), keys_of("a", 4)
    engine.serve(keys)
    engine.settle()
    for path in engine.folder.glob("*/rank0.*"):
        path.unlink()
    lower = engine.leader.disk
    assert lower is not None
    lower.tier.fail("looked at by an operator")
    assert engine.serve(keys_of("b", 4)) == 0
    engine.settle()
    assert engine.disk.peek(keys) == 0
    assert engine.disk.peek(keys_of("b", 4)) == 4  # written since
    engine.leader.pool.discard(keys_of("b", 4))
    assert engine.serve(keys_of("b", 4)) == 4
