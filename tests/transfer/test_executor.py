import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest

from kvbm.abc.transport import Completion, Plan, Quiet, Transport
from kvbm.core.errors import Misuse
from kvbm.core.outcome import Outcome
from kvbm.core.region import Plane, Region
from kvbm.testing.transport import HostMemory, Memory, blocked, contents, fill, plan_of
from kvbm.transfer.executor import NO_TICKET, Executor
from kvbm.transfer.memcpy import MemcpyTransport


class Ended:
    """A job's `done`: remembers, and lets others wait."""

    def __init__(self) -> None:
        self.completions: dict[int, Completion] = {}
        self._changed = threading.Condition()

    def __call__(self, job_id: int, completion: Completion) -> None:
        with self._changed:
            assert job_id not in self.completions
            self.completions[job_id] = completion
            self._changed.notify_all()

    def wait(self, job_id: int) -> Completion:
        with self._changed:
            assert self._changed.wait_for(lambda: job_id in self.completions, 30)
        return self.completions[job_id]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Uncertain(Transport):
    """Takes anything and ends it when told to; a cancel does nothing."""

    def __init__(self) -> None:
        self.done: Callable[[Completion], None] | None = None
        self.healthy = True

    def reaches(self, source: Region, destination: Region) -> bool:
        return True

    def submit(self, plan: Plan, done: Callable[[Completion], None]) -> int:
        self.done = done
        return 1

    def cancel(self, ticket: int) -> Quiet:
        return Quiet.UNCERTAIN

    def alive(self) -> bool:
        return self.healthy

    def close(self) -> None:
        self.healthy = False


@pytest.fixture
def pair() -> tuple[Memory, Memory]:
    pair = HostMemory([256, 8], 8), HostMemory([256, 8], 8)
    fill(pair[0], 1)
    return pair


@pytest.fixture
def memcpy() -> MemcpyTransport:
    return MemcpyTransport(1)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def executor(memcpy: MemcpyTransport, clock: Clock) -> Iterator[Executor]:
    executor = Executor([memcpy], clock=clock)
    yield executor
    executor.close(30)


def test_a_job_is_copied_and_reported(executor: Executor, pair: tuple[Memory, Memory]) -> None:
    ended = Ended()
    executor.submit(7, plan_of(pair, [1, 2], [3, 4]), 10, ended)
    assert executor.wait([7, 99], 30)
    assert ended.completions[7].outcomes.tolist() == [Outcome.DONE] * 2
    assert pair[1].get(3) == pair[0].get(1)
    assert executor.pending() == 0
    executor.submit(7, plan_of(pair, [5], [5]), 10, ended.__class__())  # an id that is over can be used again


def test_wait_blocks_until_done_has_returned(
    executor: Executor, memcpy: MemcpyTransport, pair: tuple[Memory, Memory]
) -> None:
    ended = Ended()
    with blocked(memcpy, pair):
        executor.submit(1, plan_of(pair, [0], [0]), 10, ended)
        assert not executor.wait([1], 0)
        assert executor.wait([2], 0)
        assert executor.pending() == 1
    assert executor.wait([1], 30)
    assert 1 in ended.completions


def test_a_pair_that_nothing_reaches_fails_at_once(executor: Executor, pair: tuple[Memory, Memory]) -> None:
    ended, disk = Ended(), Region("G3", "file", 8, (Plane(0, 264, 264),))
    plan = plan_of(pair, [0, 1], [0, 1])
    executor.submit(1, Plan(plan.source, plan.source_slots, disk, plan.destination_slots, False, "store"), 10, ended)
    completion = ended.completions[1]
    assert completion.ticket == NO_TICKET
    assert completion.outcomes.tolist() == [Outcome.FAILED] * 2
    assert completion.error == "no transport copies from host region 'test' to file region 'G3'"
    assert executor.pending() == 0


def test_a_dead_transport_is_passed_over(pair: tuple[Memory, Memory]) -> None:
    dead, living = Uncertain(), MemcpyTransport(1)
    dead.healthy = False
    executor, ended = Executor([dead, living]), Ended()
    assert not executor.alive()
    assert not executor.lost(pair[0].region, pair[1].region)
    executor.submit(1, plan_of(pair, [0], [0]), 10, ended)
    assert ended.wait(1).error is None
    living.close()
    executor.submit(2, plan_of(pair, [0], [0]), 10, ended)
    assert ended.wait(2).error == "the transports that copy from host region 'test' to host region 'test' have died"
    assert executor.lost(pair[0].region, pair[1].region)
    executor.close(0)


def test_a_late_job_ends_with_deadline_and_untouched(
    executor: Executor, memcpy: MemcpyTransport, clock: Clock, pair: tuple[Memory, Memory]
) -> None:
    old, ended = contents(pair[1]), Ended()
    with blocked(memcpy, pair):
        executor.submit(1, plan_of(pair, [0], [0]), 5, ended)
        executor.submit(2, plan_of(pair, [1], [1]), 50, ended)
        clock.now += 4
        executor.expire()
        clock.now += 2
        executor.expire()
        executor.expire()
    assert ended.wait(1).error == "deadline"
    assert ended.wait(1).outcomes.tolist() == [Outcome.FAILED]
    assert ended.wait(2).error is None
    assert contents(pair[1]) == old | {1: pair[0].get(1)}


def test_a_late_job_that_may_still_run_stays_pending(clock: Clock, pair: tuple[Memory, Memory]) -> None:
    transport, ended = Uncertain(), Ended()
    executor = Executor([transport], clock=clock)
    executor.submit(1, plan_of(pair, [0], [0]), 5, ended)
    clock.now += 6
    executor.expire()
    assert executor.pending() == 1
    assert not executor.cancel([1])
    assert not executor.wait([1], 0)
    assert transport.done is not None
    transport.done(Completion(1, plan_of(pair, [0], [0]).source_slots.astype("u1"), None, 0.0, 0))
    assert executor.wait([1], 0)
    assert ended.completions[1].error is None


def test_jobs_can_be_given_up(executor: Executor, memcpy: MemcpyTransport, pair: tuple[Memory, Memory]) -> None:
    ended = Ended()
    with blocked(memcpy, pair):
        executor.submit(1, plan_of(pair, [0], [0]), 5, ended)
        assert executor.cancel([1, 2])
    assert ended.wait(1).error == "cancelled"


def test_a_done_that_raises_is_logged_and_the_next_job_runs(
    executor: Executor, caplog: pytest.LogCaptureFixture, pair: tuple[Memory, Memory]
) -> None:
    def bad(job_id: int, completion: Completion) -> None:
        raise KeyError("oops")

    ended = Ended()
    executor.submit(1, plan_of(pair, [0], [0]), 10, bad)
    executor.submit(2, plan_of(pair, [1], [1]), 10, ended)
    assert executor.wait([1, 2], 30)
    assert executor.alive()
    assert ended.wait(2).error is None
    assert "completion of job 1" in caplog.text


def test_misuse_leaves_nothing_behind(executor: Executor, memcpy: MemcpyTransport, pair: tuple[Memory, Memory]) -> None:
    ended = Ended()
    with pytest.raises(Misuse):
        executor.submit(1, plan_of(pair, [0, 1], [0, 0]), 10, ended)
    assert executor.pending() == 0
    with blocked(memcpy, pair):
        executor.submit(1, plan_of(pair, [0], [0]), 10, ended)
        with pytest.raises(Misuse, match="still pending"):
            executor.submit(1, plan_of(pair, [0], [0]), 10, ended)
    assert executor.wait([1], 30)
    executor.close(0)
    with pytest.raises(Misuse, match="closed"):
        executor.submit(3, plan_of(pair, [0], [0]), 10, ended)
    assert list(ended.completions) == [1]


def test_nobody_waits_for_a_job_whose_submission_raised(executor: Executor, pair: tuple[Memory, Memory]) -> None:
    """At whichever line: a copy that the transport has ends, any other is forgotten."""
    raised = set[int]()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code is not Executor.submit.__code__:
            return None
        if event == "line" and frame.f_lineno not in raised:
            raised.add(frame.f_lineno)
            raise InterruptedError
        return trace

    for job in range(100):
        before = len(raised)
        sys.settrace(trace)
        try:
            with suppress(InterruptedError):
                executor.submit(job, plan_of(pair, [0], [1]), 60, Ended())
        finally:
            sys.settrace(None)
        assert executor.wait([job], 30)
        if len(raised) == before:
            break
    assert len(raised) > 8


def test_close_fails_what_does_not_end_in_time(memcpy: MemcpyTransport, pair: tuple[Memory, Memory]) -> None:
    executor, ended, released = Executor([memcpy]), Ended(), threading.Event()

    def close() -> None:
        executor.close(0)
        released.set()

    with blocked(memcpy, pair):
        executor.submit(1, plan_of(pair, [0], [0]), 10, ended)
        closing = threading.Thread(target=close)
        closing.start()
        while memcpy.alive():
            released.wait(0.001)
    closing.join(30)
    assert ended.completions[1].error == "the transport was closed"
    assert executor.pending() == 0
