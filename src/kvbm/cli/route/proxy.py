"""The router: what comes in goes to engines, and what the decode engine answers goes back as it is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import closing
from typing import Final

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from kvbm.cli.route.bodies import Completion
from kvbm.cli.route.choice import Choice, Engine
from kvbm.cli.route.metrics import Metrics

BODY_LIMIT: Final = 64 << 20
DRAIN_S: Final = 10.0
"""How long requests may go on after the router was told to end."""

_CONNECT_S: Final = 2.0
_COMPLETIONS: Final = ("/v1/completions", "/v1/chat/completions")
_PASSED_ON: Final = ("/v1/{rest:.*}", "/tokenize", "/detokenize", "/version")
_OF_A_CONNECTION: Final = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"}
    | {"transfer-encoding", "upgrade"}
)
_NOT_SENT: Final = _OF_A_CONNECTION | {"content-length", "expect", "host"}
_AUTOMATIC: Final = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
_UNREACHABLE: Final = (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError)
"""Nothing has arrived at the engine."""
_FAILURES: Final = (aiohttp.ClientError, OSError)

_log = logging.getLogger(__name__)


class Router:
    """In front of these engines. Everything runs on one event loop."""

    def __init__(self, prefill: Sequence[Engine], decode: Sequence[Engine], body_limit: int = BODY_LIMIT) -> None:
        self.prefill = Choice(prefill)
        self.decode = Choice(decode, last_resort=True)
        self.metrics = Metrics()
        self._roles = {"prefill": self.prefill, "decode": self.decode}
        self._body_limit = body_limit
        self._running: set[asyncio.Task[object]] = set()
        self._session: aiohttp.ClientSession

    def application(self) -> web.Application:
        """To be run with `handler_cancellation`, or a client that goes away would abort nothing."""
        app = web.Application(client_max_size=self._body_limit, middlewares=[self._each])
        app.cleanup_ctx.append(self._with_session)
        app.on_shutdown.append(self._drain)
        for path in _COMPLETIONS:
            app.router.add_post(path, self._complete)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._show_metrics)
        for path in _PASSED_ON:
            app.router.add_route("*", path, self._pass_on)
        return app

    async def _with_session(self, _application: web.Application) -> AsyncIterator[None]:
        # Connections are not kept for as long as vLLM keeps them (5 s), or a request could be sent into one that it is
        # closing. Cookies are the clients': they are passed on, and none is kept for somebody else.
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_AUTOMATIC,
            timeout=aiohttp.ClientTimeout(total=None, connect=_CONNECT_S),
        )
        async with self._session:
            yield

    @web.middleware
    async def _each(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            return await handler(request)
        except web.HTTPException as error:
            return _error(error.status, error.text or error.reason)
        except ConnectionError:  # while something was written to the client; nobody reads this any more
            return _error(499, "the client went away")

    async def _drain(self, _application: web.Application) -> None:
        """Requests that run may end. Those that do not in time are aborted next, by the server."""
        if self._running:
            await asyncio.wait(set(self._running), timeout=DRAIN_S)

    # -- requests --

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        arrived = time.perf_counter()
        raw = await request.read()
        completion = Completion.parse(raw)
        if completion is None:
            return await self._answer(request, raw, arrived=arrived)
        helper = self.prefill.begin(completion.keys)
        if helper is None:
            return await self._answer(request, raw, completion.keys, arrived)
        filling = asyncio.create_task(self._fill(helper, request, completion.for_prefill))
        # Not in the task, which may be cancelled before it begins.
        filling.add_done_callback(lambda _: self.prefill.end(helper))
        reason = "client"
        try:
            answer = await self._answer(request, completion.for_decode(helper.name), completion.keys, arrived)
            reason = "decode"
            return answer
        finally:
            if filling.cancel():
                self.metrics.aborts.labels("prefill", reason).inc()
            await asyncio.wait([filling])

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        # Or a server in front of the engine could take it for one of the paths that are not passed on.
        if {".", ".."} & set(request.path.split("/")):
            raise web.HTTPNotFound
        return await self._answer(request, await request.read())

    async def _fill(self, engine: Engine, request: web.Request, data: bytes) -> None:
        """Have the prompt computed. Whatever happens, decode computes what it does not get."""
        outcome = "aborted"
        try:
            with closing(await self._send(engine, request, data)) as response:
                while await response.content.readany():
                    pass
            outcome = _outcome(response.status)
            self.prefill.reached(engine)
            if outcome == "server_error":
                self._lost("prefill", engine, f"answered {response.status}")
            else:
                self._found("prefill", engine)
        except _FAILURES as error:
            outcome = "unreachable" if isinstance(error, _UNREACHABLE) else "broken"
            self.prefill.failed(engine)
            self._lost("prefill", engine, str(error) or type(error).__name__)
        finally:
            self.metrics.requests.labels("prefill", engine.name, outcome).inc()
            if outcome in ("server_error", "unreachable", "broken"):
                self.metrics.prefill_failures.labels(engine.name).inc()

    async def _answer(
        self, request: web.Request, data: bytes, keys: Sequence[int] = (), arrived: float | None = None
    ) -> web.StreamResponse:
        """What a decode engine says, passed to the client. The next engine is asked where one cannot be reached."""
        tried: list[Engine] = []
        while (engine := self.decode.begin(keys, tried)) is not None:
            tried.append(engine)
            outcome = "aborted"
            try:
                try:
                    response = await self._send(engine, request, data)
                except _FAILURES as error:
                    outcome = "unreachable" if isinstance(error, _UNREACHABLE) else "broken"
                    self.decode.failed(engine)
                    self._lost("decode", engine, str(error) or type(error).__name__)
                    if outcome == "unreachable":
                        continue
                    # Not sent to another one: if it is the request that ends engines, it would end them all.
                    return _error(502, f"the decode engine {engine.url} ended the connection before it answered")
                self.decode.reached(engine)
                self._found("decode", engine)
                with closing(response):
                    answer, outcome = await self._relay(request, response, engine, arrived)
                return answer
            finally:
                self.decode.end(engine)
                self.metrics.requests.labels("decode", engine.name, outcome).inc()
                if outcome == "aborted":
                    self.metrics.aborts.labels("decode", "client").inc()
        return _error(502, f"no decode engine could be reached; tried {', '.join(engine.url for engine in tried)}")

    async def _relay(
        self, request: web.Request, response: aiohttp.ClientResponse, engine: Engine, arrived: float | None
    ) -> tuple[web.StreamResponse, str]:
        """Chunk by chunk, never more of it in memory than is on its way. Also returns the outcome."""
        answer = web.StreamResponse(
            status=response.status, reason=response.reason, headers=_passed(response.headers, _OF_A_CONNECTION)
        )
        await answer.prepare(request)
        while True:
            try:
                chunk = await response.content.readany()
            except _FAILURES as error:
                _log.warning("decode engine %s broke off an answer: %r", engine.url, error)
                # Without the end that the client waits for, or it would take this for the whole answer.
                if request.transport is not None:
                    request.transport.close()
                return answer, "broken"
            if arrived is not None and response.status < 400:
                self.metrics.first_byte.labels(engine.name).observe(time.perf_counter() - arrived)
                arrived = None
            if not chunk:
                break
            await answer.write(chunk)
        await answer.write_eof()
        return answer, _outcome(response.status)

    async def _send(self, engine: Engine, request: web.Request, data: bytes) -> aiohttp.ClientResponse:
        """Returns with the head of the answer; who asked must close it."""
        url = URL(engine.url + request.rel_url.raw_path_qs, encoded=True)
        headers = _passed(request.headers, _NOT_SENT)
        return await self._session.request(
            request.method, url, data=data or None, headers=headers, allow_redirects=False
        )

    # -- how engines are --

    def _lost(self, role: str, engine: Engine, why: str) -> None:
        if not engine.away:
            engine.away = True
            _log.warning("%s engine %s does not work: %s", role, engine.url, why)

    def _found(self, role: str, engine: Engine) -> None:
        if engine.away:
            engine.away = False
            _log.warning("%s engine %s works again", role, engine.url)

    async def _health(self, _request: web.Request) -> web.Response:
        states = await asyncio.gather(
            *(self._state(role, engine) for role, choice in self._roles.items() for engine in choice.engines)
        )
        well = any(state["healthy"] for state in states if state["role"] == "decode")
        body = {"status": "ok" if well else "no decode engine is healthy", "engines": states}
        return web.json_response(body, status=200 if well else 503)

    async def _state(self, role: str, engine: Engine) -> dict[str, object]:
        choice = self._roles[role]
        try:
            timeout = aiohttp.ClientTimeout(total=_CONNECT_S)
            async with self._session.get(engine.url + "/health", timeout=timeout, allow_redirects=False) as response:
                healthy = response.status == 200
        except _FAILURES as error:
            healthy = False
            if isinstance(error, _UNREACHABLE):
                choice.failed(engine)
                self._lost(role, engine, str(error) or type(error).__name__)
        if healthy:
            choice.reached(engine)
            self._found(role, engine)
        return {
            "role": role,
            "name": engine.name,
            "url": engine.url,
            "healthy": healthy,
            "in_flight": engine.in_flight,
            "left_out_for_s": round(choice.wait_s(engine), 1),
        }

    async def _show_metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=self.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})


def _passed(headers: CIMultiDictProxy[str], without: frozenset[str]) -> CIMultiDict[str]:
    named = {name.strip().lower() for value in headers.getall("Connection", []) for name in value.split(",")}
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in without | named)


def _error(status: int, message: str) -> web.Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return web.json_response(body, status=status)


def _outcome(status: int) -> str:
    return "ok" if status < 400 else "client_error" if status < 500 else "server_error"
