"""The engine's control socket: `kvbm status`, `explain`, `pause`, `resume`, and the leader's housekeeping.

One JSON object per line in, one out. The thread also calls `Core.tick`, so results are taken and silent workers
noticed while the engine sleeps.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvbm.blocks import PoolStatistics
from kvbm.control.disk import DiskCommands
from kvbm.core.errors import Broken, ConfigError
from kvbm.leader.leader import Leader
from kvbm.leader.pace import SECONDS
from kvbm.link.channel import Link, listen, readable, socket_path
from kvbm.observe.names import DISK, SHOWN, WAYS, json_key
from kvbm.observe.prometheus import Sources
from kvbm.observe.totals import Copies, Totals

log = logging.getLogger(__name__)

_TICK = 0.25
_SILENT = 10.0
_CHECK_S = 3.0
"""The longest that `check` may take: clients wait for five seconds."""
_CLIENT_TIMEOUT = 2.0
_MAX_REQUEST = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True)
class About:
    """What does not change while the engine runs."""

    engine: str
    version: str
    ranks: int
    slot_bytes: int
    """Of one block, over all ranks."""
    block_tokens: int
    model: str = ""
    """What people call the model that the engine serves."""


class Control:
    """Answers on `<run_dir>/<engine>.sock`. `fingerprint` says what the namespace's is now, `shortage` why G2 stays
    smaller than it was to be. A socket that cannot be made is logged; the engine goes on without."""

    def __init__(
        self, leader: Leader, totals: Totals, about: About, run_dir: Path, fingerprint: Callable[[], str],
        shortage: Callable[[], str | None] = lambda: None,
    ) -> None:  # fmt: skip
        self._leader, self._core, self._totals, self.about = leader, leader.core, totals, about
        self._fingerprint, self._shortage = fingerprint, shortage
        self.disk = DiskCommands(leader.core)
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._sock: socket.socket | None = None
        self.path: Path | None = None
        try:
            self.path = socket_path(run_dir, about.engine, ".sock")
            self._sock = listen(self.path)
        except (ConfigError, Broken) as error:
            log.error("KVBM: no control socket, kvbm status and pause will not reach this engine: %s", error)
        self._thread = threading.Thread(target=self._run, name="kvbm-control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops answering and removes the socket."""
        self._stop.set()
        self._thread.join(_TICK + _CLIENT_TIMEOUT + 1)
        if self._sock is not None and self.path is not None:
            self._sock.close()
            self.path.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                watched: list[socket.socket | Link] = [*self._core.channels()]
                watched += [self._sock] if self._sock is not None else []
                ready = readable(watched, _TICK)
                if self._sock is not None and self._sock.fileno() in ready:
                    self._serve(self._sock.accept()[0])
                self._core.tick()
            except OSError as error:
                log.warning("KVBM: control socket: %s", error)
            except Exception:
                log.exception("KVBM: the control thread goes on after an error")

    def _serve(self, client: socket.socket) -> None:
        with client:
            client.settimeout(_CLIENT_TIMEOUT)
            line = b""
            while not line.endswith(b"\n") and len(line) < _MAX_REQUEST:
                piece = client.recv(4096)
                if not piece:
                    return
                line += piece
            client.sendall(json.dumps(self._answer(line)).encode() + b"\n")

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            command = self._commands()[request["command"]]
        except (ValueError, KeyError, TypeError):
            return {"ok": False, "error": f"not a request; commands are {', '.join(sorted(self._commands()))}"}
        try:
            return {"ok": True, "result": command(request)}
        except LookupError as error:
            return {"ok": False, "error": str(error.args[0])}

    def _commands(self) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
        return {
            "status": lambda _: self.status(),
            "health": lambda _: self.health(),
            "explain": lambda request: self.explain(str(request.get("request_id", ""))),
            "pause": lambda _: self._switch(self._core.pause),
            "resume": lambda _: self._switch(self._core.resume),
            "check": lambda _: {"engine": self.about.engine, **self._leader.check(_CHECK_S)},
            "disk.inspect": lambda _: self.disk.inspect(),
            "disk.verify": lambda request: self.disk.verify(request.get("action")),
            "disk.purge": lambda request: self.disk.purge(request.get("namespaces")),
        }

    def _switch(self, action: Callable[[], None]) -> dict[str, Any]:
        action()
        return {"engine": self.about.engine, "paused": self._core.health.paused}

    def health(self) -> dict[str, Any]:
        """Whether KVBM works, and if not why; tiers that are left alone, or not there, and why. Waits for nobody."""
        health, stack, shortage = self._core.health, self._core.lower.stack, self._shortage()
        problems, silent = list(health.problems), time.monotonic() - health.ticked
        if silent > _SILENT:
            problems.append(f"housekeeping has not been done for {silent:.0f} s")
        return {
            "engine": self.about.engine,
            "model": self.about.model,
            "healthy": not problems,
            "problems": problems,
            "degraded": self._core.lower.degraded(),
            "smaller": ({} if shortage is None else {"g2": shortage}) | (stack.limits() if stack is not None else {}),
            "paused": health.paused,
            "namesakes": [*stack.namesakes()] if stack is not None else [],
            "quarantined": health.quarantined,
            "last_check": self._leader.invariants.last,
        }

    def status(self) -> dict[str, Any]:
        """Everything live, in one snapshot."""
        leader, totals, about = self._leader, self._totals, self.about
        core = self._core
        core.tick()
        tiers = self._pools()
        pool = tiers["g2"]
        stores, loads = core.in_flight()
        return {
            **self.health(),
            "version": about.version,
            "pid": os.getpid(),
            "fingerprint": self._fingerprint(),
            "uptime_s": time.monotonic() - self._started,
            "generation": pool.generation,
            "ranks": about.ranks,
            "block_bytes": about.slot_bytes,
            "block_tokens": about.block_tokens,
            "tiers": [_tier(name, tier, about.slot_bytes) for name, tier in tiers.items()] + self._others(),
            "requests": totals.requests,
            "living_requests": len(leader.requests),
            "tokens": {
                "prompt": totals.prompt_tokens,
                "device": totals.device_tokens,
                "g2": totals.g2_tokens,
                **{json_key(tier): totals.sources[tier] for tier in self._named()},
                "pulled": totals.pulled_tokens,
            },
            "unread_requests": totals.unread,
            "hit_rate": {"g2": totals.hit_rate(), DISK: totals.disk_hit_rate()},
            "offload": {
                **_copies(totals.offload),
                "in_flight": stores,
                "skipped": core.counts.deferred,
                "dropped": core.counts.dropped,
            },
            "onboard": {**_copies(totals.onboard), "in_flight": loads, "gated": totals.gated_g2},
            "least_tokens": leader.detour.shown(),
            "evictions": pool.evictions,
            "engine_ms": leader.pace.summary(),
            "trust": self._trust(),
            **self._below(),
        }

    def sources(self) -> Sources:
        """What metrics are made of."""
        leader, core = self._leader, self._core
        return Sources(
            totals=self._totals,
            block_tokens=self.about.block_tokens,
            healthy=lambda: not core.health.problems,
            tiers=lambda: (
                dict.fromkeys([*self._pools(), *self._lower()], not core.health.problems)
                | dict.fromkeys(core.lower.degraded(), False)
            ),
            pools=lambda: {name: dataclasses.asdict(pool) for name, pool in self._pools().items()},
            lower=lambda: core.lower.stack.counts() if core.lower.stack is not None else {},
            trust=self._trust,
            quarantined=lambda: core.health.quarantined is not None,
            steps=lambda: (SECONDS, leader.pace.counts, leader.pace.total),
        )

    def _trust(self) -> dict[str, int]:
        shadow, violations = self._leader.shadow, self._leader.invariants.violations
        compared = dataclasses.asdict(shadow.counts) if shadow is not None else {}
        return {**compared, "violations": violations, "corrupt": self._core.counts.corrupt}

    def _pools(self) -> dict[str, PoolStatistics]:
        return {name: pool.statistics() for name, pool in self._core.pools().items()}

    def _named(self) -> list[str]:
        """Tiers that blocks may have come from."""
        return [*dict.fromkeys((*SHOWN, *self._lower()))]

    def _lower(self) -> list[str]:
        """Tiers below host memory."""
        stack = self._core.lower.stack
        return [*stack.tiers] if stack is not None else []

    def _others(self) -> list[dict[str, Any]]:
        """Tiers whose slots nobody here keeps account of."""
        with self._core.below() as lower:
            others = [] if lower is None else [tier for tier in lower if tier.pool is None]
            return [{"name": tier.name, "problem": tier.problem, **tier.counts()} for tier in others]

    def _below(self) -> dict[str, Any]:
        """What each tier says of itself, with what is counted of its copies."""
        with self._core.below() as lower:
            said = lower.status() if lower is not None else {}
        gated = {"gated": self._totals.gated - self._totals.gated_g2}
        ways: dict[str, Any] = {
            way: {**_copies(self._totals.way(way)), **said[way], **(gated if way == "promote" else {})}
            for way in WAYS
            if way in said
        }
        return {**said, **ways}

    def explain(self, request_id: str) -> dict[str, Any]:
        """What happened to one of the last requests. An engine may have added to the id its clients know, so a unique
        part of it is enough. Raises LookupError with a sentence."""
        records = self._leader.records
        names = [request_id] if request_id in records else [name for name in list(records) if request_id in name]
        if not request_id or not names:
            raise LookupError(f"no request {request_id!r} among the last {len(records)}")
        if len(names) > 1:
            raise LookupError(f"{len(names)} requests contain {request_id!r}: {', '.join(names[:8])}")
        record, tokens = records[names[0]], self.about.block_tokens
        return {
            "engine": self.about.engine,
            "request_id": record.request_id,
            "when": record.when,
            "prompt_tokens": record.prompt_tokens,
            "block_tokens": tokens,
            "device_tokens": record.device_blocks * tokens,
            "matched": {"g2": record.matched}
            | {name: record.staged.get(name, 0) for name in map(json_key, self._named())},
            "loaded_blocks": record.loaded,
            "load": record.load,
            "load_ms": record.load_ms,
            "outcome": record.outcome,
            "offloaded_blocks": record.offloaded,
            "why": list(record.why),
        }


def _tier(name: str, pool: PoolStatistics, slot_bytes: int) -> dict[str, Any]:
    counts = {count: getattr(pool, count) for count in ("total", "capacity", "free", "active", "inactive", "staged")}
    return {"name": name, **counts, "bytes": pool.total * slot_bytes}


def _copies(copies: Copies) -> dict[str, Any]:
    return {
        "blocks": copies.blocks,
        "bytes": copies.nbytes,
        "failed": copies.failed,
        "bytes_per_s": copies.bytes_per_s(),
    }
