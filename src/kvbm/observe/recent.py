"""What happened last."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from kvbm.core.events import Admitted, Cleared, Copied, Event, Gated, Removed, Stored

_KEPT = 512


class Recent:
    """The last events, in few words each. Any thread."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._events: deque[tuple[float, str, str, int, bytes | None]] = deque(maxlen=_KEPT)

    def on_event(self, event: Event) -> None:
        """Keeps what it was, of how many blocks, and the key of the first."""
        tier, blocks, key = "", 0, None
        match event:
            case Stored() | Removed():
                tier, blocks, key = event.tier, len(event.keys), event.keys[0] if event.keys else None
            case Cleared():
                tier, blocks = event.tier, event.generation
            case Copied():
                tier, blocks = f"{event.source}>{event.target}", event.blocks
            case Gated():
                blocks = event.blocks
            case Admitted():
                blocks = event.prompt_tokens
        self._events.append((self._clock(), type(event).__name__, tier, blocks, key))

    def listed(self) -> list[dict[str, Any]]:
        """For JSON, the oldest first."""
        return [
            {"when": when, "event": name, "tier": tier, "count": count, "first_key": key.hex() if key else None}
            for when, name, tier, count, key in list(self._events)
        ]
