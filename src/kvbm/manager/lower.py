"""What the leader does with the tier below host memory, in the order in which things happen to a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from kvbm.core.events import Admitted
from kvbm.manager.demote import Demotion
from kvbm.manager.disk import DiskTier
from kvbm.manager.promote import Promotion
from kvbm.manager.requests import Request
from kvbm.manager.wire import Probed, Result


@dataclass(slots=True)
class Lower:
    """The disk tier, and what moves down to it and up from it. Under the leader's lock."""

    tier: DiskTier
    demotion: Demotion
    promotion: Promotion
    block_tokens: int

    def begin(self, request: Request, prompt_tokens: int) -> None:
        """A request arrives: its blocks on disk start to move before it is scheduled."""
        keys = request.keys[: (prompt_tokens - 1) // self.block_tokens]
        self.demotion.used(keys)
        if request.params.load:
            self.promotion.begin(request.id, request.record, keys)

    def waits(self, request: Request, keys: Sequence[bytes]) -> bool:
        """The engine asks: whether it should ask again later for what follows its match."""
        return bool(len(keys)) and self.promotion.waits(request.id, request.record, keys)

    def placed(self, request: Request, tokens: Admitted) -> Admitted:
        """The request got its blocks, and holds what it matched itself."""
        self.promotion.drop(request.id)
        staged = min(request.record.staged * self.block_tokens, tokens.g2_tokens)
        return msgspec.structs.replace(tokens, g3_tokens=staged) if staged else tokens

    def finished(self, request: Request) -> None:
        """The request is over, or gone."""
        self.promotion.drop(request.id)
        # Written batch by batch, its root first; together, its leaf goes before its root.
        self.tier.pool.touch(request.keys[: request.offered])

    def take(self, answer: Result | Probed) -> bool:
        """An answer from a worker; false where it is about something else."""
        if isinstance(answer, Result):
            return self.tier.answer(answer)
        self.tier.probed(answer)
        return True

    def pump(self) -> None:
        """Start the moves that can start now."""
        self.promotion.pump()
        self.demotion.pump()

    def stand_aside(self) -> None:
        """Nothing is moved for requests while the engine is to work as if there were no KVBM."""
        self.promotion.clear()

    def clear(self) -> None:
        """A new generation."""
        self.promotion.clear()
        self.demotion.clear()
        self.tier.clear()
