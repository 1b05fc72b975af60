"""`--kv-transfer-config '{"kv_connector":"DynamoConnector","kv_connector_module_path":"kvbm.vllm_integration.connector",
"kv_role":"kv_both"}'` runs KVBM."""

from kvbm.connect.vllm.connector import KvbmConnector


class DynamoConnector(KvbmConnector):
    """`KvbmConnector` under upstream's name."""


__all__ = ["DynamoConnector"]
