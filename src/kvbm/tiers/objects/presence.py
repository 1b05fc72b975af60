"""Which runs are in the storage, as far as this process knows. A hint: the GET is the truth.

The first eight bytes of each name, as a number, in 256 sets, so that none that grows is large. Names come by the
thousand; a thread of its own takes them in, a few at a time, so that the engine's thread never waits for it. Sets are
looked into without a lock: one operation on a set is one step under Python's own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Final

import numpy as np

_SETS: Final = 256
_SLICE: Final = 200
_PAUSE_S: Final = 0.001


class KnownNames:
    """At most `most` names; of more, any leave."""

    def __init__(self, most: int) -> None:
        self._most = max(1, most // _SETS)
        self._sets: list[set[int]] = [set() for _ in range(_SETS)]
        self._news: SimpleQueue[tuple[bytes, bytes, int] | None] = SimpleQueue()
        self._generation = 0
        self._thread = threading.Thread(target=self._run, name="kvbm-names", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return sum(map(len, self._sets))

    def __contains__(self, head: int) -> bool:
        return head in self._sets[head % _SETS]

    def positions(self, heads: Sequence[int | None]) -> list[int]:
        """Where in this list there are known ones."""
        sets = self._sets
        return [at for at, head in enumerate(heads) if head is not None and head in sets[head % _SETS]]

    def add(self, head: int) -> None:
        """This one came."""
        known = self._sets[head % _SETS]
        if len(known) >= self._most and head not in known:
            known.pop()
        known.add(head)

    def discard(self, head: int) -> None:
        """It is not there any more."""
        self._sets[head % _SETS].discard(head)

    def hear(self, came: bytes, went: bytes) -> None:
        """Heads of names that came and went, back to back. They are taken in soon, and in order."""
        self._news.put((came, went, self._generation))

    def clear(self) -> None:
        """Nothing that was known or heard of counts."""
        self._generation += 1
        for each in self._sets:
            each.clear()

    def close(self) -> None:
        """Take nothing in any more."""
        self._news.put(None)

    def _run(self) -> None:
        while (news := self._news.get()) is not None:
            came, went, generation = news
            for text, take in ((came, self.add), (went, self.discard)):
                heads = np.frombuffer(text, "<u8").tolist()
                for at in range(0, len(heads), _SLICE):
                    if generation != self._generation:
                        break
                    for head in heads[at : at + _SLICE]:
                        take(head)
                    time.sleep(_PAUSE_S)
