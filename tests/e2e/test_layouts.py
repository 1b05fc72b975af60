"""Which layout vLLM itself chooses for its KV where KVBM asks for blocks outermost, and where it must not ask."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.e2e.engine import CONNECTOR, environment, write_gemma

pytestmark = pytest.mark.untimed
FLASH = ["LBNHC", "LBHNC", "BLHNC", "BLNHC"]
"""What a backend that takes blocks outermost says, its favourite first."""
ASKS = {**CONNECTOR, "kv_connector_extra_config": {"g1_layout": "blocks"}}
PD = {"kv_connector": "PdConnector", "kv_connector_module_path": "kvbm.vllm_integration.connector"}
NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}


def several(*connectors: dict[str, Any]) -> dict[str, Any]:
    extra = {"connectors": list(connectors)}
    return {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def configured(model: Path, transfer: dict[str, Any], device: str = "cuda", **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    with environment(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1"):
        config = EngineArgs(
            model=str(model), skip_tokenizer_init=True, enforce_eager=True, dtype="float32",
            kv_transfer_config=transfer, **options,
        ).create_engine_config()  # fmt: skip
    config.device_config = copy.copy(config.device_config)
    config.device_config.device_type = device
    return config


def resolved(config: Any, supported: list[str]) -> str:
    from vllm.v1.attention.backends.utils import resolve_kv_cache_layout

    return str(resolve_kv_cache_layout(config, [supported, supported]).name)


def test_it_asks_where_the_setting_says_so(tiny: Path) -> None:
    assert resolved(configured(tiny, ASKS), FLASH) == "BLNHC"
    assert resolved(configured(tiny, CONNECTOR), FLASH) == "LBNHC"


@pytest.mark.parametrize(
    ("transfer", "options", "variable", "device", "why", "chosen"),
    [
        (ASKS, {"block_size": 32}, None, "cuda", "the size of blocks is given", "LBNHC"),
        (ASKS, {}, "HND", "cuda", "VLLM_KV_CACHE_LAYOUT is HND", "LBHNC"),
        (ASKS, {}, None, "cpu", "does not compute on a GPU", "LBNHC"),
        (several(ASKS, NIXL), {}, None, "cuda", "one of several connectors", "LBHNC"),
        (several(NIXL, ASKS), {}, None, "cuda", "one of several connectors", "LBHNC"),
        (several(ASKS, NIXL) | PD, {}, None, "cuda", "one of several connectors", "LBHNC"),
    ],
    ids=["block-size", "variable", "cpu", "first-of-several", "last-of-several", "pd"],
)
def test_it_does_not_ask(
    tiny: Path, caplog: pytest.LogCaptureFixture, transfer: dict[str, Any], options: dict[str, Any],
    variable: str | None, device: str, why: str, chosen: str,
) -> None:  # fmt: skip
    from kvbm.connect.vllm import layouts

    config = configured(tiny, transfer, device, **options)
    with environment(VLLM_KV_CACHE_LAYOUT=variable), caplog.at_level("WARNING", "kvbm"):
        assert resolved(config, FLASH) == chosen
        layouts.wanted(config, _asks(), among_others=False) if variable else None
    assert why in caplog.text


def _asks() -> Any:
    from kvbm.core.config import load

    return load(extra={"g1_layout": "blocks"})


def test_layers_of_several_kinds_are_left_to_the_engine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = configured(write_gemma(tmp_path), ASKS)
    with caplog.at_level("WARNING", "kvbm"):
        assert resolved(config, FLASH) == "LBNHC"
    assert "layers are of several kinds" in caplog.text


def test_what_a_backend_cannot_do_is_dropped(tiny: Path) -> None:
    """FlexAttention, say."""
    assert resolved(configured(tiny, ASKS), ["LBNHC"]) == "LBNHC"


def test_two_wishes_would_end_the_start(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    from kvbm.connect.vllm import layouts

    monkeypatch.setattr(layouts, "wanted", lambda *_, **__: "BLNHC")
    with pytest.raises(ValueError, match="KV cache layout mismatch"):
        resolved(configured(tiny, several(ASKS, NIXL)), FLASH)


@pytest.mark.parametrize(("layout", "said"), [("BLNHC", "as KVBM asked for"), ("LBNHC", "not what g1_layout")])
def test_it_says_what_it_got(tiny: Path, caplog: pytest.LogCaptureFixture, layout: str, said: str) -> None:
    from kvbm.connect.vllm import layouts

    with caplog.at_level("INFO", "kvbm"):
        layouts.got(configured(tiny, ASKS), _asks(), SimpleNamespace(kv_cache_layout=layout))  # type: ignore[arg-type]
    assert said in caplog.text
