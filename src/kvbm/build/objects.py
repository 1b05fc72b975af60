"""Shared storage, put together: what the leader and each worker need of it."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence
from functools import partial
from itertools import count
from typing import ClassVar, Final

from kvbm.abc.store import ObjectStore
from kvbm.abc.transport import Transport
from kvbm.build.parts import Ground, Needs, Wrap, open_ranks
from kvbm.build.share import budget
from kvbm.core.config import Settings
from kvbm.core.errors import Broken
from kvbm.core.keys import Namespace
from kvbm.stores.objects.cloud import Access
from kvbm.stores.objects.envelope import Envelope, read_secret
from kvbm.stores.objects.names import Names
from kvbm.stores.objects.places import Location, locate, open_store
from kvbm.stores.objects.probe import Fitness, probe, together
from kvbm.stores.objects.runs import RunFormat, Shape, digest_of, names_of, run_blocks
from kvbm.tiers.objects.clerk import Habits
from kvbm.tiers.objects.mover import Library, lanes
from kvbm.tiers.objects.orders import TIER, RunsPlace, to_open
from kvbm.tiers.objects.presence import KnownNames
from kvbm.tiers.objects.rank import CallLimits, ObjectsRank
from kvbm.tiers.objects.tier import Runs, SharedStorage
from kvbm.tiers.objects.traffic import Traffic
from kvbm.tiers.objects.uploads import UploadRules, Uploads
from kvbm.tiers.objects.warm import Warmth
from kvbm.tiers.promote import Promotion
from kvbm.tiers.tier import RankSide, Tier

log = logging.getLogger(__name__)

_MOST_LOST: Final = 8
_MOST_WAITING: Final = 4_096
"""Runs that wait to be written."""
_LATE_S: Final = 5.0
"""Seconds beyond its calls' deadlines after which a rank that says nothing counts as broken."""
_TRIAL_BYTES: Final = 1 << 16


def try_storage(settings: Settings) -> tuple[str, Fitness]:
    """The address, and whether the storage there does what KVBM needs, tried with a few small objects. Raises Broken,
    ConfigError."""
    where, store, _ = open_storage(settings)
    trial = partial(probe, store, secrets.token_hex(8), count(), _TRIAL_BYTES)
    (fitness,) = together([trial], 3 * settings.g4_deadline_s)
    store.close()
    return where, fitness


def open_storage(settings: Settings) -> tuple[str, ObjectStore, Envelope]:
    """Its address, what lies there, and how it is sealed. Connects to nothing. Raises ConfigError."""
    where = _location(settings)
    return where.url, open_store(where, _access(settings), _mode(settings)), _envelope(settings)


class ObjectsPart:
    """See `Part`."""

    name: ClassVar[str] = TIER
    large: ClassVar[bool] = False
    drains: ClassVar[bool] = True
    without: ClassVar[str] = "there is no shared storage (G4)"

    def wanted(self, settings: Settings) -> bool:
        return settings.g4_url is not None

    def check(self, settings: Settings) -> None:
        if settings.g4_url is not None:
            open_storage(settings)[1].close()

    def needs(self, slot_bytes: int) -> Needs:
        return Needs(sums="told")

    def transports(self, settings: Settings) -> list[Transport]:
        return []  # the storage's client has threads of its own

    def on_rank(self, settings: Settings, wrapped: Wrap, side: RankSide) -> ObjectsRank:
        limits = CallLimits(settings.g4_inflight_mb * 1_000_000, settings.g4_deadline_s, _MOST_LOST)
        habits = Habits(settings.g4_feed_s, int(settings.g4_gb * 1e9), settings.g4_deadline_s)
        return ObjectsRank(side, partial(_library, settings), limits, habits)

    def claim(self, ground: Ground) -> ObjectsClaim:
        if ground.grouped:
            raise Broken("not all layers of this model need all blocks of a prompt, and a run has those of all layers")
        return ObjectsClaim(ground)


class ObjectsClaim:
    """See `Claim`."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground

    def open(self, namespace: Namespace, promotion: Promotion, nearer: Sequence[Tier]) -> SharedStorage:
        ground, settings, core = self._ground, self._ground.settings, self._ground.core
        run = run_blocks(ground.block_bytes, ground.gate.block_tokens)
        warm = int(core.pool.capacity * settings.g4_warm)
        place = RunsPlace(
            namespace.fingerprint, ground.place.model, run, sorted(ground.links), secrets.token_hex(8), warm // run,
            settings.strict,
        )  # fmt: skip
        if settings.g4_secret_file is None:
            log.warning(
                "KVBM: anyone who may write to %s can forge blocks: g4_secret_file is not set", _location(settings).url
            )
        try:
            open_ranks(ground, to_open(place))
        except Broken as error:
            raise Broken(f"{_location(settings).url} (g4_url): {error}") from None
        shape = Shape(run, len(ground.links), ground.slot_bytes)
        gets, puts = lanes(settings.g4_inflight_mb * 1_000_000, shape.data_bytes)
        runs = Runs(_names(settings, namespace.fingerprint, shape), run, KnownNames(settings.g4_known))

        def uploads(objects: SharedStorage) -> Uploads:
            most = budget(settings.g4_write_mb_s, settings.g4_write_gb_day)
            rules = UploadRules(settings.g4_admission, most, run, shape.data_bytes, puts, _MOST_WAITING)
            return Uploads(objects, core.pool, rules, core.emit)

        traffic = Traffic(
            ground.links, ground.gate.beside(gets, gets * run), core.copies.next_id, time.monotonic,
            2 * settings.g4_deadline_s + _LATE_S,
        )  # fmt: skip
        return SharedStorage(
            traffic, runs, core.lower.sums(len(ground.links), core.pool.capacity), uploads,
            Warmth(core.host, traffic, warm, core.emit), time.monotonic, _location(settings).url,
        )  # fmt: skip

    def close(self) -> None:
        """Nothing was taken."""


def _location(settings: Settings) -> Location:
    assert settings.g4_url is not None
    return locate(settings.g4_url)


def _access(settings: Settings) -> Access:
    secret = settings.g4_secret_key
    return Access(
        settings.g4_deadline_s, settings.g4_endpoint, settings.g4_region, settings.g4_path_style, settings.g4_ca_file,
        settings.g4_proxy, settings.g4_access_key, None if secret is None else secret.get_secret_value(),
    )  # fmt: skip


def _mode(settings: Settings) -> int:
    return int(settings.g4_mode, 8)


def _envelope(settings: Settings) -> Envelope:
    return Envelope(None if settings.g4_secret_file is None else read_secret(settings.g4_secret_file))


def _names(settings: Settings, fingerprint: str, shape: Shape) -> Names:
    return names_of(_envelope(settings), digest_of(fingerprint), shape)


def _library(settings: Settings, place: RunsPlace, shape: Shape) -> Library:
    """A client of the storage, in the process that moves. Connects to nothing. Raises ConfigError."""
    _, store, envelope = open_storage(settings)
    names = _names(settings, place.fingerprint, shape)
    return Library(store, envelope, names, RunFormat(place.fingerprint, shape, place.model))
