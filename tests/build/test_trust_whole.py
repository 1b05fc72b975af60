"""Leader and workers put together: wrong bytes in host memory, planted blocks, copies that hang."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm.core.events import Admitted
from kvbm.leader.requests import RequestParams
from tests.build.whole import ROWS, TOKENS, Engine, kv
from tests.leader.roles import keys_of

Make = Callable[..., Engine]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    engines: list[Engine] = []

    def start(ranks: int = 1, **settings: Any) -> Engine:
        engine = Engine(tmp_path, ranks, **{"g3_blocks": None, "cache_dir": str(tmp_path / "cache")} | settings)
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.close()


def numbers(key: bytes, rank: int) -> bytes:
    """KV that is made of float32."""
    dice = np.random.default_rng([*key, rank])
    return dice.normal(size=sum(ROWS) // 4).astype(np.float32).tobytes()


def compute(engine: Engine, keys: Sequence[bytes], *, noise: float = 0.0) -> int | None:
    """A request that computes all that it is not given; returns how many blocks it was."""
    name = f"c{next(engine.names)}"
    engine.leader.begin(name, keys, RequestParams(), (len(keys) + 1) * TOKENS)
    found = engine.leader.match(name, 0, len(keys))
    blocks = list(range(len(keys)))
    engine.leader.place(name, blocks, found or 0, Admitted(len(keys) * TOKENS, 0, 0))
    engine.step(name, 0)
    engine.until(lambda: engine.leader.core.in_flight() == (0, 0))
    for rank, memory in enumerate(engine.g1):
        for block in blocks[found:]:
            values = np.frombuffer(numbers(keys[block], rank), np.float32)
            wobble = 1 + noise * np.random.default_rng(block).normal(size=len(values)).astype(np.float32)
            memory.put(block, (values * wobble).astype(np.float32).tobytes())
    engine.step(name, len(keys))
    engine.until(lambda: engine.leader.core.in_flight() == (0, 0))
    engine.leader.finish(name, blocks, len(keys))
    engine.step(name, 0)
    return found


def shadowed(make: Make, ranks: int = 1, **settings: Any) -> Engine:
    engine = make(ranks, g2_blocks=64, shadow_every=1, **settings)
    for worker in engine.workers:
        worker.copying.comparisons.dtype = "float32"
    return engine


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_computed_again_is_compared_on_every_rank(make: Make, ranks: int) -> None:
    engine, keys = shadowed(make, ranks), keys_of("a", 5)
    assert compute(engine, keys) == 0
    assert compute(engine, keys, noise=1e-6) == 0
    shadow = engine.leader.shadow
    assert shadow is not None
    assert (shadow.sampled, shadow.compared, shadow.wrong, shadow.skipped, shadow.held) == (1, 5, 0, 0, 0)
    assert engine.leader.core.health.quarantined is None
    assert engine.leader.check(10)["problems"] == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_block_of_another_prompt_is_found_on_either_rank(make: Make, rank: int) -> None:
    engine, keys, others = shadowed(make, 2), keys_of("a", 5), keys_of("b", 5)
    compute(engine, keys)
    compute(engine, others)
    ours, theirs = engine.leader.core.pool.look(keys[3]), engine.leader.core.pool.look(others[3])
    assert ours is not None
    assert theirs is not None
    region = engine.workers[rank].memory.g2
    assert region is not None
    start, size = region.planes[0].address, region.planes[0].stride
    ctypes.memmove(start + ours.slot * size, start + theirs.slot * size, size)
    assert compute(engine, keys) == 0
    assert engine.leader.core.health.quarantined is not None
    assert engine.leader.core.pool.statistics().registered == 0


def test_what_has_no_known_numbers_is_skipped(make: Make) -> None:
    engine, keys = make(g2_blocks=64, shadow_every=1), keys_of("a", 5)
    compute(engine, keys)
    compute(engine, keys)
    shadow = engine.leader.shadow
    assert shadow is not None
    assert (shadow.compared, shadow.skipped, engine.leader.core.health.quarantined) == (0, 5, None)


def test_a_quarantine_outlives_a_restart(make: Make, tmp_path: Path) -> None:
    engine, keys = shadowed(make, g3_blocks=64), keys_of("a", 5)
    compute(engine, keys)
    engine.settle()
    assert engine.disk.peek(keys) == 5
    region = engine.workers[0].memory.g2
    assert region is not None
    ctypes.memset(region.planes[0].address, 0, 64 * region.planes[0].stride)
    compute(engine, keys)
    assert engine.leader.core.health.quarantined is not None
    engine.until(lambda: not engine.leader.core.lower.degraded())
    engine.close()
    again = make(g3_blocks=64, engine="f")
    assert again.disk.peek(keys) == 0


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("onboard", ["async", "sync"])
def test_bits_that_flip_in_host_memory(make: Make, verify: bool, onboard: str) -> None:
    engine, keys = make(2, g2_verify=verify, onboard=onboard), keys_of("a", 5)
    engine.serve(keys)
    block = engine.leader.core.pool.look(keys[2])
    region = engine.workers[1].memory.g2
    assert block is not None
    assert region is not None
    at = region.planes[0].address + block.slot * region.planes[0].stride + 777
    ctypes.memset(at, ctypes.string_at(at, 1)[0] ^ 4, 1)
    if not verify:
        with pytest.raises(AssertionError, match="wrong bytes were served"):
            engine.serve(keys)
        return
    name = "r"
    engine.leader.begin(name, keys, RequestParams(), 6 * TOKENS)
    assert engine.leader.match(name, 0, 5) == 5
    engine.leader.place(name, list(range(5)), 5, Admitted(5 * TOKENS, 0, 5 * TOKENS))
    step = engine.leader.seal(tokens=0)
    for worker in engine.workers:
        worker.before_step(step)
        worker.before_forward(step)
    engine.until(lambda: engine.leader.core.in_flight() == (0, 0))
    if onboard == "sync":
        assert [worker.take_bad_blocks() for worker in engine.workers] == [set(), {2}]
    else:
        ended = [worker.collect(idle=False) for worker in engine.workers]
        assert [each.failed for each in ended] == [set(), {name}]
    assert engine.leader.core.counts.corrupt == 1
    assert engine.leader.core.pool.peek(keys) == 2  # the bad one is gone, and nothing else
    assert engine.leader.core.pool.absent(keys) == [2]
    engine.leader.finish(name, list(range(5)), 0)


@pytest.mark.parametrize("verify", [True, False])
def test_bits_that_flip_on_the_way_to_host_memory(make: Make, verify: bool) -> None:
    """A checksum is that of the engine's bytes, not of what became of them."""
    engine, keys = make(g2_verify=verify, transport_wrapper="kvbm.testing.faults:build?store_flip=1"), keys_of("a", 5)
    engine.serve(keys)
    if verify:
        assert engine.serve(keys) == 0
        assert engine.leader.core.counts.corrupt == 5
    else:
        with pytest.raises(AssertionError, match="wrong bytes were served"):
            engine.serve(keys)


def test_a_copy_that_hangs_costs_its_deadline_and_no_more(make: Make) -> None:
    wrapper = "kvbm.testing.faults:build?load_delay=600"
    engine, keys = make(transport_wrapper=wrapper, load_deadline_s=0.3), keys_of("a", 5)
    assert engine.serve(keys) == 0
    name, begun = "r", time.monotonic()
    engine.leader.begin(name, keys, RequestParams(), 6 * TOKENS)
    assert engine.leader.match(name, 0, 5) == 5
    engine.leader.place(name, list(range(5)), 5, Admitted(5 * TOKENS, 0, 5 * TOKENS))
    engine.step(name, 0)
    failed: set[str] = set()
    while not failed:
        engine.step(name, 0)
        failed = engine.workers[0].collect(idle=True).failed
        assert time.monotonic() - begun < 20
    assert failed == {name}
    engine.until(lambda: engine.leader.core.in_flight() == (0, 0))
    assert engine.leader.core.pool.peek(keys) == 0
    assert engine.side.control.health()["healthy"]
    engine.leader.finish(name, list(range(5)), 0)


def test_kv_of_the_tests_is_what_it_says() -> None:
    assert len(kv(b"k", 0)) == len(numbers(b"k" * 32, 0)) == sum(ROWS)
