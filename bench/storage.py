"""Shared storage (G4) under an engine: first token at a hit, what writing costs misses, what the gate says of many
reads at once, how much of a conversation is there when it has ended, and what two engines find of each other's.

Storage is SeaweedFS on loopback for the first token, and a server that costs next to nothing (`nulls3.c`) or a folder
for the rest.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from bench.harness import Bench
from bench.model import engine
from bench.objects import server
from bench.throughput import OPTIONS, against
from bench.ttft import first_token
from kvbm.core.events import Admitted
from kvbm.leader.requests import RequestParams
from kvbm.tiers.gate import Gate
from kvbm.tiers.objects.tier import SharedStorage
from tests.build import whole
from tests.e2e.engine import Engine
from tests.leader.roles import keys_of
from tests.seaweed import started
from tests.tiers.objects.test_whole import Sharing

NULL = {"g4_region": "us-east-1", "g4_path_style": True, "g4_deadline_s": 30.0, "g4_warm": 0.0}
LENGTH, PROMPTS = 2000, 5
MISSES = 400
"""Tokens of a prompt: with the answer it fills a run."""
RUNS, RUN, BLOCK, TOKENS = 125, 8, 1 << 20, 64
SINGLE, LARGE_ROUNDS = 20, 3
COMPUTING_S = 2.0
"""What the engine would take for the prompt of so many runs: reads one by one take eight times as long."""
TURNS = 20
TALKS, TALK_TURNS, NEXT, ANSWER, FEED_S = 4, 6, 200, 30, 0.5
FIRSTS = (800, 1500)
"""Tokens of first turns: what does not fill a run is not shared."""


def storage(vllm: Engine) -> SharedStorage:
    tier = vllm.leader.core.lower.stack.tiers["g4"]
    assert isinstance(tier, SharedStorage)
    return tier


def until(vllm: Engine, what: Any) -> None:
    deadline = time.monotonic() + 60
    while not what():
        vllm.leader.core.tick()
        time.sleep(0.005)
        assert time.monotonic() < deadline, vllm.status()["degraded"]


def opened(settings: dict[str, Any], **options: Any) -> Engine:
    """An engine whose storage works."""
    vllm = engine({"g2_gb": 2, "g4_warm": 0.0, **settings}, **options)
    until(vllm, lambda: storage(vllm).problem is None)
    return vllm


def stored(vllm: Engine) -> None:
    vllm.settle()
    until(vllm, lambda: storage(vllm).uploads.idle)


def forget(vllm: Engine) -> None:
    """Only the storage has it from now on."""
    vllm.forget_device()
    pool = vllm.leader.core.pool
    with pool.candidates(pool.statistics().total) as held:
        held.evict()


def text(dice: random.Random, length: int) -> list[int]:
    return [dice.randrange(300, 40_000) for _ in range(length)]


def first_tokens(bench: Bench) -> None:
    """A hit in an S3 server's bucket, and computing."""
    dice = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        weed = started(Path(folder) / "weed")
        try:
            with mock.patch.dict(os.environ, weed.credentials):
                given = {"g4_url": "s3://bucket/bench", "g4_endpoint": weed.endpoint, "g4_path_style": True}
                with closing(opened(given, max_model_len=4096, num_gpu_blocks_override=300)) as vllm:
                    first_token(vllm, text(dice, 64))
                    cold, again, hits = list[float](), list[float](), list[float]()
                    for _ in range(PROMPTS):
                        prompt = text(dice, LENGTH)
                        cold.append(first_token(vllm, prompt))
                        again.append(first_token(vllm, text(dice, LENGTH)))
                        stored(vllm)
                        forget(vllm)
                        hits.append(first_token(vllm, prompt))
                    tokens = vllm.status()["g4"]["run_blocks"] * 32
                    assert vllm.status()["tokens"]["g4"] == PROMPTS * (LENGTH // tokens * tokens), "all full runs"
        finally:
            weed.kill()
    median = statistics.median(cold)
    bench.info("first token, ms", {"computed": round(median * 1e3), "from G4": round(statistics.median(hits) * 1e3)})
    bench.row(f"first token, hit in G4, {LENGTH} tokens", "computing", statistics.median(hits) / median, "<=", 0.5)
    bench.row("A/A: first token, computing", "computing", statistics.median(again) / median)


def misses(bench: Bench) -> None:
    """Prompts that share nothing, each of which has a run that is written, or cannot be."""
    dice, plain = random.Random(0), engine({"g2_gb": 2}, **OPTIONS)
    with server(0, 0) as endpoint, closing(plain):
        writing = opened({**NULL, "g4_url": "s3://bucket/misses", "g4_endpoint": endpoint}, **OPTIONS)
        dead = engine(
            {**NULL, "strict": False, "g2_gb": 2, "g4_url": "s3://bucket/dead", "g4_endpoint": "http://127.0.0.1:9"},
            **OPTIONS,
        )
        with closing(writing), closing(dead):
            for name, vllm in (("while every run is written", writing), ("with G4 dead", dead)):
                with mock.patch("bench.throughput.PROMPT", MISSES):
                    ratio, control = against(plain, vllm, dice)
                bar = max(control, 1 / control) + 0.03
                bench.row(f"time of misses {name}", "without G4", 1 / ratio, "<=", bar)
                bench.row(f"A/A: misses, {name}", "without G4", 1 / control)
            stored(writing)
            (g4,) = (each for each in writing.status()["tiers"] if each["name"] == "g4")
            assert g4["runs"] >= 8 * 5, "a run of each prompt of each round"
            bench.info("misses: runs written, refused, cancelled", [g4["runs"], g4["refused"], g4["cancelled"]])


class Large(Sharing):
    """Blocks of a megabyte."""

    def hit(self, keys: Sequence[bytes]) -> tuple[int, float]:
        """How many of these are there, and in how many seconds; then only the storage has them."""
        name, begun = f"r{next(self.names)}", time.perf_counter()
        self.leader.begin(name, [*keys, whole.LAST], RequestParams(), (len(keys) + 1) * self.tokens)
        found = None

        def matched() -> bool:
            nonlocal found
            found = self.leader.match(name, 0, len(keys))
            return found is not None

        self.until(matched)
        seconds = time.perf_counter() - begun
        assert found is not None
        self.leader.place(name, [*range(len(keys))], 0, Admitted(len(keys) * self.tokens, 0, 0))
        self.leader.finish(name, [], 0)
        self.step(name, 0)
        self.until(lambda: self.leader.core.in_flight() == (0, 0))
        self.leader.core.pool.discard(keys)
        return found, seconds


@contextmanager
def gate_off() -> Iterator[None]:
    with mock.patch.object(Gate, "computing_s", return_value=None):
        yield


def many_runs(bench: Bench) -> None:
    """A hit of many runs after many hits of one."""
    sizes = mock.patch.multiple(whole, ROWS=(BLOCK,), G1=RUNS * RUN + 8)
    with server(30, 90) as endpoint, sizes, tempfile.TemporaryDirectory() as folder:
        given = {
            **NULL, "g4_endpoint": endpoint, "g2_blocks": 3 * RUNS * RUN, "tokens": TOKENS, "store_inflight_mb": 2_000
        }  # fmt: skip
        large = Large(Path(folder), "s3://bucket/large", **given)
        try:
            large.works()
            pool = large.leader.core.pool
            large.until(lambda: pool.total == pool.capacity)  # memory is touched in the background
            keys, one = keys_of("many", RUNS * RUN), keys_of("one", RUN)
            for each in (keys, one):
                large.serve(each)
                large.stored()
                large.leader.core.pool.discard(each)
            took, found = {"on": list[float](), "off": list[float](), "off again": list[float]()}, list[int]()
            for _ in range(LARGE_ROUNDS):
                for name, seconds in took.items():
                    large.g4.traffic.gate.forget_reads()
                    with gate_off():
                        for _ in range(SINGLE):
                            assert large.hit(one)[0] == RUN
                        if name != "on":
                            seconds.append(large.hit(keys)[1])
                    if name == "on":
                        large.g4.traffic.gate.computed.add(RUNS * RUN * TOKENS, COMPUTING_S)
                        blocks, spent = large.hit(keys)
                        found.append(blocks)
                        seconds.append(spent)
        finally:
            large.close()
    median = {name: statistics.median(seconds) for name, seconds in took.items()}
    bench.info("a hit of many runs, s", {name: round(value, 2) for name, value in median.items()})
    what = f"a hit of {RUNS} runs after {SINGLE} hits of one"
    # The last reads are given up where they would take longer than computing what they bring.
    bench.row(f"{what}: blocks loaded", "all", min(found) / (RUNS * RUN), ">=", 0.9)
    bench.row(f"{what}, time", "with the gate off", median["on"] / median["off"], "<=", 1.2)
    bench.row(f"A/A: {what}", "with the gate off", median["off again"] / median["off"])


def conversation(bench: Bench) -> None:
    """How much of one is stored five seconds after its end."""
    dice = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        given = {"g4_url": f"file://{folder}/kv"}
        with closing(opened(given, max_model_len=4096, num_gpu_blocks_override=300)) as vllm:
            said = text(dice, 200)
            for turn in range(TURNS):
                (done,) = vllm.run([said], 40)
                said += done.tokens + (text(dice, 60) if turn < TURNS - 1 else [])
            end = time.monotonic() + 5
            while time.monotonic() < end:
                vllm.leader.core.tick()
                time.sleep(0.05)
            run = vllm.status()["g4"]["run_blocks"]
        kept = [path for path in Path(folder).rglob("*") if path.is_file() and len(path.name) == 32]
    full = (len(said) - 1) // 32 // run  # the last token's KV is not computed
    bench.info("a conversation: tokens, full runs, stored", [len(said), full, len(kept)])
    bench.row(f"share of a {TURNS}-turn conversation's full runs stored 5 s later", "", len(kept) / full, ">=", 0.99)


def talks(engines: Sequence[Engine], first: int) -> int:
    """Conversations each turn of which another engine serves; tokens that were found."""
    dice, found = random.Random(1), 0
    said = [text(dice, first) for _ in range(TALKS)]
    for turn in range(TALK_TURNS):
        for number, history in enumerate(said):
            (done,) = engines[(number + turn) % len(engines)].run([history], ANSWER)
            found += done.cached
            history += done.tokens + text(dice, NEXT)
        end = time.monotonic() + 2 * FEED_S
        while time.monotonic() < end:
            for vllm in engines:
                vllm.leader.core.tick()
            time.sleep(0.02)
    return found


def two_engines(bench: Bench) -> None:
    """What they find of each other's turns, through storage alone."""
    options = {"max_model_len": 4096, "num_gpu_blocks_override": 400}
    for first in FIRSTS:
        found = dict[str, int]()
        with tempfile.TemporaryDirectory() as folder, gate_off():
            for name, count, settings in (
                ("one", 1, {}), ("two", 2, {"g4_url": f"file://{folder}/kv", "g4_feed_s": FEED_S}), ("apart", 2, {}),
            ):  # fmt: skip
                make = opened if settings else lambda given, **more: engine({"g2_gb": 2, **given}, **more)
                engines = [make(settings, **options) for _ in range(count)]
                try:
                    found[name] = talks(engines, first)
                finally:
                    for vllm in engines:
                        vllm.close()
        bench.info(f"tokens found, first turns of {first} tokens", found)
        what, against = f"tokens found by two engines, first turns of {first} tokens", "by one that serves all"
        bench.row(f"{what}, sharing G4", against, found["two"] / found["one"], ">=", 0.9)
        bench.row(f"{what}, sharing nothing", against, found["apart"] / found["one"])


def main() -> int:
    """See the module."""
    os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_EC2_METADATA_DISABLED": "true"}
    bench = Bench("storage")
    for part in (many_runs, conversation, two_engines, misses, first_tokens):
        try:
            part(bench)
        except Exception as error:  # noqa: BLE001  a row that is missing does not lose the others
            bench.row(f"{part.__name__}: {type(error).__name__}: {error}", "", 0.0, ">=", 1.0)
    return bench.write()


if __name__ == "__main__":
    sys.exit(main())
