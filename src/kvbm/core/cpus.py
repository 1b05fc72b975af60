"""The processors that this process was given (`taskset`, cpusets of containers), whatever a library has bound its
threads to since."""

from __future__ import annotations

import logging
import multiprocessing
import os
from contextlib import suppress
from functools import cache
from typing import Final

log = logging.getLogger(__name__)

_IMPORTED: Final = frozenset(os.sched_getaffinity(0))


@cache
def given() -> frozenset[int]:
    """An engine's worker is bound by OpenMP before it runs anything of ours: what it was given is what the process has
    that started it. Of a process that `multiprocessing` did not start, what it had when this was imported."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        with suppress(OSError):  # it has ended
            return frozenset(os.sched_getaffinity(parent.pid))
    return _IMPORTED


def listed(text: str) -> frozenset[int]:
    """The numbers of a list as Linux writes it (0-3,8). Raises ValueError."""
    numbers = set[int]()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def spread(thread: str, among: frozenset[int] = frozenset()) -> None:
    """Lets the calling thread run on all of them, or on those `among` them, if there are any: threads inherit what the
    one that starts them is bound to, and an engine binds its worker's main thread to the cores it computes on. Where
    that is refused, it stays so."""
    try:
        os.sched_setaffinity(0, (given() & among) or given())
    except OSError as error:
        log.warning("KVBM: %s keeps the CPU affinity it inherited: %s", thread, error)
