"""What the end of a copy means for its request, and for what is known of the engine's blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.blocks import Pinned, Writable
from kvbm.core.outcome import Outcome
from kvbm.core.region import Slots
from kvbm.leader.copies import StepCopy
from kvbm.leader.core import Core
from kvbm.leader.pace import Answers
from kvbm.leader.provenance import Provenance
from kvbm.leader.requests import Request
from kvbm.leader.shadow import Shadow
from kvbm.leader.variants import Variants

log = logging.getLogger(__name__)


class Endings:
    """Of all requests of a leader, under its lock. `wrong` is called with what a comparison found, `undone` with the
    number of a copy that is not made after all."""

    def __init__(
        self, core: Core, provenance: Provenance, variants: Variants, shadow: Shadow | None,
        wrong: Callable[[dict[str, Any]], None], undone: Callable[[int], None],
    ) -> None:  # fmt: skip
        self.core, self.provenance, self.variants, self.shadow = core, provenance, variants, shadow
        self.wrong, self.undone = wrong, undone
        self.answers = Answers()
        """Whether answers are asked for again."""

    def of(self, request: Request) -> _Of:
        """What hears of the end of a copy of this request's blocks."""
        return _Of(self, request)

    def answered(self, request: Request, keys: Sequence[bytes], places: Slots) -> None:
        """Blocks were stored, some of them of an answer, of which nobody knows whether they are asked for again."""
        if (places == request.asked).any():
            first = max(0, request.asked - 1)
            around = request.keys[first : request.asked + 1]  # a session may have taken some back
            if len(around) == request.asked + 1 - first:
                self.answers.given(around[0] if request.asked else None, around[-1])
        if self.answers.rarely_asked:
            self.core.pool.doubt([*compress(keys, (places >= request.asked).tolist())])


class _Of:
    """See `copies.Owner`."""

    __slots__ = ("_endings", "_request")

    def __init__(self, endings: Endings, request: Request) -> None:
        self._endings, self._request = endings, request

    def judge(self, copy: StepCopy) -> None:
        self._endings.variants.copied(self._request, copy)

    def stored(self, copy: StepCopy, there: Pinned, failed: int, late: int) -> None:
        request = self._request
        if late:
            request.record.note(f"KVBM did not offload {late} blocks: the engine reused them before they were copied")
        if (places := copy.places[copy.done]).max(initial=-1) >= request.asked:
            self._endings.answered(request, there.keys, places)
        request.record.offloaded += int(copy.done.sum())
        self._failed(copy, failed, "be offloaded")

    def loaded(self, copy: StepCopy, failed: int) -> npt.NDArray[np.bool_]:
        request, record, good = self._request, self._request.record, copy.done
        provenance, keys = self._endings.provenance, copy.lease.keys if isinstance(copy.lease, Pinned) else ()
        provenance.arrived(copy.g1[good], [*compress(keys, good.tolist())], copy.id)
        provenance.forget(copy.g1[~good])
        record.loaded = len(copy.g1) - failed
        record.load_ms = copy.seconds * 1e3
        if record.outcome == "loading":
            record.outcome = "computing" if not failed else "load failed, computed instead"
        self._failed(copy, failed, "load")
        if request.variant is not None and request.variant.refused is not None:
            # Of another adapter than the workers': what is stored is right.
            corrupt: npt.NDArray[np.bool_] = copy.outcomes == Outcome.CORRUPT
            return corrupt
        return ~good

    def _failed(self, copy: StepCopy, failed: int, way: str) -> None:
        if failed:
            self._request.record.note(f"{failed} blocks failed to {way}: {copy.error}")
            log.warning("KVBM: %d blocks of request %.100s failed to %s: %s", failed, self._request.id, way, copy.error)

    def compared(self, copy: StepCopy) -> None:
        shadow = self._endings.shadow
        if shadow is not None and (found := shadow.answered(copy)) is not None:
            self._endings.wrong(found)

    def dropped(self, copy: StepCopy) -> None:
        self._endings.variants.dropped(copy.id)
        self._endings.undone(copy.id)
        if isinstance(copy.lease, Writable) and self._endings.shadow is not None:
            self._endings.shadow.answered(copy)
