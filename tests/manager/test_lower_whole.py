"""Leader and workers as the composition roots build them, with files: the test is only the engine. Its KV of a block
follows from the block's key, so that any wrong byte shows."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvbm.core.config import load
from kvbm.core.events import Admitted
from kvbm.core.keys import Namespace
from kvbm.manager.build import Place, build_leader, build_worker
from kvbm.manager.requests import RequestParams
from kvbm.testing.transport import HostMemory
from tests.manager.roles import keys_of

ROWS = (4096, 4096, 640)
TOKENS, G1 = 32, 24
PATIENCE = 30.0
LAST = b"last".ljust(32)


def kv(key: bytes, rank: int) -> bytes:
    return (hashlib.sha512(key + bytes([rank])).digest() * (sum(ROWS) // 64 + 1))[: sum(ROWS)]


class Engine:
    """One engine of `ranks` ranks."""

    def __init__(self, path: Path, ranks: int, **settings: Any) -> None:
        extra = {
            "run_dir": str(path), "g3_dir": str(path / "g3"), "g2_blocks": 16, "g3_blocks": 32, "init_timeout_s": 30,
            "g3_direct": False, "g3_engine": "threads", "metrics": False, "strict": True,
        }  # fmt: skip
        resolved = load(environ={}, extra=extra | settings)
        place, names = Place("e", ranks), Namespace({"model": "m"}, "w")
        self.g1 = [HostMemory(ROWS, G1) for _ in range(ranks)]
        self.workers = [
            build_worker(resolved.settings, place, names, memory.region, rank) for rank, memory in enumerate(self.g1)
        ]
        self.side = build_leader(resolved, place, names, block_tokens=TOKENS, shares_device_blocks=True)
        self.leader = self.side.leader
        assert self.leader.lower is not None
        self.disk = self.leader.lower.tier.pool
        self.names = iter(range(1000))
        self.folder = path / "g3"

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.side.close()

    def until(self, what: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < deadline, f"{self.leader.problems} {self.leader.degraded()}"
            time.sleep(0.002)
            self.leader.tick()

    def step(self, name: str, complete: int) -> None:
        if complete:
            self.leader.advance(name, complete)
        step = self.leader.seal(tokens=0)  # it computes in no time: no load would be worth it
        for worker in self.workers:
            worker.before_step(step)
            worker.before_forward(step)
            worker.after_forward(step)

    def serve(self, keys: Sequence[bytes]) -> int:
        """A request with these blocks, and one of the last token; returns how many were loaded."""
        name = f"r{next(self.names)}"
        self.leader.begin(name, [*keys, LAST], RequestParams(), (len(keys) + 1) * TOKENS)
        found: int | None = None

        def matched() -> bool:
            nonlocal found
            found = self.leader.match(name, 0, len(keys))
            return found is not None

        self.until(matched)
        assert found is not None
        blocks = list(range(len(keys)))
        for memory in self.g1:
            for block in blocks:
                memory.put(block, bytes(sum(ROWS)))
        tokens = len(keys) * TOKENS
        self.leader.place(name, blocks, found, Admitted(tokens, 0, found * TOKENS))
        self.step(name, 0)
        self.until(lambda: self.leader.in_flight() == (0, 0))
        for rank, memory in enumerate(self.g1):
            for block in blocks[:found]:
                assert memory.get(block) == kv(keys[block], rank), "wrong bytes were served"
            for block in blocks[found:]:
                memory.put(block, kv(keys[block], rank))
        self.step(name, len(keys))
        self.until(lambda: self.leader.in_flight() == (0, 0))
        self.leader.finish(name, blocks, len(keys))
        self.step(name, 0)
        return found

    def settle(self) -> None:
        lower = self.leader.lower
        assert lower is not None
        self.until(lambda: lower.demotion.idle and lower.tier.in_flight() == (0, 0) and not self.leader.degraded())

    def spoil(self, key: bytes, rank: int) -> None:
        """One bit in the file."""
        block = self.disk.look(key)
        assert block is not None
        (path,) = self.folder.glob(f"*/rank{rank}.data")
        with path.open("r+b") as file:
            file.seek(block.slot * 12288 + 777)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 4]))


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
    assert engine.leader.records["r0"].staged == 6
    assert engine.leader.pool.statistics().active == 0


@pytest.mark.parametrize("bad", [0, 1])
def test_a_flipped_bit_on_one_rank_is_computed_again(start: Start, bad: int) -> None:
    engine, keys = start(2), keys_of("a", 5)
    engine.serve(keys)
    engine.settle()
    engine.leader.pool.discard(keys)
    engine.spoil(keys[2], bad)
    assert engine.serve(keys) == 2
    lower = engine.leader.lower
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


def test_a_reset_lasts_through_a_restart(start: Start, tmp_path: Path) -> None:
    keys, new = keys_of("a", 4), keys_of("new", 2)
    with closing(Engine(tmp_path, 2)) as engine:
        engine.serve(keys)
        engine.settle()
        engine.leader.reset()
        assert engine.serve(keys) == 0
        engine.settle()
        engine.leader.reset()
        engine.settle()
        engine.serve(new)
        engine.settle()
    engine = start(2)
    assert engine.serve(keys) == 0
    assert engine.serve(new) == 2


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
    lower = engine.leader.lower
    assert lower is not None
    lower.tier.fail("looked at by an operator")
    assert engine.serve(keys_of("b", 4)) == 0
    engine.settle()
    assert engine.disk.peek(keys) == 0
    assert engine.disk.peek(keys_of("b", 4)) == 4  # written since
    engine.leader.pool.discard(keys_of("b", 4))
    assert engine.serve(keys_of("b", 4)) == 4
