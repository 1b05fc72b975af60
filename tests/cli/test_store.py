"""`kvbm store`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import Result

from kvbm.stores.objects.blocks import Buffer, address_of, sums_at
from kvbm.stores.objects.envelope import PLAIN_AT, Envelope
from kvbm.stores.objects.folder import FolderStore
from kvbm.stores.objects.runs import Run, RunFormat, Shape, digest_of, names_of
from kvbm.testing.store import key_of
from tests.ports import free_port

Kvbm = Callable[..., Result]
SHAPE = Shape(4, 2, 512)
SECRET = b"sixteen bytes or more of it"


def fill(path: Path, model: str, runs: int, secret: bytes | None = None) -> list[Path]:
    """Runs of one namespace, as a rank writes them; where they lie."""
    store, envelope = FolderStore(path), Envelope(secret)
    format_ = RunFormat(model, SHAPE, f"org/{model}")
    names = names_of(envelope, digest_of(model), SHAPE)
    written = []
    for number in range(runs):
        whole, plain = (Buffer(size) for size in (envelope.size(format_.plain_bytes), format_.plain_bytes))
        room = plain.view if envelope.sealed else whole.view[PLAIN_AT:]
        data = np.random.default_rng(number).integers(0, 256, SHAPE.data_bytes, np.uint8)
        room[format_.header_bytes :] = data.data
        sums = sums_at(address_of(room) + format_.header_bytes, SHAPE.block_bytes, 8).reshape(2, 4)
        keys = tuple(key_of(4 * number + at) for at in range(4))
        room[: format_.header_bytes] = format_.header(Run(keys, None, 0, bytes(4), sums))
        name = names.run(names.digest(keys[-1]))
        envelope.close(name, whole.view, room)
        assert store.put(name, whole.view)
        written.append(path / name)
    return written


def flip(path: Path, at: int) -> None:
    said = bytearray(path.read_bytes())
    said[at] ^= 1
    path.write_bytes(said)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(SECRET)
    path.chmod(0o600)
    return path


def test_inspect_shows_every_namespace(kvbm: Kvbm, tmp_path: Path) -> None:
    runs = [*fill(tmp_path / "kv", "a", 3), *fill(tmp_path / "kv", "b", 1)]
    url = f"file://{tmp_path}/kv"
    shown = kvbm("store", "inspect", url)
    assert shown.exit_code == 0
    assert len([line for line in shown.stdout.splitlines() if "org/" in line]) == 2
    told = json.loads(kvbm("store", "inspect", url, "--json").stdout)
    assert {each["model"]: (each["runs"], each["run_blocks"], each["ranks"]) for each in told["namespaces"]} == {
        "org/a": (3, 4, 2), "org/b": (1, 4, 2),
    }  # fmt: skip
    assert sum(each["bytes"] for each in told["namespaces"]) == sum(path.stat().st_size for path in runs)
    one = told["namespaces"][0]
    chosen = json.loads(kvbm("store", "inspect", url, "--json", "--namespace", one["namespace"][:6]).stdout)
    assert chosen["namespaces"] == [one]


def test_what_is_sealed_is_shown_with_the_secret_only(
    kvbm: Kvbm, tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "kv", "a", 2, SECRET)
    url = f"file://{tmp_path}/kv"
    without = json.loads(kvbm("store", "inspect", url, "--json").stdout)["namespaces"][0]
    assert (without["runs"], without["model"]) == (2, "")
    assert "sealed" in without["problem"]
    monkeypatch.setenv("KVBM_G4_SECRET_FILE", str(secret))
    (with_it,) = json.loads(kvbm("store", "inspect", url, "--json").stdout)["namespaces"]
    assert (with_it["model"], with_it["problem"]) == ("org/a", None)


@pytest.mark.parametrize("says", [None, SECRET, b"another secret, as long"])
def test_what_cannot_be_opened_is_not_deleted(
    says: bytes | None, kvbm: Kvbm, tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instances with a secret, with another and without one may share storage."""
    plain, sealed = fill(tmp_path / "kv", "a", 2), fill(tmp_path / "kv", "a", 3, SECRET)
    if says is not None:
        secret.write_bytes(says)
        monkeypatch.setenv("KVBM_G4_SECRET_FILE", str(secret))
    url = f"file://{tmp_path}/kv"
    whole = {None: 2, SECRET: 3}.get(says, 0)
    shown = kvbm("store", "verify", url)
    assert shown.exit_code == 0
    assert f"whole runs: {whole}, damaged: 0" in shown.stdout
    assert f"not checked: {5 - whole}" in shown.stdout
    repaired = json.loads(kvbm("store", "verify", url, "--repair", "--json").stdout)
    assert repaired == {"whole": whole, "damaged": 0, "unknown": 5 - whole, "other_version": 0, "gone": 0, "deleted": 0}
    assert all(path.exists() for path in plain + sealed)


@pytest.mark.parametrize("sealed", [False, True])
def test_verify_finds_what_is_damaged_and_deletes_it_when_asked(
    sealed: bool, kvbm: Kvbm, tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = fill(tmp_path / "kv", "a", 7, SECRET if sealed else None)
    monkeypatch.setenv("KVBM_G4_URL", f"file://{tmp_path}/kv")
    if sealed:
        monkeypatch.setenv("KVBM_G4_SECRET_FILE", str(secret))
    good = kvbm("store", "verify")
    assert good.exit_code == 0
    assert "whole runs: 7, damaged: 0" in good.stdout
    flip(runs[0], runs[0].stat().st_size - 30)  # a block
    flip(runs[1], PLAIN_AT + 100)  # its keys
    runs[2].write_bytes(runs[2].read_bytes()[:-1])
    runs[3].write_bytes(b"")
    one, other = runs[4].read_bytes(), runs[5].read_bytes()
    runs[4].write_bytes(other)
    runs[5].write_bytes(one)
    found = kvbm("store", "verify")
    assert found.exit_code == 1
    assert all(path.name in found.stdout for path in runs[:6])
    assert "whole runs: 1, damaged: 6" in found.stdout
    assert sealed or found.stdout.count("it is another run than its name says") == 2
    assert all(path.exists() for path in runs)
    repaired = json.loads(kvbm("store", "verify", "--repair", "--json").stdout)
    assert repaired == {"whole": 1, "damaged": 6, "unknown": 0, "other_version": 0, "gone": 0, "deleted": 6}
    assert [path.exists() for path in runs] == [False] * 6 + [True]
    assert kvbm("store", "verify").exit_code == 0


def test_purge_deletes_what_is_ours_and_nothing_else(kvbm: Kvbm, tmp_path: Path) -> None:
    one, other = fill(tmp_path / "kv", "a", 2), fill(tmp_path / "kv", "b", 3)
    url = f"file://{tmp_path}/kv"
    strangers = [tmp_path / "kv/mine.txt", one[0].with_name("mine.txt"), tmp_path / "kv/kv1/mine.txt"]
    for path in strangers:
        path.write_text("mine")
    assert kvbm("store", "purge", url).exit_code != 0, "nobody said yes"
    assert kvbm("store", "purge", url, "--json").exit_code != 0, "nobody said yes"
    assert all(path.exists() for path in one + other)
    space = one[0].parts[-3]
    assert json.loads(kvbm("store", "purge", url, "--yes", "--json", "--namespace", space).stdout)["deleted"] == 2
    assert not any(path.exists() for path in one)
    assert all(path.exists() for path in other)
    assert "Deleted 3 objects" in kvbm("store", "purge", url, "--yes").stdout
    assert not any(path.exists() for path in other)
    assert all(path.read_text() == "mine" for path in strangers)


@pytest.mark.parametrize("command", ["inspect", "verify", "purge"])
def test_addresses_that_nobody_can_open(command: str, kvbm: Kvbm, tmp_path: Path) -> None:
    for url, said in {
        "s3://me:hunter2@bucket/p": "credentials",
        "file://relative": "file://",
        f"file://{tmp_path}/missing": "there is no folder",
        f"file://{__file__}": "Not a directory",
        "ftp://host/p": "ftp",
        str(tmp_path): "file://",
    }.items():
        refused = kvbm("store", command, url)
        assert refused.exit_code != 0
        assert said in refused.stderr
        assert "hunter2" not in refused.stderr + refused.stdout
    assert "KVBM_G4_URL" in kvbm("store", command).stderr


def test_settings_are_those_of_an_engine(kvbm: Kvbm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBM_G4_ENDPOINT", "127.0.0.1:1")
    refused = kvbm("store", "inspect", "s3://bucket/p")
    assert refused.exit_code == 2
    assert "KVBM_G4_ENDPOINT" in refused.stderr
    monkeypatch.setenv("KVBM_G4_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("KVBM_G4_ACCESS_KEY", "a")
    monkeypatch.setenv("KVBM_G4_SECRET_KEY", "hunter2")
    silent = kvbm("store", "inspect", "s3://bucket/p")
    assert silent.exit_code == 1
    assert "refused" in silent.stderr, "nobody listens there"
    assert "hunter2" not in silent.stderr


def test_runs_of_another_version_are_left_alone(kvbm: Kvbm, tmp_path: Path) -> None:
    """Whatever else can be opened in their namespace."""
    runs = fill(tmp_path / "kv", "a", 3)
    flip(runs[0], 8)
    shown = kvbm("store", "verify", f"file://{tmp_path}/kv", "--repair")
    assert shown.exit_code == 0
    assert "not checked: 1, of another version (its version is 0, not 1)" in shown.stdout
    assert "g4_secret_file" not in shown.stdout
    assert all(path.exists() for path in runs)


def test_no_part_of_an_endpoint_that_is_secret_is_shown(kvbm: Kvbm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://me:hunter2@127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    silent = kvbm("store", "inspect", "s3://bucket/p")
    assert silent.exit_code == 1
    assert "does not answer" in silent.stderr
    assert "hunter2" not in silent.stderr


def test_a_model_may_be_called_anything(kvbm: Kvbm, tmp_path: Path) -> None:
    fill(tmp_path / "kv", "[/x]", 1)
    shown = kvbm("store", "inspect", f"file://{tmp_path}/kv")
    assert shown.exit_code == 0
    assert "org/[/x]" in shown.stdout


@pytest.mark.parametrize("name", ["g4_secret_file", "g4_ca_file"])
def test_a_file_that_nobody_writes_is_not_waited_for(
    name: str, kvbm: Kvbm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setenv(f"KVBM_{name.upper()}", str(tmp_path / "fifo"))
    refused = kvbm("store", "inspect", "s3://bucket/p")
    assert refused.exit_code == 2
    assert f"setting {name}" in refused.stderr
    assert "no ordinary file" in refused.stderr
