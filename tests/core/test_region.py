"""Regions: what is refused, and which fit."""

from __future__ import annotations

from typing import Any

import pytest

from kvbm.core.region import Plane, Region, packed


def test_packed_slots_are_back_to_back() -> None:
    owner = object()
    region = packed("g2", 1000, [64, 32], 5, owner=owner)
    assert region == Region("g2", "host", 5, (Plane(1000, 96, 64), Plane(1064, 96, 32)))
    assert region.slot_bytes == 96
    assert region.owner is owner


def test_regions_of_the_same_rows_fit() -> None:
    one = packed("one", 0, [64, 32], 5)
    assert one.fits(Region("two", "host", 1, (Plane(0, -64, 64), Plane(500, 40, 32))))
    for rows in ([32, 64], [64], [64, 32, 1], [96]):
        assert not one.fits(packed("two", 0, rows, 5))


@pytest.mark.parametrize(
    ("num_slots", "planes", "text"),
    [
        (0, [(0, 64, 64)], "at least one slot"),
        (1, [], "one plane"),
        (1, [(0, 64, 64), (0, 63, 64)], "64 B overlap at stride 63"),
        (1, [(0, -63, 64)], "overlap at stride -63"),
        (1, [(0, 64, 0)], "rows of 0 B"),
    ],
)
def test_what_cannot_be_is_refused(num_slots: int, planes: list[Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Region("r", "host", num_slots, tuple(Plane(*plane) for plane in planes))
