"""The worker of one rank, put together."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, cast

from kvbm.abc.transport import Device, Transport
from kvbm.build.parts import Part
from kvbm.build.place import Place, channel_path
from kvbm.build.tiers import TIERS, wanted
from kvbm.core import cpus
from kvbm.core.config import Resolved, Settings
from kvbm.core.errors import ConfigError
from kvbm.core.keys import Namespace
from kvbm.core.region import Region
from kvbm.link.messages import Hello
from kvbm.transfer.executor import Executor
from kvbm.transfer.memcpy import MemcpyTransport
from kvbm.worker.residents import AdapterHolder
from kvbm.worker.worker import Worker

MakeTransport = Callable[[Settings, Place], Transport]


def _memcpy(settings: Settings, place: Place) -> Transport:
    return MemcpyTransport(settings.copy_threads or max(1, min(4, len(cpus.given()) // place.ranks)))


TRANSPORTS: Final[tuple[MakeTransport, ...]] = (_memcpy,)
"""Between an engine's memory and host memory."""


def check_device(resolved: Resolved, kind: str) -> None:
    """Raises ConfigError for settings that cannot go with an engine on this kind of device, as torch calls it."""
    if resolved.settings.onboard == "sync" and kind != "cpu":
        raise ConfigError(
            "onboard", "sync cannot be used on a GPU: a load inside a step would have to stop the engine's stream",
            source=resolved.sources["onboard"], remedy="Use onboard=async.",
        )  # fmt: skip


def build_worker(
    settings: Settings,
    place: Place,
    namespace: Namespace,
    g1: Region,
    rank: int,
    facts: Mapping[str, str] | None = None,
    began: int = 0,
    adapters: AdapterHolder | None = None,
    tiers: Sequence[Part] = TIERS,
    transports: Sequence[MakeTransport] = TRANSPORTS,
) -> Worker:
    """The worker of one rank. Returns at once; its arena is made when the leader says how large. `facts` are part of
    the namespace, too: what only a worker knows of it. `began` is when the process had read nothing of the weights yet
    (nanoseconds since 1970), 0 where nobody knows. `adapters` are those that the engine holds on this rank, if it
    serves any and they can be reached. `tiers` are those that settings may ask for;
    `transports` make what copies between the engine's memory and host memory, beside what the engine's device has: the
    first that reaches both does. Raises Broken where the device refuses."""
    stores = rank in place.storing
    parts = wanted(settings, tiers) if stores else []

    def wrapped(transport: Transport) -> Transport:
        return _wrap(settings.transport_wrapper, transport, rank) if settings.transport_wrapper else transport

    made: list[Transport] = [*(g1.owner.transports() if isinstance(g1.owner, Device) else ())]
    made += [make(settings, place) for make in transports]
    for part in parts:
        made += part.transports(settings)
    return Worker(
        settings,
        g1,
        Hello(rank, place.ranks, namespace.rank_fingerprint, g1.slot_bytes, dict(facts or {}), began),
        channel_path(settings, place.engine),
        Executor([wrapped(transport) for transport in made]),
        {part.name: partial(part.on_rank, settings, wrapped) for part in parts},
        stores=stores,
        adapters=adapters,
    )


def _wrap(spec: str, transport: Transport, rank: int) -> Transport:
    target, _, query = spec.partition("?")
    module, _, name = target.partition(":")
    try:
        return cast(Transport, getattr(importlib.import_module(module), name)(transport, rank, query))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError("transport_wrapper", f"{spec!r} cannot be used: {error}") from error
