"""status, explain, pause and resume against engines that are not there."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from kvbm.cli import control
from tests.cli.conftest import STATUS, Engine, good, healthy

Kvbm = Callable[..., Result]
Start = Callable[..., Engine]

EXPLAINED: dict[str, Any] = {
    "engine": "one",
    "request_id": "cmpl-1-0-ab",
    "when": 1_700_000_000.0,
    "prompt_tokens": 575,
    "block_tokens": 32,
    "device_tokens": 0,
    "matched": {"g2": 17, "g3": 9},
    "loaded_blocks": 16,
    "load": "async",
    "load_ms": 4.5,
    "outcome": "finished",
    "offloaded_blocks": 1,
    "why": ["1 blocks failed to load: [/dev/shm] is gone"],
}


def refused(request: dict[str, Any]) -> dict[str, Any]:
    return {"ok": False, "error": f"no request {request.get('request_id')!r} among the last 3 of [/this] engine"}


def test_status_shows_every_engine(kvbm: Kvbm, engine: Start) -> None:
    engine("one", healthy("one"))
    engine("two", healthy("two", healthy=False, problems=["rank 0: [/red] died"], paused=True))
    shown = kvbm("status")
    assert shown.exit_code == 0
    told = ("engine one, KVBM 0.1.0", "healthy, up 1 h 2 min, generation 2", "678", "12%", "544", "47.3%")
    for text in (*told, "4 in flight"):
        assert text in shown.stdout
    for text in ("engine two, KVBM", "unhealthy, paused", "rank 0: [/red] died"):
        assert text in shown.stdout


DISK: dict[str, Any] = {
    "tiers": [
        *STATUS["tiers"],
        {
            "name": "g3",
            "total": 9000,
            "free": 1000,
            "active": 0,
            "inactive": 7990,
            "staged": 10,
            "bytes": 13_000_000_000,
        },
    ],
    "demote": {"blocks": 40, "bytes": 59_000_000, "failed": 1, "in_flight": 2, "refused": 33, "cancelled": 44},
    "promote": {"blocks": 50, "bytes": 74_000_000, "failed": 3, "in_flight": 4, "gated": 55, "corrupt": 66},
    "rates": {"computed_tokens_per_s": 1234.5, "read_blocks_per_s": None},
}


def test_status_of_a_disk_tier(kvbm: Kvbm, engine: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    engine("one", healthy("one", **DISK))
    shown = kvbm("status").stdout
    for text in (
        "G3", "13 GB", "9,000", "89%",
        "up   25.1 MB in 17 blocks, lately at 4.2 GB/s (0 in flight,",
        "to disk   59 MB in 40 blocks (2 in flight, 1 failed, 33 refused, 44 gone before)",
        "from disk 74 MB in 50 blocks (4 in flight, 3 failed, 55 gated, 66 corrupt)",
        "the engine computes 1,234 tokens/s, the disk reads ? tokens/s",
    ):  # fmt: skip
        assert text in shown
    assert "not used" not in shown


def test_what_came_from_disk_is_a_part_of_what_was_found_in_host_memory(kvbm: Kvbm, engine: Start) -> None:
    """Into a pipe, as here, no line is broken."""
    tokens = {"prompt": 9000, "device": 1000, "g2": 5000, "g3": 4000, "peer": 70, "pulled": 20}
    engine("one", healthy("one", tokens=tokens))
    found = "found in: device 1,000, g2 5,000 (of these from g3 4,000, peer 70), pulled 20"
    assert found in kvbm("status").stdout


def test_status_while_host_memory_is_touched(kvbm: Kvbm, engine: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    tier = STATUS["tiers"][0] | {"capacity": 4068}
    engine("one", healthy("one", tiers=[tier], smaller={"g2": "G2 stays at 1 of 6 GB: [/red] no memory"}))
    shown = kvbm("status").stdout
    assert "678 of 4,068" in shown
    assert "- G2 stays at 1 of 6 GB: [/red] no memory" in shown


def test_status_of_a_tier_that_is_left_alone(kvbm: Kvbm, engine: Start) -> None:
    rates = {"computed_tokens_per_s": None, "read_blocks_per_s": 10.0}
    engine("one", healthy("one", **DISK | {"rates": rates}, degraded={"g3": "cannot write in [/red]: no space"}))
    shown = kvbm("status").stdout
    assert "G3 is not used: cannot write in [/red]: no space" in shown
    assert "healthy" in shown
    assert "the disk reads 320 tokens/s" in shown


def test_status_for_programs(kvbm: Kvbm, engine: Start) -> None:
    engine("one", healthy("one"))
    engine("two", healthy("two"))
    answers = json.loads(kvbm("status", "--json").stdout)
    assert [answer["engine"] for answer in answers] == ["one", "two"]
    assert answers[0]["tiers"][0]["total"] == 678


def test_prefix_chooses_the_engine(kvbm: Kvbm, engine: Start) -> None:
    one, two = engine("one", healthy("one")), engine("two", healthy("two"))
    assert [answer["engine"] for answer in json.loads(kvbm("status", "--json", "--engine", "tw").stdout)] == ["two"]
    assert (len(one.heard), len(two.heard)) == (0, 1)
    missed = kvbm("pause", "--engine", "x")
    assert missed.exit_code == 1
    assert missed.stderr == "kvbm: no running engine's id starts with 'x'. There are: one, two\n"


@pytest.mark.parametrize("command", [("status",), ("explain", "cmpl-1"), ("pause",), ("resume",), ("status", "--json")])
def test_without_an_engine(kvbm: Kvbm, run_dir: Path, command: tuple[str, ...]) -> None:
    result = kvbm(*command)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"kvbm: no engine with KVBM is running here: nothing answers in {run_dir}.")
    assert result.stderr.count("\n") == 1


def test_run_dir_that_does_not_exist(kvbm: Kvbm, run_dir: Path) -> None:
    result = kvbm("status", "--run-dir", str(run_dir / "other"))
    assert result.exit_code == 1
    assert str(run_dir / "other") in result.stderr


def test_socket_of_an_engine_that_died(kvbm: Kvbm, engine: Start, run_dir: Path) -> None:
    dead = Engine(run_dir / "dead.sock", healthy("dead"))
    dead.close()
    assert kvbm("status").exit_code == 1
    engine("one", healthy("one"))
    assert [answer["engine"] for answer in json.loads(kvbm("status", "--json").stdout)] == ["one"]


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ({"ok": False, "error": "[/no] such thing"}, "[/no] such thing"),
        ({"ok": False}, "it gave no reason"),
        (b"", "it did not answer: the connection ended early"),
        (b"hello\n", "it did not answer: the answer is not KVBM's"),
        (b"[1]\n", "it did not answer: the answer is not KVBM's"),
        ({"ok": "yes"}, "it did not answer: the answer is not KVBM's"),
    ],
)
def test_engine_that_answers_with_an_error(kvbm: Kvbm, engine: Start, answer: Any, sentence: str) -> None:
    engine("one", lambda _: answer)
    shown = kvbm("status")
    assert shown.exit_code == 1
    assert f"engine one: {sentence}" in shown.stdout
    plain = kvbm("status", "--json")
    assert (plain.exit_code, json.loads(plain.stdout)) == (1, [{"engine": "one", "error": sentence}])
    paused = kvbm("pause")
    assert (paused.exit_code, paused.stderr) == (1, f"kvbm: engine one: {sentence}\n")
    assert plain.stderr == shown.stderr == paused.stderr


def test_engine_that_does_not_answer(kvbm: Kvbm, engine: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    late = threading.Event()
    monkeypatch.setattr(control, "TIMEOUT_S", 0.05)
    engine("one", lambda _: late.wait(10) and b"")
    result = kvbm("pause")
    late.set()
    assert (result.exit_code, result.stderr) == (1, "kvbm: engine one: it did not answer within 0.05 seconds\n")


def test_pause_and_resume_reach_all(kvbm: Kvbm, engine: Start) -> None:
    engines = [engine(name, healthy(name)) for name in ("one", "two")]
    assert kvbm("pause").stdout.splitlines() == [
        "one paused: it goes on without KVBM",
        "two paused: it goes on without KVBM",
        "pause went to all 2 engines; --engine PREFIX chooses.",
    ]
    assert kvbm("resume", "--engine", "one").stdout == "one resumed\n"
    assert [[request["command"] for request in each.heard] for each in engines] == [["pause", "resume"], ["pause"]]


def test_one_of_two_cannot_be_paused(kvbm: Kvbm, engine: Start) -> None:
    engine("one", healthy("one"))
    engine("two", refused)
    result = kvbm("pause")
    assert result.exit_code == 1
    assert "one paused" in result.stdout
    assert result.stderr.startswith("kvbm: engine two: ")
    engine("three", refused)
    told = kvbm("resume", "--json")
    assert json.loads(told.stdout) == [
        {"engine": "one", "paused": False},
        *({"engine": name, "error": refused({})["error"]} for name in ("three", "two")),
    ]
    assert (told.exit_code, [line[:13] for line in told.stderr.splitlines()]) == (1, ["engine three:", "kvbm: engine "])


@pytest.mark.parametrize(("command", "paused"), [("pause", True), ("resume", False)])
def test_pause_and_resume_for_programs(kvbm: Kvbm, engine: Start, command: str, paused: bool) -> None:
    for name in ("one", "two"):
        engine(name, healthy(name))
    told = kvbm(command, "--json")
    assert json.loads(told.stdout) == [{"engine": name, "paused": paused} for name in ("one", "two")]
    assert (told.exit_code, told.stderr) == (0, "")


def test_explain_asks_all_and_shows_who_knows(kvbm: Kvbm, engine: Start) -> None:
    one = engine("one", lambda _: good(**EXPLAINED))
    engine("two", refused)
    shown = kvbm("explain", "cmpl-1")
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert one.heard == [{"command": "explain", "request_id": "cmpl-1"}]
    for text in (
        "cmpl-1-0-ab",
        "17 blocks = 544 tokens",
        "9 blocks = 288 tokens",
        "staged from disk",
        "16 blocks (async) in 4.5 ms",
        "[/dev/shm] is gone",
    ):
        assert text in shown.stdout
    assert json.loads(kvbm("explain", "cmpl-1", "--json").stdout) == [EXPLAINED]


def test_explain_of_a_request_nobody_knows(kvbm: Kvbm, engine: Start) -> None:
    engine("one" * 20, refused)
    result = kvbm("explain", "cmpl-9")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"kvbm: engine {'one' * 20}: no request 'cmpl-9' among the last 3 of [/this] engine\n"


def checked(*problems: str, complete: bool = True) -> Callable[[dict[str, Any]], dict[str, Any]]:
    result = {"problems": list(problems), "complete": complete, "violations": len(problems)}
    return lambda request: {"ok": True, "result": result}


def test_check(kvbm: Kvbm, engine: Start) -> None:
    engine("one", checked())
    engine("two", checked(complete=False))
    result = kvbm("check")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "one: nothing is wrong", "two: nothing is wrong (not all blocks were looked at in the time: ask again)",
    ]  # fmt: skip
    engine("three", checked("g2: a key does not lead to its slot", "9 blocks count as held, 0 are"))
    result = kvbm("check")
    assert result.exit_code == 1
    assert "three: g2: a key does not lead to its slot; 9 blocks count as held, 0 are" in result.stdout.splitlines()
    assert result.stderr == "kvbm: KVBM's accounts do not agree with its blocks in three\n"
    assert json.loads(kvbm("check", "--json", "--engine", "three").stdout)[0]["violations"] == 2


def test_status_tells_what_is_trusted(kvbm: Kvbm, engine: Start) -> None:
    trust = {"sampled": 3, "compared": 41, "mismatched": 0, "skipped": 2, "violations": 0, "corrupt": 7}
    status = STATUS | {"trust": trust, "engine_ms": {"p50": 0.25, "p99": 1.5, "max": 17.2}}
    engine("one", lambda _: {"ok": True, "result": {"engine": "one", **status}})
    shown = kvbm("status").stdout
    assert "the engine waits 0.25 ms in a step, p99 1.50 ms, worst 17 ms" in shown
    assert "3 hits declined, 41 blocks compared, 0 differ, 2 not compared" in shown
    assert "7 blocks had changed in host memory" in shown
