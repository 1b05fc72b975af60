"""KVBM's log lines in processes whose engine configures only its own loggers."""

from __future__ import annotations

import logging
import os


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
