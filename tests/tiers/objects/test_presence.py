"""What is known of runs in memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

import numpy as np

from kvbm.stores.objects.names import Names
from kvbm.tiers.objects.presence import Heads, KnownNames
from kvbm.tiers.objects.tier import Runs

NAMES = Names(b"x")


def numbers(heads: Sequence[bytes]) -> Heads:
    return np.frombuffer(b"".join(heads), "<u8")


def until(presence: KnownNames, count: int) -> None:
    end = time.monotonic() + 10
    while len(presence) != count:
        assert time.monotonic() < end, len(presence)
        time.sleep(0.001)


def test_names_come_and_go_in_order() -> None:
    presence, heads = KnownNames(1_000_000), [os.urandom(8) for _ in range(3000)]
    digests = numbers(heads)
    presence.hear(b"".join(heads), b"")
    presence.hear(b"", b"".join(heads[:1000]))
    end = time.monotonic() + 10
    while presence.among(digests[[-1, 999]]).tolist() != [True, False]:
        assert time.monotonic() < end
        time.sleep(0.001)
    assert len(presence) == 2000
    assert presence.among(digests[1000:]).all()
    assert not presence.among(digests[:1000]).any()
    presence.add(digests[:1])
    presence.discard(digests[-1:])
    assert presence.among(digests[[0, -1]]).tolist() == [True, False]
    presence.close()


def test_its_thread_has_ended_when_it_is_closed() -> None:
    before = set(threading.enumerate())
    presence = KnownNames(1_000_000)
    (own,) = set(threading.enumerate()) - before
    presence.hear(os.urandom(8 * 1_000_000), b"")  # which takes a second at least
    begun = time.monotonic()
    presence.close()
    assert not own.is_alive()
    assert time.monotonic() - begun < 0.9


def test_what_was_heard_before_a_clear_does_not_count() -> None:
    presence = KnownNames(1_000_000)
    presence.hear(b"".join(os.urandom(8) for _ in range(100_000)), b"")
    presence.clear()
    late = os.urandom(8)
    presence.hear(late, b"")
    until(presence, 1)
    assert presence.among(numbers([late])).all()
    presence.close()


def test_it_is_bounded() -> None:
    presence = KnownNames(2560)
    for _ in range(100):
        presence.add(np.frombuffer(os.urandom(800), "<u8"))
    assert len(presence) == 2560
    late = np.frombuffer(os.urandom(80), "<u8")
    presence.add(late)
    assert len(presence) == 2560
    assert presence.among(late).sum() >= 9  # a row that is empty has nothing that could leave
    presence.close()


def test_a_table_that_is_half_full_loses_next_to_nothing() -> None:
    presence, names = KnownNames(100_000), np.frombuffer(os.urandom(8 * 100_000), "<u8")
    for at in range(0, 100_000, 999):
        presence.add(names[at : at + 999])
        presence.add(names[at : at + 999])  # once more changes nothing
    there = presence.among(names)
    assert there.sum() == len(presence) > 99_700
    presence.discard(names[::2])
    assert not presence.among(names[::2]).any()
    assert (presence.among(names[1::2]) == there[1::2]).all()
    assert len(presence) == there[1::2].sum()
    presence.close()


def test_no_name_is_never_there() -> None:
    presence = KnownNames(1000)
    presence.add(np.zeros(3, np.uint64))
    assert len(presence) == 0
    assert not presence.among(np.zeros(2, np.uint64)).any()
    presence.close()


def test_a_prompt_is_covered_run_by_run() -> None:
    presence = KnownNames(10_000)
    runs, keys = Runs(NAMES, 4, presence), [os.urandom(32) for _ in range(14)]
    assert runs.note(keys) == [keys[3], keys[7], keys[11]]
    for end in (keys[3], keys[11]):
        presence.add(numbers([NAMES.digest(end)[:8]]))
    assert runs.there(keys) == [(3, keys[3]), (11, keys[11])]
    assert runs.there(keys[2:9]) == [(1, keys[3])]
    assert runs.heads(keys[:1]).tolist() == [int.from_bytes(NAMES.digest(keys[0])[:8], "little")]
    presence.close()
