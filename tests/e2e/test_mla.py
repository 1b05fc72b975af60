"""Multi-head latent attention: one latent per token, the same on every rank."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import prompt_of
from tests.e2e.engine import TINY, Engine
from tests.e2e.test_disk import settled

BLOCK = 16
"""All that the CPU's kernels can do. vLLM also switches its own prefix cache off there: every hit is KVBM's."""
LATENT = BLOCK * (512 + 64) * TINY["num_hidden_layers"] * 4
"""Bytes of one block of latents in float32."""


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V2 with few layers and no experts; the latent has its real size, which the CPU's kernels want."""
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    folder = tmp_path_factory.mktemp("deepseek")
    torch.manual_seed(0)
    config = DeepseekV2Config(
        **(TINY | {"num_key_value_heads": 4, "head_dim": 64}),
        kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=32, v_head_dim=32,
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=64,
        first_k_dense_replace=TINY["num_hidden_layers"],
    )  # fmt: skip
    DeepseekV2ForCausalLM(config).save_pretrained(folder)
    return folder


def _start(model: Path, ranks: int, kvbm: dict[str, Any] | None) -> Engine:
    return Engine(model, kvbm, tensor_parallel_size=ranks, block_size=BLOCK, num_gpu_blocks_override=128)


@pytest.fixture(autouse=True)
def _amx() -> None:
    import torch

    if not torch.cpu._is_amx_tile_supported():
        pytest.skip("without AMX vLLM's MLA cannot go on from a cached beginning, and KVBM refuses it")


@pytest.mark.parametrize("ranks", [2, 1])
def test_the_latent_is_stored_once(deepseek: Path, dice: random.Random, tmp_path: Path, ranks: int) -> None:
    """In memory and on disk, whatever the number of ranks; all of them load the one copy."""
    prompts = [prompt_of(dice, length) for length in (100, 330, 500)]
    settings = {"g2_gb": 64.5 * LATENT / 1e9, "g2_blocks": None, "g3_gb": 0.2, "g3_dir": str(tmp_path)}
    with closing(_start(deepseek, ranks, None)) as engine:  # two ranks add up in another order than one
        expected = [done.tokens for done in engine.run(prompts, 16)]
    with closing(_start(deepseek, ranks, settings)) as engine:
        status = engine.status()
        assert (status["ranks"], status["block_bytes"]) == (ranks, LATENT)
        assert engine.leader.pool.statistics().total == 64
        assert [done.tokens for done in engine.run(prompts, 16)] == expected
        stored = settled(engine)["offload"]
        assert stored["bytes"] == stored["blocks"] * LATENT
        assert len(list(tmp_path.glob("*/rank*.data"))) == 1
        again = engine.run(prompts, 16)
        assert [done.tokens for done in again] == expected
        assert [done.cached for done in again] == [96, 320, 496]
        loaded = settled(engine)["onboard"]
        assert loaded["blocks"] == 57
        assert loaded["bytes"] == 57 * LATENT * ranks
        engine.spoil()
        assert [done.tokens for done in engine.run(prompts, 16)] != expected, "it could not fail"
    if ranks == 1:
        return
    with closing(_start(deepseek, ranks, settings)) as engine:
        again = engine.run(prompts, 16)
        assert [done.tokens for done in again] == expected
        assert sum(done.cached for done in again) > 0
        assert settled(engine)["tokens"]["g3"] > 0
