"""The control socket in front of a real leader."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbm.control.socket import About, Control
from kvbm.observe.totals import Totals
from tests.leader.roles import BLOCK_BYTES, BLOCK_TOKENS, Stage, keys_of

ABOUT = About("engine-1", "0.0", 1, BLOCK_BYTES, BLOCK_TOKENS)


def fingerprint() -> str:
    return "f" * 64


def send(path: Path, line: bytes) -> Any:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(path))
        client.sendall(line)
        with client.makefile("rb") as lines:
            return json.loads(lines.readline())


def ask(control: Control, command: str, **arguments: str) -> Any:
    assert control.path is not None
    reply = send(control.path, json.dumps({"command": command, **arguments}).encode() + b"\n")
    return reply["result"] if reply["ok"] else reply["error"]


@pytest.fixture
def control(stage: Stage, tmp_path: Path) -> Iterator[Control]:
    totals = Totals()
    stage.leader.core.observers.add(totals)
    control = Control(stage.leader, totals, ABOUT, tmp_path, fingerprint)
    yield control
    control.close()
    assert not (tmp_path / "engine-1.sock").exists()


def test_only_the_owner_gets_in(control: Control, tmp_path: Path) -> None:
    assert control.path == tmp_path / "engine-1.sock"
    assert control.path.stat().st_mode & 0o777 == 0o600


def test_status(control: Control, stage: Stage) -> None:
    stage.keep("a", keys_of("a", 3))
    (store,) = stage.compute("b", keys_of("b", 2), [1, 2]).stores
    stage.load("c", keys_of("a", 3), [3, 4, 5])
    status = ask(control, "status")
    assert status.pop("uptime_s") >= 0
    assert status.pop("last_check") is None or status["healthy"]
    assert 0 < status["engine_ms"]["p50"] <= status["engine_ms"]["p99"] <= status.pop("engine_ms")["max"]
    assert (rate := status["offload"]["bytes_per_s"]) > 0
    assert status == {
        "engine": "engine-1",
        "model": "",
        "healthy": True,
        "problems": [],
        "degraded": {},
        "smaller": {},
        "namesakes": [],
        "version": "0.0",
        "pid": os.getpid(),
        "fingerprint": "f" * 64,
        "paused": False,
        "generation": 0,
        "ranks": 1,
        "block_bytes": BLOCK_BYTES,
        "block_tokens": BLOCK_TOKENS,
        "tiers": [
            {
                "name": "g2",
                "total": 64,
                "capacity": 64,
                "free": 59,
                "active": 3,
                "inactive": 0,
                "staged": 2,
                "bytes": 64 * BLOCK_BYTES,
            }
        ],
        "requests": 3,
        "living_requests": 2,
        "tokens": {"prompt": 256, "device": 0, "g2": 96, "g3": 0, "peer": 0, "pulled": 0},
        "unread_requests": 0,
        "hit_rate": {"g2": 96 / 256, "g3": 0.0},
        "offload": {
            "blocks": 3,
            "bytes": 3 * BLOCK_BYTES,
            "bytes_per_s": rate,
            "failed": 0,
            "in_flight": 1,
            "skipped": 0,
            "dropped": 0,
        },
        "onboard": {"blocks": 0, "bytes": 0, "bytes_per_s": None, "failed": 0, "in_flight": 1, "gated": 0},
        "least_tokens": {"alone": 0, "beside_others": 0},
        "evictions": 0,
        "quarantined": None,
        "trust": {"violations": 0, "corrupt": 0},
    }
    stage.answer(store)
    assert ask(control, "status")["offload"]["blocks"] == 5


def test_pause_and_resume(control: Control, stage: Stage) -> None:
    assert ask(control, "pause") == {"engine": "engine-1", "paused": True}
    assert stage.leader.core.health.paused
    assert ask(control, "status")["paused"]
    assert ask(control, "resume") == {"engine": "engine-1", "paused": False}
    assert not stage.leader.core.health.paused


def test_health(control: Control, stage: Stage) -> None:
    rest = {"degraded": {}, "smaller": {}, "namesakes": [], "paused": False, "quarantined": None}
    health = ask(control, "health")
    assert health.pop("last_check") is None or time.time() - stage.leader.invariants.last < 60
    assert health == {"engine": "engine-1", "model": "", "healthy": True, "problems": [], **rest}
    stage.workers[0].close()
    problem = ["the worker of rank 0 is gone"]
    assert ask(control, "status")["problems"] == problem
    health = ask(control, "health")
    assert health.pop("last_check") <= time.time()
    assert health == {"engine": "engine-1", "model": "", "healthy": False, "problems": problem, **rest}


def test_housekeeping_that_hangs_is_seen_without_it(control: Control, stage: Stage) -> None:
    with stage.leader.core.lock:  # whoever waits for it waits for ever
        stage.leader.core.health.ticked -= 60
        (problem,) = control.health()["problems"]
        assert problem.startswith("housekeeping has not been done for 6")


def test_a_check_on_demand(control: Control, stage: Stage) -> None:
    stage.keep("a", keys_of("a", 3))
    nothing = {"engine": "engine-1", "problems": [], "complete": True, "violations": 0}
    assert ask(control, "check") == nothing
    stage.pool._ledger._table.expiry[50] = 1.0
    wrong = ask(control, "check")
    assert wrong["problems"] == ["g2: a slot that is not registered can expire"]
    assert "an invariant does not hold" in ask(control, "health")["problems"][0]
    stage.pool._ledger._table.expiry[50] = float("inf")


def test_explain(control: Control, stage: Stage) -> None:
    keys = keys_of("a", 4)
    stage.keep("first", keys[:2])
    stage.answer(stage.load("cmpl-77-0", keys, [1, 2, 3, 4]))
    stage.place("cmpl-77-0", [1, 2, 3, 4])
    (store,) = stage.step({"cmpl-77-0": 4}).stores
    stage.answer(store)
    stage.leader.finish("cmpl-77-0", [1, 2, 3, 4], 4)
    explained = ask(control, "explain", request_id="cmpl-77")
    assert explained.pop("when") > 0
    assert explained == {
        "engine": "engine-1",
        "request_id": "cmpl-77-0",
        "prompt_tokens": 128,
        "block_tokens": BLOCK_TOKENS,
        "device_tokens": 0,
        "matched": {"g2": 2, "g3": 0, "peer": 0},
        "loaded_blocks": 2,
        "load": "async",
        "load_ms": 1.0,
        "outcome": "finished",
        "offloaded_blocks": 2,
        "why": [],
    }


def test_explain_unknown_ambiguous_and_exact(control: Control, stage: Stage) -> None:
    for name in ("r1", "r10", "r11"):
        stage.begin(name, [])
    assert ask(control, "explain", request_id="x") == "no request 'x' among the last 3"
    assert ask(control, "explain") == "no request '' among the last 3"
    assert ask(control, "explain", request_id="r") == "3 requests contain 'r': r1, r10, r11"
    assert ask(control, "explain", request_id="r1")["request_id"] == "r1"


@pytest.mark.parametrize(
    "line", [b"\n", b"{\n", b"[]\n", b"3\n", b"\xff\n", b'{"command":"drop"}\n', b'{"command":[]}\n', b"x" * (1 << 16)]
)
def test_what_is_not_a_request(control: Control, line: bytes) -> None:
    assert control.path is not None
    reply = send(control.path, line)
    commands = "check, disk.inspect, disk.purge, disk.verify, explain, health, pause, resume, status"
    assert reply == {"ok": False, "error": f"not a request; commands are {commands}"}
    assert ask(control, "health")["healthy"]


@pytest.mark.parametrize("command", ["disk.inspect", "disk.verify", "disk.purge"])
def test_without_a_disk_tier(control: Control, command: str) -> None:
    assert ask(control, command) == "this engine has no disk tier"


def test_a_client_that_says_nothing(control: Control) -> None:
    assert control.path is not None
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(control.path))
    assert ask(control, "health")["healthy"]


def test_results_are_taken_while_the_engine_sleeps(control: Control, stage: Stage) -> None:
    keys = keys_of("a", 2)
    (store,) = stage.compute("a", keys, [1, 2]).stores
    stage.answer(store)
    ask(control, "health")  # any answer is followed by a tick
    ask(control, "health")
    assert stage.pool.peek(keys) == 2


def test_a_socket_that_is_taken_does_not_end_the_start(
    control: Control, make_stage: Callable[..., Stage], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Control(make_stage().leader, Totals(), ABOUT, tmp_path, fingerprint)
    assert "no control socket" in caplog.text
    other.close()
    assert ask(control, "health")["healthy"]
