"""What the router counts, for Prometheus."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Of one router, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "kvbm_route_requests",
            "Requests that ended: ok, client_error (4xx), server_error (5xx), unreachable, broken, aborted",
            ("role", "engine", "outcome"),
            registry=self._registry,
        )
        self.prefill_failures = Counter(
            "kvbm_route_prefill_failures",
            "Requests that a prefill engine failed, and decode computed",
            ("engine",),
            registry=self._registry,
        )
        self.aborts = Counter(
            "kvbm_route_aborts",
            "Requests that were aborted at an engine: reason client (it went away) or decode (it ended before prefill)",
            ("role", "reason"),
            registry=self._registry,
        )
        self.first_byte = Histogram(
            "kvbm_route_first_byte_seconds",
            "From a completion's arrival to the first byte of its answer",
            ("engine",),
            buckets=_BUCKETS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)
