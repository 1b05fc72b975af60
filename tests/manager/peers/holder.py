"""An instance in a process of its own, for tests that kill or freeze it.

`python -m tests.manager.peers.holder PATH NAME URL SECRET PROMPT BLOCKS` computes a prompt's blocks, says "ready", and
serves them until its stdin ends.
"""

from __future__ import annotations

import select
import sys
from pathlib import Path

from tests.manager.peers.conftest import peers_of
from tests.manager.roles import keys_of
from tests.manager.whole import Engine


def main(path: str, name: str, url: str, secret: str, prompt: str, blocks: str) -> None:
    """See the module."""
    engine = Engine(
        Path(path), engine=name, g3_blocks=None, directory=url, peer_secret_file=secret, directory_lease_s=1.0,
        g2_blocks=64,
    )  # fmt: skip
    keys = keys_of(prompt, int(blocks))
    engine.serve(keys)
    engine.until(lambda: peers_of(engine).network.server.slabs[0] and not peers_of(engine).published.pending)
    engine.until(lambda: peers_of(engine).network.problem is None)
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0.05)[0]:
        engine.leader.tick()
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
