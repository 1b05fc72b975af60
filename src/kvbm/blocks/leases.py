"""Handles: what a caller has to hold, and what it may do next.

    Writable --stage--> Staged --register--> Pinned <--upgrade-- Weak

One handle covers a run of blocks. A transition consumes its handle; using a consumed one raises `Misuse` and changes
nothing, and so do wrong arguments: they are checked before anything is taken. A handle that ends in any other way
gives its slots back: `drop`, the end of a `with` block, or, with a `ResourceWarning`, when it is forgotten.

Only a pool makes handles. One handle belongs to one thread at a time; of two that use it at once, one gets `Misuse`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import ClassVar, Self, final

import numpy as np
from msgspec.structs import replace

from kvbm.abc.policy import Mask
from kvbm.blocks.ledger import Ledger
from kvbm.blocks.slots import REGISTERED, STAGED, WRITABLE, as_array
from kvbm.blocks.transitions import SLOT_BYTES, Parents, Priorities, Seconds, Terms
from kvbm.core.errors import Misuse
from kvbm.core.region import Slots

_PRIORITIES = range(101)


class _Lease:
    """Slots in one state until they are taken, once."""

    __slots__ = ("_box", "_ledger")
    _state: ClassVar[int]
    _ledger: Ledger
    _box: list[bytes]
    """Emptied by the first that takes the slots: list.pop is atomic, so only one can."""

    @property
    def slots(self) -> Slots:
        """Slot numbers in the order of the keys; read-only."""
        self._check()
        return as_array(self._box[0])

    def drop(self) -> None:
        """Give the slots back."""
        try:
            slots = self._box.pop()
        except IndexError:
            raise self._consumed() from None
        if slots:
            self._ledger.give_back(self._state, slots)

    def _take(self) -> bytes:
        try:
            return self._box.pop()
        except IndexError:
            raise self._consumed() from None

    def _check(self) -> None:
        if not self._box:
            raise self._consumed()

    def _consumed(self) -> Misuse:
        return Misuse(f"this {type(self).__name__} was already used or dropped")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._box:
            self.drop()

    def __del__(self) -> None:
        if self._box and (slots := self._box.pop()):
            self._ledger.abandon(self._state, slots)
            blocks = len(slots) // SLOT_BYTES
            warnings.warn(f"a {type(self).__name__} over {blocks} blocks was never dropped", ResourceWarning, 2)

    def __len__(self) -> int:
        self._check()
        return len(self._box[0]) // SLOT_BYTES

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {f'of {len(self)} blocks' if self._box else 'consumed'}>"


@final
class Writable(_Lease):
    """Slots whose bytes may be written; nobody can find them."""

    __slots__ = ("_generation",)
    _state = WRITABLE

    def __init__(self, ledger: Ledger, slots: bytes, generation: int) -> None:
        self._ledger, self._box, self._generation = ledger, [slots], generation

    def stage(
        self, keys: Sequence[bytes], *, parent: Parents = None, priority: int = 0, ttl: float | None = None
    ) -> Staged:
        """Say what the slots will hold: one distinct key per slot, one after the other in a prompt.

        `parent` is the key before the first, or, where they are not of one prompt, a tuple of what is before each;
        `priority` 0 (goes first) to 100, `ttl` the seconds a block can be
        matched once it is registered.
        """
        if priority not in _PRIORITIES:
            raise Misuse(f"priority {priority} is not in 0..100")
        if ttl is not None and not ttl > 0:
            raise Misuse(f"ttl {ttl} is not positive")
        terms, slots = Terms(tuple(keys), parent, priority, ttl, self._generation), self._take()
        try:
            self._ledger.stage(slots, terms)
        except (TypeError, ValueError):
            self._box.append(slots)
            needed, names = len(slots) // SLOT_BYTES, terms.keys
            raise Misuse(
                f"{needed} slots need as many distinct keys of bytes, got {len(set(names))} in {len(names)}"
                f"{', and as many parents' if isinstance(parent, tuple) else ''}"
            ) from None
        return Staged(self._ledger, slots, terms)


@final
class Staged(_Lease):
    """Slots that will be the blocks of known keys; they cannot be matched yet."""

    __slots__ = ("_terms",)
    _state = STAGED

    def __init__(self, ledger: Ledger, slots: bytes, terms: Terms) -> None:
        self._ledger, self._box, self._terms = ledger, [slots], terms

    @property
    def keys(self) -> tuple[bytes, ...]:
        """One per slot."""
        self._check()
        return self._terms.keys

    def raise_to(self, priority: int) -> None:
        """The blocks will have this priority (0 to 100), or the one they were staged with where that is higher."""
        self._check()
        if priority not in _PRIORITIES:
            raise Misuse(f"priority {priority} is not in 0..100")
        self._terms = replace(self._terms, priority=max(priority, self._terms.priority))

    def register(self, done: Mask | None = None) -> Pinned:
        """Publish the blocks whose bytes are in place: those where `done` is true, all of them where it is None.

        The others' slots go back. Where a key is registered already that block stays, with the larger priority and the
        later end of life, and the new slot goes back (or, in a pool that keeps duplicates, is this handle's until it
        is dropped). Returns the published and existing blocks, held, in order; none where the pool was cleared after
        the slots were allocated.
        """
        if done is not None and (done.dtype != np.bool_ or done.shape != (len(self),)):
            raise Misuse(f"done must be {len(self)} booleans, got {done.dtype} of shape {done.shape}")
        slots, keys = self._ledger.register(self._take(), self._terms, done)
        return Pinned(self._ledger, slots, keys, self._terms.generation)


@final
class Pinned(_Lease):
    """Registered blocks that cannot be evicted or overwritten while this is held; perhaps none."""

    __slots__ = ("_generation", "_keys")
    _state = REGISTERED

    def __init__(self, ledger: Ledger, slots: bytes, keys: tuple[bytes, ...], generation: int) -> None:
        self._ledger, self._box, self._keys, self._generation = ledger, [slots], keys, generation

    @property
    def keys(self) -> tuple[bytes, ...]:
        """One per slot."""
        self._check()
        return self._keys

    @property
    def parents(self) -> tuple[bytes | None, ...]:
        """The key before each block in its prompt, where its writer said so and it can still be matched."""
        self._check()
        return self._ledger.parents(self._box[0])

    @property
    def terms(self) -> tuple[Priorities, Seconds]:
        """The priority of each block, and the seconds it can still be matched (infinite where it has no end)."""
        self._check()
        return self._ledger.terms(self._box[0])

    def narrow(self, n: int) -> None:
        """Keep the first `n` blocks and let go of the others."""
        if not 0 <= n <= len(self):
            raise Misuse(f"cannot keep {n} of {len(self)} blocks")
        slots = self._take()
        self._keys = self._keys[:n]
        self._box.append(slots[: n * SLOT_BYTES])
        self._ledger.give_back(self._state, slots[n * SLOT_BYTES :])

    def select(self, positions: Sequence[int]) -> Pinned:
        """Keep the blocks at these distinct positions, in this order, and let go of the others."""
        if len(set(positions)) != len(positions) or not all(0 <= at < len(self) for at in positions):
            raise Misuse(f"positions {positions} are not distinct positions of {len(self)} blocks")
        keys, wanted = self._keys, set(positions)
        slots = as_array(self._take())
        others = [at for at in range(len(slots)) if at not in wanted]
        self._ledger.give_back(self._state, slots[others].tobytes())
        kept = slots[list(positions)].tobytes()
        return Pinned(self._ledger, kept, tuple(keys[at] for at in positions), self._generation)

    def evict(self) -> int:
        """Let go, and un-publish the blocks that nobody else holds; their slots are free. Returns how many."""
        return self._ledger.evict(self._take())

    def weak(self) -> Weak:
        """A reference that does not stop eviction."""
        self._check()
        return Weak(self._ledger, self._box[0], self._keys, self._generation)


@final
class Weak:
    """Remembers blocks without holding them. Nothing to give back; any thread, any number of upgrades."""

    __slots__ = ("_generation", "_keys", "_ledger", "_slots")

    def __init__(self, ledger: Ledger, slots: bytes, keys: tuple[bytes, ...], generation: int) -> None:
        self._ledger, self._slots, self._keys, self._generation = ledger, slots, keys, generation

    def upgrade(self) -> Pinned | None:
        """Hold the blocks again; None as soon as one was evicted, un-published or expired."""
        if not self._ledger.rehold(self._slots, self._keys, self._generation):
            return None
        return Pinned(self._ledger, self._slots, self._keys, self._generation)
