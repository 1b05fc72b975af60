"""The tiers of one leader, in the order in which things happen to a request. It names none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from kvbm.blocks import Pool, Where
from kvbm.core.events import Admitted
from kvbm.core.region import Slots
from kvbm.link.messages import FromTier, Result, Sick
from kvbm.observe.names import SHOWN, json_key
from kvbm.tiers.host import ENGINE, Landing
from kvbm.tiers.promote import Promotion
from kvbm.tiers.tier import Offer, Record, Search, Seeker, Tier, Wanted


class Stack:
    """`tiers` by name, the nearest first; `clock` is the leader's. Under the leader's lock, but for `stop`."""

    def __init__(
        self, promotion: Promotion, block_tokens: int, tiers: Sequence[Tier], clock: Callable[[], float]
    ) -> None:
        self.promotion, self.block_tokens, self._clock = promotion, block_tokens, clock
        self.tiers: Mapping[str, Tier] = {tier.name: tier for tier in tiers}
        self._asked = tuple(tier for tier in tiers if tier.covers(()) is None)
        """Those that do not know what they have."""
        self.isolated = False
        """Whether nothing of this is used any more."""
        self._searches: dict[str, dict[str, Search]] = {}
        """By request and tier."""

    def __iter__(self) -> Iterator[Tier]:
        return iter(self.tiers.values())

    # ------------------------------------------------------------------ a request

    def begin(self, seeker: Seeker, asked: Sequence[bytes], wanted: Wanted, *, loads: bool) -> None:
        """A request arrives: its blocks start to move before it is scheduled, unless it `loads` nothing."""
        if self.isolated:
            return
        for tier in self:
            tier.asked(asked)
        if loads:
            reach = self.promotion.begin(seeker, wanted, self._all())
            self._search(seeker, wanted.keys, reach, 0)

    def drop(self, request: str) -> None:
        """The request got its blocks, or is gone: nothing is read or looked for any more because of it."""
        self.promotion.drop(request)
        for search in self._searches.pop(request, {}).values():
            search.ended = True

    def reachable(self, seeker: Seeker) -> Where:
        """What could be in host memory when this request is scheduled."""
        return self.promotion.reachable(seeker.record, self._all())

    def _all(self) -> tuple[Tier, ...]:
        return tuple(self.tiers.values())

    def _search(self, seeker: Seeker, keys: Sequence[bytes], reach: int, first: int) -> None:
        """Look for `keys[reach:]`, once for each request and tier. `keys[0]` is block `first` of the prompt."""
        if not self._asked or reach >= len(keys) or seeker.record.gated or self.promotion.coming(keys[reach]):
            return
        begun = self._searches.setdefault(seeker.id, {})
        for tier in self._asked:
            if tier.name not in begun:
                search = tier.seek(seeker, keys[reach:], first + reach, partial(self._give, seeker))
                if search is not None:
                    begun[tier.name] = search
        if not begun:
            del self._searches[seeker.id]

    def _give(self, seeker: Seeker, offer: Offer) -> bool:
        return seeker.id in self._searches and self.promotion.give(seeker, offer)

    def waits(self, seeker: Seeker, wanted: Wanted, at: int) -> bool:
        """The engine asks: whether it should ask again later for what follows its match, from block `at` on."""
        if self.isolated or not len(wanted.keys):
            return False
        if self.promotion.waits(seeker, wanted, self._all()):
            return True
        self._search(seeker, wanted.keys, 0, at)
        return any(self._waits(seeker, name, each) for name, each in self._searches.get(seeker.id, {}).items())

    def _waits(self, seeker: Seeker, tier: str, search: Search) -> bool:
        if search.ended or seeker.record.gated:
            return False
        words = self.tiers[tier].words
        search.ended = self._clock() > search.until
        seeker.record.note(f"the request {'did not wait any longer' if search.ended else 'waited'} for {words}")
        return not search.ended

    @property
    def waiting(self) -> bool:
        """Whether a request waits for what comes from below."""
        searches = (search for each in self._searches.values() for search in each.values())
        return self.promotion.waiting or any(not search.ended for search in searches)

    def placed(self, seeker: Seeker, tokens: Admitted, block: float) -> Admitted:
        """The request got its blocks, and holds what it matched itself. `block` is how many tokens one of those stands
        for."""
        self.drop(seeker.id)
        staged = seeker.record.staged
        if not staged:
            return tokens
        sources, left = dict[str, int](), tokens.g2_tokens
        for tier in reversed(self._all()):
            if came := min(int(staged.get(json_key(tier.name), 0) * block), left):
                sources[tier.name] = came
                left -= came
        if seeker.pull_from is None:
            return Admitted(tokens.prompt_tokens, tokens.device_tokens, tokens.g2_tokens, 0, sources)
        # What that instance found, and did not compute either, is among its own hits.
        pulled = sum(sources.pop(tier.name, 0) for tier in self._asked)
        return Admitted(tokens.prompt_tokens, tokens.device_tokens, tokens.g2_tokens - pulled, pulled, sources)

    def kept(self, record: Record) -> bool:
        """Whether host memory keeps all that came for a request."""
        return all(tier.keeps for tier in self if json_key(tier.name) in record.staged)

    def finished(self, seeker: Seeker, blocks: Sequence[bytes]) -> None:
        """The request is over, or gone. `blocks` were offered of it, in prompt order."""
        self.drop(seeker.id)
        for tier in self:
            tier.over(blocks, seeker.record)

    # ------------------------------------------------------------------ host memory

    def landing(self, slots: Slots, keys: Sequence[bytes], how: Landing) -> None:
        """Blocks are about to be published in host memory."""
        for tier in self:
            tier.landing(slots, keys, how)

    def landed(self, keys: Sequence[bytes], how: Landing) -> None:
        """They are published."""
        if not (self.isolated and how.origin == ENGINE):
            for tier in self:
                tier.landed(keys, how)

    # ------------------------------------------------------------------ always

    def take(self, answer: Result | FromTier | Sick) -> bool:
        """An answer from a worker; false where it is about something else."""
        match answer:
            case Result():
                return any(tier.answer(answer) for tier in self)
            case FromTier(tier=name, body=body) if name in self.tiers:
                self.tiers[name].hear(body)
            case Sick(tier=name, rank=rank, problem=problem) if name in self.tiers:
                self.tiers[name].sick(f"rank {rank}: {problem}")
        return True

    def tick(self) -> None:
        """A few times a second."""
        for tier in self:
            tier.tick()

    def pump(self) -> None:
        """Start the moves that can start now."""
        self.promotion.pump()
        for tier in self:
            tier.pump()

    def stand_aside(self) -> None:
        """Nothing is moved for requests while the engine is to work as if there were no KVBM."""
        self.promotion.clear()
        for searches in self._searches.values():
            for search in searches.values():
                search.ended = True

    def isolate(self, why: str) -> None:
        """From now on nothing is read from here and nothing written; what is on its way is given up."""
        self.isolated = True
        self.stand_aside()
        for tier in self:
            tier.leave(why)

    def clear(self) -> None:
        """A new generation, maybe of other weights."""
        self.promotion.clear()
        for tier in self:
            tier.clear(lasting=False)

    def purge(self, name: str) -> None:
        """Nothing that one tier has now is served any more."""
        self.promotion.clear()
        self.tiers[name].clear(lasting=True)

    def drains(self) -> list[Tier]:
        """Tiers that take what is worth keeping when the process ends."""
        return [tier for tier in self if tier.drains]

    # ------------------------------------------------------------------ what is told

    def pools(self) -> dict[str, Pool]:
        """Of tiers whose slots the leader chooses."""
        return {tier.name: tier.pool for tier in self if tier.pool is not None}

    def counts(self) -> dict[str, Mapping[str, int]]:
        """What is not a copy, for metrics, by tier."""
        return {tier.name: tier.counts() for tier in self}

    def status(self) -> dict[str, Any]:
        """What the tiers say of themselves (`Tier.status`): at the top, where JSON has always had it, or under the
        tier's name."""
        said: dict[str, Any] = {}
        for tier in self:
            if tier.name in SHOWN:
                said |= tier.status()
            elif own := tier.status():
                said[tier.name] = own
        return said

    def namesakes(self) -> tuple[str, ...]:
        """Why blocks of the same model that lie somewhere are not found."""
        return tuple(sentence for tier in self for sentence in tier.namesakes())

    def limits(self) -> dict[str, str]:
        """Tiers that are used, and do not do all that they could, and why."""
        return {tier.name: limit for tier in self if (limit := tier.limits()) is not None}

    def problems(self) -> dict[str, str]:
        """Tiers that are left alone, and why."""
        return {tier.name: tier.problem for tier in self if tier.problem is not None}

    def stop(self) -> None:
        """Without the lock."""
        for tier in self:
            tier.stop()

    def close(self) -> None:
        """The process is about to end."""
        for tier in self:
            tier.close()
