"""An engine that computes prompts and writes them to shared storage until it is killed.

Arguments: the folder, and the first prompt's number.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from tests.leader.roles import keys_of
from tests.tiers.objects.test_whole import Sharing


def main() -> None:
    folder, first = Path(sys.argv[1]), int(sys.argv[2])
    own = folder / f"writer {first}"
    own.mkdir()
    engine = Sharing(own, f"file://{folder}/shared").works()
    for number in itertools.count(first):
        engine.serve(keys_of(f"prompt {number}", 12))
        print(number, flush=True)


if __name__ == "__main__":
    main()
