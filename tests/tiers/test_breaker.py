"""When something that failed is left alone, asked and used again; time is moved by hand."""

from __future__ import annotations

from kvbm.testing.clock import ManualClock
from kvbm.tiers.breaker import Breaker

PAUSES = (1.0, 2.0, 4.0)


def asked(breaker: Breaker, clock: ManualClock, seconds: float) -> list[float]:
    """When it is asked in the next so many seconds, looked at four times a second."""
    begun, found = clock(), []
    for _ in range(round(seconds * 4)):
        clock.advance(0.25)
        if breaker.due():
            found.append(clock() - begun)
    return found


def test_one_kind_of_failures_in_a_row() -> None:
    breaker = Breaker(PAUSES, ManualClock(), most=3)
    assert [breaker.failed("read"), breaker.failed("read"), breaker.failed("write")] == [False] * 3
    breaker.worked("read")
    assert [breaker.failed("read"), breaker.failed("write"), breaker.failed("write")] == [False, False, True]


def test_it_is_asked_ever_less_often_whatever_ends_meanwhile() -> None:
    """What was on its way when it was left alone fails one after the other, or ends well."""
    clock = ManualClock()
    breaker = Breaker(PAUSES, clock, most=1)
    assert breaker.trip("broken")
    for _ in range(8):
        breaker.failed("write")
    breaker.worked("read")
    assert asked(breaker, clock, 16.0) == [1.0, 3.0, 7.0, 11.0, 15.0]
    assert not breaker.trip("still broken")
    assert breaker.problem == "still broken"


def test_each_time_it_is_left_alone_the_pauses_begin_again() -> None:
    clock = ManualClock()
    breaker = Breaker(PAUSES, clock)
    breaker.trip("broken")
    asked(breaker, clock, 8.0)
    breaker.mend()
    assert breaker.problem is None
    breaker.trip("broken again")
    assert asked(breaker, clock, 4.0) == [1.0, 3.0]


def test_while_it_works_it_is_watched() -> None:
    clock = ManualClock()
    assert asked(Breaker(PAUSES, clock, watch=5.0), clock, 11.0) == [5.0, 10.0]
    assert asked(Breaker(PAUSES, clock), clock, 11.0) == []


def test_what_answers_and_does_nothing_is_asked_ever_less_often() -> None:
    breaker = Breaker(PAUSES, ManualClock(), anew=False)
    pauses = []
    for _ in range(4):
        breaker.trip("nothing came")
        pauses.append(breaker.pause)
        breaker.mend()  # it answers
        breaker.failed()
    breaker.worked()
    assert (pauses, breaker.pause) == ([1.0, 2.0, 4.0, 4.0], 1.0)
