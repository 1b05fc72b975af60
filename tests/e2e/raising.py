"""Calls of KVBM that raise on purpose, in the process of the scheduler's side or, by vLLM's RPC, in the workers'."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np

from kvbm.blocks.feed import Feed
from kvbm.leader.observers import Observers
from kvbm.testing.faults import _peek
from tests import before  # noqa: F401

SCHEDULER = ("on_new_request", "match", "place", "step", "stepped", "finish", "take_events", "stats", "reset")
_TELLING = (Feed.deliver.__code__, Observers.emit.__code__)
WORKER = ("before_step", "before_forward", "after_forward", "results", "bad_blocks")


class Injected(Exception):
    """What nobody expected."""


class Fault:
    """The `at`-th call of a method raises: before it does anything, afterwards, or at its `where`-th line of KVBM's own
    code, or the first one behind it where no observer is being told; where that call has fewer, a later one does."""

    def __init__(self, cls: type, name: str, at: int, where: str | int) -> None:
        self._cls, self._name, self._at, self._where = cls, name, at, where
        self._original = original = vars(cls)[name]
        self.raised = False

        @wraps(original)
        def call(side: Any, *args: Any) -> Any:
            self._at -= 1
            if self._at > 0 or self.raised:
                return original(side, *args)
            if isinstance(self._where, int):
                return self._traced(original, side, *args)
            if self._where == "after":
                original(side, *args)
            self.raised = True
            raise Injected(self._where)

        def events(side: Any) -> Iterator[Any]:  # as the original: nothing happens until somebody asks for the first
            yield from original(side)
            self._at -= 1
            if self._at <= 0 and not self.raised:
                self.raised = True
                raise Injected("an event")

        setattr(cls, name, events if name == "take_events" else call)

    def _traced(self, original: Callable[..., Any], *args: Any) -> Any:
        assert isinstance(self._where, int)
        left = self._where

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal left
            if "/kvbm/" not in frame.f_code.co_filename:
                return None
            if event == "line":
                left -= 1
                if left <= 0 and not _delivering(frame):
                    sys.settrace(None)
                    self.raised = True
                    raise Injected(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            return trace

        sys.settrace(trace)
        try:
            return original(*args)
        finally:
            sys.settrace(None)

    def end(self) -> bool:
        """Whether it has raised; from now on nothing does."""
        setattr(self._cls, self._name, self._original)
        return self.raised


def _delivering(frame: FrameType | None) -> bool:
    """Whether an observer is being told of an event. An observer that raises is removed, and KVBM goes on."""
    while frame is not None and frame.f_code not in _TELLING:
        frame = frame.f_back
    return frame is not None


_armed: Fault | None = None


def arm(name: str, at: int, where: str | int) -> None:
    """Have this method raise in this process."""
    from kvbm.connect.vllm.translate import SchedulerSide, WorkerSide

    global _armed
    disarm()
    _armed = Fault(WorkerSide if name in WORKER else SchedulerSide, name, at, where)


def disarm() -> bool:
    """Whether it has raised; from now on nothing does."""
    global _armed
    ended, _armed = _armed, None
    return ended is not None and ended.end()


# ---------------------------------------------------------------------- for the workers' processes


def arm_worker(worker: Any, rank: int, name: str, at: int, where: str | int) -> None:
    if worker.rank == rank:
        arm(name, at, where)


def disarm_worker(_: Any) -> bool:
    return disarm()


def restart_worker(_: Any) -> None:
    """A fresh side in place of the one that is there, over the same memory of the engine."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from kvbm.connect.vllm import geometry

    connector = get_kv_transfer_group()
    old = connector._worker
    old.close()
    connector._build(connector._vllm_config, connector.role, connector._kv_cache_config)
    with mock.patch.object(geometry, "g1_region", return_value=old.side.worker._g1):
        connector._worker.register({})


def off_worker(_: Any) -> str | None:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()._worker.off  # type: ignore[no-any-return]


def lie_worker(_: Any) -> None:
    """The guard answers as if loads had been made."""
    from kvbm.connect.vllm.guard import WorkerGuard
    from kvbm.worker.worker import Collected

    def results(guard: WorkerGuard) -> Collected:
        waiting, guard._waiting = guard._waiting, set()
        return Collected(loaded=waiting)

    global _lies
    _lies = [
        mock.patch.object(WorkerGuard, "results", results),
        mock.patch.object(WorkerGuard, "bad_blocks", return_value=set()),
    ]
    for each in _lies:
        each.start()


def honest_worker(_: Any) -> None:
    for each in _lies:
        each.stop()


_lies: list[Any] = []
_known: dict[bytes, np.ndarray] = {}


def _read(slot: int) -> np.ndarray:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return np.frombuffer(_peek(get_kv_transfer_group()._worker.side.worker._g2, slot), np.float32)


def remember_worker(_: Any, keys: Sequence[bytes], slots: Sequence[int]) -> None:
    """What is stored under these keys is right."""
    _known.update((key, _read(slot)) for key, slot in zip(keys, slots, strict=True))


def compare_worker(_: Any, keys: Sequence[bytes], slots: Sequence[int]) -> tuple[int, int]:
    """Of what is stored under these keys: how much is as it was remembered, and how much differs."""
    same = [
        np.allclose(_known[key], _read(slot), rtol=1e-3, atol=1e-4)
        for key, slot in zip(keys, slots, strict=True)
        if key in _known
    ]
    return sum(same), len(same) - sum(same)
