"""What was found wrong, written down for people: one JSON file each, readable by its owner alone."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

KEPT = 100
"""Files that stay; the oldest go."""


class Reports:
    """Of one engine, in a folder of its user's."""

    def __init__(self, folder: Path, engine: str) -> None:
        self._folder, self._engine = folder, engine
        self._writing: threading.Thread | None = None

    def save(self, kind: str, content: Mapping[str, Any]) -> Path:
        """Where it will be. Written on a thread of its own: the thread that found it may be the engine's."""
        now = time.time()
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
        path = self._folder / f"{kind}-{stamp}-{now % 1 * 1e6:06.0f}-{self._engine[:40]}.json"
        facts = {"kind": kind, "engine": self._engine, "when": now, **content}
        self._writing = threading.Thread(target=self._write, args=(path, facts), name="kvbm-report", daemon=True)
        self._writing.start()
        return path

    def wait(self, seconds: float) -> None:
        """Until what was saved last is written."""
        if self._writing is not None:
            self._writing.join(seconds)

    def _write(self, path: Path, facts: Mapping[str, Any]) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
                json.dump(facts, file, indent=2)
            for old in sorted(self._folder.glob("*.json"), key=lambda each: each.stat().st_mtime)[:-KEPT]:
                old.unlink(missing_ok=True)
        except (OSError, ValueError) as error:
            log.error("KVBM: the report %s cannot be written: %s", path, error)
