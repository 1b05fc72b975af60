"""Ports for the servers of tests."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack


def free_port(row: int = 1) -> int:
    """A port on loopback that nobody listens on; with `row`, the first of so many one after the other.

    Below those that the system gives to whoever asks for any: a server takes seconds to start, and what takes its port
    meanwhile can leave it waiting for ever.
    """
    for first in random.SystemRandom().sample(range(20_000, 32_000), 50):
        with ExitStack() as stack:
            try:
                for port in range(first, first + row):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise AssertionError("no free ports")
