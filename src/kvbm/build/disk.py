"""The disk tier, put together: its policies, its folder, its transport, what the leader and each worker need of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from kvbm.abc.policy import Drop, Move
from kvbm.blocks import Pool
from kvbm.core.config import Settings
from kvbm.core.errors import Broken, ConfigError
from kvbm.core.keys import Namespace
from kvbm.leader.leader import Leader
from kvbm.link.channel import Link
from kvbm.policy import admission, eviction_order, placement
from kvbm.policy.admissions import Frequency
from kvbm.stores.disk.cipher import Cipher
from kvbm.stores.disk.disk import Disk
from kvbm.stores.disk.folder import Folder, NamespaceFolder
from kvbm.stores.disk.format import padded
from kvbm.stores.disk.meta import Place, as_facts, bytes_of, listed
from kvbm.stores.disk.recovery import Recovered
from kvbm.stores.disk.shard import Shard
from kvbm.tiers.demote import Budget, Demotion
from kvbm.tiers.disk.adopt import adopt
from kvbm.tiers.disk.rank import DiskRank
from kvbm.tiers.disk.tier import DiskSource, DiskTier
from kvbm.tiers.namesakes import NAME, Namesake, facts_of, told, unnamed
from kvbm.tiers.promote import Promotion
from kvbm.tiers.stack import DiskSide
from kvbm.tiers.tier import RankSide
from kvbm.transfer.file import FileTransport

log = logging.getLogger(__name__)

_RINGS, _DEPTH = 3, 64
"""With io_uring: threads that move blocks to and from disk, and operations that each has in flight."""
_THREADS = 16
"""Without: threads, each with one operation in flight."""
_MOVE_BYTES: Final = 32 << 20
"""Bytes that are moved between host memory and disk at once, over all ranks: what has arrived can be used while the
rest is on its way. Each move has work of its own, which costs a fast disk up to a tenth with half of this."""
_TIERS: Final = ("g2", "g3")
_UNMEASURED: Final = 16
"""The first moves, while nothing is known about the disk, are this part of that."""


@dataclass(frozen=True, slots=True)
class Found:
    """This namespace's part of the folder, and what was in it at the start."""

    folder: NamespaceFolder
    blocks: Recovered
    namesakes: tuple[str, ...] = ()
    """Where there was nothing: why blocks of the same model that lie beside it are not found."""


def wanted(settings: Settings) -> bool:
    """Whether there is to be a disk tier."""
    return settings.g3_gb is not None or settings.g3_blocks is not None


def check(settings: Settings) -> None:
    """Raises ConfigError for a policy, a folder or a key that cannot be used, before anything is waited for or
    touched."""
    eviction_order(settings.g3_order, 1, "g3_order")
    admission(settings.g3_admission, 1, "g3_admission")
    placement(settings.placement)
    if wanted(settings):
        _cipher(settings)
        if settings.g3_engine == "io_uring":
            transport(settings).close()


def transport(settings: Settings) -> FileTransport:
    """What moves blocks to and from disk. Raises ConfigError where `g3_engine` asks for what this kernel refuses."""
    if settings.g3_engine != "threads":
        try:
            rings = FileTransport(_RINGS, _DEPTH, settings.g3_engine)
        except Broken as error:
            raise ConfigError("g3_engine", str(error), remedy="Use auto, or threads.") from None
        if rings.engine == "io_uring":
            return rings
        rings.close()
    return FileTransport(_THREADS, 1, "threads")


def on_rank(settings: Settings, side: RankSide) -> DiskRank:
    """One rank's part."""
    return DiskRank(side, partial(_open_shard, settings), settings.g3_deadline_s)


def _open_shard(settings: Settings, place: Place, side: RankSide) -> Disk:
    shard = Shard(place, side.rank, sync=settings.g3_sync, direct=settings.g3_direct)
    memory, executor = side.memory("G2 for the disk"), side.executor
    return Disk(shard, memory, executor.submit, executor.cancel, cipher=_cipher(settings))


def find(
    settings: Settings, folder: Folder, ranks: int, namespace: Namespace, slot_bytes: int, model: str = ""
) -> Found:  # fmt: skip
    """Look into this namespace's part of the folder, which people know by the name of its `model`. Raises Broken."""
    if settings.g3_blocks is not None:
        bound = bytes_of(settings.g3_blocks, ranks, padded(slot_bytes))
    else:
        assert settings.g3_gb is not None
        bound = int(settings.g3_gb * 1e9)
    cipher, started = _cipher(settings), time.monotonic()
    facts = facts_of(namespace)
    part = folder.namespace(
        namespace.fingerprint, facts | ({NAME: model} if model else {}),
        ranks=ranks, block_bytes=slot_bytes, bound_bytes=bound, encryption=cipher.id if cipher else "",
        zerofill=settings.g3_zerofill,
    )  # fmt: skip
    blocks = part.recover()
    found = Found(part, blocks, () if len(blocks.slots) else tuple(_namesakes(folder.path, part, facts)))
    log.info(
        "KVBM: G3 holds %d blocks, %.2f GB, in %s; %d of them are there from before (%.2f s)",
        part.num_slots, part.num_slots * slot_bytes * ranks / 1e9, part.path, len(found.blocks.slots),
        time.monotonic() - started,
    )  # fmt: skip
    return found


def _namesakes(path: Path, mine: NamespaceFolder, facts: Mapping[str, object]) -> list[str]:
    """What else of the same model lies there."""
    encrypted = {"encryption": mine.meta.encryption or "none"}
    others = [
        Namesake(f"on disk, {one.path}", unnamed(one.meta.facts) | {"encryption": one.meta.encryption or "none"})
        for one in listed(path)
        if one.meta is not None and one.path != mine.path
    ]
    for sentence in (sentences := told(as_facts({**facts, **encrypted}), others)):
        log.warning("KVBM: %s", sentence)
    return sentences


def promotion(settings: Settings, leader: Leader, disk: DiskSide | None, block_bytes: int) -> Promotion:
    """What brings blocks up to host memory. `block_bytes` are those of a block over all ranks."""
    batch = max(1, _MOVE_BYTES // block_bytes)
    in_flight = max(1, settings.g3_inflight_mb * 1_000_000 // block_bytes)
    return Promotion(
        None if disk is None else DiskSource(disk.tier), leader.host,
        most=partial(held, settings, leader.pool),
        in_flight=in_flight, batch=batch, unmeasured=min(batch, in_flight) // _UNMEASURED,
        emit=leader.emit, clock=time.monotonic,
    )  # fmt: skip


def held(settings: Settings, g2: Pool) -> int:
    """Blocks that waiting requests, or other instances, may hold of those that G2 has now."""
    return max(1, int(g2.total * settings.held_share))


def disk_side(
    settings: Settings, leader: Leader, links: Mapping[int, Link], found: Found, block_bytes: int
) -> DiskSide:
    """What the leader has of the tier. `block_bytes` are those of a block over all ranks."""
    slots, below = found.folder.num_slots, placement(settings.placement)
    pool = Pool(slots, order=eviction_order(settings.g3_order, slots), tier="g3")
    adopt(pool, found.blocks)
    tier = DiskTier(
        pool, links, found.folder, leader.gate,
        generation=found.folder.generation, sequence=found.blocks.next_sequence,
        patience=settings.g3_deadline_s + 5.0, next_id=leader.next_job,
    )  # fmt: skip
    in_flight = max(1, settings.g3_inflight_mb * 1_000_000 // block_bytes)
    batch = max(1, _MOVE_BYTES // block_bytes)
    demotion = Demotion(
        tier, leader.pool,
        admission=admission(settings.g3_admission, slots),
        hot=Frequency(slots),
        exclusive=isinstance(below.evict("g2", _TIERS), Move),
        budget=_budget(settings),
        block_bytes=block_bytes,
        most=lambda: min(in_flight, leader.pool.total // 4),  # what is being written is held
        batch=batch, emit=leader.emit,
    )  # fmt: skip
    return DiskSide(tier, demotion, exclusive=isinstance(below.promote("g3", _TIERS), Drop))


def _budget(settings: Settings) -> Budget:
    if settings.g3_write_mb_s is not None:
        return Budget(settings.g3_write_mb_s * 1e6 * 3600, 3600, time.monotonic)
    day = settings.g3_write_gb_day
    return Budget(None if day is None else day * 1e9, 86_400, time.monotonic)


def _cipher(settings: Settings) -> Cipher | None:
    return Cipher.from_file(settings.g3_key_file) if settings.g3_key_file is not None else None
