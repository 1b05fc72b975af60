"""First in, first out: what was registered longest ago goes first, however often it was used."""

from __future__ import annotations

from kvbm.abc.policy import Tags
from kvbm.core.region import Slots
from kvbm.policy.waiting import Waiting


class FIFO(Waiting):
    """One list by birth; of a run that was admitted at once the leaf is first. A held block keeps its place.

    One that is held when its turn comes is first once it is let go. The cheapest order for what is read once.
    """

    def admit(self, slots: Slots, tags: Tags, parents: Slots) -> None:
        self._lists.append(slots)
        self._lists.hold(slots)

    def add(self, slots: Slots) -> None:
        self._lists.release(slots)
        self._idle += len(slots)

    def discard(self, slots: Slots) -> None:
        self._lists.hold(slots)
        self._idle -= len(slots)
