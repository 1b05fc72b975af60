"""Shared storage: what a run costs beside the client alone, and what a look-up costs the engine's thread.

The server is one that costs next to nothing (`nulls3.c`), in a process of its own. CPU seconds are this process's.
"""

from __future__ import annotations

import ctypes
import os
import resource
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import obstore
from obstore.store import S3Store

from bench.harness import Bench, medians_of
from kvbm.cli import serve
from kvbm.core.region import packed
from kvbm.link.messages import pack
from kvbm.stores.checksum import checksums
from kvbm.stores.memory import Arena
from kvbm.stores.objects.blocks import Buffer, gather
from kvbm.stores.objects.cloud import Access, CloudStore
from kvbm.stores.objects.envelope import Envelope
from kvbm.stores.objects.names import Names
from kvbm.stores.objects.runs import RunFormat, Shape
from kvbm.tiers.objects.mover import Heard, Library, Mover
from kvbm.tiers.objects.orders import GetRun, PutRun
from kvbm.tiers.objects.presence import KnownNames
from kvbm.tiers.objects.tier import Runs

BLOCK, RUN, RUNS = 1 << 20, 8, 12
ROUNDS = 9
KNOWN, ARRIVING, PROMPT = 1_000_000, 10_000, 1_000
DEADLINE_S = 60.0
_names = count()


@contextmanager
def server(delay_ms: int, mb_s: int) -> Iterator[str]:
    """Where it listens."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "nulls3"
        source = Path(__file__).with_name("nulls3.c")
        subprocess.run(["gcc", "-O2", "-pthread", "-o", program, source], check=True)
        port = serve.free_port("127.0.0.1", 21_000 + secrets.randbelow(5_000))
        process = subprocess.Popen([program, str(port), str(delay_ms), str(mb_s)])
        try:
            time.sleep(0.3)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def cpu(call: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    call()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def clock(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


class Tier:
    """Runs moved as a rank moves them."""

    def __init__(self, endpoint: str, secret: bytes | None, lanes: int) -> None:
        shape = Shape(RUN, 1, BLOCK)
        self.arena = Arena(RUNS * RUN * BLOCK)
        self.arena.touch()
        self.region = self.arena.region([BLOCK], RUNS * RUN)
        for slot in range(RUNS * RUN):
            fill(self.arena.address + slot * BLOCK, BLOCK)
        self.sums = checksums(self.region, np.arange(RUNS * RUN), BLOCK)
        store = CloudStore("s3", "bucket", "", Access(DEADLINE_S, endpoint, "us-east-1", path_style=True))
        library = Library(store, Envelope(secret), Names(b"bench"), RunFormat("bench", shape))
        self._done = threading.Semaphore(0)
        self.errors: list[str] = []

        def over(_: object, moved: object) -> None:
            if error := getattr(moved, "error", None):
                self.errors.append(error)
            self._done.release()

        heard = Heard(over, over, lambda digest: None, lambda digest: None, lambda digest: False)
        self.mover = Mover(
            library, [self.region], heard, puts=lanes, gets=lanes, deadline_s=DEADLINE_S, most_lost=8,
            broken=self.errors.append,
        )  # fmt: skip
        self._keys: list[list[bytes]] = []
        self.nbytes = library.envelope.size(library.format.plain_bytes)

    def put(self) -> None:
        """All runs, under new names."""
        self._keys = [[secrets.token_bytes(32) for _ in range(RUN)] for _ in range(RUNS)]
        for at, keys in enumerate(self._keys):
            slots = np.arange(at * RUN, (at + 1) * RUN)
            self.mover.put(PutRun(at, pack(slots), keys, None, 0, bytes(RUN), self.sums[slots].tobytes()))
        self._wait()

    def get(self) -> None:
        """The runs that were written last."""
        for at, keys in enumerate(self._keys):
            slots = np.arange(at * RUN, (at + 1) * RUN)
            self.mover.get(GetRun(at, keys[-1], pack(np.arange(RUN)), pack(slots), keys))
        self._wait()

    def _wait(self) -> None:
        for _ in range(RUNS):
            assert self._done.acquire(timeout=DEADLINE_S)
        assert not self.errors, self.errors

    def close(self) -> None:
        self.mover.close(1.0)


def fill(address: int, nbytes: int) -> None:
    """Random bytes."""
    ctypes.memmove(address, os.urandom(nbytes), nbytes)


class Bare:
    """The client alone, with one checksummed copy of each run."""

    def __init__(self, tier: Tier, endpoint: str, lanes: int) -> None:
        self._tier, self._lanes = tier, lanes
        self._store = S3Store(
            "bucket", endpoint=endpoint, region="us-east-1", virtual_hosted_style_request=False, unsigned_payload=True,
            client_options={"allow_http": True},
        )  # fmt: skip
        self._buffers = [Buffer(tier.nbytes) for _ in range(lanes)]
        self._names: list[str] = []

    def put(self) -> None:
        self._names = [f"bare/{next(_names)}" for _ in range(RUNS)]
        self._each(self._put)

    def _put(self, lane: int, at: int) -> None:
        buffer = self._buffers[lane]
        gather(self._tier.region, np.arange(at * RUN, (at + 1) * RUN), buffer.address)
        obstore.put(self._store, self._names[at], buffer.view, mode="create", use_multipart=False)

    def get(self) -> None:
        self._each(self._get)

    def _get(self, lane: int, at: int) -> None:
        whole = np.frombuffer(memoryview(obstore.get(self._store, self._names[at]).buffer()), np.uint8)
        region = packed("whole", int(whole.ctypes.data), [BLOCK], RUN, owner=whole)
        gather(region, np.arange(RUN), self._buffers[lane].address)

    def _each(self, call: Callable[[int, int], None]) -> None:
        todo = iter(range(RUNS))
        lock = threading.Lock()

        def work(lane: int) -> None:
            while True:
                with lock:
                    at = next(todo, None)
                if at is None:
                    return
                call(lane, at)

        threads = [threading.Thread(target=work, args=(lane,)) for lane in range(self._lanes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def costs(bench: Bench) -> None:
    """CPU of this process, without delay."""
    with server(0, 0) as endpoint:
        tier, sealed = Tier(endpoint, None, 4), Tier(endpoint, secrets.token_bytes(32), 4)
        bare, again = Bare(tier, endpoint, 4), Bare(tier, endpoint, 4)
        sides = {"tier": tier, "bare": bare, "again": again, "sealed": sealed}
        for way in ("put", "get"):
            calls = {name: getattr(side, way) for name, side in sides.items()}
            for call in calls.values():
                call()
            took = medians_of(ROUNDS, {name: partial(cpu, call) for name, call in calls.items()})
            against = "obstore and one checksummed copy"
            bench.row(f"CPU, {way}", against, took["tier"] / took["bare"], "<=", 1.15)
            bench.row(f"A/A: CPU, {way}", against, took["again"] / took["bare"])
            bench.row(f"CPU, {way}, with the secret", against, took["sealed"] / took["bare"])
            bench.info(f"CPU s/GB, {way}", round(took["bare"] / (RUNS * RUN * BLOCK / 1e9), 3))
        tier.close()
        sealed.close()


def throughput(bench: Bench) -> None:
    """30 ms of delay, four in flight."""
    with server(30, 0) as endpoint:
        tier = Tier(endpoint, None, 4)
        bare, again = Bare(tier, endpoint, 4), Bare(tier, endpoint, 4)
        for way in ("put", "get"):
            calls = {"tier": getattr(tier, way), "bare": getattr(bare, way), "again": getattr(again, way)}
            for call in calls.values():
                call()
            took = medians_of(ROUNDS, {name: partial(clock, call) for name, call in calls.items()})
            bench.row(f"throughput, {way}, 30 ms", "obstore alone", took["bare"] / took["tier"], ">=", 0.9)
            bench.row(f"A/A: throughput, {way}, 30 ms", "obstore alone", took["bare"] / took["again"])
        tier.close()


def look_up(bench: Bench) -> None:
    """A prompt of a thousand blocks, runs of one block, a million known, while ten thousand names arrive."""
    known = KnownNames(2 * KNOWN)
    names = Names(Envelope(secrets.token_bytes(32)).key("bench"))
    known.hear(os.urandom(8 * KNOWN), b"")
    while len(known) < KNOWN * 0.999:
        time.sleep(0.1)
    took: list[float] = []
    for _ in range(40):
        runs, keys = Runs(names, 1, known), [secrets.token_bytes(32) for _ in range(PROMPT)]
        known.add(names.heads(keys[::2]))
        known.hear(os.urandom(8 * ARRIVING), b"")

        def match(runs: Runs = runs, keys: list[bytes] = keys) -> None:
            runs.note(keys)
            assert len(runs.there(keys)) == PROMPT // 2

        took.append(clock(match))
        time.sleep(0.05)
    bench.row("match of 1,000 blocks, ms", "", statistics.median(took) * 1e3, "<=", 1.0)
    bench.row("match of 1,000 blocks, ms, p90", "", float(np.percentile(took, 90)) * 1e3)
    known.close()


def main() -> int:
    """See the module."""
    os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_EC2_METADATA_DISABLED": "true"}
    bench = Bench("objects")
    bench.info("run, bytes", RUN * BLOCK)
    costs(bench)
    throughput(bench)
    look_up(bench)
    return bench.write()


if __name__ == "__main__":
    sys.exit(main())
