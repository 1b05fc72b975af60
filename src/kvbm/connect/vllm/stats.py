"""KVBM's numbers on vLLM's own `/metrics`: collected in the engine core, added up in the API server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvbm.connect.vllm.harmless import harmless
from kvbm.observe.names import PEERS, WAYS
from kvbm.observe.totals import Totals

COUNTERS = {
    f"{way}_{what}": text.format(where.text)
    for way, where in WAYS.items()
    for what, text in (
        ("blocks", "blocks copied {}"),
        ("failed_blocks", "blocks whose copy {} failed"),
        ("bytes", "bytes copied {}, over all ranks"),
    )
} | {
    "gated_blocks": "blocks that were left where they were because computing them was faster",
    "matched_tokens": "prompt tokens that requests were spared by host memory",
    "peer_tokens": "of these, those that had come from other instances",
    "pulled_tokens": "prompt tokens that another instance computed for the same request",
}


def _read(totals: Totals) -> dict[str, int]:
    now = {
        "gated_blocks": totals.gated,
        "matched_tokens": totals.g2_tokens,
        "peer_tokens": totals.sources[PEERS],
        "pulled_tokens": totals.pulled_tokens,
    }
    for way in WAYS:
        copies = totals.way(way)
        now |= {f"{way}_blocks": copies.blocks, f"{way}_failed_blocks": copies.failed, f"{way}_bytes": copies.nbytes}
    return now


@dataclass
class KvbmStats(KVConnectorStats):  # type: ignore[misc]
    """`data` maps a name of COUNTERS to what was added in the interval."""

    data: dict[str, int] = field(default_factory=dict)

    @classmethod
    def since(cls, totals: Totals) -> KvbmStats:
        """The state to count from."""
        return cls(data=_read(totals))

    def advance(self, totals: Totals) -> KvbmStats:
        """What was added since; this object moves on."""
        now = _read(totals)
        news = {name: value - self.data[name] for name, value in now.items() if value != self.data[name]}
        self.data = now
        return KvbmStats(data=news)

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        return {f"kvbm {name.replace('_', ' ')}": value for name, value in self.data.items()}

    def is_empty(self) -> bool:
        return not self.data


class KvbmPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """vllm:kvbm_* counters, one per engine."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {}
        for name, text in COUNTERS.items():
            family = metric_types[Counter](f"vllm:kvbm_{name}", text, labelnames=labelnames)
            self._counters[name] = {index: family.labels(*values) for index, values in per_engine_labelvalues.items()}

    @harmless
    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            if name in self._counters:
                self._counters[name][engine_idx].inc(value)
