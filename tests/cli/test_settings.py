"""`kvbm config`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from kvbm.core.config import Settings
from tests.marks import apart

Kvbm = Callable[..., Result]


@pytest.fixture(autouse=True)
def no_other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if "KVBM_" in name]:
        monkeypatch.delenv(name)


def test_every_setting_with_value_source_and_meaning(kvbm: Kvbm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    shown = kvbm("config")
    assert shown.exit_code == 0
    for name, field in Settings.model_fields.items():
        line = next(line for line in shown.stdout.splitlines() if line.startswith(f"│ {name} "))
        assert field.description in line
    assert "environment KVBM_RUN_DIR" in next(line for line in shown.stdout.splitlines() if "run_dir" in line)


def test_what_an_engine_would_refuse_is_refused(kvbm: Kvbm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBM_G4_URL", "s3:///x")
    refused = kvbm("config")
    assert refused.exit_code == 2
    assert "environment KVBM_G4_URL" in refused.stderr


def test_sources(kvbm: Kvbm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "kvbm.toml"
    file.write_text("g2_gb = 1\ncopy_threads = 2\n")
    monkeypatch.setenv("KVBM_CONFIG", str(file))
    monkeypatch.setenv("KVBM_G2_GB", "1.5")
    monkeypatch.setenv("DYN_KVBM_METRICS_PORT", "7000")
    monkeypatch.setenv("DYN_KVBM_ENABLE_NUMA", "9")
    answer = json.loads(kvbm("config", "--json", "--extra", '{"onboard": "sync"}').stdout)
    found = {name: (entry["value"], entry["source"]) for name, entry in answer["settings"].items()}
    assert found["g2_gb"] == (1.5, "environment KVBM_G2_GB")
    assert found["copy_threads"] == (2, f"file {file}")
    assert found["metrics_port"] == (7000, "environment DYN_KVBM_METRICS_PORT")
    assert found["onboard"] == ("sync", "extra config")
    assert found["strict"] == (False, "default")
    assert answer["settings"]["g2_gb"]["allowed"] == "a number, more than 0 and at most 1,000,000"
    assert answer["notes"] == ["DYN_KVBM_ENABLE_NUMA has no effect: G2 is ordinary memory where the system places it."]
    assert (
        "Note: DYN_KVBM_ENABLE_NUMA has no effect: G2 is ordinary memory where the system places it."
        in kvbm("config").stdout
    )


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("KVBM_G2_GB", "-1", "setting g2_gb (from environment KVBM_G2_GB): '-1' is not allowed, it must be a number,"),
        (
            "KVBM_ONBOARD",
            "later",
            "setting onboard (from environment KVBM_ONBOARD): 'later' is not allowed, it must be",
        ),
        ("KVBM_G2GB", "1", "setting KVBM_G2GB (from environment KVBM_G2GB): there is no such setting. Did you mean"),
        ("DYN_KVBM_CPU_CACHE_GB", "x", "setting g2_gb (from environment DYN_KVBM_CPU_CACHE_GB): 'x' is not allowed"),
    ],
)
@pytest.mark.parametrize("command", ["config", "status"])
def test_bad_value(
    kvbm: Kvbm, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, sentence: str, command: str
) -> None:
    monkeypatch.setenv(variable, value)
    result = kvbm(command)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"kvbm: {sentence}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("extra", ["{", "[]", '{"g2": 1}'])
def test_bad_extra(kvbm: Kvbm, extra: str) -> None:
    result = kvbm("config", "--extra", extra)
    assert result.exit_code == 2
    assert result.stderr.startswith("kvbm: setting ")


@pytest.mark.parametrize("command", ["config", "status", "doctor"])
@apart
def test_where_there_are_no_letters_for_a_path(run_dir: Path, command: str) -> None:
    """The output is ASCII, and the paths are not."""
    folder = run_dir / "donn\xe9es-\u65e5\u672c"
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if "KVBM_" not in name}
    environment |= {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "COLUMNS": "60"}
    environment |= {"KVBM_G3_DIR": str(folder), "KVBM_RUN_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "kvbm.cli.main", command], env=environment, capture_output=True, check=False
    )
    said = (done.stdout + done.stderr).decode("ascii")
    assert done.returncode == (1 if command == "status" else 0), said
    assert "Traceback" not in said
    assert command != "status" or "donn\\xe9es-\\u65e5\\u672c" in said
