"""The ``kvbm`` command."""

from __future__ import annotations

import io
import sys
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from kvbm.cli import disk, doctor, engines, models, serve, settings
from kvbm.cli.demo import disagg
from kvbm.cli.demo import run as demo
from kvbm.cli.replay import command as replay
from kvbm.cli.route import command as route
from kvbm.core import config
from kvbm.core.errors import KvbmError


class _Group(TyperGroup):
    """Errors that are meant for people are shown as one sentence, without a traceback."""

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # What a terminal or a pipe has no letters for (a path, an ellipsis) ends no command.
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(*args, **kwargs)
        except KvbmError as error:
            print(f"kvbm: {error}", file=sys.stderr)
            raise typer.Exit(1) from None


app = typer.Typer(cls=_Group, no_args_is_help=True, add_completion=False, help="KV block manager for LLM inference.")


def model(
    name: str = typer.Argument("smollm2", help=f"One of: {', '.join(models.KNOWN)}; others are left as they are."),
) -> None:
    """Print the folder of a model that needs no model hub, fetching and converting it the first time."""
    print(models.resolve(name, config.load().settings.cache_dir, Console(stderr=True)))


# Options before MODEL would be ours, all after it is the engine's, --help included.
app.command(context_settings={"allow_extra_args": True, "allow_interspersed_args": False})(serve.serve)
app.command()(demo.demo)
app.command("demo-disagg")(disagg.demo_disagg)
app.command("replay")(replay.command)
app.command("route")(route.command)
app.command()(model)
app.command("config")(settings.show)
app.command()(engines.status)
app.command()(engines.explain)
app.command()(engines.check)
app.command()(engines.pause)
app.command()(engines.resume)
app.command()(doctor.doctor)
app.add_typer(disk.app, name="disk")

if __name__ == "__main__":
    app()
