"""Stored blocks that are wrong are found, by computing them again or by their checksums; right ones raise no alarm."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import prompt_of
from tests.e2e.engine import BLOCK, Done, Engine

Plain = Callable[..., list[Done]]
SMALL = {"num_gpu_blocks_override": 60, "max_model_len": 512, "max_num_batched_tokens": 128, "max_num_seqs": 8}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def shadowed(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Every hit is declined. Prompts come in chunks of 128 tokens, or of less beside others."""
    folder = tmp_path_factory.mktemp("cache")
    settings = {"shadow_every": 1, "cache_dir": str(folder), "g2_blocks": 1024}
    engine = Engine(tiny, settings, dtype=request.param, **SMALL)
    yield engine
    engine.close()


def stored(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Has nothing but these in host memory; returns their answers, computed together."""
    engine.leader.reset()
    engine.forget_device()
    answers = [done.tokens for done in engine.run(prompts, tokens)]
    engine.settle()
    engine.forget_device()
    return answers


def plant(engine: Engine, ours: Sequence[bytes], others: Sequence[bytes]) -> None:
    """What is stored under `ours` is from now on what was stored under `others`."""
    pool = engine.leader.pool
    slots = np.array([pool.look(key).slot for key in others], np.int64)
    assert pool.discard([*ours, *others]) == len(ours) + len(others)
    pool.adopt(slots, ours, [None, *ours[:-1]])


def keys_while(engine: Engine, run: Callable[[], object]) -> list[list[bytes]]:
    """The keys of the requests that `run` makes, in order."""
    seen: list[list[bytes]] = []
    begin = engine.leader.begin
    engine.leader.begin = lambda name, keys, *rest: (seen.append(keys), begin(name, keys, *rest))
    run()
    engine.leader.begin = begin
    return [list(keys) for keys in seen]


def test_right_blocks_raise_no_alarm(shadowed: Engine, plain: Plain, dice: random.Random) -> None:
    """However prompts are cut and batched."""
    prompts = [prompt_of(dice, dice.randrange(100, 400)) for _ in range(8)]
    prompts += [prompts[at][:200] + prompt_of(dice, 100) for at in range(4)]
    answers = stored(shadowed, prompts, 12)
    shadow = shadowed.leader.shadow
    before = shadow.sampled, shadow.compared
    alone = []
    for prompt in prompts:
        alone += [done.tokens for done in shadowed.run([prompt], 12)]
        shadowed.settle()
        shadowed.forget_device()
    assert shadow.sampled - before[0] == len(prompts)
    dice.shuffle(order := list(range(len(prompts))))
    shadowed.run([prompts[at] for at in order], 12)
    shadowed.settle()
    assert shadow.sampled - before[0] > len(prompts) + 6  # some share what the engine itself holds
    assert shadow.compared - before[1] > 100
    assert (shadow.wrong, shadow.skipped, shadow.held) == (0, 0, 0)
    assert shadowed.status()["healthy"]
    if shadowed.core.scheduler.vllm_config.model_config.dtype.itemsize == 4:  # in bfloat16 no engine is like itself
        assert alone == answers == [done.tokens for done in plain(prompts, 12)]
    shadowed.leader.pool.check()
    assert shadowed.leader.check(10)["problems"] == []


def test_wrong_blocks_are_found_and_never_served(shadowed: Engine, dice: random.Random) -> None:
    ours, others = prompt_of(dice, 320), prompt_of(dice, 320)
    shadow, leader = shadowed.leader.shadow, shadowed.leader
    keys = keys_while(shadowed, lambda: stored(shadowed, [ours], 24))
    keys += keys_while(shadowed, lambda: shadowed.run([others], 24))
    shadowed.settle()
    a, b = (each[: 320 // BLOCK] for each in keys)
    shadowed.forget_device()
    right = shadowed.run([ours], 24)[0].tokens
    shadowed.settle()
    assert shadow.wrong == 0

    # Without it they would be served: the test can fail.
    plant(shadowed, a, b)
    leader.shadow = None
    shadowed.forget_device()
    (served,) = shadowed.run([ours], 24)
    assert served.cached > 0
    assert served.tokens != right
    shadowed.settle()
    shadowed.forget_device()

    leader.shadow = shadow
    (done,) = shadowed.run([ours], 24)
    assert done.cached == 0
    assert done.tokens == right
    shadowed.settle()
    assert shadow.wrong > 0
    status = shadowed.status()
    assert not status["healthy"]
    assert "quarantined" in status["problems"][0]
    leader.reports.wait(10)
    path = max((Path(leader.reports._folder)).iterdir(), key=lambda each: each.stat().st_mtime)
    report = json.loads(path.read_text())
    assert {block["key"] for block in report["differ"]} <= {key.hex() for key in a}
    assert min(block["distance_by_rank"]["0"] for block in report["differ"]) > 0.3

    shadowed.forget_device()
    (done,) = shadowed.run([ours], 24)  # nothing is served, nothing is stored
    assert (done.cached, done.tokens) == (0, right)
    assert leader.pool.statistics().registered == 0
    leader.resume()
    shadowed.forget_device()
    shadowed.run([ours], 24)
    shadowed.settle()
    assert leader.pool.statistics().registered > 0
    shadow.wrong = 0


@pytest.mark.parametrize("verify", [True, False])
def test_bits_that_flip_in_host_memory(tiny: Path, plain: Plain, dice: random.Random, verify: bool) -> None:
    prompts = [prompt_of(dice, 320) for _ in range(4)]
    expected = [done.tokens for done in plain(prompts, 24)]
    with closing(Engine(tiny, {"g2_verify": verify, "g2_blocks": 77})) as engine:
        assert [done.tokens for done in engine.run(prompts, 24)] == expected
        engine.settle()
        engine.forget_device()
        assert [done.tokens for done in engine.run(prompts, 24)] == expected
        assert engine.status()["trust"]["corrupt"] == 0
        assert engine.status()["onboard"]["blocks"] > 0
        engine.settle()
        engine.forget_device()
        with engine.arena().open("r+b") as memory:
            held = bytearray(memory.read())
            for at in range(3, len(held), 997 * 4):
                held[at] ^= 0x40  # of a float32 the highest bit of the exponent
            memory.seek(0)
            memory.write(held)
        again = engine.run(prompts, 24)
        engine.settle()
        status = engine.status()
        if verify:
            assert [done.tokens for done in again] == expected
            assert status["trust"]["corrupt"] > 0
            assert status["healthy"]
        else:
            assert all(done.cached for done in again)
            assert [done.tokens for done in again] != expected
            assert status["trust"]["corrupt"] == 0
