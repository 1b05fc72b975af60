"""Host memory (G2): its pool, and who is told what lands there. Under the leader's lock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from kvbm.blocks import Pinned, Pool, Staged
from kvbm.core.region import Slots

ENGINE: Final = "engine"
"""Where blocks come from that the engine has computed; others come from a tier, by its name."""


@dataclass(frozen=True, slots=True)
class Landing:
    """How blocks come to host memory. `places` are their numbers in their prompt, where those are known; `sums` their
    checksums, by rank, where somebody wants them; `priority` what they are to have at least."""

    origin: str
    places: Slots | None = None
    sums: Mapping[int, bytes] = field(default_factory=dict)
    priority: int = 0


class Listener(Protocol):
    """What wants to know of blocks that land."""

    def landing(self, slots: Slots, keys: Sequence[bytes], how: Landing) -> None:
        """These are about to be found under their keys, some of them maybe not."""

    def landed(self, blocks: Pinned, how: Landing) -> None:
        """These are found from now on, and are held meanwhile."""


class Host:
    """The one place where blocks that were copied to G2 are registered."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> None:
        """Tell it, too, after those that were there before."""
        self._listeners.append(listener)

    def land(self, staged: Staged, done: npt.NDArray[np.bool_], how: Landing) -> Pinned:
        """Blocks are registered as far as they are `done`. The caller holds them."""
        for listener in self._listeners:
            listener.landing(staged.slots, staged.keys, how)
        if how.priority:
            staged.raise_to(how.priority)
        there = staged.register(done)
        if how.places is not None:  # none is there where the pool was cleared meanwhile
            how = Landing(how.origin, how.places[done][: len(there)], how.sums)
        try:
            for listener in self._listeners:
                listener.landed(there, how)
        except BaseException:
            there.drop()
            raise
        return there
