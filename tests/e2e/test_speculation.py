"""A draft model proposes tokens: its layers' KV is part of each block, and what it proposed in vain is not stored."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import prompt_of
from tests.e2e.engine import BLOCK, TINY, Done, Engine, asynchronous_scheduling

pytestmark = pytest.mark.usefixtures("guesses")
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
    with asynchronous_scheduling() if overlapping else nullcontext():
        engine = Engine(
            tiny, kvbm, num_gpu_blocks_override=64, max_num_batched_tokens=256, async_scheduling=overlapping,
            speculative_config={"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3},
        )  # fmt: skip
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


def _answer(engine: Engine, prompt: list[int]) -> tuple[list[int], int, int]:
    """To one request: its tokens, how many steps gave some, how many tokens of the prompt were cached."""
    engine.settle()
    engine.forget_device()
    name, seen, steps = engine.add(prompt, 100), 0, 0
    done = engine.results[name]
    while engine.vllm.has_unfinished_requests():
        engine.step()
        steps += len(done.tokens) > seen
        seen = len(done.tokens)
    engine.drain()
    return done.tokens, steps, done.cached


def test_the_drafts_layers_are_loaded_too(engine: Engine, dice: random.Random) -> None:
    """With them the draft model is right as often as before. It is at times, else nothing here would say much."""
    prompt = prompt_of(dice, 300)
    tokens, steps, cached = _answer(engine, prompt)
    assert cached == 0
    assert 30 < steps < 95
    assert _answer(engine, prompt) == (tokens, steps, 288)
    engine.spoil()  # the control
    wrong, _, cached = _answer(engine, prompt)
    assert cached == 288
    assert wrong != tokens
    engine.leader.reset()
