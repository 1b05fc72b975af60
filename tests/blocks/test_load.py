"""Many threads, and many blocks."""

from __future__ import annotations

import gc
import random
import threading
import time
import tracemalloc

import numpy as np

from kvbm.blocks import Pool
from kvbm.core.events import Cleared, Event, Removed, Stored
from kvbm.native import Table
from kvbm.policy import LRU


class Mirror:
    """What a router would believe from events alone."""

    def __init__(self) -> None:
        self.known: set[bytes] = set()

    def on_event(self, event: Event) -> None:
        if isinstance(event, Cleared):
            self.known.clear()
        elif isinstance(event, Stored):
            assert self.known.isdisjoint(event.keys)
            self.known.update(event.keys)
        elif isinstance(event, Removed):
            assert self.known.issuperset(event.keys)
            self.known.difference_update(event.keys)


def test_threads_keep_every_promise() -> None:
    mirror = Mirror()
    pool = Pool(64, order=LRU(64), observers=[mirror])
    keys = [bytes([number]) * 32 for number in range(100)]
    contents: list[bytes | None] = [None] * 64  # what each slot's bytes are
    stop = time.monotonic() + 2.5
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < stop:
            start = rng.randrange(90)
            prompt = keys[start : start + rng.randint(1, 10)]
            with pool.match(prompt) as pinned:
                assert all(contents[slot] == key for slot, key in zip(pinned.slots, pinned.keys, strict=True))
                rest = prompt[len(pinned) :]
                raw = pool.allocate(len(rest)) if rest else None
                if raw is not None:
                    with raw.stage(rest, priority=rng.choice([0, 5]), ttl=rng.choice([None, 0.01])) as staged:
                        for slot, key in zip(staged.slots, rest, strict=True):
                            contents[slot] = key
                        done = np.array([rng.random() < 0.9 for _ in rest])
                        staged.register(done).drop()
                assert all(contents[slot] == key for slot, key in zip(pinned.slots, pinned.keys, strict=True))
            if rng.random() < 0.02:
                pool.discard(prompt)
            if rng.random() < 0.002:
                pool.clear()

    def guarded(seed: int) -> None:
        try:
            work(seed)
        except BaseException as error:  # noqa: BLE001  (shown by the main thread)
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    pool.check()
    seen = pool.statistics()
    assert seen.free + seen.inactive == 64
    assert len(mirror.known) == seen.registered
    assert seen.registrations > 1000


def test_memory_and_garbage_collection_do_not_follow_the_number_of_blocks() -> None:
    count, run = 200_000, 40
    before = len(gc.get_objects())
    tracemalloc.start()
    pool = Pool(count, order=LRU(count))
    for first in range(0, count, run):
        raw = pool.allocate(run)
        assert raw is not None
        raw.stage([number.to_bytes(32, "little") for number in range(first, first + run)]).register().drop()
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pool.statistics().inactive == count
    assert used / count < 350
    gc.collect()
    assert len(gc.get_objects()) - before < 1000
    assert not gc.is_tracked(Table(1))
    pool.check()
