"""Blocks go to host memory as they are computed and come back when the engine has lost them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import prompt_of
from tests.e2e.engine import BLOCK, Done, Engine

Plain = Callable[..., list[Done]]


@pytest.fixture(scope="module", params=["async", "sync"])
def engine(request: pytest.FixtureRequest, tiny: Path) -> Iterator[Engine]:
    engine = Engine(tiny, {"onboard": request.param})
    yield engine
    engine.close()


def test_comes_back_after_the_device_lost_it(engine: Engine, plain: Plain, dice: random.Random) -> None:
    prompts = [prompt_of(dice, length) for length in (100, 320, 601)]
    expected = [done.tokens for done in plain(prompts, 40)]
    first = engine.run(prompts, 40)
    assert [done.tokens for done in first] == expected
    engine.settle()
    before = engine.status()
    assert before["onboard"]["blocks"] == 0 or before["requests"] > 3
    engine.forget_device()
    again = engine.run(prompts, 40)
    assert [done.tokens for done in again] == expected
    after = engine.status()
    assert [done.cached for done in again] == [96, 288, 576]  # one token is always left to the engine
    assert after["onboard"]["blocks"] - before["onboard"]["blocks"] == 3 + 9 + 18
    assert after["onboard"]["failed"] == after["offload"]["failed"] == 0
    engine.leader.pool.check()


def test_generated_blocks_are_offloaded_too(engine: Engine, plain: Plain, dice: random.Random) -> None:
    prompt = prompt_of(dice, 50)
    (first,) = engine.run([prompt], 100)
    engine.settle()
    engine.forget_device()
    longer = prompt + first.tokens
    (again,) = engine.run([longer], 10)
    assert again.cached == 128  # 149 tokens have KV: the last one was sampled, not computed
    assert again.tokens == plain([longer], 10)[0].tokens


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, 4 * BLOCK + 1])
def test_lengths_around_blocks(engine: Engine, plain: Plain, dice: random.Random, length: int) -> None:
    prompt = prompt_of(dice, length)
    (expected,) = plain([prompt])
    for _ in range(2):
        (done,) = engine.run([prompt])
        assert done.tokens == expected.tokens
        engine.settle()
        engine.forget_device()
    assert done.cached == (length - 1) // BLOCK * BLOCK
