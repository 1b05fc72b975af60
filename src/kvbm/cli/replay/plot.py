"""Hit ratio over capacity as a picture. Needs matplotlib, which the extra `plot` installs."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kvbm.cli.replay.report import Report
from kvbm.core.errors import KvbmError

_MARKS = "osD^vP*X"


def draw(report: Report, path: Path) -> None:
    """A line for each policy, the bounds dashed; the suffix of `path` says the format.

    Raises KvbmError where it cannot be written.
    """
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    _lines(axes, report)
    _bounds(axes, report)
    names = " + ".join(trace.name for trace in report.workload.traces)
    axes.set_title(f"{names}: {report.workload.references:,} block references", parse_math=False)
    axes.set_xlabel("capacity of all tiers (blocks)")
    axes.set_ylabel("share of block references that hit")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    _scale(axes, [bound.capacity for bound in report.bounds])
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise KvbmError(f"cannot write {path}: {error.strerror}") from None


def _lines(axes: Axes, report: Report) -> None:
    """Runs of one policy over tiers of the same names are one line."""
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for run in report.runs:
        tiers = "+".join(tier.name for tier in run.tiers)
        point = (run.capacity, run.hit_blocks / report.workload.references)
        lines.setdefault((run.policy, tiers), []).append(point)
    several = len({tiers for _, tiers in lines}) > 1
    for at, ((policy, tiers), points) in enumerate(lines.items()):
        label = f"{policy}, {tiers}" if several else policy
        axes.plot(*zip(*sorted(points), strict=True), marker=_MARKS[at % len(_MARKS)], label=label)


def _bounds(axes: Axes, report: Report) -> None:
    references = report.workload.references
    bounds = sorted(report.bounds, key=lambda bound: bound.capacity)
    capacities = [bound.capacity for bound in bounds]
    for label, hits, colour in (
        ("MIN", [bound.min for bound in bounds], "black"),
        ("MIN, leaf first", [bound.min_leaf_first for bound in bounds], "dimgrey"),
    ):
        shares = [hit.blocks / references for hit in hits]
        axes.plot(capacities, shares, linestyle="--", marker=".", color=colour, label=label)
    axes.axhline(report.everything_fits.blocks / references, linestyle="--", color="silver", label="everything fits")


def _scale(axes: Axes, capacities: list[int]) -> None:
    """Logarithmic where the largest capacity is ten times the smallest; always with whole numbers."""
    if max(capacities) >= 10 * min(capacities):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda capacity, _: f"{capacity:,.0f}"))
