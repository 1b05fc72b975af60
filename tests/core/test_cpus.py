import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvbm.core import cpus as given_cpus

PROGRAM = """
import json, multiprocessing, os, sys, threading

def bind(cpus):
    os.sched_setaffinity(0, cpus)

def worker(queue, cpus):
    bind(cpus)  # as OpenMP does, before anything of ours is imported
    queue.put(threads_have())

def threads_have():
    from kvbm.core import cpus
    found = []
    thread = threading.Thread(target=lambda: (cpus.spread("it"), found.append(sorted(os.sched_getaffinity(0)))))
    thread.start()
    thread.join()
    return found[0]

if __name__ == "__main__":
    given, bound, method = json.loads(sys.argv[1])
    bind(given)  # as taskset does
    if method is None:
        print(threads_have())
    else:
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=worker, args=(queue, bound))
        process.start()
        print(queue.get(timeout=60))
        process.join()
"""


def threads_have(tmp_path: Path, given: set[int], bound: set[int], method: str | None) -> set[int]:
    (tmp_path / "program.py").write_text(PROGRAM)
    order = json.dumps([sorted(given), sorted(bound), method])
    program = [sys.executable, str(tmp_path / "program.py"), order]
    return set(json.loads(subprocess.run(program, check=True, capture_output=True, text=True, timeout=100).stdout))


@pytest.fixture(scope="module")
def all_cpus() -> set[int]:
    cpus = os.sched_getaffinity(0)
    if len(cpus) < 2:
        pytest.skip("one processor: nothing can be taken from a thread")
    return cpus


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_worker_that_was_bound_gives_its_threads_what_its_engine_has(
    tmp_path: Path, all_cpus: set[int], method: str
) -> None:
    assert threads_have(tmp_path, all_cpus, {min(all_cpus)}, method) == all_cpus


@pytest.mark.parametrize("method", ["spawn", None])
def test_what_the_user_took_away_stays_away(tmp_path: Path, all_cpus: set[int], method: str | None) -> None:
    assert threads_have(tmp_path, {max(all_cpus)}, {min(all_cpus)}, method) == {max(all_cpus)}


@pytest.mark.parametrize("there", [True, False])
def test_a_child_has_those_of_its_parent(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """Or, where that has ended, what it had at the start."""
    parent = SimpleNamespace(pid=os.getpid() if there else 2**22 + 1)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: parent)
    given_cpus.given.cache_clear()
    assert given_cpus.given() == (os.sched_getaffinity(0) if there else given_cpus._IMPORTED)
    given_cpus.given.cache_clear()


def test_where_it_is_refused_a_thread_keeps_what_it_inherited(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> None:
        raise OSError("not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", refused)
    given_cpus.spread("a thread")
    assert "a thread keeps the CPU affinity it inherited: not permitted" in caplog.text
