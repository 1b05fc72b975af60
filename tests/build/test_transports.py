"""A transport of one's own between the engine's memory and host memory: it comes by an argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvbm.abc.transport import Completion, Plan
from kvbm.build.parts import Part
from kvbm.build.place import Place
from kvbm.build.worker import build_worker
from kvbm.core.config import Resolved
from kvbm.core.keys import Namespace
from kvbm.core.region import Region
from kvbm.testing.transport import HostMemory
from kvbm.transfer.memcpy import MemcpyTransport
from tests.build.whole import G1, ROWS, Engine
from tests.leader.roles import keys_of


class Counting(MemcpyTransport):
    """Says what it was given."""

    def __init__(self, seen: list[tuple[str, int]], *, idle: bool = False) -> None:
        super().__init__(1)
        self._seen, self._idle = seen, idle

    def reaches(self, source: Region, destination: Region) -> bool:
        return not self._idle and super().reaches(source, destination)

    def submit(self, plan: Plan, done: Callable[[Completion], None]) -> int:
        self._seen.append((plan.label, len(plan.source_slots)))
        return super().submit(plan, done)


class Own(Engine):
    def __init__(self, path: Path, *transports: MemcpyTransport) -> None:
        self._transports = transports
        super().__init__(path, g3_blocks=None)

    def rank(
        self, resolved: Resolved, place: Place, names: Namespace, rank: int, began: int, tiers: Sequence[Part]
    ) -> tuple[Any, Any]:
        memory = HostMemory(ROWS, G1)
        made = [lambda settings, place, one=one: one for one in self._transports]
        settings = resolved.settings
        return memory, build_worker(settings, place, names, memory.region, rank, None, began, transports=made)


@pytest.mark.parametrize("first", [True, False], ids=["alone", "behind one that reaches nothing"])
def test_it_copies_what_an_engine_loads_and_stores(tmp_path: Path, first: bool) -> None:
    seen: list[tuple[str, int]] = []
    others: list[tuple[str, int]] = []
    transports = [Counting(seen)] if first else [Counting(others, idle=True), Counting(seen)]
    with closing(Own(tmp_path, *transports)) as engine:
        keys = keys_of("a", 5)
        assert engine.serve(keys) == 0
        assert engine.serve(keys) == 5, "every byte is compared"
    blocks = {label: sum(count for each, count in seen if each == label) for label in ("store", "load")}
    assert blocks["load"] == 5
    assert blocks["store"] >= 5
    assert not others
