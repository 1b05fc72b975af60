"""Kills a process that writes to the disk tier, again and again, and looks at what is left.

    python -m tests.stores.crash [--kills 200] [--seed 0] [--folder DIR]

A writer keeps blocks, whose bytes follow from their keys, in the slots of two ranks. It says on a pipe which slots it
is about to overwrite, and which blocks are written, once the store has said so. It is killed (SIGKILL) at a random
moment: while it opens the files, recovers, reads what it found, writes, clears, or resizes. The next one has to find
every block that was acknowledged and whose slot was not about to be overwritten, and every block it finds has to be
right on both ranks. Nothing here knows when a kill is harmless.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kvbm.abc.transport import Completion, Transport
from kvbm.core.outcome import Outcome
from kvbm.stores.checksum import Words
from kvbm.stores.disk.disk import Disk
from kvbm.stores.disk.folder import Folder
from kvbm.stores.disk.format import padded
from kvbm.stores.disk.meta import slots_in
from kvbm.stores.disk.shard import Shard, Sync
from kvbm.testing.store import HostBlocks, Result, bytes_of, labels, slots
from kvbm.transfer.executor import Executor
from tests.stores.plain import PlainTransport

try:
    from kvbm.transfer.file import FileTransport  # type: ignore[import-not-found,unused-ignore]
except ImportError:
    FileTransport = None

FINGERPRINT: Final = "c0ffee" * 11
RANKS: Final = 2
BLOCK: Final = 16_000
BOUNDS: Final = (6 << 20, 8 << 20)
BATCH: Final = 6
WRITERS: Final = 3
SYNCS: Final[tuple[Sync, ...]] = ("never", "never", "batch", "batch", "always")


def transport() -> Transport:
    return PlainTransport() if FileTransport is None else FileTransport(threads=2, depth=8)


def key_of(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def contents(rank: int, key: bytes) -> bytes:
    return bytes_of(bytes([rank]) + key, BLOCK)


# -- the process that is killed --


def writer(folder: Path, pipe: int, bound: int, seed: int, first_number: int) -> None:
    """Recover, tell what was found, and then write until the end."""
    dice = random.Random(seed)
    say = _Line(pipe)
    say("start")
    owner = Folder.claim(folder, "crash")
    namespace = owner.namespace(FINGERPRINT, {}, ranks=RANKS, block_bytes=BLOCK, bound_bytes=bound)
    recovered = namespace.recover()
    shards = [Shard(namespace.place, rank, sync=dice.choice(SYNCS), interval_s=0.01) for rank in range(RANKS)]
    memory = HostBlocks(BATCH * WRITERS, padded(BLOCK))
    disks = []
    for shard in shards:
        executor = Executor([transport()])
        disks.append(Disk(shard, memory.region, executor.submit, executor.cancel))
    say("found", namespace.num_slots)
    keys, places = recovered.key_list(), recovered.slots.tolist()
    for at in range(0, len(keys), BATCH):
        check(disks, memory, keys[at : at + BATCH], places[at : at + BATCH])
        say("has", *(f"{place}:{key.hex()}" for key, place in zip(keys[at:], places[at : at + BATCH], strict=False)))
    say("ready")

    sequence, number, lock = recovered.next_sequence, first_number, threading.Lock()
    free, turns = set(range(namespace.num_slots)), [threading.Semaphore(1) for _ in range(WRITERS)]
    for turn in range(1 << 30):
        mine = turn % WRITERS
        turns[mine].acquire()
        with lock:
            chosen = dice.sample(sorted(free), dice.randint(1, BATCH))
            free -= set(chosen)
        say("over", *chosen)
        if dice.random() < 0.01:
            for other in range(WRITERS):
                if other != mine:
                    turns[other].acquire()
            say("clear")
            generation = namespace.clear()
            for shard in shards:
                shard.clear(generation)
            for other in range(WRITERS):
                if other != mine:
                    turns[other].release()
        text = [key_of(number + i) for i in range(len(chosen))]
        at = slots(*range(mine * BATCH, mine * BATCH + len(chosen)))
        number, ranks = number + len(chosen), _Ranks(chosen, text, say, free, lock, turns[mine].release)
        for rank, disk in enumerate(disks):
            # One memory for both ranks: one after the other.
            for slot, key in zip(at.tolist(), text, strict=True):
                memory.put(slot, contents(rank, key))
            what = labels(text, sequence, namespace.generation)
            disk.write(turn, at, slots(*chosen), what, None, 60, ranks)
            if rank < RANKS - 1 or dice.random() < 0.3:
                disk.wait([turn], 60)
        sequence += len(chosen)


class _Line:
    """Writes whole lines, short enough to be written at once."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def __call__(self, *words: object) -> None:
        os.write(self._pipe, (" ".join(map(str, words)) + "\n").encode())


@dataclass
class _Ranks:
    """Acknowledges what all ranks have written."""

    places: list[int]
    keys: list[bytes]
    say: Callable[..., None]
    free: set[int]
    lock: threading.Lock
    over: Callable[[], None]
    answers: list[list[int]] = field(default_factory=list)

    def __call__(self, job: int, completion: Completion, sums: Words) -> None:
        self.answers.append(completion.outcomes.tolist())
        if len(self.answers) < RANKS:
            return
        if any(outcome != Outcome.DONE for answer in self.answers for outcome in answer):
            self.say("bad", "write:", completion.error)
        self.say("has", *(f"{place}:{key.hex()}" for place, key in zip(self.places, self.keys, strict=True)))
        with self.lock:
            self.free |= set(self.places)
        self.over()


def check(disks: list[Disk], memory: HostBlocks, keys: list[bytes], places: list[int]) -> None:
    """Every one of these blocks is right, on every rank."""
    for rank, disk in enumerate(disks):
        result, at = Result(), slots(*range(len(keys)))
        disk.read(-1, slots(*places), at, keys, 60, result)
        assert result.outcomes == [Outcome.DONE] * len(keys), f"recovered, and then {result.outcomes}"
        assert disk.wait([-1], 60)
        for slot, key in zip(at.tolist(), keys, strict=True):
            assert memory.get(slot, BLOCK) == contents(rank, key), "wrong bytes"


# -- the one that kills --


@dataclass
class Judge:
    """What has to be there, and what was seen."""

    there: dict[int, str] = field(default_factory=dict)
    found: dict[int, str] | None = None
    counts: Counter[str] = field(default_factory=Counter)

    def cut(self, num_slots: int) -> None:
        """Slots from here on may be lost, for a smaller bound is coming."""
        self.there = {place: key for place, key in self.there.items() if place < num_slots}

    def hear(self, line: str) -> None:
        """Judge a line of the writer's."""
        what, *words = line.split()
        if what == "found":
            self.found = {}
        elif what == "has" and self.found is not None:
            self.found |= dict(self._blocks(words))
        elif what == "ready":
            assert self.found is not None
            lost = {place: key for place, key in self.there.items() if self.found.get(place) != key}
            assert not lost, f"{len(lost)} acknowledged blocks are gone: {lost}"
            self.counts["recoveries"] += 1
            self.counts["blocks found right"] += len(self.found)
            self.counts["of them acknowledged"] += len(self.there)
            self.there, self.found = self.found, None
        elif what == "has":
            self.there |= dict(self._blocks(words))
            self.counts["blocks acknowledged"] += len(words)
        elif what == "over":
            for word in words:
                self.there.pop(int(word), None)
        elif what == "clear":
            self.there.clear()
            self.counts["clears"] += 1
        elif what != "start":
            raise AssertionError(line)

    @staticmethod
    def _blocks(words: list[str]) -> list[tuple[int, str]]:
        return [(int(place), key) for place, key in (word.split(":") for word in words)]


def run(folder: Path, kills: int, seed: int) -> Counter[str]:
    """Kill `kills` writers and check what they leave; raises AssertionError if anything is wrong."""
    dice, judge = random.Random(seed), Judge()
    room = [slots_in(bound - (16 << 12), RANKS, padded(BLOCK)) for bound in BOUNDS]
    for kill in range(kills + 1):
        size = dice.choice((0, 1, 1))
        judge.cut(room[size])
        # The last one is only to look at what is left.
        until = "ready" if kill == kills else dice.choice(("start", "start", "found", "ready", "ready", "ready"))
        delay = {"start": 0.03, "found": 0.01, "ready": 0.4}[until] * dice.random()
        phase = one(folder, judge, BOUNDS[size], dice.getrandbits(32), kill << 32, until, delay)
        judge.counts[f"killed {phase}"] += kill < kills
    return judge.counts


def one(folder: Path, judge: Judge, bound: int, seed: int, first_number: int, until: str, delay: float) -> str:
    """Start a writer, kill it `delay` seconds after it says `until`; returns where that hit it."""
    reader, pipe = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reader)
            writer(folder, pipe, bound, seed, first_number)
        except BaseException:  # noqa: BLE001  the parent is told, whatever it is
            os.write(pipe, b"bad " + traceback.format_exc().replace("\n", " | ").encode()[-3000:] + b"\n")
        finally:
            os._exit(1)
    os.close(pipe)
    phase, due, rest, judge.found = "at the very start", None, b"", None
    phases = {"start": "while it opened and recovered", "found": "while it read", "ready": "while it wrote"}
    deadline = time.monotonic() + 60
    try:
        while True:
            wait = (due if due is not None else deadline) - time.monotonic()
            if wait <= 0 or not select.select([reader], [], [], wait)[0]:
                assert due is not None, "the writer hangs"
                os.kill(child, signal.SIGKILL)
                due = deadline + 60
            if not (data := os.read(reader, 1 << 16)):
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                judge.hear(line.decode())
                word = line.decode().split()[0]
                phase = phases.get(word, phase)
                if word == until and due is None:
                    due = time.monotonic() + delay
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)  # also where it was found out, for it may wait for ever
        os.waitpid(child, 0)
    return phase


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--folder", type=Path, help="where the files are; by default a temporary folder")
    options = parser.parse_args()
    gc.freeze()
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        begin = time.monotonic()
        counts = run(folder, options.kills, options.seed)
        shutil.rmtree(folder, ignore_errors=True)
    name = "preadv and pwritev" if FileTransport is None else "FileTransport"
    seconds = time.monotonic() - begin
    print(f"{options.kills} kills in {seconds:.0f} s, seed {options.seed}, {name}: no block lost or wrong")
    for what, count in sorted(counts.items()):
        print(f"  {what}: {count:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
