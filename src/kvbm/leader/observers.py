"""What is told of what the leader counts."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from kvbm.abc.observer import Observer
from kvbm.core.events import Event

log = logging.getLogger(__name__)


class Observers:
    """Those of one leader, under its lock. One that raises is not told any more."""

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._observers = list(observers)

    def add(self, observer: Observer) -> None:
        """Tell it, too, after those that were there before."""
        self._observers.append(observer)

    def emit(self, event: Event) -> None:
        """Tell all of them."""
        for observer in tuple(self._observers):
            try:
                observer.on_event(event)
            except Exception:
                log.exception("KVBM removed an observer that raised")
                self._observers.remove(observer)
