"""The tiers there are, the nearest first: the one list that names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvbm.build.disk import DiskPart
from kvbm.build.objects import ObjectsPart
from kvbm.build.parts import Needs, Part
from kvbm.build.peers import PeersPart
from kvbm.core.config import Settings

TIERS: Final[tuple[Part, ...]] = (DiskPart(), PeersPart(), ObjectsPart())


def wanted(settings: Settings, parts: Sequence[Part]) -> list[Part]:
    """Those of them that there are to be."""
    return [part for part in parts if part.wanted(settings)]


def drain_s(settings: Settings, parts: Sequence[Part] = TIERS) -> float:
    """How long an engine with these writes what is worth keeping at its end; 0 where none of them takes any."""
    return settings.g3_drain_s if any(part.drains for part in wanted(settings, parts)) else 0.0


def needs(settings: Settings, parts: Sequence[Part], slot_bytes: int) -> Needs:
    """What they want of host memory together."""
    all_ = [part.needs(slot_bytes) for part in wanted(settings, parts)]
    told = any(each.sums == "told" for each in all_)
    made = any(each.sums for each in all_)
    return Needs(
        max((each.stride for each in all_), default=0),
        "told" if told else "made" if made else "",
        any(each.hurry for each in all_),
    )
