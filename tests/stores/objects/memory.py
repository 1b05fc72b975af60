"""A store in memory whose clock and whose faults are the test's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from kvbm.abc.store import MOST_BYTES, Absent, Damaged, Listed, ObjectStore


class MemoryStore(ObjectStore):
    """`ahead` seconds is its clock ahead of this machine's. `before` is called with what is done and with the name, and
    may raise, or wait."""

    def __init__(self, ahead: float = 0.0) -> None:
        self.ahead = ahead
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.before: Callable[[str, str], None] = lambda call, name: None
        self.calls: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def _begin(self, call: str, name: str) -> None:
        self.calls.append((call, name))
        self.before(call, name)

    def put(self, name: str, data: object) -> bool:
        self._begin("put", name)
        with self._lock:
            if name in self.objects:
                return False
            self.objects[name] = bytes(memoryview(data)), time.time() + self.ahead  # type: ignore[arg-type]
            return True

    claim = put

    def get(self, name: str, most: int = MOST_BYTES) -> bytes:
        self._begin("get", name)
        if name not in self.objects:
            raise Absent(f"there is no {name}")
        data = self.objects[name][0]
        if len(data) > most:
            raise Damaged(f"it has {len(data)} bytes")
        return data

    def get_range(self, name: str, start: int, length: int) -> bytes:
        return self.get(name)[start : start + length]

    def list(self, prefix: str) -> Iterator[Sequence[Listed]]:
        self._begin("list", prefix)
        found = [
            Listed(name, len(data), modified)
            for name, (data, modified) in sorted(self.objects.items())
            if name.startswith(prefix)
        ]
        for at in range(0, len(found), 100):
            yield found[at : at + 100]

    def stat(self, name: str) -> Listed:
        return Listed(name, len(self.get(name)), self.objects[name][1])

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            self._begin("delete", name)
            self.objects.pop(name, None)

    def close(self) -> None:
        """Nothing is open."""
