"""What others can make KVBM write to the log."""

from __future__ import annotations

import logging

import pytest

from kvbm.observe.log import Seldom
from kvbm.testing.clock import ManualClock


def test_at_most_one_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = ManualClock()
    seldom = Seldom(logging.getLogger("kvbm.test"), clock=clock)
    for number in range(500):
        seldom.warning("no %d", number)
    clock.advance(60)
    seldom.warning("no %d", 500)
    seldom.warning("no %d", 501)
    assert caplog.messages == ["no 0", "no 500 (499 like it since the last such line)"]
