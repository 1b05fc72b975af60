"""Sharing with other instances, put together: what the leader and each worker need of it."""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections.abc import Sequence
from functools import partial
from ipaddress import ip_address
from typing import ClassVar, Final
from urllib.parse import urlsplit

from kvbm import __version__
from kvbm.abc.transport import Transport
from kvbm.build.parts import Ground, Needs, Wrap
from kvbm.build.place import Place
from kvbm.build.share import held
from kvbm.core.config import Settings, set_for_library
from kvbm.core.errors import ConfigError
from kvbm.core.keys import Namespace
from kvbm.tiers.namesakes import facts_of
from kvbm.tiers.peers.client import Identity
from kvbm.tiers.peers.directory import Directory
from kvbm.tiers.peers.membership import Address, Membership
from kvbm.tiers.peers.network import Network
from kvbm.tiers.peers.orders import TIER
from kvbm.tiers.peers.published import Published
from kvbm.tiers.peers.rank import PeerMemory, PeerRank
from kvbm.tiers.peers.server import Server
from kvbm.tiers.peers.serving import Around, Serving
from kvbm.tiers.peers.tier import Patience, Peers
from kvbm.tiers.promote import Promotion
from kvbm.tiers.tier import RankSide, Tier
from kvbm.transfer.executor import Executor
from kvbm.transfer.nixl.agent import installed
from kvbm.transfer.nixl.transport import NixlTransport

log = logging.getLogger(__name__)

_SECRET_BYTES: Final = 16
_START_S: Final = 10.0
_DIRECTORY_S: Final = 1.0
"""The longest that the directory may take to take what is written to it."""


def wanted(settings: Settings) -> bool:
    """Whether blocks are to be shared."""
    return settings.directory is not None


class PeersPart:
    """See `Part`."""

    name: ClassVar[str] = TIER
    large: ClassVar[bool] = False
    drains: ClassVar[bool] = False
    without: ClassVar[str] = "no blocks are shared with other instances"

    def wanted(self, settings: Settings) -> bool:
        return wanted(settings)

    def check(self, settings: Settings) -> None:
        if wanted(settings):
            try:
                port = urlsplit(settings.directory or "").port
            except ValueError:
                port = 0
            if port == 0:
                raise ConfigError("directory", "its port must be a number of 1 to 65,535")
            _secret(settings)
            if settings.peer_host in ("0.0.0.0", "::"):
                raise ConfigError(
                    "peer_host", f"others cannot find this instance under {settings.peer_host}",
                    remedy="Give the address of this machine that others reach it by.",
                )  # fmt: skip

    def needs(self, slot_bytes: int) -> Needs:
        return Needs(sums="told", hurry=True)  # they read memory that is there, all of it

    def transports(self, settings: Settings) -> list[Transport]:
        return []  # theirs has a thread of its own

    def on_rank(self, settings: Settings, wrapped: Wrap, side: RankSide) -> PeerRank:
        return PeerRank(side, partial(_open_memory, settings, wrapped))

    def claim(self, ground: Ground) -> PeersClaim:
        return PeersClaim(ground)


class PeersClaim:
    """See `Claim`."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground

    def open(self, namespace: Namespace, promotion: Promotion, nearer: Sequence[Tier]) -> Peers:
        return peers(self._ground, namespace, promotion, nearer)

    def close(self) -> None:
        """Nothing was taken."""


def _secret(settings: Settings) -> bytes:
    path = settings.peer_secret_file
    if path is None:
        raise ConfigError(
            "peer_secret_file", "instances that share blocks need a secret", remedy="Name a file with the same "
            f"{_SECRET_BYTES} bytes or more for all of them, that only you can read.",
        )  # fmt: skip
    try:
        secret = path.read_bytes().strip()
        if path.stat().st_mode & 0o077:
            raise ConfigError("peer_secret_file", f"others may read {path}", remedy=f"chmod 600 {path}")
    except OSError as error:
        raise ConfigError("peer_secret_file", f"cannot read {path}: {error.strerror}") from None
    if len(secret) < _SECRET_BYTES:
        raise ConfigError("peer_secret_file", f"{path} has {len(secret)} bytes, at least {_SECRET_BYTES} are needed")
    return secret


def _open_memory(settings: Settings, wrapped: Wrap, side: RankSide) -> PeerMemory:
    """Raises Broken: NIXL is not there."""
    if _loopback(settings.peer_host):
        set_for_library("UCX_NET_DEVICES", "lo")  # or its port would be open to the world
    transport = NixlTransport("UCX")
    memory = side.memory("G2 for peers", side.slot_bytes)
    return PeerMemory(transport, Executor([wrapped(transport)]), memory, side, settings.peer_deadline_s)


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def peer_name(settings: Settings, place: Place) -> str:
    """What other instances call this one."""
    if settings.peer_name is None:
        return place.engine
    return f"{settings.peer_name}_dp{place.dp_rank}" if place.data_parallel else settings.peer_name


def peers(ground: Ground, namespace: Namespace, promotion: Promotion, nearer: Sequence[Tier]) -> Peers:
    """What the leader has of it. Raises ConfigError, and Broken where it cannot be had now."""
    installed()
    settings, core = ground.settings, ground.core
    name = peer_name(settings, ground.place)
    secret, incarnation = _secret(settings), random.SystemRandom().getrandbits(63)
    sums = core.lower.sums(len(ground.links), core.pool.capacity)
    around = Around(
        lambda seeker, wanted: promotion.begin(seeker, wanted, nearer), promotion.drop, promotion.coming,
        ground.expects, core.health.aside,
    )  # fmt: skip
    most = partial(held, settings, core.pool)
    serving = Serving(core.pool, sums, around, most=most, seconds=settings.peer_lease_s, clock=time.monotonic)
    pools = [core.pool, *(tier.pool for tier in nearer if tier.pool is not None)]
    published = Published(lambda key: any(pool.peek([key]) for pool in pools))
    for pool in pools:
        pool.add_observer(published)
    assert settings.directory is not None
    url, port = settings.directory, settings.peer_port and settings.peer_port + ground.place.dp_rank
    lease_s, deadline_s, facts = settings.directory_lease_s, settings.peer_deadline_s, facts_of(namespace)
    us = Identity(name, incarnation, namespace.fingerprint, __version__, secret)
    directory = partial(
        Directory, url, _shared(namespace), name, incarnation, lease_s=lease_s, timeout=_DIRECTORY_S, facts=facts
    )
    address = Address(settings.peer_host, port)
    members = Membership(directory, address, published, lease_s=lease_s, facts=facts)
    network = Network(us, members, Server(us, serving, core.below, deadline_s), deadline_s=deadline_s)
    network.wait(_START_S)
    log.info("KVBM: shares blocks with other instances as %s", name)
    return Peers(
        network, serving, published,
        Patience(ground.gate, time.monotonic, deadline_s=deadline_s, pull_s=settings.pull_wait_s), ground.links,
        keeps=settings.peer_copies == "keep", next_id=core.copies.next_id, lock=core.below,
    )  # fmt: skip


def _shared(namespace: Namespace) -> str:
    """The namespace's name in the directory."""
    return hashlib.sha256(namespace.fingerprint.encode()).hexdigest()
