"""What an engine that has just started reads before anybody asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from kvbm.abc.store import Listed
from kvbm.blocks import Pool, Staged
from kvbm.core.errors import Broken
from kvbm.core.events import Copied
from kvbm.core.region import Slots
from kvbm.policy import eviction_order
from kvbm.stores.objects.envelope import Envelope
from kvbm.stores.objects.folder import FolderStore
from kvbm.stores.objects.names import TOUCHES, Names
from kvbm.stores.objects.runs import Run, RunFormat, Shape
from kvbm.tiers.host import Host
from kvbm.tiers.moves import Ended, Passage
from kvbm.tiers.objects.feed import SharedFeed
from kvbm.tiers.objects.hot import HotRuns
from kvbm.tiers.objects.mover import Library
from kvbm.tiers.objects.orders import HotRun
from kvbm.tiers.objects.traffic import Traffic
from kvbm.tiers.objects.warm import Warmth
from tests.leader.roles import keys_of
from tests.stores.objects.memory import MemoryStore
from tests.tiers.objects.test_whole import RUN, Sharing, objects

SHAPE = Shape(RUN, 1, 64)
ME = "0123456789abcdef"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Callable[..., Sharing]]:
    engines: list[Sharing] = []

    def make(**settings: object) -> Sharing:
        engines.append(Sharing(tmp_path, f"file://{tmp_path}/shared", **settings))
        return engines[-1].works()

    yield make
    for each in engines:
        each.close()


def warmed(engine: Sharing, blocks: int) -> None:
    engine.until(lambda: engine.g4.warmth.warmed == blocks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_new_engine_has_what_was_asked_for(ranks: int, engine: Callable[..., Sharing]) -> None:
    """Of 48 blocks a half is filled: three prompts of two runs."""
    one, prompts = engine(ranks=ranks), [keys_of(f"prompt {number}", 9) for number in range(5)]
    for keys in prompts:
        assert one.serve(keys) == 0
        one.stored()
    other = engine(ranks=ranks, g4_warm=0.5)
    warmed(other, 6 * RUN)
    there = [int(other.leader.core.pool.present(keys).sum()) for keys in prompts]
    assert sorted(there) == [0, 0, 2 * RUN, 2 * RUN, 2 * RUN], "whole prompts"
    (g4,) = (each for each in other.side.control.status()["tiers"] if each["name"] == "g4")
    assert g4["warmed"] == 6 * RUN
    for keys, blocks in zip(prompts, there, strict=True):
        if blocks:
            assert other.serve(keys) == 2 * RUN, "and each byte is looked at"
    assert other.side.control.status()["tokens"].get("g4", 0) == 0, "they were in host memory"


def test_what_is_gone_or_damaged_is_left_out(engine: Callable[..., Sharing], tmp_path: Path) -> None:
    one, prompts = engine(), [keys_of(f"prompt {number}", 2 * RUN) for number in range(3)]
    for keys in prompts:
        one.serve(keys)
    one.stored()
    heads = one.g4.runs.heads([keys[RUN - 1] for keys in prompts[:2]]).tolist()
    damaged, gone = (
        path for path in objects(tmp_path) if int.from_bytes(bytes.fromhex(path.name[:16]), "little") in heads
    )
    damaged.write_bytes(damaged.read_bytes() + b"x")
    gone.unlink()
    other = engine(g4_warm=1.0)
    warmed(other, 3 * RUN)
    assert sorted(other.serve(keys) for keys in prompts) == [0, 0, 2 * RUN], "and each byte is looked at"


def test_where_it_fails_the_rest_goes_on(
    engine: Callable[..., Sharing], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What others write is heard of, though what was asked for cannot be listed."""
    listed = FolderStore.list

    def fails(store: FolderStore, prefix: str) -> Iterator[Sequence[Listed]]:
        if prefix == TOUCHES:
            raise Broken("no list of what was asked for")
        return listed(store, prefix)

    monkeypatch.setattr(FolderStore, "list", fails)
    one, other = engine(g4_warm=1.0), engine(g4_warm=1.0)
    keys = keys_of("prompt", 2 * RUN)
    one.serve(keys)
    one.stored()
    other.knows(keys, 2 * RUN)
    assert other.serve(keys) == 2 * RUN
    assert caplog.text.count("no list of what was asked for") == 2, "each said it once"


class Lane:
    """Reads that end when the test says so."""

    def __init__(self) -> None:
        self.others = 0
        self.begun: list[tuple[Staged, Ended]] = []

    @property
    def reading(self) -> int:
        return self.others + len(self.begun)

    def get(self, end: bytes, within: Slots, into: Staged, ended: Ended) -> int:
        assert (into.keys[-1], within.tolist()) == (end, [*range(RUN)])
        self.begun.append((into, ended))
        return len(self.begun)

    def end(self) -> None:
        _, ended = self.begun.pop(0)
        ended(Passage(id=1, ranks=set(), blocks=RUN, patience=1.0, down=False, ended=ended))


def test_nothing_is_evicted_and_requests_come_first() -> None:
    pool, lane, events = Pool(17, order=eviction_order("lru", 17)), Lane(), list[Copied]()
    raw = pool.allocate(4)
    assert raw is not None
    raw.stage(keys_of("in use", 4)).register().drop()
    warmth = Warmth(Host(pool), cast(Traffic, lane), 1_000, events.append)
    keys = keys_of("hot", 5 * RUN)
    warmth.hear([HotRun(keys[at : at + RUN], keys[at - 1] if at else None, at) for at in range(0, 5 * RUN, RUN)])
    lane.others = 1
    warmth.pump()
    assert not lane.begun, "something is read for a request"
    lane.others = 0
    warmth.pump()
    assert len(lane.begun) == 2
    while lane.begun:
        lane.end()
        warmth.pump()
    assert pool.present(keys).tolist() == [True] * 12 + [False] * 8, "as far as there were free slots"
    assert pool.present(keys_of("in use", 4)).all()
    assert (warmth.warmed, sum(event.blocks for event in events)) == (12, 12)
    pool.discard(keys)
    warmth.pump()
    assert not lane.begun, "it is over"


def test_no_more_than_it_may() -> None:
    pool, lane = Pool(40, order=eviction_order("lru", 40)), Lane()
    warmth = Warmth(Host(pool), cast(Traffic, lane), 2 * RUN + 1, lambda event: None)
    keys = keys_of("hot", 3 * RUN)
    raw = pool.allocate(1)
    assert raw is not None
    raw.stage(keys[:1]).register().drop()
    warmth.hear([HotRun(keys[at : at + RUN], keys[at - 1] if at else None, at) for at in range(0, 3 * RUN, RUN)])
    for _ in range(4):
        warmth.pump()
        while lane.begun:
            lane.end()
    assert pool.present(keys).tolist() == [True, False, False, False] + [True] * 8, (
        "what is there in part is left alone"
    )


class Shelf:
    """Runs in memory, and what says which of them were asked for."""

    def __init__(self, secret: bytes | None = None) -> None:
        self.store, envelope = MemoryStore(), Envelope(secret)
        self.library = Library(self.store, envelope, Names(b"n"), RunFormat("fp", SHAPE, "a model"))
        self.format = RunFormat("fp", SHAPE, "the same model by a longer name")
        self.feed = SharedFeed(self.library, ME, 10**9, count())
        self.written: list[tuple[bytes, float]] = []

    def prompt(self, name: str, runs: int, when: float) -> list[bytes]:
        """A prompt's runs are written."""
        keys = [key[:16] for key in keys_of(name, runs * RUN)]
        for at in range(0, len(keys), RUN):
            part = tuple(keys[at : at + RUN])
            run = Run(part, keys[at - 1] if at else None, at, bytes(RUN), np.zeros((1, RUN), np.uint64))
            plain = self.format.header(run) + bytes(SHAPE.data_bytes)
            digest = self.library.names.digest(part[-1])
            name = self.library.names.run(digest)
            whole = memoryview(bytearray(self.library.envelope.size(len(plain))))
            if not self.library.envelope.sealed:
                whole[64:] = plain
            self.library.envelope.close(name, whole, memoryview(plain))
            self.store.put(name, whole)
            self.written.append((digest, when))
        return keys

    def asked(self, *prompts: Sequence[bytes]) -> None:
        """In one epoch, a request asked for these."""
        for keys in prompts:
            self.feed.diary.touch([self.library.names.digest(end) for end in keys[RUN - 1 :: RUN]])
        self.feed.write_touched(time.time())

    def found(self, most: int) -> list[HotRun]:
        hot = HotRuns(self.library, most)
        for digest, when in self.written:
            hot.listed(digest, when)
        found = list[HotRun]()
        while not hot.over:
            found += hot.more(lambda: True)
        return found


def ends(*prompts: Sequence[bytes]) -> list[bytes]:
    return [end for keys in prompts for end in keys[RUN - 1 :: RUN]]


@pytest.mark.parametrize("secret", [None, b"s" * 32])
def test_what_is_asked_for_most_comes_first(secret: bytes | None) -> None:
    shelf = Shelf(secret)
    old, often, once, new = (shelf.prompt(name, 2, at) for at, name in enumerate(("old", "often", "once", "new")))
    shelf.asked(often, once)
    shelf.asked(often)
    found = [run.keys[-1] for run in shelf.found(8)]
    assert {*found[:2]} == {*ends(often)}
    assert {*found[2:4]} == {*ends(once)}
    assert {*found[4:6]} == {*ends(new)}, "then what was written last"
    assert {*found[6:]} == {*ends(old)}
    assert [run.keys[-1] for run in shelf.found(3)][:2] == ends(often)


def test_each_run_follows_those_before_it() -> None:
    shelf = Shelf()
    keys = shelf.prompt("long", 12, 0.0)
    shelf.asked(keys[8 * RUN :])  # the notes say nothing of the others
    assert [run.place for run in shelf.found(100)] == [*range(0, 12 * RUN, RUN)]
    assert [run.place for run in shelf.found(5)] == [*range(0, 5 * RUN, RUN)], "the beginning, as far as there is room"
    assert all(run.parent == (keys[run.place - 1] if run.place else None) for run in shelf.found(100))


def test_a_run_whose_beginning_is_gone_is_of_no_use() -> None:
    shelf = Shelf()
    keys, other = shelf.prompt("one", 3, 0.0), shelf.prompt("other", 1, 1.0)
    names = shelf.library.names
    shelf.store.delete([names.run(names.digest(keys[RUN - 1]))])
    assert [run.keys[-1] for run in shelf.found(100)] == ends(other)


def test_headers_are_read_and_no_blocks() -> None:
    shelf = Shelf()
    shelf.prompt("one", 4, 0.0)
    ranges = list[int]()
    whole = shelf.store.get_range
    shelf.store.get_range = lambda name, start, length: (ranges.append(length), whole(name, start, length))[1]  # type: ignore[method-assign]
    assert len(shelf.found(100)) == 4
    assert len(ranges) == 4
    assert max(ranges) < 2_000
    assert shelf.found(0) == []
