"""KVBM under vLLM. `kv_connector_module_path` is this module, `kv_connector` is `KvbmConnector`."""

from kvbm.connect.vllm import contract

with contract.imports():
    from kvbm.connect.vllm.connector import KvbmConnector
    from kvbm.connect.vllm.stats import KvbmPromMetrics, KvbmStats
contract.check(KvbmConnector, KvbmStats, KvbmPromMetrics)

__all__ = ["KvbmConnector"]
