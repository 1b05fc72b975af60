"""A tier from outside (`g9.py`): it is one more row in a table, and everything knows it."""

from __future__ import annotations

import multiprocessing
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvbm.build.parts import Part
from kvbm.build.place import Place
from kvbm.build.tiers import TIERS
from kvbm.build.worker import build_worker
from kvbm.cli import render
from kvbm.core.config import Resolved
from kvbm.core.keys import Namespace
from kvbm.leader.requests import RequestParams
from kvbm.link.messages import Step, decode_step, encode
from kvbm.testing.transport import HostMemory
from tests.build.g9 import G9, G9Part
from tests.build.whole import G1, ROWS, Engine
from tests.leader.roles import keys_of
from tests.ports import free_port

PATIENCE = 60.0


def serve_rank(pipe: Connection, resolved: Resolved, place: Place, names: Namespace, rank: int, part: Part) -> None:
    """A rank in a process of its own: memory and worker, and what is asked of them."""
    memory = HostMemory(ROWS, G1)
    region = replace(memory.region, dtype="float32")
    worker = build_worker(resolved.settings, place, names, region, rank, None, 1 << 62, tiers=(*TIERS, part))
    calls: dict[str, Callable[..., Any]] = {
        "put": memory.put, "get": memory.get,
        "before_step": lambda step: worker.before_step(decode_step(step)),
        "before_forward": lambda step: worker.before_forward(decode_step(step)),
        "after_forward": lambda step: worker.after_forward(decode_step(step)),
        "take_bad_blocks": worker.take_bad_blocks, "collect": lambda: worker.collect(idle=False),
    }  # fmt: skip
    while (asked := pipe.recv()) is not None:
        pipe.send(calls[asked[0]](*asked[1:]))
    worker.close()
    pipe.send(None)


class Remote:
    """Such a rank, as memory and as worker."""

    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve_rank, args=(theirs, *arguments))
        self._process.start()

    def _ask(self, *asked: Any) -> Any:
        self._pipe.send(asked)
        assert self._pipe.poll(PATIENCE)
        return self._pipe.recv()

    def put(self, block: int, data: bytes) -> None:
        self._ask("put", block, data)

    def get(self, block: int) -> Any:
        return self._ask("get", block)

    def before_step(self, step: Step) -> None:
        self._ask("before_step", encode(step))

    def before_forward(self, step: Step) -> None:
        self._ask("before_forward", encode(step))

    def after_forward(self, step: Step) -> None:
        self._ask("after_forward", encode(step))

    def take_bad_blocks(self) -> Any:
        return self._ask("take_bad_blocks")

    def collect(self, *, idle: bool) -> Any:
        return self._ask("collect")

    def close(self) -> None:
        self._pipe.send(None)
        self._pipe.poll(PATIENCE)
        self._process.join(PATIENCE)
        assert self._process.exitcode == 0


class Apart(Engine):
    """An engine whose ranks are processes of their own, with a tier of the test's."""

    def __init__(self, path: Path, part: Part, **settings: Any) -> None:
        self.part = part
        super().__init__(path, 2, g3_blocks=None, tiers=(*TIERS, part), **settings)

    def rank(
        self, resolved: Resolved, place: Place, names: Namespace, rank: int, began: int, tiers: Sequence[Part]
    ) -> tuple[Any, Any]:
        remote = Remote(resolved, place, names, rank, self.part)
        return remote, remote

    @property
    def g9(self) -> G9:
        assert self.leader.core.lower.stack is not None
        g9 = self.leader.core.lower.stack.tiers["g9"]
        assert isinstance(g9, G9)
        return g9

    def written(self, keys: Sequence[bytes]) -> None:
        self.until(lambda: not self.g9.absent(keys))
        self.until(lambda: bool(self.g9.covers(keys).all()))

    def copied(self, source: str, target: str) -> tuple[int, int]:
        """Blocks of events so far: those that were copied, and those that failed."""
        copies = self.side.totals.copies.get((source, target))
        return (0, 0) if copies is None else (copies.blocks, copies.failed)

    def degraded(self) -> Any:
        return self.leader.core.lower.degraded().get("g9")


Start = Callable[..., Apart]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def make(**parts: Any) -> Apart:
            given = {name: parts.pop(name) for name in ("delay", "bad") if name in parts}
            engine = Apart(tmp_path, G9Part(tmp_path, **given), **parts)
            stack.callback(engine.close)
            return engine

        yield make


def shown(what: Any) -> str:
    """As a terminal shows it."""
    console = Console(width=160)
    with console.capture() as text:
        console.print(what)
    return text.get()


def test_blocks_go_there_and_come_back_on_every_rank(start: Start) -> None:
    port = free_port()
    engine, keys = start(delay=0.05, metrics=True, metrics_port=port), keys_of("a", 5)
    assert engine.serve(keys) == 0
    engine.written(keys)
    assert (engine.copied("g2", "g9"), engine.copied("g9", "g2")) == ((5, 0), (0, 0))
    engine.leader.core.pool.discard(keys)
    assert engine.serve(keys) == 5, "every byte is compared"
    assert engine.copied("g9", "g2") == (5, 0)
    record = next(reversed(engine.leader.records.values()))
    assert record.staged == {"g9": 5}
    explained = engine.side.control.explain(record.request_id)
    assert explained["matched"]["g9"] == 5
    text = shown(render.explain("e", explained))
    assert "- the request waited for blocks that come from a dict" in text
    assert "matched in G9 5 blocks = 160 tokens" in " ".join(text.split())
    status = engine.side.control.status()
    assert status["tokens"]["g9"] == 5 * status["block_tokens"]
    assert {"name": "g9", "problem": None, "g9_blocks": 5} in status["tiers"]
    text = shown(render.status(status))
    assert "g9: g9 blocks 5" in text
    assert "(of these from g3 0, peer 0, g9 160)" in text
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    assert 'kvbm_tier_copied_blocks_total{source="g2",target="g9"} 5.0' in page
    assert 'kvbm_tier_copied_blocks_total{source="g9",target="g2"} 5.0' in page
    assert 'kvbm_tier_healthy{tier="g2"} 1.0' in page


def test_what_is_not_what_it_was_is_computed(start: Start) -> None:
    keys = keys_of("a", 5)
    engine = start(bad=keys[3:4])
    engine.serve(keys)
    engine.written(keys)
    engine.leader.core.pool.discard(keys)
    assert engine.serve(keys) < 4
    assert engine.g9.corrupt == 1
    assert engine.copied("g9", "g2")[1] == 1
    engine.leader.core.pool.discard(keys)
    engine.written(keys)
    assert not engine.leader.core.health.problems


def test_a_place_that_fails_is_left_alone_until_it_works(start: Start, tmp_path: Path) -> None:
    engine, keys = start(), keys_of("a", 4)
    engine.serve(keys)
    engine.written(keys)
    engine.leader.core.pool.discard(keys)
    (tmp_path / "fails").touch()
    for name in "bcde":
        engine.serve(keys_of(name, 4))  # its writes fail
        engine.until(lambda: engine.copied("g2", "g9")[1] or engine.degraded())
    engine.until(engine.degraded)
    assert "[Errno 5] the dict fails" in engine.degraded()
    assert "g9: [Errno 5] the dict fails" in shown(render.status(engine.side.control.status()))
    assert engine.serve(keys) == 0, "nothing is read meanwhile"
    (tmp_path / "fails").unlink()
    engine.until(lambda: engine.degraded() is None)
    engine.leader.core.pool.discard(keys)
    assert engine.serve(keys) == 4
    assert not engine.leader.core.health.problems, "host memory never had one"


def test_a_rank_that_cannot_go_on_ends_the_tier_and_nothing_else(start: Start, tmp_path: Path) -> None:
    engine, keys = start(), keys_of("a", 4)
    engine.serve(keys)
    engine.written(keys)
    (tmp_path / "dies").touch()
    engine.until(lambda: [engine.step("nobody", 0), engine.degraded()][1])
    assert "the dict died" in engine.degraded()
    assert engine.serve(keys) == 4, "host memory has them"
    engine.leader.core.pool.discard(keys)
    assert engine.serve(keys) == 0
    assert not engine.leader.core.health.problems


def test_a_request_that_goes_lets_go(start: Start) -> None:
    engine, keys = start(delay=0.05), keys_of("a", 6)
    engine.serve(keys)
    engine.written(keys)
    engine.leader.core.pool.discard(keys)
    before = engine.leader.core.pool.statistics()
    engine.leader.begin("gone", keys, RequestParams(), 7 * 32)
    assert engine.leader.match("gone", 0, 6) is None
    engine.leader.finish("gone", [], 0)
    engine.until(lambda: engine.leader.core.pool.statistics().staged == 0)
    now = engine.leader.core.pool.statistics()
    assert (now.active, now.free + now.inactive) == (0, before.free + before.inactive)
    assert engine.g9.lent == 0
    assert engine.serve(keys) == 6


def test_a_reset_ends_what_it_has(start: Start) -> None:
    engine, keys = start(delay=0.05), keys_of("a", 4)
    engine.serve(keys)
    engine.written(keys)
    engine.serve(keys_of("b", 4))  # whose writes are on their way
    engine.leader.reset()
    assert not engine.g9.known
    assert engine.serve(keys) == 0
    engine.until(lambda: bool(engine.g9.covers(keys).all()))
    assert not engine.g9.covers(keys_of("b", 4)).any(), "nothing of before is published"


def test_nothing_goes_there_while_kvbm_stands_aside(start: Start) -> None:
    engine, keys = start(), keys_of("a", 4)
    engine.leader.core.pause()
    assert engine.serve(keys) == 0
    time.sleep(0.1)
    engine.leader.core.tick()
    engine.leader.core.resume()
    assert not engine.g9.known
    assert engine.serve(keys) == 0
    engine.written(keys)


@pytest.mark.parametrize("settings", [{"shadow_every": 1}, {"prove_first": True}], ids=["shadow_every", "prove_first"])
def test_what_comes_from_there_is_compared(start: Start, settings: dict[str, Any]) -> None:
    """The comparison knows no tier by its name either."""
    engine, keys = start(**settings), keys_of("a", 4)
    engine.serve(keys)
    engine.written(keys)
    engine.leader.core.pool.discard(keys)
    assert engine.serve(keys) == 0, "the hit is declined"
    engine.until(lambda: engine.side.control.status()["trust"]["compared"])
    trust = engine.side.control.status()["trust"]
    assert (trust["sampled"], trust["mismatched"]) == (1, 0)
    if "prove_first" in settings:
        assert engine.serve(keys) == 4


def test_where_there_is_no_such_row_there_is_no_such_tier(tmp_path: Path) -> None:
    """The control."""
    engine = Engine(tmp_path, 1, g3_blocks=None)
    engine.serve(keys_of("a", 4))
    assert engine.leader.core.lower.stack is None
    engine.close()
