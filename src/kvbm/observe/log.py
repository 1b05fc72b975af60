"""KVBM's log lines in processes whose engine configures only its own loggers."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable


def configure() -> None:
    """Sends KVBM's messages from INFO on to stderr, unless the application has handlers of its own for them."""
    logger = logging.getLogger("kvbm")
    if logger.hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter(f"(kvbm pid={os.getpid()}) %(levelname)s %(asctime)s %(message)s", "%m-%d %H:%M:%S")
    )
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


class Seldom:
    """Warnings of one kind that others can cause: at most one in `every_s` seconds, which says how many were left out.
    One thread."""

    def __init__(self, log: logging.Logger, every_s: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._every, self._clock = log, every_s, clock
        self._next = -every_s
        self._left_out = 0

    def warning(self, text: str, *args: object) -> None:
        """As a logger's."""
        if (now := self._clock()) < self._next:
            self._left_out += 1
            return
        more = f" ({self._left_out} like it since the last such line)" if self._left_out else ""
        self._log.warning(text + more, *args)
        self._next, self._left_out = now + self._every, 0
