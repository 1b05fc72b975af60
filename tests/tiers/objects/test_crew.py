"""Threads that hang, and what becomes of their work."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvbm.tiers.objects.crew import Crew, Job

PATIENCE_S = 10.0


class Calls:
    """Jobs that wait until they are let go, and how they ended."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.ends: list[tuple[int, str]] = []
        self._lock = threading.Lock()

    def job(self, number: int, due: float = 1e9, *, waits: bool = True, commits: bool = False) -> Job[None]:
        def run(job: Job[None], _: None) -> None:
            if commits:
                assert job.commit()
            if waits:
                self.go.wait(PATIENCE_S)
            if job.end():
                self.ended(number, "done")

        return Job(run, lambda why: self.ended(number, why), due, number)

    def ended(self, number: int, how: str) -> None:
        with self._lock:
            self.ends.append((number, how))

    def until(self, count: int) -> list[tuple[int, str]]:
        end = time.monotonic() + PATIENCE_S
        while len(self.ends) < count:
            assert time.monotonic() < end, self.ends
            time.sleep(0.001)
        return sorted(self.ends)


@pytest.fixture
def calls() -> Iterator[Calls]:
    calls = Calls()
    yield calls
    calls.go.set()


@pytest.fixture
def broken() -> list[str]:
    return []


@pytest.fixture
def crew(broken: list[str]) -> Crew[None]:
    return Crew("test", 2, lambda: None, most_lost=2, broken=broken.append)


def begun(crew: Crew[None], is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_each_job_ends_once(crew: Crew[None], calls: Calls) -> None:
    for number in range(50):
        crew.do(calls.job(number, waits=False))
    assert calls.until(50) == [(number, "done") for number in range(50)]
    crew.close(1.0)


def test_a_job_that_was_not_begun_is_cancelled_at_once(crew: Crew[None], calls: Calls) -> None:
    for number in range(4):
        crew.do(calls.job(number))
    begun(crew, lambda: crew.waiting == 2)
    crew.cancel([2, 3, 99])
    assert calls.until(2) == [(2, "cancelled"), (3, "cancelled")]
    calls.go.set()
    assert calls.until(4)[:2] == [(0, "done"), (1, "done")]


def test_a_hanging_call_is_given_up_and_another_thread_goes_on(crew: Crew[None], calls: Calls) -> None:
    now = time.monotonic()
    for number in range(2):
        crew.do(calls.job(number, now + 0.05))
    crew.do(calls.job(2, now + 60, waits=False))
    time.sleep(0.1)
    assert calls.ends == [], "nobody looked yet"
    crew.expire()
    assert calls.until(3) == [(0, "no answer within its deadline"), (1, "no answer within its deadline"), (2, "done")]
    assert crew.lost == 2
    calls.go.set()
    begun(crew, lambda: crew.lost == 0)
    assert len(calls.ends) == 3, "what came back late ended nothing"


def test_what_waits_too_long_ends(crew: Crew[None], calls: Calls) -> None:
    for number in range(3):
        crew.do(calls.job(number, time.monotonic() + (60 if number < 2 else 0.01)))
    time.sleep(0.05)
    crew.expire()
    assert calls.until(1) == [(2, "it was not begun within its deadline")]


def test_too_many_that_hang_are_told_once(crew: Crew[None], calls: Calls, broken: list[str]) -> None:
    for number in range(6):
        crew.do(calls.job(number, time.monotonic()))
        time.sleep(0.01)
        crew.expire()
    crew.expire()
    assert broken == ["3 calls to the storage do not return"]
    assert len(calls.until(6)) == 6


def test_what_touches_memory_is_not_given_up(crew: Crew[None], calls: Calls) -> None:
    crew.do(calls.job(0, time.monotonic() + 0.02, commits=True))
    time.sleep(0.05)
    crew.expire()
    assert calls.ends == []
    assert crew.lost == 0
    calls.go.set()
    assert calls.until(1) == [(0, "done")]


def test_closing_gives_up_what_waits_and_waits_for_what_runs(crew: Crew[None], calls: Calls) -> None:
    for number in range(3):
        crew.do(calls.job(number))
    begun(crew, lambda: crew.waiting == 1)
    threading.Timer(0.05, calls.go.set).start()
    crew.close(PATIENCE_S)
    assert sorted(calls.ends) == [(0, "done"), (1, "done"), (2, "it is being closed")]
    crew.do(calls.job(4))
    assert calls.ends[-1] == (4, "it is being closed")


def test_a_job_that_raises_ends_as_failed(crew: Crew[None], calls: Calls, caplog: pytest.LogCaptureFixture) -> None:
    def run(job: Job[None], _: None) -> None:
        raise RuntimeError("nobody expected that")

    crew.do(Job(run, lambda why: calls.ended(0, why)))
    assert calls.until(1) == [(0, "RuntimeError: nobody expected that")]
    assert "nobody expected that" in caplog.text
    crew.do(calls.job(1, waits=False))
    calls.until(2)


def test_a_panic_of_a_library_ends_a_job_and_no_thread(crew: Crew[None], calls: Calls) -> None:
    """What Rust raises is no Exception."""

    class PanicException(BaseException):
        pass

    def panics(job: Job[None], _: None) -> None:
        raise PanicException("called `unwrap`")

    crew.do(Job(panics, lambda why: calls.ended(1, why), 1e9, 1))
    assert calls.until(1) == [(1, "PanicException: called `unwrap`")]
    crew.do(calls.job(2, waits=False))
    assert calls.until(2)[1] == (2, "done")
    assert crew.lost == 0


def test_a_process_ends_although_a_call_hangs() -> None:
    script = """
import threading
from kvbm.tiers.objects.crew import Crew, Job
crew = Crew("test", 1, lambda: None, most_lost=1, broken=print)
begun = threading.Event()
def hang(job, _):
    begun.set()
    threading.Event().wait()
crew.do(Job(hang, lambda why: print(why, flush=True)))
begun.wait()
crew.close(0.1)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert ran.stdout == "it is being closed\n"
