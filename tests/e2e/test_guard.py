"""Whatever raises in KVBM, and whenever: the engine serves on, with the answers that it has without KVBM."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from kvbm.tiers.gate import Gate
from tests.e2e import raising
from tests.e2e.conftest import prompt_of
from tests.e2e.engine import Engine, asynchronous_scheduling, write_gemma, write_tiny

TOKENS = 6
OPTIONS: dict[str, Any] = {"num_gpu_blocks_override": 34, "max_model_len": 512, "max_num_batched_tokens": 256}
"""So few blocks that requests preempt each other."""


@dataclass(frozen=True)
class Kind:
    """A kind of engine."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    write: Callable[[Path], Path] = write_tiny


KINDS = {
    "async, with a disk": Kind({"g3_blocks": 500, "g3_drain_s": 0}),
    "sync": Kind({"onboard": "sync"}),
    "two ranks, asynchronous scheduling": Kind(options={"tensor_parallel_size": 2, "async_scheduling": True}),
    "hybrid": Kind(options={"num_gpu_blocks_override": 110}, write=write_gemma),
}


class Victim:
    """An engine in which something raises again and again. KVBM's sides are made anew each time, vLLM's are not."""

    def __init__(self, folder: Path, kind: Kind, dice: random.Random) -> None:
        self.dice, self._folder, self._disk = dice, folder, "g3_blocks" in kind.settings
        self.from_disk = 0
        """Tokens that came from a disk that was filled until something raised."""
        self.same = 0
        """Blocks in host memory after something raised, which no request held, that were what they have to be."""
        folder.joinpath("model").mkdir()
        settings = {"metrics": False, "g3_dir": str(folder / "disk"), **kind.settings}
        options = OPTIONS | kind.options
        with asynchronous_scheduling() if options.get("async_scheduling") else nullcontext():
            self.engine = Engine(kind.write(folder / "model"), settings, **options)
        roots = [prompt_of(dice, length) for length in (70, 100, 170)]
        self.prompts = [root + prompt_of(dice, dice.randrange(10, 110)) for root in roots * 3]
        self.fresh = [prompt_of(dice, dice.randrange(40, 180)) for _ in range(4)]
        every = self.prompts + self.fresh
        # The engine's own answers: it neither loads nor stores anything.
        own = self.engine.run(every, TOKENS, params={"load": False, "save": False})
        self.answers = {tuple(prompt): done.tokens for prompt, done in zip(every, own, strict=True)}
        assert self.engine.status()["offload"]["blocks"] == 0
        self.engine.forget_device()
        self.ask(every)
        self._workers(raising.remember_worker, *self._stored())

    @property
    def connector(self) -> Any:
        return self.engine.core.scheduler.connector

    @property
    def ranks(self) -> int:
        return int(self.engine.core.model_executor.parallel_config.world_size)

    def _workers(self, call: Callable[..., Any], *args: Any) -> list[Any]:
        return self.engine.core.model_executor.collective_rpc(call, args=args)  # type: ignore[no-any-return]

    def _stored(self) -> tuple[list[bytes], list[int]]:
        """Keys in host memory and their slots, but for what is held."""
        pool = self.engine.leader.pool
        with pool.candidates(pool.statistics().total) as hold:
            return list(hold.keys), hold.slots.tolist()

    def restart(self, disk: str) -> None:
        """KVBM's sides are made anew, over a disk of this name."""
        connector = self.connector
        for job in self.engine.leader._copies._jobs.values():  # nobody answers for them any more
            job.lease.drop()
        connector._scheduler.close()
        connector._kv_transfer_config.kv_connector_extra_config["g3_dir"] = str(self._folder / disk)
        self._workers(raising.restart_worker)
        connector._build(connector._vllm_config, connector.role, connector._kv_cache_config)

    def ask(self, prompts: Sequence[list[int]], meanwhile: Callable[[], None] = lambda: None) -> int:
        """They come while others run, and one is aborted. Every answer must be the engine's own. Returns how many of
        their tokens were there."""
        cached, differ = self.compare(prompts, meanwhile)
        assert differ == 0
        return cached

    def compare(self, prompts: Sequence[list[int]], meanwhile: Callable[[], None] = lambda: None) -> tuple[int, int]:
        engine, waiting, names = self.engine, list(prompts), dict[str, list[int]]()
        aborted = self.dice.randrange(len(waiting))
        while waiting or engine.vllm.has_unfinished_requests():
            while waiting and self.dice.random() < 0.5:
                prompt = waiting.pop(0)
                names[name := engine.add(prompt, TOKENS)] = prompt
                if len(names) - 1 == aborted:
                    engine.step()
                    engine.vllm.abort_request([name])
            meanwhile()
            engine.step()
        engine.drain(60)
        differ = 0
        for at, (name, prompt) in enumerate(names.items()):
            got, own = engine.results[name].tokens, self.answers[tuple(prompt)]
            differ += got != (own[: len(got)] if at == aborted else own)
        cached = sum(engine.results[name].cached for name in names)
        engine.leader.tick()
        if engine.leader.off is None:  # else nobody answers for copies that were never begun
            engine.settle()
        engine.forget_device()
        return cached, differ

    def _reset(self) -> None:
        assert self.engine.core.scheduler.reset_connector_cache()

    def arm(self, name: str, at: int, where: str | int, rank: int) -> None:
        if name in raising.SCHEDULER:
            raising.arm(name, at, where)
        else:
            self._workers(raising.arm_worker, rank, name, at, where)

    def disarm(self) -> bool:
        """Whether it has raised."""
        return any([raising.disarm(), *self._workers(raising.disarm_worker)])

    def fill(self, disk: str = "disk") -> None:
        """KVBM's sides are new, and something is stored and loaded."""
        self.restart(disk)
        self.ask(self.prompts)
        assert self.ask(self.prompts[:3]) > 0
        assert self.engine.status()["onboard"]["blocks"] > 0, "nothing was loaded"

    def _rest(self) -> None:
        """Until nothing is written to disk any more: what is being written is held, and no part of `_stored`."""
        disk, deadline = self.engine.leader.disk, time.monotonic() + 60
        while disk is not None and disk.tier.in_flight() != (0, 0):
            assert time.monotonic() < deadline
            self.engine.leader.tick()
            time.sleep(0.002)

    def hurt(self, name: str, where: str | int, rank: int) -> None:
        """That method raises while requests are loaded and stored."""
        disk = f"{name} {where}"
        self.fill(disk)
        rounds, at = 0, self.dice.randrange(1, 4)
        self.arm(name, at, where, rank)
        while True:
            self.ask(self.prompts + self.fresh, self._reset if name == "reset" else lambda: None)
            if self.disarm():
                break
            rounds += 1
            assert rounds < 10, f"{name} was not called"
            self.arm(name, at, max(1, where // 2**rounds) if isinstance(where, int) else where, rank)
        self.ask(self.fresh[:1])  # what raised in the last step is heard of in the next
        self._is_off(name in raising.WORKER)
        self._rest()
        # Nothing that differs was stored, and nothing is any more, in host memory and on disk.
        for same, differ in self._workers(raising.compare_worker, *self._stored()):
            assert differ == 0
            self.same += same
        before = self._stored(), self._copied()
        self.ask(self.prompts)
        assert (self._stored(), self._copied()) == before
        if name == "reset":
            self._reset()
        if self._disk:
            self.restart(disk)
            self.ask(self.prompts + self.fresh)
            self.from_disk += self.engine.status()["tokens"]["g3"]

    def _copied(self) -> list[int]:
        status = self.engine.status()
        return [status[way]["blocks"] for way in ("onboard", "offload")]

    def _is_off(self, worker: bool) -> None:
        assert self.connector._scheduler.off is not None
        assert all(self._workers(raising.off_worker))
        health = self.engine.side.control.health()
        assert not health["healthy"]
        (problem,) = health["problems"]
        assert problem.startswith("rank " if worker else "off until the engine is started anew: ")
        assert " raised Injected(" in problem


@pytest.fixture(scope="module", params=KINDS)
def victim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    seed = int(os.environ.get("TEST_SEED", time.time_ns() % 1_000_000))
    print(f"{request.param}, seed {seed} (TEST_SEED repeats it)")
    victim = Victim(tmp_path_factory.mktemp("guard"), KINDS[request.param], random.Random(seed))
    with mock.patch.object(Gate, "computing_s", return_value=None):  # what is on disk is read
        yield victim
    raising.arm("close", 1, "before")
    victim.engine.close()
    assert raising.disarm(), "the engine ends, whatever raises"


def test_every_call_may_raise(victim: Victim) -> None:
    hit = {}
    for name in raising.SCHEDULER + raising.WORKER:
        where = victim.dice.choice(["before", "after", int(2 ** victim.dice.uniform(0, 7))])
        rank = victim.dice.randrange(victim.ranks)
        victim.hurt(name, where, rank)
        hit[name] = where if name in raising.SCHEDULER else f"{where} on rank {rank}"
    print(f"raised (a number: at that line): {hit}")
    assert [*hit] == [*raising.SCHEDULER, *raising.WORKER]
    assert victim.same > 0
    assert not victim._disk or victim.from_disk > 0


def test_a_guard_that_answers_success_changes_answers(victim: Victim) -> None:
    """The negative control: the answers notice a load that was promised and not made."""
    differ = 0
    for _ in range(8):  # what was promised may be the load of the one that is aborted
        victim.fill()
        victim.ask(victim.fresh)  # over what the engine has of the others
        victim._workers(raising.lie_worker)
        victim.arm("before_step", 1, "before", 0)
        differ += victim.compare(victim.prompts)[1]
        assert victim.disarm()
        victim._workers(raising.honest_worker)
        if differ:
            break
    assert differ > 0


def test_without_a_guard_the_engine_ends(victim: Victim) -> None:
    """The last of this engine."""
    from kvbm.connect.vllm.guard import Guard

    victim.fill()
    victim.arm("match", 1, "before", 0)
    with (
        mock.patch.object(Guard, "ask", lambda self, otherwise, call, *args: call(*args)),
        pytest.raises(raising.Injected),
    ):
        victim.ask(victim.prompts)
    victim.disarm()
