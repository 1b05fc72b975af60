"""The demo's engines: started, waited for, killed."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvbm.cli import serve
from kvbm.cli.control import ask_all
from kvbm.cli.demo.client import Client
from kvbm.cli.launch import Server
from kvbm.core.errors import Broken, KvbmError

READY_WITHIN_S = 240.0
SETTLED_WITHIN_S = 10.0

Advance = Callable[[str], None]
"""Says what is done next."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A server that answers, and the seconds it took to start."""

    client: Client
    server: Server
    start_s: float
    run_dir: Path

    def status(self) -> dict[str, Any] | None:
        """What KVBM says of itself once its last copies have ended; None where there is none that answers."""
        deadline = time.monotonic() + SETTLED_WITHIN_S
        while True:
            try:
                status = ask_all(self.run_dir, "status")[0].result
            except KvbmError:
                return None
            if status is None or time.monotonic() > deadline:
                return status
            if not (status["offload"]["in_flight"] or status.get("demote", {}).get("in_flight")):
                return status
            time.sleep(0.1)


@dataclass(frozen=True, slots=True)
class Setup:
    """One way to run the engine. `settings` are KVBM's, None without it; `environment` is the engine's; `log` is a path
    without its ending."""

    name: str
    model: str
    arguments: list[str]
    log: Path
    settings: dict[str, str] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def start(self, advance: Advance, again: str = "") -> Iterator[Engine]:
        """Raises Broken when it does not start, or when it does not answer meanwhile."""
        log = self.log.with_name(f"{self.log.name}{again}.log")
        with tempfile.TemporaryDirectory(prefix="kvbm-demo-") as run_dir:
            environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "KVBM_RUN_DIR": run_dir}
            with_kvbm = self.settings is not None
            # Below those that the system gives to others while the engine starts.
            port = serve.free_port("127.0.0.1", random.randrange(20_000, 30_000))
            arguments = [*self.arguments, "--port", str(port)]
            launch = serve.plan(
                "smollm2",
                arguments,
                self.model,
                with_kvbm=with_kvbm,
                environment=environment | dict(self.environment) | (self.settings or {}),
            )
            advance(f"Starting {self.name}{' again' if again else ''} (about half a minute)")
            start = time.monotonic()
            with log.open("wb") as file, Server(launch, file) as server:
                while not server.is_healthy():
                    if server.exit_code() is not None or time.monotonic() - start > READY_WITHIN_S:
                        raise Broken(f"the engine did not start; the end of {log}:\n{_tail(log)}")
                    time.sleep(0.3)
                client = Client(launch.host, launch.port, launch.served_name)
                try:
                    yield Engine(client, server, time.monotonic() - start, Path(run_dir))
                except Broken as error:
                    raise Broken(f"{error}; the end of {log}:\n{_tail(log)}") from error


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
