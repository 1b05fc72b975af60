"""`--kv-transfer-config` with `"kv_connector":"DynamoConnector"` or `"PdConnector"`, and
`"kv_connector_module_path":"kvbm.vllm_integration.connector"`, runs KVBM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvbm.connect.vllm import KvbmConnector, contract
from kvbm.core.errors import ConfigError

with contract.imports():
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.v1.kv_cache_interface import KVCacheConfig


class DynamoConnector(KvbmConnector):
    """`KvbmConnector` under upstream's name."""


class PdConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """The prefill side of vLLM's own disaggregated serving, with KVBM: what `kv_connector_extra_config` lists under
    `connectors`, which has to be KVBM's connector and then `NixlConnector`.

    Making one gives vLLM's `MultiConnector`, which tells both everything. This class is not derived from that: vLLM
    would take it to serve several KV-cache groups at once, which the two do not. Raises ConfigError for other lists.
    """

    def __new__(cls, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> Any:
        transfer = vllm_config.kv_transfer_config
        _check(transfer.kv_connector_extra_config.get("connectors"))
        both = MultiConnector(vllm_config, role, kv_cache_config)
        # KVBM asks for this in the copy of the settings that it is given; vLLM reads it here.
        transfer.kv_load_failure_policy = "recompute"
        return both

    build_kv_connector_stats = MultiConnector.build_kv_connector_stats
    build_prom_metrics = MultiConnector.build_prom_metrics
    requires_piecewise_for_cudagraph = MultiConnector.requires_piecewise_for_cudagraph
    get_required_kvcache_layout = MultiConnector.get_required_kvcache_layout


def _check(connectors: object) -> None:
    names = [each.get("kv_connector") if isinstance(each, Mapping) else each for each in _listed(connectors)]
    if len(names) != 2 or names[0] not in ("DynamoConnector", "KvbmConnector") or names[1] != "NixlConnector":
        raise ConfigError(
            "connectors", f"PdConnector runs KVBM's connector and NixlConnector, in this order, not {names}",
            source="the engine's kv_connector_extra_config",
            remedy='Give it as [{"kv_connector": "DynamoConnector", "kv_connector_module_path": '
            '"kvbm.vllm_integration.connector", "kv_role": "kv_both"}, {"kv_connector": "NixlConnector", "kv_role": '
            '"kv_both"}].',
        )  # fmt: skip


def _listed(connectors: object) -> list[Any]:
    return list(connectors) if isinstance(connectors, list | tuple) else []


__all__ = ["DynamoConnector", "PdConnector"]
