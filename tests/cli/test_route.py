"""The router in front of engines that are not there: what is passed on, and to whom."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from tests.cli.fake_engines import Act, Fake, gone, hangs, routed, running, says, streams

CHAT = "/v1/chat/completions"


# -- the two copies --


@running
async def test_both_engines_have_it_before_either_has_answered() -> None:
    prefill, decode = Fake(hangs), Fake(streams(chunks := asyncio.Queue()))
    asked = {"prompt": "p", "max_tokens": 9, "n": 2, "seed": 3, "stream": True, "logprobs": 1}
    async with routed([prefill], [decode]) as to:
        answer = asyncio.create_task(to.post(asked))
        await prefill.arrived.acquire()
        await decode.arrived.acquire()
        assert not answer.done()
        chunks.put_nowait(b"yes")
        chunks.put_nowait(None)
        assert await answer == (200, b"yes")
        await prefill.aborted.acquire()  # decode did not need it any more
        assert await to.count("aborts_total", reason="decode", role="prefill") == 1
    assert decode.heard[0].json == asked | {"kv_transfer_params": {"kvbm": {"pull_from": "p0"}}}
    assert prefill.heard[0].json == {
        "prompt": "p", "seed": 3, "max_tokens": 1, "n": 1, "stream": False,
        "kv_transfer_params": {"kvbm": {"load": True}},
    }  # fmt: skip


@running
async def test_headers_reach_both_and_nothing_is_added() -> None:
    prefill, decode = Fake(), Fake()
    sent = {"Authorization": "Bearer key", "X-Request-Id": "r1", "Connection": "keep-alive, x-mine", "X-Mine": "1"}
    async with routed([prefill], [decode]) as to:
        await to.client.post(
            to.url + CHAT,
            json={"messages": []},
            headers=sent,
            skip_auto_headers=["Accept", "Accept-Encoding", "User-Agent"],
        )
        await prefill.arrived.acquire()
    for fake in (prefill, decode):
        heard = fake.heard[0]
        assert (heard.method, heard.path) == ("POST", CHAT)
        assert {name.lower() for name in heard.headers} == {
            "host", "authorization", "x-request-id", "content-type", "content-length"
        }  # fmt: skip
        assert heard.headers["Host"] == fake.url.removeprefix("http://")


@pytest.mark.parametrize("raw", [b"{", b'["x"]', b'{"prompt": "p", "kv_transfer_params": 5}', b"\x1f\x8b"])
@running
async def test_what_is_no_request_is_for_decode_alone(raw: bytes) -> None:
    prefill, decode = Fake(), Fake(says({"error": "bad"}, 400))
    async with routed([prefill], [decode]) as to, to.client.post(to.url + "/v1/completions", data=raw) as answer:
        assert (answer.status, await answer.json()) == (400, {"error": "bad"})
    assert (prefill.heard, decode.heard[0].body) == ([], raw)


@running
async def test_a_body_that_is_too_large() -> None:
    prefill, decode = Fake(), Fake()
    async with routed([prefill], [decode], body_limit=1000) as to:
        status, body = await to.post({"prompt": "x" * 1000})
        assert status == 413
        assert json.loads(body)["error"]["code"] == 413
        assert (await to.post({"prompt": "x" * 900}))[0] == 200
    assert len(decode.heard) == 1


# -- answers --


@running
async def test_a_stream_arrives_while_it_is_made() -> None:
    chunks: asyncio.Queue[bytes | None] = asyncio.Queue()
    async with routed([Fake()], [Fake(streams(chunks))]) as to:
        asking = asyncio.create_task(to.client.post(to.url + CHAT, json={"messages": [], "stream": True}))
        chunks.put_nowait(b"data: 0\n\n")
        answer = await asking
        assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert await answer.content.readany() == b"data: 0\n\n"
        for number in range(1, 4):
            chunks.put_nowait(b"data: %d\n\n" % number)  # only now, after the one before has arrived
            assert await answer.content.readany() == b"data: %d\n\n" % number
        chunks.put_nowait(None)
        assert await answer.content.readany() == b""
        assert await to.count("first_byte_seconds_count", engine=to.router.decode.engines[0].name) == 1


@pytest.mark.parametrize("status", [400, 404, 422, 500, 503])
@running
async def test_errors_of_decode_are_the_clients(status: int) -> None:
    error = {"error": {"message": "as the engine says it", "code": status}}
    prefill, decode, other = Fake(hangs), Fake(says(error, status, **{"X-Why": "so", "Retry-After": "7"})), Fake()
    async with routed([prefill], [decode, other]) as to:
        async with to.client.post(to.url + "/v1/completions", json={"prompt": "p"}) as answer:
            assert (answer.status, await answer.json()) == (status, error)
            assert (answer.headers["X-Why"], answer.headers["Retry-After"]) == ("so", "7")
        if prefill.heard:  # or it was aborted before it was sent
            await prefill.aborted.acquire()
        outcome = "client_error" if status < 500 else "server_error"
        assert await to.count("requests_total", engine=decode.url, outcome=outcome, role="decode") == 1
    assert other.heard == []


@running
async def test_an_answer_that_breaks_off_is_not_taken_for_a_whole_one() -> None:
    async def breaks_off(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(b"half")
        assert request.transport is not None
        request.transport.close()
        return answer

    prefill, decode = Fake(hangs), Fake(breaks_off)
    async with routed([prefill], [decode]) as to:
        with pytest.raises(aiohttp.ClientPayloadError):
            await to.post()
        assert await to.count("requests_total", engine=decode.url, outcome="broken", role="decode") == 1


# -- which engine --


@running
async def test_a_conversation_stays_where_its_prefix_is() -> None:
    prefill, decode = [Fake(), Fake()], [Fake(), Fake()]
    async with routed(prefill, decode) as to:

        async def ask(*turns: str) -> tuple[int, int]:
            before = [len(fake.heard) for fake in (*prefill, *decode)]
            assert (await to.post({"messages": [{"role": "user", "content": turn} for turn in turns]}, CHAT))[0] == 200
            return _grown(prefill, before[:2]), _grown(decode, before[2:])

        for fake in decode:
            fake.act = _after(prefill)
        one, other = await ask("1" * 600), await ask("2" * 600)
        assert one[1] != other[1]
        assert one[0] != other[0]
        assert [await ask("2" * 600, "more"), await ask("2" * 600, "3" * 900)] == [other, other]
        assert [await ask("1" * 600, "more"), await ask("1" * 600, "more", "4" * 300)] == [one, one]


def _grown(fakes: list[Fake], before: list[int]) -> int:
    counts = [len(fake.heard) - count for fake, count in zip(fakes, before, strict=True)]
    assert sorted(counts) == [0, 1]
    return counts.index(1)


def _after(prefill: list[Fake]) -> Act:
    """Answers when one more prefill has arrived."""

    async def act(_: web.Request) -> web.Response:
        waiting = [asyncio.create_task(fake.arrived.acquire()) for fake in prefill]
        _, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        return web.Response()

    return act


# -- everything else --


@running
async def test_other_paths_go_to_decode_as_they_are() -> None:
    prefill, decode = Fake(), Fake(says({"ok": True}))
    async with routed([prefill], [decode]) as to:
        for method, path, data in (
            ("GET", "/v1/models?a=%2F&b=c%20d", b""), ("POST", "/tokenize", b"\x00\xff"), ("GET", "/version", b""),
            ("POST", "/detokenize", b"{}"), ("DELETE", "/v1/responses/r%2F1", b""), ("GET", "/v1/completions", b""),
            ("PUT", "/v1/embeddings", b"x" * 300_000),
        ):  # fmt: skip
            url = URL(to.url + path, encoded=True)
            async with to.client.request(method, url, data=data, headers={"X-Mine": "1"}) as answer:
                assert (answer.status, await answer.json()) == (200, {"ok": True})
            heard = decode.heard[-1]
            assert (heard.method, heard.path, heard.body, heard.headers["X-Mine"]) == (method, path, data, "1")
        async with to.client.head(to.url + "/v1/models") as answer:
            assert (answer.status, answer.headers["Content-Length"]) == (200, "12")
        count = len(decode.heard)
        for path in ("/sleep", "/metrics/x", "/v1/../sleep", "/v1/%2e%2e/sleep", "/v1/a/./b", "/"):
            async with to.client.get(URL(to.url + path, encoded=True)) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (404, 404)
    assert (prefill.heard, len(decode.heard)) == ([], count)


@running
async def test_compressed_bodies_and_cookies_pass_through() -> None:
    packed = b"\x1f\x8b not really"

    async def act(_: web.Request) -> web.Response:
        return web.Response(body=packed, headers={"Content-Encoding": "gzip", "Set-Cookie": "a=1"})

    decode = Fake(act)
    client = aiohttp.ClientSession(auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar())
    async with client, routed([Fake()], [decode]) as to:
        for _ in range(2):
            async with client.get(to.url + "/v1/models", headers={"Accept-Encoding": "gzip"}) as answer:
                assert await answer.read() == packed
                assert (answer.headers["Content-Encoding"], answer.headers["Set-Cookie"]) == ("gzip", "a=1")
    assert decode.heard[0].headers["Accept-Encoding"] == "gzip"
    assert "Cookie" not in decode.heard[1].headers


@running
async def test_health_is_that_of_decode() -> None:
    prefill, decode = [Fake(), await gone()], [Fake(), await gone()]
    async with routed(prefill, decode) as to:
        status, body = await to.get("/health")
        shown = json.loads(body)
        assert (status, shown["status"]) == (200, "ok")
        assert [(engine["role"], engine["name"], engine["healthy"]) for engine in shown["engines"]] == [
            ("prefill", "p0", True),
            ("prefill", "p1", False),
            ("decode", decode[0].url, True),
            ("decode", decode[1].url, False),
        ]
        assert [engine["left_out_for_s"] > 0 for engine in shown["engines"]] == [False, True, False, True]
    async with routed([Fake()], [await gone()]) as to:
        status, body = await to.get("/health")
        assert (status, json.loads(body)["status"]) == (503, "no decode engine is healthy")


@running
async def test_metrics() -> None:
    async with routed([Fake()], [decode := Fake()]) as to:
        for _ in range(3):
            await to.post()
        await to.get("/v1/models")
        assert await to.count("requests_total", engine=decode.url, outcome="ok", role="decode") == 4
        assert await to.count("first_byte_seconds_count", engine=decode.url) == 3
        prefilled = [
            await to.count("requests_total", engine="p0", outcome=of, role="prefill") for of in ("ok", "aborted")
        ]
        assert sum(prefilled) == 3
