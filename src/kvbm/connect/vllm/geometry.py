"""What vLLM's configuration says about a model's KV, in KVBM's words; and what KVBM refuses to serve."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllm

from kvbm.core.config import Resolved
from kvbm.core.errors import ConfigError, Unsupported
from kvbm.core.keys import Namespace, weights_digest
from kvbm.core.region import Plane, Region
from kvbm.manager.build import Place

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

log = logging.getLogger(__name__)

_TESTED = ("0.32.",)
_SERVED = {"FullAttentionSpec", "MLAAttentionSpec"}
_HASHES = {"sha256", "sha256_cbor"}
_SPECULATION = {"ngram", "draft_model"}
"""Others keep KV that depends on the target's hidden states, and on the token after a block."""


def check(config: VllmConfig, kv: KVCacheConfig, resolved: Resolved) -> None:
    """Raises Unsupported, with a sentence, for what the connector cannot serve correctly yet; ConfigError for settings
    that cannot go together. Warns once about a version of vLLM that was not tested."""
    if not vllm.__version__.startswith(_TESTED):
        log.warning("KVBM was tested with vLLM %s, not with %s", "x, ".join(_TESTED) + "x", vllm.__version__)
    parallel = config.parallel_config
    kinds = [type(_a_spec(group)).__name__ for group in kv.kv_cache_groups]
    spec: Any = kv.kv_cache_groups[0].kv_cache_spec
    speculative = config.speculative_config
    method = speculative.method if speculative is not None else "ngram"
    hash_name = config.cache_config.prefix_caching_hash_algo
    for wrong, sentence in (
        (len(kinds) != 1, f"models with {len(kinds)} KV-cache groups ({', '.join(kinds)})"),
        (kinds[0] not in _SERVED, f"layers of kind {kinds[0]} (only full attention and MLA)"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism"),
        (parallel.decode_context_parallel_size > 1, "decode context parallelism"),
        (getattr(parallel, "prefill_context_parallel_size", 1) > 1, "prefill context parallelism"),
        (getattr(parallel, "nnodes", 1) > 1, "tensor parallelism over several nodes"),
        (config.model_config.is_encoder_decoder, "encoder-decoder models"),
        (config.device_config.device_type != "cpu", f"copies to and from {config.device_config.device_type} memory"),
        (method not in _SPECULATION, f"speculative decoding by {method} (only by n-grams and draft models)"),
        (getattr(speculative, "parallel_drafting", False), "drafts of which all tokens are made at once"),
        (
            kinds[0] == "MLAAttentionSpec" and not config.scheduler_config.enable_chunked_prefill,
            "MLA where the engine cannot go on from a cached beginning of a prompt (without chunked prefill, which "
            "vLLM switches off on a CPU without AMX)",
        ),
        (getattr(config.cache_config, "calculate_kv_scales", False), "KV scales that are computed while serving"),
        (hash_block_tokens(config, kv) > spec.block_size, "block hashes coarser than blocks"),
    ):
        if wrong:
            raise Unsupported(f"KVBM does not serve {sentence} yet. Start the engine without KVBM's connector.")
    if hash_name not in _HASHES:
        raise ConfigError(
            "prefix_caching_hash_algo",
            f"{hash_name} is not a cryptographic hash, and its seed differs between processes unless PYTHONHASHSEED is "
            "set: two prompts could share a key",
            source="the engine's --prefix-caching-hash-algo", remedy="Use sha256 or sha256_cbor.",
        )  # fmt: skip
    if resolved.settings.onboard == "sync" and config.scheduler_config.async_scheduling:
        raise ConfigError(
            "onboard", "sync cannot be used while the engine schedules asynchronously: it cannot recover from a load "
            "that fails inside a step", source=resolved.sources["onboard"],
            remedy="Use onboard=async, or start the engine with --no-async-scheduling.",
        )  # fmt: skip


def _a_spec(group: KVCacheGroupSpec) -> Any:
    """What a group's layers are. Where they differ in size (a draft model's heads, say), vLLM's workers see all of
    them and its scheduler the first."""
    spec = group.kv_cache_spec
    return next(iter(getattr(spec, "kv_cache_specs", {"": spec}).values()))


def hash_block_tokens(config: VllmConfig, kv: KVCacheConfig) -> int:
    """Tokens per block hash of a request."""
    return int(kv.hash_block_size or kv.kv_cache_groups[0].kv_cache_spec.block_size)


def place(config: VllmConfig, kv: KVCacheConfig) -> Place:
    """Where this engine stands."""
    parallel, transfer = config.parallel_config, config.kv_transfer_config
    assert transfer is not None
    assert transfer.engine_id is not None
    return Place(
        engine=transfer.engine_id,
        ranks=parallel.tensor_parallel_size,
        # For dense models, whose engines are independent of each other, vLLM resets data_parallel_rank and both sizes.
        # What it has done before is to end the ids of all data-parallel engines with their rank.
        data_parallel=transfer.engine_id.endswith(f"_dp{parallel.data_parallel_index}"),
        dp_rank=parallel.data_parallel_index,
        dp_local=max(1, parallel.data_parallel_size_local),
        replicated=_replicated(config, kv),
    )


def _replicated(config: VllmConfig, kv: KVCacheConfig) -> bool:
    """Whether every rank holds the same KV: the latent of MLA."""
    ranks = config.parallel_config.tensor_parallel_size
    # vLLM 0.30 does not say it.
    latent = all(type(_a_spec(group)).__name__ == "MLAAttentionSpec" for group in kv.kv_cache_groups)
    return ranks > 1 and bool(getattr(kv, "kv_tp_replicas", ranks if latent else 1) == ranks)


def namespace(config: VllmConfig, kv: KVCacheConfig) -> Namespace:
    """Everything that decides a block's bytes besides its tokens."""
    model, cache, spec = config.model_config, config.cache_config, _a_spec(kv.kv_cache_groups[0])
    weights = _weights(model, config.load_config.load_format)
    facts: dict[str, object] = {
        "engine": "vllm",
        "architecture": model.architectures,
        "config": model.hf_config.to_json_string(),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "cache_dtype": str(cache.cache_dtype),
        "spec": str(spec),
        "layers": sorted(kv.kv_cache_groups[0].layer_names),
        "layout": str(kv.kv_cache_layout),
        "hash": cache.prefix_caching_hash_algo,
        "hash_block": hash_block_tokens(config, kv),
        "tensor_parallel": config.parallel_config.tensor_parallel_size,
    }
    if _replicated(config, kv):
        facts["replicated"] = True
    speculative = config.speculative_config
    if speculative is not None and speculative.method == "draft_model":
        # Its layers' KV is part of each block.
        draft = speculative.draft_model_config
        load_format = (speculative.draft_load_config or config.load_config).load_format
        facts["draft"] = [
            draft.hf_config.to_json_string(), str(draft.dtype), str(draft.quantization), _weights(draft, load_format),
            bool(getattr(speculative, "use_heterogeneous_vocab", False)),
        ]  # fmt: skip
    return Namespace(facts, weights)


def _weights(model: ModelConfig, load_format: str) -> str:
    """What changes when the weights do."""
    folder = Path(model.model)
    if load_format == "dummy":
        return f"dummy seed {model.seed}"
    if folder.is_dir():
        return weights_digest(folder)
    return f"{model.model} revision {getattr(model.hf_config, '_commit_hash', None) or model.revision}"


def g1_region(kv: KVCacheConfig, caches: dict[str, torch.Tensor]) -> Region:
    """The engine's KV cache: a plane per layer, or two where K and V lie apart. Layers that share memory count once.
    Raises Unsupported for memory that is not laid out in one row per block."""
    planes: list[Plane] = []
    seen: set[int] = set()
    for layer in sorted(caches, key=_layer_number):
        tensor = caches[layer]
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        if tensor.device.type != "cpu":
            raise Unsupported(f"KVBM does not copy to and from {tensor.device.type} memory yet.")
        parts = [tensor] if tensor.shape[0] % kv.num_blocks == 0 else list(tensor)
        for part in parts:
            if not part.is_contiguous() or part.shape[0] % kv.num_blocks:
                raise Unsupported(
                    f"KVBM cannot serve layer {layer}: its KV cache of shape {tuple(tensor.shape)} does not keep each "
                    f"of {kv.num_blocks} blocks in one piece."
                )
            row = part.numel() * part.element_size() // kv.num_blocks
            planes.append(Plane(part.data_ptr(), row, row))
    return Region("g1", "host", kv.num_blocks, tuple(planes), owner=list(caches.values()))


def _layer_number(name: str) -> tuple[list[int], str]:
    return [int(part) for part in name.split(".") if part.isdigit()], name
