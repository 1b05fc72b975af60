"""``kvbm replay``: what was asked for, checked before anything runs; then the runs and their figures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvbm.cli import render
from kvbm.cli.engines import Json
from kvbm.cli.replay import report
from kvbm.cli.replay.bounds import Advance, Min, everything_fits
from kvbm.cli.replay.report import Bound, Report
from kvbm.cli.replay.run import replay
from kvbm.cli.replay.trace import SAMPLE, Workload, find, interleave, read
from kvbm.core import config
from kvbm.core.errors import KvbmError, UsageError
from kvbm.core.extras import installing
from kvbm.policy import ADMISSIONS, EVICTION_ORDERS, PLACEMENTS, admission, eviction_order, placement

_err = Console(stderr=True)

_CAPACITIES = "1%,5%,10%,25%,50%"
_PLOTS = (".png", ".svg")


@dataclass(frozen=True, slots=True)
class Size:
    """A capacity as it was given: `amount` blocks, or that percentage of the unique blocks."""

    amount: float
    is_share: bool

    def blocks(self, unique: int) -> int:
        return max(1, round(unique * self.amount / 100)) if self.is_share else int(self.amount)


Tiering = dict[str, Size]
"""A size for each tier, the fastest first."""


def command(
    traces: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TRACE]...",
            show_default=False,
            help=f"Trace files: a path, a name in the folder of traces, - (standard input); by default {SAMPLE!r}.",
        ),
    ] = None,
    folder: Annotated[Path | None, typer.Option("--traces", metavar="DIR", help="Find traces in this folder.")] = None,
    policies: Annotated[
        list[str],
        typer.Option("--policy", metavar="NAME,...", help=f"Evict by: {', '.join(EVICTION_ORDERS)}."),
    ] = ["lru"],  # noqa: B006  typer copies it
    capacities: Annotated[
        list[str] | None,
        typer.Option(
            "--capacity",
            metavar="BLOCKS,...",
            show_default=_CAPACITIES,
            help="Replay with a single tier of these sizes, in blocks or in percent of the unique blocks.",
        ),
    ] = None,
    tierings: Annotated[
        list[str] | None,
        typer.Option(
            "--tiers",
            metavar="g2=BLOCKS,g3=BLOCKS",
            help="Replay with these tiers, the fastest first. Repeatable.",
        ),
    ] = None,
    placed: Annotated[
        str, typer.Option("--placement", metavar="NAME", help=f"Place blocks by: {', '.join(PLACEMENTS)}.")
    ] = "write-through",
    admitted: Annotated[
        str,
        typer.Option("--admission", metavar="NAME", help=f"Admit blocks to slower tiers by: {', '.join(ADMISSIONS)}."),
    ] = "all",
    block_tokens: Annotated[
        int | None,
        typer.Option("--block-size", metavar="TOKENS", min=1, show_default="inferred", help="Tokens of a block."),
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count broken lines and go on.")] = False,
    as_json: Json = False,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw hit ratio over capacity (.png or .svg).")
    ] = None,
) -> None:
    """Replay request traces through KVBM's block manager, with any policies, capacities and tiers."""
    names = list(dict.fromkeys(_split(policies, "--policy")))
    for name in names:
        eviction_order(name, 1)
    placement(placed)
    admission(admitted, 1)
    asked = _tierings(capacities, tierings)
    _check_plot(plot_file)
    workload = _workload(traces or [SAMPLE], folder, skip_bad=skip_bad, block_tokens=block_tokens)
    result = _measure(workload, _resolved(asked, workload.unique), names, placed, admitted)
    if as_json:
        print(json.dumps(report.record(result), indent=2))
    else:
        render.console().print(report.table(result))
    if plot_file is not None:
        # Here, because matplotlib is there only where the extra `plot` was installed.
        from kvbm.cli.replay.plot import draw

        draw(result, plot_file)
        (_err if as_json else render.console()).print(f"Plot in {plot_file}.", markup=False, soft_wrap=True)


def _workload(traces: Sequence[str], folder: Path | None, *, skip_bad: bool, block_tokens: int | None) -> Workload:
    """What is in these traces. Raises KvbmError: one is not there or not readable, or there is nothing to replay."""
    settings = config.load(options={"traces": folder}).settings
    if settings.traces is not None and not settings.traces.is_dir():
        raise UsageError(f"the folder of traces, {settings.traces}, is not there")
    paths = [find(name, settings.traces) for name in traces]
    found = []
    with render.progress() as bar:
        for path in bar.track(paths, description="Reading"):
            found.append(read(path, skip_bad=skip_bad, block_tokens=block_tokens))
    workload = interleave(found)
    if not workload.unique:
        raise KvbmError("no request has a block: there is nothing to replay")
    return workload


def _measure(
    workload: Workload, configurations: Sequence[dict[str, int]], policies: Sequence[str], placed: str, admitted: str
) -> Report:
    totals = list(dict.fromkeys(sum(capacities.values()) for capacities in configurations))
    rounds = len(configurations) * len(policies) + 2 * len(totals)
    runs, bounds = [], []
    with _progress(rounds * len(workload.prompts)) as (advance, say):
        for capacities in configurations:
            for policy in policies:
                say(f"{policy}, {report.tiers(capacities)}")
                order, guard = partial(eviction_order, policy), partial(admission, admitted)
                runs.append(replay(workload, capacities, policy, order, placement(placed), advance, guard))
        best = Min(workload)
        for capacity in totals:
            say(f"MIN, {capacity:,}")
            plain = best.hits(capacity, leaf_first=False, advance=advance)
            bounds.append(Bound(capacity, plain, best.hits(capacity, leaf_first=True, advance=advance)))
    return Report(workload, placed, admitted, tuple(runs), everything_fits(workload), tuple(bounds))


def _split(texts: Sequence[str], option: str) -> list[str]:
    """The parts between commas of an option that may be given repeatedly."""
    parts = [part.strip() for text in texts for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"{option} {','.join(texts)!r}: a name or number is missing beside a comma")
    return parts


def _tierings(capacities: Sequence[str] | None, tierings: Sequence[str] | None) -> list[Tiering]:
    if not capacities and not tierings:
        capacities = [_CAPACITIES]
    single = [{"g2": _size(text, "--capacity")} for text in _split(capacities or [], "--capacity")]
    return single + [_tiering(text) for text in tierings or []]


def _tiering(text: str) -> Tiering:
    tiers: Tiering = {}
    for part in _split([text], "--tiers"):
        name, equals, size = part.partition("=")
        if not equals or not re.fullmatch(r"[a-z][a-z0-9]*", name):
            raise UsageError(f"--tiers {text!r}: {part!r} is no tier; write it like g2=10000,g3=5%")
        if name in tiers:
            raise UsageError(f"--tiers {text!r}: {name} is there twice")
        tiers[name] = _size(size, "--tiers")
    return tiers


def _size(text: str, option: str) -> Size:
    match = re.fullmatch(r"([0-9]+)|([0-9]+(?:\.[0-9]+)?)%", text)
    if match is None or float(match[1] or match[2]) == 0:
        raise UsageError(
            f"{option}: {text!r} is no capacity; it must be a number of blocks, at least 1, or a percentage of the"
            " unique blocks, more than 0, like 5%"
        )
    return Size(float(match[2]), True) if match[2] else Size(int(match[1]), False)


def _resolved(asked: Sequence[Tiering], unique: int) -> list[dict[str, int]]:
    """In blocks, and each choice once."""
    chosen: list[dict[str, int]] = []
    for tiering in asked:
        capacities = {tier: size.blocks(unique) for tier, size in tiering.items()}
        if list(capacities.items()) not in [list(other.items()) for other in chosen]:
            chosen.append(capacities)
    return chosen


def _check_plot(path: Path | None) -> None:
    """Raises KvbmError for what could not be written in the end."""
    if path is None:
        return
    if path.suffix.lower() not in _PLOTS:
        raise UsageError(f"--plot {path}: the name must end in {' or '.join(_PLOTS)}")
    if find_spec("matplotlib") is None:
        raise KvbmError(f"--plot needs matplotlib: {installing('plot')}")
    new = not path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise UsageError(f"--plot {path}: it cannot be written: {error.strerror}") from None
    if new:
        path.unlink()


@contextmanager
def _progress(total: int) -> Iterator[tuple[Advance, report.Say]]:
    """How far it is, on a terminal."""
    with render.progress() as bar:
        task = bar.add_task("", total=total)
        yield (lambda n: bar.advance(task, n)), (lambda text: bar.update(task, description=text))
