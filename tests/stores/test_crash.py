"""The short form of `python -m tests.stores.crash`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e  # no engine, but processes and seconds of waiting
ROOT = Path(__file__).parents[2]


def crash(*arguments: str, before: str = "pass") -> subprocess.CompletedProcess[str]:
    program = f"import sys; from tests.stores import crash; {before}; sys.exit(crash.main())"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_five_kills(tmp_path: Path) -> None:
    done = crash("--kills", "5", "--seed", "5", "--folder", str(tmp_path / "disk"))
    assert done.returncode == 0, done.stderr
    assert "no block lost or wrong" in done.stdout


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ("crash.Shard.forget = lambda *_: None", "CORRUPT"),
        ("crash.Shard.commit = lambda *_: None", "acknowledged blocks are gone"),
    ],
)
def test_a_store_that_is_wrong_is_found_out(broken: str, sentence: str, tmp_path: Path) -> None:
    done = crash("--kills", "100", "--seed", "5", "--folder", str(tmp_path / "disk"), before=broken)
    assert done.returncode == 1
    assert sentence in done.stderr
