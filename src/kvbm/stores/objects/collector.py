"""Keeps all objects of KVBM below an address within a bound: the coldest runs go.

One instance collects in an epoch, the one that created that epoch's lease; two do no harm. It counts and deletes what
has exactly the form of one of our names, whatever else lies there. All times are the storage's. A run is as young
as the last time that somebody wrote it, or said that a request asked for it.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

from kvbm.abc.store import Denied, Full, Listed, ObjectStore
from kvbm.core.errors import Broken
from kvbm.stores.objects.envelope import Envelope
from kvbm.stores.objects.names import EPOCH_S, FEEDS, NAME_BYTES, ROOT, TOUCHES, epoch, lease, parse
from kvbm.stores.objects.notes import MOST_BYTES, decode

log = logging.getLogger(__name__)

YOUNG_S: Final = 900.0
"""What is younger stays, however much there is: an instance that wrote it or was told of it may be about to read it."""
DOWN_TO: Final = 0.9
_BOUND_EPOCHS: Final = 6
"""For this many epochs the largest bound that an engine told holds."""
_KEEP_S: Final = {"feed": 3_600.0 + EPOCH_S, "touch": 86_400.0, "lease": 3_600.0, "probe": 3_600.0, "part": 3_600.0}
"""How long what is no run stays."""
_SPACE_BYTES: Final = 8
_BATCH: Final = 250
"""Names that are deleted in one call: some storage takes one after the other."""
_MOST_REFUSED: Final = 1_000
"""So many runs of one sweep may turn out to be another's, whom alone the storage lets delete them."""
_MB: Final = 1_000_000
_LEASE_BYTES: Final = 4_096
_FAR_S: Final = 86_400.0
"""What was written so long from now was written by nobody whose clock counts."""


@dataclass(slots=True)
class Census:
    """What there is of ours. Runs are rows: `runs` has namespace and name of each, `sizes` and `written` the rest."""

    now: float
    total: int = 0
    objects: int = 0
    bound: int = 0
    runs: bytearray = field(default_factory=bytearray)
    sizes: array[int] = field(default_factory=lambda: array("q"))
    written: array[float] = field(default_factory=lambda: array("d"))
    touches: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    """What is no run and old enough to go."""

    def add(self, listed: Listed) -> None:
        """Count it, if it is ours."""
        ours = parse(listed.name)
        if ours is None:
            return
        self.objects += 1
        self.total += listed.size
        if ours.kind == "run":
            self.runs += bytes.fromhex(ours.space) + ours.digest
            self.sizes.append(listed.size)
            self.written.append(listed.modified if listed.modified < self.now + _FAR_S else 0.0)
            return
        if ours.kind == "feed" and 0 <= epoch(self.now) + 1 - ours.epoch <= _BOUND_EPOCHS + 1:
            self.bound = max(self.bound, ours.mb * _MB)
        if self.now - listed.modified > _KEEP_S[ours.kind]:
            self.stale.append(listed.name)
        elif ours.kind == "touch":
            self.touches.append(listed.name)

    def row(self, at: int) -> bytes:
        """Namespace and name of a run."""
        width = _SPACE_BYTES + NAME_BYTES
        return bytes(self.runs[at * width : (at + 1) * width])


@dataclass(slots=True)
class Swept:
    """What a sweep found and did. `deleted` are namespaces (16 digits) and names of runs."""

    objects: int
    total: int
    bound: int
    deleted: list[tuple[str, bytes]] = field(default_factory=list)
    freed: int = 0


def census(store: ObjectStore, now: float, stopped: Callable[[], bool] = bool) -> Census:
    """All that is ours, or what was counted when it was `stopped`. Raises Broken."""
    found = Census(now)
    for page in store.list(ROOT):
        for each in page:
            found.add(each)
        if stopped():
            break
    return found


def sweep(store: ObjectStore, envelope: Envelope, bound: int, now: float, stopped: Callable[[], bool]) -> Swept:
    """Delete the coldest runs where there is more than the bound, and what is no run and old. `now` is by the storage's
    clock; `bound` is our own, in bytes. Ends early once it is `stopped`. Raises Broken."""
    found = census(store, now, stopped)
    if stopped():
        return Swept(found.objects, found.total, max(bound, found.bound))
    swept = Swept(found.objects, found.total, max(bound, found.bound))
    _delete(store, found.stale, stopped)
    excess = found.total - int(swept.bound * DOWN_TO) if found.total > swept.bound else 0
    if excess <= 0:
        return swept
    order, sizes, refused = _coldest(_ages(store, envelope, found, stopped), found), np.array(found.sizes, np.int64), 0
    while len(order) and swept.freed < excess and refused < _MOST_REFUSED and not stopped():
        ends = np.cumsum(sizes[order[:_BATCH]])
        rows, order = np.split(order, [int(np.searchsorted(ends, excess - swept.freed)) + 1])
        names = {_name(row := found.row(at)): (row, found.sizes[at]) for at in rows.tolist()}
        deleted = _delete(store, [*names])
        refused += len(names) - len(deleted.gone)
        for row, nbytes in map(names.__getitem__, deleted.gone):
            swept.deleted.append((row[:_SPACE_BYTES].hex(), row[_SPACE_BYTES:]))
            swept.freed += nbytes
    if refused:
        log.warning("KVBM: this instance may not delete runs in shared storage that should go: %d", refused)
    return swept


def _ages(
    store: ObjectStore, envelope: Envelope, found: Census, stopped: Callable[[], bool]
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """When each run was last written or read."""
    last: dict[bytes, float] = {}
    for name in found.touches:
        if stopped():
            break
        ours = parse(name)
        assert ours is not None
        with suppress(Broken):  # gone, or sealed with another secret
            note = decode(envelope.unwrap(name, store.get(name, envelope.size(MOST_BYTES))))
            space, when = bytes.fromhex(ours.space), min((ours.epoch + 1) * float(EPOCH_S), found.now)
            for digest in note.came:
                last[space + digest] = max(when, last.get(space + digest, 0.0))
    ages = np.array(found.written, np.float64)
    if last:
        for at in range(len(ages)):
            ages[at] = max(ages[at], last.get(found.row(at), 0.0))
    return ages


def _coldest(
    ages: np.ndarray[tuple[int], np.dtype[np.float64]], found: Census
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Rows of runs that may go, the coldest first."""
    order = np.argsort(ages, kind="stable")
    return order[ages[order] < found.now - YOUNG_S]


def _name(row: bytes) -> str:
    space, digest = row[:_SPACE_BYTES].hex(), row[_SPACE_BYTES:].hex()
    return f"{ROOT}{space}/{digest[:2]}/{digest}"


class _Deleted(NamedTuple):
    """What is not there any more, and why the others are: it is not us who may delete them."""

    gone: list[str]
    refusal: Denied | None


def _delete(store: ObjectStore, these: Sequence[str], stopped: Callable[[], bool] = bool) -> _Deleted:
    """Only what is ours. Ends early once it is `stopped`, or may delete nothing. Raises Broken."""
    ours, gone, refusal = [name for name in these if parse(name) is not None], list[str](), None
    for at in range(0, len(ours), _BATCH):
        if stopped():
            break
        batch, before = ours[at : at + _BATCH], len(gone)
        try:
            store.delete(batch)
            gone += batch
        except Denied as error:
            refusal = error
            for name in batch:
                with suppress(Denied):
                    store.delete([name])
                    gone.append(name)
            if len(gone) == before:
                break
    return _Deleted(gone, refusal)


def take_lease(store: ObjectStore, envelope: Envelope, instance: str, now: float) -> bool:
    """Whether this instance collects in this epoch. Raises Broken.

    That a lease is there already does not say whose: the answer to our own may have been lost. Where there is no room
    for one, everybody collects.
    """
    name = lease(epoch(now))
    body = instance.encode()
    try:
        store.claim(name, envelope.wrap(name, body))
    except Full:
        return True
    with suppress(Broken):
        return envelope.unwrap(name, store.get(name, _LEASE_BYTES)) == body
    return False


def purge(
    store: ObjectStore, space: str | None, progress: Callable[[int], None] = lambda objects: None
) -> tuple[int, int]:
    """Delete all that is ours, or runs and touches of one namespace (16 digits); how many objects, and their bytes.
    Engines that run notice (`_unsettle`). Raises Broken, at the end where something may not be deleted by us."""
    deleted = nbytes = 0
    refusal: Denied | None = None
    for prefix in [ROOT] if space is None else [f"{ROOT}{space}/", TOUCHES]:
        for page in store.list(prefix):
            parsed = ((each, parse(each.name)) for each in page)
            these = [each for each, ours in parsed if ours is not None and space in (None, ours.space)]
            done = _delete(store, [each.name for each in these])
            gone, refusal = {*done.gone}, done.refusal or refusal
            deleted += len(gone)
            nbytes += sum(each.size for each in these if each.name in gone)
            progress(deleted)
            if these and not gone:
                break
    if space is not None and deleted:
        _unsettle(store, {space})
    if refusal is not None:
        raise refusal
    return deleted, nbytes


def delete_runs(store: ObjectStore, names: Iterable[str]) -> list[str]:
    """Delete these, each before the next is asked for, and say which. Engines that run notice (`_unsettle`). Raises
    Broken, at the end where something may not be deleted by us."""
    done = [_delete(store, [name]) for name in names]
    gone = [name for each in done for name in each.gone]
    if gone:
        _unsettle(store, {ours.space for name in gone if (ours := parse(name)) is not None})
    for refusal in (each.refusal for each in done):
        if refusal is not None:
            raise refusal
    return gone


def _unsettle(store: ObjectStore, spaces: set[str]) -> None:
    """Delete the last notes of these namespaces. Engines that run miss them, list what there is, and tell their bounds
    again; older notes, with the bounds in them, stay."""
    notes = [(each, ours) for page in store.list(FEEDS) for each in page if (ours := parse(each.name)) is not None]
    latest = max((each.modified for each, _ in notes if each.modified < time.time() + _FAR_S), default=0.0)
    first = epoch(latest) - 1
    _delete(store, [each.name for each, ours in notes if ours.space in spaces and ours.epoch >= first])
