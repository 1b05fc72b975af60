"""An engine's answers, for people."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def console(*, highlight: bool = False) -> Console:
    """Standard output, as wide as a terminal is; into a pipe or a file, lines as long as they are, unless COLUMNS says
    how wide."""
    given = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=highlight, width=None if given else 10_000)


def size(count: float) -> str:
    """Bytes in units of 1000: "1.5 GB"."""
    unit = 0
    while abs(count) >= 999.5 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.0f} B" if unit == 0 else f"{count:.3g} {_UNITS[unit]}"


def duration(seconds: float) -> str:
    """ "42 s", "3 min", "5 h 10 min", "2 d 3 h"."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86_400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


def progress() -> Progress:
    """How far something is, for terminals: a bar on standard error; nothing where that is none, whatever FORCE_COLOR
    says of colours."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def status(result: dict[str, Any]) -> RenderableType:
    """One engine: health, tiers, tokens, copies."""
    health = "[green]healthy[/]" if result["healthy"] else "[red]unhealthy[/]"
    if result["paused"]:
        health += ", [yellow]paused[/]"
    lines = [f"{health}, up {duration(result['uptime_s'])}, generation {result['generation']}, {_shape(result)}"]
    lines += [f"[red]- {escape(problem)}[/]" for problem in result["problems"]]
    lines += [f"[yellow]- {tier.upper()} is not used: {escape(why)}[/]" for tier, why in _degraded(result).items()]
    lines += [f"[yellow]- {escape(why)}[/]" for why in result.get("smaller", {}).values()]
    model, address = result.get("model") or "a model", result.get("address")
    title = f"[bold]{escape(model)}[/]{f' at {address}' if address else ''}, engine {escape(result['engine'])}, KVBM "
    title += escape(result["version"])
    return Panel(Group(*lines, _tiers(result), *_traffic(result)), title=title, title_align="left", expand=False)


def _degraded(result: dict[str, Any]) -> dict[str, str]:
    degraded: dict[str, str] = result.get("degraded", {})
    return degraded


def _shape(result: dict[str, Any]) -> str:
    ranks = "1 rank" if result["ranks"] == 1 else f"{result['ranks']} ranks"
    return f"{ranks}, blocks of {result['block_tokens']} tokens = {size(result['block_bytes'])}"


def _tiers(result: dict[str, Any]) -> Table:
    table = Table("tier", box=None, pad_edge=False)
    for column in ("size", "blocks", "held", "cached", "in copy", "free", "used"):
        table.add_column(column, justify="right")
    for tier in result["tiers"]:
        if "total" not in tier:
            continue
        counts = [f"{tier[name]:,}" for name in ("active", "inactive", "staged", "free")]
        capacity = tier.get("capacity", tier["total"])
        blocks = f"{tier['total']:,}" + (f" of {capacity:,}" if capacity > tier["total"] else "")
        used = (tier["total"] - tier["free"]) / tier["total"] if tier["total"] else 0.0
        table.add_row(tier["name"].upper(), size(tier["bytes"]), blocks, *counts, f"{used:.0%}")
    return table


def _traffic(result: dict[str, Any]) -> list[str]:
    tokens, offload, onboard = result["tokens"], result["offload"], result["onboard"]
    below = [f"{name} {tokens[name]:,}" for name in tokens if name not in ("prompt", "device", "g2", "pulled")]
    hits = [f"{name} {tokens[name]:,}" for name in ("device", "g2", "pulled") if name in tokens]
    hits[1] += f" (of these from {', '.join(below)})" if below else ""
    tiers = [tier["name"] for tier in result["tiers"]]
    rates = [f"{name} {rate:.1%}" for name, rate in result["hit_rate"].items() if name in tiers]
    unread = f"; {count:,} more requests did not look" if (count := result.get("unread_requests", 0)) else ""
    return [
        f"requests {result['requests']:,}, prompt tokens {tokens['prompt']:,}; found in: {', '.join(hits)}{unread}",
        f"hit rate of look-ups: {', '.join(rates)}; evictions {result['evictions']:,}",
        f"down {_moved(offload)} ({offload['in_flight']} in flight,"
        f" {offload['failed']} failed, {offload['skipped']} skipped, {offload['dropped']} dropped)",
        f"up   {_moved(onboard)} ({onboard['in_flight']} in flight,"
        f" {onboard['failed']} failed, {onboard['gated']} gated); {_least(result['least_tokens'])}",
        *(_trust(result) if "trust" in result else ()),
        *(_disk(result) if "demote" in result else ()),
        *(_peers(result) if "peers" in result else ()),
        *(_shared(result) if "g4" in result else ()),
        *_others(result),
    ]


def _moved(copies: dict[str, Any]) -> str:
    """What was copied one way, and how fast the last of it."""
    lately = f", lately at {size(rate)}/s" if (rate := copies.get("bytes_per_s")) else ""
    return f"{size(copies['bytes'])} in {copies['blocks']:,} blocks{lately}"


def _others(result: dict[str, Any]) -> Iterator[str]:
    """Tiers that nothing above tells of."""
    for tier in result["tiers"]:
        if "total" not in tier and tier["name"] not in ("peers", "g4"):
            counts = [f"{name.replace('_', ' ')} {count:,}" for name, count in tier.items() if isinstance(count, int)]
            yield f"{escape(tier['name'])}: {escape(tier['problem'] or ', '.join(counts))}"


def _shared(result: dict[str, Any]) -> list[str]:
    g4 = result["g4"]
    (tier,) = (tier for tier in result["tiers"] if tier["name"] == "g4")
    if tier["problem"]:
        return []  # it was said above
    tokens = g4["run_blocks"] * result["block_tokens"]
    return [
        f"shared storage {escape(g4['url'])}: {tier['runs']:,} runs known, of {g4['run_blocks']} blocks"
        f" = {tokens:,} tokens each; {tier['warmed']:,} blocks read at the start",
        f"to shared storage {g4['waiting']:,} runs waiting, {g4['in_flight']['put']} in flight,"
        f" {tier['refused']:,} refused, {tier['cancelled']:,} gone before;"
        f" from there {g4['in_flight']['get']} in flight, {tier['corrupt']:,} blocks corrupt",
    ]


def _least(least: dict[str, float | None]) -> str:
    words = ("never" if tokens is None else f"from {tokens:,.0f} tokens on" for tokens in least.values())
    return "a hit is loaded {}, beside other requests {}".format(*words)


def _trust(result: dict[str, Any]) -> list[str]:
    trust, waits = result["trust"], result["engine_ms"]
    lines = [
        f"the engine waits {waits['p50']:.2f} ms in a step, p99 {waits['p99']:.2f} ms, worst {waits['max']:.0f} ms"
    ]
    if "sampled" in trust:
        lines += [
            f"shadow: {trust['sampled']:,} hits declined, {trust['compared']:,} blocks compared,"
            f" {trust['mismatched']:,} differ, {trust['skipped']:,} not compared"
        ]
    if trust["corrupt"]:
        lines += [f"{trust['corrupt']:,} blocks had changed in host memory when they were loaded"]
    return lines


def _peers(result: dict[str, Any]) -> list[str]:
    fetch, sharing = result["fetch"], result["sharing"]
    known = [escape(name) + ("" if peer["usable"] else " (left alone)") for name, peer in result["peers"].items()]
    return [
        f"peers: {', '.join(known) or 'none'}; {sharing['entries']:,} entries in the directory",
        f"from peers {_moved(fetch)} ({fetch['in_flight']} in flight,"
        f" {fetch['failed']} failed, {sharing['peer_corrupt']} corrupt); {sharing['promised']:,} held for them,"
        f" {sharing['lapsed']} of these too long",
    ]


def _disk(result: dict[str, Any]) -> list[str]:
    demote, promote = result["demote"], result["promote"]
    computed, read = (result["rates"][name] for name in ("computed_tokens_per_s", "read_blocks_per_s"))
    return [
        f"to disk   {_moved(demote)} ({demote['in_flight']} in flight,"
        f" {demote['failed']} failed, {demote['refused']} refused, {demote['cancelled']} gone before)",
        f"from disk {_moved(promote)} ({promote['in_flight']} in flight,"
        f" {promote['failed']} failed, {promote['gated']} gated, {promote['corrupt']} corrupt)",
        f"measured: the engine computes {_rate(computed)} tokens/s, the disk reads"
        f" {_rate(None if read is None else read * result['block_tokens'])} tokens/s",
    ]


def _rate(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}"


def explain(engine: str, result: dict[str, Any]) -> RenderableType:
    """One request: what was matched where, what was loaded, what was not and why."""
    when = datetime.datetime.fromtimestamp(result["when"]).strftime("%Y-%m-%d %H:%M:%S")
    block = result["block_tokens"]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("engine", escape(engine))
    table.add_row("arrived", when)
    table.add_row("outcome", escape(result["outcome"]))
    table.add_row("prompt", f"{result['prompt_tokens']:,} tokens")
    table.add_row("in the device", f"{result['device_tokens']:,} tokens")
    for tier, blocks in result["matched"].items():
        # What was on disk is matched once it is in host memory.
        name = {"g3": "staged from disk", "peer": "from other instances"}.get(tier, f"matched in {tier.upper()}")
        table.add_row(name, f"{blocks:,} blocks = {blocks * block:,} tokens")
    took = "" if result["load_ms"] is None else f" in {result['load_ms']:,.1f} ms"
    how = "" if result["load"] == "none" else f" ({result['load']}){took}"
    table.add_row("loaded", f"{result['loaded_blocks']:,} blocks{how}")
    table.add_row("offloaded", f"{result['offloaded_blocks']:,} blocks")
    why = [f"- {escape(sentence)}" for sentence in result["why"]]
    return Group(f"[bold]request {escape(result['request_id'])}[/]", table, *why)
