"""A KV cache of 8-bit floats: exact like any other, and another namespace than that of the same model without.

The engine's kernels for it want AVX-512 or AMX. Where the processor has neither, bfloat16 stands in for it: that shows
that another dtype is another namespace, and `test_rows_of_8_bit_floats_are_copied_as_they_are` the rest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from tests.e2e.conftest import prompt_of
from tests.e2e.engine import BLOCK, Engine
from tests.e2e.test_disk import settled, wrong


def _start(tiny: Path, disk: Path | None, **options: Any) -> Engine:
    """With a disk tier, or, without a folder for it, the engine alone."""
    kvbm = None if disk is None else {"g3_gb": 0.05, "g3_dir": str(disk), "g2_blocks": 100}
    return Engine(tiny, kvbm, num_gpu_blocks_override=128, **options)


def _other() -> tuple[dict[str, Any], int]:
    """Options of another dtype of KV, and how many times smaller than the usual one it is."""
    import torch

    if torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported():
        return {"kv_cache_dtype": "fp8"}, 4
    return {"dtype": "bfloat16"}, 2


def _ask(engine: Engine, prompts: Sequence[list[int]]) -> list[tuple[list[int], int]]:
    """One at a time: in less than 32 bits answers depend on what else is in the batch."""
    done = [engine.run([prompt], 24)[0] for prompt in prompts]
    return [(each.tokens, each.cached) for each in done]


def test_another_dtype_is_exact_and_shares_nothing(tiny: Path, tmp_path: Path, dice: random.Random) -> None:
    prompts, (other, smaller) = [prompt_of(dice, length) for length in (100, 330, 500)], _other()
    with closing(_start(tiny, None, **other)) as engine:
        expected = [tokens for tokens, _ in _ask(engine, prompts)]
    found = list(zip(expected, [96, 320, 480], strict=True))
    with closing(_start(tiny, tmp_path, **other)) as engine:
        assert _ask(engine, prompts) == [(tokens, 0) for tokens in expected]
        settled(engine)
        size = engine.status()["block_bytes"]
        engine.forget_device()
        assert _ask(engine, prompts) == found
        stored = settled(engine)["tiers"][1]["inactive"]
        assert stored >= 28
        assert engine.status()["onboard"]["blocks"] == 28
    with closing(_start(tiny, tmp_path)) as engine:  # the usual dtype: nothing is there, and then something is
        assert engine.status()["block_bytes"] == smaller * size
        assert engine.status()["tiers"][1]["inactive"] == 0
        assert [cached for _, cached in _ask(engine, prompts)] == [0, 0, 0]
        assert settled(engine)["tiers"][1]["inactive"] >= 28
    assert len(list(tmp_path.glob("*/meta.json"))) == 2
    wrong(tmp_path)
    with closing(_start(tiny, tmp_path, **other)) as engine:  # the control: its own is found, and damage noticed
        assert engine.status()["tiers"][1]["inactive"] == stored
        assert [tokens for tokens, _ in _ask(engine, prompts)] == expected
        assert settled(engine)["promote"]["corrupt"] > 0


def test_rows_of_8_bit_floats_are_copied_as_they_are() -> None:
    """Every byte, also those that are no number."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor

    from kvbm.abc.transport import Plan
    from kvbm.connect.vllm import geometry
    from kvbm.stores.memory import Arena
    from kvbm.transfer.executor import Executor
    from kvbm.transfer.memcpy import MemcpyTransport

    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float8_e4m3fn)
    names = [f"model.layers.{i}.self_attn.attn" for i in range(3)]
    page, shape, dice = spec.page_size_bytes, (16, 2, BLOCK, 64), np.random.default_rng(0)
    placed = KVCacheTensor(3 * 16 * page, names, layer_stride=16 * page, block_stride=page)
    kv = KVCacheConfig(16, [placed], [KVCacheGroupSpec(names, spec)], kv_cache_layout="LBHNC")
    memory = torch.from_numpy(dice.integers(0, 256, (3, *shape), np.uint8))
    bits = {name: memory[i].clone() for i, name in enumerate(names)}
    caches = {name: memory[i].view(torch.float8_e4m3fn) for i, name in enumerate(names)}
    g1 = geometry.g1_region(kv, caches)
    assert g1.slot_bytes == spec.page_size_bytes * 3
    arena, executor = Arena(g1.slot_bytes * 16), Executor([MemcpyTransport(1)])
    arena.touch()
    g2 = arena.region([plane.row_bytes for plane in g1.planes], 16)
    ended: list[Any] = []
    slots, there = np.arange(16), np.random.default_rng(1).permutation(16)
    for job, plan in enumerate((Plan(g1, slots, g2, there, False, ""), Plan(g2, there, g1, slots, True, ""))):
        executor.submit(job, plan, 10.0, lambda _, completion: ended.append(completion))
        assert executor.wait([job], 10.0)
        assert not ended[job].outcomes.any()
        if job == 0:
            for tensor in caches.values():
                tensor.view(torch.uint8).zero_()
    assert all(torch.equal(caches[name].view(torch.uint8), bits[name]) for name in names)
    executor.close(1.0)
    arena.close()
