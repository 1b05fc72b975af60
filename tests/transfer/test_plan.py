from dataclasses import replace

import numpy as np
import pytest

from kvbm.abc.transport import Plan
from kvbm.core.errors import Misuse
from kvbm.core.region import Plane, Region, packed
from kvbm.transfer.plan import checked_slots, chunk_blocks, coalesce

G2 = packed("G2", 1000, [10, 10, 20, 5], 8)


def engine(*planes: tuple[int, int, int]) -> Region:
    return Region("G1", "host", 8, tuple(Plane(*plane) for plane in planes))


def plan(source: Region, source_slots: list[int], destination: Region, destination_slots: list[int]) -> Plan:
    return Plan(source, np.array(source_slots, int), destination, np.array(destination_slots, int), True, "load")


def test_planes_that_follow_each_other_on_both_sides_are_merged() -> None:
    rows = coalesce(engine((0, 20, 10), (10, 20, 10), (500, 20, 20), (900, 5, 5)), G2)
    assert rows.row_bytes.tolist() == [20, 20, 5]
    assert rows.source_address.tolist() == [0, 500, 900]
    assert rows.source_stride.tolist() == [20, 20, 5]
    assert rows.destination_address.tolist() == [1000, 1020, 1040]
    assert rows.destination_stride.tolist() == [45] * 3


@pytest.mark.parametrize(
    "planes",
    [
        ((0, 40, 10), (11, 40, 10), (100, 40, 20), (200, 40, 5)),  # a gap
        ((0, 40, 10), (10, 41, 10), (100, 40, 20), (200, 40, 5)),  # neighbours of slot 0 only
    ],
)
def test_planes_that_do_not_stay_neighbours_are_kept_apart(planes: tuple[tuple[int, int, int], ...]) -> None:
    assert coalesce(engine(*planes), G2).row_bytes.tolist() == [10, 10, 20, 5]
    assert coalesce(G2, engine(*planes)).row_bytes.tolist() == [10, 10, 20, 5]


def test_the_same_layout_on_both_sides_is_one_row() -> None:
    rows = coalesce(G2, packed("peer", 5000, [10, 10, 20, 5], 3))
    assert rows.row_bytes.tolist() == [45]


def test_slots_are_copied_so_that_the_caller_may_reuse_its_arrays() -> None:
    given = plan(G2, [1, 2], packed("peer", 5000, [10, 10, 20, 5], 3), [0, 1])
    source, destination = checked_slots(given)
    given.source_slots[:] = 99
    assert (source.tolist(), destination.tolist()) == ([1, 2], [0, 1])
    assert source.dtype == destination.dtype == np.int64


@pytest.mark.parametrize(
    ("source", "destination", "reason"),
    [
        ([0, 1], [2], "2 source slots for 1"),
        ([0, 8], [2, 3], "not all in region"),
        ([0, -1], [2, 3], "not all in region"),
        ([0, 1], [2, 3000000000], "not all in region"),
        ([0, 1], [3, 3], "destination of two"),
    ],
)
def test_bad_slots_are_refused(source: list[int], destination: list[int], reason: str) -> None:
    other = packed("peer", 5000, [10, 10, 20, 5], 8)
    with pytest.raises(Misuse, match=reason):
        checked_slots(plan(G2, source, other, destination))


def test_within_a_region_nothing_is_read_and_written_at_once() -> None:
    checked_slots(plan(G2, [0, 1], G2, [2, 3]))
    with pytest.raises(Misuse, match="source and destination at once"):
        checked_slots(plan(G2, [0, 1], G2, [1, 3]))


def test_other_shapes_and_rows_are_refused() -> None:
    good = plan(G2, [0], packed("peer", 5000, [10, 10, 20, 5], 8), [0])
    with pytest.raises(Misuse, match="whole numbers"):
        checked_slots(replace(good, source_slots=np.array([0.0])))
    with pytest.raises(Misuse, match="whole numbers"):
        checked_slots(replace(good, source_slots=np.array([[0]])))
    with pytest.raises(Misuse, match="rows of region"):
        checked_slots(replace(good, source=packed("odd", 5000, [45], 8)))


def test_a_chunk_is_at_least_one_block() -> None:
    assert chunk_blocks(100, 1000) == 10
    assert chunk_blocks(101, 1000) == 9
    assert chunk_blocks(5000, 1000) == 1
