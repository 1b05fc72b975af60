"""Thousands of random requests while copies fail, every answer compared with the engine's own without KVBM:
`python -m tests.e2e.compare --requests 5000`.

Requests mix what people use: two adapters and the base model, tenants, several answers to one prompt, opting out, times
to live, priorities, shared beginnings, conversations that go on; some are aborted, and caches are reset. Each set-up is
an engine with a small device cache (requests preempt each other), a G2 that evicts and, unless it has others to share
with, a disk.
One copy in twenty fails, one comes after its deadline, and where checksums see it, one in twenty has a flipped bit. All
in float32, where batching changes nothing.

`--minutes 60` instead repeats the requests of one set-up for so long, and looks at what grows.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from kvbm.stores.objects.names import parse
from kvbm.testing.faults import inject, injected
from tests.e2e.engine import Done, Engine, asynchronous_scheduling, environment, write_gemma, write_tiny
from tests.e2e.soak_peers import always_load, left, use
from tests.e2e.test_requests import adapter
from tests.gcs import ACCOUNT, Gcs, Spoilt
from tests.valkey import Server

CHUNK = 100
"""Requests that are made at once; conversations go on from one to the next."""
BETWEEN = 20
"""Requests from one change of an adapter to the next."""
ENOUGH = 300
"""Requests to one set-up, with which some have come from every tier."""
LONGEST = 450
G2_BLOCKS = 60
SIZES: dict[str, Any] = {
    "num_gpu_blocks_override": 25, "max_model_len": 512, "max_num_batched_tokens": 128, "max_num_seqs": 8,
}  # fmt: skip
"""24 usable blocks: requests preempt each other; 128 tokens a step: prompts come in chunks."""
DEADLINES = {"load_deadline_s": 0.3, "store_deadline_s": 0.3, "g3_deadline_s": 0.5, "peer_deadline_s": 0.5}
LATE_S = 0.8
RATE = 0.05
LORA = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}
"""For two adapters. With no slot to spare vLLM 0.32 on a CPU adds the last adapter to requests for the base model that
are in a batch with others (vllm-project/vllm#48421): without KVBM, too, they then get other tokens than alone."""
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 4}
"""From one token that was there before: of what the model says about random prompts, four in a row may never repeat."""


@dataclass(frozen=True)
class Setup:
    """An engine. `options` are vLLM's, `settings` KVBM's."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    tiers: tuple[str, ...] = ("g2", "g3")
    """Where blocks must have come from."""
    rank: int | None = None
    """The one on which copies fail; None: on all."""

    write: Callable[[Path], Path] = write_tiny
    """Makes the model."""
    renews: bool = False
    """Whether adapters get other weights between batches of requests: under another number, or in place."""
    stretch: int = 1
    """So many times longer prompts and more blocks: shared storage has nothing of less than 512 tokens."""
    several: bool = True
    """Whether requests ask for several answers: with top_k and speculation vLLM 0.32 ends when there was no guess."""

    @property
    def ranks(self) -> int:
        return int(self.options.get("tensor_parallel_size", 1))

    def faults(self, rate: float) -> list[str]:
        """What goes wrong with so many copies."""
        late = f"delay={LATE_S}&delayed={rate}" + ("" if self.rank is None else f"&rank={self.rank}")
        lines = [f"fail={rate}&{late}"]
        if "g3" in self.tiers:
            lines.append(f"disk=1&fail={rate}&flip={rate}&{late}")
        if "peer" in self.tiers:
            lines.append(f"peer=1&fail={rate}&flip={rate}&{late}")
        return lines


SETUPS = {
    "async": Setup({"onboard": "async"}),
    "sync": Setup({"onboard": "sync"}),
    "priority": Setup({"placement": "exclusive"}, {"scheduling_policy": "priority"}),
    "async-scheduling": Setup(options={"async_scheduling": True}),
    "ngram": Setup(options={"speculative_config": NGRAM}, several=False),
    "no-prefix-cache": Setup({"without_prefix_caching": True}, options={"enable_prefix_caching": False}),
    "two-ranks": Setup(options={"tensor_parallel_size": 2}, rank=1),
    "peers": Setup(tiers=("g2", "peer")),
    # Blocks of six groups; windows are kept where many prompts can go on from.
    "hybrid": Setup(
        {"g2_blocks": 6 * G2_BLOCKS, "checkpoint_tokens": 64}, {"num_gpu_blocks_override": 100}, write=write_gemma
    ),
    "adapters": Setup(renews=True),
    "storage": Setup(tiers=("g2", "g4"), stretch=3),
}


@dataclass
class Job:
    """A request, and the engine's own `answers` to it."""

    prompt: list[int]
    tokens: int
    features: set[str]
    salt: str | None = None
    lora: int = 0
    priority: int = 0
    params: dict[str, Any] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    answers: dict[int, list[int]] = field(default_factory=dict)


class Alone:
    """The engine without KVBM, with a set-up's model and as many ranks, room for as long prompts, and the adapters of
    both. `close` ends it."""

    def __init__(self, model: Path, folder: Path, ranks: int = 1, stretch: int = 1) -> None:
        folder.mkdir()
        self.model, self._folder = model, folder
        self.loras = [None, *(_lora(folder, number, number) for number in (1, 2))]
        sizes = sizes_of(stretch) | {"num_gpu_blocks_override": 256 * stretch, "tensor_parallel_size": ranks}
        self._engine: Engine | None = Engine(model, None, **sizes, **LORA)

    def answer(self, jobs: Sequence[Job]) -> None:
        """Fill in the answers to all of them."""
        assert self._engine is not None
        names = [submit(self._engine, job, self.loras, salt=False) for job in jobs]
        self._engine.drain()
        self._engine.forget_device()
        for name, job in zip(names, jobs, strict=True):
            job.answers = self._engine.results.pop(name).answers

    def renew(self, which: int, seed: int, engines: Sequence[Engine], *, in_place: bool) -> None:
        """Gives an adapter other weights, here and in `engines`, none of which runs a request: in place, or as vLLM's
        server does that unloads and loads it, under a new number. Name and path stay."""
        assert self._engine is not None
        number = self.loras[which].lora_int_id
        fresh = _lora(self._folder, which, number if in_place else number + len(self.loras), seed)
        for engine in (self._engine, *engines):
            # vLLM's keys of an adapter's blocks are made of its name and path.
            engine.forget_device()
            if in_place:
                assert engine.vllm.add_lora(msgspec.structs.replace(fresh, load_inplace=True))
            else:
                engine.vllm.remove_lora(number)  # or no slot is to spare, see LORA
        self.loras[which] = fresh

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    @property
    def closed(self) -> bool:
        return self._engine is None


def _lora(folder: Path, which: int, number: int, seed: int | None = None) -> Any:
    from vllm.lora.request import LoRARequest

    path = adapter(folder / f"adapter{which}", which if seed is None else seed)
    return LoRARequest(f"adapter{which}", number, str(path))


def sizes_of(stretch: int) -> dict[str, Any]:
    """SIZES for prompts that are so many times longer."""
    return SIZES | {name: SIZES[name] * stretch for name in ("num_gpu_blocks_override", "max_model_len")}


class Traffic:
    """Makes requests, `stretch` times longer, and asks the engine alone for their answers."""

    def __init__(self, dice: random.Random, alone: Alone, *, several: bool, stretch: int = 1) -> None:
        self._dice, self._alone, self._several, self._stretch = dice, alone, several, stretch
        self._roots = [self._text(150 * stretch, 330 * stretch) for _ in range(5)]
        self._past: list[Job] = []

    def more(self, count: int) -> list[Job]:
        jobs = [self._job() for _ in range(count)]
        self._alone.answer(jobs)
        self._past = (self._past + jobs)[-CHUNK:]
        return jobs

    def _text(self, least: int, most: int) -> list[int]:
        return [self._dice.randrange(3, 1000) for _ in range(self._dice.randrange(least, most))]

    def _job(self) -> Job:
        dice, kind = self._dice, self._dice.random()
        tokens, features = dice.randrange(1, 60), set[str]()
        job = Job([], tokens, features)
        before = [past for past in self._past if len(past.prompt) + len(past.answers[0]) < LONGEST * self._stretch - 60]
        if kind < 0.25 and before:
            past = dice.choice(before)
            job.prompt, job.salt, job.lora = past.prompt + past.answers[0] + self._text(1, 50), past.salt, past.lora
            features.add("continued")
        else:
            shared = dice.choice(self._roots)[: dice.randrange(1, 330 * self._stretch)] if kind < 0.9 else []
            features |= {"shared beginning"} if len(shared) >= 32 else set()
            job.prompt = shared + self._text(1, 60)
            job.salt = dice.choice([*(None,) * 5, "a", "b"])
            job.lora = dice.choice([0, 0, 0, 0, 0, 1, 2])
        features |= {f"adapter {job.lora}" if job.lora else "base model"} | ({"salt"} if job.salt else set())
        features |= {"chunked prefill"} if len(job.prompt) > 128 else set()
        self._wishes(job)
        return job

    def _wishes(self, job: Job) -> None:
        dice, params = self._dice, dict[str, Any]()
        for name, odds, value in (
            ("load", 0.04, False),
            ("save", 0.04, False),
            ("ttl", 0.06, dice.choice([0.05, 0.5, 5.0])),
            ("priority", 0.1, dice.randrange(101)),
        ):
            if dice.random() < odds:
                params[name] = value
                job.features.add(f"opt-out of {name}" if value is False else name)
        job.params = params or None
        job.priority = dice.randrange(3)
        if self._several and dice.random() < 0.05:
            job.features.add("several answers")
            # Always the likeliest: a seed and a prompt in chunks end vLLM 0.32 on a CPU ("CPU Generator does not use
            # offset"), and without a seed nothing can be compared.
            job.sampling = {"n": dice.randrange(2, 4), "temperature": 1.0, "top_k": 1}


def submit(engine: Engine, job: Job, loras: Sequence[Any], *, salt: bool = True) -> str:
    """Ask for it; returns the request's name."""
    by_priority = engine.core.scheduler.vllm_config.scheduler_config.policy == "priority"
    return engine.add(
        job.prompt, job.tokens, salt=job.salt if salt else None, lora=loras[job.lora],
        priority=job.priority if by_priority else 0, params=job.params if salt else None, **job.sampling,
    )  # fmt: skip


@dataclass
class Result:
    """What is to be looked at. Growth is only of long runs, from the end of the warm-up."""

    setup: str
    seed: int
    seconds: float = 0.0
    requests: int = 0
    features: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    """Of prompts, by where their KV came from."""
    faults: Counter[str] = field(default_factory=Counter)
    """Blocks, by what was done to their copies."""
    failed: Counter[str] = field(default_factory=Counter)
    """Blocks whose copies failed or were corrupt, as KVBM counts them."""
    evictions: int = 0
    differences: list[dict[str, Any]] = field(default_factory=list)
    left: str = ""
    growth: dict[str, float] | None = None

    def problem(self) -> str | None:
        """Why it failed."""
        if self.differences or self.left:
            return f"{len(self.differences)} answers differ; left over: {self.left or 'nothing'}"
        # What few requests share may never leave host memory.
        tiers = SETUPS[self.setup].tiers if self.requests >= ENOUGH else ("g2",)
        missing = [tier for tier in tiers if not self.tokens[tier]]
        # A reset of KVBM ends what all requests that are there would store, which may be most of a few.
        if missing and (self.requests >= ENOUGH or not self.features["reset of KVBM"]):
            return f"nothing came from {missing}"
        if not missing and (not self.evictions or not self.faults):
            return "nothing was evicted, or nothing failed"
        grown = self.growth or {}
        if grown.get("descriptors", 0) > 4 or grown.get("threads", 0) > 2 or grown.get("memory_mb", 0.0) > 64:
            return f"it grows: {grown}"
        return None


def unreliable(dice: random.Random, rate: float, counts: Counter[str]) -> Callable[[str, str], Spoilt]:
    """Of requests about runs, so many go wrong in each way; `counts` says how often."""
    ways: dict[str, tuple[Spoilt, ...]] = {
        "PUT": ("refused", "stored and refused", "late", "flipped"),
        "GET": ("refused", "missing", "late", "flipped", "cut"),
    }

    def spoil(command: str, name: str) -> Spoilt:
        ours, at, these = parse(name.removeprefix("kv/")), dice.random(), ways.get(command, ())
        if ours is None or ours.kind != "run" or at >= rate * len(these):
            return ""
        way = these[int(at / rate)]
        counts[f"storage: {command} {way}"] += 1
        return way

    return spoil


class Run:
    """One set-up, started in `folder`. `close` ends its engines, but not the one without KVBM."""

    def __init__(self, name: str, alone: Alone, folder: Path, seed: int, faults: Sequence[str]) -> None:
        self.setup, self.result, self._alone = SETUPS[name], Result(name, seed), alone
        self._dice, self._switch = random.Random(seed), folder / "faults"
        self.traffic = Traffic(self._dice, alone, several=self.setup.several, stretch=self.setup.stretch)
        inject(self._switch, *faults)
        self._stack, self._spoiled, self._spoils = ExitStack(), Counter[str](), bool(faults)
        try:
            self.engines = [
                self._stack.enter_context(closing(self._start(settings))) for settings in self._settings(folder)
            ]
        except BaseException:
            self._stack.close()
            raise

    def close(self) -> None:
        self._stack.close()

    def _settings(self, folder: Path) -> Iterator[dict[str, Any]]:
        own: dict[str, Any] = {
            "g2_blocks": G2_BLOCKS * self.setup.stretch,
            "transport_wrapper": f"kvbm.testing.faults:follow?{self._switch}", **DEADLINES, **self.setup.settings,
        }  # fmt: skip
        if "g3" in self.setup.tiers:
            own |= {"g3_blocks": 1000, "g3_dir": str(folder / "disk")}
        if "g4" in self.setup.tiers:
            store = self._stack.enter_context(closing(Gcs()))
            store.spoil = unreliable(random.Random(self.result.seed), RATE * self._spoils, self._spoiled)
            self._stack.enter_context(environment(GOOGLE_SERVICE_ACCOUNT_KEY=ACCOUNT))
            shared = {"g4_url": "gs://bucket/kv", "g4_endpoint": store.endpoint, "g4_feed_s": 0.2, "g4_deadline_s": 1.0}
            for _ in "ab":
                yield own | shared
            return
        if "peer" not in self.setup.tiers:
            yield own
            return
        server, secret = Server(), folder / "secret"
        self._stack.callback(server.kill)
        secret.write_text("0123456789abcdef")
        secret.chmod(0o600)
        for name in "ab":
            yield own | {"directory": server.url, "peer_secret_file": str(secret), "peer_name": f"compare-{name}"}

    def _start(self, settings: Mapping[str, Any]) -> Engine:
        options = dict(self.setup.options)
        with asynchronous_scheduling() if options.get("async_scheduling") else nullcontext():
            engine = Engine(self._alone.model, settings, **(sizes_of(self.setup.stretch) | LORA | options))
        config = engine.core.scheduler.vllm_config.scheduler_config
        assert config.async_scheduling == options.get("async_scheduling", False)
        self._count(engine, "_preempt_request", "preempted")
        self._count(engine, "make_spec_decoding_stats", "guessed at")
        return engine

    def _count(self, engine: Engine, method: str, feature: str) -> None:
        """How often vLLM's scheduler does that."""
        scheduler, counts = engine.core.scheduler, self.result.features
        original: Callable[..., Any] = getattr(scheduler, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[feature] += 1
            return original(*args, **kwargs)

        setattr(scheduler, method, counted)

    # ------------------------------------------------------------------ asking

    def ask(self, jobs: Sequence[Job]) -> None:
        """Requests come while others run; every answer is compared."""
        dice, counts = self._dice, self.result.features
        waiting = list(jobs)
        running: list[tuple[Engine, str, Job]] = []
        aborted: set[str] = set()
        while waiting or any(engine.vllm.has_unfinished_requests() for engine in self.engines):
            while waiting and dice.random() < 0.3:
                job, engine = waiting.pop(0), dice.choice(self.engines)
                running.append((engine, submit(engine, job, self._alone.loras), job))
                counts.update(job.features)
            if running and dice.random() < 0.01:
                engine, name, _ = dice.choice(running[-8:])
                if not engine.results[name].reason and (id(engine), name) not in aborted:
                    engine.vllm.abort_request([name])
                    aborted.add((id(engine), name))
                    counts["aborted"] += 1
            for engine in self.engines:
                self._reset(engine)
                engine.step()
        for engine in self.engines:
            engine.drain()
        for engine, name, job in running:
            self._compare(engine, name, job, whole=(id(engine), name) not in aborted)
        self.result.requests += len(jobs)

    def _reset(self, engine: Engine) -> None:
        """Now and then what a person or a change of weights does."""
        if (kind := self._dice.random()) > 0.01:
            return
        # A reset of KVBM ends sharing until the engine is started anew.
        running, connector = kind < 0.003, kind < 0.0005 and not {"peer", "g4"} & {*self.setup.tiers}
        what = "KVBM" if connector else "the device, requests running" if running else "the device"
        try:
            if engine.vllm.reset_prefix_cache(reset_running_requests=running, reset_connector=connector):
                self.result.features[f"reset of {what}"] += 1
        except RuntimeError as error:
            # With every connector: while a request waits for what it loads, or blocks are kept for a copy, vLLM refuses
            # this way; requests that ran are preempted all the same.
            if "Failed to reset KV cache" not in str(error):
                raise
            self.result.features["reset that vLLM refused"] += 1

    def renew(self) -> None:
        """One of the adapters gets other weights, or those of before again."""
        which, in_place = self._dice.randrange(1, len(self._alone.loras)), self._dice.random() < 0.5
        for engine in self.engines:
            engine.settle()
        self._alone.renew(which, self._dice.randrange(1, 6), self.engines, in_place=in_place)
        self.result.features["adapter reloaded" if in_place else "adapter replaced"] += 1

    def _compare(self, engine: Engine, name: str, job: Job, *, whole: bool) -> None:
        done: Done = engine.results.pop(name)
        for index, expected in job.answers.items():
            got = done.answers.get(index, [])
            if got == (expected if whole else expected[: len(got)]):
                continue
            again = replace(job)
            if not self._alone.closed:
                self._alone.answer([again])  # by itself
            at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), len(got))
            self.result.differences.append(
                {
                    "request": name, "index": index, "features": sorted(job.features), "differs_at": at,
                    "expected": expected, "got": got, "whole": whole, "prompt": job.prompt, "lora": job.lora,
                    "salt": job.salt, "params": job.params, "sampling": job.sampling, "reason": done.reason,
                    "alone_again": again.answers.get(index), "records": [
                        asdict(record) for known, record in engine.leader.records.items()
                        if known == name or known.startswith(f"{name}-") or f"_{name}-" in known
                    ],
                }
            )  # fmt: skip

    def look(self) -> Result:
        """What has happened until now; waits until nothing moves any more."""
        result = self.result
        result.left = " ".join(filter(None, map(left, self.engines)))
        result.tokens.clear()
        result.failed.clear()
        result.faults, result.evictions = injected(self._switch) + self._spoiled, 0
        for status in (engine.status() for engine in self.engines):
            result.tokens.update(status["tokens"])
            result.evictions += status["evictions"]
            for what in ("onboard", "offload", "promote", "demote", "fetch"):
                result.failed[what] += status.get(what, {}).get("failed", 0)
            result.failed["corrupt on disk"] += status.get("promote", {}).get("corrupt", 0)
            result.failed["corrupt in storage"] += sum(
                each.get("corrupt", 0) for each in status["tiers"] if each["name"] == "g4"
            )
            result.failed["corrupt from peers"] += status.get("sharing", {}).get("peer_corrupt", 0)
        return result


@contextmanager
def running(name: str, alone: Alone, folder: Path, seed: int, faults: Sequence[str] | None = None) -> Iterator[Run]:
    """A set-up, with these faults instead of its own, whose engines end with the block."""
    folder.mkdir()
    with closing(Run(name, alone, folder, seed, SETUPS[name].faults(RATE) if faults is None else faults)) as run:
        yield run


def compare(name: str, requests: int, seed: int, alone: Alone, folder: Path) -> Result:
    """So many requests to one set-up. Raises nothing that KVBM does wrong: that is in the result."""
    with running(name, alone, folder, seed) as run:
        begun = time.monotonic()
        while run.result.requests < requests:
            if run.setup.renews and run.result.requests:
                run.renew()
            most = BETWEEN if run.setup.renews else CHUNK
            run.ask(run.traffic.more(min(most, requests - run.result.requests)))
        run.result.seconds = time.monotonic() - begun
        return run.look()


def soak(name: str, minutes: float, seed: int, alone: Alone, folder: Path, *, distinct: int = 600) -> Result:
    """The same requests again and again for so long. The first two times are warm-up."""
    with running(name, alone, folder, seed) as run:
        jobs = [job for _ in range(distinct // CHUNK) for job in run.traffic.more(CHUNK)]
        alone.close()
        begun, before = time.monotonic(), None
        while time.monotonic() - begun < minutes * 60 or before is None:
            run.ask(jobs)
            random.Random(run.result.requests).shuffle(jobs)
            if before is None and run.result.requests >= 2 * distinct:
                run.look()
                before = use(run.engines[0])
        run.result.seconds = time.monotonic() - begun
        result = run.look()
        grown = (b - a for a, b in zip(before, use(run.engines[0]), strict=True))
        result.growth = dict(zip(("descriptors", "threads", "memory_mb", "worker_mb"), grown, strict=True))
        return result


def total(results: Sequence[Result]) -> dict[str, Any]:
    """Over all set-ups."""
    whole: dict[str, Any] = {"requests": sum(each.requests for each in results)}
    whole["differences"] = sum(len(each.differences) for each in results)
    for name in ("features", "tokens", "faults", "failed"):
        whole[name] = dict(sum((getattr(each, name) for each in results), Counter()))
    return whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000, help="over all set-ups")
    parser.add_argument("--setups", default=",".join(SETUPS), help="which, separated by commas")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--minutes", type=float, help="instead: the first set-up for so long")
    given = parser.parse_args()
    names, results = given.setups.split(","), list[Result]()
    always_load()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        engines = dict[tuple[Any, int, int], Alone]()
        for at, setup in enumerate(names[:1] if given.minutes else names):
            write, ranks, stretch = of = SETUPS[setup].write, SETUPS[setup].ranks, SETUPS[setup].stretch
            if of not in engines:
                model = write(folder / f"model of {setup}")
                engines[of] = stack.enter_context(closing(Alone(model, folder / f"alone for {setup}", ranks, stretch)))
            if given.minutes:
                results.append(soak(setup, given.minutes, given.seed, engines[of], folder / setup))
                break
            requests = given.requests // len(names) + (at < given.requests % len(names))
            results.append(compare(setup, requests, given.seed + at, engines[of], folder / setup))
            print(json.dumps(vars(results[-1])), flush=True)
    print(json.dumps({"total": total(results), "setups": [vars(each) for each in results]}, indent=1))
    problems = [f"{each.setup}: {problem}" for each in results if (problem := each.problem())]
    for problem in problems:
        print(f"FAILED: {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
