"""Other weights in a running engine: nothing of before is served after, in this process or the next."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.e2e.conftest import prompt_of
from tests.e2e.engine import Done, Engine, write_tiny
from tests.e2e.test_disk import on_disk, settled

Plain = Callable[..., list[Done]]


def _reload(engine: Engine, weights: Path) -> None:
    engine.vllm.collective_rpc("reload_weights", kwargs={"weights_path": str(weights)})


def _tokens(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    return [done.tokens for done in engine.run(prompts, 12)]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("other"), seed=1)


def test_nothing_of_before_is_served_after(
    tiny: Path, other: Path, plain: Plain, dice: random.Random, tmp_path: Path
) -> None:
    """By sleeping, by a pause in which requests live on, and by the operator's reset."""
    prompts = [prompt_of(dice, 300) for _ in range(3)]
    old = [done.tokens for done in plain(prompts, 12)]
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    with closing(on_disk(model, tmp_path / "disk")) as engine:
        assert _tokens(engine, prompts) == old
        assert settled(engine)["demote"]["blocks"] >= 27
        # The control: weights that change without a word to anybody. What is loaded is the old weights' KV.
        engine.forget_device()
        _reload(engine, other)
        wrong = engine.run(prompts, 12)
        assert [done.cached for done in wrong] == [288] * 3

        generation = engine.status()["generation"]
        engine.vllm.sleep(1)
        _reload(engine, other)
        engine.vllm.wake_up()
        assert engine.status()["generation"] == generation + 1
        first = engine.run(prompts, 12)
        new = [done.tokens for done in first]
        assert [done.cached for done in first] == [0] * 3
        assert new != old
        assert [done.tokens for done in wrong] != new, "it could not fail"
        settled(engine)
        engine.forget_device()
        again = engine.run(prompts, 12)
        assert [(done.tokens, done.cached) for done in again] == [(tokens, 288) for tokens in new]
        assert settled(engine)["tiers"][1]["inactive"] > 0

        # A request that lives on: it is computed anew, and none of it is kept.
        root = prompt_of(dice, 300)
        name = engine.add(root, 100)
        while len(engine.results[name].tokens) < 50:
            engine.step()
        engine.core.pause_scheduler("keep", True)
        _reload(engine, tiny)
        engine.core.resume_scheduler()
        stored = engine.status()["offload"]["blocks"]
        engine.drain()
        settled(engine)
        assert len(engine.results[name].tokens) == 100
        assert engine.status()["offload"]["blocks"] == stored
        assert "the cache was reset while it ran" in str(engine.explain(name)["why"])
        engine.forget_device()
        (once_more,) = engine.run([root], 4)
        assert once_more.cached == 0
        assert _tokens(engine, prompts) == old

        settled(engine)
        engine.vllm.reset_prefix_cache(reset_connector=True)
        _reload(engine, other)
        assert _tokens(engine, prompts) == new
        assert settled(engine)["tiers"][1]["inactive"] > 0
    with closing(on_disk(model, tmp_path / "disk")) as engine:  # whose weights are the old ones
        assert engine.status()["tiers"][1]["inactive"] == 0
        first = engine.run(prompts, 12)
        assert [(done.tokens, done.cached) for done in first] == [(tokens, 0) for tokens in old]
