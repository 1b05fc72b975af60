"""Holds that belong to somebody by name, and end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from kvbm.blocks.slots import NEVER


class Hold(NamedTuple):
    """Slots held for `owner` until `until` on the pool's clock."""

    owner: str
    slots: bytes
    until: float


class Pins:
    """Blocks that are held without a handle, and in whose name. No lock of its own."""

    def __init__(self) -> None:
        self._holds: list[Hold] = []
        self.blocks = 0
        """How many are held; one that is held twice counts twice."""
        self.due = NEVER
        """No hold ends before."""

    def __iter__(self) -> Iterator[Hold]:
        return iter(self._holds)

    def add(self, hold: Hold) -> None:
        """Remember a hold."""
        self._keep([*self._holds, hold])

    def take(self, over: Callable[[Hold], bool]) -> list[Hold]:
        """Forget the holds that are over, and return them."""
        ended = [hold for hold in self._holds if over(hold)]
        self._keep([hold for hold in self._holds if not over(hold)])
        return ended

    def _keep(self, holds: list[Hold]) -> None:
        self._holds = holds
        self.blocks = sum(len(hold.slots) for hold in holds) // 8
        self.due = min((hold.until for hold in holds), default=NEVER)
