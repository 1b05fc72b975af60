"""Least frequently used: what was found least often goes first, and what was found often long ago is forgotten."""

from __future__ import annotations

from typing import ClassVar, Final

from kvbm.core.region import Slots
from kvbm.policy.levels import Levels

PERIOD: Final = 10
"""Uses and evictions per slot after which every count is halved, as in TinyLFU."""


class LFU(Levels):
    """A list per number of uses, 0 to 15, each least recently used first.

    Counts are halved (`Lists.halve`) after every `PERIOD * num_slots` uses and evictions; that looks at all slots, a
    byte each. (Lists per frequency: Shah, Mitra and Matani, arXiv:2110.11602. Halving as ageing: Robinson and
    Devarakonda, SIGMETRICS 1990.)
    """

    levels: ClassVar[int] = 16

    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots)
        self._age = 0

    def use(self, slots: Slots) -> None:
        self._lists.climb(slots)
        self._grow_older(len(slots))

    def victims(self, n: int) -> Slots:
        chosen = super().victims(n)
        self._grow_older(len(chosen))
        return chosen

    def forget(self, slots: Slots) -> None:
        self._lists.forget(slots)

    def _grow_older(self, steps: int) -> None:
        self._age += steps
        if self._age >= PERIOD * self._lists.num_slots:
            self._age = 0
            self._lists.halve()
