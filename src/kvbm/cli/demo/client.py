"""A client of the OpenAI-compatible server that measures: one request at a time, streamed."""

from __future__ import annotations

import http.client
import itertools
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvbm.core.errors import Broken

Message = dict[str, str]

_TIMEOUT_S = 120.0
_METRIC = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{.*\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. `cached_tokens` are those of the prompt that the engine did not compute, as it reports them; `gaps_s`
    the times between its pieces."""

    text: str
    ttft_s: float
    prompt_tokens: int
    answer_tokens: int
    cached_tokens: int
    gaps_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Client:
    """Raises Broken when the server does not answer as it should."""

    host: str
    port: int
    model: str

    def chat(self, messages: list[Message], max_tokens: int) -> Reply:
        """Ask at temperature 0; the time to the first token is that of the first text in the stream."""
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        text, usage, times = "", None, list[float]()
        start = time.perf_counter()
        with self._request("POST", "/v1/chat/completions", body) as response:
            for event in _events(response):
                usage = event.get("usage") or usage
                for choice in event.get("choices", ()):
                    part = choice["delta"].get("content") or ""
                    if part:
                        times.append(time.perf_counter() - start)
                    text += part
        if not times or usage is None:
            raise Broken("the server ended its answer without text or without counting its tokens")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        gaps = tuple(b - a for a, b in itertools.pairwise(times))
        return Reply(text, times[0], usage["prompt_tokens"], usage["completion_tokens"], cached, gaps)

    def count_tokens(self, text: str) -> int:
        """Tokens of `text` alone."""
        with self._request("POST", "/tokenize", {"model": self.model, "prompt": text}) as response:
            return int(json.load(response)["count"])

    def metrics(self) -> dict[str, float]:
        """The server's Prometheus metrics, summed over labels."""
        with self._request("GET", "/metrics") as response:
            content = response.read().decode()
        totals: dict[str, float] = {}
        for name, value in _METRIC.findall(content):
            totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    @contextmanager
    def _request(self, method: str, path: str, body: Any = None) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=_TIMEOUT_S)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise Broken(f"{path} answered {response.status}: {response.read(500).decode(errors='replace')}")
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise Broken(f"{path} did not answer: {error!r}") from error
        finally:
            connection.close()


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        data = line.removeprefix(b"data: ").strip()
        if line.startswith(b"data: ") and data != b"[DONE]":
            event = json.loads(data)
            if "error" in event:
                raise Broken(f"the server answered with an error: {event['error']}")
            yield event
