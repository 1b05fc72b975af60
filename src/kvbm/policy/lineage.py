"""Leaves only: a block goes after everything that continues it."""

from __future__ import annotations

from kvbm.abc.policy import Tags
from kvbm.core.region import Slots
from kvbm.policy.waiting import Waiting


class Lineage(Waiting):
    """The least recently used block that no registered block continues goes first.

    A block with a registered child, held or not, is never given: what would follow a hole in a prompt could not be
    matched. So it may give less than it has. Within one call a block counts as gone once it was chosen, so that a
    whole prompt goes from its leaf to its root. A block whose turn came while it had children goes next after the
    last of them. (The idea: leaf-first eviction of a radix tree, Zheng et al., "SGLang", NeurIPS 2024.)
    """

    def admit(self, slots: Slots, tags: Tags, parents: Slots) -> None:
        self._lists.adopt(slots, parents)

    def add(self, slots: Slots) -> None:
        self._lists.append(slots)
        self._idle += len(slots)

    def discard(self, slots: Slots) -> None:
        self._lists.remove(slots)
        self._idle -= len(slots)
