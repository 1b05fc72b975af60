"""Instances that share blocks, with a real directory: in this process, their engines played by the test."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbm.tiers.peers.tier import Peers
from tests.build.whole import Engine
from tests.valkey import Server

PATIENCE = 20.0


@pytest.fixture
def valkey() -> Iterator[Server]:
    server = Server()
    yield server
    server.kill()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("0123456789abcdef")
    path.chmod(0o600)
    return path


def peers_of(engine: Engine) -> Peers:
    assert engine.leader.core.lower.stack is not None
    peers = engine.leader.core.lower.stack.tiers["peers"]
    assert isinstance(peers, Peers)
    return peers


def know_each_other(*engines: Engine) -> None:
    """Waits until each has said where its memory is, and knows of all others."""
    deadline = time.monotonic() + PATIENCE
    for engine in engines:
        network = peers_of(engine).network
        while len(network.peers) < len(engines) - 1 or not network.server.slabs[0]:
            engine.leader.core.tick()
            assert time.monotonic() < deadline, (network.peers, network.problem, engine.leader.core.lower.degraded())
            time.sleep(0.01)


def published(engine: Engine, count: int) -> None:
    """Waits until the directory has so many entries of it."""
    deadline = time.monotonic() + PATIENCE
    while len(peers_of(engine).published) != count or peers_of(engine).published.pending:
        assert time.monotonic() < deadline
        time.sleep(0.01)


Start = Callable[..., Engine]


@pytest.fixture
def start(tmp_path: Path, valkey: Server, secret: Path) -> Iterator[Start]:
    engines: list[Engine] = []

    def make(name: str, ranks: int = 1, **settings: Any) -> Engine:
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        chosen = {
            "g3_blocks": None, "directory": valkey.url, "peer_secret_file": str(secret), "directory_lease_s": 1.0,
        } | settings  # fmt: skip
        engines.append(Engine(path, ranks, engine=name, **chosen))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
