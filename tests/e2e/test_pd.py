"""KVBM and vLLM's NixlConnector in one engine: prefill here, decode in an engine that has NixlConnector alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvbm.core.errors import ConfigError
from tests.e2e.conftest import prompt_of
from tests.e2e.engine import Done, Engine, environment
from tests.ports import free_port

NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
KVBM = {
    "kv_connector": "DynamoConnector",
    "kv_connector_module_path": "kvbm.vllm_integration.connector",
    "kv_role": "kv_both",
}
HAND_OVER = {"do_remote_decode": True, "do_remote_prefill": False} | dict.fromkeys(
    ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
)


def start(tiny: Path, transfer: dict[str, Any]) -> Engine:
    from vllm import envs

    envs.disable_envs_cache()  # which an engine that started before has filled
    with environment(VLLM_NIXL_SIDE_CHANNEL_PORT=str(free_port())):
        # KVBM's connector has vLLM turn this off; NixlConnector refuses a peer where it is on.
        return Engine(tiny, kv_transfer_config=transfer, disable_hybrid_kv_cache_manager=True)


def test_prefill_offloads_and_hands_over(
    tiny: Path, plain: Callable[..., list[Done]], dice: random.Random, tmp_path: Path
) -> None:
    prompts = [prompt_of(dice, length) for length in (320, 601)]
    expected = [done.tokens for done in plain(prompts, 12)]
    ours = KVBM | {"kv_connector_extra_config": {"g2_blocks": 256, "run_dir": str(tmp_path)}}
    both = KVBM | {"kv_connector": "PdConnector", "kv_connector_extra_config": {"connectors": [ours, NIXL]}}
    with closing(start(tiny, both)) as prefill, closing(start(tiny, NIXL)) as decode:
        computed = _counted(decode)
        side = prefill.core.scheduler.connector.sub_connectors[0]._scheduler.side.side
        decode.run([prompts[0]], 12)  # the negative control: what is not handed over is computed
        assert sum(computed) >= 320 + 11
        decode.forget_device()
        for turn in range(2):
            for prompt, answer in zip(prompts, expected, strict=True):
                name = prefill.add(prompt, 1, transfer=HAND_OVER)
                while not prefill.results[name].reason:  # not until it has its blocks back: they are read first
                    prefill.step()
                computed.clear()
                (done,) = decode.run([prompt], 12, transfer=prefill.results[name].handed)
                assert done.tokens == answer
                assert sum(computed) <= 32 + 12
                prefill.drain()
            blocks = side.control.status()["offload"]["blocks"]
            assert blocks >= sum(len(prompt) // 32 for prompt in prompts)
            if turn:
                assert side.control.status()["tokens"]["g2"] > 0  # the prefill side lost it and had it back
            prefill.forget_device()
            decode.forget_device()


def _counted(engine: Engine) -> list[int]:
    """How many tokens each of the engine's steps computes."""
    counts: list[int] = []
    schedule = engine.core.scheduler.schedule

    def counting(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        counts.append(output.total_num_scheduled_tokens)
        return output

    engine.core.scheduler.schedule = counting
    return counts


@pytest.mark.parametrize("connectors", [None, [], [KVBM], [NIXL, KVBM], [KVBM, NIXL, NIXL], [KVBM, KVBM], "x", [1, 2]])
def test_other_lists_are_refused(connectors: object) -> None:
    from kvbm.vllm_integration.connector import _check

    with pytest.raises(ConfigError, match="in this order"):
        _check(connectors)
