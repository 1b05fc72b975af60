"""Two engines that share blocks, on one machine, with a real directory.

python -m bench.peers [--strict]

- First token of 2k tokens that the other engine has computed, against computing them (and against this engine's own
  G2). The prompts of a round share nothing; both engines are measured in turn.
- First token where a directory is configured and dead, against no directory, over prompts that share nothing.
- Tokens that are found when the turns of the demo's conversations go to two engines by turns: sharing, against not.
- Processor time of an engine that has nothing to do.
- What the directory takes per entry, and how many it takes per second.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.harness import Bench, medians_of
from bench.model import engine
from bench.ttft import first_token
from kvbm.cli.demo.conversations import conversations
from kvbm.tiers.peers.directory import Directory, indexed
from tests.e2e.engine import Engine
from tests.valkey import Server

TOKENS, BLOCK, ROUNDS, IDLE_S = 2000, 32, 7, 10.0
DEAD_TOKENS, DEAD_ROUNDS = 600, 25
USERS, TURNS, ANSWER = 4, 3, 24
ENTRIES, PROMPT_BLOCKS = 400_000, 8_000
HIT_BAR, DEAD_BAR, SHARING_BAR, IDLE_BAR = 0.25, 1.02, 1.8, 0.02


def start(**settings: Any) -> Engine:
    return engine({"g2_blocks": 1200, **settings}, max_model_len=4096, num_gpu_blocks_override=300)


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline, "the engines do not find each other"
        time.sleep(0.02)


def know(*engines: Engine) -> None:
    """Waits until each knows all others, and the directory what each has."""
    for each in engines:
        each.settle()
        peers = each.leader.core.lower.stack.tiers["peers"]
        wait_for(lambda: len(peers.network.peers) == len(engines) - 1 and not peers.published.pending)  # noqa: B023
        wait_for(lambda: peers.network.server.slabs[0])  # noqa: B023


def ttft(bench: Bench, first: Engine, second: Engine) -> None:
    dice, times = random.Random(1), dict[str, list[float]]()
    for at in range(ROUNDS + 1):
        prompt = [dice.randrange(300, 40_000) for _ in range(TOKENS)]
        holder, reader = (first, second) if at % 2 else (second, first)
        cold = first_token(holder, prompt)
        know(first, second)
        shared = first_token(reader, prompt)
        reader.settle()
        reader.forget_device()
        own = first_token(reader, prompt)
        if at:  # the first one connects
            for name, seconds in (("cold", cold), ("peer", shared), ("g2", own)):
                times.setdefault(name, []).append(seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    bench.info("ms", {name: round(value * 1e3, 1) for name, value in median.items()})
    bench.row(
        f"first token, {TOKENS} tokens of the other engine", "cold", median["peer"] / median["cold"], "<=", HIT_BAR
    )
    bench.row("the same", "the same prompt in this engine's own G2", median["peer"] / median["g2"])
    assert sum(each.status()["tokens"]["peer"] for each in (first, second)) >= ROUNDS * (TOKENS // BLOCK - 1) * BLOCK


def dead(bench: Bench, secret: str) -> None:
    dice = random.Random(2)
    engines = {
        "dead": start(directory="valkey://127.0.0.1:1/0", peer_secret_file=secret),
        "none": start(),
        "none again": start(),
    }

    def once(each: Engine) -> float:
        return first_token(each, [dice.randrange(300, 40_000) for _ in range(DEAD_TOKENS)])

    for each in engines.values():
        once(each)
    cases = {name: lambda each=each: once(each) for name, each in engines.items()}
    median = medians_of(DEAD_ROUNDS, cases)
    assert engines["dead"].leader.core.lower.degraded()
    bench.row("first token, directory dead", "no directory", median["dead"] / median["none"], "<=", DEAD_BAR)
    bench.row("A/A: no directory", "no directory", median["none again"] / median["none"])
    for each in engines.values():
        each.close()


def found(first: Engine, second: Engine) -> int:
    """Tokens found by the demo's conversations, whose turns go to the engines by turns."""
    tokenizer, total = first.vllm.get_tokenizer(), 0
    talks = conversations(USERS, TURNS, TOKENS, lambda text: len(tokenizer.encode(text)))
    so_far: dict[int, list[int]] = {talk.user: [] for talk in talks}
    for turn in range(TURNS):
        for talk in talks:
            each = (first, second)[(turn + talk.user) % 2]
            prompt = so_far[talk.user] + tokenizer.encode(talk.says(turn))
            (done,) = each.run([prompt], ANSWER)
            total += done.cached
            so_far[talk.user] = prompt + done.tokens
            each.settle()
            time.sleep(0.3)  # a user reads
    return total


def processes(pid: int) -> list[int]:
    """It, and all that it started."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError):
            continue
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def processor_s() -> float:
    total = 0
    for pid in processes(os.getpid()):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def idle() -> float:
    """Cores that this process and all it has started use."""
    time.sleep(2)
    before, begun = processor_s(), time.monotonic()
    time.sleep(IDLE_S)
    return (processor_s() - before) / (time.monotonic() - begun)


async def directory(bench: Bench, server: Server) -> None:
    def memory() -> int:
        import valkey

        client: Any = valkey.Valkey(port=server.port)
        return int(client.info("memory")["used_memory"])

    namespace = "ab" * 32
    one = Directory(server.url, namespace, "one", 1, lease_s=60, timeout=5)
    await one.renew("127.0.0.1", 1)
    entries = [os.urandom(8) for _ in range(ENTRIES)]
    before, begun = memory(), time.perf_counter()
    for at in range(0, ENTRIES, 4096):
        await one.update(entries[at : at + 4096], [])
    bench.info("entries written per second", round(ENTRIES / (time.perf_counter() - begun)))
    bench.info("bytes per entry in Valkey", round((memory() - before) / ENTRIES, 1))
    places = indexed(0, PROMPT_BLOCKS)
    bench.info(f"entries of a prompt of {PROMPT_BLOCKS} blocks", len(places))
    asked = entries[: len(places)]
    for count in (1, 20, 100):
        for number in range(count):
            other = Directory(server.url, namespace, f"i{number}", number, lease_s=60, timeout=5)
            await other.renew("127.0.0.1", 1)
            await other.update(entries[: 1000 + number], [])
            await other.close()
        known = {name: each for name, each in (await one.instances()).items() if name.startswith("i")}
        took = []
        for _ in range(50):
            begun = time.perf_counter()
            assert len(await one.find(known, asked)) == count
            took.append(time.perf_counter() - begun)
        bench.info(f"looking up such a prompt at {count} instances, ms", round(statistics.median(took) * 1e3, 2))
    await one.close()


@contextmanager
def closing(*engines: Engine) -> Any:
    try:
        yield engines
    finally:
        for each in engines:
            each.close()


def main() -> int:
    bench, server = Bench("peers"), Server()
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder, "secret")
        secret.write_text("0123456789abcdef")
        secret.chmod(0o600)
        settings = {"directory": server.url, "peer_secret_file": str(secret)}
        asyncio.run(directory(bench, server))
        with closing(start(), start()) as (first, second):
            alone, quiet = found(first, second), idle()
        with closing(start(**settings), start(**settings)) as (first, second):
            know(first, second)
            shared = found(first, second)
            bench.row(
                "tokens found by conversations, engines by turns, sharing",
                "not sharing",
                shared / alone,
                ">=",
                SHARING_BAR,
            )
            ttft(bench, first, second)
            sharing = idle()
        bench.row("idle: an engine with NIXL, cores", "nothing", sharing / 2, "<=", IDLE_BAR)
        bench.row("idle: an engine without, cores", "nothing", quiet / 2)
        dead(bench, str(secret))
    server.kill()
    return bench.write()


if __name__ == "__main__":
    sys.exit(main())
