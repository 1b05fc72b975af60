"""Damaged runs in shared storage: none is served, and each is whole again once its prompt was computed.

python -m tests.tiers.objects.damage --count 10000
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.leader.roles import keys_of
from tests.tiers.objects.test_whole import Sharing, objects

KINDS = ("bit", "cut", "exchanged", "random", "empty", "header", "longer")


def damaged(whole: Mapping[Path, bytes], path: Path, dice: random.Random) -> tuple[str, bytes]:
    """What is done to a run, and what then lies there: never what was there."""
    data, kind = bytearray(whole[path]), dice.choice(KINDS)
    match kind:
        case "bit":
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        case "cut":
            del data[dice.randrange(len(data)) :]
        case "exchanged":
            data[:] = whole[dice.choice([other for other in whole if other != path])]
        case "random":
            data[:] = os.urandom(len(data))
        case "empty":
            data.clear()
        case "header":
            at = dice.randrange(300)
            data[at : at + 8] = bytes(byte ^ dice.randrange(1, 256) for byte in data[at : at + 8])
        case "longer":
            data += os.urandom(dice.randrange(1, 100))
    return kind, bytes(data)


def heal(engine: Sharing, prompts: Sequence[Sequence[bytes]], whole: Mapping[Path, bytes]) -> None:
    """The engine serves these prompts, and looks at every byte of them, until all runs are what they were."""
    deadline = time.monotonic() + 30
    while any(not path.exists() or path.read_bytes() != data for path, data in whole.items()):
        assert time.monotonic() < deadline
        for keys in prompts:  # behind a damaged run nothing is read: that is found the next time
            engine.leader.core.pool.discard(keys)
            engine.serve(keys)
        engine.stored()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    given = parser.parse_args()
    dice, kinds, begun = random.Random(given.seed), Counter[str](), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = Sharing(folder, f"file://{folder}/shared").works()
        prompts = [keys_of(f"{number}", 8) for number in range(5)]
        for keys in prompts:
            engine.serve(keys)
        engine.stored()
        whole = {path: path.read_bytes() for path in objects(folder)}
        while kinds.total() < given.count:
            for path in whole:
                kind, data = damaged(whole, path, dice)
                path.write_bytes(data)
                kinds[kind] += 1
            heal(engine, prompts, whole)
        corrupt, took = engine.g4.corrupt, time.monotonic() - begun
        engine.close()
    print(f"seed {given.seed}: {kinds.total():,} runs damaged ({dict(sorted(kinds.items()))}); none was served,")
    print(f"{corrupt:,} blocks were found damaged, each run was whole again once its prompt was computed; {took:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
