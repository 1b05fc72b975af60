"""Two engines that share blocks, one of which is killed again and again: `python -m tests.e2e.soak_peers --minutes 20`.

The engine in this process answers random prompts out of a set and compares every answer with those of an engine without
KVBM. The other, a process group of its own, does the same; it is killed every `--every` seconds, each third time after
it was frozen for a while, and started anew under its name. At the end nothing may be left over: slots, pins, promises,
file descriptors, threads, memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvbm.tiers.gate import Gate
from tests.e2e.engine import Engine, write_tiny
from tests.valkey import Server

PROMPTS, ANSWER, FROZEN_S = 60, 12, 3.0
SIZES = {"g2_blocks": 160, "directory_lease_s": 5.0, "peer_deadline_s": 1.0}
"""Less than a third of what the set needs, so that most is read from the other engine again and again."""


@dataclass
class Result:
    """What is to be looked at. Growth is from the first kill to the end."""

    seconds: float = 0.0
    requests: int = 0
    wrong: int = 0
    kills: int = 0
    peer_tokens: int = 0
    corrupt: int = 0
    slowest_s: float = 0.0
    left: str = ""
    """What is still held."""
    descriptors: int = 0
    threads: int = 0
    memory_mb: float = 0.0
    worker_mb: float = 0.0
    """Of the engine's worker: an engine without KVBM grows as well (docs/proof.md)."""

    def problem(self) -> str | None:
        """Why it failed."""
        if self.wrong or self.corrupt or self.left:
            return f"{self.wrong} wrong answers, {self.corrupt} blocks that were not what was promised, {self.left}"
        if not self.peer_tokens or not self.kills:
            return "nothing was shared, or nobody was killed"
        if self.descriptors > 4 or self.threads > 2 or self.memory_mb > 64:
            return f"{self.descriptors} descriptors, {self.threads} threads, {self.memory_mb:.0f} MB are left over"
        return None


def always_load() -> None:
    """The model is so small that computing would always be faster."""
    Gate.computing_s = lambda *_: None  # type: ignore[method-assign]


def prompts() -> list[list[int]]:
    dice = random.Random(5)
    return [[dice.randrange(3, 1000) for _ in range(dice.randrange(150, 500))] for _ in range(PROMPTS)]


def peer(model: str, settings: str) -> None:
    """The other engine: answers until it is killed."""
    always_load()
    engine, dice, wanted = Engine(Path(model), json.loads(settings)), random.Random(os.getpid()), prompts()
    while True:
        engine.run(dice.sample(wanted, 3), ANSWER)
        engine.forget_device()


def start(
    model: Path, settings: dict[str, Any], log: Path, module: str = "tests.e2e.soak_peers"
) -> subprocess.Popen[bytes]:
    """The other engine of this module, as a group of processes."""
    command = [sys.executable, "-m", module, "--peer", str(model), "--settings", json.dumps(settings)]
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, process_group=0)


def kill(process: subprocess.Popen[bytes], *, frozen_s: float = 0.0) -> None:
    if frozen_s:
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(frozen_s)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def use(engine: Engine) -> tuple[int, int, float, float]:
    """File descriptors and threads of this process and the engine's workers; megabytes of this and of the first."""
    descriptors = threads = 0
    memory = []
    for pid in (os.getpid(), *(worker.proc.pid for worker in engine.core.model_executor.workers)):
        descriptors += len(os.listdir(f"/proc/{pid}/fd"))
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            threads += int(value) if name == "Threads" else 0
            memory += [int(value.split()[0]) / 1000] if name == "RssAnon" else []
    return descriptors, threads, memory[0], memory[1]


def soak(minutes: float, every: float, folder: Path) -> Result:
    """Run it. Raises nothing: what is wrong is in the result."""
    measured = Gate.computing_s
    always_load()
    model, server, dice, result = write_tiny(folder / "model"), Server(), random.Random(6), Result()
    secret, log = folder / "secret", folder / "peer.log"
    secret.write_text("0123456789abcdef")
    secret.chmod(0o600)
    shared = SIZES | {"directory": server.url, "peer_secret_file": str(secret)}
    wanted, plain = prompts(), Engine(model, num_gpu_blocks_override=256)
    expected = [done.tokens for done in plain.run(wanted, ANSWER)]
    plain.close()
    engine = Engine(model, shared | {"peer_name": "soak-a"})
    other = start(model, shared | {"peer_name": "soak-b"}, log)
    begun = killed = time.monotonic()
    before: tuple[int, int, float, float] | None = None
    try:
        while time.monotonic() - begun < minutes * 60:
            chosen = dice.sample(range(PROMPTS), dice.randrange(1, 4))
            asked = time.monotonic()
            done = engine.run([wanted[at] for at in chosen], ANSWER)
            result.slowest_s = max(result.slowest_s, time.monotonic() - asked)
            result.requests += len(chosen)
            result.wrong += sum(each.tokens != expected[at] for each, at in zip(done, chosen, strict=True))
            engine.forget_device()
            if not engine.leader.lower.peers.network.peers:
                time.sleep(0.3)  # it starts, and needs the processor
                assert other.poll() is None, log.read_text()
                killed = max(killed, time.monotonic() - every / 2)
                begun = begun if result.kills else time.monotonic()
            if time.monotonic() - killed > every:
                kill(other, frozen_s=FROZEN_S if result.kills % 3 == 2 else 0.0)
                result.kills += 1
                before = before or use(engine)
                other = start(model, shared | {"peer_name": "soak-b"}, log)
                killed = time.monotonic()
    finally:
        kill(other)
    result.seconds = time.monotonic() - begun
    result.left = left(engine)
    after = use(engine)
    growth = [b - a for a, b in zip(before or after, after, strict=True)]
    result.descriptors, result.threads = int(growth[0]), int(growth[1])
    result.memory_mb, result.worker_mb = growth[2:]
    status = engine.status()
    result.peer_tokens, result.corrupt = status["tokens"]["peer"], status["sharing"]["peer_corrupt"]
    engine.close()
    server.kill()
    Gate.computing_s = measured  # type: ignore[method-assign]
    return result


def left(engine: Engine) -> str:
    """Waits until nothing is under way, a minute at most; what is still held then."""
    leader, deadline = engine.leader, time.monotonic() + 60
    peers = None if leader.lower is None else leader.lower.peers
    pools = {"g2": leader.pool} | ({} if leader.disk is None else {"g3": leader.disk.tier.pool})
    while True:
        leader.tick()
        held = {"copies": sum(leader.in_flight()), "requests": len(leader.requests), "loads": len(leader._loading)}
        held |= {"matches": leader._held}
        for tier, now in ((tier, pool.statistics()) for tier, pool in pools.items()):
            states = {"active": now.active, "staged": now.staged, "writable": now.writable, "orphaned": now.orphaned}
            held |= {f"{tier} {state}": count for state, count in states.items()}
        if peers is not None:
            held |= {
                "promised": peers.serving.held, "reads": peers.in_flight(), "searches": len(peers._sought),
                "connections to the dead": sum(
                    client.open for name, client in peers.network._clients.items() if name not in peers.network.peers
                ),
            }  # fmt: skip
        if not any(held.values()):
            for pool in pools.values():
                pool.check()
            return ""
        if time.monotonic() > deadline:
            return str({name: count for name, count in held.items() if count})
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--every", type=float, default=30.0, help="seconds between kills")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peer:
        peer(given.peer, given.settings)
    with tempfile.TemporaryDirectory() as folder:
        result = soak(given.minutes, given.every, Path(folder))
    print(json.dumps(asdict(result), indent=1))
    if problem := result.problem():
        print(f"FAILED: {problem}")
    return int(result.problem() is not None)


if __name__ == "__main__":
    sys.exit(main())
