"""Which adapter a request will be computed with, as far as a worker can say before it is."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from kvbm.core.errors import Broken
from kvbm.leader.requests import Request, Variant
from kvbm.link.channel import Link
from kvbm.link.messages import Foresee, Foreseen

log = logging.getLogger(__name__)

_PATIENCE: Final = 2.0
"""Seconds that a request waits to hear which adapter it would be computed with."""
_PAUSES: Final = (4.0, 600.0)
"""Seconds until a question that nobody has answered is asked again, each time twice as many: at first, at most. What a
worker is stuck with may be so each time."""
_REMEMBERED: Final = 4096
"""Adapters whose expected digest is kept."""


@dataclass(slots=True)
class _Question:
    """What a worker was asked: an adapter's number and files; the requests that wait for the answer, and until when. It
    is asked again at the earliest at `again`, under the same number: then the first answer is as good as the last."""

    about: tuple[int, Hashable]
    pause: float = _PAUSES[0]
    until: float = 0.0
    again: float = 0.0
    waiting: list[Request] = field(default_factory=list)


class Outlook:
    """Of one leader, under its lock. `numbers` are for questions, and shared with others."""

    def __init__(self, links: Mapping[int, Link], clock: Callable[[], float], numbers: Iterator[int]) -> None:
        self.links = links
        self._clock, self._numbers = clock, numbers
        self._expected: OrderedDict[int, tuple[Hashable, bytes]] = OrderedDict()
        """Number -> the files that a request came with, and the digest that workers held then, if that can be known."""
        self.asked: dict[int, _Question] = {}
        """Questions that no worker has answered, by number."""

    def of(self, number: int) -> tuple[Hashable, bytes]:
        """The files that the adapter of this number had, and its digest then."""
        return self._expected.get(number, (None, b""))

    def expect(self, number: int, files: Hashable, digest: bytes) -> None:
        """Workers hold this one now."""
        self._expected.pop(number, None)
        self._expected[number] = files, digest
        while len(self._expected) > _REMEMBERED:
            self._expected.popitem(last=False)

    def ask(self, request: Request, variant: Variant) -> None:
        """Has a worker look which adapter the request would be computed with; the request waits a moment for that."""
        now, about = self._clock(), (variant.adapter.number, variant.files)
        number, question = next((each for each in self.asked.items() if each[1].about == about), (0, _Question(about)))
        if now >= question.again:
            if not number:
                number = next(self._numbers)
                self.asked[number] = question
            question.until, question.again, question.waiting = now + _PATIENCE, now + question.pause, []
            question.pause = min(2 * question.pause, _PAUSES[1])
            try:
                self.links[min(self.links)].send(Foresee(number, variant.adapter))
            except Broken as error:
                log.debug("KVBM: %s", error)  # it is noticed elsewhere that the worker is gone
        if now < question.until:
            variant.until = question.until
            question.waiting.append(request)

    def waits(self, variant: Variant) -> bool:
        """Whether a request still waits for the answer."""
        return variant.until is not None and self._clock() < variant.until

    def answered(self, message: Foreseen) -> tuple[list[Request], bytes]:
        """A worker has looked. The requests that waited for it, and the digest that they are to have; empty where
        nobody knows."""
        if (asked := self.asked.pop(message.question, None)) is None:
            return [], b""
        number, files = asked.about
        known, held = self.of(number)
        if known == files:  # a step has been computed with it meanwhile
            return asked.waiting, held
        self.expect(number, files, message.digest)
        return asked.waiting, message.digest
