"""A model whose layers need different blocks: full attention beside sliding windows (a Gemma 3 with random weights)."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kvbm.testing.faults import inject
from tests.e2e.conftest import prompt_of
from tests.e2e.engine import BLOCK, TINY, Done, Engine, environment, minor, write_gemma
from tests.e2e.test_disk import settled, wrong

Plain = Callable[..., list[Done]]
CHUNK = 128


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gemma(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def plain(gemma: Path) -> Iterator[Plain]:
    """vLLM without KVBM."""
    engine = Engine(gemma, num_gpu_blocks_override=512)

    def run(prompts: list[list[int]], tokens: int = 8) -> list[Done]:
        results = engine.run(prompts, tokens)
        engine.forget_device()
        return results

    yield run
    engine.close()


@pytest.fixture(scope="module")
def engine(gemma: Path) -> Iterator[Engine]:
    engine = Engine(gemma, {"g2_blocks": 2000}, num_gpu_blocks_override=512, max_num_batched_tokens=256)
    yield engine
    engine.close()


def _forget(engine: Engine) -> None:
    settled(engine)
    engine.forget_device()


def _serve(engine: Engine, prompts: list[list[int]], expected: list[list[int]]) -> list[int]:
    """One after the other, with the answers that are expected. Returns how many tokens of each were there."""
    found = []
    for prompt, tokens in zip(prompts, expected, strict=True):
        (done,) = engine.run([prompt], 12)
        assert done.tokens == tokens
        found.append(done.cached)
        _forget(engine)
    return found


def test_a_prompt_comes_back_with_the_windows_of_its_end(engine: Engine, plain: Plain, dice: random.Random) -> None:
    groups = engine.core.scheduler.kv_cache_config.kv_cache_groups
    kinds = sorted(type(group.kv_cache_spec).__name__ for group in groups)
    assert kinds == ["FullAttentionSpec"] + ["SlidingWindowSpec"] * (len(groups) - 1)
    assert len(groups) > 1
    prompts = [prompt_of(dice, length) for length in (100, 320, 500, 900)]
    expected = [done.tokens for done in plain(prompts, 12)]
    assert [done.tokens for done in engine.run(prompts, 12)] == expected
    _forget(engine)
    again = engine.run(prompts, 12)
    assert [done.tokens for done in again] == expected
    assert [done.cached for done in again] == [96, 288, 480, 896]
    blocks = [cached // BLOCK for cached in (96, 288, 480, 896)]
    # All of the full group, two blocks of each other group.
    assert engine.status()["onboard"]["blocks"] == sum(blocks) + len(blocks) * 2 * (len(groups) - 1)


def test_space_is_saved(engine: Engine, dice: random.Random) -> None:
    groups = len(engine.core.scheduler.kv_cache_config.kv_cache_groups)
    before = engine.leader.pool.statistics().registered
    engine.run([prompt_of(dice, 910)], 2)
    _forget(engine)
    used = engine.leader.pool.statistics().registered - before
    # 28 blocks; windows at 256, 512, 768 and at the end.
    assert used == 28 + (groups - 1) * 2 * 4
    assert used < groups * 28 / 2


def test_prompts_that_part_are_found_at_a_checkpoint_then_where_they_part(
    engine: Engine, plain: Plain, dice: random.Random
) -> None:
    root = prompt_of(dice, 400)
    prompts = [root + prompt_of(dice, 150) for _ in range(3)]
    expected = [done.tokens for done in plain(prompts, 12)]
    assert _serve(engine, prompts, expected) == [0, 256, 384]


def test_a_conversation_goes_on_where_its_last_answer_ended(engine: Engine, plain: Plain, dice: random.Random) -> None:
    history = prompt_of(dice, 200)
    for turn in range(4):
        (expected,) = plain([history], 70)
        (done,) = engine.run([history], 70)
        assert done.tokens == expected.tokens
        assert done.cached == (len(history) - 30 - 1) // BLOCK * BLOCK * (turn > 0)
        _forget(engine)
        history = history + done.tokens + prompt_of(dice, 30)


@pytest.mark.usefixtures("always_load")
def test_every_output_is_the_engines_own(gemma: Path, plain: Plain, tmp_path: Path) -> None:
    """Preemptions (140 blocks), chunks of 128 tokens, a G2 that evicts, aborts, copies that fail or are slow, bits that
    flip on disk. (Where writes fail, too, the disk may be left alone for most of this.)"""
    seed = int(os.environ.get("TEST_SEED", time.time_ns() % 1_000_000))
    print(f"seed {seed} (TEST_SEED repeats it)")
    dice = random.Random(seed)
    roots = [prompt_of(dice, dice.randrange(100, 700)) for _ in range(8)]
    prompts = [dice.choice(roots)[: dice.randrange(1, 700)] + prompt_of(dice, dice.randrange(1, 60)) for _ in range(80)]
    expected = [done.tokens for done in plain(prompts, 40)]
    inject(tmp_path / "faults", "load_fail=0.15&store_fail=0.05&delay=0.01&seed=1", "disk=1&flip=0.05&seed=1")
    kvbm = {
        "g2_blocks": 150, "g3_gb": 0.1, "g3_dir": str(tmp_path / "disk"),
        "transport_wrapper": f"kvbm.testing.faults:follow?{tmp_path / 'faults'}",
    }  # fmt: skip
    with closing(
        Engine(gemma, kvbm, num_gpu_blocks_override=140, max_num_batched_tokens=128, max_num_seqs=8)
    ) as engine:
        preempted = _count_preemptions(engine)
        waiting, names, aborted = list(enumerate(prompts)), {}, set()
        while waiting or engine.vllm.has_unfinished_requests():
            while waiting and dice.random() < 0.3:
                at, prompt = waiting.pop(0)
                names[at] = engine.add(prompt, 40)
            if names and dice.random() < 0.01:
                aborted.add(at := dice.choice(list(names)))
                engine.vllm.abort_request([names[at]])
            if dice.random() < 0.02:
                engine.vllm.reset_prefix_cache()
            engine.step()
        engine.drain()
        status = settled(engine)
        for at, name in names.items():
            tokens = engine.results[name].tokens
            assert tokens == expected[at][: len(tokens) if at in aborted else None]
        assert status["onboard"]["blocks"] > 100
        assert status["onboard"]["failed"] > 0
        assert status["promote"]["blocks"] > 20
        assert status["promote"]["corrupt"] > 0
        assert status["offload"]["failed"] > 0
        assert status["evictions"] > 0
        assert status["healthy"]
        assert preempted[0] > 0
        engine.leader.pool.check()
        statistics = engine.leader.pool.statistics()
        assert (statistics.active, statistics.staged, statistics.writable, statistics.orphaned) == (0, 0, 0, 0)
        assert not engine.leader.requests
        assert not engine.leader._loading
        assert engine.leader._held == 0


def _count_preemptions(engine: Engine) -> list[int]:
    scheduler, count = engine.core.scheduler, [0]
    preempt = scheduler._preempt_request

    def counted(*args: object, **kwargs: object) -> object:
        count[0] += 1
        return preempt(*args, **kwargs)

    scheduler._preempt_request = counted
    return count


def test_wrong_bytes_change_the_answer(gemma: Path, plain: Plain, dice: random.Random) -> None:
    """The negative control of every test here."""
    settings = {"transport_wrapper": "kvbm.testing.faults:build?load_garble=1"}
    with closing(Engine(gemma, settings, num_gpu_blocks_override=256)) as engine:
        prompts = [prompt_of(dice, 320) for _ in range(3)]
        expected = [done.tokens for done in plain(prompts, 24)]
        assert [done.tokens for done in engine.run(prompts, 24)] == expected
        _forget(engine)
        again = engine.run(prompts, 24)
        assert all(done.cached for done in again)
        assert [done.tokens for done in again] != expected


@pytest.mark.usefixtures("always_load")
def test_the_disk_gives_back_what_each_group_needs(
    gemma: Path, plain: Plain, tmp_path: Path, dice: random.Random
) -> None:
    """Out of a host memory that holds one prompt, after a restart, and not where the files were damaged."""
    prompts = [prompt_of(dice, length) for length in (100, 320, 500, 900)]
    expected = [done.tokens for done in plain(prompts, 12)]
    cached = [(len(prompt) - 1) // BLOCK * BLOCK for prompt in prompts]

    def started() -> Engine:
        return Engine(gemma, {"g2_blocks": 100, "g3_gb": 0.1, "g3_dir": str(tmp_path)}, num_gpu_blocks_override=256)

    with closing(started()) as engine:
        groups = len(engine.core.scheduler.kv_cache_config.kv_cache_groups)
        assert _serve(engine, prompts, expected) == [0] * 4
        assert _serve(engine, prompts, expected) == cached
        status = settled(engine)
        assert status["tokens"]["g3"] > 0
        assert status["promote"]["corrupt"] == status["promote"]["failed"] == status["demote"]["failed"] == 0
    with closing(started()) as engine:
        assert _serve(engine, prompts, expected) == cached
        status = settled(engine)
        # All of the full group, two blocks of each other group.
        needed = sum(cached) // BLOCK + len(prompts) * 2 * (groups - 1)
        assert status["promote"]["blocks"] == status["onboard"]["blocks"] == needed
        assert status["tokens"]["g3"] == sum(cached)
    wrong(tmp_path)
    with closing(started()) as engine:
        assert _serve(engine, prompts, expected) == [0] * 4
        assert settled(engine)["promote"]["corrupt"] > 0


def _comes_back(model: Path, switch: Path, prompts: list[list[int]], kinds: set[str], **kvbm: object) -> int:
    """What was computed once, to its last block, with the answers that the engine gives alone. Returns how many blocks
    of all groups that took."""
    options = {"num_gpu_blocks_override": 256, "max_num_batched_tokens": 256}
    with closing(Engine(model, **options)) as alone:
        expected = [alone.run([prompt], 12)[0].tokens for prompt in prompts]
    inject(switch)
    settings = {"transport_wrapper": f"kvbm.testing.faults:follow?{switch}", **kvbm}
    with closing(Engine(model, settings, **options)) as engine:
        groups = engine.core.scheduler.kv_cache_config.kv_cache_groups
        assert {type(group.kv_cache_spec).__name__ for group in groups} == kinds

        assert _serve(engine, prompts, expected)[:4] == [0] * 4
        before = engine.status()["onboard"]["blocks"]
        assert _serve(engine, prompts, expected) == [(len(prompt) - 1) // BLOCK * BLOCK for prompt in prompts]
        onboarded: int = engine.status()["onboard"]["blocks"] - before
        assert (engine.status()["tokens"]["g3"] > 0) == ("g3_gb" in kvbm)
        inject(switch, "load_garble=1")
        with pytest.raises(AssertionError):  # the negative control
            _serve(engine, prompts, expected)
        return onboarded


@pytest.mark.usefixtures("always_load")
def test_recurrent_state_comes_back_at_block_boundaries(tmp_path: Path, dice: random.Random) -> None:
    """Short convolutions beside full attention (an LFM2 with random weights): one state is what a hit needs of them.
    From disk, too: host memory holds two of the prompts."""
    import torch
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    config = Lfm2Config(
        **(TINY | {"num_hidden_layers": 4}), full_attn_idxs=[1, 3], conv_dim=128, conv_dim_out=128, conv_L_cache=3,
        block_auto_adjust_ff_dim=False, block_dim=128, pad_token_id=0,
    )  # fmt: skip
    Lfm2ForCausalLM(config).save_pretrained(tmp_path / "lfm2")
    root = prompt_of(dice, 350)
    # Of a prompt that ends with a block vLLM before 0.32 keeps the state at its end only, which no hit can use.
    second = 320 if minor() >= 32 else 330
    prompts = [prompt_of(dice, length) for length in (100, second, 500, 900)] + [root + prompt_of(dice, 90)] * 2
    onboarded = _comes_back(
        tmp_path / "lfm2", tmp_path / "faults", prompts, {"FullAttentionSpec", "MambaSpec"},
        g2_blocks=80, g3_gb=0.1, g3_dir=str(tmp_path / "disk"),
    )  # fmt: skip
    assert onboarded > sum((len(prompt) - 1) // BLOCK for prompt in prompts)  # and states


@pytest.fixture(scope="module")
def llama4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three layers read the chunk of 128 tokens that they are in, one reads everything."""
    import torch
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    config = Llama4TextConfig(
        **(TINY | {"num_hidden_layers": 4, "intermediate_size": 128}), intermediate_size_mlp=256, num_local_experts=2,
        num_experts_per_tok=1, interleave_moe_layer_step=2, attention_chunk_size=CHUNK, no_rope_layers=[1, 1, 1, 0],
        use_qk_norm=False, pad_token_id=0,
    )  # fmt: skip
    model = Llama4ForCausalLM(config)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if (
                "q_proj" in name or "k_proj" in name
            ):  # else attention is so even that twenty other tokens change nothing
                weights.mul_(3)
    folder = tmp_path_factory.mktemp("llama4")
    model.save_pretrained(folder)
    # Without it every layer is in one group: vLLM finds its groups slow with chunks.
    with environment(VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE="1"):
        yield folder


def test_chunks_come_back(llama4: Path, tmp_path: Path, dice: random.Random) -> None:
    lengths = (100, 129, 320, 385, 500, 900)
    prompts = [prompt_of(dice, length) for length in lengths]
    kinds = {"FullAttentionSpec", "ChunkedLocalAttentionSpec"}
    onboarded = _comes_back(llama4, tmp_path / "faults", prompts, kinds)
    ends = [(length - 1) // BLOCK for length in lengths]
    assert onboarded == sum(end + 3 * (end % (CHUNK // BLOCK)) for end in ends)


def test_events_say_the_group_and_the_engines_own_hash() -> None:
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

    from kvbm.connect.vllm.translate import SchedulerSide
    from kvbm.core.events import Removed, Stored
    from kvbm.core.keys import group_key

    one, two = bytes(range(32)), bytes(range(1, 33))
    side = object.__new__(SchedulerSide)
    side._block = BLOCK
    side._events = [
        Stored("g2", (one, two), None),
        Stored("g2", (group_key(two, 3),), group_key(one, 3)),
        Removed("g2", (group_key(two, 3), one, two)),
    ]
    first, second, *removed = side.take_events()
    hashes = [maybe_convert_block_hash(key) for key in (one, two)]
    assert (first.block_hashes, first.parent_block_hash, first.group_idx) == (hashes, None, 0)
    assert (second.block_hashes, second.parent_block_hash, second.group_idx) == (hashes[1:], hashes[0], 3)
    assert [(event.block_hashes, event.group_idx) for event in removed] == [(hashes, 0), (hashes[1:], 3)]
