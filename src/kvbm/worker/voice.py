"""What one rank says to the leader, and why it does nothing any more, if so."""

from __future__ import annotations

import logging
import threading

from kvbm.core.errors import Broken
from kvbm.link.channel import Link
from kvbm.link.messages import Message, Sick

log = logging.getLogger(__name__)


class Voice:
    """Any thread."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.link: Link | None = None
        """To the leader, once there is host memory to speak of."""
        self.closing = threading.Event()
        """Whether the process is about to end."""
        self.off: str | None = None
        """Why nothing is copied any more, until the engine is started anew."""
        self._sick = False
        """Whether the leader knows that nothing can be copied between the engine and host memory any more."""

    def tell(self, message: Message) -> None:
        """The leader hears of this."""
        try:
            if self.link is not None:
                self.link.send(message)
        except Broken as error:
            if not self.closing.is_set():
                log.error("KVBM: rank %d: %s", self.rank, error)

    def sick(self, why: str) -> None:
        """The leader hears once that nothing can be copied any more."""
        if self.link is not None and not self._sick:
            self._sick = True
            self.tell(Sick(self.rank, why))

    def turn_off(self, why: str) -> bool:
        """From now on nothing counts. False where that was so before."""
        if self.off is not None:
            return False
        self.off = why
        log.error("KVBM: rank %d copies nothing any more: %s", self.rank, why)
        self.tell(Sick(self.rank, why))
        return True
