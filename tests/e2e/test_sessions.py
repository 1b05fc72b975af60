"""A request whose prompt comes in pieces: what it computed is stored, and is what the tokens say that it kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest

from kvbm.core.events import Admitted
from kvbm.link.messages import Step
from tests.e2e.conftest import prompt_of
from tests.e2e.engine import BLOCK, Done, Engine, asynchronous_scheduling, write_gemma
from tests.e2e.test_requests import adapter

Plain = Callable[..., list[Done]]
PIECES = 95, 30, 127, 33, 1, 64
"""Tokens of each: with the answers (9 tokens, of which the last is taken back) pieces begin inside a block, and where
one begins."""
_CLOSE = 1e-4
"""By how much float32 may differ that was summed up in another order."""


def session(
    engine: Engine, pieces: Sequence[Sequence[int]], *, ahead: bool = False, lora: Any = None
) -> tuple[list[int], dict[int, int]]:
    """The tokens that a session of these pieces has kept, and by position those that it took back: what it sampled
    last of each. `ahead`: all come while it still computes the first."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.request import RequestStatus

    def add(piece: Sequence[int], *, resumable: bool = True) -> None:
        sampling = SamplingParams(
            temperature=0, max_tokens=9, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        engine.vllm.engine_core.add_request(
            engine.vllm.input_processor.process_inputs(
                "session", {"prompt_token_ids": list(piece)}, sampling, lora_request=lora, resumable=resumable,
                supported_tasks=engine.vllm.get_supported_tasks(),
            )
        )  # fmt: skip

    taken: dict[int, int] = {}
    for piece in pieces:
        add(piece)
        request = engine.core.scheduler.requests["session"]
        while not ahead and request.status != RequestStatus.WAITING_FOR_STREAMING_REQ:
            engine.step()
        if not ahead:
            taken[request.num_computed_tokens] = request.all_token_ids[request.num_computed_tokens]
    while request.status != RequestStatus.WAITING_FOR_STREAMING_REQ:
        engine.step()
    kept = list(request.all_token_ids[: request.num_computed_tokens])
    add([0], resumable=False)
    engine.drain()
    engine.settle()
    return kept, taken


def stored(engine: Engine) -> dict[bytes, tuple[int, Any]]:
    """What host memory has under each key: after how many others, and what."""
    engine.settle()
    pool = engine.leader.pool
    slots = np.fromfile(engine.arena(), np.float32).reshape(pool.capacity, -1)
    found = {block.key: block for key in pool.keys(0, len(slots)) if (block := pool.look(key)) is not None}

    def after(key: bytes) -> int:
        parent = found[key].parent
        return 0 if parent is None else 1 + after(parent)

    return {key: (after(key), slots[block.slot]) for key, block in found.items()}


def check(engine: Engine, plain: Plain, kept: list[int], taken: dict[int, int], **options: Any) -> None:
    """All that it kept is found, and each block is what it is where the tokens come as one prompt; where a token that
    was taken back stands instead of what followed, nothing is found from its block on."""
    of_session, whole = stored(engine), [*kept, 7]
    (answer,) = plain([whole], 12, **options)
    engine.forget_device()
    (again,) = engine.run([whole], 12, **options)
    assert (again.tokens, again.cached) == (answer.tokens, len(kept) // BLOCK * BLOCK)
    _compute(engine, whole, **options)
    of_prompt = stored(engine)
    same = [key for key in of_session if key in of_prompt]
    assert len(same) >= len(kept) // BLOCK
    for key in same:
        np.testing.assert_allclose(of_session[key][1], of_prompt[key][1], atol=_CLOSE)
    before = dict(of_prompt)
    for at, token in [*taken.items()][:-1]:
        other = [*kept[:at], token, *kept[at + 1 :], 7]
        (answer,) = plain([other], 12, **options)
        engine.forget_device()
        (again,) = engine.run([other], 12, **options)
        assert (again.tokens, again.cached) == (answer.tokens, at // BLOCK * BLOCK)
        now = stored(engine)
        (right,) = (each for place, each in of_prompt.values() if place == at // BLOCK)
        (wrong,) = (each for key, (place, each) in now.items() if place == at // BLOCK and key not in before)
        assert np.abs(wrong - right).max() > 10 * _CLOSE, "it would not be noticed"
        before |= now


def _compute(engine: Engine, prompt: list[int], **options: Any) -> None:
    """Has host memory hold this prompt as it is computed, and nothing else."""
    engine.forget_device()
    engine.leader.pool.discard(stored(engine))
    engine.run([prompt], 1, **options)


def test_what_another_connector_loaded_is_no_session() -> None:
    """vLLM places a request again, without asking, where a load that it waited for is over."""
    from kvbm.connect.vllm.sessions import Sessions
    from kvbm.connect.vllm.translate import SchedulerSide

    side = Mock(_block=BLOCK, _computed={})
    with patch("kvbm.connect.vllm.geometry.layer_groups", return_value=[]):
        side._sessions = Sessions(Mock(speculative_config=None), Mock())
    side.match, side.place, side.step, side._placed = (
        partial(getattr(SchedulerSide, name), side) for name in ("match", "place", "step", "_placed")
    )
    side.leader.match.return_value, side.leader.place.return_value = 0, Admitted(0, 0, 0)
    side.leader.seal.return_value = Step()
    request = SimpleNamespace(
        request_id="r", num_computed_tokens=0, num_tokens=100, skip_reading_prefix_cache=False
    )  # fmt: skip
    blocks = SimpleNamespace(get_block_ids=lambda: ([1, 2, 3, 4],))

    def scheduled(computed: int) -> None:
        request.num_computed_tokens = computed
        side.place(request, blocks, 0)
        new = SimpleNamespace(req_id="r", num_computed_tokens=computed, block_ids=([1, 2, 3, 4],))
        none = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
        side.step(
            SimpleNamespace(
                scheduled_new_reqs=[new], scheduled_cached_reqs=none, num_scheduled_tokens={"r": 5},
                total_num_scheduled_tokens=5,
            )
        )  # fmt: skip

    side.match(request, 0)
    side.place(request, blocks, 0)
    scheduled(99)
    side.leader.go_on.assert_not_called()
    side.leader.grow.assert_called_once_with("r", [1, 2, 3, 4], replace=True, found=4, others=())
    scheduled(102)
    side.leader.go_on.assert_called_once_with("r", [1, 2, 3, 4], 3, ())
    side.match(request, 0)  # it was preempted
    scheduled(99)
    assert side.leader.grow.call_count == 2


@pytest.fixture(
    scope="module", params=[{}, {"onboard": "sync"}, {"overlapping": True}], ids=["", "sync", "overlapping"]
)
def engine(request: pytest.FixtureRequest, tiny: Path) -> Iterator[Engine]:
    settings = dict(request.param)
    overlapping = settings.pop("overlapping", False)
    options = {"async_scheduling": True} if overlapping else {}
    with asynchronous_scheduling() if overlapping else nullcontext():
        engine = Engine(tiny, settings, num_gpu_blocks_override=128, enable_lora=True, max_lora_rank=8, **options)
    yield engine
    engine.close()


@pytest.mark.usefixtures("always_load")
@pytest.mark.parametrize("ahead", [False, True])
def test_all_that_it_kept_is_found(engine: Engine, plain: Plain, dice: random.Random, ahead: bool) -> None:
    kept, taken = session(engine, [prompt_of(dice, length) for length in PIECES], ahead=ahead)
    check(engine, plain, kept, taken)


@pytest.mark.usefixtures("always_load")
def test_with_an_adapter(engine: Engine, tiny: Path, dice: random.Random, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    lora = LoRARequest("mine", 1, str(adapter(tmp_path / "mine", 1)))
    kept, taken = session(engine, [prompt_of(dice, length) for length in PIECES], lora=lora)
    with closing(Engine(tiny, num_gpu_blocks_override=128, enable_lora=True, max_lora_rank=8)) as other:

        def plain(prompts: Sequence[Sequence[int]], tokens: int, **options: Any) -> list[Done]:
            other.forget_device()
            return other.run(prompts, tokens, **options)

        check(engine, plain, kept, taken, lora=lora)
    engine.vllm.remove_lora(1)


@pytest.mark.usefixtures("always_load")
def test_what_it_found_is_stored_no_more_than_before(engine: Engine, dice: random.Random) -> None:
    """KVBM has not seen computed what the engine's own cache gave to its first piece."""
    first, *rest = [prompt_of(dice, length) for length in PIECES]
    engine.run([first], 2, params={"save": False})
    before = engine.side.totals.offload.blocks
    engine.leader.forget(range(128))
    session(engine, [[*first, 5], *rest])
    assert engine.side.totals.offload.blocks == before


@pytest.mark.usefixtures("always_load")
def test_with_sliding_windows(tmp_path: Path, dice: random.Random) -> None:
    model = write_gemma(tmp_path)
    with (
        closing(Engine(model, {"checkpoint_tokens": BLOCK}, num_gpu_blocks_override=256)) as engine,
        closing(Engine(model, num_gpu_blocks_override=256)) as other,
    ):

        def plain(prompts: Sequence[Sequence[int]], tokens: int) -> list[Done]:
            other.forget_device()
            return other.run(prompts, tokens)

        kept, _ = session(engine, [prompt_of(dice, length) for length in PIECES])
        check(engine, plain, kept, {})


@pytest.mark.usefixtures("always_load", "guesses")
def test_where_it_speculates_what_follows_the_first_piece_is_not_stored(
    tiny: Path, plain: Plain, dice: random.Random
) -> None:
    """What stands where the next piece begins may be that of a guess which came true after the end."""
    guessing = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    with closing(Engine(tiny, {}, num_gpu_blocks_override=128, speculative_config=guessing)) as engine:
        first, *rest = [prompt_of(dice, length) for length in PIECES]
        kept, _ = session(engine, [first, *rest])
        engine.forget_device()
        (again,) = engine.run([[*kept, 7]], 12)
        assert again.cached == (len(first) + 8) // BLOCK * BLOCK
