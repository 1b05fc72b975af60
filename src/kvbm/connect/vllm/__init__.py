"""KVBM under vLLM. `kv_connector_module_path` is this module, `kv_connector` is `KvbmConnector`."""

from kvbm.connect.vllm.connector import KvbmConnector

__all__ = ["KvbmConnector"]
