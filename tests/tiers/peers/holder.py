"""An instance in a process of its own, for tests that kill it, freeze it, or put it into a network of its own.

`python -m tests.tiers.peers.holder PATH NAME URL SECRET HOST PROMPT BLOCKS` computes a prompt's blocks (0: none),
says "ready", and serves them until its stdin ends. A line "PROMPT BLOCKS" there is a request: the answer is how many
blocks were loaded, in how many seconds, and how many slots something may still write to. After the line "starve" it
has no byte of memory left.
"""

from __future__ import annotations

import json
import os
import resource
import select
import sys
import time
from pathlib import Path

from tests.build.whole import Engine
from tests.leader.roles import keys_of
from tests.tiers.peers.conftest import peers_of


def main(path: str, name: str, url: str, secret: str, host: str, prompt: str, blocks: str) -> None:
    """See the module."""
    engine = Engine(
        Path(path), engine=name, g3_blocks=None, directory=url, peer_secret_file=secret, directory_lease_s=1.0,
        g2_blocks=64, peer_host=host,
    )  # fmt: skip
    if int(blocks):
        engine.serve(keys_of(prompt, int(blocks)))
    peers = peers_of(engine)
    engine.until(lambda: peers.network.server.slabs[0] and not peers.published.pending and not peers.network.problem)
    print("ready", flush=True)
    while True:
        engine.leader.core.tick()
        if not select.select([sys.stdin], [], [], 0.02)[0]:
            continue
        if not (line := sys.stdin.readline()):
            break
        if line == "starve\n":
            starve()
            continue
        wanted, count = line.split()
        engine.leader.core.pool.discard(keys_of(wanted, int(count)))
        begun = time.monotonic()
        found = engine.serve(keys_of(wanted, int(count)))
        answer = {
            "found": found, "seconds": time.monotonic() - begun, "staged": engine.leader.core.pool.statistics().staged,
            "peers": len(peers.network.peers),
        }  # fmt: skip
        print(json.dumps(answer), flush=True)
    engine.close()


def starve() -> None:
    """Take all memory there is, down to the smallest pieces, and keep it: what needs some, on any thread, fails."""
    os.write(1, b"starved\n")
    resource.setrlimit(resource.RLIMIT_AS, (0, resource.RLIM_INFINITY))
    kept: list[bytes] = [b""] * 1_000_000
    place = 0
    for size in (1 << 20, 1 << 16, 1 << 12, 400, 32):
        try:
            while True:
                kept[place] = bytes(size)
                place += 1
        except (MemoryError, IndexError):
            pass
    select.select([], [], [])


if __name__ == "__main__":
    main(*sys.argv[1:])
