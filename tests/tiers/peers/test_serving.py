"""What an instance promises others, and what it reads of what others promised; the test plays all of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvbm.link.messages import Result
from kvbm.tiers.peers.orders import Pull
from tests.leader.roles import BLOCK_BYTES, Stage, keys_of

Make = Callable[..., Stage]


def test_blocks_whose_checksums_are_not_known_are_not_promised(make_stage: Make) -> None:
    """A reader could not see that it got other bytes."""
    stage, keys = make_stage().add_peers(), keys_of("a", 5)
    g1 = [*range(10, 15)]
    (copy,) = stage.compute("a", keys, g1).stores
    told = np.arange(1, 6, dtype=np.uint64)
    stage.say(Result(copy.job, 0, bytes(5), 5 * BLOCK_BYTES, 0.001, None, told.tobytes()))
    stage.tick()
    assert stage.reserve(keys).count == 5
    stage.keep("b", keys_of("b", 3))  # a rank that says nothing of checksums
    assert stage.pool.peek(keys_of("b", 3)) == 3
    promise = stage.reserve(keys_of("b", 3))
    assert (promise.count, promise.lease) == (0, 0)


def test_what_is_left_of_a_promise_that_is_over_is_not_read(make_stage: Make) -> None:
    """The other instance may have given the slots to other blocks."""
    stage, keys = make_stage().add_peers(in_flight=4, batch=4), keys_of("a", 12)
    stage.network.peers = ("other",)
    stage.begin("a", keys, tokens=13 * 32)
    (search,) = stage.network.searches
    assert stage.promise(search, 12, seconds=10.0)
    (pull,) = stage.hear(Pull)
    stage.clock.advance(10.5)
    stage.reply(pull.job, 0, [0] * 4, 0.001)
    stage.tick()
    assert not stage.hear(Pull)
    assert stage.pool.peek(keys) == 4
