"""Under which key the content of each of the engine's blocks was computed or loaded.

An engine finds blocks in its own prefix cache by a hash of its own, which need not cover all that a key covers, and
others may write its blocks too. KVBM stores only what it has seen computed or has loaded itself. Under the leader's
lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from kvbm.core.keys import group_of
from kvbm.core.region import Slots
from kvbm.leader.requests import Request

_WORDS = 4
_KEY_BYTES = 8 * _WORDS
_ON_ITS_WAY = np.array([0, 0, 0, 0x6B76626D], np.uint64)
"""Of a block whose content is on its way; the first word says whose. No key has two words of zeros."""

_Words = npt.NDArray[np.uint64]


class Provenance:
    """A flat array by block, as long as the highest block that was seen. `next_id` gives numbers that nothing else has;
    `null` is the block that an engine names where a layer group needs none."""

    def __init__(self, next_id: Callable[[], int], null: int | None = None) -> None:
        self._next_id, self._null = next_id, null
        self.words: _Words = np.zeros((0, _WORDS), np.uint64)
        """What is known of each block of the engine: its key, or the copy that fills it; zeros: nothing."""

    # ------------------------------------------------------------------ blocks

    def forget(self, g1: Iterable[int] | Slots) -> None:
        """These blocks are handed out: what will be in them is not what is in them now."""
        blocks = self._fit(g1)
        self.words[blocks if len(blocks) != 1 else blocks[0]] = 0

    def clear(self) -> None:
        """A new generation: no block carries a key of it."""
        self.words[:] = 0

    def expect(self, g1: Slots, by: int) -> None:
        """Content is on its way into these blocks; the copy that brings it has this number."""
        blocks = self._fit(g1)
        self.words[blocks] = _ON_ITS_WAY + np.array([by, 0, 0, 0], np.uint64)

    def arrived(self, g1: Slots, keys: Sequence[bytes], by: int) -> None:
        """Blocks carry these keys now, unless they have been handed out since `expect`."""
        self._settle(g1, _packed(keys), by)

    def _settle(self, g1: Slots, words: _Words, by: int) -> None:
        waiting = (self.words[g1] == _ON_ITS_WAY + np.array([by, 0, 0, 0], np.uint64)).all(axis=1)
        self.words[g1[waiting]] = words[waiting]

    def _fit(self, g1: Iterable[int] | Slots) -> Slots:
        blocks = np.asarray(g1 if isinstance(g1, np.ndarray | list) else list(g1), np.int64)
        most = -1 if not len(blocks) else int(blocks.max()) if len(blocks) > 1 else int(blocks[0])
        if most >= len(self.words):
            more = np.zeros((max(most + 1, 2 * len(self.words)), _WORDS), np.uint64)
            more[: len(self.words)] = self.words
            self.words = more
        return blocks

    # ------------------------------------------------------------------ requests

    def placed(self, request: Request, found: int) -> None:
        """The request has a new table. It does not compute the first `found` blocks of it."""
        request.found = request.expected = found
        request.proven = request.settled = request.confirmed = 0
        request.placement, request.traced = self._next_id(), False

    def redo(self, request: Request, first: int) -> None:
        """The request computes again from its block `first` on."""
        request.found = min(request.found, first)
        self.take_back(request, first)

    def take_back(self, request: Request, first: int) -> None:
        """The request computes on from within its block `first`. Where it found the beginning of that block, it still
        has."""
        request.proven = min(request.proven, first)
        request.expected, request.confirmed = min(request.expected, first), min(request.confirmed, first)
        request.settled = 0

    def computing(self, request: Request, complete: int) -> None:
        """A step computes the request's blocks up to `complete`, and whether that counts is not known yet: they carry
        nothing until `computed` is told of them."""
        if complete > request.expected:
            for table in request.tables:
                self.expect(self._fit(table[request.expected : complete]), request.placement)
            request.expected = complete

    def computed(self, request: Request, complete: int) -> None:
        """The request's blocks up to `complete` are computed under its keys. They carry them if all before them do;
        those that `computing` was told of only if they have not been handed out since."""
        if not request.traced:
            request.traced = True
            request.proven = self._carried(request, 0, request.found)
        first = request.proven
        if first < request.found or complete <= first or request.stale:
            return
        if request.expected > first:
            self._write(request, first, complete, request.placement)
            request.proven = self._carried(request, first, complete)
        else:
            self._write(request, first, complete, None)
            request.proven = complete

    def carried(self, request: Request, end: int) -> int:
        """How many of the request's first `end` blocks carry its keys, before the first that does not."""
        return self._carried(request, 0, end)

    def begun(self, request: Request) -> bool:
        """Whether what the engine had of the request when it was placed carries its keys."""
        return (
            self._carried(request, 0, request.found) == request.found
            if not request.traced
            else (request.proven >= request.found)
        )

    def _write(self, request: Request, first: int, end: int, by: int | None) -> None:
        for group, table in enumerate(request.tables):
            blocks, words = self._blocks(request, group, table, first, end)
            if by is not None:
                self._settle(blocks, words, by)
            else:
                self.words[blocks] = words

    def _carried(self, request: Request, first: int, end: int) -> int:
        """The block up to which all of the request's from `first` on carry its keys, `end` at most."""
        for group, table in enumerate(request.tables):
            blocks, words = self._blocks(request, group, table, first, end)
            wrong = np.flatnonzero((self.words[blocks] != words).any(axis=1) & (blocks != self._null))
            end = first + (int(wrong[0]) if len(wrong) else len(blocks))
        return end

    def _blocks(self, request: Request, group: int, table: list[int], first: int, end: int) -> tuple[Slots, _Words]:
        """The request's blocks in a group, and their keys, as far as it has some: its last may not be full."""
        keys = request.keys[first:end]
        blocks = self._fit(table[first : first + len(keys)])
        return blocks, _packed(keys[: len(blocks)], group)


def _packed(keys: Sequence[bytes], group: int = 0) -> _Words:
    """Keys as words. What a key has beyond them, the layer group, is in the first."""
    text = b"".join(keys)
    if len(text) == _KEY_BYTES * len(keys):
        words = np.frombuffer(text, np.uint64).reshape(len(keys), _WORDS)
    else:
        parts = [group_of(key) for key in keys]
        words = np.frombuffer(b"".join(key.ljust(_KEY_BYTES, b"\0") for key, _ in parts), np.uint64)
        words = words.reshape(len(keys), _WORDS)
        words = words ^ np.array([[group, 0, 0, 0] for _, group in parts], np.uint64)
    return words ^ np.array([group, 0, 0, 0], np.uint64) if group else words
