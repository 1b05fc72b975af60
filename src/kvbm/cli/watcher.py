"""Ends a process group whose owner died. Run as a file, which imports nothing of KVBM, by two processes at a pipe:

`watcher.py start FD COMMAND...` writes its number into the pipe and becomes the command, the leader of the group. Only
then its end closes: whenever the owner, who has the same end, is killed, the number comes before the end of the pipe.

`watcher.py watch PATIENCE_S` reads the pipe, in a session of its own, which no signal to the owner's group reaches. The
owner writes "over" where it has ended the group itself. Else, when the pipe ends, the leader is asked to end, and what
is left of the group after so many seconds is killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress


def start(pipe: int, command: list[str]) -> None:
    os.set_inheritable(pipe, False)
    with suppress(OSError):  # somebody killed the watcher
        os.write(pipe, f"{os.getpid()}\n".encode())
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and what is ignored stays so
        signal.signal(number, signal.SIG_DFL)
    os.execv(command[0], command)


def watch(patience_s: float) -> None:
    said = sys.stdin.read().split()
    if not said or said[-1] == "over":
        return
    number, deadline = int(said[0]), time.monotonic() + patience_s
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
    match sys.argv[1:]:
        case ["start", pipe, *command]:
            start(int(pipe), command)
        case ["watch", patience_s]:
            watch(float(patience_s))
