"""``kvbm route``: what was asked for, checked before anything listens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Annotated
from urllib.parse import urlsplit

import typer
from rich.console import Console

from kvbm.cli.route.choice import Engine
from kvbm.core.errors import KvbmError, UsageError
from kvbm.core.extras import installing
from kvbm.observe import log

_out = Console(highlight=False)


def command(
    prefill: Annotated[
        list[str] | None,
        typer.Option(
            "--prefill",
            metavar="NAME=URL",
            help="Compute prompts on this engine, the KVBM instance NAME.",
        ),
    ] = None,
    decode: Annotated[
        list[str] | None, typer.Option("--decode", metavar="URL", help="Answer with this engine.")
    ] = None,
    host: Annotated[str, typer.Option(help="Listen here.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Listen on this port. 0: any free port.")] = 8100,
) -> None:
    """Serve one OpenAI-compatible address for engines that compute prompts and engines that answer.

    --prefill and --decode may be given repeatedly. Listens on loopback unless --host says otherwise.
    """
    fillers, answerers = engines(prefill or [], decode or [])
    if find_spec("aiohttp") is None:
        raise KvbmError(f"`kvbm route` needs aiohttp: {installing('route')}")
    # Here, because aiohttp is there only where the extra `route` was installed.
    from kvbm.cli.route.proxy import Router
    from kvbm.cli.route.server import serve

    log.configure()
    asyncio.run(serve(Router(fillers, answerers), host, port, _announce))


def engines(prefill: Sequence[str], decode: Sequence[str]) -> tuple[list[Engine], list[Engine]]:
    """The engines that these options name. Raises KvbmError for what cannot be meant."""
    for option, given, form in (("--prefill", prefill, "NAME=URL"), ("--decode", decode, "URL")):
        if not given:
            raise UsageError(f"{option} is missing: give at least one {option} {form}")
    fillers = []
    for text in prefill:
        name, equals, url = text.partition("=")
        if not equals or not name or "/" in name:
            raise UsageError(f"--prefill {text!r}: the name is missing; write it like --prefill p1=http://host:8000")
        fillers.append(Engine(name, _url("--prefill", url)))
    answerers = [Engine(url, url) for url in (_url("--decode", text) for text in decode)]
    names = [engine.name for engine in fillers]
    urls = [engine.url for engine in (*fillers, *answerers)]
    for what, values in (("name", names), ("URL", urls)):
        if double := next((value for value in values if values.count(value) > 1), None):
            raise UsageError(f"the {what} {double} is given twice: each engine is another one, and has one role")
    return fillers, answerers


def _url(option: str, text: str) -> str:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or any(character.isspace() for character in text):
        raise UsageError(f"{option} {text!r}: this is no URL of an engine; write it like http://host:8000")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(f"{option}: a URL has no user, password, query or fragment here; clients bring their own key")
    return text.rstrip("/")


def _announce(host: str, port: int) -> None:
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    _out.print(f"KVBM routes on {url}", markup=False, soft_wrap=True)
