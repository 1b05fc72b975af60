"""A KV cache of 8-bit floats: exact like any other, and another namespace than that of the same model without."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.e2e.conftest import prompt_of
from tests.e2e.engine import Engine
from tests.e2e.test_disk import settled, wrong


def _start(tiny: Path, disk: Path | None, **options: Any) -> Engine:
    """With a disk tier, or, without a folder for it, the engine alone."""
    kvbm = None if disk is None else {"g3_gb": 0.05, "g3_dir": str(disk), "g2_blocks": 100}
    return Engine(tiny, kvbm, num_gpu_blocks_override=128, **options)


def test_fp8_is_exact_and_shares_nothing_with_others(tiny: Path, tmp_path: Path, dice: random.Random) -> None:
    prompts = [prompt_of(dice, length) for length in (100, 330, 500)]
    fp8 = {"kv_cache_dtype": "fp8"}
    with closing(_start(tiny, None, **fp8)) as engine:
        expected = [done.tokens for done in engine.run(prompts, 24)]
    with closing(_start(tiny, tmp_path, **fp8)) as engine:
        assert [done.tokens for done in engine.run(prompts, 24)] == expected
        settled(engine)
        size = engine.status()["block_bytes"]
        engine.forget_device()
        again = engine.run(prompts, 24)
        assert [done.tokens for done in again] == expected
        assert [done.cached for done in again] == [96, 320, 480]
        stored = settled(engine)["tiers"][1]["inactive"]
        assert stored >= 28
        assert engine.status()["onboard"]["blocks"] == 28
    with closing(_start(tiny, tmp_path)) as engine:  # not fp8: nothing is there, and then something is
        assert engine.status()["block_bytes"] == 4 * size
        assert engine.status()["tiers"][1]["inactive"] == 0
        first = engine.run(prompts, 24)
        assert [done.cached for done in first] == [0, 0, 0]
        assert [done.tokens for done in first] != expected
        assert settled(engine)["tiers"][1]["inactive"] >= 28
    assert len(list(tmp_path.glob("*/meta.json"))) == 2
    wrong(tmp_path)
    with closing(_start(tiny, tmp_path, **fp8)) as engine:  # the control: its own is found, and damage noticed
        assert engine.status()["tiers"][1]["inactive"] == stored
        assert [done.tokens for done in engine.run(prompts, 24)] == expected
        assert settled(engine)["promote"]["corrupt"] > 0
