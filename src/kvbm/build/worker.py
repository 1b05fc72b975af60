"""The worker of one rank, put together."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from typing import cast

from kvbm.abc.transport import Transport
from kvbm.build import disk as build_disk
from kvbm.build import peers as build_peers
from kvbm.build.place import Place, channel_path
from kvbm.core import cpus
from kvbm.core.config import Settings
from kvbm.core.errors import ConfigError
from kvbm.core.keys import Namespace
from kvbm.core.region import Region
from kvbm.transfer.executor import Executor
from kvbm.transfer.memcpy import MemcpyTransport
from kvbm.worker.residents import Holder
from kvbm.worker.worker import MakeTier, Worker


def build_worker(
    settings: Settings,
    place: Place,
    namespace: Namespace,
    g1: Region,
    rank: int,
    facts: Mapping[str, str] | None = None,
    began: int = 0,
    adapters: Holder | None = None,
) -> Worker:
    """The worker of one rank. Returns at once; its arena is made when the leader says how large. `facts` are part of
    the namespace, too: what only a worker knows of it. `began` is when the process had read nothing of the weights yet
    (nanoseconds since 1970), 0 where nobody knows. `adapters` are those that the engine holds on this rank, if it
    serves any and they can be reached."""
    stores = rank in place.storing

    def wrapped(transport: Transport) -> Transport:
        return _wrap(settings.transport_wrapper, transport, rank) if settings.transport_wrapper else transport

    def make_executor() -> Executor:
        threads = settings.copy_threads or max(1, min(4, len(cpus.given()) // place.ranks))
        transports: list[Transport] = [MemcpyTransport(threads)]
        if build_disk.wanted(settings) and stores:
            transports.append(build_disk.transport(settings))
        return Executor([wrapped(transport) for transport in transports])

    tiers: dict[str, MakeTier] = {}
    if build_disk.wanted(settings):
        tiers["g3"] = partial(build_disk.on_rank, settings)
    if build_peers.wanted(settings):
        tiers["peers"] = partial(build_peers.on_rank, settings, wrapped)
    return Worker(
        settings,
        g1,
        rank=rank,
        world=place.ranks,
        fingerprint=namespace.rank_fingerprint,
        facts=facts,
        began=began,
        address=channel_path(settings, place.engine),
        make_executor=make_executor,
        tiers=tiers if stores else None,
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
