"""What leader and workers say survives the way, and what is not ours is refused."""

from __future__ import annotations

import msgspec
import pytest

from kvbm.link.messages import (
    Allot,
    Bye,
    Copy,
    FromTier,
    GiveUp,
    Hello,
    Message,
    Open,
    Opened,
    Ready,
    Refused,
    Result,
    Sick,
    Step,
    ToTier,
    Touched,
    decode_message,
    decode_step,
    encode,
)


@pytest.mark.parametrize(
    "message",
    [
        Hello(1, 2, "f" * 64, 4096, {"kv.backend": "k"}, 1 << 60),
        Allot(1 << 30, shared=True, stride=4096, sums="told", hurry=True),
        Ready(0, 1 << 30),
        Touched(1, 1 << 29),
        Touched(1, 7, "no memory"),
        GiveUp([7, 9]),
        Open("g3", b"there"),
        Opened(1, "g3", "read-only"),
        ToTier("g3", b"write"),
        FromTier("peers", b"mine"),
        Refused(1, "no memory"),
        Result(7, 1, b"\0\3", 1 << 40, 0.25, "injected"),
        Result(7, 1, b"", 0, 0.0),
        Sick(1, "a copy thread died"),
        Sick(1, "a thread died", "g3"),
        Bye(),
    ],
)
def test_messages_survive(message: Message) -> None:
    assert decode_message(encode(message)) == message


def test_a_step_survives() -> None:
    step = Step(
        loads=[Copy.of(1, "a", [3, 1], [0, 5])],
        stores=[Copy.of(2, "b", [], [])],
        fence=[9],
        idle=True,
        sync=True,
    )
    assert decode_step(encode(step)) == step
    assert decode_step(encode(Step())) == Step()


def test_a_copys_slots() -> None:
    copy = Copy.of(1, "a", [3, 1], range(2))
    assert len(copy.g1) == 8
    assert copy.g1_slots().tolist() == [3, 1]
    assert copy.g2_slots().tolist() == [0, 1]
    assert copy.g1_slots().dtype == "int64"


@pytest.mark.parametrize("data", [b"", b"\xc1", encode(Step()), encode({"type": "Unknown"}), encode({"type": "Ready"})])
def test_nonsense_is_refused(data: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_message(data)
