"""What lies below host memory: not known yet, a stack of tiers, or nothing any more."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvbm.blocks import Pinned, Pool
from kvbm.core.region import Slots
from kvbm.leader.earlier import Earlier
from kvbm.link.messages import FromTier, Opened, Result, Sick
from kvbm.tiers.host import ENGINE, Landing
from kvbm.tiers.stack import Stack
from kvbm.tiers.sums import Sums

log = logging.getLogger(__name__)


class LowerTiers:
    """`lasting` are the tiers that were asked for: they outlive this process, or are shared with others. A listener of
    the host. Under the leader's lock."""

    def __init__(self, lasting: Sequence[str] = ()) -> None:
        self.lasting = tuple(lasting)
        self.stack: Stack | None = None
        self.isolated: str | None = None
        """Why no tier is used until the engine is started anew."""
        self._absent: dict[str, str] = {}
        """Tiers that were asked for and are not there, and why."""
        self._opened: dict[str, dict[int, Opened]] = {}
        """What ranks said about their parts of tiers."""
        self._early: list[FromTier | Sick] = []
        """What ranks said about their memory or files before there was anybody who uses them."""
        self._earlier: Earlier | None = None
        """What is to be said to the tiers of what was here before them."""

    # ------------------------------------------------------------------ put in place

    def expect(self, pool: Pool, ranks: int, why: str) -> None:
        """The tiers come later, for this reason: what host memory gets until then is noted for them."""
        self._absent = dict.fromkeys(self.lasting, why) | self._absent
        self._earlier = Earlier(pool, ranks)

    def sums(self, ranks: int, slots: int) -> Sums:
        """The checksums of what is in host memory, for other instances: those that were noted, if any were."""
        return self._earlier.sums if self._earlier is not None else Sums(ranks, slots)

    def without(self, name: str, why: str) -> None:
        """A tier that was asked for is not there."""
        self._absent[name] = why

    def there(self, name: str) -> None:
        """It is there after all."""
        self._absent.pop(name, None)

    def open(self, name: str) -> dict[int, Opened]:
        """Its ranks are asked to open their parts: what they answer, by rank, as it comes."""
        opened = self._opened[name] = {}
        return opened

    def attach(self, stack: Stack, *, cleared: bool) -> None:
        """The tiers are there from now on. `cleared`: host memory was cleared before, which they could not hear."""
        self.stack = stack
        for message in self._early:
            stack.take(message)
        self._early.clear()
        if cleared:
            stack.clear()

    def tell_earlier(self) -> bool:
        """Tells the tiers, as of new blocks, of some that were here before them. Whether there are more."""
        if self._earlier is not None and (self.stack is None or not self._earlier.tell(self.stack)):
            self._earlier = None
        return self._earlier is not None

    def isolate(self, why: str) -> None:
        """No tier is used any more. Said once; may be called again."""
        if self.isolated is not None:
            return
        self.isolated = why
        if self.lasting:
            log.warning("KVBM stores nothing on disk and shares nothing with other instances: %s", why)
        if self.stack is not None:
            self.stack.isolate(why)

    # ------------------------------------------------------------------ what ranks say

    def answer(self, result: Result) -> bool:
        """Takes a rank's result; False where it is about no move of a tier."""
        return self.stack is not None and self.stack.take(result)

    def take(self, message: FromTier | Sick | Opened) -> None:
        """What a rank says about its part of a tier."""
        if isinstance(message, Opened):
            self._opened.setdefault(message.tier, {})[message.rank] = message
        elif self.stack is not None:
            self.stack.take(message)
        else:
            self._early.append(message)

    # ------------------------------------------------------------------ host memory

    def landing(self, slots: Slots, keys: Sequence[bytes], how: Landing) -> None:
        """See `tiers.host.Listener`."""
        if self.stack is not None:
            self.stack.landing(slots, keys, how)
        if self._earlier is not None and how.origin == ENGINE:
            self._earlier.landing(slots, keys, how)

    def landed(self, blocks: Pinned, how: Landing) -> None:
        """See `tiers.host.Listener`."""
        if self.stack is not None:
            self.stack.landed(blocks.keys, how)

    def clear(self) -> None:
        """A new generation."""
        self._earlier = None
        if self.stack is not None:
            self.stack.clear()

    # ------------------------------------------------------------------ what is told

    def degraded(self) -> dict[str, str]:
        """Tiers that are left alone, or are not there, and why. The engine does without them."""
        if self.isolated is not None:
            return dict.fromkeys(self.lasting, self.isolated)
        return self._absent | (self.stack.problems() if self.stack is not None else {})

    def pools(self) -> dict[str, Pool]:
        """Of tiers whose slots the leader chooses."""
        return self.stack.pools() if self.stack is not None else {}
