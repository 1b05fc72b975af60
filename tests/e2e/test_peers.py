"""Two engines that share blocks: what one has computed the other loads."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.e2e.conftest import downloaded_elsewhere, prompt_of
from tests.e2e.engine import Done, Engine
from tests.e2e.soak_peers import soak
from tests.valkey import Server

Plain = Callable[..., list[Done]]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    server = Server()
    secret = tmp_path_factory.mktemp("peers") / "secret"
    secret.write_text("0123456789abcdef")
    secret.chmod(0o600)
    yield {"directory": server.url, "peer_secret_file": str(secret), "directory_lease_s": 2.0}
    server.kill()


@pytest.fixture(scope="module")
def first(tiny: Path, settings: dict[str, object]) -> Iterator[Engine]:
    engine = Engine(tiny, settings)
    yield engine
    engine.close()


def know(*engines: Engine) -> None:
    """Waits until each knows all others, and the directory what each has."""
    deadline = time.monotonic() + 20
    for engine in engines:
        peers = engine.leader.lower.peers
        while (
            len(peers.network.peers) < len(engines) - 1 or not peers.network.server.slabs[0] or peers.published.pending
        ):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_what_one_computed_the_other_loads(
    tiny: Path, plain: Plain, dice: random.Random, settings: dict[str, object], first: Engine, tmp_path: Path
) -> None:
    """It has the model from elsewhere."""
    prompts = [prompt_of(dice, length) for length in (100, 320, 601)]
    expected = [done.tokens for done in plain(prompts, 24)]
    with closing(Engine(downloaded_elsewhere(tiny, tmp_path), settings)) as second:
        know(first, second)
        assert [done.tokens for done in first.run(prompts, 24)] == expected
        first.settle()
        know(first, second)
        results = second.run(prompts, 24)
        assert [done.tokens for done in results] == expected
        assert [done.cached for done in results] == [96, 288, 576]
        status = second.status()
        assert status["tokens"]["peer"] == 96 + 288 + 576
        assert status["fetch"]["failed"] == status["sharing"]["peer_corrupt"] == 0
        assert status["peers"]
        second.leader.pool.check()
        statistics = second.leader.pool.statistics()
        assert (statistics.active, statistics.staged, statistics.orphaned) == (0, 0, 0)


def test_wrong_bytes_change_the_answer(
    tiny: Path, plain: Plain, dice: random.Random, settings: dict[str, object], first: Engine
) -> None:
    """The negative control: if what a peer gave is overwritten after it was verified, outputs differ."""
    prompts = [prompt_of(dice, 320) for _ in range(3)]
    expected = [done.tokens for done in plain(prompts, 24)]
    assert [done.tokens for done in first.run(prompts, 24)] == expected
    first.settle()
    garbled = settings | {"transport_wrapper": "kvbm.testing.faults:build?load_garble=1"}
    with closing(Engine(tiny, garbled)) as second:
        know(first, second)
        assert [done.tokens for done in second.run(prompts, 24)] != expected
        assert second.status()["tokens"]["peer"] > 0


def test_a_decode_engine_waits_for_what_a_prefill_engine_computes(
    tiny: Path, plain: Plain, dice: random.Random, settings: dict[str, object], first: Engine
) -> None:
    """Disaggregated serving: both get the request at once, and the one that answers computes the last block only."""
    prompts = [prompt_of(dice, length) for length in (320, 601)]
    expected = [done.tokens for done in plain(prompts, 24)]
    name = first.leader.lower.peers.network._us.name
    with closing(Engine(tiny, settings)) as second:
        know(first, second)
        for prompt, answer in zip(prompts, expected, strict=True):
            request = second.add(prompt, 24, params={"pull_from": name})
            for _ in range(20):  # it is there before the other one, and waits
                second.step()
            assert not second.results[request].tokens
            first.add(prompt, 1)
            deadline = time.monotonic() + 30
            while not second.results[request].reason:
                first.step()
                second.step()
                assert time.monotonic() < deadline
            first.drain()
            done = second.results[request]
            assert done.tokens == answer
            assert done.cached == 0, "it was computed for this very request"
        tokens = second.status()["tokens"]
        assert (tokens["pulled"], tokens["peer"], tokens["g2"]) == (288 + 576, 0, 0)
        assert second.status()["hit_rate"]["g2"] == 0
        second.settle()
        second.forget_device()
        assert [done.cached for done in second.run(prompts, 24)] == [288, 576]
        assert second.status()["tokens"]["g2"] == 288 + 576


def test_a_short_soak(tmp_path: Path) -> None:
    """The short form of `python -m tests.e2e.soak_peers`."""
    result = soak(0.5, 14.0, tmp_path)
    assert result.problem() is None, result
    assert result.kills >= 1
