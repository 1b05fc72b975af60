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

from kvbm.blocks.ledger import Ledger, Mask, Terms
from kvbm.blocks.slots import REGISTERED, STAGED, WRITABLE
from kvbm.core.errors import Misuse
from kvbm.core.region import Slots

_PRIORITIES = range(101)


class _Lease:
    """Slots in one state until they are taken, once."""

    __slots__ = ("_box", "_ledger")
    _state: ClassVar[int]

    def __init__(self, ledger: Ledger, slots: Slots) -> None:
        self._ledger = ledger
        self._box = [slots]  # emptied by whoever takes the slots: list.pop is atomic, so only one can

    @property
    def slots(self) -> Slots:
        """Slot numbers in the order of the keys; read-only."""
        self._check()
        slots = self._box[0]
        slots.flags.writeable = False  # here because most handles are never looked into
        return slots

    def drop(self) -> None:
        """Give the slots back."""
        self._ledger.give_back(self._state, self._take(), self._terms_now())

    def _take(self) -> Slots:
        try:
            return self._box.pop()
        except IndexError:
            raise Misuse(f"this {type(self).__name__} was already used or dropped") from None

    def _terms_now(self) -> Terms | None:
        return None

    def _check(self) -> None:
        if not self._box:
            raise Misuse(f"this {type(self).__name__} was already used or dropped")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._box:
            self.drop()

    def __del__(self) -> None:
        if self._box and len(slots := self._box.pop()):
            self._ledger.abandon(self._state, slots, self._terms_now())
            warnings.warn(f"a {type(self).__name__} over {len(slots)} blocks was never dropped", ResourceWarning, 2)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {f'of {len(self._box[0])} blocks' if self._box else 'consumed'}>"


@final
class Writable(_Lease):
    """Slots whose bytes may be written; nobody can find them."""

    __slots__ = ("_generation",)
    _state = WRITABLE

    def __init__(self, ledger: Ledger, slots: Slots, generation: int) -> None:
        super().__init__(ledger, slots)
        self._generation = generation

    def stage(
        self, keys: Sequence[bytes], *, parent: bytes | None = None, priority: int = 0, ttl: float | None = None
    ) -> Staged:
        """Say what the slots will hold: one distinct key per slot, one after the other in a prompt.

        `parent` is the key before the first, `priority` 0 (goes first) to 100, `ttl` the seconds a block can be
        matched once it is registered.
        """
        self._check()
        names, needed = tuple(keys), len(self._box[0])
        if len(names) != needed or len(set(names)) != needed:
            raise Misuse(f"{needed} slots need as many distinct keys, got {len(set(names))} in {len(names)}")
        if priority not in _PRIORITIES:
            raise Misuse(f"priority {priority} is not in 0..100")
        if ttl is not None and not ttl > 0:
            raise Misuse(f"ttl {ttl} is not positive")
        slots, terms = self._take(), Terms(names, parent, priority, ttl, self._generation)
        self._ledger.stage(slots, terms)
        return Staged(self._ledger, slots, terms)


@final
class Staged(_Lease):
    """Slots that will be the blocks of known keys; they cannot be matched yet."""

    __slots__ = ("_terms",)
    _state = STAGED

    def __init__(self, ledger: Ledger, slots: Slots, terms: Terms) -> None:
        super().__init__(ledger, slots)
        self._terms = terms

    @property
    def keys(self) -> tuple[bytes, ...]:
        """One per slot."""
        self._check()
        return self._terms.keys

    def register(self, done: Mask | None = None) -> Pinned:
        """Publish the blocks whose bytes are in place: those where `done` is true, all of them where it is None.

        The others' slots go back. Where a key is registered already that block stays, with the larger priority and the
        later end of life, and the new slot goes back. Returns the published and existing blocks, held, in order; none
        where the pool was cleared after the slots were allocated.
        """
        if done is not None and (done.dtype != np.bool_ or done.shape != self.slots.shape):
            raise Misuse(f"done must be {len(self.slots)} booleans, got {done.dtype} of shape {done.shape}")
        ledger, generation = self._ledger, self._terms.generation
        slots, keys = ledger.register(self._take(), self._terms, done)
        return Pinned(ledger, slots, keys, generation)

    def _terms_now(self) -> Terms | None:
        return self._terms


@final
class Pinned(_Lease):
    """Registered blocks that cannot be evicted or overwritten while this is held; perhaps none."""

    __slots__ = ("_generation", "_keys")
    _state = REGISTERED

    def __init__(self, ledger: Ledger, slots: Slots, keys: tuple[bytes, ...], generation: int) -> None:
        super().__init__(ledger, slots)
        self._keys = keys
        self._generation = generation

    @property
    def keys(self) -> tuple[bytes, ...]:
        """One per slot."""
        self._check()
        return self._keys

    def __len__(self) -> int:
        return len(self.slots)

    def narrow(self, n: int) -> None:
        """Keep the first `n` blocks and let go of the others."""
        if not 0 <= n <= len(self):
            raise Misuse(f"cannot keep {n} of {len(self)} blocks")
        slots = self._take()
        self._keys = self._keys[:n]
        self._box.append(slots[:n])
        self._ledger.give_back(self._state, slots[n:])

    def evict(self) -> int:
        """Let go, and un-publish the blocks that nobody else holds; their slots are free. Returns how many."""
        return self._ledger.evict(self._take())

    def weak(self) -> Weak:
        """A reference that does not stop eviction."""
        return Weak(self._ledger, self.slots, self._keys, self._generation)


@final
class Weak:
    """Remembers blocks without holding them. Nothing to give back; any thread, any number of upgrades."""

    __slots__ = ("_generation", "_keys", "_ledger", "_slots")

    def __init__(self, ledger: Ledger, slots: Slots, keys: tuple[bytes, ...], generation: int) -> None:
        self._ledger, self._slots, self._keys, self._generation = ledger, slots, keys, generation

    def upgrade(self) -> Pinned | None:
        """Hold the blocks again; None as soon as one was evicted, un-published or expired."""
        if not self._ledger.rehold(self._slots, self._keys, self._generation):
            return None
        return Pinned(self._ledger, self._slots, self._keys, self._generation)
