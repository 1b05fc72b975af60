"""Which runs are in the storage, as far as this process knows. A hint: the GET is the truth.

The first eight bytes of each name, as a number, in a table of rows: a name's row follows from the name, so one access
to memory tells whether it is there. Names come by the thousand; a thread of its own takes them in, a slice at a time,
so that the engine's thread never waits for it. The table is read without a lock: a name is written in one step.
"""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

Heads: TypeAlias = npt.NDArray[np.uint64]
"""First eight bytes of names, little-endian. 0 stands for no name."""

_WAYS: Final = 16
"""Names in a row: two cache lines. With half of them taken, one name in a thousand finds its row full."""
_SLICE: Final = 1_000
_PAUSE_S: Final = 0.001
_END_S: Final = 5.0


class KnownNames:
    """At most `most` names; of more, any leave. 16 bytes for each that there may be. Any thread. `close` ends its own
    thread."""

    def __init__(self, most: int) -> None:
        self._most, self._shape = most, (-(-2 * most // _WAYS), _WAYS)
        self._rows = np.zeros(self._shape, np.uint64)
        self._count = self._generation = 0
        self._lock = threading.RLock()
        self._news: SimpleQueue[tuple[bytes, bytes, int] | None] = SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvbm-names", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return self._count

    def _at(self, heads: Heads) -> npt.NDArray[np.int64]:
        return (heads % np.uint64(self._shape[0])).astype(np.int64)

    def among(self, heads: Heads) -> npt.NDArray[np.bool_]:
        """Which of these are known."""
        found: npt.NDArray[np.bool_] = (self._rows[self._at(heads)] == heads[:, None]).any(1)
        found &= heads != 0
        return found

    def add(self, heads: Heads) -> None:
        """These came."""
        with self._lock:
            heads = np.unique(heads[(heads != 0) & ~self.among(heads)])
            while len(heads):  # one of each row at a time
                at, first = np.unique(self._at(heads), return_index=True)
                self._place(at, heads[first])
                heads = np.delete(heads, first)

    def _place(self, at: npt.NDArray[np.int64], heads: Heads) -> None:
        """Each in another row."""
        used = self._rows[at] != 0
        free = ~used.all(1)
        free &= np.cumsum(free) <= self._most - self._count
        other = (heads >> np.uint64(60)).astype(np.int64)
        other = np.where(used[np.arange(len(at)), other], other, used.argmax(1))
        way = np.where(free, used.argmin(1), other)
        fits = free | used.any(1)
        self._rows[at[fits], way[fits]] = heads[fits]
        self._count += int(free.sum())

    def discard(self, heads: Heads) -> None:
        """These are not there any more."""
        with self._lock:
            heads = np.unique(heads[self.among(heads)])
            at = self._at(heads)
            way = (self._rows[at] == heads[:, None]).argmax(1)
            self._rows[at, way] = 0
            self._count -= len(heads)

    def hear(self, came: bytes, went: bytes) -> None:
        """Heads of names that came and went, back to back. They are taken in soon, and in order."""
        self._news.put((came, went, self._generation))

    def clear(self) -> None:
        """Nothing that was known or heard of counts."""
        with self._lock:
            self._generation += 1
            self._rows, self._count = np.zeros(self._shape, np.uint64), 0

    def close(self) -> None:
        """Take nothing in any more. What was heard and not taken in is not known."""
        self._closed = True
        self._news.put(None)
        self._thread.join(_END_S)

    def _run(self) -> None:
        while (news := self._news.get()) is not None:
            came, went, generation = news
            for text, take in ((came, self.add), (went, self.discard)):
                heads = np.frombuffer(text, "<u8")
                for at in range(0, len(heads), _SLICE):
                    with self._lock:
                        if self._closed:
                            return
                        if generation != self._generation:
                            break
                        take(heads[at : at + _SLICE])
                    time.sleep(_PAUSE_S)
