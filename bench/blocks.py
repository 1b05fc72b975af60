"""The block library alone: references per second, growth, memory, garbage collection, keys of a prompt.

The trace is one of Mooncake's requests, by `--traces FOLDER` or `KVBM_TRACES`; without it, KVBM's own sample, which is
small: figures are then marked as such.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bench.harness import Bench, medians
from kvbm.blocks import Pool, prompt_keys
from kvbm.cli.replay import trace as traces
from kvbm.core import config
from kvbm.core.events import Event, Removed, Stored
from kvbm.native import _keys
from kvbm.policy import EVICTION_ORDERS, eviction_order

CONVERSATION = "mooncake_conversation.jsonl.gz"
CAPACITY = 10_000
ROUNDS = 5
RUN = 24
"""Blocks of a request where there is no trace: the mean of the conversation trace."""

Prompts = Sequence[tuple[bytes, ...]]


class Ear:
    """An observer that does something with each event."""

    def __init__(self) -> None:
        self.blocks = 0

    def on_event(self, event: Event) -> None:
        if isinstance(event, Stored):
            self.blocks += len(event.keys)
        elif isinstance(event, Removed):
            self.blocks -= len(event.keys)


def serve(pool: Pool, keys: tuple[bytes, ...]) -> int:
    """One request: what a hit and the storing of the rest cost; returns the hits."""
    with pool.match(keys) as found:
        hits = len(found)
        if hits < len(keys):
            raw = pool.allocate(len(keys) - hits)
            if raw is not None:
                raw.stage(keys[hits:], parent=keys[hits - 1] if hits else None).register().drop()
    return hits


def ours(policy: str, prompts: Prompts) -> tuple[float, float]:
    """References per second and hit ratio of our pool."""
    pool, references = Pool(CAPACITY, order=eviction_order(policy, CAPACITY), observers=[Ear()]), 0
    hits, started = 0, time.process_time()
    for keys in prompts:
        hits += serve(pool, keys)
        references += len(keys)
    seconds = time.process_time() - started
    pool.check()
    return references / seconds, hits / references


def vllms(prompts: Prompts) -> tuple[float, float]:
    """The same of vLLM's manager of offloaded blocks; raises ImportError without vLLM."""
    from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
    from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

    manager = CPUOffloadingManager(num_chunks=CAPACITY, cache_policy="lru")
    named = [[make_offload_key(key, 0) for key in keys] for keys in prompts]
    hits, references, started = 0, 0, time.process_time()
    for number, keys in enumerate(named):
        context = ReqContext(req_id=str(number))
        manager.on_new_request(context)
        found = 0
        while found < len(keys) and manager.lookup(keys[found], context) is LookupResult.HIT:
            found += 1
        if found:
            manager.prepare_load(keys[:found], context)
            manager.complete_load(keys[:found], context)
        if (store := manager.prepare_store(keys, context)) is not None:
            manager.complete_store(store.keys_to_store, context)
        manager.on_request_finished(context)
        manager.allocation_sizes_in_current_batch.clear()
        hits += found
        references += len(keys)
    return references / (time.process_time() - started), hits / references


def rates(bench: Bench, prompts: Prompts) -> None:
    """References per second: vLLM's manager, our LRU, the other policies; rounds interleaved."""
    cases: dict[str, Callable[[], tuple[float, float]]] = {
        name: lambda name=name: ours(name, prompts)  # type: ignore[misc]
        for name in EVICTION_ORDERS
    }
    cases["lru again"] = lambda: ours("lru", prompts)
    try:
        vllms(prompts[:10])
        cases["vllm"] = lambda: vllms(prompts)
    except ImportError:
        bench.info("vllm", "not installed: no peer")
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for number in range(ROUNDS):
        names = list(cases)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            measured[name].append(cases[name]())
    rate = {name: statistics.median(each for each, _ in got) for name, got in measured.items()}
    bench.info("references/s", {name: round(each) for name, each in rate.items()})
    bench.info("hit ratio", {name: round(got[0][1], 4) for name, got in measured.items()})
    if "vllm" in rate:
        bench.row("LRU, references per second", "vLLM's CPUOffloadingManager", rate["lru"] / rate["vllm"], ">=", 10)
    bench.row("A/A: LRU, references per second", "LRU", rate["lru again"] / rate["lru"])
    for name in EVICTION_ORDERS:
        if name != "lru":
            bench.row(f"{name}, references per second", "LRU", rate[name] / rate["lru"], ">=", 0.5)


class Filled:
    """A full pool of `count` blocks."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.next = 0
        self.pool = Pool(count, order=eviction_order("lru", count), observers=[Ear()])
        while self.next < count:
            self.store()

    def keys(self, number: int) -> tuple[bytes, ...]:
        """Of a prompt that has blocks `number` to `number + RUN`."""
        return tuple(block.to_bytes(32, "little") for block in range(number, number + RUN))

    def store(self) -> None:
        """A prompt nobody has seen."""
        raw = self.pool.allocate(min(RUN, self.count - self.next) if self.next < self.count else RUN)
        assert raw is not None
        raw.stage(self.keys(self.next)[: len(raw)]).register().drop()
        self.next += RUN

    def operations(self, requests: int, seed: int) -> float:
        """Seconds per request: a hit somewhere in the pool, and a prompt that is new and evicts another."""
        dice, spent = random.Random(seed), 0.0
        for _ in range(requests):
            oldest = max(0, self.next - self.count) // RUN + 2
            old, new = self.keys(dice.randrange(oldest, self.next // RUN - 1) * RUN), self.keys(self.next)
            started = time.perf_counter()
            serve(self.pool, old)
            assert serve(self.pool, new) == 0
            spent += time.perf_counter() - started
            self.next += RUN
        return spent / requests


def growth(bench: Bench) -> None:
    """Time per operation with 100 thousand and with 10 million blocks, and again."""
    few, same, many = Filled(100_000), Filled(100_000), Filled(10_000_000)
    times: dict[str, list[float]] = {"few": [], "same": [], "many": []}
    for number in range(ROUNDS):
        for name, filled in (("few", few), ("same", same), ("many", many)):
            times[name].append(filled.operations(2_000, number))
    median = {name: statistics.median(got) for name, got in times.items()}
    bench.info("microseconds per pair of requests", {name: round(each * 1e6, 1) for name, each in median.items()})
    bench.row("time per operation, 10 million blocks", "100 thousand", median["many"] / median["few"], "<=", 2)
    bench.row("A/A: time per operation, 100 thousand blocks", "100 thousand", median["same"] / median["few"])


def memory(bench: Bench) -> None:
    """Resident growth and the longest garbage collection with a million blocks."""
    gc.collect()
    gc.freeze()  # the 40,000 objects of the imports alone take it 10 to 20 ms here, blocks or not
    before = resident()
    filled = Filled(1_000_000)
    bench.row("bytes per registered block, 1 million", "-", (resident() - before) / filled.count, "<=", 350)
    pauses: list[float] = []
    started = 0.0

    def watch(phase: str, _: dict[str, int]) -> None:
        nonlocal started
        if phase == "start":
            started = time.perf_counter()
        else:
            pauses.append(time.perf_counter() - started)

    gc.callbacks.append(watch)
    filled.operations(5_000, 1)
    gc.collect()
    gc.callbacks.remove(watch)
    gc.unfreeze()
    bench.row("longest garbage collection, ms, 1 million blocks, imports left out", "-", max(pauses) * 1e3, "<=", 10)


def chained(bench: Bench) -> None:
    """Keys of a prompt of 128k tokens in blocks of 16, against hashing the same bytes block by block and no more."""
    dice = random.Random(1)
    tokens = [dice.randrange(150_000) for _ in range(128 << 10)]  # each its own object, as a tokenizer gives them
    array = np.array(tokens, np.int64)
    keys = prompt_keys(tokens, 16)
    words = array.astype("<u4").tobytes()
    blocks = [before + words[64 * n : 64 * n + 64] for n, before in enumerate([keys[-1], *keys[:-1]])]
    assert [hashlib.sha256(block).digest() for block in blocks[1:]] == keys[1:]

    def bare() -> None:
        for block in blocks:
            hashlib.sha256(block)

    seconds = medians(
        41,
        {
            "hashlib": bare,
            "hashlib again": bare,
            "list": lambda: prompt_keys(tokens, 16),
            "array": lambda: prompt_keys(array, 16),
            "list, plain C": lambda: _keys.chain(bytes(32), tokens, 16, (), True),
        },
    )
    bench.info("SHA-256 instructions", _keys.HARDWARE)
    bench.info("milliseconds per prompt of 128k tokens", {name: round(each * 1e3, 2) for name, each in seconds.items()})
    base, against = seconds["hashlib"], "a bare hashlib.sha256 per block"
    bench.row("chained keys of 128k tokens, a list of int", against, seconds["list"] / base, "<=", 1.2)
    bench.row("the same, an int64 array", against, seconds["array"] / base, "<=", 1.2)
    bench.row("the same, a list, without SHA-256 instructions", against, seconds["list, plain C"] / base)
    bench.row("A/A: a bare hashlib.sha256 per block", against, seconds["hashlib again"] / base)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def prompts_of(bench: Bench, folder: Path | None) -> Prompts:
    """The keys of each request of the conversation trace, or of the sample."""
    given = folder is not None and (folder / CONVERSATION).exists()
    bench.info("trace", CONVERSATION if given else "sample, which is too small for figures: give --traces FOLDER")
    name = CONVERSATION if given else traces.SAMPLE
    workload = traces.interleave([traces.read(traces.find(name, folder))])
    return [tuple(workload.keys[number] for number in prompt.blocks.tolist()) for prompt in workload.prompts]


def main() -> int:
    """Print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, default=config.load().settings.traces)
    parser.add_argument("--strict", action="store_true")
    options = parser.parse_args()
    bench = Bench("blocks")
    memory(bench)  # first: freed memory would be used again
    rates(bench, prompts_of(bench, options.traces))
    growth(bench)
    chained(bench)
    return bench.write()


if __name__ == "__main__":
    raise SystemExit(main())
