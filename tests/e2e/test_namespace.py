"""Engines over one disk that differ in something no fact named before: nothing is shared, and it is said why."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import prompt_of
from tests.e2e.engine import Done, Engine, environment
from tests.e2e.test_disk import eventually, settled


def _start(tiny: Path, disk: Path | None, **options: Any) -> Engine:
    kvbm = None if disk is None else {"g3_gb": 0.05, "g3_dir": str(disk), "g2_blocks": 100}
    return Engine(tiny, kvbm, num_gpu_blocks_override=128, **options)


def _ask(engine: Engine, prompts: Sequence[list[int]]) -> tuple[list[list[int]], list[int]]:
    """One at a time; what was answered, and how many tokens were found."""
    done = [engine.run([prompt], 12)[0] for prompt in prompts]
    return [each.tokens for each in done], [each.cached for each in done]


def _said(engine: Engine) -> list[str]:
    said: list[str] = engine.side.control.health()["namesakes"]
    return said


def test_layers_that_keep_their_dtype(
    tiny: Path, tmp_path: Path, dice: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of the same size, in which another layer's part is of 8-bit floats."""
    import torch

    if not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()):
        pytest.skip("KV of 8-bit floats wants AVX-512 or AMX")
    prompts = [prompt_of(dice, 400) for _ in range(3)]

    def start(skip: str, disk: Path | None) -> Engine:
        return _start(tiny, disk, dtype="bfloat16", kv_cache_dtype="fp8", kv_cache_dtype_skip_layers=[skip])

    with closing(start("2", None)) as engine:
        expected, _ = _ask(engine, prompts)
    with closing(start("1", tmp_path)) as engine:
        assert _said(engine) == []
        _ask(engine, prompts)
        assert settled(engine)["tiers"][1]["inactive"] == 36
    with closing(start("2", tmp_path)) as engine:
        (sentence,) = _said(engine)
        assert 'kv_cache_dtype_skip_layers is ["1"] there, ["2"] here' in sentence
        assert _ask(engine, prompts) == (expected, [0, 0, 0])
        settled(engine)
    with closing(start("2", tmp_path)) as engine:
        assert _said(engine) == [], "its own is there"
        assert _ask(engine, prompts) == (expected, [384, 384, 384])

    # The control: were these facts left out, the other engine's blocks would be served, and answers be wrong.
    from kvbm.build import memory as build
    from kvbm.connect.vllm import identity

    known = identity.CONFIGS["CacheConfig"]
    without = known._replace(left_out=known.left_out | {"kv_cache_dtype_skip_layers"})
    monkeypatch.setitem(identity.CONFIGS, "CacheConfig", without)
    monkeypatch.setattr(build, "_over_ranks", lambda _: {})
    blind = tmp_path / "blind"
    with closing(start("1", blind)) as engine:
        _ask(engine, prompts)
        settled(engine)
    with closing(start("2", blind)) as engine:
        answers, cached = _ask(engine, prompts)
    assert cached == [384, 384, 384]
    assert answers != expected


def test_another_hash_seed(tiny: Path, tmp_path: Path, dice: random.Random, plain: Callable[..., list[Done]]) -> None:
    prompts = [prompt_of(dice, 300)]
    expected = [plain([prompt], 12)[0].tokens for prompt in prompts]
    found = []
    for seed in (None, "0", None):
        with environment(PYTHONHASHSEED=seed), closing(_start(tiny, tmp_path)) as engine:
            answers, cached = _ask(engine, prompts)
            assert answers == expected
            found += cached
            if seed is not None:
                (sentence,) = _said(engine)
                assert sentence.endswith("not found here: hash.seed is vllm-none-hash there, 0 here")
            else:
                assert _said(engine) == []
            settled(engine)
    assert found == [0, 0, 288]


@pytest.mark.usefixtures("always_load")
def test_what_lies_on_disk_is_compared_before_it_is_used(
    tiny: Path, tmp_path: Path, dice: random.Random, plain: Callable[..., list[Done]]
) -> None:
    prompts = [prompt_of(dice, 300) for _ in range(3)]
    expected = [plain([prompt], 12)[0].tokens for prompt in prompts]
    kvbm = {"g3_gb": 0.05, "g3_dir": str(tmp_path), "g2_blocks": 200, "prove_first": True}
    with closing(Engine(tiny, kvbm)) as engine:
        assert _ask(engine, prompts) == (expected, [0, 0, 0])
        engine.forget_device()
        settled(engine)
        assert _ask(engine, prompts[:1]) == (expected[:1], [288]), "what it stored itself is used at once"
    with closing(Engine(tiny, kvbm)) as engine:
        assert _ask(engine, prompts[:1]) == (expected[:1], [0])
        eventually(lambda: engine.leader.tick() or engine.status()["trust"]["compared"] >= 9)
        assert _ask(engine, prompts[1:]) == (expected[1:], [288, 288])
        assert engine.status()["trust"]["mismatched"] == 0
