"""The end of vLLM's engine: it takes its workers down before it tells a connector, so the signal is where to begin."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


def before_sigterm(last: Callable[[], None]) -> None:
    """On SIGTERM do `last` first, on a thread of its own while the engine goes on, then what was to be done anyway.

    A second SIGTERM does not wait. Only on the main thread; elsewhere nothing happens.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before is None:
        log.debug("KVBM: SIGTERM cannot be watched from here")
        return

    def run() -> None:
        try:
            last()
        except Exception:
            log.exception("KVBM: host memory was not written to disk")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def handler(*_: object) -> None:
        signal.signal(signal.SIGTERM, before)
        threading.Thread(target=run, name="kvbm-ending").start()

    signal.signal(signal.SIGTERM, handler)
