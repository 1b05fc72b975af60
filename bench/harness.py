"""What every benchmark shares: rows that compare a figure with a bar, and where they were measured.

A benchmark measures against a peer or a physical limit in the same run, so that its figures are ratios, and has an A/A
row (the baseline against itself) that shows the noise. Results go to ``build/bench/NAME.json``.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

RESULTS = Path("build/bench")


@dataclass(frozen=True)
class Row:
    """One figure. `op` None is a control: it has no bar to reach."""

    what: str
    against: str
    value: float
    op: Literal["<=", ">="] | None
    bar: float | None

    @property
    def ok(self) -> bool:
        """Whether the bar is reached."""
        if self.op is None or self.bar is None:
            return True
        return self.value <= self.bar if self.op == "<=" else self.value >= self.bar


class Bench:
    """Collects the rows of the benchmark `name`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._rows: list[Row] = []
        self._info: dict[str, object] = {"machine": machine(), "date": time.strftime("%Y-%m-%d %H:%M:%S %z")}

    def row(
        self, what: str, against: str, value: float, op: Literal["<=", ">="] | None = None, bar: float | None = None
    ) -> None:
        """Add a figure: `what` was measured `against` what, and the bar, if any, that it is to reach."""
        self._rows.append(Row(what, against, value, None if bar is None else op, bar))

    def between_tokens(
        self, what: str, gaps: Mapping[str, Sequence[float]], plain: str, again: str, *sides: str
    ) -> None:
        """Rows for seconds between tokens: the first of `sides` is to be at most 1.05 (p50) and 1.15 (p99) of `plain`,
        times as far as `again` is from it; the others have no bar."""
        self.info(f"{what}, gaps", {name: len(each) for name, each in gaps.items()})
        for share, limit in ((50, 1.05), (99, 1.15)):
            at = {name: float(np.percentile(each, share)) for name, each in gaps.items()}
            self.info(f"{what}, p{share}, ms", {name: round(each * 1e3, 1) for name, each in at.items()})
            control, name = at[again] / at[plain], f"between tokens p{share}, {what}"
            self.row(name, plain, at[sides[0]] / at[plain], "<=", limit * max(control, 1 / control))
            self.row(f"A/A: {name}", plain, control)
            for other in sides[1:]:
                self.row(f"{name}, {other}", plain, at[other] / at[plain])

    def info(self, key: str, value: object) -> None:
        """Add something a reader of the figures has to know (JSON types)."""
        self._info[key] = value

    def said(self) -> dict[str, object]:
        """All of it, as JSON has it."""
        return {**self._info, "rows": [{**asdict(row), "ok": row.ok} for row in self._rows]}

    def take(self, said: Mapping[str, Any]) -> None:
        """The rows and infos that another process's benchmark said."""
        for row in said["rows"]:
            self.row(*(row[field.name] for field in fields(Row)))
        self._info |= {key: value for key, value in said.items() if key not in ("rows", "machine", "date")}

    def write(self) -> int:
        """Print the table, write the JSON, and return the exit status: 1 only with `--strict` and a bar missed."""
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{self.name}.json").write_text(json.dumps(self.said(), indent=1) + "\n")
        table = Table(title=self.name, caption=escape("; ".join(f"{k}: {v}" for k, v in self._info.items())))
        for column in ("what", "against", "value", "bar", ""):
            table.add_column(column, justify="right" if column in ("value", "bar") else "left")
        for row in self._rows:
            bar, verdict = (f"{row.op} {row.bar:g}", "ok" if row.ok else "[red]missed") if row.op else ("", "control")
            table.add_row(row.what, row.against, f"{row.value:.3f}", bar, verdict)
        Console(width=None if sys.stdout.isatty() else 140).print(table)
        return int("--strict" in sys.argv and not all(row.ok for row in self._rows))


def medians(rounds: int, cases: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The median seconds of each case, by the clock; see `medians_of`."""

    def timed(case: Callable[[], object]) -> float:
        begin = time.perf_counter()
        case()
        return time.perf_counter() - begin

    return medians_of(rounds, {name: partial(timed, case) for name, case in cases.items()})


def medians_of(rounds: int, cases: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """The median of what each case says.

    Rounds are interleaved, so that a slow moment of the machine hits all cases, and each begins with another case, so
    that none always follows the same one.
    """
    said: dict[str, list[float]] = {name: [] for name in cases}
    order = list(cases.items())
    for _ in range(rounds):
        order.append(order.pop(0))
        for name, case in order:
            said[name].append(case())
    return {name: statistics.median(values) for name, values in said.items()}


def machine() -> str:
    """The processor, its cores, the kernel and the Python."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return f"{model or platform.machine()} x {os.cpu_count()}, {system}"
