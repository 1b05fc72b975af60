"""The router's process: listens, and ends as it is told."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from aiohttp import web

from kvbm.cli.route.proxy import Router
from kvbm.core.errors import KvbmError


def runner_of(router: Router) -> web.AppRunner:
    """Bodies stay as they came, and who goes away cancels what was done for him."""
    # Its own time to shut down comes after the router's, and has nothing to wait for.
    return web.AppRunner(
        router.application(), access_log=None, auto_decompress=False, handler_cancellation=True, shutdown_timeout=0.1
    )


async def serve(router: Router, host: str, port: int, announce: Callable[[str, int], None]) -> None:
    """Serve until SIGTERM or SIGINT, then let requests end. A second signal ends the process as usual.

    Raises KvbmError where it cannot listen.
    """
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    runner = runner_of(router)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise KvbmError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from None
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stopped.set)
        announce(host, runner.addresses[0][1])
        await stopped.wait()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    finally:
        await runner.cleanup()
