"""Instances of different versions talk to each other: what goes over the wire stays what it was."""

from __future__ import annotations

import struct

import pytest

from kvbm.tiers.peers.messages import (
    PROTOCOL,
    Declined,
    Describe,
    Done,
    Join,
    Memory,
    Ping,
    Pong,
    Promise,
    Release,
    Reserve,
    Said,
    Slab,
    Welcome,
    decode,
    encode,
)  # fmt: skip

KEYS = [bytes([number]) * 32 for number in (1, 2)]
RECORDED: list[tuple[Said, str]] = [
    (Join("a", 7, "ffffffff", "0.1"), "85a474797065a44a6f696ea46e616d65a161ab696e6361726e6174696f6e07a96e616d6573706163"
    "65a86666666666666666a776657273696f6ea3302e31"),
    (Welcome("b", 9), "83a474797065a757656c636f6d65a46e616d65a162ab696e6361726e6174696f6e09"),
    (Declined("no"), "82a474797065a752656675736564a6726561736f6ea26e6f"),
    (Reserve(3, 4, KEYS, 5, 0.25, True), "87a474797065a752657365727665a2696403a673656172636804a46b65797392c420" +
    "01" * 32 + "c420" + "02" * 32 + "a5737461727405a6776169745f73cb3fd0000000000000a86578706563746564c3"),
    (Promise(
        3, 6, struct.pack("<2i", 11, 12), [struct.pack("<2Q", 13, 14)], bytes([1, 0]),
        struct.pack("<2d", 60.0, float("inf")), 10.0, True, 2,
    ), "8aa474797065a750726f6d697365a2696403a56c6561736506a5736c6f7473c4080b0000000c000000a473756d7391c4100d000000"
    "000000000e00000000000000aa7072696f726974696573c4020100a474746c73c4100000000000004e40000000000000f07fa77365636f6e6473cb4024"
    "000000000000a6636f6d696e67c3a66d656d6f727902"),
    (Release(6), "82a474797065a752656c65617365a56c6561736506"),
    (Done(4), "82a474797065a4446f6e65a673656172636804"),
    (Describe(8), "82a474797065a84465736372696265a2696408"),
    (Memory(8, 2, [Slab(b"nixl", 4096, 8192, 100)]), "84a474797065a64d656d6f7279a2696408a66e756d62657202a5736c616273"
    "9184a86d65746164617461c4046e69786ca761646472657373cd1000a6737472696465cd2000a5736c6f747364"),
    (Ping(1), "82a474797065a450696e67a2696401"),
    (Pong(1), "82a474797065a4506f6e67a2696401"),
]  # fmt: skip
"""What version 1 of the protocol said, recorded before disk and peers became one mechanism (commit 1db8fba)."""


@pytest.mark.parametrize(("message", "frame"), RECORDED, ids=lambda each: type(each).__name__)
def test_a_message_is_what_it_was(message: Said, frame: str) -> None:
    assert decode(bytes.fromhex(frame)) == message
    assert encode(message).hex() == frame


def test_each_message_is_recorded_for_this_version() -> None:
    assert PROTOCOL == 1
    assert {type(message) for message, _ in RECORDED} == set(Said.__args__)
