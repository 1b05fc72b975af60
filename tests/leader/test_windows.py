"""What a leader may read of a layer group with a window."""

from __future__ import annotations

from collections.abc import Callable

from kvbm.blocks import LayerGroup
from kvbm.core.events import Admitted
from kvbm.leader.requests import RequestParams
from tests.leader.roles import BLOCK_TOKENS, Stage, keys_of

GROUPS = (LayerGroup("full", BLOCK_TOKENS), LayerGroup("window", BLOCK_TOKENS, 2 * BLOCK_TOKENS + 1))


def test_of_what_was_computed_before_only_the_window_is_read(make_stage: Callable[..., Stage]) -> None:
    """Eight blocks, of which four were computed in steps that the leader was not told of: a window of two blocks and a
    token has left the first two, which may be another's by now."""
    stage = make_stage(100, groups=GROUPS, checkpoint_tokens=BLOCK_TOKENS)
    leader = stage.leader
    leader.begin("a", keys_of("a", 8), RequestParams(), 8 * BLOCK_TOKENS)
    leader.place("a", range(1, 9), 0, Admitted(8 * BLOCK_TOKENS, 0, 0), [range(11, 19)])
    leader.advance("a", 8, 4 * BLOCK_TOKENS)
    (store,) = leader.seal(tokens=4 * BLOCK_TOKENS).stores
    assert sorted(store.g1_slots().tolist()) == [*range(1, 9), *range(13, 19)]
