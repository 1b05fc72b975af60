"""Two collectors whose clocks are a day apart from the storage's, and four processes that write and read meanwhile."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

from kvbm.abc.store import Absent
from kvbm.stores.objects.collector import sweep
from kvbm.stores.objects.envelope import Envelope
from kvbm.stores.objects.folder import FolderStore
from kvbm.stores.objects.names import Names, parse
from kvbm.stores.objects.probe import probe

DAY, SECONDS = 86_400.0, 3.0
SIZE, BOUND = 10_000, 2_000_000
YOUNG = 10
"""Each so many-th run is left as young as it is."""


def collect(folder: Path, skew: float) -> tuple[int, float]:
    """Collects again and again by a clock that is wrong by so much. Runs deleted, and how wrong it found its clock."""
    store, real, deleted = FolderStore(folder), time.time, 0

    def wrong() -> float:
        return real() + skew

    with mock.patch("time.time", wrong):
        ahead = probe(store, f"{os.getpid():016x}", itertools.count(), SIZE).ahead_s
        assert ahead is not None
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            deleted += len(sweep(store, Envelope(), BOUND, time.time() + ahead, lambda: False).deleted)
    return deleted, ahead


def write(folder: Path, seed: int) -> tuple[int, int, list[str]]:
    """Writes runs, most of which count as old, and reads some of its own: how many of both, and the young ones."""
    store, names, dice, reads, young = FolderStore(folder), Names(b"n"), random.Random(seed), 0, list[str]()
    written: dict[str, bytes] = {}
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        name, data = names.run(names.digest(dice.randbytes(32))), dice.randbytes(SIZE)
        assert store.put(name, data)
        written[name] = data
        if len(written) % YOUNG:
            old = time.time() - dice.uniform(3600, 30 * DAY)
            try:
                os.utime(folder / name, (old, old))
            except FileNotFoundError:
                continue
        else:
            young.append(name)
        asked = dice.choice([*written])
        try:
            assert bytes(memoryview(store.get(asked))) == written[asked]
            reads += 1
        except Absent:
            assert asked not in young, "what is young stays"
    return len(written), reads, young


def test_nobody_deletes_what_is_young_or_others_and_the_bound_holds(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    theirs = [folder / "theirs", folder / "kv1/notes.txt", folder / "kv1/0123456789abcdef/00/readme"]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("of somebody else")
        os.utime(path, (0, 0))
    with ProcessPoolExecutor(6, mp_context=multiprocessing.get_context("spawn")) as pool:
        collectors = [pool.submit(collect, folder, skew) for skew in (DAY, -DAY)]
        writers = [pool.submit(write, folder, seed) for seed in range(4)]
        deleted = [each.result() for each in collectors]
        wrote = [each.result() for each in writers]
    store = FolderStore(folder)
    sweep(store, Envelope(), BOUND, time.time(), lambda: False)
    names = [each.name for page in store.list("kv1/") for each in page]
    left = {name for name in names if (ours := parse(name)) is not None and ours.kind == "run"}
    young = {name for _, _, names in wrote for name in names}
    count = sum(written for written, _, _ in wrote)
    assert young <= left, "what is young stays, whatever a clock says"
    assert len(left) * SIZE <= max(BOUND, len(young) * SIZE)
    assert count * SIZE > 2 * BOUND, "the control: much more was written"
    assert sum(reads for _, reads, _ in wrote) > 100
    assert all(abs(abs(ahead) - DAY) < 60 for _, ahead in deleted)
    assert all(gone > 0 for gone, _ in deleted), "both collected"
    assert all(path.read_text() == "of somebody else" for path in theirs)
