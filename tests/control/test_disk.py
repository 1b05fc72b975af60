"""Looking into the folder of a running engine, reading all of it, emptying it: real leader, workers and files."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbm.stores.disk import meta
from kvbm.tiers.disk import sweep as verify
from kvbm.tiers.disk.orders import Read
from kvbm.tiers.disk.side import DiskSide
from kvbm.tiers.gate import Gate
from tests.build.test_lower_whole import start
from tests.build.whole import Engine
from tests.cli.test_disk import A
from tests.cli.test_disk import fill as fill_other
from tests.control.test_socket import ask
from tests.leader.roles import Stage, keys_of

Start = Callable[..., Engine]
__all__ = ["start"]


def stored(engine: Engine, name: str, count: int) -> list[bytes]:
    """Blocks that a request computed and that are on disk now."""
    keys = keys_of(name, count)
    engine.serve(keys)
    engine.settle()
    assert engine.disk.peek(keys) == count
    return keys


def lower_of(engine: Engine) -> DiskSide:
    assert engine.leader.disk is not None
    return engine.leader.disk


def verified(engine: Engine) -> Any:
    state = ask(engine.side.control, "disk.verify", action="begin")
    looked = [state["looked"]]
    while state["running"]:
        state = ask(engine.side.control, "disk.verify")
        looked.append(state["looked"])
    assert looked == sorted(looked)
    return state


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_verification_finds_what_is_bad_and_drops_it(start: Start, ranks: int) -> None:
    engine = start(ranks=ranks)
    keys = [*stored(engine, "a", 12), *stored(engine, "b", 12)]
    total = engine.disk.statistics().total
    whole = {"slots": total, "looked": total, "bad": 0, "unread": 0, "problem": None, "running": False}
    assert verified(engine) == whole | {"whole": 24}
    for key in (keys[3], keys[20]):
        engine.spoil(key, ranks - 1)
    assert verified(engine) == whole | {"whole": 22, "bad": 2}
    assert [key for key in keys if not engine.disk.peek([key])] == [keys[3], keys[20]]
    assert verified(engine) == whole | {"whole": 22}
    status = ask(engine.side.control, "status")
    assert (status["promote"]["corrupt"], status["degraded"]) == (2, {})
    inspected = ask(engine.side.control, "disk.inspect")
    folder = str(engine.own)
    assert inspected == {"folder": folder, "slots": total, "blocks": 22, "corrupt": 2, "problem": None}


def test_host_memory_keeps_what_it_can_while_all_is_read(start: Start) -> None:
    """The slots that are read into are given back, and hold nothing that can be found."""
    engine = start()
    stored(engine, "a", 12)
    recent = stored(engine, "b", 12)
    assert verified(engine)["whole"] == 24
    assert engine.leader.core.pool.peek(recent) == 12
    now = engine.leader.core.pool.statistics()
    assert (now.writable, now.staged, now.active) == (0, 0, 0)
    assert now.registered + now.free == 16


def test_serving_goes_on_between_slices(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start()
    stored(engine, "a", 12)
    monkeypatch.setattr(Gate, "soon", lambda *_: 1)
    with engine.leader.core.below() as lower:
        assert lower is not None
        disk = lower_of(engine)
        disk.verify(engine.leader.core.pool)
        run = disk.verification
        assert run is not None
        assert (run.looked, run.over, disk.tier.in_flight()) == (0, False, (0, 1))
        run.pump()
        assert disk.tier.in_flight() == (0, 1)
    stored(engine, "b", 4)
    engine.until(lambda: run.over)
    assert run.whole >= 12


def test_without_memory_to_read_into_it_waits(start: Start) -> None:
    engine = start()
    stored(engine, "a", 12)
    held = engine.leader.core.pool.allocate(16)
    assert held is not None
    assert ask(engine.side.control, "disk.verify", action="begin")["running"]
    assert ask(engine.side.control, "disk.verify")["looked"] == 0
    held.drop()
    engine.until(lambda: lower_of(engine).verification is not None and lower_of(engine).verification.over)
    assert ask(engine.side.control, "disk.verify")["whole"] == 12


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        (lambda engine: ask(engine.side.control, "disk.verify", action="stop"), "stopped"),
        (lambda engine: engine.leader.core.pause(), "paused"),
        (lambda engine: engine.leader.reset(), "a new generation began"),
        (lambda engine: lower_of(engine).tier.fail("[Errno 5]"), "[Errno 5]"),
    ],
)
def test_what_ends_it_early(start: Start, what: Callable[[Engine], object], problem: str) -> None:
    engine = start()
    stored(engine, "a", 12)
    held = engine.leader.core.pool.allocate(16)
    assert held is not None
    assert ask(engine.side.control, "disk.verify", action="begin")["running"]
    what(engine)
    engine.leader.core.tick()
    state = ask(engine.side.control, "disk.verify")
    held.drop()
    assert (state["running"], state["problem"]) == (False, problem)


def test_blocks_whose_time_is_over_are_passed_over(make_stage: Callable[..., Stage]) -> None:
    """All of the next slice may have expired since they were written."""
    stage = make_stage().add_disk()
    short, keys = keys_of("short", 8), keys_of("a", 2)
    stage.on_disk("short", short, ttl=5.0)
    stage.on_disk("a", keys)
    stage.tick(6.0)
    stage.disk_commands().verify("begin")
    (read,) = stage.hear(Read)
    assert read.keys == keys
    stage.moved(read)
    stage.tick()
    assert stage.leader.core.health.off is None
    state = stage.disk_commands().verify(None)
    assert (state["whole"], state["problem"], state["running"]) == (2, None, False)


def test_a_new_generation_while_a_slice_is_read_counts_nothing_as_bad(start: Start) -> None:
    engine = start()
    stored(engine, "a", 12)
    with engine.leader.core.below() as lower:
        assert lower is not None
        disk = lower_of(engine)
        disk.verify(engine.leader.core.pool)
        run = disk.verification
        assert run is not None
        lower.clear()
    engine.until(lambda: lower_of(engine).tier.in_flight() == (0, 0) and not engine.leader.core.lower.degraded())
    assert (run.problem, run.bad) == ("a new generation began", 0)


def test_what_was_not_begun(start: Start) -> None:
    engine = start()
    assert ask(engine.side.control, "disk.verify") == "no verification was begun"
    ask(engine.side.control, "pause")
    assert ask(engine.side.control, "disk.verify", action="begin") == "KVBM stands aside: paused"


def test_a_disk_with_nothing_on_it_is_passed_over(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "STRETCH", 4)
    monkeypatch.setattr(verify, "PATIENCE", 3)
    engine = start()
    assert verified(engine)["looked"] == engine.disk.statistics().total


def test_a_purge_empties_its_own_and_deletes_others(start: Start, tmp_path: Path) -> None:
    fill_other(tmp_path / "g3", A, blocks=2, ranks=1)
    engine = start()
    keys = stored(engine, "a", 12)
    control, other = engine.side.control, tmp_path / "g3" / A[:16]
    assert other.is_dir()
    state = send(engine, [other.name, "../../e.sock", "0" * 16])
    while state["running"]:
        state = ask(control, "disk.purge")
    assert (state["left"], state["problem"]) == ({}, None)
    assert not other.exists()
    assert engine.disk.peek(keys) == 12
    state = send(engine, [engine.own.name])
    assert engine.disk.peek(keys) == 0
    while state["running"]:
        state = ask(control, "disk.purge")
    assert engine.own.is_dir()
    assert engine.leader.core.lower.degraded() == {}
    stored(engine, "b", 3)
    engine.close()
    assert start().disk.statistics().registered == 3


def test_one_purge_at_a_time_and_what_could_not_be_deleted(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_other(tmp_path / "g3", A, blocks=2, ranks=1)
    engine, go = start(), threading.Event()

    def delete(path: Path) -> None:
        go.wait(30)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("kvbm.control.disk.delete", delete)
    assert send(engine, [A[:16]])["running"]
    assert send(engine, []) == "a purge is going on already"
    go.set()
    state = ask(engine.side.control, "disk.purge")
    while state["running"]:
        state = ask(engine.side.control, "disk.purge")
    assert "Permission denied" in state["left"][A[:16]]
    assert ask(engine.side.control, "health")["degraded"] == {}
    assert meta.listed(tmp_path / "g3")


def send(engine: Engine, namespaces: list[str]) -> Any:
    return ask(engine.side.control, "disk.purge", namespaces=namespaces)
