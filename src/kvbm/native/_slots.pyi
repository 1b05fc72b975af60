from collections.abc import Sequence

class Table:
    """The state of every slot of a pool, and which key is in which slot.

    A run of slots is `bytes` of int64 (`numpy.frombuffer` reads it in place); keys are `bytes`. Every method is atomic
    under the GIL and checks its arguments before it changes anything: `ValueError` for a slot that does not exist or
    is in another state, `TypeError` for what is no run or no key.
    """

    capacity: int
    """Slots there are, retired ones included. The others count slots per state."""
    free: int
    writable: int
    staged: int
    registered: int
    """Held or not."""
    active: int
    """Registered and held."""
    orphaned: int
    retired: int

    def __init__(self, capacity: int) -> None: ...
    def take(self, n: int, /) -> bytes:
        """`n` free slots, now writable: those that became free last, of new ones the lowest."""

    def claim(self, slots: bytes, /) -> None:
        """These free slots are writable now. Looks at every free slot."""

    def stage(
        self, slots: bytes, keys: tuple[bytes, ...] | None, parent: bytes | tuple[bytes | None, ...] | None, /
    ) -> None:
        """Writable to staged, as the blocks of `keys`; each one's parent is the key before it, the first's `parent`.

        A tuple has the parent of each. Keys are distinct. Without keys they can only be given back.
        """

    def register(self, slots: bytes, done: bytes | None, keep: bool, /) -> tuple[bytes, list[int] | None, bytes, bytes]:
        """Staged to registered, held once, where `done` (a byte per slot) is not 0; the others to free.

        Where a key is registered already: with `keep` the new slot becomes an orphan, held once; without, it is free
        and the registered one, its twin, is held once more. Returns what is held now, in order; the positions newly
        registered (None: all); the twins; and those of the twins that nobody had held.
        """

    def match(self, keys: Sequence[bytes], start: int, /) -> tuple[bytes, bytes]:
        """One more hold on the longest registered prefix of `keys[start:]`; its slots, and those nobody had held."""

    def hold(self, slots: bytes, /) -> bytes:
        """One more hold on registered slots; returns those that nobody had held."""

    def release(self, slots: bytes, /) -> bytes:
        """One hold less; returns the registered ones that nobody holds now. Orphans without a hold become free."""

    def give_back(self, slots: bytes, /) -> None:
        """Writable or staged to free."""

    def evict(self, slots: bytes, /) -> tuple[tuple[bytes, ...], bytes]:
        """Registered and not held to writable; returns their keys, and the slots in reverse."""

    def unpublish(self, slots: bytes, /) -> tuple[bytes, ...]:
        """Registered to free or, where held, to orphaned; returns their keys."""

    def clear(self) -> None:
        """`unpublish` all; what is staged loses its key. Looks at every slot."""

    def peek(self, keys: Sequence[bytes], start: int, /) -> int:
        """How many `match` would hold."""

    def find(self, keys: Sequence[bytes], /) -> bytes:
        """The slot of each key, -1 where it is not registered."""

    def absent(self, keys: Sequence[bytes], /) -> list[int]:
        """Positions of keys that are neither registered nor staged."""

    def idle(self, slots: bytes, /) -> bytes:
        """Those that are registered and not held."""

    def keys(self, slots: bytes, /) -> tuple[bytes, ...]:
        """Their keys; None (which no caller of ours meets) where there is none."""

    def parents(self, slots: bytes, /) -> tuple[bytes | None, ...]:
        """The key before each in its prompt, where it was given."""

    def tags(self, slots: bytes, /) -> bytes:
        """An int64 per slot: the hash of its key in this process."""

    def parent_slots(self, slots: bytes, /) -> bytes:
        """The slot of the block before each in its prompt; -1 where it is unknown or not registered."""

    def state(self, slot: int, /) -> int:
        """The state of one slot (see `kvbm.blocks.slots`)."""

    def registered_slots(self) -> bytes:
        """Every registered slot. Looks at all."""

    def free_slots(self) -> bytes:
        """Every free slot, the last to be taken first."""

    def states(self) -> bytes:
        """An int32 per slot (see `kvbm.blocks.slots`)."""

    def grow(self, capacity: int, /) -> None:
        """More slots, free. Raises MemoryError and changes nothing where memory is short."""

    def retire(self, n: int, /) -> bytes:
        """`n` free slots, the highest, to retired; returns them."""

    def restore(self, n: int, /) -> bytes:
        """`n` retired slots, the lowest, to free; returns them."""
