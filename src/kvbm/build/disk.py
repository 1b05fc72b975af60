"""The disk tier, put together: its policies, its folder, its transport, what the leader and each worker need of it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Final, NamedTuple

from kvbm.abc.policy import Drop, Move, Placement
from kvbm.abc.transport import Transport
from kvbm.blocks import Pool
from kvbm.build.parts import MOVE_BYTES, Ground, Needs, Wrap, open_ranks
from kvbm.build.place import Place
from kvbm.build.share import budget
from kvbm.core.config import Settings
from kvbm.core.errors import Broken, ConfigError
from kvbm.core.folders import NO_HOME
from kvbm.core.keys import Namespace
from kvbm.policy import admission, eviction_order, placement
from kvbm.policy.admissions import Frequency
from kvbm.policy.placements import Exclusive, WriteThrough
from kvbm.stores.disk.cipher import Cipher
from kvbm.stores.disk.disk import Disk
from kvbm.stores.disk.folder import Folder, NamespaceFolder
from kvbm.stores.disk.format import padded
from kvbm.stores.disk.meta import DiskPlace, as_facts, bytes_of, listed
from kvbm.stores.disk.recovery import Recovered
from kvbm.stores.disk.shard import Shard
from kvbm.tiers.demote import Demotion, Rules
from kvbm.tiers.disk.adopt import adopt
from kvbm.tiers.disk.folder import Generations
from kvbm.tiers.disk.orders import TIER, to_open
from kvbm.tiers.disk.rank import DiskRank
from kvbm.tiers.disk.side import DiskSide
from kvbm.tiers.disk.tier import DiskTier
from kvbm.tiers.namesakes import NAME, Namesake, facts_of, told, unnamed
from kvbm.tiers.promote import Promotion
from kvbm.tiers.tier import RankSide, Tier
from kvbm.transfer.file import FileTransport

log = logging.getLogger(__name__)

_RINGS, _DEPTH = 3, 64
"""With io_uring: threads that move blocks to and from disk, and operations that each has in flight."""
_THREADS = 16
"""Without: threads, each with one operation in flight."""
_TIERS: Final = ("g2", TIER)


def wanted(settings: Settings) -> bool:
    """Whether there is to be a disk tier."""
    return settings.g3_gb is not None or settings.g3_blocks is not None


class DiskPart:
    """See `Part`."""

    name: ClassVar[str] = TIER
    large: ClassVar[bool] = True
    drains: ClassVar[bool] = True
    without: ClassVar[str] = "there is no disk tier (G3)"

    def wanted(self, settings: Settings) -> bool:
        return wanted(settings)

    def check(self, settings: Settings) -> None:
        eviction_order(settings.g3_order, 1, "g3_order")
        admission(settings.g3_admission, 1, "g3_admission")
        below = placement(settings.placement)
        if wanted(settings):
            _check_placement(settings.placement, below)
            _cipher(settings)
            if settings.g3_engine == "io_uring":
                transport(settings).close()

    def needs(self, slot_bytes: int) -> Needs:
        return Needs(stride=padded(slot_bytes), sums="made")  # direct I/O wants whole pages

    def transports(self, settings: Settings) -> list[Transport]:
        return [transport(settings)]

    def on_rank(self, settings: Settings, wrapped: Wrap, side: RankSide) -> DiskRank:
        return DiskRank(side, partial(_open_shard, settings), settings.g3_deadline_s)

    def claim(self, ground: Ground) -> DiskClaim:
        return DiskClaim(ground, Folder.claim(disk_folder(ground.settings, ground.place), ground.place.engine))


def _check_placement(name: str, asked: Placement) -> None:
    """Raises ConfigError for one whose answers an engine does not follow: it would serve, and do something else."""

    def answers(placement: Placement) -> tuple[object, ...]:
        leaves = tuple(placement.evict(tier, _TIERS) for tier in _TIERS)
        return tuple(placement.store(_TIERS)), placement.promote(TIER, _TIERS), *leaves

    try:
        theirs = answers(asked)
    except Exception as error:
        raise ConfigError("placement", f"{name!r} cannot be used: {error!r}") from error
    if theirs not in (answers(WriteThrough()), answers(Exclusive())):
        raise ConfigError(
            "placement", f"an engine follows write-through and exclusive alone, and {name!r} is neither of these two",
            remedy="Use one of them; kvbm replay follows any.",
        )  # fmt: skip


class DiskClaim:
    """See `Claim`."""

    def __init__(self, ground: Ground, folder: Folder) -> None:
        self._ground, self._folder = ground, folder

    def open(self, namespace: Namespace, promotion: Promotion, nearer: Sequence[Tier]) -> DiskSide:
        ground = self._ground
        found = find(ground, self._folder, namespace)
        open_ranks(ground, to_open(found.folder.place))
        return _side(ground, found)

    def close(self) -> None:
        self._folder.close()


def disk_folder(settings: Settings, place: Place) -> Path:
    """The folder of one engine's disk tier. Raises Broken: nothing says where it could be."""
    folder = settings.g3_dir or (settings.cache_dir and settings.cache_dir / "g3")
    if folder is None:
        raise Broken(f"{NO_HOME}: say with g3_dir (KVBM_G3_DIR) where the disk tier is to be")
    try:
        os.fspath(folder).encode()
    except UnicodeEncodeError:
        raise Broken(f"the name of the folder {os.fsencode(folder)!r} is not UTF-8") from None
    return folder / f"dp{place.dp_rank}" if place.data_parallel else folder


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


def _open_shard(settings: Settings, place: DiskPlace, side: RankSide) -> Disk:
    shard = Shard(place, side.rank, sync=settings.g3_sync, direct=settings.g3_direct)
    memory, executor = side.memory("G2 for the disk"), side.executor
    return Disk(shard, memory, executor.submit, executor.cancel, cipher=_cipher(settings))


class FolderFound(NamedTuple):
    """This namespace's part of the folder, and what was in it at the start."""

    folder: NamespaceFolder
    blocks: Recovered
    namesakes: tuple[str, ...] = ()
    """Where there was nothing: why blocks of the same model that lie beside it are not found."""


def find(ground: Ground, folder: Folder, namespace: Namespace) -> FolderFound:
    """Look into this namespace's part of the folder, which people know by the name of its model. Raises Broken."""
    settings, slot_bytes, ranks = ground.settings, ground.slot_bytes, len(ground.links)
    if settings.g3_blocks is not None:
        bound = bytes_of(settings.g3_blocks, ranks, padded(slot_bytes))
    else:
        assert settings.g3_gb is not None
        bound = int(settings.g3_gb * 1e9)
    cipher, started, model = _cipher(settings), time.monotonic(), ground.place.model
    facts = facts_of(namespace)
    part = folder.namespace(
        namespace.fingerprint, facts | ({NAME: model} if model else {}),
        ranks=ranks, block_bytes=slot_bytes, bound_bytes=bound, encryption=cipher.id if cipher else "",
        zerofill=settings.g3_zerofill,
    )  # fmt: skip
    blocks = part.recover()
    found = FolderFound(part, blocks, () if len(blocks.slots) else tuple(_namesakes(folder.path, part, facts)))
    log.info(
        "KVBM: G3 holds %d blocks, %.2f GB, in %s; %d of them are there from before (%.2f s)",
        part.num_slots, part.num_slots * slot_bytes * ranks / 1e9, part.path, len(blocks.slots),
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


def _side(ground: Ground, found: FolderFound) -> DiskSide:
    settings, core, part, blocks = ground.settings, ground.core, found.folder, found.blocks
    slots, below = part.num_slots, placement(settings.placement)
    pool = Pool(slots, order=eviction_order(settings.g3_order, slots), tier=TIER)
    adopt(pool, blocks)
    tier = DiskTier(
        pool, ground.links, Generations(part, part.generation), ground.gate,
        sequence=blocks.next_sequence,
        patience=settings.g3_deadline_s + 5.0, next_id=core.copies.next_id,
    )  # fmt: skip
    in_flight = max(1, settings.g3_inflight_mb * 1_000_000 // ground.block_bytes)
    rules = Rules(
        admission(settings.g3_admission, slots),
        Frequency(slots),
        budget(settings.g3_write_mb_s, settings.g3_write_gb_day),
        exclusive=isinstance(below.evict("g2", _TIERS), Move),
        block_bytes=ground.block_bytes,
        batch=MOVE_BYTES // ground.block_bytes,
    )
    most = partial(_writing, in_flight, core.pool)
    demotion = Demotion(tier, core.pool, rules, most=most, emit=core.emit)
    exclusive = isinstance(below.promote(TIER, _TIERS), Drop)
    return DiskSide(tier, demotion, exclusive=exclusive, folder=part.path, namesakes=found.namesakes)


def _writing(most: int, g2: Pool) -> int:
    """Blocks that may be written at once: they are held meanwhile."""
    return min(most, g2.total // 4)


def _cipher(settings: Settings) -> Cipher | None:
    return Cipher.from_file(settings.g3_key_file) if settings.g3_key_file is not None else None
