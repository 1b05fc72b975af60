"""The import contracts of pyproject.toml name all that they are about, also what came later."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "kvbm"
MAY_KNOW_ENGINES = {"cli", "connect", "testing", "vllm_integration"}


def contract(name: str) -> dict[str, Any]:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (found,) = [each for each in contracts if each["name"] == name]
    return dict(found)


def test_no_package_below_the_connectors_may_know_an_engine() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - MAY_KNOW_ENGINES
    assert set(contract("Engines stop at connect")["source_modules"]) == {f"kvbm.{name}" for name in packages}


def test_all_that_tiers_share_knows_none_of_them() -> None:
    folders = {f"kvbm.tiers.{path.parent.name}" for path in (PACKAGE / "tiers").glob("*/__init__.py")}
    shared = {f"kvbm.tiers.{path.stem}" for path in (PACKAGE / "tiers").glob("*.py")} - {"kvbm.tiers.__init__"}
    common = contract("What all tiers share knows none of them")
    assert set(common["source_modules"]) == shared
    assert set(common["forbidden_modules"]) == folders
    assert set(contract("A tier knows no other tier")["modules"]) == folders
    assert set(contract("Who decides and who copies know no tier")["forbidden_modules"]) == folders


def test_there_is_no_exception() -> None:
    assert "ignore_imports" not in (ROOT / "pyproject.toml").read_text()
