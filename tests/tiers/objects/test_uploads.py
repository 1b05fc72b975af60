"""Which runs are written, when, and which are not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from kvbm.blocks import Pinned, Pool
from kvbm.core.events import Copied
from kvbm.core.outcome import Outcome
from kvbm.policy import eviction_order
from kvbm.testing.clock import ManualClock
from kvbm.tiers.demote import Budget
from kvbm.tiers.moves import Ended, Passage
from kvbm.tiers.objects.uploads import Admission, Candidate, UploadRules, Uploads
from kvbm.tiers.tier import Mask, Record
from tests.leader.roles import keys_of

RUN = 4


class Desk:
    """Host memory, and a shelf that the test answers for."""

    name = "g4"

    def __init__(self, admission: Admission = "all", slots: int = 64, nbytes: float | None = None) -> None:
        self.pool = Pool(slots, order=eviction_order("lru", slots))
        self.clock = ManualClock()
        self.there: set[bytes] = set()
        self.begun: list[tuple[Candidate, Ended]] = []
        self.events: list[Copied] = []
        self.writes = True
        budget = Budget(nbytes, 86_400, self.clock)
        rules = UploadRules(admission, budget, RUN, run_bytes=1000, in_flight=2, most=8)
        self.uploads = Uploads(self, self.pool, rules, self.events.append)

    def known(self, ends: Sequence[bytes]) -> Mask:
        return np.array([end in self.there for end in ends], np.bool_)

    def put(self, run: Candidate, blocks: Pinned, ended: Ended) -> bool:
        assert blocks.keys == run.keys
        self.begun.append((run, ended))
        return True

    def land(self, keys: Sequence[bytes], first: int, last: int, ttl: float | None = None) -> None:
        """Blocks [first, last) of a prompt come to host memory."""
        raw = self.pool.allocate(last - first)
        assert raw is not None
        parents = tuple(keys[at - 1] if at else None for at in range(first, last))
        raw.stage(tuple(keys[first:last]), parent=parents, ttl=ttl).register().drop()
        self.uploads.landed(keys[first:last], range(first, last))

    def end(self, *, well: bool = True) -> Candidate:
        """The first write that was begun ends."""
        run, ended = self.begun.pop(0)
        passage = Passage(id=1, ranks=set(), blocks=RUN, patience=1.0, down=True, ended=ended)
        if well:
            self.there.add(run.keys[-1])
        else:
            passage.outcomes[:] = Outcome.FAILED
        ended(passage)
        return run

    def pump(self) -> list[tuple[bytes, ...]]:
        """What is written now, one after the other."""
        written = []
        self.uploads.pump()
        while self.begun:
            written.append(self.end().keys)
            self.uploads.pump()
        return written


def runs(keys: Sequence[bytes], *numbers: int) -> list[tuple[bytes, ...]]:
    return [tuple(keys[number * RUN : (number + 1) * RUN]) for number in numbers]


@pytest.mark.parametrize("pieces", [(8,), (4, 8), (1, 2, 3, 4, 5, 6, 7, 8), (3, 5, 8), (7, 8)])
def test_a_run_is_written_when_its_last_block_has_landed(pieces: Sequence[int]) -> None:
    desk, keys, first = Desk(), keys_of("a", 10), 0
    for last in pieces:
        desk.land(keys, first, last)
        first = last
    assert desk.pump() == runs(keys, 0, 1)
    desk.land(keys, 8, 10)
    assert desk.pump() == [], "what does not fill a run is not written"
    assert desk.uploads.idle
    assert [(each.blocks, each.failed) for each in desk.events] == [(4, 0), (4, 0)]


def test_a_candidate_says_where_it_is() -> None:
    desk, keys = Desk(), keys_of("a", 8)
    desk.land(keys, 0, 8)
    desk.uploads.pump()
    assert [run for run, _ in desk.begun] == [
        Candidate(tuple(keys[:4]), None, 0), Candidate(tuple(keys[4:]), keys[3], 4)
    ]  # fmt: skip
    desk.pump()


def test_blocks_that_land_in_any_order() -> None:
    desk, keys = Desk(), keys_of("a", 8)
    desk.land(keys, 4, 8)
    assert desk.pump() == [], "what is before it is not there"
    desk.land(keys, 0, 4)
    assert desk.pump() == runs(keys, 0)
    desk.uploads.over(keys, Record("r", 0))
    assert desk.pump() == runs(keys, 1)


def test_where_a_block_is_gone_the_run_waits_for_the_next_request() -> None:
    desk, keys = Desk(), keys_of("a", 12)
    desk.land(keys, 0, 3)
    desk.pool.discard([keys[1]])
    desk.land(keys, 3, 12)
    desk.uploads.over(keys, Record("r", 0))
    assert desk.pump() == [], "nor is anything behind it"
    desk.land(keys, 1, 2)
    assert desk.pump() == []
    desk.uploads.over(keys, Record("next", 0))
    assert desk.pump() == runs(keys, 0, 1, 2)


def test_what_is_there_is_not_written_again() -> None:
    desk, keys = Desk(), keys_of("a", 8)
    desk.there.add(keys[3])
    desk.land(keys, 0, 8)
    assert desk.pump() == runs(keys, 1)
    desk.uploads.over(keys, Record("r", 0))
    assert desk.pump() == []


def test_a_write_that_failed_is_made_again_when_somebody_asks() -> None:
    desk, keys = Desk(), keys_of("a", 4)
    desk.land(keys, 0, 4)
    desk.uploads.pump()
    desk.end(well=False)
    assert desk.pump() == []
    desk.uploads.over(keys, Record("r", 0))
    assert desk.pump() == runs(keys, 0)
    assert [(each.blocks, each.failed) for each in desk.events] == [(0, 4), (4, 0)]


def test_what_has_a_time_to_live_is_not_written() -> None:
    desk, keys, record = Desk(), keys_of("a", 8), Record("r", 0)
    desk.land(keys, 0, 3, ttl=100.0)
    desk.land(keys, 3, 8)
    assert desk.pump() == [], "nor is what is behind it"
    desk.uploads.over(keys, record)
    assert desk.pump() == []
    assert record.why == ["KVBM wrote none of the blocks to shared storage: they have a time to live"]


def test_nothing_is_written_behind_what_is_not() -> None:
    """Nobody would find it."""
    desk, keys = Desk(), keys_of("a", 3 * RUN)
    desk.land(keys, 0, 3 * RUN)
    desk.pool.discard(keys[1:2])
    assert desk.pump() == []
    desk.land(keys, 0, 2)
    desk.uploads.over(keys, Record("r", 0))
    assert desk.pump() == runs(keys, 0, 1, 2)
    desk, keys = Desk(), keys_of("b", 10 * RUN)
    desk.land(keys, 0, 10 * RUN)
    assert desk.pump() == runs(keys, *range(8)), "more may not wait"


def test_a_request_that_fills_no_run_is_told() -> None:
    desk, record = Desk(), Record("r", 0)
    desk.uploads.over(keys_of("a", RUN), record)
    assert record.why == []
    desk.uploads.over(keys_of("a", RUN - 1), record)
    assert record.why == ["KVBM writes 4 blocks at once to shared storage, and the request filled fewer"]


def test_blocks_are_held_while_they_are_written() -> None:
    desk, keys = Desk(slots=8), keys_of("a", 8)
    desk.land(keys, 0, 8)
    desk.uploads.pump()
    assert desk.pool.statistics().active == 8
    assert desk.pool.allocate(1) is None
    desk.end()
    desk.end(well=False)
    assert desk.pool.statistics().active == 0


def test_what_lost_a_block_while_it_waited_is_not_written() -> None:
    desk, keys = Desk(), keys_of("a", 4)
    desk.land(keys, 0, 4)
    desk.pool.discard([keys[2]])
    assert desk.pump() == []
    assert desk.uploads.cancelled == 1


def test_a_budget_is_kept() -> None:
    desk = Desk(nbytes=3000.0)
    for name in "abcdef":
        desk.land(keys_of(name, 4), 0, 4)
    assert len(desk.pump()) == 3
    assert desk.uploads.refused == 3
    desk.clock.advance(86_400)
    desk.land(keys_of("g", 4), 0, 4)
    assert len(desk.pump()) == 1


def test_of_more_than_may_wait_the_last_do_not() -> None:
    desk = Desk()
    for number in range(10):
        desk.land(keys_of(f"{number}", 4), 0, 4)
    assert desk.pump() == [tuple(keys_of(f"{number}", 4)) for number in range(8)]
    assert desk.uploads.refused == 2


def test_nothing_is_written_while_it_may_not_be() -> None:
    desk, keys = Desk(), keys_of("a", 4)
    desk.writes = False
    desk.land(keys, 0, 4)
    assert desk.pump() == []
    desk.writes = True
    assert desk.pump() == runs(keys, 0)


def test_what_waits_is_dropped_by_a_clear() -> None:
    desk, keys = Desk(), keys_of("a", 4)
    desk.land(keys, 0, 4)
    desk.uploads.clear()
    assert desk.pump() == []


def test_second_use() -> None:
    desk, keys = Desk("second-use"), keys_of("a", 8)
    desk.land(keys, 0, 8)
    desk.uploads.over(keys, Record("r", 0))
    assert desk.pump() == []
    desk.uploads.over(keys[:6], Record("again", 0))
    assert desk.pump() == runs(keys, 0)


def test_what_leaves_host_memory_is_written_before() -> None:
    desk, keys = Desk("evicted", slots=64), keys_of("a", 8)
    desk.land(keys, 0, 8)
    desk.uploads.over(keys, Record("r", 0))
    assert desk.pump() == [], "nothing has to leave yet"
    for number in range(13):
        desk.land(keys_of(f"other {number}", 4), 0, 4)
    assert desk.pool.statistics().free < 8
    written = desk.pump()
    assert written
    assert {*written} <= {*runs(keys, 0, 1)}, "what has been longest without use"
    assert not desk.pool.present(written[0]).any(), "its slots are free now"
    assert np.isclose(desk.pool.statistics().free, 8, atol=4)
