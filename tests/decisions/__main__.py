"""`python -m tests.decisions`: runs histories and compares them with what is recorded. See README.md."""

from __future__ import annotations

import argparse
import difflib
import gc
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.decisions.history import History, digest

RECORDED = Path(__file__).with_name("recorded.txt")
RUN = 100
"""Histories that share a line of it."""


def each(number: int) -> str:
    """The hash of one history. Raises AssertionError where it did not come to its end."""
    lines = History(number).run()
    assert not lines[-1].startswith("raised"), f"history {number}: {lines[-1]}"
    return digest(lines)


def run(first: int) -> str:
    """The hash of the `RUN` histories from this one on."""
    with crashing():
        return digest([each(number) for number in range(first, first + RUN)])


@contextmanager
def crashing() -> Iterator[None]:
    """A leader may end as one does whose process is killed. Its leases warn that nobody dropped them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


def recorded() -> list[str]:
    """What `run` gave for each `RUN` histories when it was recorded."""
    return RECORDED.read_text().split()


def compare(first: int, histories: int, jobs: int, *, record: bool, stop: bool) -> int:
    """Runs so many from `first` on, on so many processes; how many runs are not as recorded. With `stop` the first of
    them is the last that is looked at."""
    begun, firsts, wrong = time.monotonic(), range(first, first + histories, RUN), 0
    expected, found = recorded() if RECORDED.exists() else [], list[str]()
    with ProcessPoolExecutor(jobs) as pool:
        for at, hashed in zip(firsts, pool.map(run, firsts), strict=True):
            found.append(hashed)
            if not record and expected[at // RUN] != hashed:
                wrong += 1
                print(f"histories {at} to {at + RUN - 1} are not as recorded", flush=True)
                if stop:
                    pool.shutdown(cancel_futures=True)
                    return wrong
    print(f"{len(found) * RUN} histories in {time.monotonic() - begun:.0f} s", flush=True)
    if record:
        RECORDED.write_text("".join(f"{line}\n" for line in [*expected[: first // RUN], *found]))
    return wrong


def against(other: Path, first: int, last: int) -> int:
    """The first history from `first` to `last - 1` that is another one in another checkout, and how."""
    here = Path(__file__).parents[2]
    hashes = [_ask(where, "--each", "--first", str(first), "--histories", str(last - first)) for where in (here, other)]
    for number, (ours, theirs) in enumerate(zip(*hashes, strict=True), first):
        if ours != theirs:
            before, after = (_ask(where, "--show", str(number)) for where in (other, here))
            print(f"history {number}")
            print("\n".join(difflib.unified_diff(before, after, str(other), str(here), lineterm="", n=10)))
            return 1
    print(f"histories {first} to {last - 1} are the same in {other}")
    return 0


def _ask(where: Path, *arguments: str) -> list[str]:
    environment = os.environ | {"PYTHONPATH": f"{where / 'src'}:{where}"}
    module = "tests.decisions" if (where / "tests/decisions").exists() else "tests.manager.decisions"  # before it moved
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=where, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.decisions", description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--histories", type=int, help="how many (default: as many as are recorded)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--stop", action="store_true", help="at the first that are not as recorded")
    parser.add_argument("--record", action="store_true", help="write their hashes down, in place of what was recorded")
    parser.add_argument("--each", action="store_true", help="print the hash of each")
    parser.add_argument("--show", type=int, metavar="NUMBER", help="print one history")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="show the first that is another one there")
    given = parser.parse_args()
    histories = given.histories or (10_000 if given.record else len(recorded()) * RUN - given.first)
    first, last = given.first, given.first + histories
    if given.show is not None:
        print("\n".join(History(given.show).run()))
        return 0
    if given.against is not None:
        return against(given.against.resolve(), first, last)
    if given.each:
        print("\n".join(digest(History(number).run()) for number in range(first, last)))
        return 0
    return 1 if compare(first, histories, given.jobs, record=given.record, stop=given.stop) else 0


if __name__ == "__main__":
    sys.exit(main())
