"""An engine that keeps a tree of its own sits on the core alone: no leader, no requests."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.blocks import Pinned, prompt_keys
from kvbm.build.leader import build_core
from kvbm.build.place import Place
from kvbm.build.worker import build_worker
from kvbm.core.config import load
from kvbm.core.keys import Namespace
from kvbm.core.outcome import Outcome
from kvbm.leader.copies import StepCopy
from kvbm.leader.core import Outgoing
from kvbm.link.messages import Copy, Step
from kvbm.testing.transport import HostMemory
from kvbm.tiers.tier import Record, Seeker
from tests.build.whole import ROWS, kv

BLOCK, ROWS_OF_ENGINE = 32, 12
PATIENCE_S = 30.0


class Node:
    """A block of the engine's own tree."""

    def __init__(self, row: int, key: bytes) -> None:
        self.row, self.key = row, key
        self.children: dict[tuple[int, ...], Node] = {}


class Ticket:
    """Hears how one copy ended."""

    def __init__(self) -> None:
        self.arrived: npt.NDArray[np.bool_] | None = None

    def judge(self, copy: StepCopy) -> None:
        """All that was computed counts."""

    def stored(self, copy: StepCopy, there: Pinned, failed: int, late: int) -> None:
        self.arrived = copy.done

    def loaded(self, copy: StepCopy, failed: int) -> npt.NDArray[np.bool_]:
        self.arrived = copy.done
        return copy.outcomes == Outcome.CORRUPT

    def compared(self, copy: StepCopy) -> None:
        raise AssertionError("nothing was compared")

    def dropped(self, copy: StepCopy) -> None:
        self.arrived = np.zeros(len(copy.g1), np.bool_)


class Engine:
    """Serves prompts one after the other on `ROWS_OF_ENGINE` rows, of which its tree knows what they contain."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        extra = {
            "run_dir": str(folder), "g3_dir": str(folder / "g3"), "g3_blocks": 32, "g2_blocks": 8, "metrics": False,
            "g3_engine": "threads", "g3_direct": False, "strict": True, "init_timeout_s": 30, "held_share": 1.0,
        }  # fmt: skip
        resolved = load(environ={}, extra=extra | settings)
        place, namespace = Place("tree", 1), Namespace({"model": "m"}, "w")
        self.memory = HostMemory(ROWS, ROWS_OF_ENGINE)
        self.worker = build_worker(resolved.settings, place, namespace, self.memory.region, 0, None, 0)
        self.side = build_core(resolved, place, namespace, block_tokens=BLOCK)
        self.core, self.numbers = self.side.core, itertools.count()
        self.root, self.free = Node(-1, b""), list(range(ROWS_OF_ENGINE))

    def close(self) -> None:
        self.worker.close()
        self.side.close()

    def until(self, what: Any) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not what():
            assert time.monotonic() < deadline, self.core.health.problems
            self.core.tick()
            time.sleep(0.002)

    def serve(self, tokens: Sequence[int]) -> tuple[int, int, int]:
        """Blocks of a prompt that were in the tree, that were loaded, and that were computed."""
        keys = prompt_keys(tokens, BLOCK)
        seeker = Seeker(f"p{next(self.numbers)}", Record("p", len(tokens)), keys)
        runs = [tuple(tokens[at : at + BLOCK]) for at in range(0, len(keys) * BLOCK, BLOCK)]
        path, node = [], self.root
        while len(path) < len(runs) and (child := node.children.get(runs[len(path)])) is not None:
            node = child
            path.append(child)
        found = len(path)
        with self.core.lock:
            self.core.seek(seeker)
        self.until(lambda: not self.comes(seeker, found))
        with self.core.lock:
            hold = self.core.hold(keys, found)
            loading = 0 if hold is None else len(hold)
            rows = self.rows(len(keys) - found, keep={each.row for each in path})
            fence = self.core.overwritten(rows)
            self.core.over(seeker)
            places = np.arange(found, found + loading)
            load = Ticket()
            copies = []
            if hold is not None:
                begun = self.core.load(hold, np.array(rows[:loading]), places, load)
                copies.append(Copy.of(begun.id, seeker.id, begun.g1, hold.slots))
            self.step(Step(loads=copies, stores=[], fence=self.core.seal(fence), idle=False, sync=bool(copies)))
        if hold is not None:
            self.until(lambda: load.arrived is not None)
            assert load.arrived is not None
            assert load.arrived.all()
        for row, key in zip(rows[:loading], keys[found:], strict=False):
            assert self.memory.get(row) == kv(key, 0), "what was loaded is what was computed"
        for row, key in zip(rows[loading:], keys[found + loading :], strict=True):
            self.memory.put(row, kv(key, 0))
        for run, key, row in zip(runs[found:], keys[found:], rows, strict=True):
            node.children[run] = Node(row, key)
            node = node.children[run]
        self.store(keys, found + loading, rows[loading:])
        return found, loading, len(keys) - found - loading

    def comes(self, seeker: Seeker, first: int) -> bool:
        with self.core.lock:
            return self.core.comes(seeker, first)

    def store(self, keys: Sequence[bytes], first: int, rows: Sequence[int]) -> None:
        """What was computed goes to host memory."""
        with self.core.lock:
            space = self.core.space(keys[first:])
            if space.slots is None:
                return
            at = space.absent[: len(space.slots)]
            before = keys[first + at[0] - 1] if first + at[0] else None
            blocks = Outgoing(
                [keys[first + each] for each in at], before, np.array([rows[each] for each in at]),
                np.array(at) + first,
            )  # fmt: skip
            ticket = Ticket()
            begun = self.core.store(space.slots, blocks, ticket)
            copy = Copy.of(begun.id, "p", begun.g1, begun.lease.slots)
            self.step(Step(loads=[], stores=[copy], fence=self.core.seal(set()), idle=False, sync=False))
        self.until(lambda: ticket.arrived is not None)
        assert ticket.arrived is not None
        assert ticket.arrived.all()

    def written(self, blocks: int) -> None:
        """Waits until so many blocks are on disk."""
        self.until(lambda: self.core.pools()["g3"].statistics().registered == blocks)

    def step(self, step: Step) -> None:
        self.worker.before_step(step)
        self.worker.before_forward(step)
        self.worker.after_forward(step)

    def rows(self, count: int, keep: set[int]) -> list[int]:
        """Rows for new blocks; leaves of the tree go first."""
        while len(self.free) < count:
            parent, run = next(self.leaves(self.root, keep))
            self.free.append(parent.children.pop(run).row)
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def leaves(self, node: Node, keep: set[int]) -> Iterator[tuple[Node, tuple[int, ...]]]:
        for run, child in node.children.items():
            if child.children:
                yield from self.leaves(child, keep)
            elif child.row not in keep:
                yield node, run


def prompt(name: int, blocks: int) -> list[int]:
    return [name * 10_000 + at for at in range(blocks * BLOCK)]


def test_a_tree_of_its_own_gets_its_blocks_back_after_a_restart(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    try:
        assert engine.serve(prompt(1, 4)) == (0, 0, 4)
        assert engine.serve(prompt(1, 4)) == (4, 0, 0), "its own tree has it"
        assert engine.serve(prompt(1, 4)[: 2 * BLOCK] + prompt(2, 2)) == (2, 0, 2), "two prompts part"
        engine.written(6)
        for name in (3, 4, 5):  # the engine's rows, and host memory's, go to others
            assert engine.serve(prompt(name, 6)) == (0, 0, 6)
            engine.written(6 * name - 6)
        assert engine.serve(prompt(1, 4)) == (0, 4, 0), "from disk"
    finally:
        engine.core.drain(10.0)
        engine.close()
    again = Engine(tmp_path)
    try:
        assert again.serve(prompt(1, 4)) == (0, 4, 0)
        assert again.serve(prompt(5, 6)) == (0, 6, 0)
        assert again.serve(prompt(9, 2)) == (0, 0, 2)
        again.written(26)
        keys = prompt_keys(prompt(9, 2), BLOCK)
        with again.core.lock:
            again.core.pause()
            assert again.core.hold(keys) is None, "it stands aside"
            again.core.resume()
            hold = again.core.hold(keys)
            assert hold is not None
            again.core.let_go(hold)
        assert again.core.in_flight() == (0, 0)
        assert again.core.held == 0
    finally:
        again.close()


def test_without_the_disk_nothing_is_there_after_a_restart(tmp_path: Path) -> None:
    """The control."""
    for _ in range(2):
        engine = Engine(tmp_path, g3_blocks=None)
        try:
            assert engine.serve(prompt(1, 4)) == (0, 0, 4)
        finally:
            engine.close()
