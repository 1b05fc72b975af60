"""Blocks that one instance gives to another."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

import tests.before  # noqa: F401
from kvbm.build import stack as build_lower
from kvbm.core.events import Admitted
from kvbm.leader import earlier
from kvbm.leader.requests import RequestParams
from kvbm.stores.content import Chosen
from kvbm.stores.stamps import Changed
from tests.build.whole import LAST, TOKENS, kv
from tests.leader.roles import keys_of
from tests.tiers.peers.conftest import PATIENCE, Start, know_each_other, peers_of, published


@pytest.mark.parametrize(("ranks", "replicated"), [(1, False), (2, False), (2, True)])
def test_what_one_computed_the_other_loads(start: Start, ranks: int, replicated: bool) -> None:
    first, second = (start(name, ranks, replicated=replicated) for name in "ab")
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


def test_what_keeps_instances_of_one_model_apart_is_named(start: Start) -> None:
    shape = {f"shape.{number}": number for number in range(20)}
    first = start("a", facts=shape | {"hash.seed": 0})
    first.until(lambda: peers_of(first).network._renewed)
    second, friend = (start(name, facts=shape | {"hash.seed": 1}) for name in "bc")
    second.until(lambda: peers_of(second).network._facts is None)
    friend.until(lambda: peers_of(friend).network._facts is None)
    (sentence,) = second.side.control.health()["namesakes"]
    assert sentence.startswith("in the directory, namespace ")
    assert sentence.endswith(": hash.seed is 0 there, 1 here")
    assert first.side.control.health()["namesakes"] == [], "it came first"


def test_what_another_is_about_to_compute_is_waited_for(start: Start) -> None:
    """Disaggregated serving: the reader is asked first, the holder computes while the reader waits."""
    holder, reader = start("h"), start("r")
    know_each_other(holder, reader)
    keys, found = keys_of("p", 6), list[int]()
    reading = threading.Thread(target=lambda: found.append(reader.serve(keys, pull_from="h")))
    reading.start()
    time.sleep(0.3)
    assert not found
    holder.leader.begin("slow", [*keys, LAST], RequestParams(), 7 * TOKENS)
    holder.until(lambda: holder.leader.match("slow", 0, 6) == 0)
    holder.leader.place("slow", list(range(7)), 0, Admitted(7 * TOKENS, 0, 0))
    for complete in (2, 4, 6):
        time.sleep(0.2)
        assert not found
        for block in range(complete):
            holder.g1[0].put(block, kv(keys[block], 0))
        holder.step("slow", complete)
        holder.until(lambda: holder.leader.in_flight() == (0, 0))
        assert peers_of(holder).serving.promised <= complete
    reading.join(10)
    assert found == [6]
    assert peers_of(reader).searches == 1
    holder.leader.finish("slow", list(range(7)), 6)


def test_a_request_that_nobody_computes_is_waited_for_only_briefly(start: Start) -> None:
    holder, reader = start("h"), start("r", peer_deadline_s=0.5)
    know_each_other(holder, reader)
    begun = time.monotonic()
    assert reader.serve(keys_of("p", 6), pull_from="h") == 0
    assert reader.serve(keys_of("q", 6), pull_from="nobody") == 0
    assert time.monotonic() - begun < 0.5 + 0.5 + 0.5


def test_copies_that_are_not_kept_go_once_they_are_loaded(start: Start) -> None:
    holder, reader = start("h"), start("r", peer_copies="drop")
    know_each_other(holder, reader)
    keys = keys_of("p", 6)
    own = keys_of("own", 3)
    reader.serve(own)
    holder.serve(keys)
    published(holder, 6)
    for _ in range(2):  # again from the other, every byte compared
        assert reader.serve(keys) == 6
        reader.leader.tick()
        assert reader.leader.pool.peek(keys) == 0
    assert reader.leader.pool.peek(own) == 3
    assert peers_of(reader).searches == 3
    reader.leader.pool.check()
    now = reader.leader.pool.statistics()
    assert (now.active, now.orphaned, now.staged) == (0, 0, 0)


def test_an_instance_whose_weights_nobody_knows_any_more_leaves(start: Start) -> None:
    """What it has is withdrawn, and it reads nothing of others."""
    holder, reader = start("holder"), start("reader")
    know_each_other(holder, reader)
    keys, others = keys_of("p", 6), keys_of("q", 4)
    holder.serve(keys)
    reader.serve(others)
    published(holder, 6)
    published(reader, 4)
    assert reader.serve(keys) == 6, "the control"
    reader.leader.pool.discard(keys)
    holder.leader.isolate("other weights came")
    reader.until(lambda: not peers_of(reader).network.peers)
    assert holder.leader.degraded() == {"peers": "other weights came"}
    assert reader.serve(keys) == 0
    assert holder.serve(others) == 0
    assert holder.serve(keys) == 6, "host memory goes on"


@pytest.mark.parametrize("ranks", [1, 2])
def test_sharing_begins_when_the_weights_are_known(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """What was computed before is told like what is computed then, a few slots at a time."""
    monkeypatch.setattr(build_lower, "AT_ONCE_S", 0.01)
    monkeypatch.setattr(earlier, "_SLICE", 3)
    (tmp_path / "weights").touch()
    go, chosen = threading.Event(), [Chosen((("", str(tmp_path / "weights")),))]

    def choose() -> list[Chosen]:
        assert go.wait(PATIENCE)
        return chosen

    cache = str(tmp_path / "cache")
    holder = start("holder", ranks, choose=choose, cache_dir=cache)
    gone, before, after = keys_of("gone", 4), keys_of("before", 8), keys_of("after", 6)
    for keys in (gone, before):
        holder.serve(keys)
    holder.leader.pool.discard(gone)
    assert "still being found out" in holder.leader.degraded()["peers"]
    go.set()
    holder.until(lambda: holder.leader.lower is not None)
    reader = start("reader", ranks, choose=choose, cache_dir=cache)
    reader.until(lambda: reader.leader.lower is not None)
    know_each_other(holder, reader)
    published(holder, 8)
    assert reader.serve(before) == 8
    holder.serve(after)
    published(holder, 14)
    assert reader.serve(after) == 6
    assert reader.serve(gone) == 0
    assert holder.leader.earlier is None


@pytest.mark.parametrize("reset", [False, True])
def test_nothing_of_before_is_told_where_it_may_be_of_other_weights(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reset: bool
) -> None:
    monkeypatch.setattr(build_lower, "AT_ONCE_S", 0.01)
    go = threading.Event()

    def choose() -> list[Chosen]:
        assert go.wait(PATIENCE)
        raise Changed("they are others now")

    (tmp_path / "weights").touch()
    known = [Chosen((("", str(tmp_path / "weights")),))]
    cache = str(tmp_path / "cache")
    holder = start("holder", choose=(lambda: known if go.wait(PATIENCE) else []) if reset else choose, cache_dir=cache)
    reader = start("reader", choose=lambda: known, cache_dir=cache)
    keys = keys_of("p", 6)
    holder.serve(keys)
    if reset:
        holder.leader.reset()
        holder.serve(keys_of("of others", 4))
    go.set()
    holder.until(lambda: "still being found out" not in holder.leader.degraded()["peers"])
    holder.until(lambda: holder.leader.earlier is None)
    assert reader.serve(keys) == 0
    assert (holder.leader.lower is not None) == reset
    if reset:
        assert not len(peers_of(holder).published)
