"""Host memory that comes slowly, or ends, in the process of a worker: for the setting `transport_wrapper`."""

from __future__ import annotations

from urllib.parse import parse_qsl

from kvbm.abc.transport import Transport
from kvbm.stores import memory


def build(inner: Transport, rank: int, query: str) -> Transport:
    """One slice in so many seconds (`wait`); nothing more is available after so many of them (`slices`)."""
    options = {name: float(value) for name, value in parse_qsl(query)}
    memory._LOOK_S, memory._MOST_AHEAD = options["wait"], memory.SLICE_BYTES  # type: ignore[misc]
    available, left = memory.available_memory, options.get("slices", float("inf"))

    def fewer() -> int:
        nonlocal left
        left -= 1
        return available() if left >= 0 else 0

    memory.available_memory = fewer  # type: ignore[assignment]
    return inner
