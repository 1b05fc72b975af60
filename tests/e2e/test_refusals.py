"""What the engine would not reuse is not served: refused, or left alone, with one sentence."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvbm.core.errors import Unsupported
from tests.e2e.conftest import prompt_of
from tests.e2e.engine import TINY, Done, Engine
from tests.e2e.test_serve import FAST, KVBM, START_S, free_port, served

Plain = Callable[..., list[Done]]


def _pooling(model: Path, kvbm: dict[str, Any] | None, kind: str, **options: Any) -> Engine:
    from vllm.config import PoolerConfig

    return Engine(model, kvbm, runner="pooling", pooler_config=PoolerConfig(seq_pooling_type=kind), **options)


def _embed(engine: Engine, prompt: list[int], *, read_cache: bool = True) -> tuple[list[float], int]:
    """The embedding, and how many tokens were cached."""
    from vllm import PoolingParams

    params = PoolingParams(task="embed", skip_reading_prefix_cache=not read_cache)
    engine.vllm.add_request("e", {"prompt_token_ids": prompt}, params)
    while engine.vllm.has_unfinished_requests():
        for output in engine.vllm.step():
            found = output.outputs.data.tolist(), output.num_cached_tokens
    engine.drain()
    return found


def _refused(sentence: str, start: Callable[[], Engine], kind: type[Exception] = Unsupported) -> None:
    with pytest.raises(kind, match=sentence):
        start()
    gc.collect()  # vLLM's processes are of objects in cycles


def test_a_model_that_sees_what_follows_is_refused(tmp_path: Path, dice: random.Random) -> None:
    """The KV of a prefix-LM's prompt depends on all of it, so the engine switches its own cache off."""
    import torch
    from transformers import HrmTextConfig, HrmTextForCausalLM

    torch.manual_seed(0)
    shape = {name: size for name, size in TINY.items() if name not in ("num_key_value_heads", "tie_word_embeddings")}
    HrmTextForCausalLM(HrmTextConfig(**shape, H_cycles=1, L_cycles=1)).save_pretrained(tmp_path)
    with closing(Engine(tmp_path)) as engine:
        assert not engine.core.vllm_config.cache_config.enable_prefix_caching
        start = prompt_of(dice, 160)
        one, two = engine.run([start + prompt_of(dice, 64) for _ in range(2)], 4)
        assert (one.cached, two.cached) == (0, 0)
    # vLLM makes an exception of its own of what a worker says.
    sentence = "KVBM does not serve layers that see the tokens after them"
    _refused(sentence, lambda: Engine(tmp_path, {"without_prefix_caching": True}), Exception)


def test_a_model_without_a_kv_cache_is_refused(tmp_path: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1024, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    BertModel(config).save_pretrained(tmp_path)
    options = {"max_model_len": 512, "num_gpu_blocks_override": None}
    _refused("pooling models of which vLLM does not reuse prefixes", lambda: _pooling(tmp_path, {}, "CLS", **options))


@pytest.mark.usefixtures("always_load")
def test_of_pooling_models_those_are_served_whose_prefixes_are_reused(tiny: Path, dice: random.Random) -> None:
    """By the last token, yes; by the mean of all, no, even where the engine was told to reuse them."""
    prompt = prompt_of(dice, 300)
    with closing(_pooling(tiny, None, "LAST")) as engine:
        expected, _ = _embed(engine, prompt)
    with closing(_pooling(tiny, {}, "LAST")) as engine:
        for cached in (0, 288):
            embedding, found = _embed(engine, prompt)
            assert (embedding, found) == (pytest.approx(expected, rel=1e-4, abs=1e-5), cached)
            engine.settle()
            engine.forget_device()
        assert _embed(engine, prompt, read_cache=False)[1] == 0
        engine.settle()
        engine.forget_device()
        engine.spoil()
        assert _embed(engine, prompt)[0] != pytest.approx(expected, rel=1e-2, abs=1e-3), "it could not fail"
    _refused("they pool by MEAN, CLS or STEP", lambda: _pooling(tiny, {}, "MEAN"))


@pytest.mark.usefixtures("always_load")
def test_without_prefix_caching_it_stands_aside_unless_told_otherwise(
    tiny: Path, dice: random.Random, plain: Plain, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [prompt_of(dice, 200) for _ in range(3)]
    expected = [done.tokens for done in plain(prompts, 16)]
    with closing(Engine(tiny, {}, enable_prefix_caching=False)) as engine:
        assert engine.core.scheduler.connector._scheduler is None
        for _ in range(2):
            assert [(done.tokens, done.cached) for done in engine.run(prompts, 16)] == [(each, 0) for each in expected]
    assert sum("KVBM stands aside" in line and "without_prefix_caching=true" in line for line in caplog.messages) == 1
    with closing(Engine(tiny, {"without_prefix_caching": True}, enable_prefix_caching=False)) as engine:
        for cached in (0, 192):
            answers = engine.run(prompts, 16)
            assert [(done.tokens, done.cached) for done in answers] == [(each, cached) for each in expected]
            engine.settle()
        assert [done.cached for done in engine.run(prompts, 16, skip_reading_prefix_cache=True)] == [0, 0, 0]
        engine.settle()
        engine.spoil()
        assert [done.tokens for done in engine.run(prompts, 16)] != expected, "it could not fail"


def test_the_sentence_is_said_once_and_last(tiny: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [*KVBM, "serve", str(tiny), "--port", str(port), "--skip-tokenizer-init", "--enforce-eager"]
    command += ["--runner", "pooling", "--pooler-config", '{"seq_pooling_type": "MEAN"}', "--max-model-len", "512"]
    with served(command, port, tmp_path, KVBM_G2_GB="0.1", **FAST) as server:
        assert server.process.wait(START_S) == 1
        last = server.err.read_text().strip().splitlines()[-1]
        assert last.startswith("kvbm: KVBM does not serve pooling models of which vLLM does not reuse prefixes"), last
        assert server.output().count("KVBM ends the start") == 1
        assert list(server.run_dir.iterdir()) == []
