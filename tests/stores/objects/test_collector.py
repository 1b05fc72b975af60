"""What is deleted, and what never is; and whether a trial finds what a storage does wrong."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable

import pytest

from kvbm.abc.store import MOST_BYTES, Denied, Full
from kvbm.core.errors import Broken
from kvbm.stores.objects.collector import YOUNG_S, delete_runs, purge, sweep, take_lease
from kvbm.stores.objects.envelope import Envelope
from kvbm.stores.objects.names import EPOCH_S, Names, epoch, lease, parse
from kvbm.stores.objects.notes import Note
from kvbm.stores.objects.probe import Unfit, probe
from tests.stores.objects.memory import MemoryStore

ENVELOPE = Envelope()
NAMES = Names(b"one namespace")
OTHER = Names(b"another")
SIZE, DAY = 1_000, 86_400.0
ME, YOU = "0123456789abcdef", "fedcba9876543210"


def go_on() -> bool:
    return False


def fill(store: MemoryStore, count: int, now: float, names: Names = NAMES, oldest: float = 10 * DAY) -> list[str]:
    """Runs of SIZE bytes, the oldest first; none is young."""
    filled = []
    for at in range(count):
        name = names.run(names.digest(f"{at}".encode()))
        store.objects[name] = bytes(SIZE), now - oldest + at
        filled.append(name)
    return filled


def test_nothing_goes_while_there_is_room() -> None:
    store, now = MemoryStore(), time.time()
    fill(store, 10, now)
    swept = sweep(store, ENVELOPE, 10 * SIZE, now, go_on)
    assert (swept.objects, swept.total, swept.deleted) == (10, 10 * SIZE, [])
    assert len(store.objects) == 10


def test_the_coldest_go_until_there_is_room_again() -> None:
    store, now = MemoryStore(), time.time()
    mine, others = fill(store, 10, now), fill(store, 10, now - 1000, OTHER)
    swept = sweep(store, ENVELOPE, 16 * SIZE, now, go_on)
    left = {*store.objects}
    assert left == {*mine, *others[6:]}, "of all namespaces, down to 90 % of the bound"
    assert {*swept.deleted} == {(OTHER.space, OTHER.digest(f"{at}".encode())) for at in range(6)}
    assert swept.freed == 6 * SIZE


def test_what_was_read_is_not_cold() -> None:
    store, now = MemoryStore(), time.time()
    mine = fill(store, 10, now)
    name = NAMES.touch(epoch(now) - 5, YOU, 1)
    note = Note([NAMES.digest(f"{at}".encode()) for at in range(5)])
    store.objects[name] = ENVELOPE.wrap(name, note.encode()), now - 5 * EPOCH_S
    sweep(store, ENVELOPE, 6 * SIZE, now, go_on)
    assert {each for each in store.objects if each in mine} == {*mine[:5]}


def test_a_note_that_was_damaged_or_sealed_by_others_says_nothing() -> None:
    store, now = MemoryStore(), time.time()
    mine = fill(store, 10, now)
    for number, envelope in enumerate((ENVELOPE, Envelope(b"a secret that we do not have"))):
        name = NAMES.touch(epoch(now), YOU, number)
        text = bytearray(envelope.wrap(name, Note([NAMES.digest(b"0")]).encode()))
        text[-1] ^= 1
        store.objects[name] = bytes(text), now
    sweep(store, ENVELOPE, 10 * SIZE, now, go_on)
    assert mine[0] not in store.objects


def test_a_name_of_the_far_future_says_no_bound() -> None:
    store, now = MemoryStore(), time.time()
    fill(store, 10, now)
    store.objects[f"kv1/feed/999999999999/{ME}.{YOU}.1.999999999999"] = b"", now
    assert len(sweep(store, ENVELOPE, SIZE, now, go_on).deleted) > 8


def test_what_was_written_in_the_far_future_goes_first() -> None:
    store, now = MemoryStore(), time.time()
    mine = fill(store, 10, now)
    store.objects[mine[5]] = bytes(SIZE), now + 50 * 365 * DAY
    swept = sweep(store, ENVELOPE, 9_999, now, go_on)
    assert mine[5] not in store.objects
    assert len(swept.deleted) == 2, "down to 90 % of the bound"


def test_every_page_of_a_listing_says_that_it_goes_on() -> None:
    store, now, asked = MemoryStore(), time.time(), []
    fill(store, 1_000, now)
    sweep(store, ENVELOPE, 10**9, now, lambda: bool(asked.append(1)))
    assert len(asked) > 10


@pytest.mark.parametrize("how", ["a run", "the namespace"])
def test_what_people_delete_leaves_bounds(how: str) -> None:
    """Of engines that told theirs more than twenty minutes ago; the last notes go, and those engines tell it again."""
    store, now = MemoryStore(), time.time()
    mine, others = fill(store, 10, now), fill(store, 10, now, OTHER)
    notes = []
    for number, names in enumerate((NAMES, OTHER)):
        for age in range(4):
            notes.append(name := names.feed(epoch(now) - age, YOU, 10 * number + age, 1))
            store.objects[name] = b"x", now - age * EPOCH_S
    if how == "a run":
        delete_runs(store, mine[:1])
    else:
        assert purge(store, NAMES.space)[0] == 10
    left = {*mine[1:]} if how == "a run" else set()
    assert {*store.objects} == {*left, *others, *notes[2:]}
    for name in notes[4:]:
        del store.objects[name]
    assert sweep(store, ENVELOPE, SIZE, now, go_on).deleted == [], "the bound of a megabyte holds"


def test_a_note_of_the_far_future_does_not_hide_those_that_are_missed() -> None:
    store, now = MemoryStore(), time.time()
    mine = fill(store, 1, now)
    notes = [NAMES.feed(epoch(now) - age, YOU, age, 1) for age in (0, 1, 5)]
    for name, modified in zip(notes, (now, now, now + 50 * 365 * DAY), strict=True):
        store.objects[name] = b"x", modified
    assert delete_runs(store, mine) == mine
    assert {*store.objects} == {notes[2]}


def refuses(*names: str) -> Callable[[str, str], None]:
    """Of these, and of a call that has one of these among others."""

    def before(call: str, name: str) -> None:
        if call == "delete" and name in names:
            raise Denied("somebody else's")

    return before


def test_what_another_user_may_delete_stays_and_the_rest_goes(caplog: pytest.LogCaptureFixture) -> None:
    store, now = MemoryStore(), time.time()
    mine = fill(store, 1_000, now)
    theirs = [*mine[0:100], *mine[150:160]]
    store.before = refuses(*theirs)
    swept = sweep(store, ENVELOPE, 900 * SIZE, now, go_on)
    assert {*mine} - {*store.objects} == {*mine[100:150], *mine[160:300]}, "down to 90 % of the bound"
    assert len(swept.deleted) == 190
    assert swept.freed == 190 * SIZE
    assert "may not delete runs in shared storage that should go: 110" in caplog.text


def test_where_nothing_may_be_deleted_few_are_tried() -> None:
    store, now = MemoryStore(), time.time()
    mine = fill(store, 3_000, now)
    store.before = refuses(*mine)
    assert sweep(store, ENVELOPE, SIZE, now, go_on).deleted == []
    assert sum(call == "delete" for call, _ in store.calls) < 1_100
    with pytest.raises(Denied):
        purge(store, None)
    assert sum(call == "delete" for call, _ in store.calls) < 1_500
    assert len(store.objects) == 3_000


def test_what_another_user_may_delete_is_said_when_the_rest_is_gone() -> None:
    store, now = MemoryStore(), time.time()
    mine = fill(store, 500, now)
    store.before = refuses(*mine[:20])
    with pytest.raises(Denied, match="somebody else's"):
        delete_runs(store, mine[10:30])
    assert {*store.objects} == {*mine[:20], *mine[30:]}
    with pytest.raises(Denied, match="somebody else's"):
        purge(store, NAMES.space)
    assert {*store.objects} == {*mine[:20]}


def test_young_runs_stay_whatever_there_is() -> None:
    store, now = MemoryStore(), time.time()
    young = fill(store, 10, now, oldest=YOUNG_S - 60)
    old = fill(store, 2, now, OTHER)
    sweep(store, ENVELOPE, SIZE, now, go_on)
    assert {*young} == {*store.objects}
    assert not {*old} & {*store.objects}


def test_the_largest_bound_of_the_last_hour_holds() -> None:
    store, now = MemoryStore(), time.time()
    fill(store, 1990, now)
    for age, mb in ((0, 1), (3, 2), (20, 100)):
        name = NAMES.feed(epoch(now) - age, YOU, age, mb)
        store.objects[name] = b"x", now - age * EPOCH_S
    swept = sweep(store, ENVELOPE, SIZE, now, go_on)
    assert swept.bound == 2_000_000
    assert swept.deleted == []
    assert sum(parse(name) is not None and "/feed/" in name for name in store.objects) == 2, "the oldest note went"


STRANGE = [
    "kv1/readme.txt", "kv1/0123456789abcdef/00/notes", "kv2/0123456789abcdef/00/00" + "0" * 30, "model.safetensors",
    "kv1/0123456789ABCDEF/00/00" + "0" * 30, "kv1/0123456789abcdef/01/00" + "0" * 30, "kv1/gc/lease", "kv1/feed/1/x",
    "kv1/0123456789abcdef/00/.part-0123", "deep/kv1/0123456789abcdef/00/00" + "0" * 30,
]  # fmt: skip


def test_strangers_files_stay() -> None:
    store, now = MemoryStore(), time.time()
    fill(store, 10, now)
    for name in STRANGE:
        store.objects[name] = bytes(100 * SIZE), 0.0
    swept = sweep(store, ENVELOPE, 20 * SIZE, now, go_on)
    assert (swept.total, swept.deleted) == (10 * SIZE, []), "and they do not count"
    sweep(store, ENVELOPE, 1, now, go_on)
    assert {*store.objects} == {*STRANGE}
    fill(store, 3, now)
    assert purge(store, None)[0] == 3
    assert {*store.objects} == {*STRANGE}


def test_what_is_no_run_goes_when_it_is_old() -> None:
    store, now = MemoryStore(), time.time()
    kinds = [
        f"kv1/probe/{ME}.1", f"kv1/{NAMES.space}/ab/.part-{ME}", lease(epoch(now) - 20), NAMES.touch(1, ME, 1),
        NAMES.feed(1, ME, 1, 1),
    ]  # fmt: skip
    for name in kinds:
        store.objects[name] = b"x", now - 2 * DAY
        store.objects[name.replace(ME, YOU).replace("/gc/", "/gc/1")] = b"x", now - 60
    sweep(store, ENVELOPE, 1 << 40, now, go_on)
    assert not {*kinds} & {*store.objects}
    assert len(store.objects) == len(kinds)


@pytest.mark.parametrize("ahead", [-DAY, 0.0, DAY])
def test_an_engines_clock_decides_nothing(ahead: float) -> None:
    """All times are the storage's, as far away as that is."""
    store = MemoryStore(ahead)
    fitness = probe(store, ME, itertools.count(), 5000)
    assert fitness.ahead_s is not None
    assert fitness.ahead_s == pytest.approx(ahead, abs=1.0)
    now = time.time() + fitness.ahead_s
    for at in range(5):
        store.put(NAMES.run(NAMES.digest(f"{at}".encode())), bytes(SIZE))
    sweep(store, ENVELOPE, 1, now, go_on)
    assert len(store.objects) == 5, "they were written just now"
    sweep(store, ENVELOPE, 1, now + YOUNG_S + 1, go_on)
    assert not store.objects


def test_one_of_many_collects_in_an_epoch() -> None:
    store, now = MemoryStore(), time.time()
    took = {who: take_lease(store, ENVELOPE, who, now) for who in (ME, YOU)}
    assert took == {ME: True, YOU: False}
    assert take_lease(store, ENVELOPE, ME, now), "it asks again after its answer was lost"
    assert take_lease(store, ENVELOPE, YOU, now + EPOCH_S)


def test_a_lease_that_was_forged_or_lost_is_nobodys() -> None:
    store, now = MemoryStore(), time.time()
    store.objects[lease(epoch(now))] = b"me", now
    assert not take_lease(store, ENVELOPE, ME, now)

    def gone(call: str, name: str) -> None:
        if call == "get":
            store.objects.clear()

    store.objects.clear()
    store.before = gone
    assert not take_lease(store, ENVELOPE, ME, now)


def test_two_collectors_and_writers_at_once() -> None:
    """What is left is whole, within the bound, and every name that was said to be deleted is."""
    store, now, over = MemoryStore(), time.time(), threading.Event()
    fill(store, 500, now)
    swept = []
    failed: list[BaseException] = []

    def collect() -> None:
        try:
            swept.append(sweep(store, ENVELOPE, 200 * SIZE, now, go_on))
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    def write(seed: int) -> None:
        dice = random.Random(seed)
        while not over.is_set():
            store.put(OTHER.run(OTHER.digest(dice.randbytes(8))), bytes(SIZE))
            time.sleep(0.0005)

    writers = [threading.Thread(target=write, args=(seed,), daemon=True) for seed in range(4)]
    collectors = [threading.Thread(target=collect, daemon=True) for _ in range(2)]
    for thread in (*writers, *collectors):
        thread.start()
    for thread in collectors:
        thread.join(60)
    over.set()
    for thread in writers:
        thread.join(60)
    assert not failed, failed
    names = [NAMES.run(digest) for each in swept for space, digest in each.deleted if space == NAMES.space]
    assert names
    assert not {*names} & {*store.objects}
    assert sum(name.startswith(OTHER.prefix) for name in store.objects) > 0, "what is young stays"


def test_a_sweep_ends_when_it_is_stopped() -> None:
    store, now = MemoryStore(), time.time()
    fill(store, 5000, now)
    swept = sweep(store, ENVELOPE, SIZE, now, lambda: True)
    assert swept.deleted == []


def test_what_an_operator_purges() -> None:
    store, now = MemoryStore(), time.time()
    fill(store, 10, now)
    others = fill(store, 5, now, OTHER)
    assert purge(store, NAMES.space) == (10, 10 * SIZE)
    assert {*store.objects} == {*others}


# ---------------------------------------------------------------------- trials


def test_a_good_storage_passes_and_is_left_as_it_was() -> None:
    store = MemoryStore()
    store.objects["theirs"] = b"x", 0.0
    assert probe(store, ME, itertools.count(), 100_000).refusal is None
    assert {*store.objects} == {"theirs"}


class Overwrites(MemoryStore):
    def put(self, name: str, data: object) -> bool:
        self.objects.pop(name, None)
        return super().put(name, data)


class AllWin(MemoryStore):
    def claim(self, name: str, data: object) -> bool:  # type: ignore[override]
        super().put(name, data)
        return True


class Forgets(MemoryStore):
    def put(self, name: str, data: object) -> bool:
        super().put(name, data)
        del self.objects[name]
        return True


class Cuts(MemoryStore):
    def get(self, name: str, most: int = MOST_BYTES) -> bytes:
        return super().get(name)[:-1]


class Changes(MemoryStore):
    def get(self, name: str, most: int = MOST_BYTES) -> bytes:
        data = bytearray(super().get(name))
        data[len(data) // 2] ^= 1
        return bytes(data)


class IgnoresRanges(MemoryStore):
    def get_range(self, name: str, start: int, length: int) -> bytes:
        return super().get(name)


class Blind(MemoryStore):
    def list(self, prefix: str):  # type: ignore[no-untyped-def]
        return iter(())


class Keeps(MemoryStore):
    def delete(self, names: object) -> None:
        """Says nothing."""


class SaysThere(MemoryStore):
    def put(self, name: str, data: object) -> bool:
        super().put(name, data)
        return False


@pytest.mark.parametrize(
    "kind", [Overwrites, AllWin, Forgets, Cuts, Changes, IgnoresRanges, Blind, Keeps, SaysThere]
)  # fmt: skip
def test_a_storage_that_breaks_a_promise_is_unfit(kind: type[MemoryStore]) -> None:
    with pytest.raises(Unfit):
        probe(kind(), ME, itertools.count(), 100_000)


def raising(error: Exception, *calls: str) -> Callable[[str, str], None]:
    def before(call: str, name: str) -> None:
        if call in calls or not calls:
            raise error

    return before


def test_no_answer_breaks_no_promise() -> None:
    store = MemoryStore()
    store.before = raising(Broken("timeout"))
    with pytest.raises(Broken) as error:
        probe(store, ME, itertools.count(), 1000)
    assert not isinstance(error.value, Unfit | Denied)


@pytest.mark.parametrize("ahead", [0.0, DAY])
def test_a_full_storage_says_what_time_it_is_if_something_small_has_room(ahead: float) -> None:
    store = MemoryStore(ahead)
    put = store.put

    def small(name: str, data: object) -> bool:
        if memoryview(data).nbytes > 100:  # type: ignore[arg-type]
            raise Full("no room")
        return put(name, data)

    store.put = small  # type: ignore[method-assign]
    fitness = probe(store, ME, itertools.count(), 1000)
    assert fitness.full
    assert fitness.refusal == "no room"
    assert fitness.ahead_s == pytest.approx(ahead, abs=1.0)
    assert not store.objects
    store.before = raising(Full("no room"), "put")
    assert probe(store, ME, itertools.count(), 1000) == ("no room", None, True)
    denied = MemoryStore(ahead)
    denied.before = raising(Denied("no"), "put", "delete")
    assert probe(denied, ME, itertools.count(), 1000) == ("no", None, False)


def test_what_may_only_be_read_is_used_for_that() -> None:
    store = MemoryStore()
    store.before = raising(Denied("no"), "put", "delete")
    assert probe(store, ME, itertools.count(), 1000).refusal is not None
    store.before = raising(Denied("no"))
    with pytest.raises(Denied):
        probe(store, ME, itertools.count(), 1000)


def test_an_answer_that_was_lost_is_no_broken_promise() -> None:
    """The one that won asked again, and was told that there is one."""

    class Lost(MemoryStore):
        def claim(self, name: str, data: object) -> bool:  # type: ignore[override]
            super().put(name, data)
            return False

    assert probe(Lost(), ME, itertools.count(), 1000).refusal is None
