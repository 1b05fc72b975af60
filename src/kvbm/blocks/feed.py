"""Events on their way to observers."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable

from kvbm.abc.observer import Observer
from kvbm.core.events import Event, Moved

_logger = logging.getLogger(__name__)


class Feed:
    """A queue filled under the pool's lock, so in the order of the transitions, and emptied outside it.

    One thread delivers at a time, for all: that keeps the order over threads, and makes an observer that calls the
    pool see its own events after the one it is handling.
    """

    def __init__(self, observers: Iterable[Observer]) -> None:
        self.observers: tuple[Observer, ...] = tuple(observers)
        """Whether anybody hears. Callers of `put` look here first, and make no event that nobody hears."""
        self.watchers: tuple[Observer, ...] = ()
        """Those observers that hear `Moved` too."""
        self.queue: deque[Event] = deque()
        """Not to be delivered yet; a thread that let go of the pool's lock looks here first."""
        self._delivering = threading.Lock()

    def subscribe(self, observer: Observer, *, transitions: bool) -> None:
        """From now on `observer` hears events, and with `transitions` every one. Under the pool's lock."""
        self.observers = (*self.observers, observer)
        if transitions:
            self.watchers = (*self.watchers, observer)

    def put(self, event: Event) -> None:
        """Queue an event. Under the pool's lock."""
        self.queue.append(event)

    def deliver(self) -> None:
        """Hand out what is queued, unless another thread is at it. Outside the pool's lock."""
        # Looking again after the release catches what was queued by a thread that found the lock taken.
        queue = self.queue
        while queue and self._delivering.acquire(blocking=False):
            try:
                while queue:
                    event = queue.popleft()
                    for observer in self.watchers if type(event) is Moved else self.observers:
                        try:
                            observer.on_event(event)
                        except Exception:  # noqa: BLE001  whatever it raised
                            self._remove(observer)
            finally:
                self._delivering.release()

    def _remove(self, observer: Observer) -> None:
        _logger.exception("observer %r raised and is removed", observer)
        self.observers = tuple(other for other in self.observers if other is not observer)
        self.watchers = tuple(other for other in self.watchers if other is not observer)
