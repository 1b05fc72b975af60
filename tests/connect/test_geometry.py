"""Where the engine's blocks lie, compared with where vLLM's own allocator puts them, in every layout."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvbm.core.errors import Unsupported
from kvbm.core.region import Region
from tests.marks import apart

pytest.importorskip("vllm")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

BLOCKS = 6
LAYOUTS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")


def spec(kind: str, heads: int, tokens: int = 32, **more: Any) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    cls = MLAAttentionSpec if kind == "mla" else FullAttentionSpec
    return cls(block_size=tokens, num_kv_heads=heads, head_size=16, dtype=torch.bfloat16, **more)


def placed(specs: list[list[Any]], layout: str) -> Any:
    """What vLLM's engine core says, of groups of layers with these specs."""
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheTensor, compute_layout_strides
    from vllm.v1.kv_cache_layout import KVCacheLayout

    order = KVCacheLayout[layout]
    packed = max(sum(each.page_size_bytes for each in group) for group in specs)
    tensors, groups = [], []
    for number, group in enumerate(specs):
        names = [f"model.layers.{number + len(specs) * at}.attn" for at in range(len(group))]
        offset = 0
        for one in dict.fromkeys(group):
            layers = [name for name, each in zip(names, group, strict=True) if each == one]
            stride = packed if order.is_block_outermost else None
            layer, block, *_ = compute_layout_strides(
                one, BLOCKS, len(layers), order, fixed_strides=(None, stride, None, None, None)
            )
            tensors.append(KVCacheTensor(packed * BLOCKS, layers, layer, block, offset))
            offset += len(layers) * (one.page_size_bytes if order.is_block_outermost else layer)
        groups.append(KVCacheGroupSpec(names, uniform(dict(zip(names, group, strict=True)))))
    return KVCacheConfig(BLOCKS, tensors, groups, kv_cache_layout=layout)


def uniform(specs: dict[str, Any]) -> Any:
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    first = next(iter(specs.values()))
    return first if len(set(specs.values())) == 1 else UniformTypeKVCacheSpecs(first.block_size, specs)


def allocated(kv: Any, layout: str, kernel_tokens: int = 32) -> dict[str, Any]:
    import torch
    from vllm.v1.kv_cache_layout import KVCacheLayout
    from vllm.v1.worker.utils import allocate_kv_cache

    return allocate_kv_cache(  # type: ignore[no-any-return]
        kv, torch.device("cpu"), KVCacheLayout[layout], [kernel_tokens] * len(kv.kv_cache_groups)
    )


def slot(g1: Region, block: int) -> bytes:
    """What a copy of the block takes, in its order."""
    import ctypes

    return b"".join(ctypes.string_at(p.address + block * p.stride, p.row_bytes) for p in g1.planes)


def region(kv: Any, caches: dict[str, Any]) -> Region:
    from kvbm.connect.vllm import geometry

    return geometry.g1_region(kv, caches)


@apart
@pytest.mark.parametrize(
    ("kind", "heads", "layout", "kernel"),
    [
        *product(("full",), (1, 3), LAYOUTS, (32,)), *product(("full",), (3,), ("LBHNC", "LBNHC"), (16,)),
        *product(("mla",), (1,), LAYOUTS, (32,)),
    ],
)  # fmt: skip
def test_a_block_has_the_bytes_that_the_engine_writes_to_it(kind: str, heads: int, layout: str, kernel: int) -> None:
    import torch

    kv = placed([[spec(kind, heads)] * 3], layout)
    caches = allocated(kv, layout, kernel)
    g1, ratio = region(kv, caches), 32 // kernel
    assert g1.num_slots == BLOCKS
    dice = np.random.default_rng(0)
    for view in caches.values():
        view.view(torch.uint8).copy_(torch.from_numpy(dice.integers(0, 256, view.view(torch.uint8).shape, np.uint8)))
    inside = (0, 1, 2, 3) if layout.index("H") < layout.index("N") else (0, 2, 1, 3)
    for block in range(BLOCKS):
        written = b"".join(
            view.view(torch.uint8)[block * ratio : (block + 1) * ratio].permute(inside).contiguous().numpy().tobytes()
            for view in caches.values()
        )
        assert slot(g1, block) == written


@apart
def test_a_slot_has_the_same_bytes_whatever_is_outermost() -> None:
    import torch

    slots = []
    for layout in ("LBHNC", "LHBNC", "BLHNC", "BHLNC"):
        kv = placed([[spec("full", 3)] * 4], layout)
        caches = allocated(kv, layout)
        for number, view in enumerate(caches.values()):
            view.view(torch.uint8).copy_(
                torch.arange(view.view(torch.uint8).numel()).reshape_as(view.view(torch.uint8)) % 251 + number
            )
        slots.append([slot(region(kv, caches), block) for block in range(BLOCKS)])
    assert slots[0] == slots[1] == slots[2] == slots[3]


@apart
@pytest.mark.parametrize(
    ("kind", "heads", "alike"),
    [
        ("full", 3, [("LBHNC", "LHBNC", "BLHNC", "BHLNC"), ("LBNHC", "BLNHC")]),
        ("full", 1, [LAYOUTS]),
        ("mla", 1, [LAYOUTS]),
    ],
)
def test_engines_share_blocks_where_a_slot_has_the_same_bytes(
    kind: str, heads: int, alike: list[tuple[str, ...]]
) -> None:
    """A change of vLLM's layout setting orphans nothing."""
    from kvbm.connect.vllm import geometry, identity

    def facts(layout: str) -> str:
        kv = placed([[spec(kind, heads)] * 3], layout)
        caches = allocated(kv, layout)
        layer = SimpleNamespace(attn_backend=SimpleNamespace(get_name=lambda: "A"), kv_cache_dtype="auto")
        loaded = SimpleNamespace(static_forward_context=dict.fromkeys(caches, layer))
        config: Any = SimpleNamespace(compilation_config=loaded)
        return repr((geometry.inside_blocks(kv), identity.layers(config, kv, caches)))

    sets = [{facts(layout) for layout in layouts} for layouts in alike]
    assert [len(each) for each in sets] == [1] * len(alike)
    assert len(set.union(*sets)) == len(alike)


@apart
@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_that_share_memory_count_once(layout: str) -> None:
    kv = placed([[spec("full", 2)] * 3, [spec("full", 2)] * 3], layout)
    g1 = region(kv, allocated(kv, layout))
    assert g1.slot_bytes == 3 * spec("full", 2).page_size_bytes


@apart
@pytest.mark.parametrize("layout", ["BLHNC", "BLNHC"])
def test_pages_of_several_sizes_are_copied_whole_where_a_block_is_one_piece(layout: str) -> None:
    small, large = spec("full", 1), spec("full", 2)
    kv = placed([[large, large], [small, large, small]], layout)
    caches = allocated(kv, layout)
    g1 = region(kv, caches)
    assert g1.slot_bytes == 4 * small.page_size_bytes
    for name, view in caches.items():
        for block in range(BLOCKS):
            before = [slot(g1, each) for each in range(BLOCKS)]
            view[block] += 1
            after = [slot(g1, each) for each in range(BLOCKS)]
            assert [each for each in range(BLOCKS) if before[each] != after[each]] == [block], name


@apart
def test_what_overlaps_without_being_equal_is_refused() -> None:
    small, large = spec("full", 1), spec("full", 2)
    kv = placed([[large, large], [small, small, small, small]], "LBHNC")
    with pytest.raises(Unsupported, match="differ in size"):
        region(kv, allocated(kv, "LBHNC"))


@apart
def test_memory_that_lies_elsewhere_than_vllm_says_is_refused() -> None:
    kv = placed([[spec("full", 2)] * 3], "LBHNC")
    caches = allocated(kv, "LBHNC")
    first, *_ = caches
    with pytest.raises(Unsupported, match=f"layer {first}"):
        region(kv, caches | {first: caches[first][1:]})
