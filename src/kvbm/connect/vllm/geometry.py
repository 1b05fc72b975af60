"""What vLLM's configuration says about a model's KV, in KVBM's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

from kvbm.abc.transport import Device
from kvbm.blocks import LayerGroup
from kvbm.blocks.groups import Kind
from kvbm.build.place import Place
from kvbm.core.errors import Broken, Unsupported
from kvbm.core.region import Plane, Region
from kvbm.transfer.cuda import CudaDevice

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
OUTERMOST = {"LHBNC": "LBHNC", "BLHNC": "LBHNC", "BHLNC": "LBHNC", "BLNHC": "LBNHC"}
"""vLLM's layouts with heads or blocks outermost, and for each the one with layers outermost of the same bytes."""
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
    return specs_of(group)[0]


def specs_of(group: KVCacheGroupSpec) -> list[Any]:
    """Those of a group's layers, where they differ; else the one."""
    spec = group.kv_cache_spec
    return list(getattr(spec, "kv_cache_specs", {"": spec}).values())


def by_layer(kv: KVCacheConfig) -> dict[str, Any]:
    """What each layer is."""
    return {
        name: getattr(group.kv_cache_spec, "kv_cache_specs", {}).get(name, group.kv_cache_spec)
        for group in kv.kv_cache_groups
        for name in group.layer_names
    }


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


def device(caches: dict[str, Any]) -> Device | None:
    """What the engine's KV lies on, None where that is memory of this process. Raises Unsupported, also where the
    device's driver cannot be used."""
    tensors = [part for cache in caches.values() for part in parts(cache)]
    kinds = {tensor.device.type for tensor in tensors}
    if kinds == {"cpu"}:
        return None
    if kinds != {"cuda"} or len({tensor.device for tensor in tensors}) > 1:
        raise Unsupported(f"KVBM does not copy to and from {' and '.join(sorted(kinds))} memory.")
    import torch

    if torch.version.hip is not None:
        raise Unsupported("KVBM does not serve AMD's GPUs (ROCm).")
    where, base = tensors[0].device, tensors[0].untyped_storage().data_ptr()
    try:
        return CudaDevice.of(base, lambda: int(torch.cuda.current_stream(where).cuda_stream), keep=tensors)
    except Broken as error:
        raise Unsupported(f"KVBM cannot serve this GPU: {error}.") from error


def g1_region(kv: KVCacheConfig, caches: dict[str, Any], cache_dtype: str = "") -> Region:
    """The engine's KV cache, where vLLM says that it placed it: the tensors leave out what fills up a page, and may
    have the blocks of a kernel, which are smaller. Raises Unsupported."""
    tensors = [parts(cache)[0] for cache in caches.values()]
    bases = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    if len(bases) != 1:
        raise Unsupported("KVBM cannot serve layers whose KV does not lie in one piece.")
    planes = _planes(kv, bases.pop(), {layer: parts(cache)[0].data_ptr() for layer, cache in caches.items()})
    kinds = {str(part.dtype) for cache in caches.values() for part in parts(cache)}
    dtype = _numbers(kinds.pop(), cache_dtype) if len(kinds) == 1 and not _recurrent(kv) else ""
    on = device(caches)
    kind, owner = ("host", list(caches.values())) if on is None else ("cuda", on)
    return Region("g1", kind, kv.num_blocks, planes, owner=owner, dtype=dtype)


def inside_blocks(kv: KVCacheConfig) -> str | None:
    """The layout, as far as a block's bytes depend on it."""
    layout = OUTERMOST.get(str(kv.kv_cache_layout), kv.kv_cache_layout)
    one_head = all(getattr(spec, "num_heads", 0) == 1 for group in kv.kv_cache_groups for spec in specs_of(group))
    return "LBHNC" if layout == "LBNHC" and one_head else layout


def _recurrent(kv: KVCacheConfig) -> bool:
    return any(type(group.kv_cache_spec).__name__ == "MambaSpec" for group in kv.kv_cache_groups)


def _planes(kv: KVCacheConfig, base: int, begins: Mapping[str, int]) -> tuple[Plane, ...]:
    """A plane for each run of bytes that a block has, in the order of layers, then of heads: so a slot has the same
    bytes whichever of layers, blocks and heads are outermost in the engine's memory. Layers that share memory count
    once. `begins` is where a layer's tensor does. Raises Unsupported."""
    specs = by_layer(kv)
    placed: list[tuple[Any, list[Plane]]] = []
    for tensor in kv.kv_cache_tensors:
        for number, layer in enumerate(tensor.layers):
            start, spec = base + tensor.offset + number * tensor.layer_stride, specs[layer]
            if begins.get(layer, start) != start:
                raise Unsupported(f"KVBM cannot serve layer {layer}, whose KV does not lie where vLLM says.")
            # Where heads lie apart, a layer's page does not lie in one piece.
            apart = {
                "LHBNC": tensor.block_stride * kv.num_blocks, "BHLNC": tensor.layer_stride * len(tensor.layers),
            }.get(str(kv.kv_cache_layout), 0)  # fmt: skip
            heads = spec.num_heads if apart else 1
            row = spec.page_size_bytes // heads
            # A slot of recurrent models was always in the order of memory.
            order = (start,) if _recurrent(kv) else layer_number(layer)
            placed.append((order, [Plane(start + head * apart, tensor.block_stride, row) for head in range(heads)]))
    planes = list(dict.fromkeys(plane for _, run in sorted(placed, key=itemgetter(0)) for plane in run))
    return tuple(_apart(planes, kv.num_blocks, packed=str(kv.kv_cache_layout).startswith("B")))


def _apart(planes: list[Plane], blocks: int, *, packed: bool) -> list[Plane]:
    """The same bytes of each block, without any twice: layer groups use the same memory, in turn. `packed`: what a
    block has of all layers lies in one piece. Raises Unsupported."""
    ordered, low = sorted(planes, key=attrgetter("address")), min(plane.address for plane in planes)
    behind = 0 if packed else blocks - 1
    ends = [plane.address + behind * plane.stride + plane.row_bytes for plane in ordered]
    overlap = any(end > other.address for end, other in zip(ends, ordered[1:], strict=False))
    if packed and (len({plane.stride for plane in planes}) > 1 or max(ends) > low + planes[0].stride):
        raise Unsupported("KVBM cannot serve layers whose blocks are not packed alike.")
    if not overlap:
        return planes
    if not packed:
        raise Unsupported("KVBM cannot serve layers that share memory where their pages differ in size.")
    merged: list[Plane] = []
    for plane, end in zip(ordered, ends, strict=True):
        if merged and plane.address <= (last := merged[-1]).address + last.row_bytes:
            merged[-1] = replace(last, row_bytes=max(end - last.address, last.row_bytes))
        else:
            merged.append(plane)
    return merged


def _numbers(tensor: str, cache_dtype: str) -> str:
    """What KV of this type is made of, as `Region.dtype` says it; empty where scales lie between the numbers."""
    if cache_dtype in _FP8:
        return _FP8[cache_dtype]
    plain = tensor.removeprefix("torch.")
    return plain if cache_dtype in ("auto", plain) else ""


def layer_number(name: str) -> tuple[list[int], str]:
    """Sorts layers by their numbers."""
    return [int(part) for part in name.split(".") if part.isdigit()], name
