"""What makes a hit exact: the key of a block and the namespace it belongs to."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

FORMAT_VERSION = 1
"""Part of every fingerprint: changes when the meaning of stored bytes changes."""

_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Namespace:
    """Everything that decides a block's bytes besides its tokens.

    `facts` are what the engine says (model, dtypes, block size, layers, heads, layout, shard ...), `weights` the digest
    of what it loaded, empty until that is known. Two engines may share a block only if their fingerprints are equal.
    `altered` names facts that an engine's workers may see altered once they have loaded the model; `rank_fingerprint`,
    which the ranks of one engine agree on, is without them.
    """

    facts: Mapping[str, object]
    weights: str
    altered: frozenset[str] = frozenset()
    fingerprint: str = field(init=False)
    rank_fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        facts = dict(self.facts)
        object.__setattr__(self, "fingerprint", self._digest(facts))
        object.__setattr__(
            self, "rank_fingerprint", self._digest({name: facts[name] for name in facts.keys() - self.altered})
        )

    def private(self) -> Namespace:
        """The same where nobody knows what was loaded: a namespace that no other process has."""
        return replace(self, weights=f"unknown {secrets.token_hex(16)}")

    def _digest(self, facts: Mapping[str, object]) -> str:
        text = json.dumps([FORMAT_VERSION, facts, self.weights], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def variant_keys(keys: Sequence[bytes], variant: bytes) -> list[bytes]:
    """Keys of the same blocks under something the engine's hash does not cover (an adapter's weights, say)."""
    return [hashlib.sha256(variant + key).digest() for key in keys]


def group_key(key: bytes, group: int) -> bytes:
    """The key of the same block in a layer group: the first group's is the engine's own, of 32 bytes."""
    return key + bytes([group]) if group else key


def group_of(key: bytes) -> tuple[bytes, int]:
    """The engine's key of a block, and its layer group."""
    return (key[:_KEY_BYTES], key[_KEY_BYTES]) if len(key) > _KEY_BYTES else (key, 0)
