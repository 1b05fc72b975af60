"""What objects are put into, and runs in it: whatever is changed is noticed."""

from __future__ import annotations

import os
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from kvbm.abc.store import Damaged
from kvbm.core.errors import ConfigError, Misuse
from kvbm.stores.objects.blocks import Buffer
from kvbm.stores.objects.envelope import PLAIN_AT, Envelope, read_secret
from kvbm.stores.objects.names import Names, epoch, parse
from kvbm.stores.objects.notes import Note, decode
from kvbm.stores.objects.runs import Run, RunFormat, Shape, run_blocks

SECRET = b"sixteen bytes or more"
SHAPE = Shape(4, 2, 512)
RUN = Run(
    tuple(bytes([at]) * 32 for at in range(1, 5)), b"parent".ljust(32), 8, bytes([0, 1, 50, 100]),
    np.arange(8, dtype=np.uint64).reshape(2, 4),
)  # fmt: skip
FORMAT = RunFormat("fingerprint", SHAPE, "some model")
ENVELOPES = [Envelope(), Envelope(SECRET)]


def written(envelope: Envelope, name: str = "name", run: Run = RUN) -> bytearray:
    plain = bytearray(FORMAT.header(run) + bytes(SHAPE.data_bytes))
    whole = bytearray(envelope.size(len(plain)))
    if not envelope.sealed:
        whole[PLAIN_AT:] = plain
    envelope.close(name, memoryview(whole), memoryview(plain))
    return whole


@pytest.mark.parametrize("envelope", ENVELOPES)
def test_a_run_is_what_was_written(envelope: Envelope) -> None:
    whole = written(envelope)
    plain = envelope.open("name", memoryview(whole))
    assert len(plain) == FORMAT.plain_bytes
    run = FORMAT.parse(plain)
    assert run[:4] == RUN[:4]
    assert (run.sums == RUN.sums).all()
    assert FORMAT.data_at(plain) == FORMAT.header_bytes
    assert (PLAIN_AT + FORMAT.header_bytes) % 64 == 0
    room = Buffer(FORMAT.plain_bytes)
    again = envelope.open("name", memoryview(whole), room.view)
    assert bytes(again) == bytes(plain)


def test_nothing_of_a_sealed_object_can_be_read() -> None:
    whole = bytes(written(ENVELOPES[1]))
    assert b"some model" in bytes(written(ENVELOPES[0]))
    assert not any(text in whole for text in (b"some model", b"KVBM run", RUN.keys[0], RUN.keys[-1][:8]))
    assert whole != bytes(written(ENVELOPES[1])), "another salt each time"


@pytest.mark.parametrize("envelope", ENVELOPES)
def test_every_bit_of_a_header_counts(envelope: Envelope) -> None:
    whole = written(envelope)
    end = len(whole) if envelope.sealed else PLAIN_AT + FORMAT.header_bytes
    for at in range(end) if not envelope.sealed else random.Random(1).sample(range(end), 300):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        with pytest.raises(Damaged):
            FORMAT.parse(envelope.open("name", memoryview(changed)))


@pytest.mark.parametrize("envelope", ENVELOPES)
def test_every_length_counts(envelope: Envelope) -> None:
    whole = written(envelope)
    for length in [*range(200), *range(len(whole) - 20, len(whole))]:
        with pytest.raises(Damaged):
            FORMAT.parse(envelope.open("name", memoryview(whole)[:length]))
    with pytest.raises(Damaged):
        FORMAT.parse(envelope.open("name", memoryview(whole + b"x")))


def test_whether_it_has_to_be_sealed_is_the_readers() -> None:
    plain, sealed = written(ENVELOPES[0]), written(ENVELOPES[1])
    with pytest.raises(Damaged, match="not sealed"):
        ENVELOPES[1].open("name", memoryview(plain))
    with pytest.raises(Damaged, match="no secret"):
        ENVELOPES[0].open("name", memoryview(sealed))
    with pytest.raises(Damaged, match="another secret"):
        Envelope(b"another secret, long enough").open("name", memoryview(sealed))
    with pytest.raises(Damaged):
        ENVELOPES[1].open("other name", memoryview(sealed))


def test_another_namespaces_run_is_none_of_ours() -> None:
    plain = ENVELOPES[0].open("name", memoryview(written(ENVELOPES[0])))
    for other in (
        RunFormat("other fingerprint", SHAPE), RunFormat("fingerprint", Shape(4, 1, 512)),
        RunFormat("fingerprint", Shape(2, 2, 512)), RunFormat("fingerprint", Shape(4, 2, 1024)),
    ):  # fmt: skip
        with pytest.raises(Damaged):
            other.parse(plain)
    assert RunFormat("fingerprint", SHAPE, "another name of it").parse(plain).keys == RUN.keys


def test_hostile_lengths_allocate_nothing() -> None:
    header = bytearray(FORMAT.header(RUN))
    for at in (8, 10, 16, 24, 28):
        for value in (0xFF, 0x7F, 0):
            changed = bytearray(header)
            changed[at : at + 8] = bytes([value]) * 8
            tracemalloc.start()
            with pytest.raises(Damaged):
                FORMAT.parse(memoryview(changed))
            assert tracemalloc.get_traced_memory()[1] < 100_000
            tracemalloc.stop()


def test_a_key_that_is_there_twice_is_damage() -> None:
    """Host memory has one place for a key."""
    shape = Shape(4, 1, 64)
    format_ = RunFormat("namespace", shape)
    header = format_.header(Run((b"k" * 32,) * 4, None, 0, bytes(4), np.zeros((1, 4), np.uint64)))
    with pytest.raises(Damaged, match="twice"):
        format_.parse(memoryview(header + bytes(shape.data_bytes)))


def test_random_bytes_are_damaged() -> None:
    dice = random.Random(7)
    for _ in range(2000):
        data = bytearray(dice.randbytes(dice.randrange(600)))
        if dice.random() < 0.5:
            data[: len(header)] = (header := written(ENVELOPES[0])[: dice.randrange(300)])
        for envelope in ENVELOPES:
            with pytest.raises(Damaged):
                FORMAT.parse(envelope.open("name", memoryview(data)))
        with pytest.raises(Damaged):
            decode(ENVELOPES[1].unwrap("name", data))


def test_headers_with_what_does_not_fit_are_misuse() -> None:
    for keys in (RUN.keys[:3], (*RUN.keys[:3], b"short"), tuple(b"x" * 33 for _ in range(4)), (b"",) * 4):
        with pytest.raises(Misuse):
            FORMAT.header(RUN._replace(keys=keys))


@pytest.mark.parametrize("envelope", ENVELOPES)
def test_notes(envelope: Envelope) -> None:
    note = Note([bytes([1]) * 16, bytes([2]) * 16], [bytes([3]) * 16])
    text = envelope.wrap("feed", note.encode())
    assert decode(envelope.unwrap("feed", text)) == Note([*note.came], [*note.went])
    with pytest.raises(Damaged):
        envelope.unwrap("another", text)
    for at in range(len(text)):
        changed = bytearray(text)
        changed[at] ^= 4
        with pytest.raises(Damaged):
            decode(envelope.unwrap("feed", changed))


def test_names_tell_nothing_and_are_ours() -> None:
    one, other = Names(Envelope(SECRET).key("x")), Names(Envelope(b"another secret, long enough").key("x"))
    digest = one.digest(RUN.keys[0])
    assert len(digest) == 16
    assert digest != other.digest(RUN.keys[0])
    assert RUN.keys[0].hex()[:8] not in one.run(digest)
    found = parse(one.run(digest))
    assert found is not None
    assert (found.kind, found.space, found.digest) == ("run", one.space, digest)
    feed = parse(one.feed(7, "0123456789abcdef", 3, 100))
    assert feed is not None
    assert (feed.kind, feed.epoch, feed.mb, feed.writer) == ("feed", 7, 100, "0123456789abcdef")
    touch = parse(one.touch(7, "0123456789abcdef", 3))
    assert touch is not None
    assert (touch.kind, touch.epoch) == ("touch", 7)
    assert (epoch(599.9), epoch(600.0)) == (0, 1)
    for strange in (
        "kv1/readme", "kv1/0123456789abcdef/00/01" + "0" * 30, one.run(digest) + "x", "x" + one.run(digest),
        one.run(digest).upper(), "kv1/gc/x", "kv1/gc/1/2", "kv1/feed/1/x", "kv1/../etc", one.run(digest) + "\n",
    ):  # fmt: skip
        assert parse(strange) is None, strange


def test_run_lengths() -> None:
    assert run_blocks(1_474_560, 32) == 5
    assert run_blocks(2 << 20, 16) == 4
    assert run_blocks(100, 32) == 16
    assert run_blocks(64 << 20, 16) == 1
    assert run_blocks(100, 1024) == 1


def test_secrets(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_secret(path)
    path.write_bytes(b"short\n")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="at least 16"):
        read_secret(path)
    path.write_bytes(SECRET + b"\n")
    assert read_secret(path) == SECRET
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_secret(path)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match="no ordinary file"):
        read_secret(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
