"""Host memory that comes slowly, or ends, in the process of a worker: for the setting `transport_wrapper`."""

from __future__ import annotations

from urllib.parse import parse_qsl

from kvbm.abc.transport import Transport
from kvbm.stores import memory


def build(inner: Transport, rank: int, query: str) -> Transport:
    """One slice in so many seconds (`wait`); nothing is available for more than so many of them (`slices`)."""
    options = {name: float(value) for name, value in parse_qsl(query)}
    memory._LOOK_S, memory._MOST_AHEAD = options["wait"], memory.SLICE_BYTES  # type: ignore[misc]
    available, grant = memory.available_memory, memory.Arena._grant
    most = options.get("slices", float("inf")) * memory.SLICE_BYTES

    def up_to_there(arena: memory.Arena, end: int) -> None:
        memory.available_memory = available if end <= most else lambda: 0  # type: ignore[assignment]
        grant(arena, end)

    memory.Arena._grant = up_to_there  # type: ignore[method-assign]
    return inner
