"""Where an engine's server listens, as the system knows it: no engine tells its connector."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Final

_LISTEN: Final = "0A"
_DEPTH: Final = 4
"""Processes between an engine's core and the server that started it, at most."""


def of(pid: int, proc: Path = Path("/proc")) -> str:
    """The address of the server above this process, "127.0.0.1:8000", or of this one, which may listen for scrapers and
    other instances, too; empty where none is found or may be seen."""
    own = _listening(pid, proc)
    for _ in range(_DEPTH):
        try:
            pid = int((proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
        if pid <= 1:
            break
        if addresses := _listening(pid, proc):
            return addresses[0]
    return own[0] if own else ""


def _listening(pid: int, proc: Path) -> list[str]:
    """TCP addresses on which a process waits for connections and that are not its alone, lowest port first."""
    inodes = set()
    with suppress(OSError):
        for entry in os.scandir(proc / str(pid) / "fd"):
            with suppress(OSError):
                target = os.readlink(entry.path)
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
    found = []
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        with suppress(OSError):
            for line in (proc / str(pid) / "net" / name).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and fields[9] in inodes:
                    host, _, port = fields[1].partition(":")
                    words = [bytes.fromhex(host[at : at + 8])[::-1] for at in range(0, len(host), 8)]
                    text = socket.inet_ntop(family, b"".join(words))
                    found.append((int(port, 16), f"[{text}]" if ":" in text else text))
    return [f"{host}:{port}" for port, host in sorted(found)]
