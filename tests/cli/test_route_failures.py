"""The router where something ends: clients, engines, itself."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import time
from contextlib import ExitStack

import aiohttp
import pytest
from aiohttp import web

from kvbm.cli.route import proxy
from tests.cli.fake_engines import Act, Fake, Routed, gone, hangs, hangs_up, routed, running, says, streams

CHAT = "/v1/chat/completions"


async def mid_stream(to: Routed, first: bytes) -> aiohttp.ClientResponse:
    """A completion whose first chunk has arrived."""
    answer = await to.client.post(to.url + CHAT, json={"messages": [], "stream": True})
    assert await answer.content.readany() == first
    return answer


# -- aborts --


@pytest.mark.parametrize("streaming", [True, False])
@running
async def test_a_client_that_goes_away_ends_both(streaming: bool) -> None:
    chunks: asyncio.Queue[bytes | None] = asyncio.Queue()
    prefill, decode = Fake(hangs), Fake(streams(chunks) if streaming else hangs)
    async with routed([prefill], [decode]) as to:
        if streaming:
            chunks.put_nowait(b"data")
            (await mid_stream(to, b"data")).close()
        else:
            asking = asyncio.create_task(to.post())
            await asyncio.gather(prefill.arrived.acquire(), decode.arrived.acquire())
            asking.cancel()
        began = time.monotonic()
        await asyncio.gather(prefill.aborted.acquire(), decode.aborted.acquire())
        assert time.monotonic() - began < 1
        for role in ("prefill", "decode"):
            assert await to.count("aborts_total", reason="client", role=role) == 1
        assert [engine.in_flight for engine in (*to.router.prefill.engines, *to.router.decode.engines)] == [0, 0]


@running
async def test_a_client_that_does_not_read_does_not_fill_the_memory() -> None:
    sent = 0

    async def floods(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        answer = web.StreamResponse()
        await answer.prepare(request)
        while True:
            await answer.write(b"x" * 100_000)
            sent += 100_000

    decode = Fake(floods)
    async with routed([Fake()], [decode]) as to:
        answer = await to.client.post(to.url + CHAT, json={"messages": []})
        before = -1
        while sent > before:
            before = sent
            await asyncio.sleep(0.1)
        assert sent < 30_000_000  # what the sockets and the streams between them hold
        answer.close()
        await decode.aborted.acquire()


# -- engines that do not work --


@pytest.mark.parametrize(
    ("act", "outcome"),
    [(None, "unreachable"), (says({}, 500), "server_error"), (hangs_up, "broken"), (hangs, "aborted")],
)
@running
async def test_decode_needs_no_prefill(act: Act | None, outcome: str, caplog: pytest.LogCaptureFixture) -> None:
    prefill, finished = (Fake(act) if act else await gone()), asyncio.Event()

    async def after_prefill(_: web.Request) -> web.Response:
        await finished.wait()
        return web.Response(body=b"computed")

    async with routed([prefill], [Fake(after_prefill)]) as to:
        for number in (1, 2):
            to.router.prefill.reached(to.router.prefill.engines[0])  # or it were left out
            finished.clear()
            answer = asyncio.create_task(to.post())
            if act is hangs:
                await prefill.arrived.acquire()
                finished.set()
            while await to.count("requests_total", engine="p0", outcome=outcome, role="prefill") != number:
                await asyncio.sleep(0.01)
            finished.set()
            assert await answer == (200, b"computed")
        assert await to.count("prefill_failures_total", engine="p0") == (0 if outcome == "aborted" else 2)
    lines = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == (0 if outcome == "aborted" else 1)
    assert all(line.startswith(f"prefill engine {prefill.url} does not work: ") for line in lines)


@running
async def test_a_prefill_that_is_down_is_left_out_until_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    prefill, decode = await gone(), Fake()
    async with routed([prefill], [decode]) as to:
        await to.post()
        while not to.router.prefill.engines[0].failures:
            await to.post()
        await to.post()
        assert "kv_transfer_params" not in decode.heard[-1].json  # nothing to pull
        assert to.router.prefill.wait_s(to.router.prefill.engines[0]) > 0
        async with prefill.serving():
            assert json.loads((await to.get("/health"))[1])["engines"][0]["healthy"]
            assert [record.message for record in caplog.records][1:] == [f"prefill engine {prefill.url} works again"]
            await to.post()
            await prefill.arrived.acquire()
    assert "kv_transfer_params" in decode.heard[-1].json


@running
async def test_a_refusal_of_prefill_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    prefill, decode = Fake(says({}, 400)), Fake(streams(chunks := asyncio.Queue()))
    async with routed([prefill], [decode]) as to:
        answer = asyncio.create_task(to.post())
        while not await to.count("requests_total", engine="p0", outcome="client_error", role="prefill"):
            await asyncio.sleep(0.01)
        chunks.put_nowait(None)
        assert (await answer)[0] == 200
        assert await to.count("prefill_failures_total", engine="p0") == 0
    assert caplog.records == []


@running
async def test_another_decode_engine_takes_over(caplog: pytest.LogCaptureFixture) -> None:
    dead, alive = await gone(), Fake()
    async with routed([Fake()], [dead, alive]) as to:
        for _ in range(3):
            assert (await to.post())[0] == 200
        assert (await to.get("/v1/models"))[0] == 200
        assert await to.count("requests_total", engine=dead.url, outcome="unreachable", role="decode") == 1
    assert [heard.path for heard in alive.heard] == ["/v1/completions"] * 3 + ["/v1/models"]
    assert alive.heard[0].json["kv_transfer_params"] == {"kvbm": {"pull_from": "p0"}}
    assert len(caplog.records) == 1


@running
async def test_no_decode_engine() -> None:
    prefill, decode = Fake(hangs), [await gone(), await gone()]
    async with routed([prefill], decode) as to:
        for _ in range(2):  # also where all are being left out
            status, body = await to.post()
            assert status == 502
            message = json.loads(body)["error"]["message"]
            assert message.startswith("no decode engine could be reached; tried http://")
            assert all(fake.url in message for fake in decode)
        async with decode[1].serving():
            assert (await to.post())[0] == 200  # it need not be waited for


@running
async def test_a_request_that_ends_an_engine_does_not_end_them_all() -> None:
    decode = [Fake(hangs_up), Fake(hangs_up)]
    async with routed([Fake()], decode) as to:
        status, body = await to.post()
        assert status == 502
        assert json.loads(body)["error"]["message"].startswith(f"the decode engine {decode[0].url} ended")
    assert [len(fake.heard) for fake in decode] == [1, 0]


@running
async def test_an_engine_that_does_not_take_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "_CONNECT_S", 0.2)
    stuck, alive = Fake(), Fake()
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, ExitStack() as stack:
        port = full.getsockname()[1]
        for _ in range(3):  # nobody accepts them, and no more fit
            knocking = stack.enter_context(socket.socket())
            knocking.setblocking(False)
            knocking.connect_ex(("127.0.0.1", port))
        stuck.url = f"http://127.0.0.1:{port}"
        async with routed([Fake()], [stuck, alive]) as to:
            began = time.monotonic()
            assert (await to.post())[0] == 200
            assert 0.2 <= time.monotonic() - began < 1.5


# -- the end --


@running
async def test_requests_that_do_not_end_are_aborted_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "DRAIN_S", 0.1)
    prefill, decode = Fake(hangs), Fake(streams(chunks := asyncio.Queue()))
    async with prefill.serving(), decode.serving():
        async with routed([prefill], [decode]) as to:
            chunks.put_nowait(b"x")
            answer = await mid_stream(to, b"x")
            began = time.monotonic()
        await asyncio.gather(prefill.aborted.acquire(), decode.aborted.acquire())
        assert 0.1 <= time.monotonic() - began < 2
        answer.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@running
async def test_a_signal_lets_requests_end_and_a_second_one_does_not(number: signal.Signals) -> None:
    chunks: asyncio.Queue[bytes | None] = asyncio.Queue()
    prefill, decode = Fake(), Fake(streams(chunks))
    async with prefill.serving(), decode.serving(), aiohttp.ClientSession() as client:
        options = ["--prefill", f"one={prefill.url}", "--decode", decode.url, "--port", "0"]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "kvbm.cli.main", "route", *options, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            url = (await process.stdout.readline()).decode().strip().rpartition(" ")[2]
            chunks.put_nowait(b"one")
            answer = await client.post(url + CHAT, json={"messages": []})
            assert await answer.content.readany() == b"one"
            os.kill(process.pid, number)
            while await _listens(int(url.rpartition(":")[2])):
                await asyncio.sleep(0.01)
            chunks.put_nowait(b"two")
            if number == signal.SIGTERM:
                chunks.put_nowait(None)
                assert await answer.read() == b"two"
                assert await process.wait() == 0
            else:
                assert await answer.content.readany() == b"two"
                os.kill(process.pid, signal.SIGTERM)
                assert await process.wait() == -signal.SIGTERM
                answer.close()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert decode.heard[0].json["kv_transfer_params"] == {"kvbm": {"pull_from": "one"}}


async def _listens(port: int) -> bool:
    try:
        (await asyncio.open_connection("127.0.0.1", port))[1].close()
    except (ConnectionRefusedError, ConnectionResetError):  # reset: it stops listening at this moment
        return False
    return True
