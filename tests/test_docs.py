"""The documentation names what there is."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import typer.main
from prometheus_client import CollectorRegistry

from kvbm.blocks import Pool
from kvbm.cli.main import app
from kvbm.core.config import UPSTREAM, Settings
from kvbm.observe.prometheus import _Collector
from kvbm.observe.totals import Totals
from kvbm.policy.lru import LRU

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def default_of(name: str) -> str:
    """As it stands in docs/settings.md."""
    if name == "run_dir":  # depends on the environment
        return "$XDG_RUNTIME_DIR/kvbm"
    default = Settings.model_fields[name].default
    if default in (None, ""):
        return "unset" if default is None else "empty"
    return str(default).lower() if isinstance(default, bool) else str(default)


def code(page: Path) -> list[str]:
    """What stands in code blocks and between backticks."""
    blocks = page.read_text().split("```")
    return [line for block in blocks[1::2] for line in block.splitlines()] + re.findall(
        r"`([^`]+)`", "".join(blocks[::2])
    )


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_has_its_row(name: str) -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    assert f"\n| `{name}` | `{default_of(name)}` | " in page


def test_every_upstream_variable_has_its_row() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    for variable, name in UPSTREAM.items():
        assert f"\n| `{variable}` | `{name}` |" in page


def test_every_metric_has_its_row() -> None:
    page, pool = (ROOT / "docs" / "metrics.md").read_text(), Pool(1, order=LRU(1))
    registry = CollectorRegistry()
    registry.register(_Collector(Totals(), lambda: vars_of(pool), lambda: True))
    for family in registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        kind = {"unknown": "untyped"}.get(family.type, family.type)
        assert f"\n| `{name}` | {kind} | " in page, name


def vars_of(pool: Pool) -> dict[str, int]:
    now = pool.statistics()
    return {name: getattr(now, name) for name in now.__slots__}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_targets_exist(page: Path) -> None:
    group = typer.main.get_command(app)
    commands = set(group.commands)  # type: ignore[attr-defined]
    targets = re.findall(r"^([\w%-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for text in code(page):
        if match := re.match(r"kvbm ([a-z]\w*)", text):
            assert match[1] in commands, text
        for target in re.findall(r"\bmake ([a-z][\w-]*)", text):
            assert any(fnmatch(target, known.replace("%", "*")) for known in targets), text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
