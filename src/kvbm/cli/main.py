"""The ``kvbm`` command."""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

from kvbm import __version__
from kvbm.cli import disk, doctor, engines, models, serve, settings, store
from kvbm.cli.demo import disagg, shared
from kvbm.cli.demo import run as demo
from kvbm.cli.replay import command as replay
from kvbm.cli.route import command as route
from kvbm.core import config
from kvbm.core.errors import KvbmError


class _Group(TyperGroup):
    """Errors that are meant for people are shown as one sentence, without a traceback: status 2 for what was typed or
    set, 1 for all else."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # What a terminal or a pipe has no letters for (a path, an ellipsis) ends no command.
                stream.reconfigure(errors="backslashreplace")
        try:
            result = super().main(*args, **{**kwargs, "standalone_mode": False})
        except _Usage as error:
            if not (said := error.format_message().strip().rstrip(".")):
                sys.exit(error.exit_code)  # no argument at all: help was shown
            where = f". `{error.ctx.command_path} --help` says how it is used" if error.ctx is not None else ""
            _end(said[0].lower() + said[1:] + where, error.exit_code)
        except KvbmError as error:
            _end(str(error), error.status)
        except typer.Abort:  # Ctrl-C, or a question was not answered
            _end("stopped", 1)
        sys.exit(result if isinstance(result, int) else 0)


_Usage: Any = typer.BadParameter.__base__
"""What is raised for what was typed wrongly. Typer names only some kinds of it, and which click it is from varies."""


def _end(sentence: str, status: int) -> NoReturn:
    # What libraries say of files that do not parse has several lines.
    print(f"kvbm: {' '.join(line.strip() for line in sentence.splitlines())}", file=sys.stderr)
    sys.exit(status)


app = typer.Typer(cls=_Group, no_args_is_help=True, help="KV block manager for LLM inference.")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"kvbm {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """KV block manager for LLM inference."""


def model(
    name: str = typer.Argument(
        "smollm2", help=f"One of: {', '.join(models.KNOWN)}. Other names are printed as they are."
    ),
) -> None:
    """Print the folder of a model that needs no model hub. The first time KVBM fetches and converts it."""
    print(models.resolve(name, config.load().settings.cache_dir, Console(stderr=True)))


# Options before MODEL are ours, all after it is the engine's, --help included.
_FOR_ENGINE = {"allow_extra_args": True, "allow_interspersed_args": False}
app.command(context_settings=_FOR_ENGINE)(serve.serve)
app.command()(demo.demo)
app.command("demo-disagg")(disagg.demo_disagg)
app.command("demo-shared")(shared.demo_shared)
app.command("replay")(replay.command)
app.command("route")(route.command)
app.command()(model)
app.command("config")(settings.show)
app.command()(engines.status)
app.command()(engines.explain)
app.command()(engines.check)
app.command()(engines.pause)
app.command()(engines.resume)
app.command(context_settings=_FOR_ENGINE)(doctor.doctor)
app.add_typer(disk.app, name="disk")
app.add_typer(store.app, name="store")

if __name__ == "__main__":
    app()
