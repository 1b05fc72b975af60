"""What vLLM's configuration says about a model's KV, in KVBM's words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbm.blocks import LayerGroup
from kvbm.blocks.groups import Kind
from kvbm.connect.vllm import contract
from kvbm.core.errors import Unsupported
from kvbm.core.keys import Namespace, weights_digest
from kvbm.core.region import Plane, Region
from kvbm.manager.build import Place

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

KINDS: dict[str, tuple[Kind, str]] = {
    "FullAttentionSpec": ("full", ""),
    "MLAAttentionSpec": ("full", ""),
    "SlidingWindowSpec": ("window", "sliding_window"),
    "ChunkedLocalAttentionSpec": ("chunk", "attention_chunk_size"),
    "MambaSpec": ("state", ""),
}
"""What is served: the rule of such a group, and where its tokens stand."""
_FP8 = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
"""KV that has one scale for a whole tensor."""


def layer_groups(kv: KVCacheConfig) -> list[LayerGroup]:
    """The rules of the engine's layer groups; none where there is one and it needs all blocks."""
    groups = []
    for group in kv.kv_cache_groups:
        spec = a_spec(group)
        kind, tokens = KINDS[type(spec).__name__]
        # What a model that predicts several tokens keeps behind its window has to be loaded too.
        behind = int(getattr(spec, "extra_retained_tokens", 0))
        groups.append(LayerGroup(kind, spec.block_size, int(getattr(spec, tokens)) + behind if tokens else 1))
    return groups if len(groups) > 1 or groups[0].kind != "full" else []


def a_spec(group: KVCacheGroupSpec) -> Any:
    """What a group's layers are. Where they differ in size (a draft model's heads, say), vLLM's workers see all of
    them and its scheduler the first."""
    spec = group.kv_cache_spec
    return next(iter(getattr(spec, "kv_cache_specs", {"": spec}).values()))


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
    latent = all(type(a_spec(group)).__name__ == "MLAAttentionSpec" for group in kv.kv_cache_groups)
    return ranks > 1 and bool(getattr(kv, "kv_tp_replicas", ranks if latent else 1) == ranks)


def namespace(config: VllmConfig, kv: KVCacheConfig) -> Namespace:
    """Everything that decides a block's bytes besides its tokens."""
    model, cache = config.model_config, config.cache_config
    specs = [str(a_spec(group)) for group in kv.kv_cache_groups]
    layers = [sorted(group.layer_names) for group in kv.kv_cache_groups]
    weights = _weights(model, config.load_config.load_format)
    facts: dict[str, object] = {
        "engine": f"vllm {contract.MINOR}",
        "architecture": model.architectures,
        "config": model.hf_config.to_json_string(),
        # Longer contexts have other position embeddings (Phi-3's LongRoPE) or other attention (Llama 4's temperature).
        "max_model_len": model.max_model_len,
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "cache_dtype": str(cache.cache_dtype),
        "spec": specs if len(specs) > 1 else specs[0],
        "layers": layers if len(specs) > 1 else layers[0],
        "layout": str(kv.kv_cache_layout),
        "hash": cache.prefix_caching_hash_algo,
        "hash_block": contract.hash_block_tokens(config, kv),
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
    # Loading a model writes into its configuration, in the process that loads it (Llama 4, Falcon).
    return Namespace(facts, weights, altered=frozenset({"config", "draft"}))


def kernels(config: VllmConfig, kv: KVCacheConfig) -> str:
    """What decides how a block's bytes are laid out besides its shape, of the layers that are loaded here: attention
    backends and, on a CPU, the instructions that they use (with AMX it packs keys another way than without)."""
    layers = config.compilation_config.static_forward_context
    found = set()
    for name in (name for group in kv.kv_cache_groups for name in group.layer_names):
        backend = getattr(layers[name], "attn_backend", None) or layers[name].get_attn_backend()
        found.add(f"{backend.get_name()} {getattr(layers[name], 'isa', '')}".rstrip())
    return ", ".join(sorted(found))


def _weights(model: ModelConfig, load_format: str) -> str:
    """What changes when the weights do."""
    folder = Path(model.model)
    if load_format == "dummy":
        return f"dummy seed {model.seed}"
    if folder.is_dir():
        return weights_digest(folder)
    return f"{model.model} revision {getattr(model.hf_config, '_commit_hash', None) or model.revision}"


def g1_region(kv: KVCacheConfig, caches: dict[str, torch.Tensor], cache_dtype: str = "") -> Region:
    """The engine's KV cache: a plane per layer, or two where K and V lie apart. Layers that share memory count once.
    Raises Unsupported for memory that is not laid out in one row per block."""
    if any(type(group.kv_cache_spec).__name__ == "MambaSpec" for group in kv.kv_cache_groups):
        return _region_of_pages(kv, caches)
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
    kinds = {str(tensor.dtype) for tensor in caches.values()}
    dtype = _numbers(kinds.pop(), cache_dtype) if len(kinds) == 1 else ""
    return Region("g1", "host", kv.num_blocks, tuple(planes), owner=list(caches.values()), dtype=dtype)


def _numbers(tensor: str, cache_dtype: str) -> str:
    """What KV of this type is made of, as `Region.dtype` says it; empty where scales lie between the numbers."""
    if cache_dtype in _FP8:
        return _FP8[cache_dtype]
    plain = tensor.removeprefix("torch.")
    return plain if cache_dtype in ("auto", plain) else ""


def _region_of_pages(kv: KVCacheConfig, caches: dict[str, Any]) -> Region:
    """The same from where vLLM says that the layers' pages lie, which all groups share: the tensors of recurrent layers
    leave out what fills up a page."""
    pages = {group.kv_cache_spec.page_size_bytes for group in kv.kv_cache_groups}
    starts = {
        (tensor.offset + number * tensor.layer_stride, tensor.block_stride)
        for tensor in kv.kv_cache_tensors
        for number in range(len(tensor.layers))
    }
    owners = [cache[0] if isinstance(cache, list | tuple) else cache for cache in caches.values()]
    bases = {owner.untyped_storage().data_ptr() for owner in owners}
    if len(pages) != 1 or len(bases) != 1:
        raise Unsupported("KVBM cannot serve recurrent layers whose pages differ in size, or do not lie in one piece.")
    (page,), (base,) = pages, bases
    planes = tuple(Plane(base + start, page, stride) for start, stride in sorted(starts))
    return Region("g1", "host", kv.num_blocks, planes, owner=owners)


def _layer_number(name: str) -> tuple[list[int], str]:
    return [int(part) for part in name.split(".") if part.isdigit()], name
