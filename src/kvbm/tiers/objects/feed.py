"""What instances tell each other about the storage they share, through the storage. On one thread at a time, but for
what is told to the diary, and the last thing that is written."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final, NamedTuple

from kvbm.abc.store import Absent, Damaged
from kvbm.core.errors import Broken
from kvbm.stores.objects.names import Ours, epoch, feed_prefix, parse
from kvbm.stores.objects.notes import MOST, MOST_BYTES, Note, decode
from kvbm.tiers.objects.mover import Library

log = logging.getLogger(__name__)

_MB: Final = 1_000_000


@dataclass(slots=True)
class Diary:
    """What this process has not told the others yet: runs (their names' digests) that came and went, and that requests
    asked for. Any thread, under `lock`."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    came: list[bytes] = field(default_factory=list)
    went: list[bytes] = field(default_factory=list)
    touched: set[bytes] = field(default_factory=set)

    def tell(self, came: Sequence[bytes] = (), went: Sequence[bytes] = ()) -> None:
        """These came, or went."""
        with self.lock:
            self.came += came
            self.went += went

    def touch(self, digests: Sequence[bytes]) -> None:
        """Requests asked for these. Of too many in one epoch, the last are not noted."""
        with self.lock:
            self.touched.update(digests[: max(0, MOST - len(self.touched))])


class News(NamedTuple):
    """What others told: runs that came and went. `missing`: notes are gone that should be there, so somebody has
    deleted what he liked."""

    came: list[bytes]
    went: list[bytes]
    missing: bool


class SharedFeed:
    """Of one instance. `bound` is its own on all objects, in bytes; `numbers` tells its notes apart."""

    def __init__(self, library: Library, instance: str, bound: int, numbers: count[int]) -> None:
        self._library, self.instance, self._bound, self.numbers = library, instance, bound, numbers
        self.diary = Diary()
        self._seen: set[str] | None = None
        """Notes that were read; None before the first look."""
        self._warned = False
        """Whether a note was not what it has to be, which was said then: anybody may write more."""
        self._bound_told = -1
        """The epoch in which the others heard our bound last."""

    def write(self, now: float) -> None:
        """Tell what is new here, and our bound once in an epoch. `now` is by the storage's clock. Raises Broken."""
        library, diary = self._library, self.diary
        with diary.lock:
            came, diary.came = diary.came[:MOST], diary.came[MOST:]
            went, diary.went = diary.went[:MOST], diary.went[MOST:]
        if not came and not went and self._bound_told == epoch(now):
            return
        name = library.names.feed(epoch(now), self.instance, next(self.numbers), self._bound // _MB)
        try:
            library.store.put(name, library.envelope.wrap(name, Note(came, went).encode()))
        except Broken:
            with diary.lock:
                diary.came[:0], diary.went[:0] = came, went
            raise
        self._bound_told = epoch(now)

    def write_touched(self, now: float) -> None:
        """Tell what requests asked for. Raises Broken."""
        library, diary = self._library, self.diary
        with diary.lock:
            touched, diary.touched = sorted(diary.touched), set()
        if touched:
            name = library.names.touch(epoch(now), self.instance, next(self.numbers))
            library.store.put(name, library.envelope.wrap(name, Note(touched).encode()))

    def notes(self, now: float, goes_on: Callable[[], bool]) -> dict[str, float] | None:
        """The notes that there are, and when they were written; None where nobody wants to know any more. Raises
        Broken.

        Whole epochs are listed, this one and the one before: an entry may appear before one that was seen.
        """
        found = dict[str, float]()
        for each in (epoch(now) - 1, epoch(now)):
            for page in self._library.store.list(feed_prefix(each)):
                found.update((listed.name, listed.modified) for listed in page)
                if not goes_on():
                    return None
        return found

    def skip(self, found: dict[str, float], now: float) -> None:
        """What these notes tell is known."""
        self._missing(found, now)
        self._seen = {*found}

    def _missing(self, found: dict[str, float], now: float) -> bool:
        """Whether notes are gone that should be there. Our bound, which may be among them, is told again."""
        gone = (self._ours(name) for name in (self._seen or set()) - found.keys())
        if missing := any(ours is not None and ours.epoch >= epoch(now) - 1 for ours in gone):
            self._bound_told = -1
        return missing

    def read(self, now: float, goes_on: Callable[[], bool]) -> News | None:
        """What the others told since the last look; None where nobody wants to know any more. Raises Broken."""
        if (found := self.notes(now, goes_on)) is None:
            return None
        told = list[tuple[float, bool, Sequence[bytes]]]()
        for name in sorted(found.keys() - (self._seen or set())):
            if (ours := self._ours(name)) is not None:
                note = self._note(name, ours.writer)
                told += [(found[name], False, note.went), (found[name], True, note.came)]
                if not goes_on():
                    return None
        there = dict[bytes, bool]()
        for _, came, digests in sorted(told, key=lambda each: each[:2]):
            there.update(dict.fromkeys(digests, came))  # what was told last counts
        # A listing follows the first look, and knows better what went before.
        gone = [] if self._seen is None else sorted(digest for digest, came in there.items() if not came)
        missing = self._missing(found, now)
        self._seen = {*found}
        return News([digest for digest, came in there.items() if came], gone, missing)

    def _ours(self, name: str) -> Ours | None:
        """A note about our namespace."""
        ours = parse(name)
        mine = ours is not None and ours.kind == "feed" and ours.space == self._library.names.space
        return ours if mine else None

    def _note(self, name: str, writer: str) -> Note:
        """A note of another instance; an empty one where it is our own, gone, or not what it has to be."""
        if writer == self.instance:
            return Note([])
        try:
            note = self._library.store.get(name, self._library.envelope.size(MOST_BYTES))
            return decode(self._library.envelope.unwrap(name, note))
        except Damaged as error:
            level, self._warned = logging.DEBUG if self._warned else logging.WARNING, True
            log.log(level, "KVBM: a note of another instance in shared storage is not believed: %s: %s", name, error)
        except Absent:
            log.debug("KVBM: note %s is gone", name)
        return Note([])
