"""What is counted, and when."""

from __future__ import annotations

import pytest

from kvbm.core.events import Admitted, Cleared, Unread
from kvbm.observe.totals import BYTES, SECONDS, Histogram, Totals
from tests.leader.ways import Offloaded, Onboarded


def test_copies_are_counted_by_direction() -> None:
    totals = Totals()
    totals.on_event(Offloaded(3, 1, 4000, 0.002))
    totals.on_event(Offloaded(2, 0, 2000, 0.2))
    totals.on_event(Onboarded(5, 2, 7000, 100.0))
    totals.on_event(Cleared("g2", 1))
    down, up = totals.offload, totals.onboard
    assert (down.blocks, down.failed, down.nbytes) == (5, 1, 6000)
    assert (up.blocks, up.failed, up.nbytes) == (5, 2, 7000)
    assert (sum(down.seconds.counts), down.seconds.total) == (2, 0.202)
    assert (sum(down.sizes.counts), down.sizes.total) == (2, 6000)
    assert up.seconds.counts[-1] == 1
    assert down.bytes_per_s() == 6000 / 0.202
    assert totals.demote.bytes_per_s() is None
    for _ in range(20):
        totals.on_event(Offloaded(2, 0, 2000, 0.001))
    assert down.bytes_per_s() == pytest.approx(2e6)  # lately


def test_the_hit_rate_is_of_what_the_engine_did_not_hold() -> None:
    totals = Totals()
    assert totals.hit_rate() == 0.0
    totals.on_event(Admitted(100, 100, 0))
    assert totals.hit_rate() == 0.0
    totals.on_event(Admitted(100, 20, 60))
    totals.on_event(Admitted(120, 0, 0))
    assert totals.hit_rate() == 60 / 200
    assert (totals.requests, totals.prompt_tokens, totals.device_tokens, totals.g2_tokens) == (3, 320, 120, 60)


def test_what_nobody_was_spared_is_neither_hit_nor_miss() -> None:
    totals = Totals()
    totals.on_event(Admitted(100, 20, 60))
    totals.on_event(Unread())
    totals.on_event(Admitted(400, 0, 0, pulled_tokens=400))
    assert totals.hit_rate() == 60 / 80
    totals.on_event(Admitted(200, 0, 60, pulled_tokens=120))  # the beginning of its prompt was here already
    assert totals.hit_rate() == 120 / 160
    assert (totals.g2_tokens, totals.pulled_tokens, totals.requests, totals.unread) == (120, 520, 3, 1)


def test_the_hit_rate_forgets() -> None:
    totals = Totals()
    totals.on_event(Admitted(10, 0, 10))
    for _ in range(1000):
        totals.on_event(Admitted(10, 0, 0))
    assert totals.hit_rate() == 0.0
    assert totals.g2_tokens == 10


def test_a_histogram_counts_up_to_and_with_its_bounds() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5, 100.0):
        histogram.add(value)
    assert histogram.counts == [2, 2, 2]
    assert histogram.total == 107.5


def test_bounds_rise() -> None:
    for bounds in (SECONDS, BYTES):
        assert list(bounds) == sorted(set(bounds))
