"""``kvbm config``: every setting, its value, where that came from and what it means."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from kvbm.build import leader as build
from kvbm.cli.engines import Json
from kvbm.cli.render import console
from kvbm.core import config
from kvbm.core.errors import ConfigError


def show(
    as_json: Json = False,
    extra: Annotated[
        str, typer.Option("--extra", metavar="JSON", help="Read this kv_connector_extra_config of an engine, too.")
    ] = "",
) -> None:
    """Check all settings, and list them as an engine started here would see them."""
    resolved = config.load(extra=_parse(extra))
    build.check(resolved)
    fields = config.Settings.model_fields
    values = resolved.settings.model_dump(mode="json")
    if as_json:
        settings = {
            name: {
                "value": config.shown(values[name]),
                "source": resolved.sources[name],
                "allowed": config.allowed(name),
                "meaning": field.description,
            }
            for name, field in fields.items()
        }
        print(json.dumps({"settings": settings, "notes": resolved.notes}, indent=2))
        return
    table = Table("setting", "value", "source", "meaning", header_style="bold")
    for name, field in fields.items():
        value = "" if values[name] is None else str(config.shown(values[name]))
        table.add_row(name, *map(Text, (value, resolved.sources[name], field.description or "")))
    console().print(table)
    for note in resolved.notes:
        console().print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)


def _parse(extra: str) -> dict[str, object]:
    try:
        values = json.loads(extra or "{}")
    except ValueError as error:
        raise ConfigError("--extra", f"it is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError("--extra", "it must be a JSON object")
    return values
