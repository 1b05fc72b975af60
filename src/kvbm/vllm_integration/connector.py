"""`--kv-transfer-config` with `"kv_connector":"DynamoConnector"` and
`"kv_connector_module_path":"kvbm.vllm_integration.connector"` runs KVBM."""

from kvbm.connect.vllm.connector import KvbmConnector


class DynamoConnector(KvbmConnector):
    """`KvbmConnector` under upstream's name."""


__all__ = ["DynamoConnector"]
