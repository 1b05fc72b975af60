"""One seeded random history over a leader, and all that it decides, line by line."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict

from kvbm.blocks import Pool
from tests.decisions.below import Below
from tests.decisions.engine import ASIDE, TEXTS
from tests.decisions.ranks import DIGESTS
from tests.decisions.words import plain, record

OPERATIONS = 45


class History(Below):
    """See the module. The same number is the same history, in every process."""

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
            (0.12, lambda: self._named("pause", leader.core.pause)),
            (0.6, lambda: self._named("resume", leader.core.resume)),
            (0.1, lambda: self._named("reset", leader.reset)),
            (0.1, lambda: self._named("check", lambda: leader.check(1.0))),
            (0.1, self._bar),
            (0.06, lambda: self._named("reset and quiesce", lambda: (leader.reset(), leader.core.quiesce(1.0)))),
            (0.1, lambda: self._named("quiesce", lambda: leader.core.quiesce(0.3))),
            (0.03, self._drag),
            (0.05, lambda: ranks.say(0, "refused", "nobody asked")),
        ]
        if self._late:
            chances.append((1, self._attach))
        if self.plan.disk is not None:
            chances += [
                (2, self._chore),
                (0.5, self._breaks),
                (0.3, lambda: self._command("begin")),
                (0.2, lambda: self._command(dice.choice(["stop", None]))),
                (0.1, lambda: self._named("drain", lambda: leader.core.drain(1.0))),
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
                leader.core.turn_off("something raised")
            case "sick":
                self.ranks.say(rank, "sick", "a copy thread died")
            case "gone":
                self._gone = True
                self.stage.workers[rank].close()
            case "bye":
                self.ranks.say_only("bye")
            case "isolate":
                leader.core.isolate("the weights have changed")
            case "disk":
                self.ranks.say(rank, "sick", "a disk thread died", "g3")
        self._effects()

    def _attach(self) -> None:
        """Now it is known what may be below."""
        if not self._there:
            self._below(None)
            self._named("attach", self.stage.attach)
        for _ in range(2):
            self._named("tell", self.stage.leader.core.tell_earlier)

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
        stage.leader.core.resume()
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
            excused = self._gone or stage.leader.core.health.off is not None  # its comparisons are not ended
            assert excused or left == (0, 0, 0, 0), f"something holds blocks at the end: {now}"
        self._close()

    def _pools(self) -> list[Pool]:
        return [self.stage.pool, *([self.stage.disk] if self._disk_there else [])]

    def _close(self) -> None:
        for pool in self._pools():
            self._log(f"pool {asdict(pool.statistics())}")
        self._leave()

    def _leave(self) -> None:
        self.stage.leader.core.close()

        for link in self.stage.workers.values():
            link.close()


def digest(lines: Sequence[str]) -> str:
    """Of a history, or several."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
