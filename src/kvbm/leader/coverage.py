"""Which blocks of a prompt a hit needs, and which blocks of a request are stored.

Where every layer needs every block of a prompt, `Prefix` answers; where layers need different ones, `Groups`
(`leader/groups.py`). The leader is given one of the two when it is built, asks it, and acts on what it returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from kvbm.blocks import Pinned, Pool
from kvbm.core.region import Slots
from kvbm.leader.core import Outgoing, Room
from kvbm.leader.requests import Request
from kvbm.tiers.stack import Stack
from kvbm.tiers.tier import Wanted


class Match(NamedTuple):
    """`blocks` of a prompt can be loaded. `hold` are the blocks of host memory that the load copies; None for no
    load."""

    blocks: int
    hold: Pinned | None


NOTHING = Match(0, None)
WAITED = "the request waited: loads of other requests hold their share of G2"
BOUNDED = "requests may hold only a share of G2"
"""Said of a request, where `Room` does not let it hold all that was found."""


class Complete(Protocol):
    """Blocks of a request that are complete and worth keeping, in the order in which they are to be stored."""

    @property
    def keys(self) -> Sequence[bytes]: ...

    @property
    def prompt(self) -> Sequence[bytes]:
        """The keys of those that lie in its prompt."""

    def take(self, at: Sequence[int]) -> Outgoing:
        """Those at these places in `keys`, of which there is one at least."""


class Coverage(Protocol):
    """Under the leader's lock. What a strategy remembers of a request is `Request.coverage`, which `state` makes. A
    request's record hears from the strategy why something is not loaded."""

    @property
    def null(self) -> int | None:
        """The block that the engine's tables name where a layer group needs none."""

    def state(self) -> object:
        """What is remembered of a new request."""

    # Up.

    def wants(self, request: Request, keys: Sequence[bytes], stack: Stack) -> tuple[Sequence[bytes], Wanted]:
        """Which blocks a prompt of these asks for, and which are to be in G2 when it is scheduled."""

    def match(
        self, request: Request, keys: Sequence[bytes], computed: int, room: Room, stack: Stack | None
    ) -> Match | None:
        """What can be loaded after the first `computed` blocks; None: ask again later."""

    def aim(self, request: Request, hold: Pinned, count: int) -> tuple[Slots, Slots]:
        """The engine takes `count` blocks of the prompt. Where in the engine what is held goes, and which blocks of the
        request these are; lets go of the rest. Raises Misuse where a part cannot be taken."""

    def tokens_each(self, request: Request, tokens: int) -> float | None:
        """So many tokens were loaded for the request: how many of them each block of host memory stands for; None: a
        block's own."""

    # Down.

    def ready(self, request: Request, complete: int, worth: int) -> Complete:
        """What is new of the request's first `complete` blocks, of which the first `worth` are worth keeping."""

    def offered(
        self, request: Request, complete: int, ready: Complete, taken: Sequence[int], left: Sequence[int]
    ) -> None:
        """Of what was `ready`, G2 lacked those at the places `taken`, which are being copied, and `left`, which are not
        for want of room."""

    def skip(self, request: Request, complete: int) -> None:
        """None of the request's first `complete` blocks is offered any more."""

    def ends(self, request: Request, complete: int) -> bool:
        """The request is over, after so many blocks. Whether any of them may still be offered."""

    def in_order(self, request: Request) -> Sequence[bytes]:
        """The keys of what was offered of the request, from its root to its leaf."""


class Prefix:
    """Every block of a prompt is needed, and every block is stored."""

    null: int | None = None

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def state(self) -> object:
        """See `Coverage`, here and below."""
        return None

    def wants(self, request: Request, keys: Sequence[bytes], stack: Stack) -> tuple[Sequence[bytes], Wanted]:
        return keys, Wanted(keys)

    def match(
        self, request: Request, keys: Sequence[bytes], computed: int, room: Room, stack: Stack | None
    ) -> Match | None:
        hold = self._pool.match(keys, computed)
        found = request.record.matched = len(hold)
        rest = keys[computed + found : computed + room.most]
        if stack is not None and stack.waits(request.seeker, Wanted(rest), computed + found):
            hold.drop()
            return None
        if found > max(0, room.most - room.held):
            if room.held:
                hold.drop()
                request.record.note(WAITED)
                return None
            request.record.note(f"KVBM loaded only {room.most} of {found} blocks: {BOUNDED}")
            hold.narrow(room.most)
        if not len(hold):
            hold.drop()
            request.record.note("G2 did not hold the next block")
            return NOTHING
        return Match(len(hold), hold)

    def aim(self, request: Request, hold: Pinned, count: int) -> tuple[Slots, Slots]:
        if count < len(hold):
            hold.narrow(count)
        first = request.record.device_blocks
        targets = np.asarray(request.g1[first : first + len(hold)], np.int64)
        return targets, np.arange(first, first + len(hold))

    def tokens_each(self, request: Request, tokens: int) -> float | None:
        return None

    def ready(self, request: Request, complete: int, worth: int) -> Complete:
        return _Run(request, request.keys[request.offered : worth])

    def offered(
        self, request: Request, complete: int, ready: Complete, taken: Sequence[int], left: Sequence[int]
    ) -> None:
        if left and not taken:
            return
        request.offered += taken[-1] + 1 if left else len(ready.keys)
        if request.offered >= request.worth:
            request.offered = max(request.offered, complete)

    def skip(self, request: Request, complete: int) -> None:
        request.offered = complete

    def ends(self, request: Request, complete: int) -> bool:
        return complete > request.offered

    def in_order(self, request: Request) -> Sequence[bytes]:
        return request.keys[: request.offered]


class _Run:
    """The blocks of a request that follow those which were offered."""

    def __init__(self, request: Request, keys: Sequence[bytes]) -> None:
        self._request, self._first, self.keys = request, request.offered, keys

    @property
    def prompt(self) -> Sequence[bytes]:
        return self.keys[: max(0, self._request.asked - self._first)]

    def take(self, at: Sequence[int]) -> Outgoing:
        places = np.asarray(at, np.int64) + self._first
        g1 = np.asarray([self._request.g1[place] for place in places.tolist()], np.int64)
        before = self._first + at[0] - 1
        return Outgoing(
            [self.keys[i] for i in at], self._request.keys[before] if before >= 0 else None, g1, places
        )  # fmt: skip
