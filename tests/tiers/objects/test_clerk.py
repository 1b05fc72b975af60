"""What one process does about the storage beside moving runs, on threads that may hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count

import pytest

from kvbm.abc.store import Full, Listed
from kvbm.core.errors import Broken
from kvbm.stores.objects.envelope import Envelope
from kvbm.stores.objects.names import FEEDS, TOUCHES, Names, epoch, feed_prefix
from kvbm.stores.objects.runs import RunFormat, Shape
from kvbm.tiers.objects.clerk import Clerk, Habits
from kvbm.tiers.objects.feed import SharedFeed
from kvbm.tiers.objects.mover import Library
from kvbm.tiers.objects.orders import Answer, Hot, Known, Tried, TryStorage
from tests.stores.objects.memory import MemoryStore
from tests.tiers.objects.test_warm import Shelf

NAMES = Names(b"namespace")
GB = 10**9
PATIENCE_S = 30.0


class Office:
    """A clerk whose storage is in memory, and what it told the leader."""

    def __init__(self, habits: Habits, library: Library | None = None) -> None:
        self.store = MemoryStore()
        if library is not None:
            assert isinstance(library.store, MemoryStore)
            self.store = library.store
        self.library = library or Library(self.store, Envelope(), NAMES, RunFormat("f", Shape(4, 1, 64)))
        self.told, self.broken = list[Answer](), list[str]()
        self.clerk = Clerk(
            self.library, "a" * 16, habits, self.told.append, most_lost=8, broken=self.broken.append, stuck=lambda: 0
        )
        self.trials = 0

    def until(self, what: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not what():
            assert time.monotonic() < deadline
            self.clerk.tick()
            time.sleep(0.01)

    def ticks(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.clerk.tick()
            time.sleep(0.01)

    def tried(self, *, anew: bool = False) -> Tried:
        """A trial, and how it ended."""
        self.trials += 1
        self.clerk.try_storage(TryStorage(self.trials, anew=anew))

        def answers() -> list[Tried]:
            return [each for each in self.told if isinstance(each, Tried) and each.number == self.trials]

        self.until(answers)
        return answers()[0]

    def known(self) -> int:
        """How many names the leader heard of."""
        return sum(len(each.came) // 8 for each in self.told if isinstance(each, Known))

    def run(self, number: int, modified: float = 0.0, nbytes: int = 0) -> str:
        """Somebody wrote a run."""
        name = self.library.names.run(self.library.names.digest(str(number).encode()))
        self.store.objects[name] = bytes(nbytes), modified
        return name

    def slow(self, prefix: str, seconds: float) -> None:
        """Each page of such a listing takes so long."""
        listed = self.store.list

        def list_(asked: str) -> Iterator[Sequence[Listed]]:
            for page in listed(asked):
                time.sleep(seconds if asked.startswith(prefix) else 0.0)
                yield page

        self.store.list = list_  # type: ignore[method-assign]

    def breaks(self, page: int) -> None:
        """The listing of runs does, at this page."""
        listed = self.store.list

        def list_(prefix: str) -> Iterator[Sequence[Listed]]:
            for at, found in enumerate(listed(prefix)):
                if prefix == NAMES.prefix and at == page:
                    raise Broken("a name that no client can have")
                yield found

        self.store.list = list_  # type: ignore[method-assign]

    def fails(self, prefix: str, error: Exception) -> None:
        def before(call: str, name: str) -> None:
            if call == "list" and name.startswith(prefix):
                raise error

        self.store.before = before


@pytest.fixture
def office() -> Iterator[Callable[..., Office]]:
    offices: list[Office] = []

    def make(habits: Habits, library: Library | None = None) -> Office:
        offices.append(Office(habits, library))
        return offices[-1]

    yield make
    for each in offices:
        each.clerk.leave()
        each.clerk.close(2)


def test_a_trial_does_not_wait_for_a_long_listing(office: Callable[..., Office]) -> None:
    """Nor is the listing begun again: of storage that can only be read there is a trial every minute."""
    one = office(Habits(0.1, GB, 5.0))
    for number in range(1_000):
        one.run(number)
    one.slow(NAMES.prefix, 0.1)
    while one.known() < 1_000:
        assert one.tried().problem is None
    assert one.trials > 3
    assert one.told.count(Known(anew=True)) == 1
    assert one.known() == 1_000, "none twice"


def test_a_listing_is_done_again_where_the_storage_may_be_another(office: Callable[..., Office]) -> None:
    """A trial after a failure found it well while all was being listed."""
    one = office(Habits(0.1, GB, 5.0))
    for number in range(300):
        one.run(number)
    one.slow(NAMES.prefix, 0.2)
    one.tried()
    one.until(lambda: one.known() > 0)
    one.tried(anew=True)
    one.until(lambda: one.told.count(Known(anew=True)) == 2)
    one.until(lambda: one.known() >= 600)
    one.ticks(0.3)
    assert one.told.count(Known(anew=True)) == 2


@pytest.mark.parametrize("broken", ["feed", "runs", "a store of somebody's"])
def test_a_listing_that_fails_is_not_begun_again_at_once(broken: str, office: Callable[..., Office]) -> None:
    """And one of runs goes well where that of the feed does not."""
    one = office(Habits(10.0, GB, 5.0))
    one.run(0)
    error = TypeError("its author's fault") if "somebody" in broken else Broken("no")
    # A trial looks into the feed of another epoch.
    one.fails(feed_prefix(epoch(time.time())) if broken == "feed" else NAMES.prefix, error)
    one.tried()
    one.ticks(1.0)
    assert one.store.calls.count(("list", NAMES.prefix)) == 1, "a minute is between two listings"
    assert one.known() == (broken == "feed")
    assert one.told.count(Known(anew=True)) == (broken == "feed")


def test_what_a_listing_that_broke_off_found_stays(office: Callable[..., Office]) -> None:
    """It is tried again, and what others told meanwhile is not forgotten either."""
    one = office(Habits(0.05, GB, 5.0))
    for number in range(300):
        one.run(number)
    one.breaks(2)
    one.tried()
    one.until(lambda: one.known() >= 600)
    assert one.told.count(Known(anew=True)) == 1


def test_what_was_told_before_a_listing_is_not_read(office: Callable[..., Office]) -> None:
    """The names alone are: reading so many notes may take longer than all else. What is told later is read."""
    one = office(Habits(0.1, GB, 5.0))
    you = SharedFeed(one.library, "b" * 16, GB, count())
    for number in range(50):
        you.diary.tell([str(number).encode() * 8])
        you.write(time.time())
    one.run(0)
    one.tried()
    one.until(lambda: one.known() == 1)
    you.diary.tell([b"0123456789abcdef"])
    you.write(time.time())
    one.until(lambda: one.known() == 2)
    assert sum(call == "get" and name.startswith(FEEDS) for call, name in one.store.calls) == 1


@pytest.mark.parametrize("page", [0, 1])
def test_what_was_told_before_a_listing_that_fails_is_read(page: int, office: Callable[..., Office]) -> None:
    """At its first page, or behind it."""
    one, digest = office(Habits(0.1, GB, 5.0)), b"0123456789abcdef"
    for number in range(150):
        one.run(number)
    you = SharedFeed(one.library, "b" * 16, GB, count())
    you.diary.tell([digest])
    you.write(time.time())
    one.breaks(page)
    one.tried()
    one.until(lambda: digest[:8] in [each.came for each in one.told if isinstance(each, Known)])
    one.ticks(0.5)
    assert [each.came for each in one.told if isinstance(each, Known)].count(digest[:8]) == 1, "it is read once"


def test_a_listing_that_was_given_up_says_nothing_when_it_comes_back(office: Callable[..., Office]) -> None:
    one, hangs, let_go = office(Habits(0.1, GB, 0.2)), threading.Event(), threading.Event()
    for number in range(300):
        one.run(number)

    def once(call: str, name: str) -> None:
        if call == "list" and name == NAMES.prefix and not hangs.is_set():
            hangs.set()
            let_go.wait(PATIENCE_S)

    one.store.before = once
    one.tried()
    one.until(lambda: one.known() == 300)
    assert hangs.is_set()
    before = len(one.store.calls)
    let_go.set()
    one.ticks(0.5)
    assert one.told.count(Known(anew=True)) == 1
    assert one.known() == 300
    assert ("list", NAMES.prefix) not in one.store.calls[before:]


def test_a_trial_that_was_given_up_counts_no_more(office: Callable[..., Office]) -> None:
    """Its clock would be wrong by what it hung."""
    one, let_go = office(Habits(0.1, GB, 0.1)), threading.Event()

    def hangs(call: str, name: str) -> None:
        let_go.wait(PATIENCE_S)

    one.store.before = hangs
    assert "no answer" in (one.tried().problem or "")
    let_go.set()
    one.ticks(0.5)
    assert not [name for call, name in one.store.calls if name == NAMES.prefix], "nothing is done before a trial"
    assert one.tried().problem is None


@pytest.mark.parametrize("broken", ["the first listing", "no listing"])
def test_the_hottest_runs_are_looked_for_after_a_listing(broken: str, office: Callable[..., Office]) -> None:
    """Beside trials, and though each note takes a while."""
    shelf = Shelf()
    for name in ("one", "other"):
        shelf.asked(shelf.prompt(name, 2, 0.0))
    one = office(Habits(0.05, GB, 5.0, warm=8), shelf.library)
    if broken == "the first listing":
        one.fails(shelf.library.names.prefix, Broken("503"))
        one.tried()
        one.until(lambda: ("list", shelf.library.names.prefix) in one.store.calls)
        one.ticks(0.1)
        assert ("list", TOUCHES) not in one.store.calls
        one.store.before = lambda call, name: None
    one.slow(TOUCHES, 0.2)
    one.tried()
    one.until(lambda: one.tried().problem is None and any(isinstance(each, Hot) for each in one.told))
    assert sum(len(each.runs) for each in one.told if isinstance(each, Hot)) == 4
    assert one.store.calls.count(("list", TOUCHES)) == 1


@pytest.mark.parametrize("ahead", [0.0, 86_400.0])
def test_a_storage_that_is_full_is_collected(
    ahead: float, office: Callable[..., Office], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what its time was when there was room, or what something small says; without a lease if need be."""
    monkeypatch.setattr("random.uniform", lambda first, last: first)
    one = office(Habits(0.1, 1, 5.0))
    one.store.ahead = ahead
    now = time.time() + ahead
    old = [one.run(number, now - 2 * 86_400, 1_000) for number in range(20)]
    young = [one.run(number, now - 60, 1_000) for number in range(20, 25)]

    small = one.store.put

    def put(name: str, data: object) -> bool:
        if memoryview(data).nbytes > 64:  # type: ignore[arg-type]
            raise Full("no room")
        return small(name, data)

    one.store.put = one.store.claim = put  # type: ignore[method-assign]
    assert "no room" in (one.tried().refusal or "")
    one.until(lambda: not {*old} & {*one.store.objects})
    assert {*young} <= {*one.store.objects}
    assert not [name for name in one.store.objects if name.startswith("kv1/gc/")], "it is larger"


def test_a_storage_whose_time_is_not_known_is_not_collected(
    office: Callable[..., Office], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.uniform", lambda first, last: first)
    one = office(Habits(0.1, 1, 5.0))
    name = one.run(0, 0.0, 1_000)

    def full(call: str, name: str) -> None:
        if call == "put":
            raise Full("no room")

    one.store.before = full
    assert one.tried().refusal is not None
    one.ticks(1.0)
    assert name in one.store.objects


def test_what_could_not_be_judged_is_judged_later(office: Callable[..., Office]) -> None:
    one = office(Habits(10.0, GB, 5.0))
    names = [one.run(number, 0.0, 10) for number in range(3)]
    one.tried()
    one.until(lambda: one.known() == 3)

    def times_out(call: str, name: str) -> None:
        if call == "get" and name in names:
            raise Broken("timeout")

    one.store.before = times_out
    for number in range(3):
        one.clerk.suspects.add(NAMES.digest(str(number).encode()))
    one.ticks(0.2)
    assert {*names} <= {*one.store.objects}
    one.store.before = lambda call, name: None
    one.until(lambda: not {*names} & {*one.store.objects})
