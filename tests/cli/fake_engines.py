"""Servers that answer as a test says, and a router in front of them, all on one event loop."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web

from kvbm.cli.route.choice import Engine
from kvbm.cli.route.proxy import BODY_LIMIT, Router
from kvbm.cli.route.server import runner_of

Act = Callable[[web.Request], Awaitable[web.StreamResponse]]


def running(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine, and ends."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**arguments), 10))

    return run


@dataclass(frozen=True, slots=True)
class Heard:
    """A request as it arrived."""

    method: str
    path: str
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Fake:
    """`heard` are its requests; `arrived` and `aborted` count them, as semaphores do."""

    def __init__(self, act: Act | None = None) -> None:
        self.act = act or says({"object": "text_completion", "choices": []})
        self.heard: list[Heard] = []
        self.arrived, self.aborted = asyncio.Semaphore(0), asyncio.Semaphore(0)
        self.url = ""

    async def _hear(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/health":
            return web.Response()
        self.heard.append(Heard(request.method, request.raw_path, request.headers, await request.read()))
        self.arrived.release()
        try:
            return await self.act(request)
        except (asyncio.CancelledError, ConnectionError):
            self.aborted.release()
            raise

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        app = web.Application(client_max_size=BODY_LIMIT)
        app.router.add_route("*", "/{path:.*}", self._hear)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        # The port it had, if it is back after it was gone.
        port = int(self.url.rpartition(":")[2]) if self.url else 0
        await web.TCPSite(runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield
        finally:
            await runner.cleanup()


def says(body: Any, status: int = 200, **headers: str) -> Act:
    async def act(_: web.Request) -> web.Response:
        return web.json_response(body, status=status, headers=headers)

    return act


async def hangs(_: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


async def hangs_up(request: web.Request) -> web.StreamResponse:
    """As an engine that dies of a request."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


def streams(chunks: asyncio.Queue[bytes | None]) -> Act:
    """What is put there, until None."""

    async def act(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await answer.prepare(request)
        while (chunk := await chunks.get()) is not None:
            await answer.write(chunk)
        return answer

    return act


@dataclass(frozen=True, slots=True)
class Routed:
    """A router, its address, and a client."""

    router: Router
    url: str
    client: aiohttp.ClientSession

    async def post(self, body: Any = None, path: str = "/v1/completions") -> tuple[int, bytes]:
        async with self.client.post(self.url + path, json=body or {"prompt": "p", "max_tokens": 5}) as answer:
            return answer.status, await answer.read()

    async def get(self, path: str) -> tuple[int, bytes]:
        async with self.client.get(self.url + path) as answer:
            return answer.status, await answer.read()

    async def count(self, name: str, **labels: str) -> float:
        """A counter, as /metrics shows it."""
        listed = ",".join(f'{label}="{value}"' for label, value in labels.items())
        for line in (await self.get("/metrics"))[1].decode().splitlines():
            if line.startswith(f"kvbm_route_{name}{{{listed}}} "):
                return float(line.rpartition(" ")[2])
        return 0.0


@asynccontextmanager
async def routed(prefill: list[Fake], decode: list[Fake], **options: Any) -> AsyncIterator[Routed]:
    """Engines that already have an address are not started: nobody listens there."""
    async with AsyncExitStack() as stack:
        for fake in (*prefill, *decode):
            if not fake.url:
                await stack.enter_async_context(fake.serving())
        client = await stack.enter_async_context(aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()))
        router = Router(
            [Engine(f"p{number}", fake.url) for number, fake in enumerate(prefill)],
            [Engine(fake.url, fake.url) for fake in decode],
            **options,
        )
        runner = runner_of(router)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield Routed(router, f"http://127.0.0.1:{runner.addresses[0][1]}", client)


async def gone(act: Act | None = None) -> Fake:
    """One that has an address, and nobody listens there."""
    fake = Fake(act)
    async with fake.serving():
        pass
    return fake
