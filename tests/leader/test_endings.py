"""What the end of a request means for the blocks that were stored of it."""

from __future__ import annotations

from collections.abc import Callable

from tests.leader.roles import Stage, keys_of

Make = Callable[..., Stage]


def test_of_a_request_that_is_over_the_leaf_is_evicted_first(make_stage: Make) -> None:
    """Without its root no later block of a prompt can be used."""
    stage, keys = make_stage(8), keys_of("a", 6)
    g1 = [*range(10, 16)]
    first = stage.compute("a", keys, g1)
    for copy in first.stores:
        stage.answer(copy)
    stage.tick()
    stage.leader.finish("a", g1, len(keys))
    stage.keep("b", keys_of("b", 4))  # two slots are free, and two more are needed
    assert stage.pool.present(keys).tolist() == [True] * 4 + [False] * 2
