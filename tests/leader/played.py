"""What stands beside a leader in `roles.Stage` and answers only when the test says so."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from types import SimpleNamespace
from typing import Any

from kvbm.core.errors import Broken
from kvbm.core.keys import variant_keys


class Chores(Executor):
    """A tier's thread, played by the test: what it is given waits for `run`."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, call: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._waiting.append((future, partial(call, *args, **kwargs)))
        return future

    def run(self) -> bool:
        """Does the oldest; False where nothing waits. The leader hears of it at its next tick."""
        if not self._waiting:
            return False
        future, call = self._waiting.popleft()
        try:
            future.set_result(call())
        except Broken as error:
            future.set_exception(error)
        return True


class Others:
    """The other instances and their directory, played by the test. `searches` are what they are asked for; `told` is
    what else they heard, in words."""

    def __init__(self) -> None:
        self.peers: tuple[str, ...] = ()
        self.problem: str | None = None
        self.namesakes: tuple[str, ...] = ()
        self.server = SimpleNamespace(place=self._place, slabs=(0, []))
        self.searches: list[Any] = []
        self.told: list[str] = []
        self._clients: dict[str, Any] = {}

    def _place(self, slabs: list[Any]) -> None:
        self.server.slabs = self.server.slabs[0] + 1, slabs

    def client(self, name: str) -> Any:
        """An instance that was connected to. What goes wrong with it connects it anew."""
        new = SimpleNamespace(name=name, instance=SimpleNamespace(incarnation=7), connections=1)
        return self._clients.setdefault(name, new)

    def search(self, search: Any) -> None:
        self.searches.append(search)

    def release(self, client: Any, lease: int) -> None:
        self.told.append(f"release {client.name} {lease}")

    def failed(self, client: Any, problem: str) -> None:
        client.connections += 1
        self.told.append(f"failed {client.name}: {problem}")

    def slow(self, client: Any, problem: str) -> None:
        self.told.append(f"slow {client.name}: {problem}")

    def works(self, client: Any) -> None:
        self.told.append(f"works {client.name}")

    def leave(self) -> None:
        self.peers = ()
        self.told.append("leave")

    def close(self) -> None:
        self.told.append("close")

    def usable(self) -> dict[str, bool]:
        return dict.fromkeys(self.peers, True)


class Keys(list[bytes]):
    """Of a request with an adapter, whose digest is not known yet."""

    def __init__(self, plain: Sequence[bytes]) -> None:
        super().__init__()
        self.plain, self.digest = list(plain), b""

    def under(self, digest: bytes) -> None:
        self.digest = digest
        self[:] = variant_keys(self.plain, digest)

    def append(self, key: bytes) -> None:
        self.plain.append(key)
        if self.digest:
            super().append(*variant_keys([key], self.digest))
