"""What hears of what happened to blocks."""

from __future__ import annotations

from typing import Protocol

from kvbm.core.events import Event


class Observer(Protocol):
    """Gets every event of a pool, one at a time, in the order in which the transitions happened.

    Called outside the pool's lock, on whichever thread made a transition (maybe not the one that made this event), so
    it has to be quick; it may call the pool. One that raises is logged and never called again.
    """

    def on_event(self, event: Event) -> None: ...
