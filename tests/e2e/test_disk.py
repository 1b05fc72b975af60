"""Blocks on disk: there after a restart, exact, never waited for longer than computing takes, no matter what fails."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import prompt_of
from tests.e2e.engine import TINY, Done, Engine, write_tiny
from tests.e2e.test_requests import adapter
from tests.e2e.test_serve import eventually

Plain = Callable[..., list[Done]]
SMALL = 40
"""Blocks of a G2 that holds three of the prompts below, so that most come from disk."""


def on_disk(model: Path, folder: Path, max_num_seqs: int = 128, max_model_len: int = 1024, **settings: Any) -> Engine:
    kvbm = {"g3_gb": 0.1, "g3_dir": str(folder), "g2_blocks": SMALL, **settings}
    return Engine(model, kvbm, max_num_seqs=max_num_seqs, max_model_len=max_model_len)


def settled(engine: Engine) -> dict[str, Any]:
    """What `kvbm status` shows once nothing moves any more."""
    engine.settle()
    if (lower := engine.leader.disk) is not None:
        eventually(lambda: engine.leader.tick() or not any(lower.tier.in_flight()))
    return engine.status()


def wrong(folder: Path) -> None:
    """Every block on disk is another one."""
    for path in folder.glob("*/rank*.data"):
        content = bytearray(path.read_bytes())
        for at in range(100, len(content), 4096):
            content[at] ^= 1
        path.write_bytes(content)


@pytest.fixture
def prompts(dice: random.Random) -> list[list[int]]:
    return [prompt_of(dice, 400) for _ in range(12)]


@pytest.fixture
def expected(plain: Plain, prompts: list[list[int]]) -> list[list[int]]:
    return [done.tokens for done in plain(prompts, 12)]


@pytest.mark.parametrize(
    "settings", [{"g3_engine": "threads"}, {"placement": "exclusive", "g2_blocks": 104, "g3_key_file": "key"}]
)
@pytest.mark.usefixtures("always_load")
def test_blocks_come_back_from_disk_and_after_a_restart(
    tiny: Path, tmp_path: Path, prompts: list[list[int]], expected: list[list[int]], settings: dict[str, Any]
) -> None:
    """In both placements; one by threads, one encrypted."""
    disk = tmp_path / "disk"
    if encrypted := "g3_key_file" in settings:
        settings = settings | {"g3_key_file": str(tmp_path / "key")}
        (tmp_path / "key").write_text(bytes(range(32)).hex())
        (tmp_path / "key").chmod(0o600)
    with closing(on_disk(tiny, disk, **settings)) as engine:
        for _ in range(2):
            for prompt, tokens in zip(prompts, expected, strict=True):
                (done,) = engine.run([prompt], 12)
                assert done.tokens == tokens
                settled(engine)
            engine.forget_device()
        status = settled(engine)
        assert done.cached == 384
        assert status["promote"]["blocks"] > 0
        assert status["tokens"]["g3"] > 0
        assert status["promote"]["failed"] == status["demote"]["failed"] == status["promote"]["corrupt"] == 0
        there = status["tiers"][1]["inactive"]
        assert there > 0
        engine.leader.pool.check()
        engine.leader.disk.tier.pool.check()
    with closing(on_disk(tiny, disk, **settings)) as engine:
        assert engine.status()["tiers"][1]["inactive"] >= there
        (done,) = engine.run(prompts[:1], 12)
        assert (done.tokens, done.cached) == (expected[0], 384)
        assert engine.status()["tokens"]["g3"] == 384
    (meta,) = disk.glob("*/meta.json")
    assert json.loads(meta.read_text())["facts"]["kv.backend"].startswith("CPU_ATTN ")
    if encrypted:
        with closing(on_disk(tiny, disk)) as engine:
            assert engine.status()["tiers"][1]["inactive"] == 0


def test_a_budget_that_runs_low_is_kept_for_what_is_hot(
    tiny: Path, tmp_path: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """Six prompts may be written. Three take half of that; of the rest only the one that comes again is written."""
    blocks, size = 6 * 12, 49_152
    with closing(on_disk(tiny, tmp_path, g3_write_gb_day=blocks * size / 1e9)) as engine:
        assert engine.status()["block_bytes"] == size
        for prompt, tokens in zip(prompts, expected, strict=True):
            (done,) = engine.run([prompt], 12)
            assert done.tokens == tokens
            cold = settled(engine)["demote"]
        assert blocks / 2 <= cold["blocks"] < blocks / 2 + 12
        assert cold["refused"] > 0
        for _ in range(2):
            engine.forget_device()
            (done,) = engine.run(prompts[-1:], 12)
            assert done.tokens == expected[-1]
        hot = settled(engine)["demote"]
        assert hot["blocks"] > cold["blocks"]
        engine.forget_device()
        (done,) = engine.run(prompts[:1], 12)
        assert (done.tokens, done.cached) == (expected[0], 384)
        assert engine.status()["tokens"]["g3"] > 0


@pytest.mark.usefixtures("always_load")
def test_damaged_blocks_are_noticed_and_computed(
    tiny: Path, tmp_path: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """The negative control: without the checksums these answers would be wrong."""
    with closing(on_disk(tiny, tmp_path)) as engine:
        engine.run(prompts, 12)
        assert settled(engine)["demote"]["blocks"] >= 72
    wrong(tmp_path)
    with closing(on_disk(tiny, tmp_path)) as engine:
        assert [done.tokens for done in engine.run(prompts, 12)] == expected
        status = settled(engine)
        assert status["promote"]["corrupt"] > 0
        assert status["tokens"]["g3"] == 0
        engine.forget_device()
        assert [done.tokens for done in engine.run(prompts, 12)] == expected  # they have been written anew
        assert settled(engine)["tokens"]["g3"] > 0


@pytest.mark.usefixtures("always_load")
def test_other_weights_find_nothing(
    tiny: Path, tmp_path: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    disk, model = tmp_path / "disk", tmp_path / "model"
    shutil.copytree(tiny, model)
    with closing(on_disk(model, disk)) as engine:
        engine.run(prompts[:2], 12)
        assert settled(engine)["demote"]["blocks"] >= 24
    other = write_tiny(tmp_path / "other", seed=1)
    shutil.copy(other / "model.safetensors", model / "model.safetensors")
    with closing(on_disk(model, disk)) as engine:
        assert engine.status()["tiers"][1]["inactive"] == 0
        (done,) = engine.run(prompts[:1], 12)
        assert done.cached == 0
        assert done.tokens != expected[0]
    shutil.copy2(tiny / "model.safetensors", model / "model.safetensors")
    with closing(on_disk(model, disk)) as engine:
        (done,) = engine.run(prompts[:1], 12)
        assert (done.tokens, done.cached) == (expected[0], 384)


@pytest.mark.usefixtures("always_load")
def test_a_longer_context_finds_nothing_that_a_shorter_one_stored(tmp_path: Path, prompts: list[list[int]]) -> None:
    """Phi-3's position embeddings are others once the context may be longer than the one it was trained with."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    factors = {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
    config = Phi3Config(
        **(TINY | {"max_position_embeddings": 1024}), original_max_position_embeddings=512, pad_token_id=0,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
    )  # fmt: skip
    Phi3ForCausalLM(config).save_pretrained(tmp_path / "phi")
    tokens = {}
    for length in (512, 1024):
        with closing(Engine(tmp_path / "phi", max_model_len=length)) as engine:
            tokens[length] = engine.run(prompts[:1], 12)[0].tokens
    assert tokens[512] != tokens[1024]
    for length, cached in ((512, 0), (1024, 0), (512, 384)):
        with closing(on_disk(tmp_path / "phi", tmp_path / "disk", max_model_len=length)) as engine:
            (done,) = engine.run(prompts[:1], 12)
            assert (done.tokens, done.cached) == (tokens[length], cached)
            settled(engine)


@pytest.mark.usefixtures("always_load")
def test_an_adapter_retrained_between_two_runs_finds_nothing(
    tiny: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    from vllm.lora.request import LoRARequest

    folder, kvbm = tmp_path / "adapter", {"g3_gb": 0.1, "g3_dir": str(tmp_path / "disk"), "g2_blocks": SMALL}
    request = LoRARequest("same", 7, str(adapter(folder, 1)))

    def start() -> Engine:
        return Engine(tiny, kvbm, enable_lora=True, max_lora_rank=8)

    with closing(start()) as engine:
        (first,) = engine.run(prompts[:1], 12, lora=request)
        assert settled(engine)["demote"]["blocks"] >= 12
    shutil.copytree(folder, tmp_path / "old")
    adapter(folder, 2)
    with closing(start()) as engine:
        (other,) = engine.run(prompts[:1], 12, lora=request)
        assert other.cached == 0
        assert other.tokens != first.tokens
        settled(engine)
        engine.forget_device()  # vLLM's own cache knows an adapter by its name only
        engine.vllm.remove_lora(7)
        shutil.copytree(tmp_path / "old", folder, dirs_exist_ok=True)
        (again,) = engine.run(prompts[:1], 12, lora=request)
        assert (again.tokens, again.cached) == (first.tokens, 384)
        assert engine.status()["tokens"]["g3"] == 384


@pytest.mark.usefixtures("always_load")
def test_two_ranks_serve_what_both_have(
    tiny: Path, tmp_path: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    def start() -> Engine:
        settings = {"g3_gb": 0.1, "g3_dir": str(tmp_path), "g2_blocks": SMALL}
        return Engine(tiny, settings, tensor_parallel_size=2)

    with closing(start()) as engine:
        first = [done.tokens for done in engine.run(prompts[:2], 12)]
        assert settled(engine)["demote"]["blocks"] >= 24
    (index,) = tmp_path.glob("*/rank1.index")
    content = bytearray(index.read_bytes())
    where = [at for at in range(4096, len(content), 128) if any(content[at : at + 128])]
    content[where[0] : where[0] + 128] = bytes(128)
    index.write_bytes(content)
    with closing(start()) as engine:
        assert engine.status()["tiers"][1]["inactive"] == len(where) - 1
        again = engine.run(prompts[:2], 12)
        assert [done.tokens for done in again] == first
        assert sum(done.cached for done in again) in range(1, 2 * 384)


@pytest.fixture(scope="module")
def slow(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A disk that gives half a megabyte (ten blocks) a second."""
    folder = tmp_path_factory.mktemp("slow")
    faults = "kvbm.testing.faults:build?disk=1&load_rate=0.5"
    with closing(on_disk(tiny, folder, transport_wrapper=faults, g2_blocks=64, g3_inflight_mb=1)) as engine:
        yield engine


def test_what_is_slower_than_computing_is_not_waited_for(
    slow: Engine, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    for prompt in prompts:
        slow.run([prompt], 12)
        settled(slow)
    slow.forget_device()
    begun = time.monotonic()
    (done,) = slow.run(prompts[:1], 12)
    assert done.tokens == expected[0]
    assert time.monotonic() - begun < 1.2, "loading all of it takes 1.2 s, computing it less than a tenth of that"
    status = settled(slow)
    assert status["promote"]["gated"] > 0
    record = next(record for record in reversed(slow.leader.records.values()) if record.prompt_tokens == 400)
    assert any("gated: loading" in why for why in record.why)


def test_what_arrives_while_a_request_waits_for_its_turn_is_used(
    tiny: Path, tmp_path: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """One prompt, partly loaded, partly computed: the engine is busy for as long as half of it takes to come."""
    faults = "kvbm.testing.faults:build?disk=1&load_rate=0.5"
    with closing(
        on_disk(tiny, tmp_path, transport_wrapper=faults, g2_blocks=64, g3_inflight_mb=1, max_num_seqs=1)
    ) as engine:
        for prompt in prompts:
            engine.run([prompt], 12)
            settled(engine)
        engine.forget_device()
        other = engine.add(prompts[-1], 12)
        name = engine.add(prompts[0], 12)
        begun = time.monotonic()
        while time.monotonic() - begun < 0.5:  # it is not its turn yet
            time.sleep(0.02)
            engine.leader.tick()
        engine.drain()
        assert engine.results[other].tokens == expected[-1]
        assert engine.results[name].tokens == expected[0]
        assert 0 < engine.results[name].cached < 384
        assert settled(engine)["promote"]["gated"] > 0
