"""Which runs were asked for most, and what is in them: what an instance that has just started reads first. On one rank.

Runs that requests asked for in the last day come first, in the order of how many notes name them; those that were
written last follow. A run is of use only with those before it in its prompt, so these come before it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from heapq import heappush, heappushpop
from itertools import islice
from typing import Final

from kvbm.abc.store import Absent, Damaged
from kvbm.stores.objects.envelope import PLAIN_AT
from kvbm.stores.objects.names import TOUCHES, parse
from kvbm.stores.objects.notes import MOST_BYTES, decode
from kvbm.stores.objects.runs import MOST_ABOUT, Run
from kvbm.stores.objects.runs import parse as parse_run
from kvbm.tiers.objects.mover import Library
from kvbm.tiers.objects.orders import HotRun

_MOST_NOTES: Final = 1_000
_MOST_NAMES: Final = 1_000_000
"""Names that are counted, about."""
_SLICE: Final = 32
"""Prompts that are followed to their beginning in one call."""
_MOST_READ: Final = 4
"""Headers that are read for each run that is wanted, at most."""


class HotRuns:
    """Finds at most `most`. One thread at a time."""

    def __init__(self, library: Library, most: int) -> None:
        self._library, self._most = library, most
        self._newest: list[tuple[float, bytes]] = []
        """A heap of those that were written last."""
        self._waiting: deque[bytes] | None = None
        """What is looked at next; None before it is known."""
        self._read: dict[bytes, Run | None] = {}
        self._found: set[bytes] = set()

    @property
    def over(self) -> bool:
        """There is nothing more to be found."""
        full = len(self._found) >= self._most or len(self._read) >= _MOST_READ * self._most
        return full or (self._waiting is not None and not self._waiting)

    def begins(self) -> None:
        """All that there is is listed anew."""
        self._newest = []

    def listed(self, digest: bytes, written: float) -> None:
        """There is this run."""
        if len(self._newest) < self._most:
            heappush(self._newest, (written, digest))
        else:
            heappushpop(self._newest, (written, digest))

    def more(self, goes_on: Callable[[], bool]) -> list[HotRun]:
        """The next few, each behind those before it in its prompt. Ends early where it no longer `goes_on`. Raises
        Broken."""
        if self._waiting is None:
            touched = self._touched(goes_on)
            newest = [digest for _, digest in sorted(self._newest, reverse=True)]
            self._waiting = deque([*touched, *(digest for digest in newest if digest not in touched)])
            self._newest = []
        found = list[HotRun]()
        for _ in range(_SLICE):
            if self.over or not goes_on():
                break
            digest = self._waiting.popleft()
            chain, room = [*self._chain(digest, goes_on)], self._most - len(self._found)
            for digest, run in islice(reversed(chain), room):
                self._found.add(digest)
                found.append(HotRun(list(run.keys), run.parent, run.place))
        return found

    def _touched(self, goes_on: Callable[[], bool]) -> dict[bytes, int]:
        """What requests asked for, and how often, the most often first."""
        library, notes = self._library, list[tuple[int, str]]()
        for page in library.store.list(TOUCHES):
            for listed in page:
                ours = parse(listed.name)
                if ours is not None and ours.kind == "touch" and ours.space == library.names.space:
                    notes.append((ours.epoch, listed.name))
            if not goes_on():
                break
        count = Counter[bytes]()
        for _, name in sorted(notes, reverse=True)[:_MOST_NOTES]:
            if not goes_on():
                break
            with suppress(Absent, Damaged):
                note = library.store.get(name, library.envelope.size(MOST_BYTES))
                count.update(decode(library.envelope.unwrap(name, note)).came)
            if len(count) > _MOST_NAMES:
                break
        return dict(count.most_common(_MOST_READ * self._most))

    def _chain(self, digest: bytes, goes_on: Callable[[], bool]) -> Iterator[tuple[bytes, Run]]:
        """This run and those before it that were not found yet, the last first; none where one is missing."""
        chain, names, blocks = list[tuple[bytes, Run]](), self._library.names, self._library.format.shape.blocks
        while digest not in self._found:
            run = self._header(digest)
            if run is None or not goes_on() or (chain and run.place + blocks != chain[-1][1].place):
                return
            chain.append((digest, run))
            if run.parent is None:
                break
            digest = names.digest(run.parent)
        yield from chain

    def _header(self, digest: bytes) -> Run | None:
        """What a run says; None where it is gone or damaged. What is sealed has to be read whole."""
        if digest not in self._read:
            library, name = self._library, self._library.names.run(digest)
            nbytes = PLAIN_AT + library.format.header_bytes + MOST_ABOUT
            self._read[digest] = None
            with suppress(Absent, Damaged):
                if library.envelope.sealed:
                    whole = library.store.get(name, library.most_bytes)
                else:
                    whole = library.store.get_range(name, 0, nbytes)
                shape, run, _, _ = parse_run(library.envelope.open(name, memoryview(whole).cast("B")))
                if shape == library.format.shape and library.names.digest(run.keys[-1]) == digest:
                    self._read[digest] = run
        return self._read[digest]
