"""What a server writes, passed on as it comes, and its last error, which is somewhere in the last few hundred lines."""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from contextlib import suppress
from typing import IO, Final, TextIO

_LINES: Final = 2000
_LONGEST: Final = 4096
_WAIT_S: Final = 1.0
_COLOURS: Final = re.compile(r"\x1b\[[0-9;]*m")
_ERROR: Final = re.compile(r"(?:^|[\])] )(?:[A-Za-z_][\w.]*\.)?([A-Za-z_]\w*(?:Error|Exception): .+)$|: error: (.+)$")
"""The last line of a traceback, bare or in a log, and what argparse says."""
_VAGUE: Final = ("See root cause above", "Engine core initialization failed")
_FOLLOWED: Final = "validation error"
"""Pydantic says what is wrong on a line of its own."""


class Tail:
    """Of one server. `follow` its streams once; `reason` once it has ended."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._threads: list[threading.Thread] = []

    def follow(self, source: IO[bytes], target: TextIO) -> None:
        """Passes on what comes, until nobody writes there any more."""
        thread = threading.Thread(target=self._pass_on, args=(source, target), daemon=True)
        thread.start()
        self._threads.append(thread)

    def _pass_on(self, source: IO[bytes], target: TextIO) -> None:
        rest = b""
        with source:
            while piece := os.read(source.fileno(), 1 << 16):
                with suppress(OSError, ValueError):  # nobody reads: the server is not to wait for that
                    target.buffer.write(piece)
                    target.buffer.flush()
                *lines, rest = re.split(rb"[\r\n]+", rest + piece)
                rest = rest[-_LONGEST:]
                self._lines.extend(line[-_LONGEST:].decode("utf-8", "replace") for line in lines)

    def reason(self) -> str:
        """The last error that says what it is about, empty where there is none."""
        for thread in self._threads:
            thread.join(_WAIT_S)  # what the server started may live on, and keep its streams
        lines = [_COLOURS.sub("", line) for line in self._lines]
        for at in reversed(range(len(lines))):
            found = _ERROR.search(lines[at])
            if found is None or any(words in lines[at] for words in _VAGUE):
                continue
            said = (found[1] or found[2]).strip()
            if _FOLLOWED in said:
                values = (line.partition("Value error, ")[2] for line in lines[at + 1 : at + 6])
                said = next((value for value in values if value), said)
            return said
        return ""
