"""KVBM: a KV block manager for LLM inference. Independent of NVIDIA's package of the same import name."""

__version__ = "0.1.0"
