"""What the images, videos and sounds of a prompt are.

vLLM's hash of a block has their names: a hash of their content, or what a client calls them, or a number that is
counted anew in each process; with processing arguments a hash of any of these. Nothing tells one from another. So the
content that the engine is given is part of each key, too, and what is known by its name alone is not served.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

log = logging.getLogger(__name__)

_LEAST = 64
"""Bytes of content for each token that stands for it, and at least for eight. What a request says of an item whose
embedding comes from elsewhere (its size, say) is less."""
_NAMES = 1 << 16
"""Names whose content is remembered: many more than the engine keeps encoded."""


class _Unknown(Exception):
    """Of this item there is no content here."""


@dataclass(frozen=True, slots=True)
class Items:
    """Of one request: where each item begins and what it is, in order; or why that is not known. `spoiled` are other
    requests that live and have an item of the same name as this one's, which is not the same."""

    known: tuple[tuple[int, bytes], ...] = ()
    problem: str | None = None
    spoiled: frozenset[str] = frozenset()


NO_ITEMS = Items()


def embedded(request: Request) -> bytes:
    """What vLLM's hash of prompt embeddings leaves out: their dtype, and for which tokens of a mixed prompt they stand
    in (what is behind the last of them is tokens, however far the prompt goes on)."""
    embeds = request.prompt_embeds
    if embeds is None:
        return b""
    mask, ids = request.prompt_is_token_ids, request.prompt_token_ids
    # Without a mask all are embeddings, or, where there are tokens, none is: neither may look like a mask.
    where = b"mask " + bytes(mask).rstrip(b"\1") if mask is not None else b"all" if ids is None else b"none"
    return f" embeddings {embeds.dtype} ".encode() + where


class Images:
    """On the engine core's thread."""

    def __init__(self, config: VllmConfig, *, trust_names: bool) -> None:
        self._trust = trust_names
        # Then what an encoder made of an item is fetched under the item's name.
        self._multimodal = getattr(getattr(config, "model_config", None), "multimodal_config", None) is not None
        self._encoded_elsewhere = getattr(config, "ec_transfer_config", None) is not None
        self._digests: dict[int, tuple[weakref.ref[Any], bytes]] = {}
        """By the object that the engine keeps of an item it was given before."""
        self._named: OrderedDict[str, bytes] = OrderedDict()
        self._repeated: set[str] = set()
        """Names that were given to more than one content: the engine may have encoded either."""
        self._living: dict[str, set[str]] = {}
        self._said = False

    def begin(self, request: Request) -> Items:
        """A request has come."""
        known: list[tuple[int, bytes]] = []
        spoiled: set[str] = set()
        problem = None
        if self._multimodal and getattr(request, "resumable", False):
            problem = "its prompt comes in pieces, and images may come with the next one"
        for feature in getattr(request, "mm_features", None) or ():
            name, position = str(feature.identifier), feature.mm_position
            try:
                content = self._content(feature.data, position.length)
            except _Unknown:
                content = b""
                if not self._trust:
                    problem = "an image, video or sound in it is known by its name alone (trust_image_names)"
            if not self._same(name, content):
                problem = "an image, video or sound in it has a name that was given to another one"
                spoiled |= self._living.get(name, set())
            self._living.setdefault(name, set()).add(request.request_id)
            known.append((position.offset, content))
        if problem is not None and not self._said:
            self._said = True
            log.warning(
                "KVBM: request %.100s, and others like it, are neither loaded nor stored: %s",
                request.request_id,
                problem,
            )
        return Items(tuple(sorted(known)), problem, frozenset(spoiled - {request.request_id}))

    def finish(self, request: Request) -> None:
        """A request is over."""
        for feature in getattr(request, "mm_features", None) or ():
            if (living := self._living.get(name := str(feature.identifier))) is not None:
                living.discard(request.request_id)
                if not living:
                    del self._living[name]

    def _same(self, name: str, content: bytes) -> bool:
        """Whether this name has always been that of this content."""
        before = self._named.setdefault(name, content)
        self._named.move_to_end(name)
        if len(self._named) > _NAMES:
            self._named.popitem(last=False)
        if before != content:
            self._repeated.add(name)
        return name not in self._repeated and len(self._repeated) <= _NAMES

    def _content(self, item: Any, tokens: int) -> bytes:
        """The digest of an item, as the engine was given it. Raises _Unknown."""
        if item is None or self._encoded_elsewhere:
            raise _Unknown
        kept = self._digests.get(id(item))
        if kept is not None and kept[0]() is item:
            return kept[1]
        hasher, size = blake3(), 0
        for name in sorted(item):
            hasher.update(f"{name} ".encode())
            try:
                for piece in _pieces(item[name].data):
                    hasher.update(piece)
                    size += len(piece) if isinstance(piece, memoryview) else 0
            except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # sparse, nested, lazy: tensors vary
                raise _Unknown from error
        if size < _LEAST * max(tokens, 8):
            raise _Unknown
        digest = hasher.digest()
        number = id(item)
        self._digests[number] = weakref.ref(item, lambda _: self._digests.pop(number, None)), digest
        return digest


def starting_before(items: Iterable[tuple[int, bytes]], end: int) -> bytes:
    """What is added to the key of a block that ends at this token."""
    return b"".join(b" item " + content for offset, content in items if offset < end)


def _pieces(data: Any) -> Iterator[bytes | memoryview]:
    """All that nested tensors hold, each with what it is in front. Raises _Unknown for what cannot be read here."""
    if hasattr(data, "untyped_storage"):
        import torch

        if data.device.type != "cpu" or data.is_quantized:
            raise _Unknown
        yield f"{data.dtype} {tuple(data.shape)} ".encode()
        yield memoryview(data.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(data, np.ndarray) and not data.dtype.hasobject:
        yield f"{data.dtype} {data.shape} ".encode()
        yield memoryview(np.ascontiguousarray(data).tobytes())
    elif isinstance(data, list | tuple):
        yield f"list {len(data)} ".encode()
        for each in data:
            yield from _pieces(each)
    elif isinstance(data, Mapping):
        for key in sorted(data):
            yield f"key {key!r} ".encode()
            yield from _pieces(data[key])
    elif data is None or isinstance(data, bool | int | float | str | bytes):
        yield f"{type(data).__name__} {data!r} ".encode()
    else:
        raise _Unknown
