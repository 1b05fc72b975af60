"""Around what vLLM calls in its server's process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

log = logging.getLogger(__name__)


def harmless(call: Callable[..., None]) -> Callable[..., None]:
    """What the call raises is logged once, and goes no further."""
    told = False

    @wraps(call)
    def guarded(*args: Any, **kwargs: Any) -> None:
        nonlocal told
        try:
            call(*args, **kwargs)
        except Exception:
            if not told:
                told = True
                log.exception("KVBM: %s went wrong", call.__qualname__)

    return guarded
