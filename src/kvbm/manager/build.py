"""Composition roots: the only places that choose concrete parts and wire them together."""

from __future__ import annotations

import fcntl
import importlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

from kvbm import __version__
from kvbm.abc.transport import Transport
from kvbm.blocks import LayerGroup, Pool
from kvbm.core import cpus
from kvbm.core.config import Resolved, Settings
from kvbm.core.errors import Broken, ConfigError
from kvbm.core.folders import check_folder
from kvbm.core.keys import Namespace
from kvbm.core.region import Region
from kvbm.manager import build_disk, build_peers
from kvbm.manager.build_lower import Below, Choose, Look
from kvbm.manager.channel import Link, listen, readable, socket_path
from kvbm.manager.control import About, Control
from kvbm.manager.gate import Gate
from kvbm.manager.growing import Growing
from kvbm.manager.hybrid import HybridLeader
from kvbm.manager.leader import Leader
from kvbm.manager.reports import Reports
from kvbm.manager.residents import Holder
from kvbm.manager.wire import Allot, Hello, Ready, Refused
from kvbm.manager.worker import Worker
from kvbm.observe import prometheus
from kvbm.observe.totals import Totals
from kvbm.policy import eviction_order
from kvbm.stores.available import available_memory
from kvbm.stores.format import padded
from kvbm.stores.memory import RESERVE_BYTES, promised
from kvbm.transfer.executor import Executor
from kvbm.transfer.memcpy import MemcpyTransport

log = logging.getLogger(__name__)

_BOUNCE_BYTES = 1 << 30
"""Size of G2 where there is a disk tier and nothing says how large G2 is."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where this engine stands: its id, its tensor-parallel ranks, its place among the data-parallel engines here.

    `dp_local` is 1 for engines that are not told how many there are; that it is one of several says `data_parallel`.
    `replicated`: every rank has the same KV, so that rank 0 stores it for all.
    """

    engine: str
    ranks: int
    data_parallel: bool = False
    dp_rank: int = 0
    dp_local: int = 1
    replicated: bool = False
    model: str = ""
    """What people call the model that it serves."""

    @property
    def storing(self) -> range:
        """The ranks that store: each has its own part of a block."""
        return range(1 if self.replicated else self.ranks)


@dataclass(slots=True)
class LeaderSide:
    """Everything that lives beside the scheduler."""

    leader: Leader
    totals: Totals
    control: Control
    stop_metrics: object
    below: Below

    def drain(self, seconds: float) -> None:
        """Writes to disk what only G2 has, the hottest first, for so long at most. Any thread but the engine's."""
        self.leader.drain(seconds)

    def close(self) -> None:
        """Stops threads and says goodbye to the workers."""
        self.below.close()
        self.control.close()
        if self.leader.lower is not None and self.leader.lower.peers is not None:
            self.leader.lower.peers.network.close()
        if callable(self.stop_metrics):
            self.stop_metrics()
        self.leader.close()


def channel_path(settings: Settings, engine: str) -> Path:
    """Where leader and workers of an engine meet."""
    return socket_path(settings.run_dir, engine, ".chan")


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
        open_disk=partial(build_disk.open_shard, settings) if stores else None,
        open_peers=(
            partial(build_peers.open_memory, settings, wrapped) if build_peers.wanted(settings) and stores else None
        ),
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


def check(resolved: Resolved, engine: str = "") -> None:
    """Raises ConfigError for what cannot be used: names of policies, folders, keys, secrets, more memory than there is.
    Waits for nothing, and touches nothing. `engine` is an id like that of the engine that will be."""
    try:
        _check(resolved)
        channel_path(resolved.settings, engine)
    except ConfigError as error:
        given = {name: source for name, source in resolved.sources.items() if source != "default"}
        raise ConfigError(
            error.setting, error.problem, source=error.source or given.get(error.setting, ""), remedy=error.remedy
        ) from None


def _check(resolved: Resolved) -> None:
    settings = resolved.settings
    for name in ("run_dir", "cache_dir", "g3_dir", "traces"):
        if resolved.sources[name] != "default":
            check_folder(name, getattr(settings, name))
    eviction_order(settings.g2_order, 1, "g2_order")
    if settings.g2_gb is not None and settings.g2_blocks is None:
        free = _free()
        if settings.g2_gb * 1e9 > free:
            raise _too_large("g2_gb", f"{settings.g2_gb:g} GB", free, resolved)
    build_disk.check(settings)
    build_peers.check(settings)


def check_size(resolved: Resolved, block_bytes: int) -> None:
    """Raises ConfigError for a G2 that somebody gave a size which cannot be, with blocks of `block_bytes` or more."""
    with suppress(Broken):  # a size that nobody gave
        size(resolved, Place("", 1), block_bytes)


def build_leader(
    resolved: Resolved, place: Place, namespace: Namespace, *, block_tokens: int, shares_device_blocks: bool,
    groups: Sequence[LayerGroup] = (), choose: Choose | None = None,
) -> LeaderSide:  # fmt: skip
    """The leader, once every rank's worker has its arena. `groups` are the engine's layer groups, where there are
    several, or one that does not need all blocks. `choose` says which files the engine loaded; without it the namespace
    is known as it is. Raises ConfigError for a size that cannot be, Broken if a worker does not come or cannot get its
    memory."""
    settings = resolved.settings
    check(resolved)
    for note in resolved.notes:
        log.warning("KVBM: %s", note)
    wants_disk = build_disk.wanted(settings)
    with ExitStack() as undo:
        links, slot_bytes, namespace, began = _gather(settings, place, namespace, undo)
        shared = wants_disk or build_peers.wanted(settings)
        look = Look(settings, choose, began) if choose is not None and shared else None
        if look is not None:
            undo.callback(look.close)
        parts = len(place.storing)
        block_bytes = slot_bytes * parts
        with _one_at_a_time(settings):
            slots, why = size(resolved, place, block_bytes)
            log.info(
                "KVBM: G2 holds %d blocks of %d tokens, %.2f GB over %d rank(s): %s",
                slots, block_tokens, slots * block_bytes / 1e9, parts, why,
            )  # fmt: skip
            # Direct I/O wants whole pages.
            begun = time.monotonic()
            usable = _allot(settings, place, links, slots, padded(slot_bytes) if wants_disk else 0)
        totals = Totals()
        order = eviction_order(settings.g2_order, slots)
        pool = Pool(slots, order=order, tier="g2", most_doubted=settings.answers_share)
        make = partial(HybridLeader, groups=groups, checkpoint_tokens=settings.checkpoint_tokens) if groups else Leader
        leader = make(
            settings,
            pool,
            links,
            slot_bytes=block_bytes,
            gate=Gate(block_tokens),
            shares_device_blocks=shares_device_blocks,
            observers=[totals],
        )
        leader.growing = Growing(pool, usable, links.values(), block_bytes, begun)
        leader.reports = Reports((settings.cache_dir or settings.run_dir) / "reports", place.engine)
        known = choose is None or shared
        below = Below(settings, place, namespace if known else namespace.private(), leader, slot_bytes, block_tokens)
        below.begin(look)
        undo.pop_all()
    about = About(
        place.engine, __version__, below.namespace.fingerprint, place.ranks, block_bytes, block_tokens, below.folder,
        below.namesakes, place.model,
    )  # fmt: skip
    control = Control(leader, totals, about, settings.run_dir)

    def told() -> None:
        control.about = replace(
            about, fingerprint=below.namespace.fingerprint, disk=below.folder, namesakes=below.namesakes
        )

    below.told = told
    told()  # it may have changed in between
    stop = None
    if settings.metrics:
        port = settings.metrics_port + place.dp_rank
        stop = prometheus.serve(settings.metrics_host, port, control.sources(), control.health)
    return LeaderSide(leader, totals, control, stop, below)


def _gather(
    settings: Settings, place: Place, namespace: Namespace, undo: ExitStack
) -> tuple[dict[int, Link], int, Namespace, int]:
    """Waits until every rank's worker has connected and said the same as the leader knows; returns last when the first
    of their processes began, 0 if one does not say. If the start fails after all, `undo` closes the links."""
    path = channel_path(settings, place.engine)
    links: dict[int, Link] = {}
    facts: dict[int, dict[str, str]] = {}
    sizes: set[int] = set()
    began: list[int] = []
    deadline = time.monotonic() + settings.init_timeout_s
    with listen(path) as sock:
        undo.callback(path.unlink, missing_ok=True)
        while len(links) < place.ranks:
            if not readable([sock], deadline - time.monotonic()):
                raise Broken(f"only {len(links)} of {place.ranks} workers came within {settings.init_timeout_s:.0f} s")
            link = Link(sock.accept()[0])
            undo.callback(link.close)
            try:
                hello = link.wait(10.0)
            except Broken as error:  # an engine with the same id that looks whether this one lives, say
                log.debug("KVBM: %s", error)
                hello = None
            if not isinstance(hello, Hello):
                link.close()
                continue
            if (hello.fingerprint, hello.world) != (namespace.rank_fingerprint, place.ranks):
                raise Broken(f"the worker of rank {hello.rank} runs another configuration than the scheduler")
            links[hello.rank], facts[hello.rank] = link, hello.facts
            sizes.add(hello.slot_bytes)
            began.append(hello.began)
    path.unlink(missing_ok=True)
    if len(sizes) != 1:
        raise Broken(f"ranks hold blocks of different sizes ({sorted(sizes)} bytes): not supported")
    return links, sizes.pop(), replace(namespace, facts={**namespace.facts, **_over_ranks(facts)}), min(began)


def _over_ranks(facts: Mapping[int, Mapping[str, str]]) -> dict[str, str]:
    """What the ranks say: once where all say the same."""
    joined = {}
    for name in sorted({name for theirs in facts.values() for name in theirs}):
        values = [facts[rank].get(name, "") for rank in sorted(facts)]
        joined[name] = values[0] if len(set(values)) == 1 else json.dumps(values)
    return joined


@contextmanager
def _one_at_a_time(settings: Settings) -> Iterator[None]:
    """Engines that start together size their memory one after the other: the second sees what the first took, and will
    take (`promised`). (A data-parallel engine of a dense model is not even told how many there are.) The lock dies with
    its holder."""
    folder = os.open(settings.run_dir, os.O_RDONLY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + settings.init_timeout_s
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Broken(f"another engine has been starting for {settings.init_timeout_s:.0f} s") from None
                time.sleep(0.05)
        yield
    finally:
        os.close(folder)


def size(resolved: Resolved, place: Place, block_bytes: int) -> tuple[int, str]:
    """How many blocks G2 gets, and why. Raises ConfigError for a size that somebody set and that cannot be, Broken
    where nobody did: then this machine has too little memory."""
    settings, sources = resolved.settings, resolved.sources
    free = _free()
    bounce = build_disk.wanted(settings) and sources["g2_share"] == "default"
    if settings.g2_blocks is not None:
        name, slots, why = "g2_blocks", settings.g2_blocks, f"{sources['g2_blocks']}"
    elif settings.g2_gb is not None:
        name, slots = "g2_gb", int(settings.g2_gb * 1e9) // block_bytes
        why = f"{sources['g2_gb']}, {settings.g2_gb:g} GB"
    elif bounce:
        name, slots, why = "g2_gb", max(1, _BOUNCE_BYTES // block_bytes), "default, only to pass blocks on to disk"
    else:
        name, slots = "g2_share", int(max(0, free) * settings.g2_share / place.dp_local) // block_bytes
        why = f"{settings.g2_share:.0%} of {free / 1e9:.1f} GB that are available, for {place.dp_local} engine(s)"
    if sources[name] == "default" and not 1 <= slots <= free // block_bytes:
        raise Broken(f"only {max(0, free) / 1e9:.2f} GB of memory are available for G2 ({name} says how much to take)")
    if slots < 1:
        raise ConfigError(
            name, f"G2 would be smaller than one block of {block_bytes:,} bytes", source=sources[name],
            remedy=f"Give it at least {block_bytes / 1e9:.3g} GB.",
        )  # fmt: skip
    if slots * block_bytes > free:
        raise _too_large(name, f"{slots:,} blocks, {slots * block_bytes / 1e9:.2f} GB,", free, resolved)
    return slots, why


def _free() -> int:
    """What G2 can have: not what the arenas of other engines are being touched for."""
    taken = promised()  # first: what is touched in between counts twice, not never
    return available_memory() - taken - RESERVE_BYTES


def _too_large(name: str, asked: str, free: int, resolved: Resolved) -> ConfigError:
    others = f", {taken / 1e9:.2f} GB for engines that are starting" if (taken := promised()) else ""
    return ConfigError(
        name,
        f"G2 of {asked} does not fit: only {max(0, free) / 1e9:.2f} GB of memory are available (1.07 GB kept for the "
        f"engine{others})",
        source=resolved.sources[name], remedy="Make it smaller.",
    )  # fmt: skip


def _allot(settings: Settings, place: Place, links: dict[int, Link], slots: int, stride: int) -> dict[int, int]:
    """Has every rank that stores make its arena, then the others map that. Returns how many slots each of the
    former can use at once."""
    deadline = time.monotonic() + settings.init_timeout_s
    for rank in place.storing:
        links[rank].send(Allot(slots, shared=place.replicated, stride=stride))
    usable = {rank: _ready(rank, links[rank], deadline) for rank in place.storing}
    if others := [rank for rank in links if rank not in place.storing]:
        arena = links[0].take_file()
        try:
            for rank in others:
                links[rank].send(Allot(slots, stride=stride), arena)
        finally:
            os.close(arena)
        for rank in others:
            _ready(rank, links[rank], deadline)
    return usable


def _ready(rank: int, link: Link, deadline: float) -> int:
    """Waits for one rank's memory; returns how many slots it can use at once."""
    match link.wait(max(0.0, deadline - time.monotonic())):
        case Ready(slots=usable):
            return usable
        case Refused(problem=refusal):
            raise Broken(f"rank {rank} cannot get its host memory: {refusal}")
        case message:
            raise Broken(f"rank {rank} did not prepare its host memory in time ({message!r})")
