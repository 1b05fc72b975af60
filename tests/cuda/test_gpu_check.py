"""`bench.gpu` runs to its end over the simulated driver: that its sections are right, not what they measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import gpu

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.untimed]  # no engine, but torch


def checked(
    folder: Path, *arguments: str, command: tuple[str, ...] = ("-m", "bench.gpu"), **env: str
) -> dict[str, Any]:
    """What was written."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "FAKE_CUDA": "latency_us=20"} | env
    subprocess.run([sys.executable, *command, "--scale", "0.01", *arguments], cwd=folder, env=environment, check=True)
    said: dict[str, Any] = json.loads((folder / "build/bench/gpu.json").read_text())
    return said


def test_each_section_says_what_it_found(tmp_path: Path) -> None:
    said = checked(tmp_path, "--engine", "tests.cuda.gpu_engine")
    rows = {row["what"]: row for row in said["rows"]}
    for name in gpu.SECTIONS:
        assert rows[f"section {name} ran to its end"]["ok"], said
    # What is right or wrong, whatever the machine; and the controls, which show that it can be wrong.
    right = [what for what in rows if what.startswith(("wrong", "control", "graphs", "answers"))]
    assert len(right) == 8
    assert all(rows[what]["ok"] for what in right), rows
    assert said["device"]
    assert "down, 2048 KiB rows" in rows
    assert rows["down, 256 KiB rows"]["bar"] == 0.9


def test_a_section_that_fails_costs_no_other_its_figures(tmp_path: Path) -> None:
    said = checked(
        tmp_path, "--engine", "tests.cuda.gpu_engine", "--sections", "ordering,pinning", FAKE_CUDA="refuse=1"
    )
    rows = {row["what"]: row["ok"] for row in said["rows"]}
    assert not rows["section ordering ran to its end"]
    assert any("CUDA_ERROR_OUT_OF_MEMORY" in line for line in said["why not ordering"])
    assert rows["section pinning ran to its end"]


def test_where_there_is_no_gpu_every_section_says_so(tmp_path: Path) -> None:
    said = checked(tmp_path, "--sections", "ordering,capture", CUDA_VISIBLE_DEVICES="")
    assert [row["ok"] for row in said["rows"]] == [False, False]
    assert any("CUDA" in line for line in said["why not ordering"])
