"""An event loop on a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

from kvbm.core.errors import Broken, KvbmError

log = logging.getLogger(__name__)


class Loop:
    """`main` runs on the thread from `start` on, and ends it: once it has begun its work it says so (`begun`), and it
    returns soon after `stopped` does. What it raises before that is raised by `wait`."""

    def __init__(self, name: str, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._main = main
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()
        self._begun = threading.Event()
        self._failure: KvbmError | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    # ------------------------------------------------------------------ from other threads

    def start(self) -> None:
        """Once."""
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Until `main` has begun its work. Raises Broken: it did not in time; and what it raised."""
        if not self._begun.wait(seconds):
            raise Broken(f"the network thread did not start within {seconds:.0f} s")
        if self._failure is not None:
            raise self._failure

    def soon(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Begin a task. Nothing happens once the loop has ended."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(lambda: self.task(work()))

    def close(self, seconds: float) -> None:
        """Have `main` end, and wait so long for it."""
        if self._thread.is_alive():
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(seconds)

    @property
    def tasks(self) -> int:
        """Tasks that have not ended."""
        return len(self._tasks)

    # ------------------------------------------------------------------ on the thread

    def task(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin a task; what it raises is logged."""
        task = self._loop.create_task(self._logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def begun(self) -> None:
        """`wait` returns."""
        self._begun.set()

    async def stopped(self) -> None:
        """Until `close` was called."""
        await self._stop.wait()

    def cancel(self) -> list[asyncio.Task[None]]:
        """Cancel all tasks, which are to be waited for."""
        for task in (tasks := list(self._tasks)):
            task.cancel()
        return tasks

    def time(self) -> float:
        """Seconds, of a clock of its own."""
        return self._loop.time()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        except KvbmError as error:
            self._failure = error
        finally:
            self._begun.set()
            self._loop.close()

    @staticmethod
    async def _logged(work: Awaitable[None]) -> None:
        try:
            await work
        except Exception:
            log.exception("KVBM: the network thread goes on after an error")
