"""Which blocks are worth a copy."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvbm.abc.policy import Admission, Mask, Tags
from kvbm.native import Sketch

SECOND: Final = 2


class All(Admission):
    """Every block, also one that is there already."""

    def admit(self, tags: Tags, present: Mask) -> Mask:
        return np.ones(len(tags), np.bool_)


class Presence(Admission):
    """What is not there."""

    def admit(self, tags: Tags, present: Mask) -> Mask:
        return ~present


class Frequency(Admission):
    """What is not there, and was asked for at least `least` times lately (at most 15; by default twice).

    TinyLFU's sketch counts (`kvbm.native.Sketch`): never too low, rarely too high. For a tier of `num_slots` it
    remembers some ten times as many requests for blocks.
    """

    def __init__(self, num_slots: int, least: int = SECOND) -> None:
        self._requests = Sketch(num_slots)
        self._least = least

    def use(self, tags: Tags) -> None:
        self._requests.add(tags)

    def admit(self, tags: Tags, present: Mask) -> Mask:
        often: Mask = np.frombuffer(self._requests.estimate(tags), np.uint8) >= self._least
        return often & ~present
