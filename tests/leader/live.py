"""`python -m tests.leader.live TRACE --g2 BLOCKS --g3 BLOCKS`: a trace through a leader as an engine has it, beside
what `kvbm replay` says of it.

The ranks answer at once, and the engine keeps nothing itself, so that what differs is what leader and tiers do. One
request after the other. Block hits over all block references, for both placements. Traces lie where KVBM_TRACES says.
"""

from __future__ import annotations

import argparse
import sys
import time

from kvbm.abc.policy import Placement
from kvbm.cli.replay.run import replay
from kvbm.cli.replay.trace import Workload, find, interleave, read
from kvbm.core import config
from kvbm.policy.lru import LRU
from kvbm.policy.placements import Exclusive, WriteThrough
from kvbm.tiers.disk.orders import Read, Write
from tests.leader.roles import BLOCK_TOKENS, Stage


def live(workload: Workload, g2: int, g3: int, *, exclusive: bool) -> int:
    """Blocks that were found, in host memory or on disk."""
    stage = Stage(g2, shares=True, load_min_tokens=0, held_share=1.0)
    stage.add_disk(g3, exclusive=exclusive, in_flight=g3, batch=64, most=g2)
    leader, hits = stage.leader, 0

    def answer() -> None:
        """Everything that is being moved ends well."""
        while moves := stage.hear(Read) + stage.hear(Write):
            for move in moves:
                stage.moved(move)
            leader.core.tick()

    for number, prompt in enumerate(workload.prompts):
        name, keys = f"r{number}", [workload.keys[block] for block in prompt.blocks.tolist()]
        keys = keys[:g2]  # of what is longer the first blocks only, as the replay does
        stage.begin(name, keys, tokens=(len(keys) + 1) * BLOCK_TOKENS)
        answer()
        while (found := leader.match(name, 0, len(keys))) is None:
            answer()
        hits += found
        blocks = list(range(1, len(keys) + 1))
        stage.place(name, blocks, found)
        for copy in stage.step(reuse=blocks[found:]).loads:
            stage.answer(copy)
        leader.core.tick()
        for copy in stage.step({name: len(keys)}).stores:
            stage.answer(copy)
        leader.core.tick()
        leader.finish(name, blocks, len(keys))
        for copy in stage.step().stores:
            stage.answer(copy)
        leader.core.tick()
        answer()
    stage.close()
    return hits


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.leader.live", description=__doc__)
    parser.add_argument("trace")
    parser.add_argument("--g2", type=int, required=True)
    parser.add_argument("--g3", type=int, required=True)
    given = parser.parse_args()
    workload = interleave([read(find(given.trace, config.load().settings.traces))])
    references = sum(len(prompt.blocks) for prompt in workload.prompts)
    placements: dict[str, Placement] = {"write-through": WriteThrough(), "exclusive": Exclusive()}
    for name, placement in placements.items():
        said = replay(workload, {"g2": given.g2, "g3": given.g3}, "lru", LRU, placement, lambda *_: None)
        begun = time.monotonic()
        hits = live(workload, given.g2, given.g3, exclusive=name == "exclusive")
        rate = references / (time.monotonic() - begun)
        print(f"{name}: replay {said.hit_blocks / references:.3f}, engine {hits / references:.3f}; {rate:,.0f} refs/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
