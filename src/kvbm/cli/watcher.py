"""Ends a process group whose owner died: `python watcher.py PATIENCE_S`, with a pipe from the owner as its input.

The owner writes the group's number, and later "over" where it has ended the group itself. If the pipe ends before that,
the owner was killed: the leader is asked to end, and what is left of the group after so many seconds is killed. Run as
a file, in a session of its own: it imports nothing of KVBM, and no signal to the owner's group reaches it."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress


def main(patience_s: float) -> None:
    group, _, rest = sys.stdin.read().partition("\n")
    if not group or rest.startswith("over"):
        return
    number, deadline = int(group), time.monotonic() + patience_s
    try:
        with suppress(ProcessLookupError):  # the leader may be gone, and others of the group not
            os.kill(number, signal.SIGTERM)
        while time.monotonic() < deadline:
            os.killpg(number, 0)
            time.sleep(0.05)
        os.killpg(number, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    main(float(sys.argv[1]))
