"""What all commands have in common: how they are called wrongly, how they end, what they say where they cannot."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest
import typer
from typer.testing import Result

from kvbm import __version__
from kvbm.cli.main import app
from kvbm.core.extras import installing


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("serve",), "missing argument 'model'"),
        (("status", "--bogus"), "no such option: --bogus"),
        (("nothing",), "no such command 'nothing'"),
        (("disk", "purge"), "missing argument 'DIR'"),
        (("replay", "--block-size", "x"), "invalid value for '--block-size'"),
        (("replay", "--tiers", "x"), "--tiers 'x': 'x' is no tier"),
        (("route",), "--prefill is missing"),
        (("config", "--extra", "{"), "setting --extra: it is not valid JSON"),
        (("disk", "inspect", "/nowhere"), "there is no folder /nowhere"),
    ],
)
def test_wrong_usage_is_one_sentence_and_status_2(
    kvbm: Callable[..., Result], given: tuple[str, ...], sentence: str
) -> None:
    result = kvbm(*given)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith(f"kvbm: {sentence}")


def _commands(group: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    found = {}
    for name, command in group.commands.items():
        found |= _commands(command, (*path, name)) if hasattr(command, "commands") else {(*path, name): command}
    return found


def test_json_is_the_same_everywhere() -> None:
    commands = _commands(typer.main.get_command(app))
    helps = {
        path: [option.help for option in command.params if "--json" in option.opts]
        for path, command in commands.items()
    }
    # Servers say where they listen, and a path is for programs as it is.
    without = {("serve",), ("route",), ("model",)}
    assert helps == {path: [] if path in without else ["Print JSON."] for path in commands}
    assert len(commands) > 12


def test_version(kvbm: Callable[..., Result]) -> None:
    assert kvbm("--version").stdout == f"kvbm {__version__}\n"


def test_completion_can_be_had(kvbm: Callable[..., Result]) -> None:
    assert "--install-completion" in kvbm("--help").stdout


@pytest.mark.parametrize("extra", ["vllm-cpu", "route", "plot", "cluster", "encryption", "nixl", "demo"])
def test_what_is_missing_is_installed_by_names_that_an_index_has(extra: str) -> None:
    command = installing(extra)
    assert command.startswith("pip install ")
    assert len(command) > len("pip install ")
    assert "pykvbm" not in command
    for name in ("aiohttp", "matplotlib") if extra in ("route", "plot") else ():
        assert (name in command) == (name == {"route": "aiohttp", "plot": "matplotlib"}[extra])
    assert extra in (metadata.metadata("pykvbm").get_all("Provides-Extra") or ())
