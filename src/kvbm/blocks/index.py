"""Which key is where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice


class Index:
    """Registered keys with their slots, and staged keys with how many times they are staged.

    Both are dicts from bytes to int: the garbage collector does not walk such dicts, however large. No lock of its
    own.
    """

    def __init__(self) -> None:
        self._slot: dict[bytes, int] = {}
        self._staged: dict[bytes, int] = {}

    def items(self) -> Iterable[tuple[bytes, int]]:
        """Registered keys and their slots."""
        return self._slot.items()

    def prefix(self, keys: Sequence[bytes], start: int) -> list[int]:
        """Slots of the longest prefix of `keys[start:]` that is registered."""
        # iter(f, None) calls f until it gives None, in C: nothing after the first miss is looked up.
        return list(iter(map(self._slot.get, islice(keys, start, None)).__next__, None))

    def find(self, keys: Iterable[bytes]) -> list[int | None]:
        """Slot of each key, None where it is not registered."""
        return list(map(self._slot.get, keys))

    def none_of(self, keys: Iterable[bytes]) -> bool:
        """Whether no key is registered."""
        return self._slot.keys().isdisjoint(keys)

    def add(self, keys: Iterable[bytes], slots: Iterable[int]) -> None:
        """Register keys that are not; as many slots."""
        self._slot.update(zip(keys, slots, strict=False))

    def remove(self, keys: Iterable[bytes]) -> None:
        """Forget keys that are registered."""
        registered = self._slot
        for key in keys:
            del registered[key]

    def clear(self) -> None:
        """Forget every key, staged ones too."""
        self._slot, self._staged = {}, {}

    def stage(self, keys: Iterable[bytes]) -> None:
        """Count one more staging of each key."""
        if self._staged.keys().isdisjoint(keys):
            self._staged.update(dict.fromkeys(keys, 1))
            return
        for key in keys:
            self._staged[key] = self._staged.get(key, 0) + 1

    def unstage(self, keys: Iterable[bytes]) -> None:
        """Count one staging less of each key."""
        staged = self._staged
        for key in keys:
            times = staged.pop(key)
            if times > 1:
                staged[key] = times - 1

    def is_staged(self, key: bytes) -> bool:
        """Whether somebody is about to register `key`."""
        return key in self._staged
