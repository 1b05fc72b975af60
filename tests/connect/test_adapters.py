"""What an adapter is known by, and how one is made resident. vLLM's part is played by objects with the same attributes:
`tests/e2e/test_adapters.py` has the real ones. The module is loaded by itself: its package needs vLLM."""

from __future__ import annotations

import importlib.util
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

import kvbm

pytestmark = pytest.mark.filterwarnings("ignore")

torch: Any = pytest.importorskip("torch")


class Fake(SimpleNamespace):
    """An object with these attributes."""


class Request(msgspec.Struct):
    """A LoRARequest."""

    lora_name: str
    lora_int_id: int
    lora_path: str
    load_inplace: bool = False


WRAPPED = ["layers.0.qkv_proj", "layers.0.o_proj"]


@pytest.fixture(scope="module")
def adapters() -> Any:
    path = Path(kvbm.__path__[0]) / "connect/vllm/adapters.py"
    spec = importlib.util.spec_from_file_location("kvbm_adapters", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lora(seed: float = 1.0, **given: Any) -> Any:
    values: dict[str, Any] = {
        "rank": 4, "lora_alpha": 8, "scaling": 1,
        "lora_a": torch.full((4, 16), seed), "lora_b": torch.full((16, 4), -seed),
    }  # fmt: skip
    return Fake(**values | given)


def model(number: int = 1, **given: Any) -> Any:
    """As vLLM holds one: q, k and v packed, of which one may not be adapted."""
    packed = lora(lora_alphas=[8, 8, None], lora_a=[torch.ones(4, 16), torch.ones(4, 16), None],
                  lora_b=[torch.ones(16, 4), torch.ones(8, 4), None])  # fmt: skip
    loras = {"layers.0.qkv_proj": packed, "layers.0.o_proj": lora()}
    return Fake(**{"id": number, "rank": 4, "loras": loras, "modules_to_save": {}, "is_3d_lora_weight": False} | given)


def changed(change: Callable[[Any], object]) -> Any:
    other = model()
    change(other)
    return other


def test_equal_tensors_under_another_number_are_the_same_adapter(adapters: Any) -> None:
    one = model()
    other = model(7, loras=dict(reversed(list(one.loras.items()))))
    assert adapters.digest_of(one, WRAPPED) == adapters.digest_of(other, WRAPPED[::-1])
    assert len(adapters.digest_of(one, WRAPPED)) == 32


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.loras["layers.0.o_proj"].lora_b.view(-1)[-1:].add_(1e-3),
        lambda m: m.loras["layers.0.o_proj"].lora_a.view(-1)[:1].add_(1e-3),
        lambda m: m.loras["layers.0.qkv_proj"].lora_b[1].view(-1)[3:4].add_(1e-3),
        lambda m: setattr(m.loras["layers.0.o_proj"], "lora_a", m.loras["layers.0.o_proj"].lora_a.to(torch.bfloat16)),
        lambda m: setattr(m.loras["layers.0.o_proj"], "lora_a", m.loras["layers.0.o_proj"].lora_a.view(torch.int32)),
        lambda m: setattr(m.loras["layers.0.o_proj"], "lora_a", m.loras["layers.0.o_proj"].lora_a.view(8, 8)),
        lambda m: setattr(m.loras["layers.0.o_proj"], "rank", 8),
        lambda m: setattr(m, "rank", 8),
        lambda m: setattr(m.loras["layers.0.o_proj"], "lora_alpha", 16),
        lambda m: setattr(m.loras["layers.0.o_proj"], "scaling", 2.0),
        lambda m: setattr(m.loras["layers.0.qkv_proj"], "lora_alphas", [8, 16, None]),
        lambda m: m.loras["layers.0.qkv_proj"].lora_a.reverse(),
        lambda m: m.loras.update({"layers.0.down_proj": m.loras.pop("layers.0.o_proj")}),
        lambda m: m.loras.update({"layers.0.down_proj": lora()}),
        lambda m: setattr(m, "is_3d_lora_weight", True),
        lambda m: m.modules_to_save.update(score=Fake(weight=torch.ones(2, 16), bias=None)),
    ],
)  # fmt: skip
def test_whatever_changes_what_an_adapter_does_makes_it_another(adapters: Any, change: Callable[[Any], object]) -> None:
    before, after = adapters.digest_of(model(), WRAPPED), adapters.digest_of(changed(change), WRAPPED)
    assert before != after


def test_which_modules_adapters_reach_counts(adapters: Any) -> None:
    assert adapters.digest_of(model(), WRAPPED) != adapters.digest_of(model(), WRAPPED[:1])


# ---------------------------------------------------------------------- held by a worker


class Manager:
    """As far as KVBM asks vLLM's: adapters in the order in which they were used, `capacity` of them."""

    def __init__(self, *there: int, capacity: int = 2) -> None:
        self._registered_adapters = Fake(cache=OrderedDict((n, model(n)) for n in there), pinned_items=set())
        self.capacity, self.modules, self.read = capacity, WRAPPED, 0
        self._adapter_manager = self

    def __len__(self) -> int:
        return len(self._registered_adapters.cache)

    def list_adapters(self) -> dict[int, Any]:
        return dict(self._registered_adapters.cache)

    def remove_adapter(self, number: int) -> None:
        del self._registered_adapters.cache[number]

    def add_adapter(self, added: Any) -> None:
        assert len(self) < self.capacity
        self._registered_adapters.cache[added.id] = added


@pytest.mark.parametrize(
    ("there", "needed", "pinned", "after"),
    [
        ([], (), (), [3]),
        ([1], (1,), (), [1, 3]),
        ([1, 2], (), (), [2, 3]),
        ([1, 2], (1,), (), [1, 3]),
        ([1, 2], (1,), (2,), [1, 2]),
        ([1, 2], (1, 2), (), [1, 2]),
    ],
)
def test_room_is_made_by_what_no_forward_pass_needs(
    adapters: Any, there: list[int], needed: tuple[int, ...], pinned: tuple[int, ...], after: list[int]
) -> None:
    manager = Manager(*there)
    manager._registered_adapters.pinned_items = set(pinned)
    loras = adapters.Loras(manager)
    loras.restore(3, model(3), needed)
    assert list(manager.list_adapters()) == after
    assert (loras.held(3) is not None) == (3 in after)


def test_a_digest_is_made_once_for_each_object_that_is_held(adapters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    manager, made = Manager(1), []
    real = adapters.digest_of
    monkeypatch.setattr(adapters, "digest_of", lambda m, wrapped: made.append(m) or real(m, wrapped))
    loras = adapters.Loras(manager)
    first = loras.digest(1)
    assert loras.digest(1) == first == real(model(), WRAPPED)
    assert len(made) == 1
    manager._registered_adapters.cache[1] = changed(lambda m: setattr(m, "rank", 8))
    assert loras.digest(1) not in (first, b"")
    manager.remove_adapter(1)
    assert loras.digest(1) == b""


# ---------------------------------------------------------------------- beside the scheduler


def test_files_are_known_by_all_that_changes_when_they_do(adapters: Any, tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"a" * 10)
    before = adapters.files(str(tmp_path))
    assert adapters.files(str(tmp_path)) == before
    hash(before)
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_bytes(b"b" * 10)
    os.utime(file, ns=times)  # its change is still seen in ctime
    assert adapters.files(str(tmp_path)) != before
    assert adapters.files("org/name") == ("org/name",)
    assert adapters.files("no\0name") == ("no\0name",)


@pytest.mark.parametrize(
    ("towers", "images", "inplace", "refused"),
    [(False, ["image"], False, False), (True, [], True, False), (True, ["image"], False, True)],
)
def test_what_an_encoder_made_with_an_adapter_is_left_alone(
    adapters: Any, towers: bool, images: list[str], inplace: bool, refused: bool
) -> None:
    request = Fake(lora_request=Request("one", 1, "/one", inplace), mm_features=images)
    variant = adapters.variant(request, None, towers=towers)
    assert (variant.refused is not None) == refused
    assert (variant.adapter.number, variant.adapter.name, variant.unsteady) == (1, "one", inplace)
