"""How long the engine waits for KVBM, and whether answers are asked for again.

`Pace` belongs to the engine's thread; `Answers` is under the leader's lock.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import update_wrapper
from typing import Concatenate, ParamSpec, Protocol, TypeVar

_SAMPLES = 1024
_SLOW_IN_A_ROW = 32
_ANSWERS = 4096
_RARELY = 0.2
"""Of those who go on with a prompt; where fewer go on with its answer, answers leave early (ADR 39)."""
SECONDS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)

P = ParamSpec("P")
R = TypeVar("R")


class Answers:
    """Whether who goes on with a prompt goes on with its answer too, learnt from the last answers. Later prompts say it
    by what they contain, be that stored or gone: or who lets answers go would never learn better."""

    def __init__(self) -> None:
        self._ends, self._firsts = _Seen(), _Seen()
        """The last blocks of prompts, and the first ones of their answers."""

    @property
    def rarely_asked(self) -> bool:
        """True as well while nobody has gone on with anything."""
        prompts, answers = self._ends.seen, self._firsts.seen
        return answers < _RARELY * prompts or not prompts + answers

    def given(self, end: bytes | None, first: bytes) -> None:
        """An answer was stored, from its first block on; `end` is the last before."""
        self._firsts.add(first)
        if end is not None:
            self._ends.add(end)

    def prompted(self, keys: Sequence[bytes]) -> None:
        """A prompt has these blocks."""
        for key in keys:
            self._ends.see(key)
            self._firsts.see(key)


class _Seen:
    """Which of the last keys were seen again."""

    def __init__(self) -> None:
        self._last: OrderedDict[bytes, bool] = OrderedDict()
        self.seen = 0

    def add(self, key: bytes) -> None:
        if key not in self._last:
            self._last[key] = False
            if len(self._last) > _ANSWERS:
                self.seen -= self._last.popitem(last=False)[1]

    def see(self, key: bytes) -> None:
        if self._last.get(key) is False:
            self._last[key] = True
            self.seen += 1


class Pace:
    """How long KVBM keeps the engine's thread, per step. Written by that thread."""

    def __init__(self, most_s: float) -> None:
        self._most, self._slow, self._spent = most_s, 0, 0.0
        self._last: deque[float] = deque(maxlen=_SAMPLES)
        self.counts = [0] * (len(SECONDS) + 1)
        self.total = self.worst = 0.0

    def add(self, seconds: float) -> None:
        """A call of this step took so long."""
        self._spent += seconds

    def step(self) -> str | None:
        """The step is described; why KVBM had better stand aside, if it has been slow for long."""
        spent, self._spent = self._spent, 0.0
        self._last.append(spent)
        self.counts[bisect_left(SECONDS, spent)] += 1
        self.total += spent
        self.worst = max(self.worst, spent)
        self._slow = self._slow + 1 if spent > self._most else 0
        if self._slow < _SLOW_IN_A_ROW:
            return None
        self._slow = 0
        return f"it kept the engine for more than {self._most * 1e3:.0f} ms in each of the last {_SLOW_IN_A_ROW} steps"

    def summary(self) -> dict[str, float]:
        """Milliseconds per step: of the last thousand the median and the 99th percentile; the worst ever."""
        last = sorted(self._last) or [0.0]
        return {
            "p50": last[len(last) // 2] * 1e3,
            "p99": last[min(len(last) - 1, len(last) * 99 // 100)] * 1e3,
            "max": self.worst * 1e3,
        }


class _Paced(Protocol):
    pace: Pace


S = TypeVar("S", bound=_Paced)


def paced(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that the engine's thread calls and waits for."""

    def timed(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        begun = time.perf_counter()
        try:
            return method(self, *args, **kwargs)
        finally:
            self.pace.add(time.perf_counter() - begun)

    update_wrapper(timed, method)
    return timed
