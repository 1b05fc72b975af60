"""Engines on a CPU that count as engines on a GPU (`pretend.py`): answers as without KVBM, hits, and no copy that the
engine's work overlaps. On a real GPU nothing of this has run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.cuda import plants, pretend
from tests.cuda.plants import asked, conversations
from tests.cuda.plugin import on_a_gpu
from tests.e2e.engine import Engine, asynchronous_scheduling, write_tiny

pytestmark = [pytest.mark.e2e, pytest.mark.untimed, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model"))


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
    ahead = int(scheduling is not None)
    with on_a_gpu(tmp_path, ahead=ahead, **options), scheduling() if scheduling is not None else nullcontext():
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


@pytest.mark.parametrize("name", ["marks are of stream 0", "no fence"])
def test_such_a_run_finds_mistakes(name: str, tmp_path: Path) -> None:
    """Two of those that `python -m tests.cuda.plants` plants."""
    (plant,) = (each for each in plants.PLANTED if each.name == name)
    assert plants.found(plant, tmp_path)
