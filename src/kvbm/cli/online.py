"""The disk tier's folder by way of the engine that uses it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbm.cli.control import ask
from kvbm.core.errors import KvbmError
from kvbm.stores.disk.lock import holder_of

_EVERY_S = 0.2
_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Owner:
    """An engine that has a folder's lock and answers."""

    engine: str
    run_dir: Path
    namespace: str
    """The folder of the namespace it uses."""

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Raises KvbmError: it does not answer, or cannot."""
        answer = ask(self.run_dir, self.engine, command, **arguments)
        if answer is None:
            raise KvbmError(f"engine {self.engine} has ended")
        if answer.result is None:
            raise KvbmError(f"engine {self.engine}: {answer.error}")
        return answer.result

    def verify(self, progress: Callable[[int, int], None]) -> dict[str, Any]:
        """Have it read all its blocks; `progress` is told slots that were looked at, and all. Raises as `ask`."""
        state = self.ask("disk.verify", action="begin")
        try:
            while state["running"]:
                progress(state["looked"], state["slots"])
                time.sleep(_EVERY_S)
                state = self.ask("disk.verify")
        except KeyboardInterrupt:
            self.ask("disk.verify", action="stop")
            raise
        if state["problem"] is not None:
            raise KvbmError(f"engine {self.engine} did not read all of its blocks: {state['problem']}")
        return state

    def purge(self, names: Collection[str]) -> None:
        """Have it delete these namespaces, and empty its own if that is one of them. Raises as `ask`."""
        state = self.ask("disk.purge", namespaces=list(names))
        deadline = time.monotonic() + _PATIENCE_S
        while state["running"]:
            if time.monotonic() > deadline:
                raise KvbmError(f"engine {self.engine} is still at it: {state['problem'] or 'kvbm status tells more'}")
            time.sleep(_EVERY_S)
            state = self.ask("disk.purge")
        for problem in state["left"].values():
            raise KvbmError(f"engine {self.engine}: {problem}")


def owner_of(folder: Path, run_dir: Path) -> Owner | None:
    """The engine that has the lock of `folder`, if it answers on this machine."""
    holder = holder_of(folder)
    if holder is None or not holder.engine or Path(holder.engine).name != holder.engine:
        return None
    answer = ask(run_dir, holder.engine, "disk.inspect")
    if answer is None or answer.result is None:
        return None
    used = Path(answer.result["folder"])
    same = used.parent.exists() and used.parent.samefile(folder)
    return Owner(holder.engine, run_dir, used.name) if same else None
