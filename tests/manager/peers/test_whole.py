"""Blocks that one instance gives to another."""

from __future__ import annotations

import pytest

from tests.manager.peers.conftest import Start, know_each_other, peers_of, published
from tests.manager.roles import keys_of


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_one_computed_the_other_loads(start: Start, ranks: int) -> None:
    first, second = start("a", ranks), start("b", ranks)
    know_each_other(first, second)
    keys = keys_of("p", 6)
    assert first.serve(keys) == 0
    published(first, 6)
    assert second.serve(keys) == 6
    assert second.leader.records["r0"].staged == {"peer": 6}
    assert second.serve(keys) == 6
    assert peers_of(second).searches == 1  # its own now
    assert peers_of(first).serving.promised == 6
    first.until(lambda: not peers_of(first).serving.held)
    for engine in (first, second):
        engine.leader.pool.check()
        assert engine.leader.pool.statistics().active == 0
