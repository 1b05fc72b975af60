"""Events on their way to observers."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable

from kvbm.abc.observer import Observer
from kvbm.core.events import Event

_logger = logging.getLogger(__name__)


class Feed:
    """A queue filled under the pool's lock, so in the order of the transitions, and emptied outside it.

    One thread delivers at a time, for all: that keeps the order over threads, and makes an observer that calls the
    pool see its own events after the one it is handling.
    """

    def __init__(self, observers: Iterable[Observer]) -> None:
        self.observers: tuple[Observer, ...] = tuple(observers)
        """Whoever would `put` looks here first, and does not make an event nobody hears."""
        self._queue: deque[Event] = deque()
        self._delivering = threading.Lock()

    def subscribe(self, observer: Observer) -> None:
        """From now on `observer` hears events. Under the pool's lock."""
        self.observers = (*self.observers, observer)

    def put(self, event: Event) -> None:
        """Queue an event. Under the pool's lock."""
        self._queue.append(event)

    def deliver(self) -> None:
        """Hand out what is queued, unless another thread is at it. Outside the pool's lock."""
        # Looking again after the release catches what was queued by a thread that found the lock taken.
        while self._queue and self._delivering.acquire(blocking=False):
            try:
                while self._queue:
                    self._hand_out(self._queue.popleft())
            finally:
                self._delivering.release()

    def _hand_out(self, event: Event) -> None:
        for observer in self.observers:
            try:
                observer.on_event(event)
            except Exception:
                _logger.exception("observer %r raised and is removed", observer)
                self.observers = tuple(other for other in self.observers if other is not observer)
