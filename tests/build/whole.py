"""Leader and workers as the composition roots build them: the test is only the engine. Its KV of a block follows from
the block's key, so that any wrong byte shows."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvbm.build.leader import build_leader
from kvbm.build.parts import Part
from kvbm.build.place import Place
from kvbm.build.stack import Choose
from kvbm.build.tiers import TIERS
from kvbm.build.worker import build_worker
from kvbm.core.config import Resolved, load
from kvbm.core.events import Admitted
from kvbm.core.keys import Namespace
from kvbm.leader.requests import RequestParams
from kvbm.stores.disk.disk import Disk
from kvbm.testing.transport import HostMemory
from kvbm.tiers.disk.rank import DiskRank
from kvbm.tiers.disk.side import DiskSide
from kvbm.worker.worker import Worker

ROWS = (4096, 4096, 640)
TOKENS, G1 = 32, 24
PATIENCE = 30.0
LAST = b"last".ljust(32)


def kv(key: bytes, rank: int) -> bytes:
    return (hashlib.sha512(key + bytes([rank])).digest() * (sum(ROWS) // 64 + 1))[: sum(ROWS)]


class DiskPart:
    """A rank's part of the disk tier, as suites know it that are to judge a restructuring. What it calls at the end of
    a read or a write can be replaced."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    @property
    def disk(self) -> Disk:
        part = self._worker.tiers["g3"]
        assert isinstance(part, DiskRank)
        return part.disk

    _read = property(
        lambda self: self._worker.copying.read_ended,
        lambda self, ended: setattr(self._worker.copying, "read_ended", ended),
    )
    _report = property(
        lambda self: self._worker.copying.write_ended,
        lambda self, ended: setattr(self._worker.copying, "write_ended", ended),
    )


class Engine:
    """One engine of `ranks` ranks, each with KV of its own unless `replicated`. It has a disk tier unless `g3_blocks`
    is None. `choose` says what it has loaded; None: what is known beforehand."""

    def __init__(
        self,
        path: Path,
        ranks: int = 1,
        *,
        engine: str = "e",
        model: str = "m",
        facts: Mapping[str, object] | None = None,
        g3_blocks: int | None = 32,
        replicated: bool = False,
        choose: Choose | None = None,
        tiers: Sequence[Part] = TIERS,
        tokens: int = TOKENS,
        **settings: Any,
    ) -> None:
        self.tokens = tokens
        self.sync = settings.get("onboard") == "sync"
        extra = {
            "run_dir": str(path), "g3_dir": str(path / "g3"), "g2_blocks": 16, "init_timeout_s": 30,
            "g3_direct": False, "g3_engine": "threads", "metrics": False, "strict": True,
        }  # fmt: skip
        if g3_blocks is not None:
            extra["g3_blocks"] = g3_blocks
        resolved = load(environ={}, extra=extra | settings)
        place, names = Place(engine, ranks, replicated=replicated), Namespace(facts or {"model": model}, "w")
        began = time.time_ns() + 10**15  # nothing is younger
        self.parts = [0 if replicated else rank for rank in range(ranks)]
        """Which part of a block each rank has."""
        self.g1: list[Any] = []
        self.workers: list[Any] = []
        for rank in range(ranks):
            memory, worker = self.rank(resolved, place, names, rank, began, tiers)
            self.g1.append(memory)
            self.workers.append(worker)
        try:
            self.side = build_leader(
                resolved, place, names, block_tokens=tokens, shares_device_blocks=True, choose=choose, tiers=tiers
            )
        except Exception:
            for worker in self.workers:
                worker.close()
            raise
        self.leader = self.side.leader
        if (disk := self.disk_side) is not None:
            self.disk = disk.pool
        self.names = itertools.count()
        self.folder = path / "g3"
        self.own = self.folder / names.fingerprint[:16]

    def rank(
        self, resolved: Resolved, place: Place, names: Namespace, rank: int, began: int, tiers: Sequence[Part]
    ) -> tuple[Any, Any]:
        """The engine's memory of a rank, and its worker."""
        memory = HostMemory(ROWS, G1)
        worker: Any = build_worker(resolved.settings, place, names, memory.region, rank, None, began, tiers=tiers)
        worker._disk = DiskPart(worker) if "g3" in worker.tiers else None
        return memory, worker

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.side.close()

    def until(self, what: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < deadline, (
                f"{self.leader.core.health.problems} {self.leader.core.lower.degraded()}"
            )
            time.sleep(0.002)
            self.leader.core.tick()

    def step(self, name: str, complete: int) -> None:
        if complete:
            self.leader.advance(name, complete)
        step = self.leader.seal(tokens=0)  # it computes in no time: no load would be worth it
        for worker in self.workers:
            worker.before_step(step)
            worker.before_forward(step)
            worker.after_forward(step)

    def serve(self, keys: Sequence[bytes], **params: Any) -> int:
        """A request with these blocks, and one of the last token; returns how many were loaded: none, where the load
        failed, for then the engine computes all of them."""
        name = f"r{next(self.names)}"
        self.leader.begin(name, [*keys, LAST], RequestParams(**params), (len(keys) + 1) * self.tokens)
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
        tokens = len(keys) * self.tokens
        self.leader.place(name, blocks, found, Admitted(tokens, 0, found * self.tokens))
        self.step(name, 0)
        self.until(lambda: self.leader.core.in_flight() == (0, 0))
        if found and self._failed(name):
            found = 0
        for rank, memory in enumerate(self.g1):
            for block in blocks[:found]:
                assert memory.get(block) == kv(keys[block], self.parts[rank]), "wrong bytes were served"
            for block in blocks[found:]:
                memory.put(block, kv(keys[block], self.parts[rank]))
        self.step(name, len(keys))
        self.until(lambda: self.leader.core.in_flight() == (0, 0))
        self.leader.finish(name, blocks, len(keys))
        self.step(name, 0)
        # What was offered only now is copied before the next request's zeros are there.
        self.until(lambda: self.leader.core.in_flight() == (0, 0))
        return found

    def _failed(self, name: str) -> bool:
        """Whether a worker says so of the request's load, which ended."""
        if self.sync:
            bad = [worker.take_bad_blocks() for worker in self.workers]  # of each, whatever the others say
            return any(bad)
        ended, failed = set[int](), False

        def said() -> bool:
            nonlocal failed
            for rank, worker in enumerate(self.workers):
                collected = worker.collect(idle=False)
                failed |= name in collected.failed
                if name in collected.loaded:
                    ended.add(rank)
            return len(ended) == len(self.workers)

        self.until(said)
        return failed

    @property
    def disk_side(self) -> DiskSide | None:
        """The leader's end of its disk tier."""
        stack = self.leader.core.lower.stack
        side = stack.tiers.get("g3") if stack is not None else None
        assert side is None or isinstance(side, DiskSide)
        return side

    def settle(self) -> None:
        lower = self.disk_side
        assert lower is not None
        self.until(
            lambda: lower.demotion.idle and lower.tier.in_flight() == (0, 0) and not self.leader.core.lower.degraded()
        )

    def spoil(self, key: bytes, rank: int) -> None:
        """One bit in the file."""
        block = self.disk.look(key)
        assert block is not None
        with (self.own / f"rank{rank}.data").open("r+b") as file:
            file.seek(block.slot * 12288 + 777)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 4]))
