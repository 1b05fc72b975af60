"""A whole engine with a disk tier, as the composition roots build it; its forward passes are the test's."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvbm.blocks import Pool
from kvbm.core.config import load
from kvbm.core.events import Admitted
from kvbm.core.keys import Namespace
from kvbm.manager.build import Place, build_leader, build_worker
from kvbm.manager.lower import Lower
from kvbm.manager.requests import RequestParams
from kvbm.testing.transport import HostMemory
from tests.manager.roles import keys_of

ROWS = (4096, 4096)
SLOT = sum(ROWS)
TOKENS = 32


class DiskEngine:
    """Engine "e"; its control socket is in `run_dir`, its blocks are in `folder`."""

    def __init__(self, run_dir: Path, folder: Path, *, ranks: int = 1, **settings: Any) -> None:
        extra = {"run_dir": str(run_dir), "g3_dir": str(folder), "g2_blocks": 16, "g3_blocks": 64, "strict": True}
        resolved = load(environ={}, extra=extra | {"init_timeout_s": 30, "g3_direct": False} | settings)
        place, names = Place("e", ranks), Namespace({"model": "org/m"}, "w")
        self.g1 = [HostMemory(ROWS, 16) for _ in range(ranks)]
        self.workers = [
            build_worker(resolved.settings, place, names, memory.region, rank) for rank, memory in enumerate(self.g1)
        ]
        self.side = build_leader(resolved, place, names, block_tokens=TOKENS, shares_device_blocks=True)
        self.leader, self.folder = self.side.leader, folder / names.fingerprint[:16]
        self.slot_of: dict[bytes, int] = {}

    @property
    def lower(self) -> Lower:
        assert self.leader.lower is not None
        return self.leader.lower

    @property
    def disk(self) -> Pool:
        return self.lower.tier.pool

    def fill(self, name: str, count: int) -> list[bytes]:
        """A request computes so many blocks, which are then on disk."""
        keys = keys_of(name, count)
        self.leader.begin(name, [*keys, b"x" * 32], RequestParams(), (count + 1) * TOKENS)
        while self.leader.match(name, 0, count) is None:
            time.sleep(0.002)
        self.leader.place(name, list(range(count)), 0, Admitted(count * TOKENS, 0, 0))
        for rank, memory in enumerate(self.g1):
            for block, key in enumerate(keys):
                memory.put(block, (key * (SLOT // 32))[:-1] + bytes([rank]))
        self.leader.advance(name, count)
        self._step()
        self.until(lambda: self.leader.in_flight() == (0, 0))
        self.leader.finish(name, list(range(count)), count)
        self._step()
        self.until(lambda: self.lower.demotion.idle and self.disk.peek(keys) == count)
        return keys

    def _step(self) -> None:
        step = self.leader.seal(tokens=0)
        for worker in self.workers:
            worker.before_step(step)
            worker.before_forward(step)
            worker.after_forward(step)

    def until(self, what: Callable[[], object]) -> None:
        deadline = time.monotonic() + 30
        while not what():
            assert time.monotonic() < deadline, f"{self.leader.problems} {self.leader.degraded()}"
            time.sleep(0.002)
            self.leader.tick()

    def spoil(self, key: bytes, rank: int = 0) -> None:
        """One bit of a block on disk."""
        block = self.disk.look(key)
        assert block is not None
        with (self.folder / f"rank{rank}.data").open("r+b") as file:
            file.seek(block.slot * SLOT + 77)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.side.close()
        for pool in (self.leader.pool, self.disk):
            pool.check()
