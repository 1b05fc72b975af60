"""`kvbm disk`."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import Result

from kvbm.stores.checksum import checksums
from kvbm.stores.disk import audit
from kvbm.stores.disk.cipher import Cipher
from kvbm.stores.disk.folder import Folder
from kvbm.stores.disk.meta import listed, place_of
from kvbm.stores.disk.shard import Shard
from kvbm.testing.store import HostBlocks, bytes_of, key_of, labels
from tests.marks import apart
from tests.stores.test_disk import DiskRig

Kvbm = Callable[..., Result]
A, B = "a" * 64, "b" * 64
BLOCK = 4096


def fill(path: Path, fingerprint: str, blocks: int = 5, ranks: int = 2, last_used: float = 1e9) -> None:
    """Write blocks, then give the folder back."""
    folder = Folder.claim(path, "test", clock=lambda: last_used)
    namespace = folder.namespace(
        fingerprint, {"model": f"org/{fingerprint[0]}"}, ranks=ranks, block_bytes=BLOCK, bound_bytes=4 << 20
    )
    numbers = np.arange(blocks)
    for rank in range(ranks):
        shard = Shard(namespace.place, rank, sync="never", direct=False)
        keys = [key_of(i) for i in range(blocks)]
        for slot, key in enumerate(keys):
            os.pwrite(shard.region.owner.fd, bytes_of(key, BLOCK), slot * BLOCK)
        memory = HostBlocks(blocks, BLOCK)
        for slot, key in enumerate(keys):
            memory.put(slot, bytes_of(key, BLOCK))
        shard.commit(shard.records(numbers, labels(keys), checksums(memory.region, numbers, BLOCK)), shard.region)
        shard.close()
    namespace.close()
    folder.close()


def spoil(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "200")
    fill(tmp_path / "disk", A)
    fill(tmp_path / "disk", B, blocks=3, ranks=1, last_used=1e9 + 5 * 86400)
    return tmp_path / "disk"


def test_inspect_shows_every_namespace(kvbm: Kvbm, folder: Path) -> None:
    shown = kvbm("disk", "inspect", str(folder))
    assert shown.exit_code == 0
    first, second = (line for line in shown.stdout.splitlines() if "org/" in line)
    assert "bbbb" in first
    assert "org/b" in first
    assert "org/a" in second
    assert "5 of " in second
    told = json.loads(kvbm("disk", "inspect", str(folder), "--json").stdout)
    assert [(one["fingerprint"], one["blocks"], one["bad"], one["used_by"]) for one in told] == [
        (B, 3, 0, None),
        (A, 5, 0, None),
    ]
    assert told[0]["facts"] == {"model": "org/b"}
    assert told[0]["oldest"] <= told[0]["newest"]


def test_inspect_works_while_an_engine_has_it_and_the_others_say_who(kvbm: Kvbm, folder: Path) -> None:
    owner = Folder.claim(folder, "engine-7")
    shown = kvbm("disk", "inspect", str(folder))
    assert shown.exit_code == 0
    assert f"in use by engine engine-7, process {os.getpid()} on" in shown.stdout
    for command in (("verify",), ("purge", "--yes")):
        refused = kvbm("disk", command[0], str(folder), *command[1:])
        assert refused.exit_code == 1
        assert "is in use by engine engine-7, process" in refused.stderr
    owner.close()


def test_data_parallel_engines(kvbm: Kvbm, tmp_path: Path) -> None:
    for rank in range(2):
        fill(tmp_path / f"dp{rank}", A, blocks=rank + 1)
    told = json.loads(kvbm("disk", "inspect", str(tmp_path), "--json").stdout)
    assert [(one["folder"], one["blocks"]) for one in told] == [(f"dp0/{A[:16]}", 1), (f"dp1/{A[:16]}", 2)]
    assert "dp1/aaaa" in kvbm("disk", "verify", str(tmp_path)).stdout


def test_verify_finds_what_is_bad_and_drops_it_when_asked(kvbm: Kvbm, folder: Path) -> None:
    good = kvbm("disk", "verify", str(folder))
    assert good.exit_code == 0
    assert f"{A[:16]}, rank 1: 5 blocks are whole" in good.stdout
    spoil(folder / A[:16] / "rank1.data", 3 * BLOCK + 77)
    spoil(folder / A[:16] / "rank0.index", 4096 + 128 * 2 + 50)
    for options in ((), ("--repair",)):
        found = kvbm("disk", "verify", str(folder), *options)
        assert found.exit_code == 1
        assert f"{A[:16]}, rank 0: 4 blocks are whole, 1 records are damaged (slots 2)" in found.stdout
        assert f"{A[:16]}, rank 1: 4 blocks are whole, 1 are not (slots 3)" in found.stdout
        assert ("Dropped 2 bad blocks and records." in found.stdout) == bool(options)
        assert found.stderr == f"kvbm: {folder}: 2 blocks or records are bad or could not be read\n"
    assert kvbm("disk", "verify", str(folder)).exit_code == 0
    told = json.loads(kvbm("disk", "inspect", str(folder), "--namespace", "aaa", "--json").stdout)
    assert [(one["blocks"], one["bad"]) for one in told] == [(3, 1)]


@pytest.mark.parametrize("command", [("disk", "verify"), ("disk", "verify", "--json"), ("replay", "--json")])
@apart
def test_progress_is_for_terminals(folder: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    arguments = [sys.executable, "-m", "kvbm.cli.main", *command, *([str(folder)] if command[0] == "disk" else ())]
    # As in a run of tests that colours its output, which says nothing of where this goes.
    environment = os.environ | {"FORCE_COLOR": "1", "KVBM_RUN_DIR": str(tmp_path / "run"), "TERM": "xterm"}
    piped = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    assert piped.stderr == ""
    ours, theirs = pty.openpty()
    try:
        shown = subprocess.run(arguments, env=environment, stdout=subprocess.PIPE, stderr=theirs, text=True, check=True)
        os.set_blocking(ours, False)
        seen = os.read(ours, 1 << 20).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert (f"{A[:16]}, rank 1" if command[0] == "disk" else "Reading") in seen
    if "--json" in command:
        assert json.loads(shown.stdout)
        assert json.loads(piped.stdout)
    else:
        assert shown.stdout == piped.stdout


def test_large_blocks_are_told_of_as_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "_TOLD_BYTES", 2 * BLOCK)
    fill(tmp_path, A, blocks=5, ranks=1)
    (one,) = listed(tmp_path)
    assert one.meta is not None
    told: list[int] = []
    audit.audit(place := place_of(one.path, one.meta), 0, None, progress=told.append)
    assert told == [2, 2, place.num_slots - 4]


def test_verify_of_encrypted_blocks_needs_the_key(kvbm: Kvbm, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(bytes(32))
    key.chmod(0o600)
    rig = DiskRig(tmp_path / "disk", cipher=Cipher(bytes(32)))
    rig.write([1, 2], [0, 1])
    rig.close()
    without = kvbm("disk", "verify", str(tmp_path / "disk"))
    assert without.exit_code == 1
    assert "not checked, it is encrypted: give its --key-file" in without.stdout
    assert "2 blocks are whole" in kvbm("disk", "verify", str(tmp_path / "disk"), "--key-file", str(key)).stdout
    rig.damage(1)
    bad = kvbm("disk", "verify", str(tmp_path / "disk"), "--key-file", str(key))
    assert bad.exit_code == 1
    assert "1 blocks are whole, 1 are not (slots 1)" in bad.stdout


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ((), set()),
        (("--namespace", "bb"), {"a"}),
        (("--older-than", "365"), set()),
        (("--older-than", "99999"), {"a", "b"}),
    ],
)
def test_purge(kvbm: Kvbm, folder: Path, options: tuple[str, ...], left: set[str]) -> None:
    done = kvbm("disk", "purge", str(folder), "--yes", *options)
    assert done.exit_code == 0
    assert {path.name[0] for path in folder.iterdir() if path.is_dir()} == left
    assert ("Deleted" in done.stdout) == (len(left) < 2)


def test_purge_asks(kvbm: Kvbm, folder: Path) -> None:
    asked = kvbm("disk", "purge", str(folder))
    assert asked.exit_code == 1
    assert "Delete these?" in asked.stdout
    assert asked.stderr.splitlines()[-1] == "kvbm: stopped"
    told = kvbm("disk", "purge", str(folder), "--json")
    assert (told.exit_code, told.stdout) == (2, "")
    assert told.stderr == "kvbm: --json does not ask before it deletes: it needs --yes\n"
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 2


def test_purge_for_programs(kvbm: Kvbm, folder: Path) -> None:
    told = kvbm("disk", "purge", str(folder), "--yes", "--json", "--older-than", "99999")
    assert (told.exit_code, json.loads(told.stdout), told.stderr) == (0, [], "")
    told = kvbm("disk", "purge", str(folder), "--yes", "--json", "--namespace", "a")
    (one,) = json.loads(told.stdout)
    assert one.pop("bytes") > 5 * 2 * BLOCK
    assert one == {"folder": A[:16], "model": "org/a", "outcome": "deleted"}
    assert [path.name for path in folder.iterdir() if path.is_dir()] == [B[:16]]


def test_what_a_later_version_wrote_is_shown(kvbm: Kvbm, folder: Path) -> None:
    (folder / A[:16] / "meta.json").write_text('{"format": 2}')
    (folder / B[:16] / "meta.json").write_text("x")
    shown = kvbm("disk", "inspect", str(folder)).stdout
    assert "a later version of KVBM wrote it" in shown
    assert "damaged, or in an older format" in shown
    checked = kvbm("disk", "verify", str(folder))
    assert checked.exit_code == 1
    assert "not checked, a later version of KVBM wrote it" in checked.stdout


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("nowhere", (), "there is no folder"),
        (".", (), "there are no blocks of KVBM's in"),
        ("disk", ("--namespace", "c"), "begins with 'c'"),
    ],
)
def test_what_is_not_there_is_said(
    kvbm: Kvbm, folder: Path, name: str, options: tuple[str, ...], sentence: str
) -> None:
    for command in ("inspect", "verify", "purge"):
        refused = kvbm("disk", command, str(folder.parent / name), *options)
        assert refused.exit_code == 2
        assert sentence in refused.stderr
