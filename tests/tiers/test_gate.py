"""When loading is slower than computing; time is moved by hand."""

from __future__ import annotations

import pytest

from kvbm.testing.clock import ManualClock
from kvbm.tiers.gate import Gate, Rate

TOKENS = 16


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1000.0)


@pytest.fixture
def gate(clock: ManualClock) -> Gate:
    return Gate(TOKENS, clock)


def compute(gate: Gate, clock: ManualClock, tokens: int, seconds: float) -> None:
    gate.step_begins(tokens)
    clock.advance(seconds)
    gate.step_ends()


def read(gate: Gate, clock: ManualClock, blocks: int, seconds: float, done: int | None = None) -> None:
    gate.read_begins(blocks)
    clock.advance(seconds)
    gate.read_ends(blocks, blocks if done is None else done)


def test_a_rate_follows_the_last_samples() -> None:
    rate = Rate()
    assert rate.get() is None
    rate.add(100, 1.0)
    assert rate.get() == pytest.approx(100)
    for _ in range(20):
        rate.add(10, 1.0)
    assert rate.get() == pytest.approx(10, rel=0.1)
    Rate().add(1, 0.0)


def test_what_is_not_known_is_not_held_against_a_load(gate: Gate, clock: ManualClock) -> None:
    assert gate.objection(1_000_000) is None
    compute(gate, clock, 1600, 1.0)
    assert gate.computing_s(100) == pytest.approx(1.0)
    assert gate.objection(1_000_000) is None
    assert Gate(TOKENS, clock).objection(1) is None


def test_the_slower_way_is_objected_to(gate: Gate, clock: ManualClock) -> None:
    compute(gate, clock, 1600, 1.0)  # 100 blocks a second
    read(gate, clock, 50, 1.0)
    assert gate.objection(10) == "loading 10 blocks would take 200 ms, computing them takes 100 ms"
    for _ in range(20):
        read(gate, clock, 500, 1.0)
    assert gate.objection(10) is None
    assert gate.objection(10, ahead=30) is None
    assert gate.objection(10, ahead=100) is not None


def test_decoding_says_nothing_of_prompts(gate: Gate, clock: ManualClock) -> None:
    compute(gate, clock, 63, 10.0)
    assert gate.computing_s(1) is None
    gate.step_ends()


def test_steps_that_overlap_are_counted_once(gate: Gate, clock: ManualClock) -> None:
    gate.step_begins(1600)
    gate.step_begins(1600)  # the engine schedules ahead
    clock.advance(1.0)
    gate.step_ends()
    clock.advance(1.0)
    gate.step_ends()
    assert gate.computing_s(100) == pytest.approx(1.0)


def test_a_silent_disk_counts_as_slower_the_longer_it_is_silent(gate: Gate, clock: ManualClock) -> None:
    compute(gate, clock, 1600, 1.0)
    read(gate, clock, 1000, 1.0)
    gate.read_begins(20)
    assert gate.objection(20) is None
    clock.advance(0.15)
    assert gate.objection(20) is None
    clock.advance(0.1)
    assert gate.objection(20) is not None
    gate.read_ends(20, 20)
    assert gate.reading == 0


def test_the_first_read_of_all_is_not_waited_for_for_ever(gate: Gate, clock: ManualClock) -> None:
    compute(gate, clock, 1600, 1.0)
    gate.read_begins(10)
    assert gate.objection(10) is None
    clock.advance(0.11)
    assert gate.objection(10) is not None


def test_what_was_cancelled_or_failed_does_not_look_fast(gate: Gate, clock: ManualClock) -> None:
    compute(gate, clock, 1600, 1.0)
    read(gate, clock, 50, 1.0)
    before = gate.loading_s(10)
    read(gate, clock, 1000, 1e-6, done=0)
    assert gate.loading_s(10) == pytest.approx(before, rel=0.01)
    only_failures = Gate(TOKENS, clock)
    compute(only_failures, clock, 1600, 1.0)
    read(only_failures, clock, 10, 1.0, done=0)
    assert only_failures.objection(1) == (
        "loading 1 blocks would not end: none came of the last reads, computing them takes 10 ms"
    )
    clock.advance(31)
    assert only_failures.objection(1) is None


def test_what_was_slow_once_is_tried_again(gate: Gate, clock: ManualClock) -> None:
    compute(gate, clock, 1600, 1.0)
    read(gate, clock, 10, 10.0)
    assert gate.objection(10) is not None
    clock.advance(29)
    assert gate.objection(10) is not None
    clock.advance(2)
    assert gate.objection(10) is None
    gate.read_begins(10)
    assert gate.objection(10) is None  # also while it is tried
    clock.advance(0.01)
    gate.read_ends(10, 10)
    assert gate.objection(10) is None
    assert gate.rates() == {"computed_tokens_per_s": pytest.approx(1600), "read_blocks_per_s": pytest.approx(1000)}


def test_reads_can_be_forgotten(gate: Gate, clock: ManualClock) -> None:
    compute(gate, clock, 1600, 1.0)
    read(gate, clock, 10, 10.0)
    gate.forget_reads()
    assert gate.objection(10) is None


# ---------------------------------------------------------------------- several reads at once

LANES, RUN = 16, 8


def together(gate: Gate, clock: ManualClock, reads: int, seconds: float) -> None:
    """So many reads of RUN blocks begin at once, and each takes so long; as many as there are lanes go on at a time."""
    while reads:
        now = min(reads, LANES)
        for _ in range(now):
            gate.read_begins(RUN)
        clock.advance(seconds)
        for _ in range(now):
            gate.read_ends(RUN, RUN, seconds)
        reads -= now


def test_single_reads_do_not_make_many_look_slow(clock: ManualClock) -> None:
    """Thirty milliseconds of latency and ninety megabytes a second for each connection: a run of 8 MB takes 123 ms,
    alone as beside fifteen others."""
    gate = Gate(TOKENS, clock, lanes=LANES)
    compute(gate, clock, 16_000, 1.0)  # a thousand blocks a second
    for _ in range(20):
        together(gate, clock, 1, 0.123)
    assert gate.loading_s(RUN) == pytest.approx(0.123, rel=0.01)
    assert gate.loading_s(125 * RUN) == pytest.approx(125 / 16 * 0.123, rel=0.01)
    assert gate.objection(125 * RUN) is None
    assert gate.objection(RUN) is not None, "computing eight blocks is faster"
    one_by_one = Gate(TOKENS, clock)
    compute(one_by_one, clock, 16_000, 1.0)
    for _ in range(20):
        together(one_by_one, clock, 1, 0.123)
    assert one_by_one.objection(125 * RUN) is not None, "the control: as if they came one after the other"


def test_what_all_lanes_give_together_bounds_what_is_expected(clock: ManualClock) -> None:
    """Sixteen at once are slower, each, where they share a link."""
    gate = Gate(TOKENS, clock, lanes=LANES)
    together(gate, clock, 1, 0.1)
    assert gate.loading_s(160 * RUN) == pytest.approx(1.0, rel=0.01)
    for _ in range(10):
        together(gate, clock, LANES, 0.8)
    assert gate.loading_s(160 * RUN) == pytest.approx(8.0, rel=0.05)
    gate.forget_reads()
    assert gate.loading_s(160 * RUN) == 0.0
    assert gate.rates()["read_blocks_per_s"] is None


def test_a_wave_of_reads_that_end_together_says_neither_too_much_nor_too_little(clock: ManualClock) -> None:
    """Reads that began at once end at once: after the first of a wave all lanes seem slow, after the last of them fast.
    At each end the rest is expected to take as long as it does."""
    gate = Gate(TOKENS, clock, lanes=LANES)
    compute(gate, clock, 16_000, 1.0)
    for _ in range(20):
        together(gate, clock, 1, 0.123)
    waves, left = 6, 6 * LANES * RUN
    for _ in range(LANES):
        gate.read_begins(RUN)
    for wave in range(waves):
        clock.advance(0.123)
        for _ in range(LANES):
            gate.read_ends(RUN, RUN, 0.123)
            left -= RUN
            if wave < waves - 1:
                gate.read_begins(RUN)
                expected = 0.123 * (waves - 1 - wave)
                assert gate.loading_s(left) == pytest.approx(expected, abs=0.13)
                assert gate.objection(left) is None


def test_what_is_on_its_way_takes_what_is_left_of_its_time(clock: ManualClock) -> None:
    gate = Gate(TOKENS, clock, lanes=LANES)
    together(gate, clock, 1, 0.2)
    for _ in range(4):
        gate.read_begins(RUN)
    clock.advance(0.15)
    assert gate.loading_s(4 * RUN) == pytest.approx(0.15, rel=0.01), "nothing was heard for so long"
    gate.read_ends(RUN, RUN, 0.15)
    assert gate.loading_s(3 * RUN) == pytest.approx(0.05, abs=0.03)
    clock.advance(10)
    assert gate.loading_s(3 * RUN) == pytest.approx(10, rel=0.01), "what hangs is not about to end"
