"""Frames over a Unix socket, and the sockets' places."""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbm.core.errors import Broken, ConfigError
from kvbm.link.channel import Link, connect, listen, socket_path
from kvbm.link.messages import Bye, Ready, Refused, Result, Sick, encode

Pair = tuple[Link, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    here, there = socket.socketpair()
    link = Link(here)
    yield link, there
    link.close()
    there.close()


def frame(message: object) -> bytes:
    body = encode(message)
    return struct.pack("<I", len(body)) + body


def test_frames_over_split_reads(pair: Pair) -> None:
    link, there = pair
    data = frame(Ready(1, 9)) + frame(Bye()) + frame(Sick(2, "x" * 1000))
    taken = []
    for at in range(0, len(data), 3):
        there.sendall(data[at : at + 3])
        taken += link.take()
    assert taken == [Ready(1, 9), Bye(), Sick(2, "x" * 1000)]
    assert link.take() == []
    assert link.open


def test_one_message_at_a_time(pair: Pair) -> None:
    link, there = pair
    there.sendall(frame(Ready(1, 9)) + frame(Ready(2, 9)) + frame(Ready(3, 9))[:5])
    assert link.wait(10) == Ready(1, 9)
    assert link.wait(0) == Ready(2, 9)
    assert link.wait(0) is None
    there.sendall(frame(Ready(3, 9))[5:])
    assert link.take() == [Ready(3, 9)]


def test_a_file_goes_with_its_message(tmp_path: Path) -> None:
    here, there = (Link(end) for end in socket.socketpair())
    with pytest.raises(Broken, match="a file was to come"):
        there.take_file()
    (tmp_path / "file").write_text("what is in it")
    with (tmp_path / "file").open() as file:
        here.send(Bye())
        here.send(Refused(1, "x" * 200_000), file.fileno())
        here.send(Ready(2, 9), file.fileno())
    assert there.wait(10) == Bye()
    assert there.wait(10) == Refused(1, "x" * 200_000)
    with os.fdopen(got := there.take_file()) as same:
        assert same.read() == "what is in it"
        assert not os.get_inheritable(got)
    assert there.wait(10) == Ready(2, 9)
    open_before = len(os.listdir("/proc/self/fd"))
    there.close()  # with what nobody took
    assert len(os.listdir("/proc/self/fd")) == open_before - 2
    here.close()


def test_both_ways_and_larger_than_a_read() -> None:
    ends = socket.socketpair()
    one, two = Link(ends[0]), Link(ends[1])
    messages = [Result(i, 0, bytes(200_000), 0, 0.0) for i in range(5)]
    sender = threading.Thread(target=lambda: [one.send(message) for message in messages])
    sender.start()
    assert [two.wait(30) for _ in messages] == messages
    sender.join(30)
    two.send(Bye())
    assert one.take() == [Bye()]
    one.close()
    two.close()


def test_many_threads_send(pair: Pair) -> None:
    link, there = pair
    threads = [threading.Thread(target=lambda i=i: [link.send(Ready(i, 9)) for _ in range(50)]) for i in range(4)]
    other = Link(there)
    for thread in threads:
        thread.start()
    got = [other.wait(30) for _ in range(200)]
    for thread in threads:
        thread.join(30)
    assert sorted(message.rank for message in got if isinstance(message, Ready)) == sorted([*range(4)] * 50)


def test_a_look_that_finds_nothing_keeps_the_gil(pair: Pair) -> None:
    link, _ = pair
    interval, over = sys.getswitchinterval(), threading.Event()

    def busy() -> None:
        while not over.is_set():
            pass

    other = threading.Thread(target=busy)
    sys.setswitchinterval(0.2)
    try:
        other.start()
        begun = time.monotonic()
        for _ in range(400):
            assert link.take() == []
        took = time.monotonic() - begun
    finally:
        over.set()
        sys.setswitchinterval(interval)
        other.join()
    assert took < 2  # a look that lets go of it waits 0.2 s each time that the other thread was quicker


def test_an_oversized_frame(pair: Pair) -> None:
    link, there = pair
    there.sendall(struct.pack("<I", (16 << 20) + 1))
    with pytest.raises(Broken, match="not a KVBM process"):
        link.take()
    assert not link.open


@pytest.mark.parametrize("body", [b"\xc1", b"", encode({"type": "Unknown"})])
def test_a_frame_that_is_not_ours(pair: Pair, body: bytes) -> None:
    link, there = pair
    there.sendall(struct.pack("<I", len(body)) + body)
    with pytest.raises(Broken, match="not KVBM's"):
        link.wait(10)
    assert not link.open


def test_the_other_side_is_gone(pair: Pair) -> None:
    link, there = pair
    there.sendall(frame(Bye()))
    there.close()
    assert link.take() == [Bye()]
    assert link.take() == []
    assert not link.open
    with pytest.raises(Broken):
        link.wait(1)
    with pytest.raises(Broken):
        link.send(Bye())


def test_the_other_side_left_with_something_unread(pair: Pair) -> None:
    link, there = pair
    link.send(Bye())
    there.close()
    with pytest.raises(Broken):
        link.wait(10)
    assert not link.open


def test_a_link_that_was_closed_here(pair: Pair) -> None:
    link, _ = pair
    link.close()
    with pytest.raises(Broken):
        link.wait(1)
    assert link.take() == []


def test_the_path_must_fit(tmp_path: Path) -> None:
    assert socket_path(tmp_path, "e", ".sock") == tmp_path / "e.sock"
    fits = 107 - len(str(tmp_path)) - len("/.sock")
    socket_path(tmp_path, "e" * fits, ".sock")
    with pytest.raises(ConfigError, match=r"run_dir.*longer than 107 bytes\. Choose a shorter folder\."):
        socket_path(tmp_path, "e" * (fits + 1), ".sock")


def test_only_the_owner_gets_in(tmp_path: Path) -> None:
    path = tmp_path / "run" / "e.chan"
    with listen(path):
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="no socket can be made"):
        listen(tmp_path / "file" / "e.chan")


def test_a_dead_engines_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "e.chan"
    with listen(path) as dead:
        dead.shutdown(socket.SHUT_RDWR)  # also for a process that another thread is just forking
    assert path.exists()
    with listen(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_living_engines_socket_is_not(tmp_path: Path) -> None:
    path = tmp_path / "e.chan"
    with listen(path), pytest.raises(Broken, match="another engine already listens"):
        listen(path)


def test_the_leader_may_come_later(tmp_path: Path) -> None:
    path = tmp_path / "e.chan"
    tries = 0

    def stop() -> bool:
        nonlocal tries, sock
        tries += 1
        if tries == 2:
            sock = listen(path)
        return False

    sock: socket.socket | None = None
    link = connect(path, 30, stop)
    assert sock is not None
    sock.close()
    link.close()


def test_a_leader_that_does_not_come(tmp_path: Path) -> None:
    with pytest.raises(Broken, match="no leader answered"):
        connect(tmp_path / "e.chan", 0)
    with pytest.raises(Broken, match="no leader answered"):
        connect(tmp_path / "e.chan", 600, lambda: True)


def test_a_folder_others_may_write_in_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="others may write"):
        listen(tmp_path / "e.sock")
    assert list(tmp_path.iterdir()) == []


def test_what_killed_engines_left_is_removed(tmp_path: Path) -> None:
    for name, age in (("old.sock", 3600), ("old.chan", 3600), ("young.sock", 0)):
        listen(tmp_path / name).close()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with listen(tmp_path / "mine.sock") as living:
        os.utime(tmp_path / "mine.sock", (0, 0))
        with listen(tmp_path / "other.sock"):
            assert {path.name for path in tmp_path.iterdir()} == {"young.sock", "mine.sock", "other.sock"}
        assert living.fileno() > 0
