"""Blocks between two processes through the NIXL transport, against raw prepared NIXL transfers over the same UCX.

python -m bench.nixl [--strict]

Blocks of 737,280 bytes (16 tokens of SmolLM2) from scattered slots of the other process's memory to scattered slots of
ours. Raw: one transfer of all of them with NIXL's own calls, asked after every 200 µs (more often gains nothing). Ours:
a plan, in pieces, on the transport's thread. With checksums: plans of 32 MiB, and each block's checksum is made and
compared while the next plan is on its way, as a store does it. Data goes by the kernel's copies between processes (cma)
or over TCP on loopback.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.copy import buffer
from bench.harness import Bench, medians
from kvbm.abc.transport import Completion, Plan
from kvbm.core.outcome import Outcome
from kvbm.core.region import Slots, packed
from kvbm.stores.checksum import checksums
from kvbm.transfer.nixl import Agent, NixlTransport, RemoteMemory

BLOCK, SLOTS = 16 * 46_080, 512
COUNTS = (64, 128, 256, 512)
PLAN_BYTES = 32 << 20
ROUNDS = 9
IDLE_S = 5.0
BAR, CHECKED_BAR, IDLE_BAR = 0.9, 0.75, 0.02


def serve(pipe: Connection) -> None:
    """The other process: its memory, and how much processor time it has used."""
    array = buffer(BLOCK * SLOTS)
    array[:] = np.frombuffer(np.random.default_rng(0).bytes(array.nbytes), dtype=np.uint8)
    region = packed("G2", int(array.ctypes.data), [BLOCK], SLOTS, owner=array)
    transport = NixlTransport()
    transport.register(region)
    pipe.send((transport.metadata(), region.planes[0].address, checksums(region, np.arange(SLOTS), BLOCK)))
    with suppress(EOFError):
        while pipe.recv():
            pipe.send(time.process_time())
    transport.close()


class Pair:
    """The other process, as our transport and a raw agent see it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        metadata, address, self.sums = self.pipe.recv()
        self.array = buffer(BLOCK * SLOTS)
        self.here = packed("here", int(self.array.ctypes.data), [BLOCK], SLOTS, owner=self.array)
        self.transport = NixlTransport()
        owner = RemoteMemory(self.transport.connect(metadata))
        self.there = packed("there", address, [BLOCK], SLOTS, kind="peer", owner=owner)
        self.agent = Agent("raw", "UCX")
        self.agent.register(self.here)
        nixl, peer = self.agent._nixl, self.agent.connect(metadata)
        self.nixl: Any = nixl
        self.lists = [
            nixl.prep_xfer_dlist(name, self.descriptors(base), "DRAM")
            for name, base in (("NIXL_INIT_AGENT", self.here.planes[0].address), (peer, address))
        ]

    @staticmethod
    def descriptors(base: int) -> npt.NDArray[np.uint64]:
        table = np.zeros((SLOTS, 3), dtype=np.uint64)
        table[:, 0], table[:, 1] = base + np.arange(SLOTS, dtype=np.uint64) * BLOCK, BLOCK
        return table

    def raw(self, source: Slots, destination: Slots) -> float:
        begin = time.perf_counter()
        ours, theirs = destination.astype(np.int32), source.astype(np.int32)
        handle = self.nixl.make_prepped_xfer("READ", self.lists[0], ours, self.lists[1], theirs)
        state = self.nixl.transfer(handle)
        while state == "PROC":
            time.sleep(2e-4)
            state = self.nixl.check_xfer_state(handle)
        handle.release()
        return time.perf_counter() - begin

    def ours(self, source: Slots, destination: Slots, *, checked: bool) -> float:
        over = SimpleQueue[Completion]()
        begin = time.perf_counter()
        step = PLAN_BYTES // BLOCK if checked else len(source)
        plans = {}
        for at in range(0, len(source), step):
            plan = Plan(self.there, source[at : at + step], self.here, destination[at : at + step], True, "load")
            plans[self.transport.submit(plan, over.put)] = plan
        while plans:
            completion = over.get()
            plan = plans.pop(completion.ticket)
            assert (completion.outcomes == Outcome.DONE).all(), completion.error
            if checked:
                sums = checksums(self.here, plan.destination_slots, BLOCK)
                assert (sums == self.sums[plan.source_slots]).all()
        return time.perf_counter() - begin

    def used(self) -> float:
        """Processor time of both processes."""
        self.pipe.send(True)
        return time.process_time() + float(self.pipe.recv())

    def close(self) -> None:
        self.transport.close()
        self.pipe.send(False)
        self.process.join()


def measure(bench: Bench, pair: Pair, over: str, count: int) -> None:
    dice = np.random.default_rng(count)

    def case(move: Callable[[Slots, Slots], float]) -> Callable[[], float]:
        return lambda: move(dice.permutation(SLOTS)[:count], dice.permutation(SLOTS)[:count])

    median = medians(
        ROUNDS,
        {
            "raw": case(pair.raw),
            "raw again": case(pair.raw),
            "ours": case(lambda source, destination: pair.ours(source, destination, checked=False)),
            "checked": case(lambda source, destination: pair.ours(source, destination, checked=True)),
        },
    )
    what = f"{count} blocks of 737 KB over {over}"
    bench.info(what, f"raw {count * BLOCK / median['raw'] / 1e9:.2f} GB/s")
    bench.row(f"A/A: raw, {what}", "raw NIXL", median["raw"] / median["raw again"])
    bench.row(what, "raw NIXL", median["raw"] / median["ours"], ">=", BAR)
    bench.row(f"{what}, checksums", "raw NIXL", median["raw"] / median["checked"], ">=", CHECKED_BAR)


def main() -> int:
    if importlib.util.find_spec("nixl_cu12") is None:
        print("bench.nixl needs NIXL (pip install 'pykvbm[nixl]'): skipped")
        return 0
    bench = Bench("nixl")
    for over in ("cma", "tcp"):
        if over == "tcp":
            os.environ["UCX_TLS"] = "tcp"
        pair = Pair()
        if over == "cma":
            pair.raw(np.arange(8), np.arange(8))
            before = pair.used()
            time.sleep(IDLE_S)
            used = (pair.used() - before) / IDLE_S / 2
            bench.row("waiting, processor time of an instance", "a core", used, "<=", IDLE_BAR)
        for count in COUNTS:
            measure(bench, pair, over, count)
        pair.close()
    return bench.write()


if __name__ == "__main__":
    sys.exit(main())
