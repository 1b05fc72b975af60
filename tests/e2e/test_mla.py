"""Multi-head latent attention: one latent per token, the same on every rank."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import prompt_of
from tests.e2e.engine import BLOCK, TINY, Engine
from tests.e2e.test_disk import settled

LATENT = BLOCK * (512 + 64) * TINY["num_hidden_layers"] * 2
"""Bytes of one block of latents in bfloat16, the only type that AMX's kernels know."""


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
    return Engine(model, kvbm, dtype="bfloat16", tensor_parallel_size=ranks, num_gpu_blocks_override=64)


def _answers(engine: Engine, prompts: list[list[int]]) -> list[tuple[list[int], int]]:
    """One by one: in bfloat16 an answer depends on what else is in the batch. And how many tokens were cached."""
    return [(done.tokens, done.cached) for prompt in prompts for done in engine.run([prompt], 16)]


@pytest.fixture(autouse=True)
def _amx() -> None:
    import torch
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if not (torch.cpu._is_amx_tile_supported() and hasattr(AttentionBackendEnum, "AMX_MLA")):
        pytest.skip("without AMX vLLM's MLA cannot go on from a cached beginning, and KVBM refuses it")


@pytest.mark.parametrize("ranks", [2, 1])
@pytest.mark.usefixtures("always_load")
def test_the_latent_is_stored_once(deepseek: Path, dice: random.Random, tmp_path: Path, ranks: int) -> None:
    """In memory and on disk, whatever the number of ranks; all of them load the one copy."""
    prompts = [prompt_of(dice, length) for length in (100, 330, 500)]
    settings = {"g2_gb": 48.5 * LATENT / 1e9, "g2_blocks": None, "g3_gb": 0.2, "g3_dir": str(tmp_path)}
    with closing(_start(deepseek, ranks, None)) as engine:  # two ranks add up in another order than one
        cold, hit = _answers(engine, prompts), _answers(engine, prompts)
    assert [cached for _, cached in hit] == [96, 320, 480], "vLLM goes on from its own blocks"
    with closing(_start(deepseek, ranks, settings)) as engine:
        status = engine.status()
        assert (status["ranks"], status["block_bytes"]) == (ranks, LATENT)
        assert engine.leader.pool.statistics().total == 48
        assert _answers(engine, prompts) == cold
        stored = settled(engine)["offload"]
        assert stored["bytes"] == stored["blocks"] * LATENT
        assert len(list(tmp_path.glob("*/rank*.data"))) == 1
        engine.forget_device()
        assert _answers(engine, prompts) == hit
        loaded = settled(engine)["onboard"]
        assert loaded["blocks"] == 28
        assert loaded["bytes"] == 28 * LATENT * ranks
        engine.forget_device()
        engine.spoil()
        assert _answers(engine, prompts) != hit, "it could not fail"
    if ranks == 1:
        return
    with closing(_start(deepseek, ranks, settings)) as engine:
        again = _answers(engine, prompts)
        assert [tokens for tokens, _ in again] == [tokens for tokens, _ in hit]
        assert sum(cached for _, cached in again) > 0
        assert settled(engine)["tokens"]["g3"] > 0
