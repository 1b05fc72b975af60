"""Whether storage keeps what the tier relies on, tried with objects of a run's size that are deleted afterwards."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Final, NamedTuple, TypeVar

from kvbm.abc.store import Absent, Denied, Full, Listed, ObjectStore
from kvbm.core.errors import Broken
from kvbm.stores.objects import names

_CREATORS: Final = 4
_CLAIM_BYTES: Final = 64
_OWN: Final = re.compile(r"\bkv1/(?:probe|feed)/[0-9a-f.]+/?")
_Result = TypeVar("_Result")


class Unfit(Broken):
    """The storage answers, and does not do what it has to."""


class Fitness(NamedTuple):
    """What a trial found: why nothing can be written, though it can be read; how far the storage's clock is ahead of
    ours, None where nothing can be written; whether that is because there is no room."""

    refusal: str | None
    ahead_s: float | None
    full: bool = False


def probe(store: ObjectStore, instance: str, numbers: count[int], nbytes: int) -> Fitness:
    """Try all that the tier does, with objects that no other instance has. `nbytes` are those of a run.

    Raises:
        Unfit: an answer breaks a promise.
        Denied: nothing may be read either, or the bucket does not exist.
        Broken: no answer.
    """
    written: list[str] = []

    def name() -> str:
        written.append(names.probe(instance, next(numbers)))
        return written[-1]

    try:
        return _tried(store, name, nbytes, written)
    except Broken as error:
        raise type(error)(_OWN.sub("a test object", str(error))) from None
    finally:
        with suppress(Broken):
            store.delete(written)


def _tried(store: ObjectStore, name: Callable[[], str], nbytes: int, written: Sequence[str]) -> Fitness:
    try:
        ahead = _write(store, name(), nbytes)
        _race(store, name())
    except (Denied, Full) as error:
        with suppress(Absent):
            store.get(name())  # where even that is denied, all is
        for _ in store.list(names.feed_prefix(0)):
            break
        ahead, full = None, isinstance(error, Full)
        with suppress(Broken):
            ahead = _ahead(store, name()) if full else None
        return Fitness(_OWN.sub("a test object", str(error)), ahead, full)
    _delete(store, written)
    return Fitness(None, ahead)


def _ahead(store: ObjectStore, name: str) -> float:
    """By something small, where there is no room for a run."""
    begun = time.time()
    store.put(name, os.urandom(_CLAIM_BYTES))
    ended = time.time()
    return store.stat(name).modified - (begun + ended) / 2


def _write(store: ObjectStore, name: str, nbytes: int) -> float:
    data = os.urandom(nbytes)
    begun = time.time()
    first = store.put(name, data)
    ended = time.time()
    got = _there(lambda: store.get(name), "what was written")
    if bytes(memoryview(got)) != data:
        raise Unfit(f"an object of {nbytes} bytes was read back as another one")
    if not first:
        raise Unfit("an object that nobody else writes is said to be there already")
    if store.put(name, data):
        raise Unfit("an object is written a second time, where that has to be refused")
    start, length = nbytes // 3, nbytes // 5
    part = _there(lambda: store.get_range(name, start, length), "what was written")
    if bytes(memoryview(part)) != data[start : start + length]:
        raise Unfit("a part of an object was read as something else")
    found = _there(lambda: _listed(store, name), "what was written")
    if found.size != nbytes:
        raise Unfit(f"an object of {nbytes} bytes is listed with {found.size}")
    return found.modified - (begun + ended) / 2


def _listed(store: ObjectStore, name: str) -> Listed:
    folder = name.rpartition("/")[0] + "/"
    for page in store.list(folder):
        for each in page:
            if each.name == name:
                return each
    raise Absent(name)


def _race(store: ObjectStore, name: str) -> None:
    bodies = [os.urandom(_CLAIM_BYTES) for _ in range(_CREATORS)]
    won = together([lambda body=body: store.claim(name, body) for body in bodies])  # type: ignore[misc]
    winners = [body for body, first in zip(bodies, won, strict=True) if first]
    got = bytes(memoryview(_there(lambda: store.get(name), "what only one may create")))
    if len(winners) > 1:
        raise Unfit(f"{len(winners)} of {_CREATORS} that created one object at once were told that they are the one")
    if got not in (winners or bodies):  # nobody, where the answer to the one was lost and it asked again
        raise Unfit("an object was created by one and contains something else")


def _delete(store: ObjectStore, written: Sequence[str]) -> None:
    store.delete(written)
    try:
        store.get(written[0])
    except Absent:
        store.delete(written)  # what is gone already is no error
    else:
        raise Unfit("an object can be read after it was deleted")


def _there(call: Callable[[], _Result], what: str) -> _Result:
    try:
        return call()
    except Absent as error:
        raise Unfit(f"{what} is not there: {error}") from None


def together(calls: Sequence[Callable[[], _Result]], seconds: float = threading.TIMEOUT_MAX) -> list[_Result]:
    """All of them at once, on threads that let the process end where one hangs. Raises what the first raised, or
    Broken where one takes longer."""
    results: dict[int, _Result] = {}
    failed: dict[int, BaseException] = {}
    gate = threading.Barrier(len(calls))

    def run(at: int) -> None:
        gate.wait()
        try:
            results[at] = calls[at]()
        except BaseException as error:  # noqa: BLE001  raised again below
            failed[at] = error

    threads = [threading.Thread(target=run, args=(at,), name="kvbm-probe", daemon=True) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()) if seconds < threading.TIMEOUT_MAX else None)
    if any(thread.is_alive() for thread in threads):
        raise Broken("the storage does not answer")
    if failed:
        raise failed[min(failed)]
    return [results[at] for at in range(len(calls))]
