"""What is said, in words that outlive the classes that say it. Whoever renames or moves a class, or splits a message,
changes these tables and nothing else: the log stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvbm.core import events
from kvbm.core.keys import group_of
from kvbm.link import messages as wire
from kvbm.link.messages import unpack
from kvbm.tiers.disk import orders as disk
from kvbm.tiers.peers import orders as peers

MESSAGES: Mapping[type, tuple[str, str]] = {
    wire.Copy: ("copy", "job:job request g1:slots g2:slots"),
    wire.Compare: ("compare", "job:job request g1:slots scratch:slots stored:slots"),
    disk.Write: (
        "write",
        "job:job g2:slots g3:slots keys:keys parents:keys priorities:int32 expires:float64 sequence generation",
    ),
    disk.Read: ("read", "job:job g3:slots g2:slots keys:keys"),
    wire.Cancel: ("cancel", "jobs:jobs"),
    wire.GiveUp: ("give up", "jobs:jobs"),
    disk.Forget: ("forget", "g3:slots keys:keys"),
    disk.Generation: ("generation", "number"),
    disk.Probe: ("probe", "reopen number"),
    peers.Attach: ("attach", "peer metadata address stride slots old"),
    peers.Detach: ("detach", "peer"),
    peers.Pull: ("pull", "job:job peer theirs:slots g2:slots sums:uint64"),
    wire.Foresee: ("foresee", "question adapter:adapter"),
    wire.Bye: ("bye", ""),
}
"""What ranks are told, and parts of a step: the stable name of each, and of each field, with how it is written."""

STEP = "loads stores compares fence:jobs idle waiting sync adapters:adapters"

ANSWERS: Mapping[str, type] = {
    "probed": disk.Probed, "foreseen": wire.Foreseen, "used": wire.Used, "unlike": wire.Unlike, "mine": peers.Shared,
    "sick": wire.Sick, "bye": wire.Bye, "refused": wire.Refused,
}  # fmt: skip
"""What ranks say, but for the ends of copies."""


class Told(NamedTuple):
    """A message to a rank: its stable name, and its fields as they are."""

    kind: str
    fields: dict[str, Any]


def told(message: Any) -> Told:
    """What a rank was told."""
    kind, fields = MESSAGES[type(message)]
    return Told(kind, {name: getattr(message, name) for name in names(fields)})


def names(fields: str) -> list[str]:
    """The fields in an entry of a table."""
    return [field.partition(":")[0] for field in fields.split()]


class Words:
    """Of one history: what stands for numbers and hashes that may be others tomorrow."""

    def __init__(self) -> None:
        self.names: dict[bytes, str] = {}
        """Of the keys that the history uses."""
        self._jobs: dict[int, str] = {}

    def said(self, message: Any) -> str:
        """A message to a rank."""
        kind, fields = MESSAGES[type(message)]
        return " ".join([kind, *self._fields(message, fields)])

    def step(self, step: Any) -> str:
        """An engine step."""
        return "; ".join(self._fields(step, STEP))

    def _fields(self, message: Any, fields: str) -> list[str]:
        written = []
        for field in fields.split():
            name, _, how = field.partition(":")
            value = getattr(message, name)
            if how != "" or value not in (None, [], False, b""):
                written.append(f"{name}={self._how(how)(value)}")
        return written

    def _how(self, how: str) -> Callable[[Any], str]:
        match how:
            case "":
                return self._plain
            case "int32" | "float64" | "uint64":
                return lambda value: plain(np.frombuffer(value, how).tolist())
            case _:
                return getattr(self, how)  # type: ignore[no-any-return]

    def _plain(self, value: Any) -> str:
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self._plain, value))}]"
        return self.said(value) if type(value) in MESSAGES else plain(value)

    def job(self, number: int) -> str:
        """By the order in which jobs were first heard of."""
        return self._jobs.setdefault(number, f"j{len(self._jobs) + 1}")

    def jobs(self, numbers: Sequence[int]) -> str:
        return f"[{' '.join(sorted(map(self.job, numbers), key=lambda job: int(job[1:])))}]"

    def slots(self, slots: bytes) -> str:
        return plain(unpack(slots).tolist())

    def key(self, key: bytes | None) -> str:
        if key is None:
            return "-"
        base, group = group_of(key)
        return self.names.get(base, base.hex()[:8]) + (f"/{group}" if group else "")

    def keys(self, keys: Sequence[bytes | None]) -> str:
        return f"[{' '.join(map(self.key, keys))}]"

    def adapter(self, adapter: Any) -> str:
        return f"{adapter.number} {adapter.name}"

    def adapters(self, adapters: Any) -> str:
        """What a step has to do with adapters."""
        if adapters is None:
            return "-"
        loads = [
            f"{self.job(job)} {each.adapter.number} {each.digest[:2].hex()}" for job, each in adapters.loads.items()
        ]
        awaited = [(number, digest[:2].hex()) for number, digest in adapters.awaited]
        lists = (adapters.used, loads, awaited, adapters.needed, adapters.scheduled)
        return " ".join(map(plain, (adapters.step, *lists)))

    def event(self, event: Any) -> str:
        """What observers heard."""
        match event:
            case events.Copied():
                way, copied = f"{event.source}>{event.target}", f"{event.blocks} failed {event.failed}"
                return f"copied {way} {copied} {event.nbytes} B {plain(event.seconds)} s"
            case events.Stored():
                return f"stored {event.tier} {self.keys(event.keys)} after {self.key(event.parent)}"
            case events.Removed():
                return f"removed {event.tier} {self.keys(event.keys)}"
            case events.Cleared():
                return f"cleared {event.tier} {event.generation}"
            case events.Gated():
                return f"gated {event.blocks} {event.tier}"
            case events.Unread():
                return "admitted unread"
            case events.Admitted():
                sources = {
                    "g1": event.device_tokens, "g2": event.g2_tokens, "g3": event.sources.get("g3", 0),
                    "peers": event.sources.get("peers", 0), "pulled": event.pulled_tokens,
                }  # fmt: skip
                return f"admitted {event.prompt_tokens} {plain(sources)}"
        raise TypeError(f"no words for {event!r}")


def record(record: Any) -> dict[str, str]:
    """What `explain` says of a request, but for when that was."""
    return {
        "prompt": plain(record.prompt_tokens),
        "device": plain(record.device_blocks),
        "matched": plain(record.matched),
        "staged": plain(record.staged),
        "gated": plain(record.gated),
        "loaded": plain(record.loaded),
        "load": f"{record.load} {plain(record.load_ms)}",
        "outcome": record.outcome,
        "offloaded": plain(record.offloaded),
    }


def plain(value: Any) -> str:
    """A value; seconds and rates to six digits, since a sum in another order is no other decision."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return f"[{' '.join(map(plain, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {plain(value[name])}' for name in sorted(value))}}}"
    return str(value)
