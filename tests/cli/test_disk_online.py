"""`kvbm disk` on a folder that a running engine uses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from kvbm.cli import online
from kvbm.core.errors import KvbmError
from kvbm.stores.disk.folder import Folder
from tests.build.whole import Engine as Whole
from tests.cli.conftest import Engine, good
from tests.cli.test_disk import A, fill, spoil
from tests.control.test_disk import stored

Kvbm = Callable[..., Result]


@pytest.fixture
def engine(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Whole]:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(online, "_EVERY_S", 0.01)
    fill(run_dir / "g3", A, blocks=2, ranks=1)
    engine = Whole(run_dir, 1)
    yield engine
    engine.close()


def test_inspect_says_what_the_engine_says(kvbm: Kvbm, engine: Whole) -> None:
    stored(engine, "a", 5)
    told = {one["folder"]: one for one in json.loads(kvbm("disk", "inspect", str(engine.folder), "--json").stdout)}
    assert (told[engine.own.name]["blocks"], told[A[:16]]["blocks"]) == (5, 2)
    assert told[engine.own.name]["engine"] == {"corrupt": 0, "problem": None}
    assert "engine" not in told[A[:16]]
    with engine.leader.core.below() as lower:
        assert lower is not None
        disk = engine.leader.disk
        disk.tier.fail("[Errno 5] it is broken")
    shown = kvbm("disk", "inspect", str(engine.folder)).stdout
    assert f"{engine.own.name} is in use by engine e, process {os.getpid()}" in shown
    assert ", which leaves it alone: [Errno 5] it is broken" in shown


def test_verify_goes_through_the_engine(kvbm: Kvbm, engine: Whole) -> None:
    keys, name = stored(engine, "a", 5), engine.own.name
    shown = kvbm("disk", "verify", str(engine.folder))
    assert shown.exit_code == 0
    assert f"{name}, read by engine e: 5 blocks are whole\n" in shown.stdout
    assert f"{A[:16]}, rank 0: 2 blocks are whole\n" in shown.stdout
    engine.spoil(keys[2], 0)
    spoil(engine.folder / A[:16] / "rank0.data", 100)
    shown = kvbm("disk", "verify", str(engine.folder), "--repair")
    assert shown.exit_code == 1
    assert f"{name}, read by engine e: 4 blocks are whole, 1 were not and are dropped\n" in shown.stdout
    assert f"{A[:16]}, rank 0: 1 blocks are whole, 1 are not (slots 0)" in shown.stdout
    assert "Only what e uses is repaired while it runs." in shown.stdout
    assert "Dropped" not in shown.stdout
    assert engine.disk.peek(keys) == 2


@pytest.mark.parametrize(("options", "left"), [((), 0), (("--namespace", A[:4]), 5), (("--older-than", "30"), 5)])
def test_purge_goes_through_the_engine(kvbm: Kvbm, engine: Whole, options: tuple[str, ...], left: int) -> None:
    keys = stored(engine, "a", 5)
    shown = kvbm("disk", "purge", str(engine.folder), "--yes", *options)
    assert shown.exit_code == 0
    assert not (engine.folder / A[:16]).exists()
    assert engine.own.is_dir()
    assert engine.disk.peek(keys) == left
    assert (f"{engine.own.name} is empty; its space stays" in shown.stdout) == (left == 0)
    assert "Deleted " in shown.stdout
    if left == 0:
        again = json.loads(kvbm("disk", "purge", str(engine.folder), "--yes", "--json").stdout)
        assert [(one["folder"], one["outcome"]) for one in again] == [(engine.own.name, "emptied")]


def test_an_engine_of_another_folder_is_not_asked(kvbm: Kvbm, engine: Whole, tmp_path: Path) -> None:
    fill(tmp_path / "other", A)
    owner = Folder.claim(tmp_path / "other", "e")
    refused = kvbm("disk", "verify", str(tmp_path / "other"))
    owner.close()
    assert refused.exit_code == 1
    assert "is in use by engine e, process" in refused.stderr


def answers(folder: Path, **changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    state = {"slots": 10, "looked": 5, "whole": 5, "bad": 0, "unread": 0, "problem": None, "running": False, "left": {}}

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["command"] == "disk.inspect":
            return good(folder=str(folder), blocks=1, corrupt=0, problem=None)
        return good(**state | changes)

    return answer


@pytest.mark.parametrize(
    ("command", "changes", "sentence"),
    [
        ("verify", {"problem": "stopped"}, "engine x did not read all of its blocks: stopped"),
        ("purge", {"left": {"a": "cannot delete it"}}, "engine x: cannot delete it"),
        ("purge", {"running": True, "problem": "disk full"}, "engine x is still at it: disk full"),
    ],
)
def test_an_engine_that_cannot(
    kvbm: Kvbm,
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    changes: Any,
    sentence: str,
) -> None:
    monkeypatch.setattr(online, "_PATIENCE_S", 0.0)
    fill(tmp_path, A)
    owner = Folder.claim(tmp_path, "x")
    engine = Engine(run_dir / "x.sock", answers(tmp_path / A[:16], **changes))
    options = ("--yes",) if command == "purge" else ()
    failed = kvbm("disk", command, str(tmp_path), *options)
    engine.close()
    owner.close()
    assert (failed.exit_code, failed.stderr.strip()) == (1, f"kvbm: {sentence}")


def test_blocks_that_could_not_be_read_are_said(kvbm: Kvbm, run_dir: Path, tmp_path: Path) -> None:
    fill(tmp_path, A)
    owner = Folder.claim(tmp_path, "x")
    engine = Engine(run_dir / "x.sock", answers(tmp_path / A[:16], unread=3))
    shown = kvbm("disk", "verify", str(tmp_path))
    engine.close()
    owner.close()
    assert shown.exit_code == 1
    assert "5 blocks are whole, 3 could not be read" in shown.stdout


def test_ctrl_c_stops_the_reading(run_dir: Path, tmp_path: Path) -> None:
    engine = Engine(run_dir / "x.sock", answers(tmp_path, running=True))
    owner = online.Owner("x", run_dir, "n")

    def interrupt(_looked: int, _slots: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        owner.verify(interrupt)
    engine.close()
    assert engine.heard[-1] == {"command": "disk.verify", "action": "stop"}
    with pytest.raises(KvbmError, match="engine x has ended"):
        owner.ask("disk.verify")
