"""What tests of the store share."""

from __future__ import annotations

import ctypes
import os

import pytest

from kvbm.core.region import Slots
from kvbm.stores.disk import files


@pytest.fixture
def rows_by_pwrite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the index written by `os.pwrite`, which a test can replace, in the order in which C does it."""

    def run_io(
        fd: int, write: bool, offsets: Slots, first: Slots, segments: Slots, results: Slots, control: Slots
    ) -> None:
        assert write
        assert first.tolist() == list(range(len(offsets) + 1))
        for i, offset in enumerate(offsets.tolist()):
            address, length = segments[2 * i : 2 * i + 2].tolist()
            try:
                results[i] = os.pwrite(fd, ctypes.string_at(address, length), offset)
            except OSError as error:
                results[i] = -(error.errno or 0)

    monkeypatch.setattr(files, "run_io", run_io)
