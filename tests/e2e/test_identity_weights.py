"""The identity of weights is their content, as it was when they were loaded."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvbm.stores import stamps
from kvbm.stores.content import Contents
from tests.e2e.conftest import prompt_of
from tests.e2e.engine import Done, Engine
from tests.e2e.test_disk import eventually, on_disk, settled

pytestmark = pytest.mark.usefixtures("always_load")

Plain = Callable[..., list[Done]]
FOUND = [288] * 3


@pytest.fixture
def prompts(dice: random.Random) -> list[list[int]]:
    return [prompt_of(dice, 300) for _ in range(3)]


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """One that can be changed."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Engine]:
    def make(model: Path, **settings: Any) -> Engine:
        # All three prompts may wait for the disk at once.
        return on_disk(model, tmp_path / "disk", cache_dir=str(tmp_path / "cache"), held_share=1.0, **settings)

    return make


def finetuned(model: Path) -> bytes:
    """Other weights of the same size: another last layer."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    torch.manual_seed(7)
    for name, tensor in tensors.items():
        if ".layers.2." in name and "norm" not in name:
            tensors[name] = torch.randn_like(tensor) * 0.1
    save_file(tensors, model / "other", metadata={"format": "pt"})
    content = (model / "other").read_bytes()
    (model / "other").unlink()
    return content


def stamp(model: Path) -> None:
    for file in model.iterdir():
        os.utime(file, (1_700_000_000, 1_700_000_000))


def ran(engine: Engine, prompts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    done = engine.run(prompts, 12)
    return [each.tokens for each in done], [each.cached for each in done]


def spaces(tmp_path: Path) -> int:
    return sum(each.is_dir() for each in (tmp_path / "disk").glob("*"))


def test_content_counts_and_nothing_else(
    model: Path, start: Callable[..., Engine], plain: Plain, prompts: list[list[int]], tmp_path: Path
) -> None:
    old = [done.tokens for done in plain(prompts, 12)]
    other = finetuned(model)
    assert len(other) == (model / "model.safetensors").stat().st_size
    stamp(model)
    with closing(start(model)) as engine:
        assert ran(engine, prompts) == (old, [0] * 3)
        assert settled(engine)["demote"]["blocks"] >= 27

    copy = tmp_path / "elsewhere"
    shutil.copytree(model, copy, copy_function=shutil.copyfile)
    (copy / "README.md").write_text("notes")
    (copy / "generation_config.json").write_text("{}")
    with closing(start(copy)) as engine:  # another place, other times, files beside
        assert ran(engine, prompts) == (old, FOUND)
    assert spaces(tmp_path) == 1

    (model / "model.safetensors").write_bytes(other)
    stamp(model)
    with closing(Engine(model)) as engine:
        new, _ = ran(engine, prompts)
    assert new != old, "it could not fail"
    with closing(start(model)) as engine:  # the same path, sizes and times
        assert ran(engine, prompts) == (new, [0] * 3)
        settled(engine)
    with closing(start(model)) as engine:
        assert ran(engine, prompts) == (new, FOUND)
    assert spaces(tmp_path) == 2


def test_weights_that_changed_after_they_were_loaded(
    model: Path,
    start: Callable[..., Engine],
    plain: Plain,
    prompts: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Host memory serves; nothing lasts: under the digest of the new files the old weights' KV would be found."""
    from kvbm.connect.vllm import weights

    old, other, chooser = [done.tokens for done in plain(prompts, 12)], finetuned(model), weights.chooser

    def replacing(*args: Any, **options: Any) -> Any:
        (model / "model.safetensors").write_bytes(other)
        stamp(model)
        return chooser(*args, **options)

    monkeypatch.setattr(weights, "chooser", replacing)
    with closing(start(model)) as engine:
        assert ran(engine, prompts) == (old, [0] * 3)
        status = settled(engine)
        assert "is not older than the process that loaded the weights" in status["degraded"]["g3"]
        assert status["healthy"]
        engine.forget_device()
        assert ran(engine, prompts) == (old, FOUND)
        settled(engine)
        engine.side.drain(5)
    assert spaces(tmp_path) == 0
    monkeypatch.setattr(weights, "chooser", chooser)
    with closing(start(model)) as engine:
        tokens, cached = ran(engine, prompts)
        assert cached == [0] * 3
        assert tokens != old
        assert settled(engine)["demote"]["blocks"] >= 27


@pytest.mark.parametrize("fixed", [False, True])
def test_dummies_are_known_only_to_who_says_so(
    tiny: Path, start: Callable[..., Engine], prompts: list[list[int]], tmp_path: Path, fixed: bool
) -> None:
    kvbm = {
        "g3_gb": 0.1, "g3_dir": str(tmp_path / "disk"), "g2_blocks": 64, "dummy_weights_fixed": fixed,
        "reset": "own",  # or the device's reset below would be taken for other weights
    }  # fmt: skip
    before: list[list[int]] = []
    for cached in ([0] * 3, FOUND if fixed else [0] * 3):
        with closing(Engine(tiny, kvbm, load_format="dummy")) as engine:
            tokens, found = ran(engine, prompts)
            assert found == cached
            assert before in ([], tokens)
            before = tokens
            status = settled(engine)
            assert ("they are dummies" in status["degraded"].get("g3", "")) == (not fixed)
            engine.forget_device()
            assert ran(engine, prompts) == (before, FOUND)
            settled(engine)
    assert spaces(tmp_path) == fixed


def test_serving_starts_before_the_disk(
    model: Path,
    start: Callable[..., Engine],
    plain: Plain,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, go, digest = [done.tokens for done in plain(prompts, 12)], threading.Event(), Contents._here

    def slow(self: Contents, *args: Any) -> str:
        assert go.wait(60)
        return digest(self, *args)

    monkeypatch.setattr(Contents, "_here", slow)
    with closing(start(model)) as engine:
        assert ran(engine, prompts) == (expected, [0] * 3)
        assert "still being found out" in settled(engine)["degraded"]["g3"]
        engine.forget_device()
        assert ran(engine, prompts) == (expected, FOUND)
        go.set()
        eventually(lambda: engine.leader.disk is not None)
        assert engine.status()["degraded"] == {}
        eventually(lambda: engine.leader.tick() or settled(engine)["demote"]["blocks"] >= 27)
    with closing(start(model)) as engine:
        assert ran(engine, prompts) == (expected, FOUND)
        assert engine.status()["tokens"]["g3"] == sum(FOUND)


def test_what_kvbm_serve_saw_counts(
    model: Path, start: Callable[..., Engine], prompts: list[list[int]], tmp_path: Path
) -> None:
    """A file that changed before the engine's process began, but after that: which of the two was loaded?"""
    seen = tmp_path / "seen"
    stamps.record([str(model)], seen)
    with closing(start(model, weights_seen=str(seen))) as engine:
        ran(engine, prompts)
        assert settled(engine)["degraded"] == {}
    (model / "config.json").touch()
    with closing(start(model, weights_seen=str(seen))) as engine:
        assert ran(engine, prompts)[1] == [0] * 3
        assert "after `kvbm serve` began" in settled(engine)["degraded"]["g3"]
