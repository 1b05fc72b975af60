"""Names that the package no longer has, for the suites that judge a restructuring (`tests.untouched`): these change in
nothing but their imports.

Import it where an engine or a leader of a test is built. New tests use the names of today.
"""

from __future__ import annotations

from dataclasses import asdict
from operator import attrgetter
from typing import Any

from kvbm.leader.copies import InFlight
from kvbm.leader.core import Limits
from kvbm.leader.leader import Leader
from kvbm.leader.shadow import Compared, Shadow
from kvbm.link.messages import Touched
from kvbm.tiers.demote import Demotion
from kvbm.tiers.disk.tier import DiskTier
from kvbm.tiers.peers.network import Network
from kvbm.tiers.peers.tier import Peers
from kvbm.tiers.promote import Promotion
from kvbm.tiers.stack import Stack
from kvbm.worker.worker import Worker

HybridLeader = Leader

_CORE = {name: name for name in (
    "attach", "below", "channels", "close", "drain", "emit", "host", "in_flight", "isolate", "links", "pause", "pool",
    "quiesce", "resume", "tell_earlier", "tick", "turn_off",
)}  # fmt: skip
_HEALTH = {name: f"health.{name}" for name in ("off", "paused", "problems", "quarantined", "ticked")}
_COUNTS = {name: f"counts.{name}" for name in ("corrupt", "deferred", "dropped")}
_OTHERS = {
    "_copies": "copies", "_drain": "hear", "_held": "held", "_lock": "lock", "_observers": "observers._observers",
    "_sick": "health.sick", "degraded": "lower.degraded", "earlier": "lower._earlier", "isolated": "lower.isolated",
    "lower": "lower.stack", "next_job": "copies.next_id", "standing_aside": "health.aside",
}  # fmt: skip
_LEADER = {
    "_loading": "book.loading", "_provenance": "provenance", "_variants": "variants", "answers": "_endings.answers",
    "audit": "invariants", "reports": "invariants._reports",
}  # fmt: skip
_PLACES = {name: f"core.{at}" for name, at in (_CORE | _HEALTH | _COUNTS | _OTHERS).items()} | _LEADER


def _name(name: str, at: str) -> property:
    *parents, last = at.split(".")
    parent = attrgetter(".".join(parents))
    return property(attrgetter(at), lambda self, value: setattr(parent(self), last, value))


for _old, _at in _PLACES.items():
    setattr(Leader, _old, _name(_old, _at))
for _owner, _olds in ((Promotion, ("stagings",)), (Demotion, ("queued", "queue", "in_flight")), (InFlight, ("jobs",))):
    for _old in _olds:
        setattr(_owner, f"_{_old}", property(attrgetter(_old)))
DiskTier._chores = _name("_chores", "chores._executor")  # type: ignore[attr-defined]
Peers._sought = property(attrgetter("sought.going"))  # type: ignore[attr-defined]
for _old, _at in {
    "_renewed": "members._renewed", "_facts": "members.kin._facts", "_clients": "connections._clients",
    "_us": "us",
}.items():  # fmt: skip
    setattr(Network, _old, _name(_old, _at))
for _old, _at in {"_g1": "memory.g1", "_g2": "memory.g2"}.items():
    setattr(Worker, _old, _name(_old, _at))


def _limit(leader: Leader, **changes: Any) -> None:
    leader.core.limits = leader.core.limits._replace(**changes)


def _settings(leader: Leader, settings: Any) -> None:
    leader.__dict__["_settings"] = settings
    _limit(leader, share=settings.held_share)


def _slot_bytes(leader: Leader, slot_bytes: int) -> None:
    _limit(leader, storing=Limits.of(leader.__dict__["_settings"], slot_bytes).storing)


def _growing(leader: Leader, growing: Any) -> None:
    leader.__dict__["growing"] = growing
    leader.core.hears((Touched,), growing.take)


def _smaller(leader: Leader) -> dict[str, str]:
    growing = leader.__dict__.get("growing")
    return {} if growing is None or growing.shortage() is None else {"g2": growing.shortage()}


def _tier(stack: Stack | None, name: str) -> Any:
    return stack.tiers.get(name) if stack is not None else None


def _shim(owner: Any, **named: Any) -> None:
    for name, value in named.items():
        setattr(owner, name, value)


_shim(
    Leader,
    _settings=property(lambda self: self.__dict__["_settings"], _settings),
    _slot_bytes=property(None, _slot_bytes),
    growing=property(lambda self: self.__dict__["growing"], _growing),
    smaller=_smaller,
    reach=lambda self, request, complete, computed: self.advance(request, complete, computed),
    disk=property(lambda self: _tier(self.core.lower.stack, "g3")),
)
_shim(Stack, peers=property(lambda self: _tier(self, "peers")), clear_disk=lambda self: self.purge("g3"))
_shim(Compared, __call__=asdict)
for _old in ("sampled", "compared", "skipped"):
    setattr(Shadow, _old, _name(_old, f"counts.{_old}"))
_shim(Shadow, wrong=_name("wrong", "counts.mismatched"))
