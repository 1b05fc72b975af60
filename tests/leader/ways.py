"""Ends of copies by the ways that blocks go, and what a request found by where it came from."""

from __future__ import annotations

from typing import Any

from kvbm.core import events
from kvbm.core.events import Copied
from kvbm.observe.names import WAYS


class _Way(type):
    """A class whose instances are the `Copied` of one way."""

    ends: tuple[str, str]

    def __call__(cls, blocks: int, failed: int, nbytes: int, seconds: float) -> Any:
        return Copied(*cls.ends, blocks, failed, nbytes, seconds)

    def __instancecheck__(cls, event: object) -> bool:
        return isinstance(event, Copied) and (event.source, event.target) == cls.ends


def _way(name: str) -> Any:
    return _Way(name, (), {"ends": (WAYS[name].source, WAYS[name].target)})


Offloaded, Onboarded, Demoted, Promoted = map(_way, ("offload", "onboard", "demote", "promote"))


def Admitted(  # as suites know it that are to judge a restructuring
    prompt_tokens: int, device_tokens: int, g2_tokens: int, g3_tokens: int = 0, peer_tokens: int = 0,
    pulled_tokens: int = 0,
) -> events.Admitted:  # fmt: skip
    """The event."""
    found = {"g3": g3_tokens, "peers": peer_tokens}
    sources = {tier: tokens for tier, tokens in found.items() if tokens}
    return events.Admitted(prompt_tokens, device_tokens, g2_tokens, pulled_tokens, sources)
