"""The short form of `python -m tests.corrupt`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checksums import off
from tests.corrupt import PLACES, run

COUNT = 60
OTHERS = {"peer", "wire"}
SOME = [pytest.param(place, marks=pytest.mark.e2e if place in OTHERS else ()) for place in PLACES]
"""No engine, but a server and NIXL."""


@pytest.mark.parametrize("place", SOME)
def test_no_damaged_block_is_served(tmp_path: Path, place: str) -> None:
    result = run(COUNT, 1, tmp_path, [place])
    assert result.problem(COUNT) is None, result


@pytest.mark.parametrize("place", SOME)
def test_without_checksums_they_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """The negative control."""
    off(monkeypatch.setattr)
    assert "wrong bytes were served" in run(COUNT, 1, tmp_path, [place]).served
