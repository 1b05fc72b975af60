"""An engine's server as a child process: started, watched, signalled, ended with everything it started."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from uuid import uuid4

from kvbm.cli import watcher
from kvbm.cli.tail import Tail

CONNECTOR_FLAG = "--kv-transfer-config"
CONNECTOR = {"kv_connector": "KvbmConnector", "kv_connector_module_path": "kvbm.connect.vllm", "kv_role": "kv_both"}

PATIENCE_S = 15.0
"""Seconds that a server that is told to end may take."""
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True, slots=True)
class Launch:
    """What to start, and where it will listen."""

    model: str
    arguments: list[str]
    with_kvbm: bool
    host: str
    port: int
    served_name: str
    environment: dict[str, str]
    engine: str = field(default_factory=lambda: str(uuid4()))
    """Its id; vLLM adds the rank of each data-parallel engine."""

    @property
    def command(self) -> list[str]:
        # The module, because vLLM's own console script does not run from its CPU distribution.
        server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model, *self.arguments]
        connector = CONNECTOR | {"engine_id": self.engine}
        return [*server, CONNECTOR_FLAG, json.dumps(connector)] if self.with_kvbm else server

    @property
    def reachable_host(self) -> str:
        return _ANYWHERE.get(self.host, self.host)

    @property
    def url(self) -> str:
        host = self.reachable_host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


class Server:
    """A running server, in a process group of its own. A context manager: none of the group outlives it, nor this
    process, however that ends."""

    def __init__(self, launch: Launch, log: IO[bytes] | None = None, patience_s: float = PATIENCE_S) -> None:
        """Start it; its output goes to `log`, or through `tail` to where ours goes. Told to end, it may take
        `patience_s`."""
        self._launch, self._patience_s = launch, patience_s
        self.tail = Tail()
        self._signals = 0
        # Before the server, which tells it who it is: no instant is left in which nobody would end it.
        beside = [sys.executable, "-I", "-S", str(Path(watcher.__file__))]
        self._watcher = subprocess.Popen(
            [*beside, "watch", str(patience_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._watcher.stdin is not None
        pipe = self._watcher.stdin.fileno()
        self._process = subprocess.Popen(
            [*beside, "start", str(pipe), *launch.command],
            pass_fds=[pipe],
            env=launch.environment | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if log is None else log,
            stderr=subprocess.PIPE if log is None else subprocess.STDOUT,
            process_group=0,
        )
        for source, target in ((self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr)):
            if source is not None:
                self.tail.follow(source, target)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def exit_code(self) -> int | None:
        """None while it runs; 128 + n if signal n ended it, as shells say it."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def is_healthy(self) -> bool:
        """Whether it answers /health now."""
        connection = http.client.HTTPConnection(self._launch.reachable_host, self._launch.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def signal(self, number: int) -> None:
        """Hand a signal on: to the server, which ends what it started; from the second on to the whole group."""
        self._signals += 1
        if self._process.poll() is None:
            send = os.kill if self._signals == 1 else os.killpg
            send(self._process.pid, number)

    def kill(self) -> None:
        """End it and everything it started at once, as a crash does."""
        if self._group_lives():
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self, patience_s: float | None = None) -> None:
        """End it: politely; what is left of the group after that, at once."""
        if self._process.poll() is None:
            self._process.terminate()
        deadline = time.monotonic() + (self._patience_s if patience_s is None else patience_s)
        while self._group_lives() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill()
        with suppress(OSError, ValueError):  # somebody killed it, or it was told before
            assert self._watcher.stdin is not None
            self._watcher.stdin.write(b"over\n")
            self._watcher.stdin.flush()
        self._watcher.communicate()

    def _group_lives(self) -> bool:
        self._process.poll()
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True
