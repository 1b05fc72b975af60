"""What lies below host memory, put in place: at the start, or while the engine serves, once it is known what the
weights contain."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Final

from kvbm.build.parts import Claim, Ground, Part
from kvbm.build.share import promotion
from kvbm.build.tiers import wanted
from kvbm.core.config import Settings
from kvbm.core.errors import Broken, KvbmError
from kvbm.core.keys import Namespace
from kvbm.stores.content import Chosen, Contents
from kvbm.stores.stamps import recorded
from kvbm.tiers.stack import Stack
from kvbm.tiers.tier import Tier

log = logging.getLogger(__name__)

Choose = Callable[[], Sequence[Chosen]]
"""Says which files the engine loaded; raises Changed where nobody can say."""
AT_ONCE_S: Final = 1.0
"""How long a start waits for the digest of the weights, from when it began."""
_TICK_S: Final = 0.005
_OPENING: Final = "what the weights contain is still being found out: until then host memory works alone"


class Look:
    """Finds out, on a thread of its own, what the engine's weights contain. `began` is when the first process that
    loaded them did."""

    def __init__(self, settings: Settings, choose: Choose, began: int) -> None:
        self._stop, self._over = threading.Event(), threading.Event()
        self._contents = Contents(settings.cache_dir or settings.run_dir, stop=self._stop)
        self._choose, self._start = choose, recorded(settings.weights_seen, began)
        self._begun = time.monotonic()
        self.digest: str | None = None
        self.why: str | None = None
        """Why nobody knows."""
        threading.Thread(target=self._run, name="kvbm-weights", daemon=True).start()

    def _run(self) -> None:
        try:
            self.digest = self._contents.identify(self._choose, self._start)
        except KvbmError as error:
            self.why = str(error)
        except Exception as error:
            log.exception("KVBM: the weights could not be digested")
            self.why = f"{type(error).__name__}: {error}"
        finally:
            self._over.set()

    def known(self, seconds: float | None = None) -> bool:
        """Whether it is over, so many seconds after its beginning; None: waits for its end."""
        left = None if seconds is None else max(0.0, self._begun + seconds - time.monotonic())
        return self._over.wait(left)

    @property
    def stopped(self) -> bool:
        """Whether nobody wants to know any more."""
        return self._stop.is_set()

    def close(self) -> None:
        """Nobody wants to know any more."""
        self._stop.set()


class Below:
    """What is below one engine's host memory: of `parts`, what its settings ask for. `namespace` is what is known so
    far."""

    def __init__(self, ground: Ground, parts: Sequence[Part], namespace: Namespace, block_tokens: int) -> None:
        self._ground, self._parts, self._block_tokens = ground, wanted(ground.settings, parts), block_tokens
        self.namespace = namespace
        self._look: Look | None = None
        self._claims: dict[str, Claim] = {}
        """By tier, until that is there."""

    def begin(self, look: Look | None) -> None:
        """Without `look` the namespace is known as it is. Where it is not known soon, the rest is done later. Raises
        Broken where `strict` is set and something cannot be had, ConfigError for what cannot be used."""
        self._look, strict, core = look, self._ground.settings.strict, self._ground.core
        for part in self._parts:
            with self._without(part, strict):
                self._claims[part.name] = part.claim(self._ground)
        if look is None:
            self._attach(strict=strict)
        elif look.known(AT_ONCE_S):
            self._conclude(look, strict=strict)
        else:
            log.warning("KVBM: %s", _OPENING)
            core.lower.expect(core.pool, len(self._ground.links), _OPENING)
            threading.Thread(target=self._later, args=(look,), name="kvbm-attach", daemon=True).start()

    def close(self) -> None:
        """The process is about to end."""
        if self._look is not None:
            self._look.close()

    def _later(self, look: Look) -> None:
        look.known()
        if look.stopped:
            return
        core = self._ground.core
        try:
            self._conclude(look, strict=False)
            while core.tell_earlier() and not look.stopped:
                time.sleep(_TICK_S)
        except Exception as error:  # the engine serves, and goes on doing so
            log.exception("KVBM could not start the tiers below host memory")
            core.isolate(f"it could not be put in place ({type(error).__name__}: {error})")

    def _conclude(self, look: Look, *, strict: bool) -> None:
        if look.digest is None:
            self.namespace = self.namespace.private()
            self._ground.core.isolate(f"it is not known what the weights contain: {look.why}")
            self._let_go()
            return
        self.namespace = replace(self.namespace, weights=look.digest)
        self._attach(strict=strict)

    def _attach(self, *, strict: bool) -> None:
        """Puts in place what there is to be, or lets go of all of it."""
        ground, core = self._ground, self._ground.core
        with ExitStack() as undo:
            undo.callback(self._let_go)
            up = promotion(ground.settings, core, ground.block_bytes)
            tiers: list[Tier] = []
            for part in self._parts:
                if part.name not in self._claims:
                    continue
                with self._without(part, strict):
                    tiers.append(tier := self._claims[part.name].open(self.namespace, up, tuple(tiers)))
                    undo.callback(tier.close)
                    undo.callback(tier.stop)
                    core.lower.there(part.name)
                    continue
                self._claims.pop(part.name).close()
            if tiers and core.attach(Stack(up, self._block_tokens, tiers, time.monotonic)):
                undo.pop_all()

    def _let_go(self) -> None:
        while self._claims:
            self._claims.popitem()[1].close()

    @contextmanager
    def _without(self, part: Part, strict: bool) -> Iterator[None]:
        """What cannot be had is done without, and why is said; where `strict` is set it is raised."""
        try:
            yield
        except Broken as error:
            log.error("KVBM: %s: %s", part.without, error)
            if strict:
                raise
            self._ground.core.lower.without(part.name, str(error))
