"""KVBM under vLLM. `kv_connector_module_path` is this module, `kv_connector` is `KvbmConnector`."""

from typing import TYPE_CHECKING, Any

from kvbm.connect.vllm import configured, contract

with contract.imports():
    from kvbm.connect.vllm import connector as _connector
    from kvbm.connect.vllm import support
    from kvbm.connect.vllm.stats import KvbmPromMetrics, KvbmStats
support.check_platform()
contract.check(_connector.KvbmConnector, KvbmStats, KvbmPromMetrics)

if TYPE_CHECKING:
    from kvbm.connect.vllm.connector import KvbmConnector


def __getattr__(name: str) -> Any:
    """vLLM looks the class up when it makes an engine's configuration: that moment is noted."""
    if name == "KvbmConnector":
        configured.note()
        return _connector.KvbmConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["KvbmConnector"]
