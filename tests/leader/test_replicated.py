"""KV that every rank has the same of: one rank stores it, all load it."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest

from kvbm.core.errors import Broken
from kvbm.core.events import Admitted
from kvbm.leader.requests import RequestParams
from kvbm.stores.memory import Arena
from tests.build.whole import ROWS, Engine
from tests.leader.roles import keys_of

KEYS = keys_of("p", 8)
TOKENS = Admitted(8 * 32, 0, 8 * 32)
FAULTS = "kvbm.testing.faults:build?"


def mapped() -> int:
    """Bytes of arenas that exist, however often they are mapped."""
    sizes: dict[int, int] = {}
    for name in os.listdir("/proc/self/fd"):
        link = Path("/proc/self/fd") / name
        if link.is_symlink() and "kvbm-arena" in os.readlink(link):
            status = link.stat()
            sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


@pytest.mark.parametrize("replicated", [True, False])
def test_one_copy_for_all_ranks(tmp_path: Path, replicated: bool) -> None:
    """In memory and on disk; three ranks with parts of their own are the control."""
    before = mapped()
    parts = 1 if replicated else 3
    with closing(Engine(tmp_path, ranks=3, replicated=replicated)) as engine:
        assert mapped() - before == 16 * 12288 * parts
        assert engine.serve(KEYS) == 0
        engine.settle()
        status = engine.side.control.status()
        assert status["block_bytes"] == sum(ROWS) * parts
        assert status["ranks"] == 3
        assert status["offload"]["bytes"] == len(KEYS) * sum(ROWS) * parts
        assert engine.serve(KEYS) == len(KEYS)
        assert engine.side.control.status()["onboard"]["bytes"] == len(KEYS) * sum(ROWS) * 3
        assert sorted(path.name for path in engine.own.glob("rank*.data")) == [f"rank{i}.data" for i in range(parts)]
    with closing(Engine(tmp_path, ranks=3, replicated=replicated)) as engine:  # now from disk
        assert engine.serve(KEYS) == len(KEYS)
        assert engine.side.control.status()["promote"]["blocks"] == len(KEYS)
    assert mapped() == before


def test_a_size_is_that_of_the_one_copy(tmp_path: Path) -> None:
    size = 20 * sum(ROWS) / 1e9 + 1e-9
    found = []
    for replicated in (True, False):
        path = tmp_path / str(replicated)
        path.mkdir(mode=0o700)
        settings = {"g3_blocks": None, "g2_blocks": None, "g2_gb": size}
        with closing(Engine(path, ranks=2, replicated=replicated, **settings)) as engine:
            found.append(engine.leader.core.pool.statistics().total)
    assert found == [20, 10]


def test_a_load_that_fails_on_a_rank_that_stores_nothing_is_a_failed_load(tmp_path: Path) -> None:
    faults = FAULTS + "load_fail=1&rank=1"
    with closing(Engine(tmp_path, ranks=2, replicated=True, g3_blocks=None, transport_wrapper=faults)) as engine:
        assert engine.serve(KEYS) == 0
        engine.leader.begin("r", [*KEYS, b"last".ljust(32)], RequestParams(), 9 * 32)
        assert engine.leader.match("r", 0, len(KEYS)) == len(KEYS)
        engine.leader.place("r", list(range(8)), 8, TOKENS)
        engine.step("r", 0)
        engine.until(lambda: engine.leader.core.in_flight() == (0, 0))
        assert engine.workers[0].collect(idle=False).failed == set()
        assert engine.workers[1].collect(idle=False).failed == {"r"}
        assert engine.leader.core.pool.peek(KEYS) == 0


def test_what_was_computed_with_a_failed_load_on_any_rank_is_not_stored(tmp_path: Path) -> None:
    """Loads inside the step: the rank that stores loaded well, the other did not, and both computed with that."""
    faults, more = FAULTS + "load_fail=1&rank=1", keys_of("q", 4)
    with closing(
        Engine(tmp_path, ranks=2, replicated=True, g3_blocks=None, onboard="sync", transport_wrapper=faults)
    ) as engine:
        assert engine.serve(KEYS) == 0
        engine.leader.begin("r", [*KEYS, *more], RequestParams(), 12 * 32)
        assert engine.leader.match("r", 0, len(KEYS)) == len(KEYS)
        engine.leader.place("r", list(range(12)), 8, TOKENS)
        engine.step("r", 12)
        engine.until(lambda: engine.leader.core.in_flight() == (0, 0))
        assert engine.workers[1].take_bad_blocks() == set(range(8))
        assert engine.leader.core.pool.peek(more) == 0
        assert engine.leader.core.pool.peek(KEYS) == 0


def test_memory_that_is_not_what_was_said(tmp_path: Path) -> None:
    arena = Arena(8192)
    with pytest.raises(Broken, match="8192 bytes, not 4096"):
        Arena(4096, os.dup(arena.fd))
    other = Arena(8192, os.dup(arena.fd))
    a, b = (each.region([4096], 2).planes[0].address for each in (arena, other))
    assert a != b
    arena.close()
    other.close()


def test_one_copy_is_verified_and_compared(tmp_path: Path) -> None:
    """By the rank that stores: the others have no checksums, and may not write what was computed beside it."""
    for name, settings in (("verified", {"g2_verify": True}), ("compared", {"shadow_every": 1})):
        path = tmp_path / name
        path.mkdir(mode=0o700)
        with closing(Engine(path, ranks=3, replicated=True, g3_blocks=None, g2_blocks=64, **settings)) as engine:
            for worker in engine.workers:
                worker.copying.comparisons.dtype = "float32"
            assert engine.serve(KEYS) == 0
            found = engine.serve(KEYS)
            engine.until(lambda engine=engine: engine.leader.core.in_flight() == (0, 0))
            if engine.leader.shadow is not None:
                assert found == 0
                assert (engine.leader.shadow.compared, engine.leader.shadow.wrong) == (len(KEYS), 0)
            else:
                assert found == len(KEYS)
            assert not engine.leader.core.health.problems
