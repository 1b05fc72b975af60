"""What happened so far, in numbers. One place feeds `kvbm status`, Prometheus and the engine's own metrics."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass, field

from kvbm.core.events import Admitted, Copied, Event, Gated, Unread
from kvbm.observe.names import DISK, WAYS

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
BYTES = tuple(float(1 << shift) for shift in range(16, 34, 2))
_WINDOW = 1000
_LATELY = 16
"""Copies of which the speed is said."""


@dataclass(slots=True)
class Histogram:
    """Counts per upper bound (not cumulative), the last one above all bounds."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True)
class Copies:
    """Copies of one direction, counted when they ended on every rank."""

    blocks: int = 0
    failed: int = 0
    nbytes: int = 0
    seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    sizes: Histogram = field(default_factory=lambda: Histogram(BYTES))
    lately: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_LATELY))
    """Bytes and seconds of the last copies."""

    def add(self, event: Copied) -> None:
        self.blocks += event.blocks
        self.failed += event.failed
        self.nbytes += event.nbytes
        self.seconds.add(event.seconds)
        self.sizes.add(event.nbytes)
        if event.nbytes:
            self.lately.append((event.nbytes, event.seconds))

    def bytes_per_s(self) -> float | None:
        """Of the last copies; None before there were some."""
        lately = list(self.lately)
        return sum(nbytes for nbytes, _ in lately) / max(sum(s for _, s in lately), 1e-9) if lately else None


class Totals:
    """An observer. Written by the leader under its lock; readers see numbers that are at most a moment apart."""

    def __init__(self) -> None:
        self.requests = 0
        self.prompt_tokens = 0
        self.device_tokens = 0
        self.g2_tokens = 0
        self.sources: Counter[str] = Counter()
        """Of g2_tokens, those that had been brought up for the request, by tier."""
        self.pulled_tokens = 0
        """Prompt tokens that another instance computed for the same request."""
        self.unread = 0
        """Requests that may not read what is stored, or asked not to; in none of the above."""
        self.gated = 0
        """Blocks that were left where they were because computing them was faster."""
        self.gated_g2 = 0
        """Of these, those in host memory."""
        self.copies: dict[tuple[str, str], Copies] = {(way.source, way.target): Copies() for way in WAYS.values()}
        """By source and target."""
        self.offload, self.onboard, self.demote, self.promote, self.fetch = map(self.way, WAYS)
        self._recent: deque[tuple[int, int, int]] = deque(maxlen=_WINDOW)

    def on_event(self, event: Event) -> None:
        match event:
            case Admitted(prompt_tokens, device_tokens, g2_tokens, pulled_tokens, sources):
                self.requests += 1
                self.prompt_tokens += prompt_tokens
                self.device_tokens += device_tokens
                self.g2_tokens += g2_tokens
                self.sources.update(sources)
                self.pulled_tokens += pulled_tokens
                self._recent.append((prompt_tokens - device_tokens - pulled_tokens, g2_tokens, sources.get(DISK, 0)))
            case Unread():
                self.unread += 1
            case Copied():
                self.copies.setdefault((event.source, event.target), Copies()).add(event)
            case Gated(blocks, tier):
                self.gated += blocks
                self.gated_g2 += blocks if tier == "g2" else 0

    def way(self, name: str) -> Copies:
        """Copies of one of `names.WAYS`."""
        way = WAYS[name]
        return self.copies[way.source, way.target]

    def hit_rate(self) -> float:
        """Of the last thousand requests that may read: tokens they were spared by host memory, per token that neither
        the engine itself held nor another instance computed for them."""
        return self._rate(1)

    def disk_hit_rate(self) -> float:
        """The same of tokens that had been read from disk."""
        return self._rate(2)

    def _rate(self, column: int) -> float:
        recent = list(self._recent)
        wanted = sum(row[0] for row in recent)
        return sum(row[column] for row in recent) / wanted if wanted else 0.0
