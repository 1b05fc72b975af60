"""What a replay measured: the table, and the file (fields: docs/replay.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kvbm.cli.replay.bounds import Hits
from kvbm.cli.replay.run import Result, TierResult
from kvbm.cli.replay.trace import Trace, Workload

Say = Callable[[str], None]
"""Told what is done next."""


@dataclass(frozen=True, slots=True)
class Bound:
    """MIN with as many blocks as all tiers have together."""

    capacity: int
    min: Hits
    min_leaf_first: Hits


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was measured."""

    workload: Workload
    placement: str
    admission: str
    runs: tuple[Result, ...]
    everything_fits: Hits
    bounds: tuple[Bound, ...]


def tiers(capacities: Mapping[str, int]) -> str:
    """ "g2=1,000 g3=50,000"."""
    return " ".join(f"{tier}={capacity:,}" for tier, capacity in capacities.items())


def record(report: Report) -> dict[str, Any]:
    """What is written to the file."""
    workload = report.workload
    return {
        "traces": [_trace(trace) for trace in workload.traces],
        "requests": len(workload.prompts),
        "references": workload.references,
        "unique_blocks": workload.unique,
        "longest_request_blocks": workload.longest,
        "input_tokens": workload.tokens,
        "skipped_lines": _skipped(workload),
        "placement": report.placement,
        "admission": report.admission,
        "everything_fits": _ratios(report.everything_fits, workload),
        "bounds": [
            {
                "capacity": bound.capacity,
                "min": _ratios(bound.min, workload),
                "min_leaf_first": _ratios(bound.min_leaf_first, workload),
            }
            for bound in report.bounds
        ],
        "runs": [_run(run, workload) for run in report.runs],
    }


def _trace(trace: Trace) -> dict[str, Any]:
    return {
        "name": trace.name,
        "requests": len(trace.lines),
        "block_tokens": trace.block_tokens,
        "skipped_lines": trace.skipped,
    }


def _run(run: Result, workload: Workload) -> dict[str, Any]:
    return {
        "policy": run.policy,
        "capacity": run.capacity,
        **_ratios(Hits(run.hit_blocks, run.hit_tokens), workload),
        "cut_requests": run.cut,
        "references_per_s": _speed(run, workload),
        "p50_us": _percentile(run, 50),
        "p99_us": _percentile(run, 99),
        "tiers": [
            {
                "name": tier.name,
                "capacity": tier.capacity,
                **_ratios(Hits(tier.hit_blocks, tier.hit_tokens), workload),
                "evictions": tier.evictions,
                "written_blocks": tier.written,
            }
            for tier in run.tiers
        ],
    }


def _ratios(hits: Hits, workload: Workload) -> dict[str, Any]:
    return {
        "hit_blocks": hits.blocks,
        "hit_tokens": hits.tokens,
        "block_hit_ratio": hits.blocks / workload.references,
        "token_hit_ratio": hits.tokens / workload.tokens if workload.tokens else 0.0,
    }


def _speed(run: Result, workload: Workload) -> float:
    return workload.references / float(run.seconds.sum())


def _percentile(run: Result, percent: int) -> float:
    return float(np.percentile(run.seconds, percent)) * 1e6


def _skipped(workload: Workload) -> int:
    return sum(trace.skipped for trace in workload.traces)


def table(report: Report) -> Group:
    """The same for people: a group of rows for each choice of tiers, its bound below it."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("")
    for name in ("block\nhits", "token\nhits", "\nevicted", "\nwritten", "blocks\nper s", "p50\nµs", "p99\nµs"):
        shown.add_column(name, justify="right")
    bounds = {bound.capacity: bound for bound in report.bounds}
    for _, runs in groupby(report.runs, key=lambda run: [(tier.name, tier.capacity) for tier in run.tiers]):
        _group(shown, list(runs), bounds, report.workload)
    shown.add_row("[bold]everything fits[/]", *_shares(report.everything_fits, report.workload))
    return Group(Text(_title(report)), "", shown)


def _title(report: Report) -> str:
    workload = report.workload
    names = " + ".join(trace.name for trace in workload.traces)
    sizes = " and ".join(f"{size}" for size in sorted({trace.block_tokens for trace in workload.traces}))
    title = (
        f"{names}: {len(workload.prompts):,} requests, {workload.references:,} blocks of {sizes} tokens,"
        f" {workload.unique:,} of them different"
    )
    if skipped := _skipped(workload):
        title += f"; {skipped:,} broken {'line' if skipped == 1 else 'lines'} skipped"
    return title


def _group(shown: Table, runs: list[Result], bounds: Mapping[int, Bound], workload: Workload) -> None:
    first = runs[0]
    shown.add_row(f"[bold]{tiers({tier.name: tier.capacity for tier in first.tiers})}[/]")
    if first.cut:
        shown.add_row(f"{first.cut:,} requests are longer: their first blocks fit")
    for run in runs:
        written, evicted = (f"{count:,}" for count in _sums(run.tiers))
        times = (f"{_speed(run, workload):,.0f}", *(f"{_percentile(run, percent):,.0f}" for percent in (50, 99)))
        shares = _shares(Hits(run.hit_blocks, run.hit_tokens), workload)
        shown.add_row(f"  {escape(run.policy)}", *shares, evicted, written, *times)
        for tier in run.tiers if len(run.tiers) > 1 else ():
            shares = _shares(Hits(tier.hit_blocks, tier.hit_tokens), workload)
            shown.add_row(f"    {tier.name}", *shares, f"{tier.evictions:,}", f"{tier.written:,}")
    bound = bounds[first.capacity]
    shown.add_row("  MIN", *_shares(bound.min, workload))
    shown.add_row("  MIN, leaf first", *_shares(bound.min_leaf_first, workload))


def _sums(results: Iterable[TierResult]) -> tuple[int, int]:
    """Blocks written and evicted."""
    counts = [(tier.written, tier.evictions) for tier in results]
    return sum(written for written, _ in counts), sum(evicted for _, evicted in counts)


def _shares(hits: Hits, workload: Workload) -> tuple[str, str]:
    ratios = _ratios(hits, workload)
    return f"{ratios['block_hit_ratio']:.4f}", f"{ratios['token_hit_ratio']:.4f}"
