"""What KVBM relies on in vLLM, looked at once, at start, because every version changes some of it; and what the
versions that are served do differently. Asks what is there, not for a number; the other files need not ask at all."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import vllm

from kvbm.core.errors import Unsupported
from kvbm.core.identity import VLLM as TESTED

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

log = logging.getLogger(__name__)

VERSION = vllm.__version__

READS = {
    "vllm.config.CacheConfig": "cache_dtype enable_prefix_caching prefix_caching_hash_algo",
    "vllm.config.DeviceConfig": "device_type",
    "vllm.config.KVEventsConfig": "enable_kv_cache_events",
    "vllm.config.KVTransferConfig": "engine_id kv_connector_extra_config kv_load_failure_policy",
    "vllm.config.LoadConfig": "download_dir ignore_patterns load_format model_loader_extra_config",
    "vllm.config.ModelConfig": "architectures code_revision dtype enable_sleep_mode get_sliding_window "
    "hf_config hf_config_path hf_overrides hf_text_config is_encoder_decoder is_hybrid is_prefix_caching_supported "
    "max_model_len model multimodal_config pooler_config quantization revision seed trust_remote_code",
    "vllm.config.ParallelConfig": "data_parallel_index data_parallel_size_local decode_context_parallel_size "
    "distributed_executor_backend pipeline_parallel_size tensor_parallel_size worker_cls worker_extension_cls",
    "vllm.config.SchedulerConfig": "async_scheduling enable_chunked_prefill",
    "vllm.config.VllmConfig": "cache_config compilation_config device_config kv_events_config kv_transfer_config "
    "load_config lora_config model_config parallel_config scheduler_config speculative_config "
    "weight_transfer_config",
    "vllm.distributed.kv_events.BlockRemoved": "block_hashes group_idx medium",
    "vllm.distributed.kv_events.BlockStored": "block_hashes block_size group_idx lora_id lora_name medium "
    "parent_block_hash token_ids",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorTransferResults": "failed_recving finished_recving",
    "vllm.lora.request.LoRARequest": "lora_int_id lora_name lora_path",
    "vllm.v1.core.block_pool.BlockPool": "cached_block_hash_to_block num_gpu_blocks",
    "vllm.v1.core.kv_cache_manager.KVCacheBlocks": "get_block_ids",
    "vllm.v1.core.kv_cache_manager.KVCacheManager": "block_pool evict_blocks get_block_ids",
    "vllm.v1.outputs.KVConnectorOutput": "invalid_block_ids",
    "vllm.v1.core.sched.output.CachedRequestData": "new_block_ids num_computed_tokens req_ids resumed_req_ids",
    "vllm.v1.core.sched.output.NewRequestData": "block_ids num_computed_tokens req_id",
    "vllm.v1.core.sched.output.SchedulerOutput": "num_scheduled_tokens scheduled_cached_reqs scheduled_new_reqs "
    "total_num_scheduled_tokens",
    "vllm.v1.kv_cache_interface.KVCacheConfig": "kv_cache_groups kv_cache_layout num_blocks",
    "vllm.v1.kv_cache_interface.KVCacheGroupSpec": "kv_cache_spec layer_names",
    "vllm.v1.kv_cache_interface.KVCacheSpec": "block_size",
    "vllm.v1.metrics.stats.PrefillStats": "num_cached_tokens num_computed_tokens num_prompt_tokens",
    "vllm.v1.request.Request": "block_hashes kv_transfer_params lora_request num_computed_tokens num_preemptions "
    "num_prompt_tokens num_tokens prefill_stats request_id skip_reading_prefix_cache",
}
"""vLLM's classes, and what of their objects KVBM reads without asking whether it is there."""


ONLY_SOME = {"restore_kv_caches", "supports_sleep_mode", "unregister_kv_caches"}
"""Calls of the connector that only some of the versions make."""


def warn_if_untested(version: str = vllm.__version__) -> None:
    """Says so where the end-to-end tests did not run with this version."""
    if not version.startswith(tuple(f"{each}." for each in TESTED)) or "dev" in version or "rc" in version:
        log.warning("KVBM was tested with vLLM %s, not with %s", ", ".join(TESTED), version)


@contextmanager
def imports() -> Iterator[None]:
    """Around imports of vLLM's names: one that is not there raises Unsupported, with a sentence."""
    try:
        yield
    except ImportError as error:
        if not (error.name or "").startswith("vllm."):
            raise  # something vLLM needs is not installed, or vLLM itself
        raise _changed([str(error).split(" (")[0]]) from error


def check(connector: type, *helpers: type) -> None:
    """`connector` and `helpers` are KVBM's classes that are derived from vLLM's. Raises Unsupported, with a sentence,
    where vLLM would call them in another way, or lacks what they read."""
    wrong = [
        f"{connector.__mro__[1].__name__} has no {name}"
        for name in _public(connector)
        if not _base(connector, name) and name not in ONLY_SOME
    ]
    for cls in (connector, *helpers):
        abstract = sorted(getattr(cls, "__abstractmethods__", ()))
        wrong += [f"{cls.__mro__[1].__name__} wants {name}" for name in abstract]
        for name in (*_public(cls), "__init__"):
            ours, theirs = vars(cls).get(name), _base(cls, name)
            if inspect.isroutine(ours) and inspect.isroutine(theirs) and _parameters(ours) != _parameters(theirs):
                wrong.append(f"{cls.__mro__[1].__name__}.{name} takes ({', '.join(_parameters(theirs))})")
    for path, names in READS.items():
        module, name = path.rsplit(".", 1)
        with imports():
            read = getattr(import_module(module), name, None)
        if read is None:
            wrong.append(f"{module} has no {name}")
        else:
            wrong += [f"{name} has no {attribute}" for attribute in names.split() if not _has(read, attribute)]
    if wrong:
        raise _changed(wrong)


def _changed(wrong: list[str]) -> Unsupported:
    error = Unsupported(
        f"KVBM does not fit vLLM {vllm.__version__}: {'; '.join(wrong)}. It serves vLLM {', '.join(TESTED)}: install "
        "one of these, or start the engine without KVBM's connector."
    )
    # vLLM buries what ends its start in stack traces of several processes.
    log.error("%s", error)
    return error


def _public(cls: type) -> list[str]:
    return [name for name in vars(cls) if not name.startswith("_")]


def _base(cls: type, name: str) -> Any:
    return next((vars(base)[name] for base in cls.__mro__[1:-1] if name in vars(base)), None)


def _parameters(call: Any) -> list[str]:
    return [str(each.replace(annotation=each.empty)) for each in _signature(call).values()]


def _signature(call: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(getattr(call, "__func__", call)).parameters)


def _has(cls: Any, attribute: str) -> bool:
    """Whether objects of `cls` have it: a method, a field, or set by a constructor."""
    code = getattr(cls.__init__, "__code__", None)
    fields = getattr(cls, "__dataclass_fields__", ())
    return hasattr(cls, attribute) or attribute in fields or (code is not None and attribute in code.co_names)


# ---------------------------------------------------------------------- what differs

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ModuleNotFoundError:  # before 0.32 vLLM does not tell hits apart
    HIT_SOURCE = None
else:
    HIT_SOURCE = CacheHitSource.HOST


def tells_of_sleep() -> bool:
    """Whether vLLM tells a connector before it unmaps the KV cache: from 0.33 on."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    return hasattr(KVConnectorBase_V1, "unregister_kv_caches")


def hash_block_tokens(config: VllmConfig, kv: KVCacheConfig) -> int:
    """Tokens per block hash of a request. Before 0.32 `kv` does not say it; of one group it is the block."""
    known = getattr(kv, "hash_block_size", None)
    if known is None and len(kv.kv_cache_groups) > 1:
        from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

        _, known = resolve_kv_cache_block_sizes(kv, config)
    return int(known or kv.kv_cache_groups[0].kv_cache_spec.block_size)
