"""What tiers say survives the way."""

from __future__ import annotations

from typing import Any

import pytest

from kvbm.link.messages import decode_message, encode
from kvbm.stores.disk.meta import DiskPlace
from kvbm.tiers.disk.orders import Forget, Generation, Probe, Probed, Read, Write, decode_place, to_open
from kvbm.tiers.peers.orders import Attach, Detach, Pull, Shared
from tests.link.orders import off_channel, on_channel

KEY = bytes(range(32))


@pytest.mark.parametrize(
    "said",
    [
        Write(1, b"g2", b"g3", [KEY, KEY], [None, KEY], b"priorities", b"expires", 7, 2),
        Read(1, b"g3", b"g2", [KEY]),
        Forget(b"g3", [KEY]),
        Generation(3),
        Probe(True, 9),
        Probed(1, "no disk", 9),
        Attach("p", b"metadata", 1 << 40, 4096, 8, "before"),
        Detach("p"),
        Pull(1, "p", b"theirs", b"ours", b"sums"),
        Shared(1, b"metadata", 1 << 40, 4096, 8),
        Shared(1, problem="no NIXL"),
    ],
)
def test_orders_survive(said: Any) -> None:
    assert off_channel(decode_message(encode(on_channel(said)))) == said


def test_a_place_survives() -> None:
    place = DiskPlace("/a", "f", 2, 4096, 7, 1)
    assert decode_place(to_open(place).body) == place
