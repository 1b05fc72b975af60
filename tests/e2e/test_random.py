"""The short form of `python -m tests.e2e.compare`: every set-up, every output compared."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.e2e.compare import SETUPS, Alone, compare, running
from tests.e2e.engine import write_tiny

pytestmark = pytest.mark.usefixtures("always_load")
REQUESTS = {"hybrid": 120}
"""60 to the other set-ups. A hit here needs blocks of six groups, and one copy in ten goes wrong: hits are few."""


@pytest.fixture(scope="module")
def one_rank(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    with closing(Alone(tiny, tmp_path_factory.mktemp("alone") / "1")) as alone:
        yield alone


@pytest.fixture
def alone(request: pytest.FixtureRequest, name: str, one_rank: Alone, tiny: Path, tmp_path: Path) -> Iterator[Alone]:
    """The engine without KVBM for this set-up."""
    if name == "ngram":
        request.getfixturevalue("guesses")
    write, ranks, stretch = SETUPS[name].write, SETUPS[name].ranks, SETUPS[name].stretch
    if (write, ranks, stretch) == (write_tiny, 1, 1):
        yield one_rank
        return
    model = tiny if write is write_tiny else write(tmp_path / "model")
    with closing(Alone(model, tmp_path / "alone", ranks, stretch)) as alone:
        yield alone


def _seed() -> int:
    seed = int(os.environ.get("TEST_SEED", time.time_ns() % 1_000_000))
    print(f"seed {seed} (TEST_SEED repeats it)")
    return seed


@pytest.mark.parametrize("name", SETUPS)
def test_every_output_is_the_engines_own(name: str, alone: Alone, tmp_path: Path) -> None:
    requests = REQUESTS.get(name, 60)
    result = compare(name, requests, _seed(), alone, tmp_path / "run")
    assert result.problem() is None, vars(result)
    assert result.requests == requests
    assert result.features["chunked prefill"] > 0
    assert result.features["preempted"] > 0
    assert ("guessed at" in result.features) == (name == "ngram")


def test_wrong_blocks_would_be_noticed(one_rank: Alone, tmp_path: Path) -> None:
    """The negative control: bits are flipped where nothing looks for it, on the way into the engine."""
    with running("sync", one_rank, tmp_path / "run", 1, faults=["load_garble=1"]) as run:
        run.ask(run.traffic.more(30))
        assert run.look().differences
