"""What vLLM's configuration says about a model's KV, in KVBM's words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvbm.blocks import LayerGroup
from kvbm.blocks.groups import Kind
from kvbm.build.place import Place
from kvbm.core.errors import Unsupported
from kvbm.core.region import Plane, Region

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
        replicated=replicated(config, kv),
        model=_served_name(config.model_config),
    )


def _served_name(model: ModelConfig) -> str:
    """The name under which clients ask for a model, the first of several."""
    names = model.served_model_name or model.model
    return names if isinstance(names, str) else names[0]


def replicated(config: VllmConfig, kv: KVCacheConfig) -> bool:
    """Whether every rank holds the same KV: the latent of MLA."""
    ranks = config.parallel_config.tensor_parallel_size
    # vLLM 0.30 does not say it.
    latent = all(type(a_spec(group)).__name__ == "MLAAttentionSpec" for group in kv.kv_cache_groups)
    return ranks > 1 and bool(getattr(kv, "kv_tp_replicas", ranks if latent else 1) == ranks)


def parts(cache: Any) -> list[torch.Tensor]:
    """The tensors of one layer's KV cache: recurrent layers have several."""
    return list(cache) if isinstance(cache, list | tuple) else [cache]


def g1_region(kv: KVCacheConfig, caches: dict[str, torch.Tensor], cache_dtype: str = "") -> Region:
    """The engine's KV cache: a plane per layer, or two where K and V lie apart. Layers that share memory count once.
    Raises Unsupported for memory that is not laid out in one row per block."""
    if any(type(group.kv_cache_spec).__name__ == "MambaSpec" for group in kv.kv_cache_groups):
        return _region_of_pages(kv, caches)
    planes: list[Plane] = []
    seen: set[int] = set()
    for layer in sorted(caches, key=layer_number):
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
    owners = [parts(cache)[0] for cache in caches.values()]
    bases = {owner.untyped_storage().data_ptr() for owner in owners}
    if len(pages) != 1 or len(bases) != 1:
        raise Unsupported("KVBM cannot serve recurrent layers whose pages differ in size, or do not lie in one piece.")
    (page,), (base,) = pages, bases
    planes = tuple(Plane(base + start, page, stride) for start, stride in sorted(starts))
    return Region("g1", "host", kv.num_blocks, planes, owner=owners)


def layer_number(name: str) -> tuple[list[int], str]:
    """Sorts layers by their numbers."""
    return [int(part) for part in name.split(".") if part.isdigit()], name
