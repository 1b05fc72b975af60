"""Whether the books of host memory are right."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from kvbm.blocks import Pool
from kvbm.leader.reports import Reports
from kvbm.observe.recent import Recent

_SLICE = 1024
"""Slots that are looked at in one go: their pool is locked for about 2 ms."""
_BUSY_EVERY = 10.0
"""Seconds between two looks while the engine works; when it is idle each tick has one."""


class Invariants:
    """Whether what the leader and its pools count is so. `accounting` says what is wrong in the leader's own books;
    `reports` are where it is written down."""

    def __init__(
        self, accounting: Callable[[], list[str]], clock: Callable[[], float], reports: Reports | None = None
    ) -> None:
        self._accounting, self._clock, self._reports = accounting, clock, reports
        self.recent = Recent()
        """What happened last."""
        self._next: dict[str, int] = {}
        self._due = clock()
        self.passes: dict[str, int] = {}
        """Times that all slots of each pool were looked at."""
        self.violations = 0
        self.last: float | None = None
        """When it looked last (Unix seconds)."""

    def tick(self, pools: dict[str, Pool], *, idle: bool) -> list[str]:
        """A few times a second; looks at a slice of each pool and at the books, less often while the engine works."""
        if not idle and self._clock() < self._due:
            return []
        self._due = self._clock() + _BUSY_EVERY
        return self.books() + [problem for name, pool in pools.items() for problem in self.look(name, pool)]

    def books(self) -> list[str]:
        """What is wrong in the leader's own."""
        self.last = time.time()
        return self._counted(self._accounting())

    def begin(self, name: str) -> None:
        """The next look at this pool is at its first slots."""
        self._next[name] = 0

    def look(self, name: str, pool: Pool) -> list[str]:
        """What is wrong with the next slice of a pool. It is free in between."""
        first = self._next.get(name, 0)
        last, problems = pool.examine(first, first + _SLICE)
        self._next[name] = last if last > first else 0
        self.passes[name] = self.passes.get(name, 0) + (last == first)
        return self._counted([f"{name}: {problem}" for problem in problems])

    def report(self, kind: str, found: Mapping[str, Any]) -> str:
        """Writes down what is wrong; returns where, as the end of a sentence."""
        return f", see {self._reports.save(kind, found)}" if self._reports is not None else ""

    def _counted(self, problems: list[str]) -> list[str]:
        self.violations += len(problems)
        return problems
