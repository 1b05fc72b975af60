"""Where a history takes place: a leader with all that is played around it, and what of it is written down."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any
from unittest import mock

from kvbm.abc import policy
from kvbm.blocks import LayerGroup
from kvbm.core.events import Event, Stored
from tests.decisions.engine import FULL, NAMES, Engine
from tests.decisions.ranks import Ranks
from tests.decisions.words import Words, plain
from tests.leader.played import Chores
from tests.leader.roles import BLOCK_TOKENS, Stage

TOKENS, EPOCH = BLOCK_TOKENS, 1_800_000_000.0
WINDOW = LayerGroup("window", TOKENS, 2 * TOKENS + 1)
MODELS = ((FULL, WINDOW), (WINDOW, FULL), (FULL, LayerGroup("chunk", TOKENS, 3 * TOKENS)), (FULL, WINDOW, WINDOW))


@dataclass(frozen=True)
class Plan:
    """What there is below host memory, and above."""

    name: str
    disk: str | None = None
    peers: bool = False
    groups: bool = False
    adapters: bool = False


PLANS = (
    Plan("G2 alone"),
    Plan("disk", "write-through"),
    Plan("exclusive disk", "exclusive"),
    Plan("layer groups", groups=True),
    Plan("layer groups and disk", "write-through", groups=True),
    Plan("peers", peers=True),
    Plan("disk and peers", "write-through", peers=True),
    Plan("adapters and disk", "write-through", adapters=True),
    Plan("exclusive disk and peers", "exclusive", peers=True),
    Plan("layer groups and exclusive disk", "exclusive", groups=True),
)
"""Of the histories, in turn."""


class _Slow:
    """`time.perf_counter`: each look costs so many seconds."""

    def __init__(self) -> None:
        self.cost = self._now = 0.0

    def __call__(self) -> float:
        self._now += self.cost
        return self._now


def _tag(key: bytes) -> int:
    """`hash`, without this process's seed."""
    return int.from_bytes(key[:6], "little") * 256 + sum(key[32:])


class Scene:
    """Of the history with this number."""

    def __init__(self, number: int) -> None:
        self.dice, self.plan = Random(number), PLANS[number % len(PLANS)]
        self.lines: list[str] = []
        self.words = Words()
        self.words.names = dict(NAMES)
        self._slow = _Slow()
        self._seen = 0
        self._said: dict[str, int] = {}
        self._state = ""
        self._leases: list[int] = []
        self._gone = False
        """A worker is, and will answer nothing more."""
        dice, plan = self.dice, self.plan
        self._ranks = dice.choice([1, 1, 2])
        self._mood = dice.choice([0, 2, 15])
        self._block_s = dice.choice([0.002, 0.02, 0.2])
        self._models = dice.choice(MODELS) if plan.groups else ()
        self._peers = {"keep": dice.random() < 0.7, "held": dice.choice([4, 8]), "lease_s": 10.0}
        in_flight, batch = dice.choice([2, 5, 16]), dice.choice([1, 2, 4])
        self._disk = {
            "slots": dice.choice([8, 16, 40]), "admit": dice.choice(["all", "all", "frequency", "presence"]),
            "write_bytes": dice.choice([None, None, 6e6]), "most": dice.choice([4, 8, 32]),
            "in_flight": in_flight, "batch": batch,
        }  # fmt: skip
        self._settings: dict[str, Any] = {
            "held_share": dice.choice([0.3, 0.5, 1.0]), "store_inflight_mb": dice.choice([3, 6, 512]),
            "onboard": dice.choice(["async", "async", "sync"]), "enabled": dice.random() < 0.98,
            "explain_requests": dice.choice([1000, 1000, 4]), "save_answers": dice.random() < 0.8,
            "store_deadline_s": dice.choice([30.0, 9e3]), "load_deadline_s": dice.choice([10.0, 9e3]),
            "load_min_tokens": dice.choice([None, None, 0, 96]), "checkpoint_tokens": dice.choice([None, 4 * TOKENS]),
            "shadow_every": 0 if plan.groups else dice.choice([0, 0, 0, 1]),
            "prove_first": not plan.groups and dice.random() < 0.15, "slow_step_ms": 100.0,
        }  # fmt: skip
        self._late = (plan.disk is not None or plan.peers) and dice.random() < 0.1
        self._caches = dice.random() < 0.4
        self._fate = dice.choice([None] * 9 + ["off", "sick", "gone", "bye", "isolate", "disk"])
        parts = (plan, self._ranks, self._settings, self._disk, self._peers, self._late)
        self._log(" ".join(map(str, parts)))
        self.stage: Stage

    # ------------------------------------------------------------------ the stage

    def _start(self, found: Any) -> None:
        dice, plan = self.dice, self.plan
        self.stage = Stage(
            dice.choice([10, 16, 24]), ranks=self._ranks, groups=self._models, shares=self._caches,
            most_doubted=0.3, **self._settings,
        )  # fmt: skip
        self.chores, self._there = Chores(), False
        self.stage.pool.add_observer(self.stage)
        self.stage.pool.add_observer(self)
        blocks = dice.choice([16, 24]) * (1 + len(self._models))
        self.engine = Engine(
            self.stage, self.words, self._log, dice, self._models, adapters=plan.adapters, peers=plan.peers,
            sync=self._settings["onboard"] == "sync", caches=self._caches, blocks=blocks,
            block_s=self._block_s,
        )  # fmt: skip
        self.ranks = Ranks(
            self.stage, self.words, self._log, dice, self._mood, self.engine.loaded, sums=plan.peers,
        )  # fmt: skip
        self.engine.ranks = self.ranks
        if self._late:
            self.stage.expect()
        else:
            self._below(found)

    def _below(self, found: Any) -> None:
        stage, plan = self.stage, self.plan
        self._there = plan.disk is not None or plan.peers
        if plan.disk is not None:
            stage.add_disk(exclusive=plan.disk == "exclusive", found=found, chores=self.chores, **self._disk)
            stage.disk.add_observer(stage)
        if plan.peers:
            stage.add_peers(
                most=self._disk["most"], in_flight=self._disk["in_flight"], batch=self._disk["batch"], **self._peers
            )
            stage.network.peers = ("other",)
            for rank in stage.workers:
                self.ranks.say(rank, "mine", b"memory", 4096, 1_000_000, 64)

    def on_event(self, event: Event) -> None:
        """Blocks are published: could other instances be promised them at this moment?"""
        if isinstance(event, Stored) and self._shares:
            self._log(f"  checksums of {self.stage.known(event.keys)} of {len(event.keys)} are known")

    # ------------------------------------------------------------------ the log

    def _log(self, line: str) -> None:
        self.lines.append(line)

    def _effects(self) -> None:
        """What came of what was done last."""
        self.ranks.hear()
        stage = self.stage
        for event in stage.events[self._seen :]:
            self._log(f"  event {self.words.event(event)}")
        self._seen = len(stage.events)
        for name, each in list(stage.leader.records.items()):
            for sentence in each.why[self._said.get(name, 0) :]:
                self._log(f"  {name}: {sentence}")
            self._said[name] = len(each.why)
        if self._shares:
            for told in stage.network.told:
                self._log(f"  network {told}")
            stage.network.told.clear()
        core = stage.leader.core
        state = f"  now aside {core.health.aside()}, degraded {plain(core.lower.degraded())}, copies {core.in_flight()}"
        if state != self._state:
            self._state = state
            self._log(state)

    @property
    def _disk_there(self) -> bool:
        return self._there and self.plan.disk is not None

    @property
    def _shares(self) -> bool:
        return self._there and self.plan.peers

    def _named(self, name: str, call: Callable[[], object]) -> None:
        self._log(name)
        if (result := call()) is not None and not isinstance(result, tuple):
            self._log(f"  -> {plain(result)}")

    def _time(self) -> None:
        seconds = self.dice.choice([0.0, 0.0, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 1.0, 6.0, 12.0, 40.0])
        self._log(f"tick {seconds}")
        self.stage.tick(seconds)

    # ------------------------------------------------------------------ time

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Every clock is the history's, and tags of blocks are the same in every process."""
        level = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            with (
                mock.patch.object(time, "time", self._unix),
                mock.patch.object(time, "monotonic", self._now),
                mock.patch.object(time, "perf_counter", self._slow),
                mock.patch.object(time, "sleep", self._sleep),
                mock.patch.object(policy, "hash", _tag, create=True),
            ):
                yield
        finally:
            logging.disable(level)

    def _now(self) -> float:
        return self.stage.clock() if hasattr(self, "stage") else 0.0

    def _unix(self) -> float:
        return EPOCH + self._now()

    def _sleep(self, seconds: float) -> None:
        """Somebody waits: meanwhile the ranks go on."""
        self.stage.clock.advance(max(seconds, 0.05))
        self.ranks.hear()
        if self.dice.random() < 0.5:
            self.ranks.some(3)
