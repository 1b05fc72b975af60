"""What requests may ask for, and how several of them share."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import prompt_of
from tests.e2e.engine import BLOCK, TINY, Done, Engine

Plain = Callable[..., list[Done]]


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[Engine]:
    from vllm.config import KVEventsConfig

    engine = Engine(
        tiny,
        {"g2_blocks": 1024},
        num_gpu_blocks_override=128,
        enable_lora=True,
        max_lora_rank=8,
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
    )
    yield engine
    engine.close()


def _loaded(engine: Engine) -> int:
    return int(engine.status()["onboard"]["blocks"])


def _stored(engine: Engine) -> int:
    return int(engine.status()["offload"]["blocks"])


def _forget(engine: Engine) -> None:
    engine.settle()
    engine.forget_device()


def test_one_prefix_is_loaded_once_however_many_wait_for_it(engine: Engine, plain: Plain, dice: random.Random) -> None:
    root = prompt_of(dice, 10 * BLOCK)
    prompts = [root + prompt_of(dice, 20 + i) for i in range(6)]
    expected = [done.tokens for done in plain(prompts, 10)]
    engine.run([root], 1)
    _forget(engine)
    before = _loaded(engine)
    results = engine.run(prompts, 10)
    assert [done.tokens for done in results] == expected
    assert _loaded(engine) - before == 10
    assert any("waited for request" in why for name in engine.leader.records for why in engine.explain(name)["why"])


def test_several_answers_to_one_prompt(engine: Engine, dice: random.Random) -> None:
    prompt = prompt_of(dice, 8 * BLOCK + 5)
    settings = {"n": 3, "temperature": 1.0, "seed": 11}
    name = engine.add(prompt, 10, **settings)
    engine.drain()
    first = engine.results[name].answers
    _forget(engine)
    before = _loaded(engine)
    name = engine.add(prompt, 10, **settings)
    engine.drain()
    assert engine.results[name].answers == first
    assert len(set(map(tuple, first.values()))) == 3
    assert _loaded(engine) - before == 8


def test_salts_never_share(engine: Engine, plain: Plain, dice: random.Random) -> None:
    prompt = prompt_of(dice, 200)
    (expected,) = plain([prompt], 8)
    engine.run([prompt], 8, salt="tenant a")
    _forget(engine)
    (other,) = engine.run([prompt], 8, salt="tenant b")
    assert other.cached == 0
    _forget(engine)
    (nobody,) = engine.run([prompt], 8)
    assert nobody.cached == 0
    _forget(engine)
    (same,) = engine.run([prompt], 8, salt="tenant a")
    assert same.cached == 192
    assert expected.tokens == same.tokens == other.tokens == nobody.tokens


def test_a_request_may_opt_out(engine: Engine, plain: Plain, dice: random.Random) -> None:
    prompt = prompt_of(dice, 200)
    (expected,) = plain([prompt], 8)
    before = _stored(engine)
    engine.run([prompt], 8, params={"save": False})
    _forget(engine)
    assert _stored(engine) == before
    engine.run([prompt], 8)
    _forget(engine)
    (declined,) = engine.run([prompt], 8, params={"load": False})
    assert declined.cached == 0
    _forget(engine)
    (wrong,) = engine.run([prompt], 8, params={"load": "no", "colour": 3})
    assert wrong.cached == 192
    assert expected.tokens == declined.tokens == wrong.tokens


def test_an_answer_need_not_be_kept(engine: Engine, plain: Plain, dice: random.Random) -> None:
    prompt = prompt_of(dice, 8 * BLOCK + 1)
    (expected,) = plain([prompt], 3 * BLOCK)
    for params, kept in (({"save_answer": False}, 8), ({"save_tokens": 9 * BLOCK + 5}, 9), ({}, 11)):
        (done,) = engine.run([prompt], 3 * BLOCK, params=params)
        assert done.tokens == expected.tokens
        _forget(engine)
        (next_turn,) = engine.run([prompt + done.tokens + prompt_of(dice, 5)], 1, params={"save": False})
        assert next_turn.cached == kept * BLOCK
        engine.forget_device()


def test_who_may_not_read_is_neither_a_hit_nor_a_miss(engine: Engine, dice: random.Random) -> None:
    prompt = prompt_of(dice, 200)
    engine.run([prompt], 1)
    before = engine.status()
    for options in ({"prompt_logprobs": 1}, {"skip_reading_prefix_cache": True}, {"params": {"load": False}}):
        _forget(engine)
        (done,) = engine.run([prompt], 1, **options)
        assert done.cached == 0
    after = engine.status()
    for number in ("requests", "tokens", "hit_rate"):
        assert after[number] == before[number]
    assert after["unread_requests"] == before["unread_requests"] + 3
    _forget(engine)
    (hit,) = engine.run([prompt], 1)
    assert hit.cached == 192
    assert engine.status()["tokens"]["g2"] == before["tokens"]["g2"] + 192


def test_clients_do_not_fill_the_log(
    engine: Engine, dice: random.Random, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("kvbm"), "propagate", True)
    for _ in range(20):
        engine.run([prompt_of(dice, 5)], 1, params={"colour": "x" * 300_000, "y" * 300_000: 1})
    told = [record.getMessage() for record in caplog.records if "not understood" in record.getMessage()]
    assert len(told) <= 1, "another test may have had the one of this minute"
    assert all(len(line) < 1000 for line in told)
    sentences = engine.explain([*engine.leader.records][-1])["why"]
    assert sum("is not understood: ignored" in sentence for sentence in sentences) == 2


def test_parameters_that_are_none(engine: Engine) -> None:
    """An engine without a connector never looks at them; with one, vLLM 0.32 does, and would end."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    params = SamplingParams(max_tokens=2, extra_args={"kv_transfer_params": "nothing"})
    request = Request("odd", [5] * 40, params, None, block_hasher=engine.core.request_block_hasher)
    engine.core.scheduler.add_request(request)
    while engine.core.scheduler.has_unfinished_requests():
        engine.core.step()
    assert request.num_output_tokens == 2
    assert engine.leader.off is None
    assert engine.explain("odd")["why"][0].startswith("kv_transfer_params must be an object")


def test_a_time_to_live_ends(engine: Engine, dice: random.Random) -> None:
    prompt = prompt_of(dice, 200)
    engine.run([prompt], 1, params={"ttl": 1.5})
    _forget(engine)
    (soon,) = engine.run([prompt], 1)
    time.sleep(1.6)
    engine.forget_device()
    (late,) = engine.run([prompt], 1, params={"save": False})
    assert (soon.cached, late.cached) == (192, 0)


def test_events_say_what_g2_holds(engine: Engine, dice: random.Random) -> None:
    from vllm.distributed.kv_events import AllBlocksCleared, BlockStored

    connector = engine.core.scheduler.connector
    prompt = prompt_of(dice, 4 * BLOCK + 1)
    seen = []
    publisher = engine.core.scheduler.kv_event_publisher
    publish, publisher.publish = publisher.publish, lambda batch: seen.extend(batch.events)
    try:
        engine.run([prompt], 1)
        engine.settle()
        engine.run([prompt_of(dice, 5)], 1)  # events leave with the next step
    finally:
        publisher.publish = publish
    stored = [event for event in seen if isinstance(event, BlockStored) and event.medium == "CPU"]
    assert sum(len(event.block_hashes) for event in stored) >= 4
    device = {
        key for event in seen if isinstance(event, BlockStored) and event.medium == "GPU" for key in event.block_hashes
    }
    assert {key for event in stored for key in event.block_hashes} <= device
    generation = engine.status()["generation"]
    assert connector.reset_cache()
    assert engine.status()["generation"] == generation + 1
    assert any(isinstance(event, AllBlocksCleared) for event in connector.take_events())
    _forget(engine)
    (gone,) = engine.run([prompt], 1)
    assert gone.cached == 0


def test_a_queue_of_long_requests_does_not_pin_g2(engine: Engine, plain: Plain, dice: random.Random) -> None:
    """200 waiting requests of 28 blocks each; G2 holds 1024 and all of them are in it at first, then it turns over."""
    roots = [prompt_of(dice, 28 * BLOCK) for _ in range(20)]
    expected = [done.tokens for done in plain(roots, 1)]
    engine.run(roots, 1)
    _forget(engine)
    names = [engine.add(roots[i % 20], 1) for i in range(180)] + [
        engine.add(prompt_of(dice, 700), 1) for _ in range(20)
    ]
    most = 0
    stored = _stored(engine)
    while engine.vllm.has_unfinished_requests():
        engine.step()
        most = max(most, engine.leader.pool.statistics().active)
    engine.drain()
    engine.settle()
    assert most <= 128, "no more is held than the device can receive"
    assert [engine.results[name].tokens for name in names[:180]] == [expected[i % 20] for i in range(180)]
    assert _stored(engine) - stored >= 20 * 21
    assert engine.leader.pool.statistics().active == 0


def adapter(folder: Path, seed: int) -> Path:
    """A LoRA adapter with random weights, strong enough to change answers."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    hidden, kv = TINY["hidden_size"], TINY["num_key_value_heads"] * TINY["head_dim"]
    weights = {}
    for layer in range(TINY["num_hidden_layers"]):
        for module, rows in (("k_proj", kv), ("v_proj", kv), ("q_proj", hidden)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            weights[f"{name}.lora_A.weight"] = torch.randn(8, hidden) * 0.2
            weights[f"{name}.lora_B.weight"] = torch.randn(rows, 8) * 0.2
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["k_proj", "v_proj", "q_proj"],
        "base_model_name_or_path": "tiny",
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_adapters_never_share(engine: Engine, plain: Plain, dice: random.Random, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    prompt = prompt_of(dice, 300)
    a, b = (LoRARequest(name, i, str(adapter(tmp_path / name, i))) for i, name in ((1, "one"), (2, "two")))
    (base,) = plain([prompt], 12)
    (of_a,) = engine.run([prompt], 12, lora=a)
    (of_b,) = engine.run([prompt], 12, lora=b)
    (of_none,) = engine.run([prompt], 12)
    assert of_none.tokens == base.tokens
    assert len({tuple(done.tokens) for done in (of_a, of_b, of_none)}) == 3
    assert of_b.cached == of_none.cached == 0
    for lora, first in ((a, of_a), (b, of_b), (None, of_none)):
        _forget(engine)
        (again,) = engine.run([prompt], 12, lora=lora)
        assert (again.cached, again.tokens) == (288, first.tokens)


def test_a_retrained_adapter_finds_nothing_of_the_old_one(engine: Engine, dice: random.Random, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    prompt = prompt_of(dice, 300)
    folder = adapter(tmp_path / "same", 1)
    engine.run([prompt], 4, lora=LoRARequest("same", 7, str(folder)))
    _forget(engine)
    engine.vllm.remove_lora(7)
    adapter(folder, 2)
    (again,) = engine.run([prompt], 4, lora=LoRARequest("same", 7, str(folder)))
    assert again.cached == 0
