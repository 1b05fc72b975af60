"""Where a server listens, found from a process below it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from kvbm.cli import address

CHILD = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"


def test_the_address_of_the_process_above() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as core,
    ):
        host, port = server.getsockname()
        assert address.of(core.pid) == f"{host}:{port}"
        assert core.stdin is not None
        core.stdin.close()


def test_what_listens_below_it_is_no_server() -> None:
    """An engine's core serves metrics, and other instances."""
    listens = (
        "import os, socket, sys; s = socket.create_server(('127.0.0.1', 0)); print(1, flush=True); sys.stdin.read()"
    )
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        subprocess.Popen([sys.executable, "-c", listens], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as core,
    ):
        assert core.stdin is not None
        assert core.stdout is not None
        core.stdout.readline()
        assert address.of(core.pid) == f"127.0.0.1:{server.getsockname()[1]}"
        core.stdin.close()


def test_ipv6() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        assert address.of(os.getpid()) == f"[::1]:{server.getsockname()[1]}"


def test_a_process_that_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    assert address.of(ended.pid) == ""
