"""What the disk tier asks of its folder, and the thread that waits for the answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Protocol

from kvbm.core.errors import KvbmError
from kvbm.stores.disk.recovery import Recovered


class Durable(Protocol):
    """What the leader needs of the folder on disk. Calls may wait for the disk, and raise Broken."""

    def clear(self, *, lasting: bool = True) -> int:
        """Begin a new generation and return its number. One that is not `lasting` ends with the process."""

    def restore(self) -> None:
        """Make again what was deleted or cut."""

    def recover(self) -> Recovered:
        """The blocks that are there."""

    def close(self) -> None:
        """Let others have it."""


class Generations:
    """The generation under which blocks are written, `number` at first, and whether the folder knows of it.

    Attributes are for the tier, under the leader's lock.
    """

    def __init__(self, folder: Durable, number: int) -> None:
        self.folder, self.number = folder, number
        self.stale = False
        """Whether a new generation has not been written down yet."""
        self.lasting = True
        """Whether another process may find what is written."""


class Chores:
    """Calls that wait for the disk, one after the other on a thread of its own. Under the leader's lock."""

    def __init__(self, executor: Executor | None = None) -> None:
        self._executor = ThreadPoolExecutor(1, "kvbm-folder") if executor is None else executor
        self._begun: deque[Future[Callable[[], None]]] = deque()

    def do(self, call: Callable[[], Callable[[], None]]) -> None:
        """Begin a call. What it returns is called by `end`, under the lock."""
        self._begun.append(self._executor.submit(call))

    @property
    def busy(self) -> bool:
        """Whether a call has not been ended."""
        return bool(self._begun)

    def end(self) -> Iterator[str]:
        """End the calls that are done, in order; what went wrong with them."""
        while self._begun and self._begun[0].done():
            try:
                self._begun.popleft().result()()
            except KvbmError as error:
                yield str(error)

    def wait(self, seconds: float) -> None:
        """Until the calls that were begun are done, at most so long for each. Nothing of them is ended."""
        for each in tuple(self._begun):
            each.exception(seconds)

    def close(self) -> None:
        """Begin no more of them."""
        self._executor.shutdown(wait=False, cancel_futures=True)
