"""Benchmarks of two checkouts in turn: this one's figures as ratios of an older commit's.

    python -m bench.pairs COMMIT NAME ... [--runs 5] [--set ROUNDS=2 ...]

Both run in this environment, each with its own package, benchmarks and C helpers. A row's bar is the worst of the old
runs, in the direction in which the benchmark calls a figure bad, by the median of all the old ones. What has run is
written after each round. `--set` gives a constant of the benchmarks another value, on both sides: to have shorter runs.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from bench.harness import RESULTS, Bench

ROOT = Path(__file__).parents[1]
Figures = dict[tuple[str, str | None], dict[str, list[float]]]
"""By row and the comparison of its bar: what each side measured."""


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """The commit's files in a folder of their own, its C helpers compiled."""
    with tempfile.TemporaryDirectory(prefix="kvbm-pairs-") as folder:
        git = ("git", "-C", str(ROOT), "worktree")
        subprocess.run([*git, "add", "--quiet", "--force", "--detach", folder, commit], check=True)
        try:
            build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            subprocess.run(build, cwd=folder, check=True)
            yield Path(folder)
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


RUN: Final = """
import importlib, sys
bench = importlib.import_module(sys.argv[1])
for name, value in {constants}.items():
    getattr(bench, name)
    setattr(bench, name, value)
sys.exit(bench.main())
"""


def run(name: str, folder: Path, side: str, figures: Figures, constants: Mapping[str, Any]) -> None:
    """One run of a benchmark in `folder`; what failed has no figures."""
    environment = os.environ | {"PYTHONPATH": f"{folder / 'src'}:{folder}"}
    result = folder / RESULTS / f"{name}.json"
    result.unlink(missing_ok=True)
    script = RUN.format(constants=dict(constants))
    subprocess.run([sys.executable, "-c", script, f"bench.{name}"], cwd=folder, env=environment, check=False)
    if result.is_file():
        seen: set[str] = set()
        for row in json.loads(result.read_text())["rows"]:
            what = row["what"] if row["what"] not in seen else f"{row['what']}, against {row['against']}"
            seen.add(what)
            worse = row["op"] or ("<=" if ", µs" in what else None)
            figures.setdefault((what, worse), {}).setdefault(side, []).append(row["value"])


def report(name: str, commit: str, runs: int, figures: Figures, constants: Mapping[str, Any]) -> Bench:
    """New by old. A row that one side alone has is named and has no ratio."""
    bench = Bench(f"pairs-{name}")
    bench.info("old", commit)
    bench.info("rounds", runs)
    bench.info("constants", dict(constants))
    for (what, op), sides in figures.items():
        if not all(map(sides.get, ("old", "new"))) or not statistics.median(sides["old"]):
            bench.info(what, sides)
            continue
        old, new = (statistics.median(sides[side]) for side in ("old", "new"))
        bench.info(what, {side: [round(value, 3) for value in values] for side, values in sides.items()})
        if op == "<=":
            bench.row(what, "old", new / old, "<=", max(sides["old"]) / old)
        elif op == ">=":
            bench.row(what, "old", new / old, ">=", min(sides["old"]) / old)
        else:
            bench.row(what, "old", new / old)
    return bench


def constant(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as Python writes it."""
    name, _, value = text.partition("=")
    return name, ast.literal_eval(value)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m bench.pairs", description=__doc__)
    parser.add_argument("commit")
    parser.add_argument("names", nargs="+")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--set", type=constant, action="append", default=[], metavar="NAME=VALUE")
    given = parser.parse_args()
    constants = dict(given.set)
    with checkout(given.commit) as before:
        for name in given.names:
            figures: Figures = {}
            for turn in range(given.runs):
                sides = [("old", before), ("new", ROOT)]
                for side, folder in sides[:: -1 if turn % 2 else 1]:
                    run(name, folder, side, figures, constants)
                report(name, given.commit, turn + 1, figures, constants).write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
