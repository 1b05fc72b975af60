"""Prometheus metrics under the names NVIDIA's KVBM uses where they exist, plus time and byte histograms.

The counters of its first version have no `_total` suffix, so they are exposed as untyped samples of exactly those
names. Everything is read when it is scraped; nothing is counted here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kvbm.observe.names import DISK, PEERS, WAYS
from kvbm.observe.totals import Histogram, Totals

POOL_COUNTERS = {
    "allocations": ("kvbm_allocations", "slots given out"),
    "evictions": ("kvbm_evictions", "blocks that made room for others"),
    "registrations": ("kvbm_registrations", "blocks that became matchable"),
    "duplicates": ("kvbm_duplicate_blocks", "blocks that were already there when they were registered"),
    "requested": ("kvbm_match_hashes_requested", "keys asked for in matches"),
    "returned": ("kvbm_match_blocks_returned", "blocks found by matches"),
}
POOL_GAUGES = {
    "total": ("kvbm_pool_size", "slots of the tier that can be used now"),
    "capacity": ("kvbm_pool_capacity", "slots of the tier once all of its memory is there"),
    "free": ("kvbm_reset_pool_size", "slots that hold nothing"),
    "inactive": ("kvbm_inactive_pool_size", "blocks that requests can match and no request holds"),
    "active": ("kvbm_inflight_immutable", "blocks that a request or a copy holds"),
    "staged": ("kvbm_inflight_mutable", "slots that a copy is writing"),
}


LOWER_COUNTERS = {
    (DISK, "refused"): ("kvbm_demote_refused_blocks", "blocks that admission or the write budget kept from disk"),
    (DISK, "cancelled"): ("kvbm_demote_cancelled_blocks", "blocks that had left host memory before their write began"),
    (DISK, "corrupt"): ("kvbm_corrupt_blocks", "blocks on disk that were not what had been written"),
    (PEERS, "peer_corrupt"): (
        "kvbm_peer_corrupt_blocks",
        "blocks from other instances that were not what they had promised",
    ),
    (PEERS, "promised"): ("kvbm_peer_promised_blocks", "blocks that were held for other instances to read"),
    (PEERS, "searches"): ("kvbm_peer_searches", "requests whose blocks were looked for at other instances"),
}


TRUST_COUNTERS = {
    "sampled": ("kvbm_shadow_requests", "hits that were declined, to compare what is computed with what is stored"),
    "compared": ("kvbm_shadow_compared_blocks", "blocks that were compared"),
    "mismatched": ("kvbm_shadow_mismatched_blocks", "compared blocks that were not what the engine computed"),
    "skipped": ("kvbm_shadow_skipped_blocks", "blocks of declined hits that could not be compared"),
    "violations": ("kvbm_invariant_violations", "invariants that did not hold"),
    "corrupt": ("kvbm_host_corrupt_blocks", "blocks that had changed in host memory when they were loaded"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What is read when it is scraped."""

    totals: Totals
    block_tokens: int
    healthy: Callable[[], bool]
    tiers: Callable[[], Mapping[str, bool]]
    """Those that were asked for, and whether each works."""
    pools: Callable[[], Mapping[str, Mapping[str, int]]]
    """The numbers of each tier's pool, by the names in POOL_COUNTERS and POOL_GAUGES."""
    lower: Callable[[], Mapping[str, Mapping[str, int]]]
    """By tier, those in LOWER_COUNTERS; what is missing is 0."""
    trust: Callable[[], Mapping[str, int]] = dict[str, int]
    """Those in TRUST_COUNTERS; what is missing is 0."""
    quarantined: Callable[[], bool] = bool
    steps: Callable[[], tuple[Sequence[float], Sequence[int], float]] = lambda: ((), (0,), 0.0)
    """How long the engine waited for KVBM in each step: upper bounds, counts, the last above all bounds; the sum."""


class KvbmCollector(Collector):
    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        totals, pools, lower = self._sources.totals, self._sources.pools(), self._sources.lower()
        from_disk = totals.sources[DISK] // self._sources.block_tokens
        for name, value, text in (
            ("kvbm_offload_blocks_d2h", totals.offload.blocks, "blocks copied from the engine to host memory"),
            ("kvbm_offload_blocks_h2d", totals.demote.blocks, "blocks copied from host memory to disk"),
            ("kvbm_onboard_blocks_h2d", totals.onboard.blocks, "blocks copied from host memory to the engine"),
            ("kvbm_onboard_blocks_d2h", totals.promote.blocks, "blocks copied from disk to host memory"),
            ("kvbm_onboard_blocks_d2d", from_disk, "blocks promised to the engine that were read from disk for it"),
            ("kvbm_matched_tokens", totals.g2_tokens, "prompt tokens that requests were spared by host memory"),
        ):
            metric = Metric(name, text, "unknown")
            metric.add_sample(name, {}, value)
            yield metric
        yield GaugeMetricFamily("kvbm_host_cache_hit_rate", "of the last 1000 requests", totals.hit_rate())
        yield GaugeMetricFamily("kvbm_disk_cache_hit_rate", "of the last 1000 requests", totals.disk_hit_rate())
        yield GaugeMetricFamily("kvbm_healthy", "1 unless KVBM stands aside", float(self._sources.healthy()))
        tiers = GaugeMetricFamily("kvbm_tier_healthy", "1 while the tier is used", labels=["tier"])
        for tier, works in self._sources.tiers().items():
            tiers.add_metric([tier], float(works))
        yield tiers
        for name, value, text in (
            ("kvbm_requests", totals.requests, "requests that may read, and have got their blocks"),
            ("kvbm_requested_tokens", totals.prompt_tokens, "prompt tokens of the requests in kvbm_requests_total"),
            ("kvbm_peer_tokens", totals.sources[PEERS], "matched tokens that had come from other instances"),
            (
                "kvbm_pulled_tokens",
                totals.pulled_tokens,
                "requested tokens that another instance computed for it",
            ),
            (
                "kvbm_unread_requests",
                totals.unread,
                "requests that may not read, or asked not to; not in the others",
            ),
            ("kvbm_device_tokens", totals.device_tokens, "requested tokens that the engine itself held"),
        ):
            yield CounterMetricFamily(name, text, value)
        copied = CounterMetricFamily(
            "kvbm_tier_copied_blocks", "blocks copied from one place to another", labels=["source", "target"]
        )
        places = {"g1", *pools, *lower}
        for ends, copies in tuple(totals.copies.items()):
            if copies.blocks or copies.failed or places.issuperset(ends):
                copied.add_metric(ends, copies.blocks)
        yield copied
        for way in WAYS:
            copies = totals.way(way)
            yield CounterMetricFamily(f"kvbm_{way}_failed_blocks", "blocks whose copy failed", copies.failed)
            yield CounterMetricFamily(f"kvbm_{way}_bytes", "bytes copied, over all ranks", copies.nbytes)
            yield _histogram(f"kvbm_{way}_seconds", "time of one copy on the slowest rank", copies.seconds)
            yield _histogram(f"kvbm_{way}_copy_bytes", "size of one copy, over all ranks", copies.sizes)
        yield CounterMetricFamily(
            "kvbm_gated_blocks", "blocks that were not loaded, because computing them was faster", totals.gated
        )
        for (tier, count), (name, text) in LOWER_COUNTERS.items():
            yield CounterMetricFamily(name, text, lower.get(tier, {}).get(count, 0))
        trust = self._sources.trust()
        for count, (name, text) in TRUST_COUNTERS.items():
            yield CounterMetricFamily(name, text, trust.get(count, 0))
        quarantined = float(self._sources.quarantined())
        yield GaugeMetricFamily("kvbm_quarantined", "1 while KVBM knows that stored blocks are wrong", quarantined)
        bounds, counts, total = self._sources.steps()
        yield _buckets("kvbm_step_seconds", "time that the engine waited for KVBM in a step", bounds, counts, total)
        for family, rows in ((CounterMetricFamily, POOL_COUNTERS), (GaugeMetricFamily, POOL_GAUGES)):
            for key, (name, text) in rows.items():
                metric = family(name, text, labels=["pool"])
                for pool, numbers in pools.items():
                    metric.add_metric([pool], numbers[key])
                yield metric


def _histogram(name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
    return _buckets(name, text, histogram.bounds, histogram.counts, histogram.total)


def _buckets(
    name: str, text: str, bounds: Sequence[float], counts: Sequence[int], total: float
) -> HistogramMetricFamily:
    buckets, running = [], 0
    for bound, count in zip((*map(str, bounds), "+Inf"), counts, strict=True):
        running += count
        buckets.append((bound, running))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=total)
