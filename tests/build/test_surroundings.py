"""Surroundings that are not the usual ones: more open files than `select` can tell apart, folders of any name."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kvbm.cli.control import ask_all
from kvbm.link.channel import readable
from tests.build.whole import Engine


@pytest.fixture
def crowded() -> Iterator[None]:
    """Whatever is opened from now on has a number above 1,024."""
    gc.collect()  # or what earlier tests left open is closed meanwhile, and its number is given out
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    yield
    for descriptor in taken:
        os.close(descriptor)


@pytest.mark.usefixtures("crowded")
def test_leader_workers_and_control_socket_work(tmp_path: Path) -> None:
    """Blocks go down to disk and come back; `kvbm status` gets its answer."""
    with closing(Engine(tmp_path, ranks=2)) as engine:
        assert min(link.fileno() for link in engine.leader.core.links.values()) > 1024
        keys = [bytes([number]).ljust(32) for number in range(4)]
        assert [engine.serve(keys), engine.serve(keys)] == [0, len(keys)]
        engine.settle()
        (answer,) = ask_all(tmp_path, "status")
        assert answer.result is not None
        assert answer.result["healthy"]
        assert answer.result["demote"]["blocks"] == len(keys)


@pytest.mark.parametrize("name", ["donn\xe9es-\u65e5\u672c", "two words"])
def test_folders_may_have_any_name(tmp_path: Path, name: str) -> None:
    """Sockets and the disk tier in a folder whose name is not ASCII, found again after a restart."""
    keys = [bytes([number]).ljust(32) for number in range(4)]
    folder = tmp_path / name
    for found in (0, len(keys)):
        with closing(Engine(folder)) as engine:
            assert engine.serve(keys) == found
            engine.settle()
            assert ask_all(folder, "health")[0].result is not None


def test_what_is_closed_is_ready_at_once() -> None:
    """So that who waits for it hears of it."""
    one, two = socket.socketpair()
    assert readable([one], 0) == set()
    two.sendall(b"x")
    assert readable([one, two], 10) == {one.fileno()}
    two.close()
    assert readable([two], 10) == {-1}
    one.close()
