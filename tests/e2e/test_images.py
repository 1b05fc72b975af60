"""What keys say of images, by vLLM's own types and hashing: their content, whatever they are called. No engine runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.e2e.engine import BLOCK
from tests.e2e.test_keys import TOKENS, _request, _shared

_LENGTH = 64


def _item(seed: int, size: int = 64 * _LENGTH) -> Any:
    """Pixels, and beside them how many, which several images have in common."""
    import torch
    from vllm.multimodal.inputs import MultiModalFieldElem, MultiModalKwargsItem, MultiModalSharedField

    pixels = torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    field = MultiModalSharedField(batch_size=1)
    grid = torch.tensor([1, 8, 8])
    return MultiModalKwargsItem(
        {"pixel_values": MultiModalFieldElem(pixels, field), "image_grid_thw": MultiModalFieldElem(grid, field)}
    )


def _prompt(name: str, data: Any, request_id: str = "r", offset: int = 40) -> Any:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    request = _request(mm_features=[MultiModalFeatureSpec(data, "image", name, PlaceholderRange(offset, _LENGTH))])
    request.request_id = request_id
    return request


def _images(*, trust: bool = False, **config: Any) -> Any:
    from kvbm.connect.vllm.images import Images

    return Images(SimpleNamespace(**config), trust_names=trust)  # type: ignore[arg-type]


def _keys(request: Any, images: Any = None) -> list[bytes]:
    from kvbm.connect.vllm.translate import Keys

    items = (images or _images()).begin(request)
    assert items.problem is None, items.problem
    return list(Keys(request.block_hashes, 1, b"", items, BLOCK))


def test_two_images_of_one_name_in_two_processes_never_share() -> None:
    """vLLM's counter begins anew in each; a client may call anything by any name."""
    one, other = (_prompt("renderer0-mm-1-image-0", _item(seed)) for seed in (1, 2))
    assert list(one.block_hashes) == list(other.block_hashes), "vLLM itself does not tell them apart"
    assert _shared(_keys(one), _keys(other)) == 1, "all before the image, and nothing from its first block on"
    assert _shared(_keys(one), _keys(_prompt("renderer0-mm-1-image-0", _item(1)))) == 4
    assert _keys(one)[0] == one.block_hashes[0], "text in front of an image is found by requests without one"


def test_content_is_all_of_it() -> None:
    import torch

    def changed(change: Any) -> list[bytes]:
        item = _item(1)
        change(item)
        return _keys(_prompt("n", item))

    seen = [
        changed(change)
        for change in (
            lambda item: None,
            lambda item: item["pixel_values"].data.__setitem__(-1, 300 - int(item["pixel_values"].data[-1])),
            lambda item: setattr(item["pixel_values"], "data", item["pixel_values"].data.view(torch.int8)),
            lambda item: setattr(item["pixel_values"], "data", item["pixel_values"].data.reshape(2, -1)),
            lambda item: item["image_grid_thw"].data.__setitem__(0, 2),
            lambda item: setattr(item["image_grid_thw"], "data", [1, 8, 8]),
            lambda item: item.pop("image_grid_thw"),
        )
    ]
    assert len({keys[1] for keys in seen}) == len(seen)
    scattered = _item(1)
    wide = torch.zeros(64 * _LENGTH, 2, dtype=torch.uint8)
    wide[:, 0] = scattered["pixel_values"].data
    scattered["pixel_values"].data = wide[:, 0]  # the same numbers, lying otherwise
    assert _keys(_prompt("n", scattered)) == seen[0]


def test_a_second_image_does_not_change_what_is_in_front_of_it() -> None:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    def keys(*seeds: int) -> list[bytes]:
        at = (40, 100)
        return _keys(
            _request(
                prompt_token_ids=TOKENS,
                mm_features=[
                    MultiModalFeatureSpec(_item(seed), "image", "n" * (1 + number), PlaceholderRange(at[number], 32))
                    for number, seed in enumerate(seeds)
                ],
            )
        )

    assert _shared(keys(1, 2), keys(1, 3)) == 3
    assert _shared(keys(1, 2), keys(1)) == 3
    assert _shared(keys(1, 2), keys(2, 2)) == 1


def _address() -> Any:
    item = _item(1)
    for name, data in (("pixel_values", 1 << 62), ("image_grid_thw", "a signature " * 1000)):
        item[name].data = data
    return item


def _sparse() -> Any:
    item = _item(1)
    item["pixel_values"].data = item["pixel_values"].data.to_sparse()
    return item


@pytest.mark.parametrize(
    ("data", "config"),
    [
        (lambda: None, {}),  # fetched by the worker from shared memory, say
        (lambda: _item(1, size=8), {}),  # its size alone: the embedding comes from another engine
        (_address, {}),  # where the worker finds it
        (_sparse, {}),  # a tensor whose bytes do not lie in one piece
        (lambda: _item(1), {"ec_transfer_config": object()}),  # what is encoded is found by name
    ],
)
def test_what_is_known_by_its_name_alone_is_not_served(data: Any, config: dict[str, Any]) -> None:
    request = _prompt("a" * 64, data())
    assert "by its name alone" in _images(**config).begin(request).problem
    trusting = _images(trust=True, **config).begin(request)
    assert trusting.problem is None
    assert [offset for offset, _ in trusting.known] == [40]


def test_a_name_that_is_given_twice_spoils_all_that_have_it() -> None:
    """The engine keeps what it encoded by name: it may take either for the other."""
    images = _images(trust=True)
    first, again, third = (_prompt("n", _item(1), name) for name in ("a", "b", "c"))
    assert images.begin(first).problem is None
    assert images.begin(again).problem is None
    images.finish(first)
    impostor = images.begin(_prompt("n", _item(2), "x"))
    assert "given to another one" in impostor.problem
    assert impostor.spoiled == {"b"}
    assert "given to another one" in images.begin(third).problem, "nobody knows what is encoded under it now"
    assert images.begin(_prompt("m", _item(2), "y")).problem is None


def test_a_prompt_that_comes_in_pieces() -> None:
    """vLLM tells nobody of the images that come with the next one."""
    request = _request()
    request.resumable = True
    assert _images(model_config=SimpleNamespace(multimodal_config=None)).begin(request).problem is None
    assert "in pieces" in _images(model_config=SimpleNamespace(multimodal_config=object())).begin(request).problem


def test_content_that_the_engine_keeps_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvbm.connect.vllm import images as module

    made: list[int] = []
    original = module.blake3
    monkeypatch.setattr(module, "blake3", lambda: made.append(1) or original())
    item, images = _item(1), _images()
    assert _keys(_prompt("n", item, "a"), images) == _keys(_prompt("n", item, "b"), images)
    assert len(made) == 1
    assert len(images._digests) == 1
    del item
    assert not images._digests
