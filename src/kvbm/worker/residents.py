"""Which adapters a worker holds, as it compares them with what the leader expects, and reports them.

All of it on the engine's worker thread, but for `foresee`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Protocol

from kvbm.link.messages import Adapter, Adapters, Foresee, Foreseen, Step, Unlike, Used

log = logging.getLogger(__name__)


class AdapterHolder(Protocol):
    """The engine's adapters on this rank. Digests are empty where nothing is held, or it cannot be known what.

    Methods may raise any `Exception`. All but `foresee` are called on the engine's worker thread.
    """

    def held(self, number: int) -> Any:
        """What the engine holds under this number, as an object that stays what it is; None: nothing."""

    def digest(self, number: int) -> bytes:
        """Of its content."""

    def admit(self, adapter: Adapter, needed: Collection[int]) -> None:
        """Has the engine hold it under its number, unless it holds something there already, or would have to give up
        something that is `needed`."""

    def restore(self, number: int, held: Any, needed: Collection[int]) -> None:
        """The same with what was `held` before."""

    def give_up(self, number: int) -> None:
        """Has the engine hold nothing there."""

    def foresee(self, adapter: Adapter) -> bytes:
        """The digest that the engine would hold after it loaded this adapter. Any thread; changes nothing."""


class _Unreachable:
    """Adapters of which nothing can be known."""

    def held(self, number: int) -> Any:
        return None

    def digest(self, number: int) -> bytes:
        return b""

    def admit(self, adapter: Adapter, needed: Collection[int]) -> None:
        pass

    def restore(self, number: int, held: Any, needed: Collection[int]) -> None:
        pass

    def give_up(self, number: int) -> None:
        pass

    def foresee(self, adapter: Adapter) -> bytes:
        return b""


class Residents:
    """See the module. Without a `holder` nothing is known of any adapter."""

    def __init__(
        self, holder: AdapterHolder | None, rank: int, tell: Callable[[Used | Foreseen | Unlike], None]
    ) -> None:
        self._holder: AdapterHolder = holder or _Unreachable()
        self._rank, self._tell = rank, tell
        self._kept: dict[tuple[int, bytes], Any] = {}
        """What requests that loaded are still to be computed with, should the engine give it up before."""
        self._restored: dict[int, Any] = {}
        """What was put back, by number."""
        self._loads: dict[str, tuple[int, bytes]] = {}
        """Asynchronous loads that have not been collected."""

    def before_loads(self, step: Step) -> set[int]:
        """Has the engine hold the adapters that this step's loads are for. Returns the jobs that must not start."""
        adapters = step.adapters
        if adapters is None:
            return set()
        refused = set()
        for copy in step.loads:
            if (expected := adapters.loads.get(copy.job)) is None:
                continue
            number = expected.adapter.number
            self._try("is not loaded", partial(self._holder.admit, expected.adapter, adapters.needed))
            if self._fits(copy.request, number, expected.digest):
                self._kept[number, expected.digest] = self._held(number)
                if not step.sync:
                    self._loads[copy.request] = number, expected.digest
            else:
                refused.add(copy.job)
        return refused

    def before_step(self, adapters: Adapters | None) -> None:
        """Puts back what requests are to be computed with that loaded blocks of it, where the engine gave it up. When
        they are over it is given up again: later ones are to get what the engine would have read."""
        adapters = adapters or Adapters(0)
        self._kept = {key: held for key, held in self._kept.items() if key in set(adapters.awaited)}
        for number in self._restored.keys() - set(adapters.needed):
            if self._restored.pop(number) is self._held(number):
                self._try("is not given up", partial(self._holder.give_up, number))
        for (number, _), held in self._kept.items():
            if self._held(number) is None:
                # For what this step computes with, the engine makes room itself.
                needed = adapters.scheduled if number in adapters.scheduled else adapters.needed
                self._try("is not put back", partial(self._holder.restore, number, held, needed))
                self._restored[number] = held

    def differs(self, request: str) -> bool:
        """Whether a load that has ended is of another adapter than is held now."""
        number, digest = self._loads.pop(request, (0, b""))
        if not number or ((number, digest) in self._kept and self._held(number) is None):
            return False
        return not self._fits(request, number, digest)

    def after_forward(self, adapters: Adapters | None) -> None:
        """Reports what this step was computed with."""
        if adapters is not None and adapters.used:
            self._tell(Used(self._rank, adapters.step, [self._digest(number) for number in adapters.used]))

    def foresee(self, question: Foresee) -> None:
        """Answers, on a thread of its own: reading an adapter takes its time."""

        def look() -> None:
            digest = self._try("cannot be read", partial(self._holder.foresee, question.adapter)) or b""
            self._tell(Foreseen(question.question, digest))

        threading.Thread(target=look, name="kvbm-adapter", daemon=True).start()

    def _fits(self, request: str, number: int, digest: bytes) -> bool:
        held = self._digest(number)
        if held == digest != b"":
            return True
        self._tell(Unlike(self._rank, request, held))
        return False

    def _held(self, number: int) -> Any:
        return self._try("is not found", partial(self._holder.held, number))

    def _digest(self, number: int) -> bytes:
        return self._try("has no digest", partial(self._holder.digest, number)) or b""

    def _try(self, what: str, ask: Callable[[], Any]) -> Any:
        """None where the engine's own code fails; it will say so itself when it needs the adapter."""
        try:
            return ask()
        except Exception:
            log.debug("KVBM: an adapter %s", what, exc_info=True)
            return None
