"""The engine serves, and has hits, while most of G2 is still being touched."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.e2e.conftest import prompt_of
from tests.e2e.engine import Done, Engine

Plain = Callable[..., list[Done]]
SLICES = 15
"""Of 64 MiB: what G2 has in these tests, the last not quite."""


def engine_of(model: Path, **settings: object) -> Engine:
    return Engine(model, {"g2_blocks": None, "g2_gb": 1.0, **settings})


def slowly(**options: float) -> str:
    return "tests.e2e.slowly:build?" + "&".join(f"{name}={value}" for name, value in options.items())


def again(engine: Engine, prompts: list[list[int]]) -> list[Done]:
    """The same prompts, once the engine itself has lost them."""
    engine.settle()
    engine.forget_device()
    return engine.run(prompts, 24)


def spoil(engine: Engine) -> None:
    """Whatever slot there is: on a slow machine blocks lie in those that came later."""
    size, some = g2(engine)[0] * engine.status()["block_bytes"], random.Random(0).randbytes(1 << 20)
    with engine.arena().open("r+b") as memory:
        for at in range(0, size, len(some)):
            memory.write(some[: size - at])


def g2(engine: Engine) -> tuple[int, int]:
    """How many slots there are, and will be."""
    (tier,) = engine.status()["tiers"]
    return tier["total"], tier["capacity"]


def until_ready(engine: Engine) -> None:
    deadline = time.monotonic() + 120
    while len(set(g2(engine))) > 1:
        time.sleep(0.1)
        assert time.monotonic() < deadline


@pytest.mark.parametrize("verify", [True, False])
def test_it_serves_while_host_memory_is_touched(tiny: Path, plain: Plain, dice: random.Random, verify: bool) -> None:
    prompts = [prompt_of(dice, length) for length in (100, 320, 601)]
    expected = [done.tokens for done in plain(prompts, 24)]
    with closing(engine_of(tiny, transport_wrapper=slowly(wait=1.0), g2_verify=verify)) as engine:
        first, capacity = g2(engine)
        assert first < capacity / 4
        assert [done.tokens for done in engine.run(prompts, 24)] == expected
        twice = again(engine, prompts)
        assert [done.tokens for done in twice] == expected
        assert [done.cached for done in twice] == [96, 288, 576]
        spoil(engine)
        assert ([done.tokens for done in again(engine, prompts)] == expected) == verify
        assert (engine.status()["trust"]["corrupt"] > 0) == verify
        total, _ = g2(engine)
        assert total < capacity, "it was over before: this shows nothing"
        until_ready(engine)
        assert total < engine.leader.pool.total == capacity
        engine.leader.pool.check()
        others = [prompt_of(dice, 320)]
        expected = [done.tokens for done in plain(others, 24)]
        assert [done.tokens for done in engine.run(others, 24)] == expected
        assert [(done.tokens, done.cached) for done in again(engine, others)] == [(expected[0], 288)]


def test_memory_that_ends_on_the_way_costs_slots_and_nothing_else(
    tiny: Path, plain: Plain, dice: random.Random
) -> None:
    prompts = [prompt_of(dice, length) for length in (100, 320)]
    expected = [done.tokens for done in plain(prompts, 24)]
    with closing(engine_of(tiny, transport_wrapper=slowly(wait=0.05, slices=5))) as engine:
        assert [done.tokens for done in engine.run(prompts, 24)] == expected
        deadline = time.monotonic() + 60
        while not engine.status()["smaller"]:
            time.sleep(0.05)
            assert time.monotonic() < deadline
        total, capacity = g2(engine)
        assert capacity * 4 // SLICES < total < capacity * 6 // SLICES
        assert "are still to be allocated, 0.00 GiB are available" in engine.status()["smaller"]["g2"]
        assert engine.status()["healthy"]
        twice = again(engine, prompts)
        assert [(done.tokens, done.cached) for done in twice] == [(expected[0], 96), (expected[1], 288)]


def test_with_strict_all_is_there_before_it_serves(tiny: Path) -> None:
    with closing(engine_of(tiny, strict=True)) as engine:
        total, capacity = g2(engine)
        assert total == capacity > 10_000


def test_it_ends_while_host_memory_is_touched(tiny: Path) -> None:
    engine = engine_of(tiny, transport_wrapper=slowly(wait=1.0))
    total, capacity = g2(engine)
    assert total < capacity
    begun = time.monotonic()
    engine.close()
    seconds = time.monotonic() - begun
    with closing(engine_of(tiny)) as other:
        until_ready(other)
        begun = time.monotonic()
    assert seconds < time.monotonic() - begun + 1
