"""Prompts of embeddings: every token is a placeholder, and what tells them apart is the embeddings."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.e2e.conftest import prompt_of
from tests.e2e.engine import Done, Engine


def test_only_the_same_embeddings_share(tiny: Path, plain: Callable[..., list[Done]], dice: random.Random) -> None:
    """They are those of tokens here, so that the engine alone can say what is right."""
    from safetensors.torch import load_file

    table = load_file(tiny / "model.safetensors")["model.embed_tokens.weight"]
    prompts = [prompt_of(dice, 300) for _ in range(2)]
    prompts.append(prompts[0][:150] + prompts[1][150:])  # the first four blocks of the first
    expected = [done.tokens for done in plain(prompts, 12)]
    assert len(set(map(tuple, expected))) == 3

    with closing(Engine(tiny, {}, enable_prompt_embeds=True)) as engine:

        def ask(which: int, **options: Any) -> tuple[list[int], int]:
            engine.forget_device()
            (done,) = engine.run([prompts[which]], 12, **options)
            engine.settle()
            return done.tokens, done.cached

        def embeds(which: int) -> Any:
            return table[prompts[which]].contiguous()

        assert ask(0, embeds=embeds(0)) == (expected[0], 0)
        assert ask(1, embeds=embeds(1)) == (expected[1], 0)
        assert ask(0) == (expected[0], 0), "tokens have keys of their own"
        assert ask(0, embeds=embeds(0)) == (expected[0], 288)
        assert ask(1, embeds=embeds(1)) == (expected[1], 288)
        assert ask(2, embeds=embeds(2)) == (expected[2], 128)
        assert engine.status()["onboard"]["blocks"] == 9 + 9 + 4
