"""What a probe says of backends that work, that are not there, and that take their process down."""

import sys
from pathlib import Path

import pytest

from kvbm.transfer.nixl import probe

pytest.importorskip("nixl_cu12", reason="NIXL is not installed")


@pytest.mark.e2e  # no engine, but a process for each
@pytest.mark.parametrize("backend", ["UCX", "POSIX"])
def test_what_works_is_proven(backend: str, tmp_path: Path) -> None:
    report = probe(backend, tmp_path)
    assert report.problem is None
    assert report.gb_s is not None
    assert report.gb_s > 0
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_said() -> None:
    assert "GDS" in str(probe("GDS").problem)


@pytest.mark.parametrize(
    ("script", "says"), [("kill -SEGV $$", "status -11"), ("echo no luck >&2; exit 3", "no luck"), ("sleep 60", "1 s")]
)
def test_a_process_that_crashes_or_hangs_is_a_finding(
    script: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    assert says in str(probe("UCX", timeout_s=1).problem)
