"""The metrics as a scraper sees them."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvbm.blocks import Pool
from kvbm.control import http
from kvbm.core.events import Gated
from kvbm.observe import prometheus
from kvbm.observe.totals import Totals
from kvbm.policy.lru import LRU
from tests.leader.ways import Admitted, Demoted, Offloaded, Onboarded, Promoted
from tests.ports import free_port


def serve(port: int, totals: Totals, *pools: Pool, healthy: bool = True) -> Callable[[], None] | None:
    names = ("g2", "g3")[: len(pools)]
    sources = prometheus.Sources(
        totals=totals,
        block_tokens=32,
        healthy=lambda: healthy,
        tiers=lambda: dict(zip(names, (True, False), strict=False)),
        pools=lambda: {name: asdict(pool.statistics()) for name, pool in zip(names, pools, strict=True)},
        lower=lambda: (
            {
                "g3": {"refused": 7, "cancelled": 8, "corrupt": 9},
                "peers": {"peer_corrupt": 1, "promised": 2, "searches": 3},
            }
            if len(pools) > 1
            else {}
        ),
    )
    return http.serve("127.0.0.1", port, sources)


def scrape(port: int) -> dict[str, float]:
    """Every sample by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    return {
        sample.name + "".join(f"|{label}={value}" for label, value in sample.labels.items()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_metric() -> None:
    totals, pool, port = Totals(), Pool(10, order=LRU(10)), free_port()
    totals.on_event(Offloaded(3, 1, 300_000, 0.002))
    totals.on_event(Onboarded(5, 2, 70_000, 0.0004))
    totals.on_event(Admitted(100, 20, 60))
    slots = pool.allocate(2)
    assert slots is not None
    slots.stage([b"a", b"b"]).register().drop()
    pool.match([b"a", b"b", b"c"]).drop()
    stop = serve(port, totals, pool)
    assert stop is not None
    samples = scrape(port)
    stop()
    assert {
        "kvbm_offload_blocks_d2h": 3,
        "kvbm_onboard_blocks_h2d": 5,
        "kvbm_matched_tokens": 60,
        "kvbm_host_cache_hit_rate": 0.75,
        "kvbm_healthy": 1,
        "kvbm_requests_total": 1,
        "kvbm_requested_tokens_total": 100,
        "kvbm_device_tokens_total": 20,
        "kvbm_offload_failed_blocks_total": 1,
        "kvbm_onboard_failed_blocks_total": 2,
        "kvbm_offload_bytes_total": 300_000,
        "kvbm_onboard_bytes_total": 70_000,
        "kvbm_offload_seconds_bucket|le=0.001": 0,
        "kvbm_offload_seconds_bucket|le=0.0025": 1,
        "kvbm_offload_seconds_bucket|le=+Inf": 1,
        "kvbm_offload_seconds_count": 1,
        "kvbm_offload_seconds_sum": 0.002,
        "kvbm_onboard_seconds_bucket|le=0.0005": 1,
        "kvbm_offload_copy_bytes_bucket|le=262144.0": 0,
        "kvbm_offload_copy_bytes_bucket|le=1048576.0": 1,
        "kvbm_onboard_copy_bytes_count": 1,
        "kvbm_allocations_total|pool=g2": 2,
        "kvbm_evictions_total|pool=g2": 0,
        "kvbm_registrations_total|pool=g2": 2,
        "kvbm_duplicate_blocks_total|pool=g2": 0,
        "kvbm_match_hashes_requested_total|pool=g2": 3,
        "kvbm_match_blocks_returned_total|pool=g2": 2,
        "kvbm_pool_size|pool=g2": 10,
        "kvbm_pool_capacity|pool=g2": 10,
        "kvbm_reset_pool_size|pool=g2": 8,
        "kvbm_inactive_pool_size|pool=g2": 2,
        "kvbm_inflight_immutable|pool=g2": 0,
        "kvbm_inflight_mutable|pool=g2": 0,
    }.items() <= samples.items()
    assert all(name.startswith("kvbm_") for name in samples)
    assert samples["kvbm_tier_healthy|tier=g2"] == 1
    assert samples["kvbm_corrupt_blocks_total"] == 0
    assert not any("g3" in name for name in samples)


def test_every_metric_of_a_disk_tier() -> None:
    totals, disk, port = Totals(), Pool(20, order=LRU(20)), free_port()
    totals.on_event(Demoted(4, 1, 400_000, 0.02))
    totals.on_event(Promoted(6, 2, 600_000, 0.03))
    totals.on_event(Gated(5))
    totals.on_event(Admitted(200, 0, 100, 64))
    stop = serve(port, totals, Pool(10, order=LRU(10)), disk)
    assert stop is not None
    samples = scrape(port)
    stop()
    assert {
        "kvbm_offload_blocks_h2d": 4,
        "kvbm_onboard_blocks_d2h": 6,
        "kvbm_onboard_blocks_d2d": 2,
        "kvbm_host_cache_hit_rate": 0.5,
        "kvbm_disk_cache_hit_rate": 0.32,
        "kvbm_tier_healthy|tier=g2": 1,
        "kvbm_tier_healthy|tier=g3": 0,
        "kvbm_demote_failed_blocks_total": 1,
        "kvbm_promote_failed_blocks_total": 2,
        "kvbm_demote_bytes_total": 400_000,
        "kvbm_promote_bytes_total": 600_000,
        "kvbm_demote_seconds_bucket|le=0.025": 1,
        "kvbm_promote_seconds_sum": 0.03,
        "kvbm_promote_copy_bytes_count": 1,
        "kvbm_gated_blocks_total": 5,
        "kvbm_demote_refused_blocks_total": 7,
        "kvbm_demote_cancelled_blocks_total": 8,
        "kvbm_corrupt_blocks_total": 9,
        "kvbm_pool_size|pool=g2": 10,
        "kvbm_pool_size|pool=g3": 20,
    }.items() <= samples.items()


def test_health_is_read_when_scraped() -> None:
    port = free_port()
    stop = serve(port, Totals(), Pool(1, order=LRU(1)), healthy=False)
    assert stop is not None
    assert scrape(port)["kvbm_healthy"] == 0
    stop()
    with pytest.raises(OSError):  # noqa: PT011
        scrape(port)


def test_a_port_that_is_taken_is_not_worth_an_engine(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        assert serve(sock.getsockname()[1], Totals(), Pool(1, order=LRU(1))) is None
    assert serve(65_536, Totals(), Pool(1, order=LRU(1))) is None
    assert caplog.text.count("set metrics_port to a free one") == 2


def test_health() -> None:
    port, said = free_port(), {"healthy": True, "problems": []}
    sources = prometheus.Sources(totals=Totals(), block_tokens=32, healthy=bool, tiers=dict, pools=dict, lower=dict)
    stop = http.serve("127.0.0.1", port, sources, lambda: said)
    assert stop is not None
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30) as reply:
        assert (reply.status, json.load(reply)) == (200, said)
        assert reply.headers["Content-Type"] == "application/json"
    said |= {"healthy": False, "problems": ["a copy thread died"]}
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30)
    assert (refused.value.code, json.load(refused.value)) == (503, said)
    refused.value.close()
    assert "kvbm_healthy" in scrape(port)
    stop()


def test_what_is_trusted() -> None:
    port = free_port()
    sources = prometheus.Sources(
        totals=Totals(), block_tokens=32, healthy=bool, tiers=dict, pools=dict, lower=dict,
        trust=lambda: dict(zip(prometheus.TRUST_COUNTERS, range(1, 7), strict=True)), quarantined=lambda: True,
        steps=lambda: ((0.001, 0.01), (5, 2, 1), 0.25),
    )  # fmt: skip
    stop = http.serve("127.0.0.1", port, sources)
    assert stop is not None
    samples = scrape(port)
    stop()
    assert [samples[f"{name}_total"] for name, _ in prometheus.TRUST_COUNTERS.values()] == [1, 2, 3, 4, 5, 6]
    assert samples["kvbm_quarantined"] == 1
    assert [samples[f"kvbm_step_seconds_bucket|le={le}"] for le in ("0.001", "0.01", "+Inf")] == [5, 7, 8]
    assert samples["kvbm_step_seconds_sum"] == 0.25
