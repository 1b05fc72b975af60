"""What keys say of inputs that are no tokens, by vLLM's own hashing. No engine runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from tests.e2e.engine import BLOCK

TOKENS = [7] * 40 + [999] * 64 + [8] * 40
"""Four blocks; an image's placeholders reach from the second into the fourth."""


def _request(**inputs: Any) -> Any:
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    return Request(
        request_id="r", sampling_params=SamplingParams(), pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK, sha256), **({"prompt_token_ids": list(TOKENS)} | inputs),
    )  # fmt: skip


def _keys(request: Any, variant: bytes = b"") -> list[bytes]:
    from kvbm.connect.vllm.images import embedded
    from kvbm.connect.vllm.translate import Keys

    return list(Keys(request.block_hashes, 1, variant + embedded(request)))


def _image(name: str, offset: int = 40) -> Any:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    return MultiModalFeatureSpec(None, "image", name, PlaceholderRange(offset, 64))


def _shared(a: Sequence[bytes], b: Sequence[bytes]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def test_two_images_at_the_same_place_never_share() -> None:
    one, same, two, none = (
        _keys(_request(mm_features=images)) for images in ([_image("one")], [_image("one")], [_image("two")], [])
    )
    assert len(one) == 4
    assert _shared(one, same) == 4
    assert _shared(one, two) == 1, "all before the image, and nothing from its first block on"
    assert _shared(one, none) == 1
    assert not set(one[1:]) & set(two)


def test_an_image_that_lies_elsewhere_in_the_same_tokens_is_not_shared() -> None:
    tokens = [999] * 144
    one, moved = (_keys(_request(prompt_token_ids=tokens, mm_features=[_image("a", at)])) for at in (40, 50))
    assert _shared(one, moved) == 1


def test_images_tenants_and_adapters_go_together() -> None:
    from vllm.lora.request import LoRARequest

    image, lora = [_image("one")], LoRARequest("l", 1, "/l")
    inputs: list[tuple[dict[str, Any], bytes]] = [
        ({}, b""), ({"cache_salt": "a"}, b""), ({"cache_salt": "b"}, b""), ({"lora_request": lora}, b"weights"),
        ({"lora_request": lora}, b"other weights"),
    ]  # fmt: skip
    seen = [_keys(_request(mm_features=image, **more), variant)[0] for more, variant in inputs]
    assert len(set(seen)) == len(seen)


def test_keys_follow_a_session_that_takes_tokens_back() -> None:
    from kvbm.connect.vllm.translate import Keys

    request = _request()
    keys, others = Keys(request.block_hashes, 1, b"adapter"), _request(prompt_token_ids=[*TOKENS[:100], *range(44)])
    before = list(keys)
    del request.block_hashes[3:]
    assert list(keys) == before[:3]
    request.block_hashes.append(others.block_hashes[3])
    assert list(keys)[:3] == before[:3]
    assert keys[3] == Keys(others.block_hashes, 1, b"adapter")[3] != before[3]


def _mixed(mask: list[bool], dtype: str = "float32", rows: int = 64) -> list[bytes]:
    import torch

    embeds = torch.zeros(rows, 8).to(getattr(torch, dtype))
    return _keys(_request(prompt_token_ids=[0] * rows, prompt_embeds=embeds, prompt_is_token_ids=mask))


def test_embeddings_that_are_the_same_bytes_in_another_dtype_are_not_shared() -> None:
    import torch

    half = torch.arange(64 * 8, dtype=torch.int16).reshape(64, 8)
    a, b = (_request(prompt_token_ids=None, prompt_embeds=half.view(kind)) for kind in (torch.float16, torch.bfloat16))
    assert list(a.block_hashes) == list(b.block_hashes), "vLLM itself does not tell them apart"
    assert _shared(_keys(a), _keys(b)) == 0
    again = _request(prompt_token_ids=None, prompt_embeds=half.view(torch.float16))
    assert _shared(_keys(a), _keys(again)) == 2


def test_embeddings_without_a_mask_are_not_the_tokens_of_their_placeholder() -> None:
    import torch

    embeds = torch.zeros(64, 8)
    inputs: list[dict[str, Any]] = [
        {"prompt_token_ids": None}, {"prompt_token_ids": [0] * 64},
        {"prompt_token_ids": [0] * 64, "prompt_is_token_ids": [True] * 64},
    ]  # fmt: skip
    keys = [_keys(_request(prompt_embeds=embeds, **given)) for given in inputs]
    assert [len(each) for each in keys] == [2, 2, 2]
    assert all(_shared(a, b) == 0 for a, b in itertools.combinations(keys, 2))


@pytest.mark.parametrize(
    ("a", "b", "shared"),
    [
        ([True] * 8 + [False] * 24 + [True] * 32, [True] * 8 + [False] * 24 + [True] * 32, 2),
        ([False] * 32 + [True] * 32, [True] * 8 + [False] * 24 + [True] * 32, 0),  # a token 0, an embedding of zeros
    ],
)
def test_a_token_is_not_an_embedding_that_looks_like_its_placeholder(a: list[bool], b: list[bool], shared: int) -> None:
    assert _shared(_mixed(a), _mixed(b)) == shared


def test_a_mixed_prompt_that_goes_on_shares_its_beginning() -> None:
    short, long = _mixed([False] * 40 + [True] * 24), _mixed([False] * 40 + [True] * 56, rows=96)
    assert len(long) == 3
    assert short == long[:2]
