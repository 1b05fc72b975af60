"""Engines that are not there: control servers that give the answers a test chose."""

from __future__ import annotations

import json
import os
import socketserver
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

os.environ.pop("COLUMNS", None)  # a console that is made when a module is imported would keep that width

from kvbm.cli.main import app

STATUS: dict[str, Any] = {
    "healthy": True,
    "problems": [],
    "version": "0.1.0",
    "model": "org/m",
    "pid": 0,
    "fingerprint": "cf",
    "uptime_s": 3725.0,
    "paused": False,
    "generation": 2,
    "ranks": 1,
    "block_bytes": 1_474_560,
    "block_tokens": 32,
    "tiers": [
        {"name": "g2", "total": 678, "free": 600, "active": 3, "inactive": 70, "staged": 5, "bytes": 999_751_680}
    ],
    "requests": 2,
    "living_requests": 0,
    "tokens": {"prompt": 1150, "device": 0, "g2": 544},
    "hit_rate": {"g2": 0.473},
    "offload": {"blocks": 18, "bytes": 26_542_080, "failed": 0, "in_flight": 4, "skipped": 0, "dropped": 0},
    "onboard": {"blocks": 17, "bytes": 25_067_520, "bytes_per_s": 4.2e9, "failed": 1, "in_flight": 0, "gated": 6},
    "least_tokens": {"alone": 0, "beside_others": 70.6},
    "evictions": 9,
}

Answers = Callable[[dict[str, Any]], dict[str, Any] | bytes]


class Engine:
    """Answers on `<run_dir>/<name>.sock`; bytes go out as they are. `heard` are the requests."""

    def __init__(self, path: Path, answers: Answers) -> None:
        self.heard: list[dict[str, Any]] = []
        engine = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                request = json.loads(self.rfile.readline())
                engine.heard.append(request)
                answer = answers(request)
                with suppress(BrokenPipeError):
                    self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode() + b"\n")

        self._server = socketserver.UnixStreamServer(str(path), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        """Ends as an engine that died does: the socket stays."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def run_dir() -> Iterator[Path]:
    # A short one: a Unix socket's path has 107 bytes.
    with tempfile.TemporaryDirectory(prefix="kvbm") as folder:
        yield Path(folder)


@pytest.fixture
def engine(run_dir: Path) -> Iterator[Callable[[str, Answers], Engine]]:
    with ExitStack() as stack:

        def start(name: str, answers: Answers) -> Engine:
            started = Engine(run_dir / f"{name}.sock", answers)
            stack.callback(started.close)
            return started

        yield start


@pytest.fixture
def kvbm(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The `kvbm` command, in this process."""
    monkeypatch.setenv("KVBM_RUN_DIR", str(run_dir))
    return lambda *arguments: CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def good(**result: Any) -> dict[str, Any]:
    return {"ok": True, "result": result}


def healthy(name: str, **changes: Any) -> Answers:
    """Says that it is well, and does what it is told."""
    paused = {"pause": True, "resume": False}

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if (command := request["command"]) in paused:
            return good(engine=name, paused=paused[command])
        return good(**(STATUS | {"engine": name} | changes))

    return answer
