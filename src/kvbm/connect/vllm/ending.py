"""The end of vLLM's engine: it takes its workers down before it tells a connector, so the signal is where to begin."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

_SAME_S = 1.0
"""What comes so soon after a SIGTERM is the same one: who signals a whole process group (systemd does) reaches the
engine twice, because vLLM's server hands it on."""


def before_sigterm(last: Callable[[], None]) -> None:
    """On SIGTERM do `last` first, on a thread of its own while the engine goes on, then what was to be done anyway.

    A second SIGTERM does not wait. Only on the main thread; elsewhere nothing happens.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before is None:
        log.debug("KVBM: SIGTERM cannot be watched from here")
        return
    first: float | None = None
    over = threading.Event()

    def run() -> None:
        try:
            last()
        except Exception:
            log.exception("KVBM could not finish its work before the end of the engine")
        finally:
            if not over.is_set():
                over.set()
                os.kill(os.getpid(), signal.SIGTERM)

    def handler(*_: object) -> None:
        nonlocal first
        now = time.monotonic()
        if first is None:
            first = now
            # A daemon: who is told to end at once does not wait for it.
            threading.Thread(target=run, name="kvbm-ending", daemon=True).start()
        elif over.is_set() or now - first > _SAME_S:
            over.set()
            signal.signal(signal.SIGTERM, before)
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, handler)
