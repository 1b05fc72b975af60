"""``kvbm disk`` on the folder that a running engine uses: what is in it, reading all of it, emptying it."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from kvbm.core.errors import Broken
from kvbm.leader.core import Core
from kvbm.stores.disk.files import reported
from kvbm.stores.disk.meta import delete, listed
from kvbm.tiers.disk.orders import TIER
from kvbm.tiers.disk.side import DiskSide
from kvbm.tiers.stack import Stack

log = logging.getLogger(__name__)


class DiskCommands:
    """Answers are for JSON. On the control thread.

    Every method raises LookupError with a sentence where it cannot be done.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._purging: threading.Thread | None = None
        self._left: dict[str, str] = {}

    def inspect(self) -> dict[str, Any]:
        """What this engine has there now."""
        with self._core.below() as lower:
            folder, disk = self._there(lower)
            pool = disk.tier.pool.statistics()
            return {
                "folder": str(folder),
                "slots": pool.total,
                "blocks": pool.registered,
                "corrupt": disk.tier.corrupt,
                "problem": disk.tier.problem,
            }

    def verify(self, action: str | None) -> dict[str, Any]:
        """How far the last verification is; `begin` starts one unless one is going on, `stop` ends it."""
        with self._core.below() as lower:
            _, disk = self._there(lower)
            health = self._core.health
            aside = health.problems[0] if health.problems else "paused" if health.paused else None
            if action == "begin" and aside is None:
                disk.verify(self._core.pool)
            if (run := disk.verification) is None:
                raise LookupError(f"KVBM stands aside: {aside}" if aside else "no verification was begun")
            if action == "stop" or aside:
                run.end(aside or "stopped")
            counts = {name: getattr(run, name) for name in ("slots", "looked", "whole", "bad", "unread", "problem")}
            return counts | {"running": not run.over}

    def purge(self, names: object) -> dict[str, Any]:
        """Begin to delete a list of namespaces of the folder; None: how far that is. Its own is emptied and stays."""
        with self._core.below() as lower:
            folder, disk = self._there(lower)
            if isinstance(names, list):
                if self._purging is not None and self._purging.is_alive():
                    raise LookupError("a purge is going on already")
                if folder.name in names and lower is not None:
                    lower.purge(disk.name)
                self._left = {}
                others = set(map(str, names)) - {folder.name}
                self._purging = threading.Thread(
                    target=self._delete, args=(folder.parent, others), name="kvbm-purge", daemon=True
                )
                self._purging.start()
            running = disk.tier.clearing or (self._purging is not None and self._purging.is_alive())
            return {"running": running, "left": dict(self._left), "problem": disk.tier.problem}

    def _there(self, lower: Stack | None) -> tuple[Path, DiskSide]:
        disk = lower.tiers.get(TIER) if lower is not None else None
        if not isinstance(disk, DiskSide) or disk.folder is None:
            raise LookupError("this engine has no disk tier")
        return disk.folder, disk

    def _delete(self, folder: Path, names: set[str]) -> None:
        """On a thread of its own. No other process can use them: this one has the folder's lock."""
        for name in sorted(names):
            try:
                with reported(f"delete {folder / name}"):
                    for one in listed(folder):
                        if one.path.name == name:
                            delete(one.path)
            except Broken as error:
                log.warning("KVBM: %s", error)
                self._left[name] = str(error)
