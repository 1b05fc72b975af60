"""Our blocks for other instances: promised, held, and let go. Under the leader's lock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvbm.blocks import Pinned, Pool
from kvbm.link.messages import pack
from kvbm.tiers.peers.messages import Promise, Reserve
from kvbm.tiers.sums import Sums
from kvbm.tiers.tier import Record, Seeker, Wanted


class Lease(NamedTuple):
    """Blocks that a reader was promised, and until when."""

    blocks: Pinned
    until: float


class Around(NamedTuple):
    """What serving asks of the rest of its instance."""

    begin: Callable[[Seeker, Wanted], object]
    """What is below host memory of these is read, until `drop`."""
    drop: Callable[[str], None]
    coming: Callable[[bytes], bool]
    """Whether a block is on its way to host memory."""
    expects: Callable[[bytes, int], bool]
    """Whether a request is going to compute a block, as a block with this number."""
    aside: Callable[[], str | None]
    """Why the instance stands aside, if it does."""


class Serving:
    """`most` blocks are held for others at once, each promise for `seconds`."""

    def __init__(
        self, pool: Pool, sums: Sums, around: Around, *,
        most: Callable[[], int], seconds: float, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._pool, self.sums, self._around = pool, sums, around
        self._most, self.seconds, self._clock = most, seconds, clock
        self.closed = False
        """Whether nothing is promised any more."""
        self._leases: dict[int, Lease] = {}
        self._last = 0
        self.held = 0
        """Blocks that are held for others now."""
        self.promised = self.lapsed = 0
        """Blocks that were promised; those whose reader did not say within the time that it has them."""

    def reserve(self, asked: Reserve, memory: int) -> Promise:
        """Hold what is there of the first of the keys; nothing while this instance stands aside."""
        hold = self._pool.match(asked.keys)
        room = 0 if self.closed or self._around.aside() else max(0, self._most() - self.held)
        hold.narrow(self.sums.known(hold.slots))
        if len(hold) > room:
            hold.narrow(room)
        slots, count = hold.slots, len(hold)
        priorities, ttls = hold.terms
        lease = 0
        if count:
            self._last += 1
            lease = self._last
            self._leases[lease] = Lease(hold, self._clock() + self.seconds)
            self.held += count
            self.promised += count
        else:
            hold.drop()
        return Promise(
            asked.id, lease, pack(slots), self.sums.of(slots), priorities.tobytes(), ttls.tobytes(), self.seconds,
            False, memory,
        )  # fmt: skip

    def comes(self, search: str, keys: Sequence[bytes], at: int, expected: bool) -> bool:
        """Whether `keys[0]`, block `at` of a prompt, is on its way to host memory. What is on disk is fetched; with
        `expected`, what a request will compute is on its way too."""
        key = keys[0]
        if self.closed or self._around.aside():
            return False
        if not self._pool.absent([key]) or self._around.coming(key):
            return True
        self._around.begin(Seeker(search, Record(search, 0), keys), Wanted(keys))
        return self._around.coming(key) or (expected and self._around.expects(key, at))

    def release(self, lease: int) -> None:
        """Its reader has what it wanted."""
        if (hold := self._leases.pop(lease, None)) is not None:
            self.held -= len(hold.blocks)
            hold.blocks.drop()

    def done(self, search: str) -> None:
        """Nobody waits any more for what was fetched from disk for this search."""
        self._around.drop(search)

    def tick(self) -> None:
        """Let go of what nobody came back for."""
        now = self._clock()
        for lease, hold in list(self._leases.items()):
            if now > hold.until:
                self.lapsed += len(hold.blocks)
                self.release(lease)

    def close(self) -> None:
        """Let go of everything, and promise nothing more."""
        self.closed = True
        for lease in list(self._leases):
            self.release(lease)
