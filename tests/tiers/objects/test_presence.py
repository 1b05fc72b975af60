"""What is known of runs in memory."""

from __future__ import annotations

import os
import time

from kvbm.stores.objects.names import Names
from kvbm.tiers.objects.presence import KnownNames
from kvbm.tiers.objects.tier import Runs

NAMES = Names(b"x")


def until(presence: KnownNames, count: int) -> None:
    end = time.monotonic() + 10
    while len(presence) != count:
        assert time.monotonic() < end, len(presence)
        time.sleep(0.001)


def test_names_come_and_go_in_order() -> None:
    presence, heads = KnownNames(1_000_000), [os.urandom(8) for _ in range(3000)]
    digests = [int.from_bytes(each, "little") for each in heads]
    presence.hear(b"".join(heads), b"")
    presence.hear(b"", b"".join(heads[:1000]))
    end = time.monotonic() + 10
    while digests[-1] not in presence or digests[999] in presence:
        assert time.monotonic() < end
        time.sleep(0.001)
    assert len(presence) == 2000
    assert all(each in presence for each in digests[1000:])
    assert not any(each in presence for each in digests[:1000])
    presence.add(digests[0])
    presence.discard(digests[-1])
    assert digests[0] in presence
    assert digests[-1] not in presence
    presence.close()


def test_what_was_heard_before_a_clear_does_not_count() -> None:
    presence = KnownNames(1_000_000)
    presence.hear(b"".join(os.urandom(8) for _ in range(100_000)), b"")
    presence.clear()
    late = os.urandom(8)
    presence.hear(late, b"")
    until(presence, 1)
    assert int.from_bytes(late, "little") in presence
    presence.close()


def test_it_is_bounded() -> None:
    presence = KnownNames(2560)
    for _ in range(10_000):
        presence.add(int.from_bytes(os.urandom(8), "little"))
    assert 2000 < len(presence) <= 2560
    presence.close()


def test_a_prompt_is_covered_run_by_run() -> None:
    presence = KnownNames(10_000)
    runs, keys = Runs(NAMES, 4, presence), [os.urandom(32) for _ in range(14)]
    assert runs.note(keys) == [keys[3], keys[7], keys[11]]
    for end in (keys[3], keys[11]):
        presence.add(int.from_bytes(NAMES.digest(end)[:8], "little"))
    assert runs.there(keys) == [(3, keys[3]), (11, keys[11])]
    assert runs.there(keys[2:9]) == [(1, keys[3])]
    assert runs.head(keys[0]) == int.from_bytes(NAMES.digest(keys[0])[:8], "little")
    presence.close()
