"""When vLLM made an engine's configuration. Before that it has loaded none of its weights; and where one process runs
several engines one after the other, its own beginning says too little."""

from __future__ import annotations

import sys
from typing import Any

from kvbm.stores.stamps import now, process_start

_NAME = "_kvbm_configured"
_DEEP = 8
"""Frames between vLLM's look-up of the connector's class and the configuration that it is for."""


def note() -> None:
    """Called when the connector's class is looked up, the first time of each engine while `VllmConfig` is made: the
    moment goes with the part of the configuration that is about the connector."""
    frame, transfer = sys._getframe(1), None
    for _ in range(_DEEP):
        if frame.f_back is None:
            return
        frame = frame.f_back
        if transfer is None:
            transfer = frame.f_locals.get("kv_transfer_config")
        if frame.f_code.co_name == "__post_init__" and type(frame.f_locals.get("self")).__name__ == "VllmConfig":
            if transfer is not None and not hasattr(transfer, _NAME):
                object.__setattr__(transfer, _NAME, now())
            return


def began(config: Any) -> int:
    """When nothing of this engine's weights had been read in this process yet, in nanoseconds since 1970; 0: unknown.
    Remote code runs before there is a configuration."""
    process = process_start()
    if config.model_config.trust_remote_code or not process:
        return process
    return max(process, int(getattr(config.kv_transfer_config, _NAME, 0)))
