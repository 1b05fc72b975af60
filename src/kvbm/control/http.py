"""Metrics and health over HTTP."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, start_http_server

from kvbm.observe.prometheus import KvbmCollector, Sources

log = logging.getLogger(__name__)


def serve(
    host: str, port: int, sources: Sources, health: Callable[[], Mapping[str, Any]] | None = None
) -> Callable[[], None] | None:
    """Serves `/metrics`, and `/health` as JSON (status 503 unless it is `healthy`), from a thread of its own; returns
    what stops it. A port that is taken is logged and None comes back: metrics are not worth an engine."""
    registry = CollectorRegistry()
    registry.register(KvbmCollector(sources))
    try:
        server, thread = start_http_server(port, host, registry)
    except (OSError, OverflowError) as error:  # OverflowError: past 65535, for a high data-parallel rank
        log.error("KVBM: no metrics: %s:%d cannot be served (%s); set metrics_port to a free one", host, port, error)
        return None
    if health is not None:
        server.set_app(_with_health(health, server.get_app()))
    log.info("KVBM: metrics on http://%s:%d/metrics, health on /health", host, port)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(5)

    return stop


def _with_health(health: Callable[[], Mapping[str, Any]], others: WSGIApplication | None) -> WSGIApplication:
    assert others is not None

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/health":
            return others(environ, start_response)
        said = health()
        status = "200 OK" if said["healthy"] else "503 Service Unavailable"
        start_response(status, [("Content-Type", "application/json")])
        return [json.dumps(said).encode() + b"\n"]

    return app
