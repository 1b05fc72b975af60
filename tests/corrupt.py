"""Bytes of blocks that change behind KVBM's back: `python -m tests.corrupt --count 10000`.

Leader and workers are as an engine has them, with real files, host memory and NIXL. In the file of a disk tier, in the
memory of another instance, and on the way from it, bits of blocks are flipped, or halves of them, all of them or
another block's bytes put in their place. Then they are asked for. What comes into the engine is compared byte by byte,
on every rank.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import tests.before  # noqa: F401
from kvbm.core.region import Region
from kvbm.testing.faults import _peek, _poke, inject, injected
from kvbm.tiers.peers import connections as network
from tests.build.whole import ROWS, Engine
from tests.leader.roles import keys_of
from tests.tiers.peers.conftest import know_each_other, peers_of, published
from tests.valkey import Server

BLOCKS = 8
"""Of one prompt."""
RANKS = 2
Damage = Callable[[random.Random, bytearray, bytes], None]


def flip(dice: random.Random, data: bytearray, other: bytes) -> None:
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def tear(dice: random.Random, data: bytearray, other: bytes) -> None:
    half = len(data) // 2
    data[half:] = other[half:]


def swap(dice: random.Random, data: bytearray, other: bytes) -> None:
    data[:] = other


def wipe(dice: random.Random, data: bytearray, other: bytes) -> None:
    data[:] = bytes(len(data))


KINDS: dict[Damage, int] = {flip: 17, tear: 1, swap: 1, wipe: 1}
"""And how often each."""


@dataclass
class Result:
    """Blocks, each counted once however many ranks were damaged."""

    injected: Counter[str] = field(default_factory=Counter)
    """By place and kind."""
    found: Counter[str] = field(default_factory=Counter)
    """By place: those that KVBM says are not what was stored."""
    loaded: int = 0
    """Whole blocks before the first damaged one of a prompt, which were loaded and compared."""
    short: int = 0
    """Whole blocks before it that were not."""
    served: str = ""
    """What is wrong with bytes that came into the engine."""
    seconds: float = 0.0

    def at(self, place: str) -> int:
        """How many were injected there."""
        return sum(count for name, count in self.injected.items() if name.startswith(f"{place} "))

    def problem(self, count: int) -> str | None:
        """Why it failed."""
        if self.served:
            return self.served
        if self.injected.total() < count or not self.loaded:
            return f"only {self.injected.total()} were injected, {self.loaded} loaded"
        missed = {place: self.at(place) - self.found[place] for place in self.found}
        return f"not found: {missed}" if any(missed.values()) else None


def damage(dice: random.Random, region: Region, slot: int, other: int) -> str:
    """Change a block in `slot`; `other` is the slot of another. Returns how."""
    (kind,) = dice.choices(list(KINDS), list(KINDS.values()))
    size = sum(ROWS)  # a page's rest is nobody's
    before = _peek(region, slot)
    data = bytearray(before[:size])
    kind(dice, data, _peek(region, other)[:size])
    if data == before[:size]:
        kind = flip
        flip(dice, data, b"")
    _poke(region, slot, data + before[size:])
    return kind.__name__


def round_of(
    result: Result, place: str, dice: random.Random, reader: Engine, keys: Sequence[bytes], regions: Sequence[Region],
    slots: Sequence[int],
) -> None:  # fmt: skip
    """Damage some of a prompt's blocks, on one rank or on all, and ask for the prompt."""
    bad = sorted(dice.sample(range(len(keys)), dice.randrange(1, len(keys))))
    ranks = dice.choice([[0], [1], [0, 1]])
    for at in bad:
        other = slots[dice.choice([i for i in range(len(keys)) if i != at])]
        kinds = [damage(dice, regions[rank], slots[at], other) for rank in ranks]
        result.injected[f"{place} {kinds[0]}"] += 1
    ask(result, reader, keys, bad[0])


def ask(result: Result, reader: Engine, keys: Sequence[bytes], whole: int) -> None:
    """Of which the first so many are whole."""
    try:
        loaded = reader.serve(keys)
    except AssertionError as error:
        result.served = result.served or str(error)
        return
    if loaded > whole:
        result.served = result.served or f"{loaded} blocks were loaded, of which {whole} are whole"
    result.loaded += loaded
    result.short += max(0, whole - loaded)


def slots_of(pool: Any, keys: Sequence[bytes]) -> list[int]:
    return [pool.look(key).slot for key in keys]


def memory(engine: Engine) -> list[Region]:
    """Each rank's host memory."""
    return [worker._g2 for worker in engine.workers if worker._g2 is not None]


Rounds = Iterator[Callable[[str], None]]
"""Gives what plays one round with a prompt of this name."""


@contextmanager
def disk(result: Result, dice: random.Random, folder: Path) -> Rounds:
    """In the file, after it was written."""
    with closing(Engine(folder, RANKS, g3_blocks=16 * BLOCKS, g2_blocks=4 * BLOCKS)) as engine:
        lower = engine.leader.disk
        assert lower is not None

        def play(name: str) -> None:
            keys = keys_of(name, BLOCKS)
            engine.serve(keys)
            engine.settle()
            engine.leader.pool.discard(keys)
            files = [worker._disk.disk.shard.region for worker in engine.workers if worker._disk is not None]
            round_of(result, "g3", dice, engine, keys, files, slots_of(engine.disk, keys))
            result.found["g3"] = lower.tier.corrupt

        yield play


@contextmanager
def peer(result: Result, dice: random.Random, folder: Path) -> Rounds:
    """In the memory of the instance that gives it."""
    with two(folder) as (holder, reader):

        def play(name: str) -> None:
            keys = keys_of(name, BLOCKS)
            hold(holder, reader, keys)
            before, read = result.injected.copy(), reads_of(reader)
            round_of(result, "peer", dice, reader, keys, memory(holder), slots_of(holder.leader.pool, keys))
            result.found["peer"] = found_by(reader)
            if reads_of(reader) == read:  # on a busy machine a promise may end before anything was read
                result.injected = before

        yield play


@contextmanager
def wire(result: Result, dice: random.Random, folder: Path) -> Rounds:
    """On the way from there."""
    switch = folder / "faults"
    inject(switch)
    with two(folder, transport_wrapper=f"kvbm.testing.faults:follow?{switch}") as (holder, reader):

        def play(name: str) -> None:
            keys, quiet = keys_of(name, BLOCKS), dice.random() < 0.3
            inject(switch, *([] if quiet else ["peer=1&flip=1&rank=1"]))
            hold(holder, reader, keys)
            ask(result, reader, keys, BLOCKS if quiet else 0)
            result.injected["wire flip"] = injected(switch).total()
            result.found["wire"] = found_by(reader)

        yield play


def reads_of(reader: Engine) -> int:
    """Blocks that it has tried to read from others."""
    fetch = reader.side.totals.fetch
    return fetch.blocks + fetch.failed


def found_by(reader: Engine) -> int:
    """How many blocks of peers were not what was promised. Waits for reads that the request did not wait for."""
    peers = peers_of(reader)
    reader.until(lambda: not peers.in_flight())
    return peers.corrupt


@contextmanager
def host(result: Result, dice: random.Random, folder: Path) -> Rounds:
    """In host memory."""
    with closing(Engine(folder, RANKS, g3_blocks=None, g2_blocks=4 * BLOCKS, g2_verify=True)) as engine:

        def play(name: str) -> None:
            """A load that has a damaged block fails; now and then there is none."""
            keys = keys_of(name, BLOCKS)
            engine.serve(keys)
            if dice.random() < 0.3:
                ask(result, engine, keys, BLOCKS)
                return
            round_of(result, "g2", dice, engine, keys, memory(engine), slots_of(engine.leader.pool, keys))
            result.found["g2"] = engine.side.totals.onboard.failed

        yield play


PLACES = {"g2": host, "g3": disk, "peer": peer, "wire": wire}
"""In host memory the whole load is computed again, also the blocks before the damaged one."""


@contextmanager
def two(folder: Path, **reader: Any) -> Iterator[tuple[Engine, Engine]]:
    """One that computes, and one that reads from it; left alone for what it gave, it is asked again at once."""
    with ExitStack() as stack, mock.patch.object(network, "_BACKOFF_S", (0.01,)):
        server, secret = Server(), folder / "secret"
        stack.callback(server.kill)
        secret.write_text("0123456789abcdef")
        secret.chmod(0o600)
        shared: dict[str, Any] = {
            "g3_blocks": None, "directory": server.url, "peer_secret_file": str(secret),
            # A connection that was given up cannot say that blocks are not wanted any more: their lease has to end.
            "g2_blocks": 64 * BLOCKS, "peer_lease_s": 3, "peer_deadline_s": 10,
        }  # fmt: skip
        engines = []
        for name, settings in (("holder", {}), ("reader", reader)):
            (folder / name).mkdir()
            engine = Engine(folder / name, RANKS, engine=name, **shared | settings)
            engines.append(stack.enter_context(closing(engine)))
        know_each_other(*engines)
        yield engines[0], engines[1]


def hold(holder: Engine, reader: Engine, keys: Sequence[bytes]) -> None:
    """Have one compute this and tell of it."""
    holder.leader.pool.clear()
    reader.leader.pool.clear()
    holder.serve(keys)
    published(holder, len(keys))
    reader.until(lambda: peers_of(reader).network.usable().get("holder"))  # it was left alone for what it gave


def run(count: int, seed: int, folder: Path, places: Sequence[str] = tuple(PLACES)) -> Result:
    """So many in all places together."""
    result, dice, begun = Result(), random.Random(seed), time.monotonic()
    for at, place in enumerate(places):
        wanted = count // len(places) + (at < count % len(places))
        (folder / place).mkdir()
        with PLACES[place](result, dice, folder / place) as play:
            number = 0
            while result.at(place) < wanted and not result.served:
                play(f"{place} {number}")
                number += 1
    result.seconds = time.monotonic() - begun
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--places", default=",".join(PLACES), help="where, separated by commas")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(given.count, given.seed, Path(folder), given.places.split(","))
    print(json.dumps({"seed": given.seed, "total": result.injected.total(), **vars(result)}, indent=1))
    if problem := result.problem(given.count):
        print(f"FAILED: {problem}")
    return int(result.problem(given.count) is not None)


if __name__ == "__main__":
    sys.exit(main())
