"""A draft model proposes tokens: its layers' KV is part of each block, and what it proposed in vain is not stored."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import prompt_of
from tests.e2e.engine import BLOCK, TINY, Done, Engine
from tests.e2e.test_random import _allow_async_scheduling

Plain = Callable[..., list[Done]]
LAYERS = TINY["num_hidden_layers"]
ROW = BLOCK * 2 * TINY["num_key_value_heads"] * TINY["head_dim"] * 4
"""Bytes of one block of one layer of the target."""
NOISE = 0.004


@pytest.fixture(scope="module")
def draft(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target with each key-value head twice, so that its rows have another size, and with some noise, so that it
    is right only at times."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, heads = tmp_path_factory.mktemp("draft"), TINY["num_key_value_heads"]
    model = LlamaForCausalLM(LlamaConfig(**(TINY | {"num_key_value_heads": 2 * heads})))
    torch.manual_seed(3)
    weights = {}
    for name, weight in LlamaForCausalLM.from_pretrained(tiny).state_dict().items():
        noisy = weight + NOISE * torch.randn_like(weight)
        if "k_proj" in name or "v_proj" in name:
            noisy = noisy.view(heads, TINY["head_dim"], -1).repeat_interleave(2, 0).flatten(0, 1)
        weights[name] = noisy
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    return folder


def _start(tiny: Path, draft: Path, kvbm: dict[str, Any] | None, *, overlapping: bool) -> Engine:
    patch = pytest.MonkeyPatch()
    if overlapping:
        _allow_async_scheduling(patch)
    engine = Engine(
        tiny, kvbm, num_gpu_blocks_override=64, max_num_batched_tokens=256, async_scheduling=overlapping,
        speculative_config={"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3},
    )  # fmt: skip
    patch.undo()
    assert engine.core.scheduler.vllm_config.scheduler_config.async_scheduling == overlapping
    return engine


@pytest.fixture(scope="module", params=[True, False], ids=["async-scheduling", "one-step-at-a-time"])
def engine(request: pytest.FixtureRequest, tiny: Path, draft: Path) -> Iterator[Engine]:
    with closing(_start(tiny, draft, {}, overlapping=request.param)) as engine:
        yield engine


def test_outputs_are_the_engines_own(engine: Engine, plain: Plain, dice: random.Random) -> None:
    prompts = [prompt_of(dice, dice.randrange(60, 420)) for _ in range(12)]
    expected = [done.tokens for done in plain(prompts, 40)]
    assert [done.tokens for done in engine.run(prompts, 40)] == expected
    engine.settle()
    assert engine.status()["block_bytes"] == ROW * LAYERS * (1 + 2), "both models' layers"
    longer = [prompt + tokens for prompt, tokens in zip(prompts, expected, strict=True)]
    after = [done.tokens for done in plain(longer, 24)]
    engine.forget_device()
    again = engine.run(longer, 24)  # generated blocks are among what is loaded
    assert [done.tokens for done in again] == after
    assert [done.cached for done in again] == [(len(prompt) - 1) // BLOCK * BLOCK for prompt in longer]
    assert engine.status()["onboard"]["blocks"] > 100
    engine.settle()
    engine.leader.pool.check()


def test_some_drafts_are_accepted_and_some_are_not(engine: Engine, dice: random.Random) -> None:
    """Else the test above would not say much."""
    name, steps = engine.add(prompt_of(dice, 100), 100), 0
    while engine.vllm.has_unfinished_requests():
        engine.step()
        steps += 1
    print(steps)
    assert len(engine.results[name].tokens) == 100
    assert 30 < steps < 95
