"""Engines on a CPU that count as engines on a GPU (`pretend.py`): answers as without KVBM, hits, and no copy that the
engine's work overlaps. On a real GPU nothing of this has run."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.cuda import pretend
from tests.cuda.plugin import on_a_gpu
from tests.e2e.engine import Engine, asynchronous_scheduling, write_tiny

pytestmark = [pytest.mark.e2e, pytest.mark.untimed, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model"))


def asked(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    return [done.tokens for done in engine.run(prompts, 12)]


def conversations(seed: int) -> list[list[int]]:
    """More than the engine's memory holds, with beginnings in common."""
    dice = random.Random(seed)
    begun = [[dice.randrange(3, 1000) for _ in range(dice.choice((150, 250, 330)))] for _ in range(4)]
    return [
        first + [dice.randrange(3, 1000) for _ in range(dice.randrange(20, 90))] for first in begun for _ in range(4)
    ]


@pytest.mark.parametrize("options", [{}, {"v2": 1}], ids=["v1", "v2"])
@pytest.mark.parametrize("scheduling", [None, asynchronous_scheduling], ids=["sync", "async"])
def test_answers_are_those_without_kvbm(
    tiny: Path, tmp_path: Path, options: dict[str, Any],
    scheduling: Callable[[], AbstractContextManager[None]] | None,
) -> None:  # fmt: skip
    prompts = conversations(1)
    plain = Engine(tiny)
    expected = asked(plain, prompts)
    plain.close()
    with on_a_gpu(tmp_path, **options), scheduling() if scheduling is not None else nullcontext():
        engine = Engine(tiny, {"onboard": "async"})
        for _ in range(3):
            assert asked(engine, prompts) == expected
            engine.settle()
            engine.forget_device()
        said = engine.status()
        engine.close()
    (seen,) = pretend.seen(tmp_path)
    assert seen["mistakes"] == 0, seen["last"]
    assert seen["work"] > 20
    assert seen["calls"] > 20
    assert said["onboard"]["blocks"] > 100
    assert said["onboard"]["failed"] == said["offload"]["failed"] == 0


@pytest.mark.parametrize(
    ("plant", "latency_us", "most_ms"),
    # The engine's work takes long, and copies do not wait for it; or the other way round.
    [("another stream", 50, 50), ("no fence", 150_000, 5)],
)
def test_such_a_run_finds_mistakes(tiny: Path, tmp_path: Path, plant: str, latency_us: int, most_ms: int) -> None:
    prompts = conversations(2)
    with on_a_gpu(tmp_path, f"latency_us={latency_us}", plant=plant, most_ms=most_ms):
        engine = Engine(tiny, {"onboard": "async"}, num_gpu_blocks_override=24, max_model_len=512)
        engine.run(prompts, 2)
        engine.settle()
        engine.close()
    (seen,) = pretend.seen(tmp_path)
    assert seen["mistakes"] > 0, seen
    assert "overlap" in seen["last"]
