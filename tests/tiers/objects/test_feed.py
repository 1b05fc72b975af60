"""What instances tell each other through the storage."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from kvbm.abc.store import Denied
from kvbm.stores.objects.envelope import Envelope
from kvbm.stores.objects.folder import FolderStore
from kvbm.stores.objects.names import EPOCH_S, Names, parse
from kvbm.stores.objects.runs import RunFormat, Shape
from kvbm.tiers.objects import clerk
from kvbm.tiers.objects.feed import News, SharedFeed
from kvbm.tiers.objects.mover import Library
from tests.leader.roles import keys_of
from tests.stores.objects.memory import MemoryStore
from tests.tiers.objects.test_whole import Sharing, objects, shared  # noqa: F401
from tests.tiers.objects.test_whole import engine as engine

ONE, TWO, THREE = (bytes([number]) * 16 for number in (1, 2, 3))
NOW = 1_000 * EPOCH_S + 1.0


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def feed(store: MemoryStore) -> Callable[[str], SharedFeed]:
    library = Library(store, Envelope(), Names(b"namespace"), RunFormat("f", Shape(4, 1, 64)))
    return lambda instance: SharedFeed(library, instance * 16, 10**9, count())


def read(feed: SharedFeed, now: float = NOW) -> News:
    news = feed.read(now, lambda: True)
    assert news is not None
    return news


def test_what_came_and_went_is_told(feed: Callable[[str], SharedFeed]) -> None:
    me, you = feed("a"), feed("b")
    assert read(you) == ([], [], False)
    me.diary.tell([ONE, TWO], [THREE])
    me.write(NOW)
    assert read(you) == ([ONE, TWO], [THREE], False)
    assert read(you) == ([], [], False), "once"
    me.diary.tell([], [ONE])
    me.write(NOW + EPOCH_S)
    assert read(you, NOW + EPOCH_S) == ([], [ONE], False)
    assert read(me, NOW + EPOCH_S) == ([], [], False), "not to itself"
    assert read(feed("c"), NOW + EPOCH_S).went == [], "what went before the first look is not in the listing"


def test_notes_that_are_gone_are_missed_for_two_epochs(store: MemoryStore, feed: Callable[[str], SharedFeed]) -> None:
    me, you = feed("a"), feed("b")
    me.diary.tell([ONE])
    me.write(NOW)
    assert read(you) == ([ONE], [], False)
    store.objects.clear()
    assert read(you, NOW + EPOCH_S).missing
    assert not read(you, NOW + EPOCH_S).missing, "once"
    me.write(NOW + EPOCH_S)
    read(you, NOW + EPOCH_S)
    store.objects.clear()
    assert not read(you, NOW + 3 * EPOCH_S).missing, "the collector deletes old notes"


def test_an_engine_forgets_what_another_one_deleted(engine: Callable[..., Sharing], tmp_path: Path) -> None:
    """It hears of that, and reads nothing meanwhile."""
    one, other, keys = engine().works(), engine().works(), keys_of("prompt", 8)
    one.serve(keys)
    one.stored()
    other.knows(keys, 8)
    time.sleep(1.0)  # until it was told, not only listed
    first = objects(tmp_path)[0]
    ours = parse(first.relative_to(tmp_path / "shared").as_posix())
    assert ours is not None
    first.unlink()
    third = SharedFeed(
        Library(FolderStore(tmp_path / "shared"), Envelope(), _Named(ours.space), RunFormat("f", Shape(4, 1, 64))),
        "c" * 16, 10**9, count(),
    )  # fmt: skip
    third.diary.tell([], [ours.digest])
    third.write(time.time())
    other.until(lambda: int(other.g4.covers(keys).sum()) == 4)


class _Named(Names):
    """Of a namespace whose key is not known."""

    def __init__(self, space: str) -> None:
        super().__init__(b"")
        self.space = space


def test_a_damaged_run_that_cannot_be_deleted_is_left_alone(
    engine: Callable[..., Sharing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a while, and then it is looked at again."""
    one, keys = engine().works(), keys_of("prompt", 4)
    one.serve(keys)
    one.stored()
    (path,) = objects(tmp_path)
    whole, name = path.read_bytes(), path.relative_to(tmp_path / "shared").as_posix()
    path.write_bytes(whole[:-1])
    calls: list[str] = []

    delete = FolderStore.delete

    def refuse(store: FolderStore, names: Any) -> None:
        if name in names:
            raise Denied("not you")
        delete(store, names)

    def counted(call: str) -> None:
        original = getattr(FolderStore, call)

        def count_(store: FolderStore, asked: str, *args: Any) -> Any:
            calls.extend([call] * (asked == name))
            return original(store, asked, *args)

        monkeypatch.setattr(FolderStore, call, count_)

    monkeypatch.setattr(FolderStore, "delete", refuse)
    monkeypatch.setattr(clerk, "LET_BE_S", 6.0)
    counted("put")
    counted("get")
    other = engine().works()
    other.g4.asked(keys)
    other.until(lambda: other.g4.covers(keys).all())

    def again() -> int:
        other.leader.core.pool.discard(keys)
        return other.serve(keys)

    assert again() == 0
    other.until(lambda: "cannot be deleted" in (other.g4.limits() or ""))
    before = len(calls)
    for _ in range(5):
        assert again() == 0
        other.stored()
    assert len(calls) == before, "neither read nor written"
    path.write_bytes(whole)
    other.until(lambda: other.g4.limits() is None)
    again()
    other.stored()
    other.knows(keys, 4)
    assert again() == 4
