"""vLLM's LoRA adapters: what a request says of its own, and what the workers hold.

The only code that knows vLLM's types of adapters.
"""

from __future__ import annotations

import gc
import json
import os
import weakref
from collections.abc import Collection, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec
from blake3 import blake3

from kvbm.leader.requests import KeysUnder, Variant
from kvbm.link.messages import Adapter

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

_TAG = "kvbm adapter 1"

# ---------------------------------------------------------------------- beside the scheduler


def variant(request: Request, keys: KeysUnder, *, towers: bool) -> Variant:
    """A request's adapter. `towers`: adapters change what vLLM's encoders make of images."""
    lora = request.lora_request
    assert lora is not None
    refused = None
    if towers and request.mm_features:
        refused = "vLLM keeps what an image encoder made with an adapter, by its name"
    return Variant(
        Adapter(lora.lora_int_id, lora.lora_name, msgspec.msgpack.encode(lora)),
        files(lora.lora_path),
        keys,
        unsteady=bool(getattr(lora, "load_inplace", False)),
        refused=refused,
    )


def files(path: str) -> Hashable:
    """What changes when an adapter's files do, as far as can be seen without reading them; only their path where there
    is no such folder (a name on a hub)."""
    try:
        with os.scandir(os.path.expanduser(path)) as entries:
            found = [(entry.name, entry.stat()) for entry in entries]
    except (OSError, ValueError):  # also where no file can be called so
        return (path,)
    return path, *sorted(
        (name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        for name, status in found
    )


def reaches_encoder(config: VllmConfig) -> bool:
    """Whether adapters apply to the encoders of a multimodal model."""
    return bool(getattr(config.lora_config, "enable_tower_connector_lora", False))


# ---------------------------------------------------------------------- beside the model runner


def find(config: VllmConfig) -> Loras | None:
    """What holds this engine's adapters in this process. vLLM hands it to nobody: it is looked for among all objects,
    once, before vLLM hides them from Python's garbage collector. None: there is none, or it cannot be found."""
    if config.lora_config is None:
        return None
    from vllm.lora.worker_manager import WorkerLoRAManager

    layers = {id(layer) for layer in config.compilation_config.static_forward_context.values()}
    for each in gc.get_objects():
        # Not isinstance, which asks objects that pretend to be of another class.
        if issubclass(type(each), WorkerLoRAManager) and hasattr(each, "_adapter_manager"):
            modules = each._adapter_manager.model.modules()
            if any(id(module) in layers for module in modules):
                return Loras(each)
    return None


class Loras:
    """See `AdapterHolder`: the adapters that a worker's manager holds, in vLLM's words those that are registered."""

    def __init__(self, manager: Any) -> None:
        self._worker = weakref.ref(manager)
        self._digests: dict[int, tuple[weakref.ref[Any], bytes]] = {}
        """By number, of the object that was held there last."""

    def held(self, number: int) -> Any:
        return self._manager().list_adapters().get(number)

    def digest(self, number: int) -> bytes:
        model = self.held(number)
        if model is None:
            self._digests.pop(number, None)
            return b""
        known = self._digests.get(number)
        if known is None or known[0]() is not model:
            # vLLM puts another object in its place where it loads an adapter again.
            known = weakref.ref(model), digest_of(model, self._manager().modules)
            self._digests = {n: each for n, each in self._digests.items() if each[0]() is not None} | {number: known}
        return known[1]

    def admit(self, adapter: Adapter, needed: Collection[int]) -> None:
        if self.held(adapter.number) is None:
            self.restore(adapter.number, self._load(adapter), needed)

    def restore(self, number: int, held: Any, needed: Collection[int]) -> None:
        """Registered only: to activate it could take the slot of one that the next forward pass needs. vLLM activates
        what is registered when it schedules a request."""
        manager = self._manager()
        pinned = getattr(manager._registered_adapters, "pinned_items", ())
        for victim in list(manager.list_adapters()):  # the one that was not used for longest first
            if len(manager) < manager.capacity:
                break
            if victim not in needed and victim not in pinned:
                manager.remove_adapter(victim)
        if len(manager) < manager.capacity:
            manager.add_adapter(held)

    def give_up(self, number: int) -> None:
        self._manager().remove_adapter(number)

    def foresee(self, adapter: Adapter) -> bytes:
        model, manager = self.held(adapter.number), self._manager()
        if model is None:
            model = self._load(adapter)
            manager._create_merged_loras_inplace(model)  # as it does when it registers one
        return digest_of(model, manager.modules)

    def _load(self, adapter: Adapter) -> Any:
        from vllm.lora.request import LoRARequest

        worker = self._worker()
        assert worker is not None, "the engine is gone"
        return worker._load_adapter(msgspec.msgpack.decode(adapter.request, type=LoRARequest))

    def _manager(self) -> Any:
        worker = self._worker()
        assert worker is not None, "the engine is gone"
        return worker._adapter_manager


def digest_of(model: Any, wrapped: Iterable[str]) -> bytes:
    """A digest of a `LoRAModel` as it is held: all that decides what a forward pass adds to the `wrapped` modules, and
    nothing else (its number, say)."""
    digest = blake3()

    def fact(*parts: object) -> None:
        text = json.dumps(parts).encode()
        digest.update(len(text).to_bytes(8, "little") + text)

    fact(_TAG, model.rank, bool(getattr(model, "is_3d_lora_weight", False)), sorted(wrapped))
    for name, lora in sorted(model.loras.items()):
        tensors = [*_several(lora.lora_a), *_several(lora.lora_b)]
        alpha = getattr(lora, "lora_alphas", lora.lora_alpha)
        fact(name, type(lora).__name__, lora.rank, alpha, lora.scaling, [_shape(each) for each in tensors])
        for each in tensors:
            _add(digest, each)
    for name, full in sorted((getattr(model, "modules_to_save", None) or {}).items()):
        tensors = [full.weight, full.bias]
        fact(name, [_shape(each) for each in tensors])
        for each in tensors:
            _add(digest, each)
    return digest.digest()


def _several(tensors: Any) -> Iterator[Any]:
    yield from tensors if isinstance(tensors, list | tuple) else [tensors]


def _shape(tensor: Any) -> object:
    return None if tensor is None else [str(tensor.dtype), list(tensor.shape)]


def _add(digest: blake3, tensor: Any) -> None:
    import torch

    if tensor is not None and tensor.numel():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
