"""A clock that tests move by hand."""

from __future__ import annotations


class ManualClock:
    """Stands in for `time.monotonic`: call it for the time, `advance` it to let time pass."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass; time never goes back."""
        if seconds < 0:
            raise ValueError(f"time cannot go back by {-seconds} s")
        self._now += seconds
