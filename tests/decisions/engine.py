"""The engine of a history: requests that share their beginnings, blocks that are handed out again, a prefix cache."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from kvbm.blocks import LayerGroup
from kvbm.core.events import Admitted
from kvbm.core.keys import variant_keys
from kvbm.core.outcome import Outcome
from tests.decisions.ranks import DIGESTS, Ranks
from tests.decisions.words import Words
from tests.leader.played import Keys
from tests.leader.roles import BLOCK_TOKENS, DONE, Stage, keys_of

ROOTS = {name: keys_of(f"root {name}", 2) for name in "ab"}
TEXTS = {name: [*ROOTS[root], *keys_of(name, 12)] for root, name in (("a", "p"), ("a", "q"), ("b", "r"), ("b", "s"))}
ASIDE = {name: keys_of(f"{name} aside", 10) for name in TEXTS}
NAMES = {key: f"{name}{at}" for name, text in TEXTS.items() for at, key in enumerate(text)}
NAMES |= {key: f"{root}{at}" for root, text in ROOTS.items() for at, key in enumerate(text)}
NAMES |= {key: f"{name}'{at}" for name, text in ASIDE.items() for at, key in enumerate(text)}
NAMES |= {
    key: f"{NAMES[plain]}@{number}"
    for number, digest in enumerate(DIGESTS)
    for plain, key in zip(list(NAMES), variant_keys(list(NAMES), digest), strict=True)
}
FULL = LayerGroup("full", BLOCK_TOKENS)


@dataclass
class Asked:
    """A request; `text` are the keys of all blocks that it will ever have, `keys` of those that it has."""

    name: str
    text: list[bytes]
    keys: list[bytes]
    prompt: int
    total: int
    adapter: int
    state: str = "waiting"
    device: int = 0
    computed: int = 0
    tables: list[list[int]] = field(default_factory=list)
    fresh: bool = False
    """The leader has not been told its whole table."""

    @property
    def known(self) -> list[bytes]:
        """The engine's keys of the blocks whose tokens are known."""
        return self.keys.plain if isinstance(self.keys, Keys) else self.keys


class Engine:
    """`block_s` is how long a block takes to compute."""

    def __init__(
        self, stage: Stage, words: Words, log: Callable[[str], None], dice: Random, groups: Sequence[LayerGroup], *,
        adapters: bool, peers: bool, sync: bool, caches: bool, blocks: int, block_s: float,
    ) -> None:  # fmt: skip
        self.stage, self.leader, self.words, self._log, self._dice = stage, stage.leader, words, log, dice
        self._groups, self._several = groups or (FULL,), bool(groups)
        self._adapters, self._peers, self._sync, self._caches, self._block_s = adapters, peers, sync, caches, block_s
        self.ranks: Ranks
        self.requests: dict[str, Asked] = {}
        self._free = deque(range(1, blocks + 1))
        self._users: Counter[int] = Counter()
        self._cache: dict[tuple[bytes, int], int] = {}
        self._loads: dict[int, tuple[Asked, list[int], list[int]]] = {}
        """Loads on their way: for whom, into which blocks, and blocks that are free only after it."""
        self._born = self._unstepped = 0
        self._soon = dice.random() < 0.4
        """Whether the block that was freed last is the first to be handed out."""

    # ------------------------------------------------------------------ requests

    def arrive(self, name: str = "") -> None:
        """A new one, with this text or any."""
        dice, name = self._dice, name or self._dice.choice([*TEXTS])
        blocks, self._born = dice.choice([1, 2, 3, 4, 5, 6, 6, 7, 7, 8, 8]), self._born + 1
        prompt = blocks * BLOCK_TOKENS + dice.choice([0, 1, 5, 31])
        whole = TEXTS[name] if dice.random() < 0.85 else TEXTS[name][:blocks] + ASIDE[name][blocks:]
        total = min(prompt + dice.choice([0, 0, 40, 70]), len(whole) * BLOCK_TOKENS)
        adapter = dice.choice([0, 1, 2]) if self._adapters else 0
        keys = Keys(whole[:blocks]) if adapter else whole[:blocks]
        request = self.requests[f"r{self._born}"] = Asked(f"r{self._born}", whole, keys, prompt, total, adapter)
        params = self._params()
        self._log(f"begin {request.name} {name} {prompt}/{total} {params} adapter {adapter}")
        if isinstance(keys, Keys):
            files, unsteady = dice.choice(["old", "old", "new"]), dice.random() < 0.05
            self.stage.begin_with(request.name, keys, prompt, adapter, files, unsteady=unsteady, **params)
        else:
            self.stage.begin(request.name, keys, tokens=prompt, **params)

    def _params(self) -> dict[str, Any]:
        dice, params = self._dice, dict[str, Any]()
        if dice.random() < 0.4:
            for name, values in {
                "load": [True, True, False], "save": [True, True, False], "priority": [0, 0, 30],
                "ttl": [None, 5.0, 60.0], "save_answer": [None, True, False], "save_tokens": [None, None, 64],
            }.items():  # fmt: skip
                params[name] = dice.choice(values)
        if self._peers and dice.random() < 0.15:
            params["pull_from"] = dice.choice(["other", "nobody"])
        return params

    def _admit(self, request: Asked) -> None:
        dice, limit = self._dice, (request.prompt - 1) // BLOCK_TOKENS
        shared = [] if self._several else self._cached(request, limit)
        device = len(shared)
        found = self.leader.match(request.name, device, limit)
        self._log(f"match {request.name} {device} {limit} -> {found}")
        if found is None or dice.random() < 0.12:
            return
        taken = dice.randrange(found + 1) if found and not self._several and dice.random() < 0.1 else found
        firsts = [group.first(device + taken) if taken or self._several else device for group in self._groups]
        needed = [device + taken - max(first, device) for first in firsts]
        idle = sum(not self._users[block] for block in shared)
        if sum(needed) > len(self._free) - idle:
            return
        for block in shared:
            self._use(block)
        request.tables = [
            [*shared, *[0] * (max(first, device) - device), *self._take(count)]
            for first, count in zip(firsts, needed, strict=True)
        ]
        first, *others = [list(table) for table in request.tables]
        said = Admitted(request.prompt, device * BLOCK_TOKENS, taken * BLOCK_TOKENS)
        tokens = self.leader.place(request.name, first, taken, said, others)
        loading = taken > 0 and self.leader.loads(request.name)
        self._log(f"place {request.name} {request.tables} {taken} -> {self.words.event(tokens)}, loads {loading}")
        request.fresh, request.device, request.state = True, device, "running"
        request.computed = (device + taken) * BLOCK_TOKENS
        if loading and not self._sync:
            request.state = "loading"
        elif taken and not loading:
            self._let_go(request)

    def _cached(self, request: Asked, limit: int) -> list[int]:
        found: list[int] = []
        for key in request.text[:limit] if self._caches else ():
            if (block := self._cache.get((key, request.adapter))) is None:
                break
            found.append(block)
        return found

    # ------------------------------------------------------------------ blocks

    def _take(self, count: int) -> list[int]:
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._users[block] = 1
            for key in [key for key, other in self._cache.items() if other == block]:
                del self._cache[key]
        return blocks

    def _use(self, block: int) -> None:
        if not self._users[block]:
            self._free.remove(block)
        self._users[block] += 1

    def _leave(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            if block:
                self._users[block] -= 1
                if not self._users[block]:
                    (self._free.appendleft if self._soon else self._free.append)(block)

    def _let_go(self, request: Asked) -> None:
        for table in request.tables:
            self._leave(table)
        request.tables, request.computed, request.state = [], 0, "waiting"

    # ------------------------------------------------------------------ steps

    def step(self) -> None:
        """One engine step."""
        dice = self._dice
        for request in list(self.requests.values()):
            if request.state == "waiting" and dice.random() < 0.7:
                self._admit(request)
        counts = dict[str, int]()
        for request in list(self.requests.values()):
            ready = request.state == "running" and (request.fresh or dice.random() < 0.85)
            if ready and (count := self._schedule(request)):
                counts[request.name] = count
        self.seal(counts)
        for name, count in counts.items():
            self._compute(self.requests[name], count)

    def seal(self, counts: Mapping[str, int]) -> None:
        """A step is described, in which these requests compute so many tokens, and begins."""
        tokens = sum(counts.values())
        step = self.leader.seal(tokens=tokens)
        self._log(f"seal {counts}: {self.words.step(step)}")
        self.stage.clock.advance(0.001 + tokens / BLOCK_TOKENS * self._block_s)
        self._unstepped += bool(tokens)
        while self._unstepped and self._dice.random() < 0.85:
            self._unstepped -= 1
            self.leader.stepped()
        self._begin(step)

    def _begin(self, step: Any) -> None:
        self.ranks.step(step)
        for copy in step.loads:
            self._loads[copy.job] = (self.requests[copy.request], copy.g1_slots().tolist(), [])
            if self._sync:
                self.ranks.of(copy.job)
        for job in step.fence:
            if self._dice.random() < 0.8:
                self.ranks.of(job)

    def _schedule(self, request: Asked) -> int:
        dice, remaining = self._dice, request.total - request.computed
        count = min(dice.randrange(1, 200), remaining)
        if not count:
            return 0
        end = request.computed + count
        for group, table in zip(self._groups, request.tables, strict=True):
            for at in range(min(group.after(request.computed), len(table))):
                self._leave([table[at]])
                table[at] = 0
        missing = [max(0, -(-end // BLOCK_TOKENS) - len(table)) for table in request.tables]
        if sum(missing) > len(self._free):
            self._log(f"preempt {request.name}")
            self._let_go(request)
            return 0
        new = [self._take(each) for each in missing]
        for table, more in zip(request.tables, new, strict=True):
            table += more
        first, *others = [list(table) for table in (request.tables if request.fresh else new)]
        found = request.computed // BLOCK_TOKENS
        self.leader.grow(request.name, first, replace=request.fresh, found=found, others=others)
        self._log(f"grow {request.name} {[first, *others]} from {found if request.fresh else '-'}")
        request.fresh = False
        for more in new:
            self.leader.reuse(more)
        while len(request.known) < end // BLOCK_TOKENS:
            request.keys.append(request.text[len(request.known)])
        complete = end // BLOCK_TOKENS
        self.leader.advance(request.name, complete, request.computed)
        return count

    def _compute(self, request: Asked, count: int) -> None:
        if request.state != "running" or not request.tables:
            return
        request.computed += count
        if not self._several:
            for at in range(request.computed // BLOCK_TOKENS):
                self._cache.setdefault((request.text[at], request.adapter), request.tables[0][at])
        if request.computed >= request.total or self._dice.random() < 0.04:
            self.finish(request)

    def finish(self, request: Asked) -> None:
        """It is over, or nobody wants it any more."""
        first, *others = [
            [0] * min(group.after(request.computed), len(table)) + table[group.after(request.computed) :]
            for group, table in zip(self._groups, request.tables or [[] for _ in self._groups], strict=True)
        ]
        self._log(f"finish {request.name} {[first, *others]} {request.computed}")
        self.leader.finish(request.name, first, request.computed // BLOCK_TOKENS, others)
        del self.requests[request.name]
        held = next((late for other, _, late in self._loads.values() if other is request), None)
        for table in request.tables:
            if held is None:
                self._leave(table)
            else:
                held += table
        request.tables, request.state = [], "gone"

    def loaded(self, job: int, outcomes: list[Outcome]) -> None:
        """A copy was answered by every rank."""
        if job not in self._loads:
            return
        request, blocks, late = self._loads.pop(job)
        self._leave(late)
        if self.requests.get(request.name) is not request or not request.tables:
            return
        request.state = "running"
        if not any(outcomes):
            return
        if self._several:
            self._let_go(request)
            return
        bad = [block for block, outcome in zip(blocks, outcomes, strict=True) if outcome != DONE]
        first = request.tables[0].index(bad[0])
        self._log(f"redo {request.name} {first} {bad}")
        self.leader.redo(request.name, first)
        self.leader.forget(bad)
        request.computed = min(request.computed, first * BLOCK_TOKENS)

    def goes_on(self) -> None:
        """A request of a session goes on with other tokens than before."""
        running = [each for each in self.requests.values() if each.state == "running" and each.computed]
        running = [each for each in running if not each.fresh]
        if self._several or self._adapters or not running:
            return
        request = self._dice.choice(running)
        first = self._dice.randrange(request.computed // BLOCK_TOKENS + 1)
        self._log(f"go on {request.name} from {first}")
        request.computed = first * BLOCK_TOKENS
        request.text = request.text[:first] + keys_of(f"{request.name} other", len(request.text) - first)
        self.words.names |= {key: f"{request.name}'{at}" for at, key in enumerate(request.text[first:], first)}
        del request.keys[first:]
        self.leader.go_on(request.name, list(request.tables[0]), first)
        self.leader.reuse(request.tables[0][first:])
