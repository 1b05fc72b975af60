"""Whether a hit in host memory is worth a load between engine steps: its request waits for that, a step at least, while
the engine could compute as many tokens.

Measured, and in the load's favour: of the last waits and steps the shortest counts, and what has not been measured, or
not for a while, is not held against a load.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Container
from typing import Final

from kvbm.core.config import Settings
from kvbm.core.events import Copied, Event, Gated
from kvbm.leader.requests import Request
from kvbm.tiers.gate import FORGET_S, Gate, Rate

_SAMPLES: Final = 4
"""Waits that have to be known before one is believed; so much does one differ from another."""
_SLACK_S: Final = 0.005
"""What a request may lose before a hit is not made: less is lost to a busy processor at any time."""


class Detour:
    """One for each leader, under its lock. An observer: it has to see what comes back."""

    def __init__(
        self, settings: Settings, gate: Gate, requests: Container[str], emit: Callable[[Event], None],
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._fixed: float | None = settings.load_min_tokens
        if self._fixed is None and settings.onboard != "async":
            self._fixed = 0  # inside a step nobody waits for the next one
        self.gate, self._requests, self._emit, self._clock = gate, requests, emit, clock
        self._copied = Rate()
        self._waits: deque[float] = deque(maxlen=2 * _SAMPLES)
        """What loads took that a request waited for while the engine did nothing else, without the copy."""
        self._known = 0.0
        """When a wait ended last."""
        self._began: dict[str, tuple[float, int, int]] = {}
        """Of each request that waits: since when, for how many blocks, and how many steps there had been."""
        self._steps = 0
        """That computed something."""
        self._computing: set[str] = set()
        """Requests in the step that is being described."""
        self._beside: set[str] = set()
        """Those in the last one."""

    # ------------------------------------------------------------------ measuring

    def on_event(self, event: Event) -> None:
        if isinstance(event, Copied) and event.target == "g1" and event.blocks:
            self._copied.add(event.blocks, event.seconds)

    def begins(self, request: str, blocks: int) -> None:
        """It waits for a load from now on."""
        self._began[request] = self._clock(), blocks, self._steps

    def computes(self, request: str) -> None:
        """It is part of the step that is being described."""
        self._computing.add(request)

    def ends(self, request: str) -> None:
        """It waits no more: it is scheduled, or gone."""
        since, blocks, steps = self._began.pop(request, (0.0, 0, -1))
        if steps >= 0 and request in self._requests:
            self._known, rate = self._clock(), self._copied.get()
            if steps == self._steps and rate:
                self._waits.append(max(0.0, self._known - since - blocks / rate))

    def seal(self) -> None:
        """The step is complete."""
        self._steps += bool(self._computing)
        self._beside, self._computing = self._computing, set()

    # ------------------------------------------------------------------ deciding

    def least(self, *, beside: bool) -> float:
        """Tokens from which on a load is faster than computing them, `beside` other requests or in an engine that has
        nothing else to do; 0 while that is not known, inf where it never is."""
        if self._fixed is not None:
            return self._fixed
        tokens, copied = self.gate.block_tokens, self._copied.get()
        computing = self.gate.computing_s(1)
        if computing is None or not copied or self._clock() - self._known > FORGET_S:
            return 0
        wait = min(self._waits) if len(self._waits) >= _SAMPLES else 0.0
        if beside:
            wait = max(wait, self.gate.step_s or 0.0)
        if wait <= _SLACK_S:
            return 0
        return tokens * (wait - _SLACK_S) / (computing - 1 / copied) if computing > 1 / copied else math.inf

    def shown(self) -> dict[str, float | None]:
        """`least` for people; None where it never is."""
        least = {"alone": self.least(beside=False), "beside_others": self.least(beside=True)}
        return {name: None if math.isinf(tokens) else tokens for name, tokens in least.items()}

    def refuses(self, request: Request, blocks: int) -> bool:
        """Whether so many blocks are better computed. Counted once for a request."""
        beside = any(other != request.id and other in self._requests for other in self._beside)
        tokens, least = blocks * self.gate.block_tokens, self.least(beside=beside)
        if tokens >= least or request.params.pull_from is not None:  # it was sent here for that
            return False
        if not request.short:
            request.short = True
            enough = "" if math.isinf(least) else f"; from {least:.0f} tokens on it does not"
            request.record.note(f"gated: loading {tokens} tokens takes longer than computing them{enough}")
            self._emit(Gated(blocks, "g2"))
        return True
