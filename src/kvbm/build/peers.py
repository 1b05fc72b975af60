"""Sharing with other instances, put together: what the leader and each worker need of it."""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from kvbm import __version__
from kvbm.abc.transport import Transport
from kvbm.build import disk as build_disk
from kvbm.core.config import Settings, set_for_library
from kvbm.core.errors import ConfigError
from kvbm.core.keys import Namespace
from kvbm.leader.leader import Leader
from kvbm.link.channel import Link
from kvbm.tiers.namesakes import facts_of
from kvbm.tiers.peers.client import Us
from kvbm.tiers.peers.directory import Directory
from kvbm.tiers.peers.network import Address, Network
from kvbm.tiers.peers.published import Published
from kvbm.tiers.peers.rank import PeerMemory, PeerRank
from kvbm.tiers.peers.serving import Serving
from kvbm.tiers.peers.sums import Sums
from kvbm.tiers.peers.tier import Peers
from kvbm.tiers.promote import Promotion
from kvbm.tiers.stack import DiskSide
from kvbm.tiers.tier import RankSide
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


def check(settings: Settings) -> None:
    """Raises ConfigError for what cannot be used, before anything is waited for or touched."""
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


def on_rank(settings: Settings, wrapped: Callable[[Transport], Transport], side: RankSide) -> PeerRank:
    """One rank's part."""
    return PeerRank(side, partial(_open_memory, settings, wrapped))


def _open_memory(settings: Settings, wrapped: Callable[[Transport], Transport], side: RankSide) -> PeerMemory:
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


def peers(
    settings: Settings,
    leader: Leader,
    links: dict[int, Link],
    promotion: Promotion,
    disk: DiskSide | None,
    namespace: Namespace,
    name: str,
    dp_rank: int,
) -> Peers:
    """What the leader has of it; `links` are those of the ranks that store. Raises ConfigError, and Broken where it
    cannot be had now."""
    installed()
    secret, incarnation = _secret(settings), random.SystemRandom().getrandbits(63)
    sums = leader.earlier.sums if leader.earlier is not None else Sums(len(links), leader.pool.capacity)
    serving = Serving(
        leader.pool, promotion, sums, leader.requests,
        most=partial(build_disk.held, settings, leader.pool), seconds=settings.peer_lease_s,
        aside=leader.standing_aside, clock=time.monotonic,
    )  # fmt: skip
    pools = [leader.pool] if disk is None else [leader.pool, disk.tier.pool]
    published = Published(lambda key: any(pool.peek([key]) for pool in pools))
    for pool in pools:
        pool.add_observer(published)
    assert settings.directory is not None
    url = settings.directory
    network = Network(
        lambda: Directory(url, _shared(namespace), name, incarnation, lease_s=settings.directory_lease_s,
                          timeout=_DIRECTORY_S, facts=facts_of(namespace)),
        Us(name, incarnation, namespace.fingerprint, __version__, secret),
        Address(settings.peer_host, settings.peer_port and settings.peer_port + dp_rank), serving, published,
        leader.below,
        lease_s=settings.directory_lease_s, deadline_s=settings.peer_deadline_s, facts=facts_of(namespace),
    )  # fmt: skip
    network.wait(_START_S)
    log.info("KVBM: shares blocks with other instances as %s", name)
    return Peers(
        network, serving, published, promotion, leader.pool, leader.gate, links,
        deadline_s=settings.peer_deadline_s, patience_s=settings.pull_wait_s, keep=settings.peer_copies == "keep",
        next_id=leader.next_job, lock=leader.below, clock=time.monotonic,
    )  # fmt: skip


def _shared(namespace: Namespace) -> str:
    """The namespace's name in the directory."""
    return hashlib.sha256(namespace.fingerprint.encode()).hexdigest()
