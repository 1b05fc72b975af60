"""One seeded random history over a leader, and all that it decides, line by line."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from random import Random
from typing import Any
from unittest import mock

import numpy as np

from kvbm.blocks import LayerGroup, Pool
from kvbm.core.events import Event, Stored
from tests.manager.decisions.engine import ASIDE, FULL, NAMES, TEXTS, Engine
from tests.manager.decisions.ranks import DIGESTS, Ranks
from tests.manager.decisions.words import Words, plain, record
from tests.manager.played import Chores
from tests.manager.roles import BLOCK_TOKENS, Stage, recovered

TOKENS, EPOCH = BLOCK_TOKENS, 1_800_000_000.0
OPERATIONS = 45
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


class History:
    """See the module. The same number is the same history, in every process."""

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
        leader = stage.leader
        state = (
            f"  now aside {leader.standing_aside()}, degraded {plain(leader.degraded())}, copies {leader.in_flight()}"
        )
        if state != self._state:
            self._state = state
            self._log(state)

    def run(self) -> list[str]:
        """All of it."""
        with self._frozen():
            try:
                self._live()
            except Exception as error:  # noqa: BLE001  # of what is tried out, a mutant say: it is another history, too
                self._log(f"raised {error!r}")
            finally:
                self._leave()
        return self.lines

    def _live(self) -> None:
        self._start(None)
        self._effects()
        for name in self.dice.sample([*TEXTS], 2):
            self._serve(name)
        self._operate(OPERATIONS)
        if self.plan.disk is not None and self.dice.random() < 0.25:
            self._restart()
            self._operate(OPERATIONS // 2)
        self._end()

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Every clock is the history's."""
        level = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            with (
                mock.patch.object(time, "time", self._unix),
                mock.patch.object(time, "monotonic", self._now),
                mock.patch.object(time, "perf_counter", self._slow),
                mock.patch.object(time, "sleep", self._sleep),
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

    # ------------------------------------------------------------------ what happens

    def _operate(self, count: int) -> None:
        chances = self._chances()
        weights, operations = [weight for weight, _ in chances], [each for _, each in chances]
        for at in range(count):
            if self._fate is not None and at == OPERATIONS * 2 // 3:
                self._meet(self._fate)
                self._fate = None
            for operation in self.dice.choices(operations, weights):
                operation()
            self._effects()

    def _chances(self) -> list[tuple[float, Callable[[], object]]]:
        """What may happen, and how often."""
        dice, engine, ranks, leader = self.dice, self.engine, self.ranks, self.stage.leader
        chances: list[tuple[float, Callable[[], object]]] = [
            (8, engine.step),
            (4, lambda: engine.arrive() if len(engine.requests) < 6 else engine.step()),
            (4, lambda: ranks.some(dice.randrange(1, 8))),
            (3, lambda: self._named("all answer", ranks.all)),
            (2.5, self._time),
            (0.6, lambda: engine.finish(dice.choice([*engine.requests.values()])) if engine.requests else None),
            (0.5, self._lose),
            (2, self._returns),
            (0.7, self._serve),
            (0.2, engine.goes_on),
            (0.12, lambda: self._named("pause", leader.pause)),
            (0.6, lambda: self._named("resume", leader.resume)),
            (0.1, lambda: self._named("reset", leader.reset)),
            (0.1, lambda: self._named("check", lambda: leader.check(1.0))),
            (0.1, self._bar),
            (0.06, lambda: self._named("reset and quiesce", lambda: (leader.reset(), leader.quiesce(1.0)))),
            (0.1, lambda: self._named("quiesce", lambda: leader.quiesce(0.3))),
            (0.03, self._drag),
            (0.05, lambda: ranks.say(0, "ready")),
        ]
        if self._late:
            chances.append((1, self._attach))
        if self.plan.disk is not None:
            chances += [
                (2, self._chore),
                (0.5, self._breaks),
                (0.3, lambda: self._command("begin")),
                (0.2, lambda: self._command(dice.choice(["stop", None]))),
                (0.1, lambda: self._named("drain", lambda: leader.drain(1.0))),
                (0.06, self._purge),
            ]
        if self.plan.peers:
            chances += [
                (4, self._promised),
                (0.7, self._search_ends),
                (1.5, self._reserved),
                (0.8, self._comes),
                (1, self._released),
                (1, self._published),
                (0.3, self._neighbours),
                (0.1, lambda: ranks.say(0, "mine", b"other memory", 8192, 1_000_000, 64)),
            ]
        if self.plan.adapters:
            chances.append((0.5, self._other_adapter))
        return chances

    def _named(self, name: str, call: Callable[[], object]) -> None:
        self._log(name)
        if (result := call()) is not None and not isinstance(result, tuple):
            self._log(f"  -> {plain(result)}")

    def _time(self) -> None:
        seconds = self.dice.choice([0.0, 0.0, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 1.0, 6.0, 12.0, 40.0])
        self._log(f"tick {seconds}")
        self.stage.tick(seconds)

    def _serve(self, name: str = "") -> None:
        """A request comes and goes as fast as it can, while all goes well."""
        mood, self.ranks.mood = self.ranks.mood, 0
        self.engine.arrive(name)
        for _ in range(6):
            self.engine.step()
            self.ranks.all()
            self._effects()
        self.ranks.mood = mood

    def _returns(self) -> None:
        """A prompt comes again after host memory was needed for others."""
        name = self.dice.choice([*TEXTS])
        self._log(f"lose {name}")
        self.stage.pool.discard(TEXTS[name])
        if len(self.engine.requests) < 8:
            self.engine.arrive(name)

    def _lose(self) -> None:
        """Host memory was needed for others."""
        name, first = self.dice.choice([*TEXTS]), self.dice.randrange(8)
        self._log(f"lose {name} from {first}")
        self.stage.pool.discard([*TEXTS[name][first:], *ASIDE[name][first:]])

    def _bar(self) -> None:
        if self.engine.requests:
            name = self.dice.choice([*self.engine.requests])
            self._named(f"bar {name}", lambda: self.stage.leader.bar(name, "its images have changed"))

    def _drag(self) -> None:
        """KVBM keeps the engine for too long, step after step."""
        self._slow.cost = 0.5
        for _ in range(33):
            self.engine.seal({})
        self._slow.cost = 0.0
        self._log("33 slow steps")

    def _meet(self, fate: str) -> None:
        """Something that does not heal."""
        self._log(f"fate: {fate}")
        leader, rank = self.stage.leader, self._ranks - 1
        match fate:
            case "off":
                leader.turn_off("something raised")
            case "sick":
                self.ranks.say(rank, "sick", "a copy thread died")
            case "gone":
                self._gone = True
                self.stage.workers[rank].close()
            case "bye":
                self.ranks.say_only("bye")
            case "isolate":
                leader.isolate("the weights have changed")
            case "disk":
                self.ranks.say(rank, "sick", "a disk thread died", "g3")
        self._effects()

    def _attach(self) -> None:
        """Now it is known what may be below."""
        if not self._there:
            self._below(None)
            self._named("attach", self.stage.attach)
        for _ in range(2):
            self._named("tell", self.stage.leader.tell_earlier)

    # ------------------------------------------------------------------ the disk

    @property
    def _disk_there(self) -> bool:
        return self._there and self.plan.disk is not None

    def _chore(self) -> None:
        while self.chores.run():
            self._log(f"chore {self.stage.folder.calls[-1]}")
            self.stage.tick()
            if self.dice.random() < 0.5:
                return

    def _breaks(self) -> None:
        """The disk breaks, in one way or another, or works again."""
        if not self._disk_there:
            return
        stage, dice = self.stage, self.dice
        match dice.choice(["folder", "probes", "told", "reads", "writes", "well", "well", "well"]):
            case "folder":
                stage.folder.problem = "the folder is gone"
            case "probes":
                self.ranks.probes = "no space left"
            case "told":
                stage.fail_disk("looked at by an operator")
            case "reads":
                self.ranks.broken.add("read")
            case "writes":
                self.ranks.broken.add("write")
            case "well":
                stage.folder.problem = self.ranks.probes = None
                self.ranks.broken -= {"read", "write"}
        stage.folder.found = self._on_disk(dice.choice([0.0, 0.6, 1.0]))
        broken = sorted(self.ranks.broken)
        self._log(f"disk: folder {stage.folder.problem}, probes {self.ranks.probes}, {broken}")

    def _on_disk(self, share: float) -> Any:
        """What a look into the folder would find: some of what is there."""
        disk = self.stage.disk
        blocks = [disk.look(key) for key in disk.keys(0, disk.statistics().total)]
        there = [each for each in blocks if each is not None and self.dice.random() < share]
        return recovered(
            [each.key for each in there], [each.parent for each in there], [each.slot for each in there],
            priorities=np.array([each.priority for each in there], np.int32),
            expires=np.array([np.inf if each.expires is None else EPOCH + each.expires for each in there]),
        )  # fmt: skip

    def _command(self, action: str | None) -> None:
        """`kvbm disk verify`."""
        try:
            self._named(f"verify {action}", lambda: self.stage.disk_commands().verify(action))
        except LookupError as error:
            self._log(f"  -> {error}")

    def _purge(self) -> None:
        """`kvbm disk purge` of the engine's own namespace."""
        if self._disk_there:
            self._named("purge", self.stage.purge)

    # ------------------------------------------------------------------ other instances

    @property
    def _shares(self) -> bool:
        return self._there and self.plan.peers

    def _promised(self) -> None:
        open_ = [each for each in self.stage.network.searches if not each.ended] if self._shares else []
        if not open_:
            return
        search, dice = self.dice.choice(open_), self.dice
        at = dice.choice([0, 0, 0, dice.randrange(len(search.keys))])
        count = dice.randrange(1, len(search.keys) - at + 1)
        changes: dict[str, Any] = {}
        match dice.randrange(20):
            case 0:
                changes["seconds"] = float("nan")
            case 1:
                changes["slots"] = b"\xff" * 4 * count
            case 2:
                changes["seconds"] = 0.05
            case 3:
                changes["ttls"] = np.full(count, 3.0).tobytes()
        peer = dice.choice(self.stage.network.peers or ("other",))
        wanted = self.stage.promise(search, count, at=at, peer=peer, **changes)
        self._log(f"promise of {peer} {self.words.keys(search.keys[at : at + count])} {sorted(changes)} -> {wanted}")
        if dice.random() < 0.1:
            self._effects()
            self._time()

    def _search_ends(self) -> None:
        if self._shares and (open_ := [each for each in self.stage.network.searches if not each.ended]):
            search = self.dice.choice(open_)
            self._log(
                f"no more of {self.words.keys(search.keys)} {search.start} {search.peer} {plain(search.seconds)} s"
            )
            search.ended = True

    def _some_keys(self) -> tuple[Sequence[bytes], int]:
        at = self.dice.randrange(4)
        return TEXTS[self.dice.choice([*TEXTS])][at : at + self.dice.randrange(1, 6)], at

    def _reserved(self) -> None:
        if self._shares:
            keys, _ = self._some_keys()
            promise = self.stage.reserve(keys)
            self._log(f"reserve {self.words.keys(keys)} -> {promise.count} {self.words.slots(promise.slots)}")
            if promise.lease:
                self._leases.append(promise.lease)

    def _comes(self) -> None:
        if self._shares:
            keys, at = self._some_keys()
            name, expected = self.dice.choice(["s1", "s2"]), self.dice.random() < 0.5
            comes = self.stage.comes(name, keys, at, expected=expected)
            self._log(f"comes {name} {self.words.keys(keys)} {at} {expected} -> {comes}")

    def _released(self) -> None:
        if self._shares and self._leases:
            self._named("release", lambda: self.stage.release(self._leases.pop(self.dice.randrange(len(self._leases)))))
        elif self._shares:
            self._named("searched", lambda: self.stage.searched(self.dice.choice(["s1", "s2"])))

    def _published(self) -> None:
        if self._shares:
            heard = self.dice.random() < 0.85
            added, removed, afresh = self.stage.publish(heard=heard)
            lists = [sorted(each.hex()[:12] for each in entries) for entries in (added, removed)]
            self._log(f"publish {heard}: {lists} {afresh}")

    def _neighbours(self) -> None:
        if self._shares:
            network, dice = self.stage.network, self.dice
            network.peers = dice.choice([(), ("other",), ("other", "third")])
            network.problem = dice.choice([None, None, "the directory is gone"])
            (self.ranks.broken.add if dice.random() < 0.3 else self.ranks.broken.discard)("pull")
            self._log(f"neighbours {network.peers} {network.problem} {sorted(self.ranks.broken)}")

    def _other_adapter(self) -> None:
        """Other weights under an adapter's number; mostly on every rank."""
        digest, number = self.dice.choice(DIGESTS), self.dice.choice([1, 2])
        for held in self.ranks.held if self.dice.random() < 0.8 else self.ranks.held[:1]:
            held[number] = digest
        self._log(f"adapter {number} is {digest[:1].hex()}")

    # ------------------------------------------------------------------ the end

    def _restart(self) -> None:
        """The process ends, at once or in good order, and another one finds what is on disk."""
        if not self._there:
            return
        self._log("restart")
        found = self._on_disk(1.0)
        self._close()
        self._late, self._fate = False, None
        for name in ("_said", "_leases"):
            getattr(self, name).clear()
        self._seen, self._state = 0, ""
        self._start(found)
        self._effects()

    def _end(self) -> None:
        """Everybody is done with everything, and nothing may be left over."""
        stage, engine = self.stage, self.engine
        stage.leader.resume()
        self.ranks.mood, self.ranks.probes = 0, None
        self.ranks.broken.clear()
        if self._disk_there:
            stage.folder.problem = None
        for _ in range(6):
            self.ranks.all()
            while self.chores.run():
                stage.tick()
            for request in list(engine.requests.values()):
                engine.finish(request)
            engine.seal({})
            for lease in self._leases:
                stage.release(lease)
            self._leases.clear()
            for search in ("s1", "s2") if self._shares else ():
                stage.searched(search)
            stage.tick(31.0)
            self._effects()
        self._log(f"check {stage.leader.check(1.0)['problems']}")
        for name, each in stage.leader.records.items():
            self._log(f"{name}: {record(each)}")
        self._log(f"counts {plain(stage.counts())}, {plain(stage.rates())}")
        for pool in self._pools():
            now = pool.statistics()
            left = (now.active, now.staged, now.writable, now.orphaned)
            excused = self._gone or stage.leader.off is not None  # its comparisons are not ended
            assert excused or left == (0, 0, 0, 0), f"something holds blocks at the end: {now}"
        self._close()

    def _pools(self) -> list[Pool]:
        return [self.stage.pool, *([self.stage.disk] if self._disk_there else [])]

    def _close(self) -> None:
        for pool in self._pools():
            self._log(f"pool {asdict(pool.statistics())}")
        self._leave()

    def _leave(self) -> None:
        self.stage.leader.close()
        for link in self.stage.workers.values():
            link.close()


def digest(lines: Sequence[str]) -> str:
    """Of a history, or several."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
