"""Composition roots: the only places that choose concrete parts and wire them together."""

from __future__ import annotations

import fcntl
import importlib
import logging
import os
import select
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from kvbm import __version__
from kvbm.abc.policy import Drop, Move, Placement
from kvbm.abc.transport import Transport
from kvbm.blocks import Pool
from kvbm.core.config import Resolved, Settings
from kvbm.core.errors import Broken, ConfigError
from kvbm.core.keys import Namespace
from kvbm.core.region import Region
from kvbm.manager.channel import Link, listen, socket_path
from kvbm.manager.control import About, Control
from kvbm.manager.demote import Budget, Demotion
from kvbm.manager.disk import DiskTier, adopt
from kvbm.manager.gate import Gate
from kvbm.manager.leader import Leader
from kvbm.manager.lower import Lower
from kvbm.manager.promote import Promotion
from kvbm.manager.wire import Allot, Hello, Ready, Refused
from kvbm.manager.worker import Worker
from kvbm.observe import prometheus
from kvbm.observe.totals import Totals
from kvbm.policy import admission, eviction_order, placement
from kvbm.policy.admissions import Frequency
from kvbm.stores.available import available_memory
from kvbm.stores.cipher import Cipher
from kvbm.stores.disk import Disk
from kvbm.stores.folder import Folder, NamespaceFolder
from kvbm.stores.format import padded
from kvbm.stores.meta import Place as DiskPlace
from kvbm.stores.meta import bytes_of
from kvbm.stores.shard import Shard
from kvbm.transfer.executor import Executor
from kvbm.transfer.file import FileTransport
from kvbm.transfer.memcpy import MemcpyTransport

log = logging.getLogger(__name__)

_DISK_THREADS, _DISK_DEPTH = 2, 32
"""Threads that move blocks to and from disk, and operations that each has in flight."""
_BOUNCE_BYTES = 1 << 30
"""Size of G2 where there is a disk tier and nothing says how large G2 is."""
_MOVE_BYTES = 16 << 20
"""Bytes that are moved between host memory and disk at once, over all ranks: what has arrived can be used while the
rest is on its way."""
_RESERVE = 1 << 30
"""Bytes of available memory that G2 never takes: the engine itself still grows."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where this engine stands: its id, its tensor-parallel ranks, its place among the data-parallel engines here."""

    engine: str
    ranks: int
    dp_rank: int = 0
    dp_local: int = 1


@dataclass(slots=True)
class LeaderSide:
    """Everything that lives beside the scheduler."""

    leader: Leader
    totals: Totals
    control: Control
    stop_metrics: object

    def drain(self, seconds: float) -> None:
        """Writes to disk what only G2 has, the hottest first, for so long at most. Any thread but the engine's."""
        self.leader.drain(seconds)

    def close(self) -> None:
        """Stops threads and says goodbye to the workers."""
        self.control.close()
        if callable(self.stop_metrics):
            self.stop_metrics()
        self.leader.close()


def channel_path(settings: Settings, engine: str) -> Path:
    """Where leader and workers of an engine meet."""
    return socket_path(settings.run_dir, engine, ".chan")


def build_worker(settings: Settings, place: Place, namespace: Namespace, g1: Region, rank: int) -> Worker:
    """The worker of one rank. Returns at once; its arena is made when the leader says how large."""

    def make_executor() -> Executor:
        threads = settings.copy_threads or max(1, min(4, (os.cpu_count() or 1) // place.ranks))
        transports: list[Transport] = [MemcpyTransport(threads)]
        if settings.g3_gb is not None or settings.g3_blocks is not None:
            transports.append(FileTransport(_DISK_THREADS, _DISK_DEPTH, settings.g3_engine))
        if settings.transport_wrapper:
            transports = [_wrap(settings.transport_wrapper, transport, rank) for transport in transports]
        return Executor(transports)

    def open_disk(place: DiskPlace, rank: int, memory: Region, executor: Executor) -> Disk:
        shard = Shard(place, rank, sync=settings.g3_sync, direct=settings.g3_direct)
        return Disk(shard, memory, executor.submit, executor.cancel, cipher=cipher_of(settings))

    return Worker(
        settings,
        g1,
        rank=rank,
        world=place.ranks,
        fingerprint=namespace.fingerprint,
        address=channel_path(settings, place.engine),
        make_executor=make_executor,
        open_disk=open_disk,
    )


def _wrap(spec: str, transport: Transport, rank: int) -> Transport:
    target, _, query = spec.partition("?")
    module, _, name = target.partition(":")
    try:
        return cast(Transport, getattr(importlib.import_module(module), name)(transport, rank, query))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError("transport_wrapper", f"{spec!r} cannot be used: {error}") from error


def build_leader(
    resolved: Resolved, place: Place, namespace: Namespace, *, block_tokens: int, shares_device_blocks: bool
) -> LeaderSide:
    """The leader, once every rank's worker has its arena. Raises ConfigError for a size that cannot be, Broken if a
    worker does not come or cannot get its memory."""
    settings = resolved.settings
    below = _check_policies(settings)
    for note in resolved.notes:
        log.warning("KVBM: %s", note)
    with ExitStack() as undo:
        links, slot_bytes = _gather(settings, place, namespace, undo)
        found: NamespaceFolder | str | None = None
        if below is not None:
            found = _open_disk(resolved, place, namespace, slot_bytes)
        if isinstance(found, NamespaceFolder):
            undo.callback(found.close)
        with _one_at_a_time(settings):
            slots, why = _size(resolved, place, slot_bytes * place.ranks)
            log.info(
                "KVBM: G2 holds %d blocks of %d tokens, %.2f GB over %d rank(s): %s",
                slots, block_tokens, slots * slot_bytes * place.ranks / 1e9, place.ranks, why,
            )  # fmt: skip
            problem = _allot(settings, links, slots, found.place if isinstance(found, NamespaceFolder) else None)
        if problem is not None and isinstance(found, NamespaceFolder):
            found.close()
            found = problem
        undo.pop_all()
    totals = Totals()
    pool = Pool(slots, order=eviction_order(settings.g2_order, slots), tier="g2")
    leader = Leader(
        settings,
        pool,
        links,
        slot_bytes=slot_bytes * place.ranks,
        gate=Gate(block_tokens),
        shares_device_blocks=shares_device_blocks,
        observers=[totals],
    )
    if isinstance(found, NamespaceFolder) and below is not None:
        leader.lower = _lower(settings, leader, links, found, below, slot_bytes * place.ranks, block_tokens)
    elif isinstance(found, str):
        leader.absent["g3"] = found
    about = About(
        place.engine, __version__, namespace.fingerprint, place.ranks, slot_bytes * place.ranks, block_tokens,
        found.path if isinstance(found, NamespaceFolder) else None,
    )  # fmt: skip
    control = Control(leader, totals, about, settings.run_dir)
    stop = None
    if settings.metrics:
        port = settings.metrics_port + place.dp_rank
        stop = prometheus.serve(settings.metrics_host, port, control.sources())
    return LeaderSide(leader, totals, control, stop)


def _gather(settings: Settings, place: Place, namespace: Namespace, undo: ExitStack) -> tuple[dict[int, Link], int]:
    """Waits until every rank's worker has connected and said the same as the leader knows. If the start fails after
    all, `undo` closes the links."""
    path = channel_path(settings, place.engine)
    links: dict[int, Link] = {}
    sizes: set[int] = set()
    deadline = time.monotonic() + settings.init_timeout_s
    with listen(path) as sock:
        undo.callback(path.unlink, missing_ok=True)
        while len(links) < place.ranks:
            if not select.select([sock], [], [], max(0.0, deadline - time.monotonic()))[0]:
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
            if (hello.fingerprint, hello.world) != (namespace.fingerprint, place.ranks):
                raise Broken(f"the worker of rank {hello.rank} runs another configuration than the scheduler")
            links[hello.rank] = link
            sizes.add(hello.slot_bytes)
    path.unlink(missing_ok=True)
    if len(sizes) != 1:
        raise Broken(f"ranks hold blocks of different sizes ({sorted(sizes)} bytes): not supported")
    return links, sizes.pop()


@contextmanager
def _one_at_a_time(settings: Settings) -> Iterator[None]:
    """Engines that start together size and touch their memory one after the other: the second sees what the first took.
    (A data-parallel engine of a dense model is not even told how many there are.) The lock dies with its holder."""
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


def _size(resolved: Resolved, place: Place, block_bytes: int) -> tuple[int, str]:
    """How many blocks G2 gets, and why."""
    settings, sources = resolved.settings, resolved.sources
    free = available_memory() - _RESERVE
    bounce = (settings.g3_gb or settings.g3_blocks) is not None and sources["g2_share"] == "default"
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
    if slots < 1:
        raise ConfigError(
            name, f"G2 would be smaller than one block of {block_bytes} bytes", source=sources[name],
            remedy=f"Give it at least {block_bytes / 1e9:.3g} GB.",
        )  # fmt: skip
    if slots * block_bytes > free:
        raise ConfigError(
            name,
            f"G2 of {slots} blocks takes {slots * block_bytes / 1e9:.2f} GB, but only {max(0, free) / 1e9:.2f} GB of "
            "memory are available (1.07 GB kept for the engine)",
            source=sources[name], remedy="Make it smaller.",
        )  # fmt: skip
    return slots, why


def _allot(settings: Settings, links: dict[int, Link], slots: int, disk: DiskPlace | None) -> str | None:
    """Has every rank make its arena and open its file. Returns why a file could not be opened."""
    for link in links.values():
        link.send(Allot(slots, disk))
    deadline = time.monotonic() + settings.init_timeout_s
    problem: str | None = None
    for rank, link in links.items():
        match link.wait(max(0.0, deadline - time.monotonic())):
            case Ready(disk=trouble):
                problem = problem or trouble
            case Refused(problem=refusal):
                raise Broken(f"rank {rank} cannot get its host memory: {refusal}")
            case message:
                raise Broken(f"rank {rank} did not prepare its host memory in time ({message!r})")
    if problem is not None:
        log.error("KVBM: there is no disk tier (G3): %s", problem)
        if settings.strict:
            raise Broken(problem)
    return problem


# ---------------------------------------------------------------------- the disk tier


def cipher_of(settings: Settings) -> Cipher | None:
    """What encrypts the disk tier. Raises ConfigError for a key that cannot be used."""
    return Cipher.from_file(settings.g3_key_file) if settings.g3_key_file is not None else None


def _check_policies(settings: Settings) -> Placement | None:
    """Where blocks live, if there is a disk tier. Raises ConfigError before anything is waited for or touched."""
    eviction_order(settings.g2_order, 1, "g2_order")
    if settings.g3_gb is None and settings.g3_blocks is None:
        return None
    eviction_order(settings.g3_order, 1, "g3_order")
    admission(settings.g3_admission, 1, "g3_admission")
    cipher_of(settings)
    return placement(settings.placement, "placement")


def disk_folder(settings: Settings, place: Place) -> Path:
    """The folder of one engine's disk tier."""
    folder = settings.g3_dir or settings.cache_dir / "g3"
    return folder / f"dp{place.dp_rank}" if place.dp_local > 1 else folder


def _open_disk(resolved: Resolved, place: Place, namespace: Namespace, slot_bytes: int) -> NamespaceFolder | str:
    """This namespace's part of the folder, or why there is none. Raises Broken instead where `strict` is set."""
    settings = resolved.settings
    if settings.g3_blocks is not None:
        bound = bytes_of(settings.g3_blocks, place.ranks, padded(slot_bytes))
    else:
        assert settings.g3_gb is not None
        bound = int(settings.g3_gb * 1e9)
    cipher = cipher_of(settings)
    try:
        folder = Folder.claim(disk_folder(settings, place), place.engine)
        try:
            return folder.namespace(
                namespace.fingerprint, namespace.facts, ranks=place.ranks, block_bytes=slot_bytes, bound_bytes=bound,
                encryption=cipher.id if cipher else "", zerofill=settings.g3_zerofill,
            )  # fmt: skip
        except BaseException:
            folder.close()
            raise
    except Broken as error:
        if settings.strict:
            raise
        log.error("KVBM: there is no disk tier (G3): %s", error)
        return str(error)


def _lower(
    settings: Settings,
    leader: Leader,
    links: dict[int, Link],
    folder: NamespaceFolder,
    below: Placement,
    block_bytes: int,
    block_tokens: int,
) -> Lower:
    """The disk tier with what it had when the process before this one ended."""
    slots, tiers = folder.num_slots, ("g2", "g3")
    started = time.monotonic()
    pool = Pool(slots, order=eviction_order(settings.g3_order, slots), tier="g3")
    found = folder.recover()
    adopt(pool, found)
    log.info(
        "KVBM: G3 holds %d blocks, %.2f GB, in %s; %d of them are there from before (%.2f s)",
        slots, slots * block_bytes / 1e9, folder.path, len(found.slots), time.monotonic() - started,
    )  # fmt: skip
    tier = DiskTier(
        pool, links, folder, leader.gate,
        generation=folder.generation, sequence=found.next_sequence, patience=settings.g3_deadline_s + 5.0,
        next_id=leader.next_job,
    )  # fmt: skip
    in_flight = max(1, settings.g3_inflight_mb * 1_000_000 // block_bytes)
    batch = max(1, _MOVE_BYTES // block_bytes)
    quarter = leader.pool.statistics().total // 4  # of G2: what is being written is held
    demotion = Demotion(
        tier, leader.pool,
        admission=admission(settings.g3_admission, slots),
        hot=Frequency(slots),
        exclusive=isinstance(below.evict("g2", tiers), Move),
        budget=Budget(None if settings.g3_write_mb_s is None else settings.g3_write_mb_s * 1e6, time.monotonic),
        block_bytes=block_bytes, most=min(in_flight, quarter), batch=batch, emit=leader.emit,
    )  # fmt: skip
    promotion = Promotion(
        tier, leader.pool,
        exclusive=isinstance(below.promote("g3", tiers), Drop),
        most=max(1, int(leader.pool.statistics().total * settings.held_share)),
        in_flight=in_flight, batch=batch, unmeasured=min(batch, in_flight) // 8, emit=leader.emit, clock=time.monotonic,
    )  # fmt: skip
    return Lower(tier, demotion, promotion, block_tokens)
