"""A leader of several layer groups, against an engine whose blocks remember what is in them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.before  # noqa: F401
from kvbm.blocks import LayerGroup, prompt_keys
from kvbm.core.errors import Misuse
from kvbm.core.keys import group_key, group_of
from kvbm.core.outcome import Outcome
from kvbm.leader.copies import InFlight
from kvbm.leader.requests import RequestParams
from kvbm.link.messages import Copy, unpack
from kvbm.tiers.disk.orders import Read, Write
from tests.before import HybridLeader
from tests.leader.roles import BLOCK_TOKENS, DONE, FAILED, Stage, keys_of
from tests.leader.ways import Admitted

Make = Callable[..., Stage]
BLOCK = 4
FULL = LayerGroup("full", BLOCK)
WINDOW = LayerGroup("window", BLOCK, 9)
"""Two blocks."""
GEMMA = (FULL, WINDOW, WINDOW)
CORRUPT = Outcome.CORRUPT
MODELS: dict[str, tuple[LayerGroup, ...]] = {
    "full and windows": GEMMA,
    "windows first": (WINDOW, FULL),
    "an odd window": (FULL, LayerGroup("window", BLOCK, 7)),
    "two windows": (FULL, WINDOW, LayerGroup("window", BLOCK, 18)),
    "windows alone": (WINDOW,),
    "chunks": (FULL, LayerGroup("chunk", BLOCK, 12)),
    "chunks that are no blocks": (LayerGroup("chunk", BLOCK, 10), FULL),
}


# ---------------------------------------------------------------------- an engine


@dataclass
class Request:
    name: str
    tokens: list[int]
    prompt: int
    state: str = "waiting"
    computed: int = 0
    tables: list[list[int]] = field(default_factory=list)
    replaced: bool = False
    found: int = 0

    @property
    def keys(self) -> list[bytes]:
        return prompt_keys(self.tokens, BLOCK)


class Engine:
    """Blocks of all groups come from one pool of numbers. What the forward pass writes, and copies move, are keys; a
    copy reads its source as late as it may."""

    def __init__(self, stage: Stage, groups: Sequence[LayerGroup], blocks: int, dice: random.Random) -> None:
        assert isinstance(stage.leader, HybridLeader)
        self.stage, self.leader, self.groups, self.dice = stage, stage.leader, groups, dice
        self.free = list(range(1, blocks + 1))
        self.content: dict[int, object] = {}
        self.g2: dict[int, object] = {}
        self.copies: dict[int, tuple[Copy, bool]] = {}
        """Jobs that are not done, and whether each is a load."""
        self.requests: dict[str, Request] = {}
        self.disk: dict[int, object] = {}
        self.moves: list[Read | Write] = []
        """Between G2 and the disk, that are not done."""
        self.loaded = self.hits = self.preempted = self.read = 0
        self.vain = 0
        """Fences for copies that no worker has begun: they wait for nothing."""

    def add(self, request: Request) -> None:
        self.requests[request.name] = request
        self.leader.begin(request.name, request.keys, RequestParams(), request.prompt)

    def let_go(self, request: Request) -> None:
        for table in request.tables:
            self.free += [block for block in reversed(table) if block]
        request.tables, request.computed, request.state = [], 0, "waiting"

    def admit(self, request: Request) -> None:
        found = self.leader.match(request.name, 0, (len(request.tokens) - 1) // BLOCK)
        if found is None:
            return
        request.found = found
        firsts = [group.first(found) for group in self.groups]
        if sum(found - first for first in firsts) > len(self.free):
            return
        request.tables = [[0] * first + [self.free.pop() for _ in range(found - first)] for first in firsts]
        first, *others = request.tables
        self.leader.place(request.name, first, found, Admitted(request.prompt, 0, found * BLOCK), others)
        request.replaced = True
        if found:
            request.state, request.computed = "loading", found * BLOCK
            self.hits += 1
        else:
            request.state = "running"

    def schedule(self, request: Request) -> int:
        """How many tokens it computes in this step."""
        count = min(self.dice.randrange(1, 14), len(request.tokens) - request.computed)
        end = request.computed + count
        for group, table in zip(self.groups, request.tables, strict=True):
            for block in range(min(group.after(request.computed), len(table))):
                if table[block]:
                    self.free.append(table[block])
                    table[block] = 0
        missing = [-(-end // BLOCK) - len(table) for table in request.tables]
        if sum(missing) > len(self.free):
            self.let_go(request)
            self.preempted += 1
            return 0
        new = [[self.free.pop() for _ in range(each)] for each in missing]
        for table, more in zip(request.tables, new, strict=True):
            table += more
        tables = request.tables if request.replaced else new
        found = request.computed // BLOCK
        self.leader.grow(request.name, tables[0], replace=request.replaced, found=found, others=tables[1:])
        request.replaced = False
        for more in new:
            self.leader.reuse(more)
            self.fresh += more
        self.leader.reach(request.name, end // BLOCK, request.computed)
        return count

    def step(self) -> None:
        self.fresh: list[int] = []
        for request in list(self.requests.values()):
            if request.state == "waiting" and self.dice.random() < 0.7:
                self.admit(request)
        counts = {
            request.name: count
            for request in self.requests.values()
            if request.state == "running" and self.dice.random() < 0.8 and (count := self.schedule(request))
        }
        step = self.leader.seal(tokens=sum(counts.values()))
        for job in step.fence:
            if job in self.copies:
                self.end(job)
            else:
                self.vain += 1
        for block in self.fresh:
            self.content[block] = "garbage"
        self.copies |= {copy.job: (copy, True) for copy in step.loads}
        for name, count in counts.items():
            self.forward(self.requests[name], count)
        self.copies |= {copy.job: (copy, False) for copy in step.stores}
        for job in list(self.copies):
            if self.dice.random() < 0.3:
                self.end(job)
        self.leader.tick()
        self.moves += [*self.stage.hear(Read), *self.stage.hear(Write)]
        for move in list(self.moves):
            if self.dice.random() < 0.3:
                self.move(move)
        for name in counts:
            request = self.requests[name]
            if request.computed == len(request.tokens) or self.dice.random() < 0.02:
                self.finish(request)

    def forward(self, request: Request, count: int) -> None:
        keys, end = request.keys, request.computed + count
        for number, (group, table) in enumerate(zip(self.groups, request.tables, strict=True)):
            for block in range(group.after(request.computed), request.computed // BLOCK):
                assert self.content[table[block]] == group_key(keys[block], number), (request.name, number, block)
            for block in range(request.computed // BLOCK, -(-end // BLOCK)):
                whole = (block + 1) * BLOCK <= end
                self.content[table[block]] = group_key(keys[block], number) if whole else "a part"
        request.computed = end

    def end(self, job: int) -> None:
        copy, is_load = self.copies.pop(job)
        request = self.requests.get(copy.request)
        outcomes: list[Outcome] = []
        for g1, g2 in zip(copy.g1_slots().tolist(), copy.g2_slots().tolist(), strict=True):
            failed = self.dice.random() < 0.02
            outcomes.append(FAILED if failed else DONE)
            if is_load:
                assert g1
                self.content[g1] = "garbage" if failed else self.g2[g2]
            else:
                assert g1
                self.g2[g2] = "garbage" if failed else self.content[g1]
        self.stage.answer(copy, *outcomes)
        if is_load:
            assert request is not None
            self.loaded += outcomes.count(DONE)
            if FAILED in outcomes:
                self.let_go(request)
            else:
                request.state = "running"

    def move(self, move: Read | Write) -> None:
        self.moves.remove(move)
        outcomes = [self.dice.choice([FAILED, CORRUPT]) if self.dice.random() < 0.02 else DONE for _ in move.keys]
        for g2, g3, outcome in zip(unpack(move.g2).tolist(), unpack(move.g3).tolist(), outcomes, strict=True):
            if isinstance(move, Write):
                self.disk[g3] = self.g2[g2] if outcome is DONE else "garbage"
            else:
                self.g2[g2] = self.disk[g3] if outcome is DONE else "garbage"
                self.read += outcome is DONE
        self.stage.moved(move, *outcomes)

    def finish(self, request: Request) -> None:
        del self.requests[request.name]
        first, *others = [
            [0] * min(group.after(request.computed), len(table)) + table[group.after(request.computed) :]
            for group, table in zip(self.groups, request.tables, strict=True)
        ]
        for table, now in zip(request.tables, [first, *others], strict=True):
            self.free += [block for block, still in zip(table, now, strict=True) if block and not still]
        self.leader.finish(request.name, first, request.computed // BLOCK, others)
        self.free += [block for table in [first, *others] for block in table if block]

    def settle(self) -> None:
        while self.copies:
            self.end(next(iter(self.copies)))
        self.leader.tick()
        while moves := [*self.moves, *self.stage.hear(Read), *self.stage.hear(Write)]:
            self.moves = moves
            for move in moves:
                self.move(move)
            self.leader.tick()


def blocks_for(groups: Sequence[LayerGroup]) -> int:
    """Of the engine: too few for all requests at once."""
    return sum(24 if group.kind == "full" else 9 for group in groups)


def run(stage: Stage, groups: Sequence[LayerGroup], seed: int, requests: int = 12) -> Engine:
    dice = random.Random(seed)
    engine = Engine(stage, groups, blocks_for(groups), dice)
    roots = [[dice.randrange(3) for _ in range(dice.randrange(8, 60))] for _ in range(3)]
    waiting = [
        Request(f"r{at}", dice.choice(roots)[: dice.randrange(4, 60)] + [dice.randrange(3) for _ in range(20)], 0)
        for at in range(requests)
    ]
    for _ in range(600):
        if waiting and dice.random() < 0.2:
            request = waiting.pop()
            request.prompt = dice.randrange(1, len(request.tokens) + 1)
            engine.add(request)
        engine.step()
        if not waiting and not engine.requests:
            break
    assert not engine.requests
    for _ in range(2):
        engine.step()
        engine.settle()
    return engine


def with_disk(stage: Stage, **options: Any) -> Stage:
    """Below as many blocks of G2 as the stage has, four times as many."""
    return stage.add_disk(4 * stage.pool.statistics().total, block_tokens=BLOCK, **options)


@settings(max_examples=40, deadline=None)
@given(
    model=st.sampled_from(list(MODELS)), disk=st.sampled_from(["", "beside", "exclusive"]), seed=st.integers(0, 1 << 30)
)
def test_what_comes_back_is_what_the_next_token_reads(model: str, disk: str, seed: int) -> None:
    """The engine asserts before every forward pass that each group has the blocks which it reads."""
    stage = Stage(48, groups=MODELS[model], checkpoint_tokens=16)
    if disk:
        with_disk(stage, exclusive=disk == "exclusive")
    engine = run(stage, MODELS[model], seed)
    assert not engine.vain
    assert sorted(engine.free) == list(range(1, blocks_for(MODELS[model]) + 1))
    stage.close()


@pytest.mark.parametrize("model", MODELS)
def test_random_requests_hit(model: str) -> None:
    hits = preempted = read = 0
    for seed in range(6):
        stage = Stage(40 if seed % 2 else 100, groups=MODELS[model], checkpoint_tokens=16)
        if seed % 2:
            with_disk(stage)
        engine = run(stage, MODELS[model], seed, 25)
        hits, preempted, read = hits + engine.hits, preempted + engine.preempted, read + engine.read
        stage.close()
    assert hits > 10
    assert preempted > 0
    assert read > 5


def test_a_fence_for_what_no_worker_has_begun_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: where such a copy is not dropped, another request's KV is stored under its keys, and served."""
    dropped, wrong, vain = 0, {False: 0, True: 0}, {False: 0, True: 0}
    for control in wrong:
        if control:
            monkeypatch.setattr(InFlight, "unsent", lambda *_: [])
        for seed in (0, 5, 7):
            stage = Stage(100, groups=GEMMA, checkpoint_tokens=16, store_inflight_mb=2)
            try:
                vain[control] += run(stage, GEMMA, seed, 30).vain
            except AssertionError:
                wrong[control] += 1
            dropped += stage.leader.dropped
            stage.close()
    assert dropped > 0
    assert (wrong[False], vain[False]) == (0, 0)
    assert wrong[True] > 0


# ---------------------------------------------------------------------- one request at a time


class Solo:
    """Runs one request after the other, every copy ending at once."""

    def __init__(self, stage: Stage, groups: Sequence[LayerGroup]) -> None:
        dice = random.Random(0)
        dice.random = lambda: 0.25  # type: ignore[method-assign]  # nothing fails, everything moves on
        self.engine = Engine(stage, groups, 400, dice)
        self.stage = stage

    def serve(self, name: str, tokens: list[int], prompt: int | None = None) -> int:
        """How many blocks it found."""
        request = Request(name, tokens, prompt or len(tokens))
        self.engine.add(request)
        while name in self.engine.requests:
            self.engine.step()
        self.engine.step()
        self.engine.settle()
        return request.found


def tokens_of(name: str, count: int) -> list[int]:
    dice = random.Random(name)
    return [dice.randrange(1000) for _ in range(count)]


def in_g2(stage: Stage, tokens: list[int], groups: int) -> list[list[int]]:
    """By group, which blocks of a prompt are in G2."""
    keys = prompt_keys(tokens, BLOCK)
    return [
        [at for at, there in enumerate(stage.pool.present([group_key(key, group) for key in keys])) if there]
        for group in range(groups)
    ]


def test_windows_are_kept_where_hits_end(make_stage: Make) -> None:
    """A prompt of 60 tokens and 22 more: at checkpoints, before and at the prompt's end, at the answer's end."""
    stage = make_stage(200, groups=GEMMA, checkpoint_tokens=32)
    tokens = tokens_of("a", 82)
    Solo(stage, GEMMA).serve("a", tokens, prompt=60)
    full, *windows = in_g2(stage, tokens, 3)
    assert full == list(range(20))
    assert windows == [[6, 7, 12, 13, 14, 15, 18, 19]] * 2


def test_what_another_request_stores_and_loses_is_stored_of_a_full_group(make_stage: Make) -> None:
    """What only a window needed is given up."""
    stage, keys = make_stage(200, groups=GEMMA), keys_of("a", 6)
    assert isinstance(stage.leader, HybridLeader)
    for name, first in (("a", 10), ("b", 40)):
        stage.leader.begin(name, keys, RequestParams(), 6 * BLOCK)
        assert stage.leader.match(name, 0, 5) == 0
        full, *windows = [list(range(first + more, first + more + 6)) for more in (0, 10, 20)]
        stage.leader.place(name, full, 0, Admitted(6 * BLOCK, 0, 0), windows)
        stage.leader.reach(name, 6, 0)
    (copy,) = stage.step().stores
    sources = copy.g1_slots().tolist()
    assert {*range(10, 16)} < {*sources} <= {*range(10, 40)}
    stage.answer(copy, *(DONE if block in (10, 11, 14, 15) else FAILED for block in sources))
    stage.step()
    stage.leader.reach("b", 6, 6 * BLOCK)
    (again,) = stage.step().stores
    assert again.g1_slots().tolist() == [42, 43]


def test_a_hit_needs_only_the_windows_of_its_end(make_stage: Make) -> None:
    stage = make_stage(200, groups=GEMMA, checkpoint_tokens=32)
    solo, tokens = Solo(stage, GEMMA), tokens_of("a", 60)
    solo.serve("a", tokens)
    solo.engine.loaded = 0
    assert solo.serve("b", tokens) == 14
    assert solo.engine.loaded == 14 + 2 * 2


def test_where_prompts_were_seen_to_part_is_kept_too(make_stage: Make) -> None:
    stage = make_stage(400, groups=GEMMA, checkpoint_tokens=32)
    solo, root = Solo(stage, GEMMA), tokens_of("root", 52)
    found = [solo.serve(name, root + tokens_of(name, 40)) for name in "abc"]
    assert found == [0, 8, 13]
    assert "G2 holds more of the prompt, but not every block that its layer groups need for a hit there" in (
        stage.leader.records["b"].why
    )


def test_an_answer_is_gone_on_with(make_stage: Make) -> None:
    stage = make_stage(400, groups=GEMMA, checkpoint_tokens=1000)
    solo, tokens = Solo(stage, GEMMA), tokens_of("a", 60)
    solo.serve("a", tokens, prompt=30)
    assert solo.serve("b", tokens + tokens_of("b", 20)) == 15


def test_a_hit_ends_where_nothing_more_is_worth_keeping(make_stage: Make) -> None:
    """Ten blocks of a prompt of fifteen, and nothing of the answer."""
    stage = make_stage(200, groups=GEMMA, checkpoint_tokens=32, save_tokens=10 * 32)
    solo, tokens = Solo(stage, GEMMA), tokens_of("a", 82)
    solo.serve("a", tokens, prompt=60)
    full, *windows = in_g2(stage, tokens, 3)
    assert full == list(range(10))
    assert windows == [[6, 7, 8, 9]] * 2
    assert solo.serve("b", tokens) == 10


def test_a_block_that_left_its_window_is_not_read(make_stage: Make) -> None:
    """What could not be copied in the step that completed it may be another's now."""
    stage = make_stage(100, groups=GEMMA, checkpoint_tokens=4, store_inflight_mb=4)
    keys = keys_of("a", 8)
    leader = stage.leader
    assert isinstance(leader, HybridLeader)
    leader.begin("a", keys, RequestParams(), 8 * BLOCK)
    leader.place("a", range(1, 9), 0, Admitted(32, 0, 0), [range(11, 19), range(21, 29)])
    leader.reach("a", 4, 0)
    (first,) = leader.seal(tokens=16).stores
    assert first.g1_slots().tolist() == [11, 12, 13, 14]
    leader.reach("a", 8, 16)
    assert not leader.seal(tokens=16).stores
    stage.answer(first)
    leader.seal(tokens=0)
    leader.reach("a", 8, 32)
    (second,) = leader.seal(tokens=0).stores
    assert second.g1_slots().tolist() == [1, 2, 3, 4]
    stage.answer(second)
    leader.finish("a", [1, 2, 3, 4, 5, 6, 7, 8], 8, [[0] * 6 + [17, 18], [0] * 6 + [27, 28]])
    (third,) = leader.seal(tokens=0).stores
    assert third.g1_slots().tolist() == [17, 18, 27, 28]
    stage.answer(third)


def _hit(stage: Stage) -> tuple[HybridLeader, list[bytes]]:
    """A request that has matched 4 blocks, 8 of G2's."""
    keys, leader = keys_of("a", 6), stage.leader
    assert isinstance(leader, HybridLeader)
    leader.begin("old", keys, RequestParams(), 4 * BLOCK)
    leader.place("old", range(1, 5), 0, Admitted(16, 0, 0), [range(11, 15), range(21, 25)])
    leader.reach("old", 4, 0)
    (store,) = leader.seal(tokens=16).stores
    stage.answer(store)
    leader.finish("old", [1, 2, 3, 4], 4, [[0, 0, 13, 14], [0, 0, 23, 24]])
    leader.begin("new", keys, RequestParams(), 6 * BLOCK)
    assert leader.match("new", 0, 5) == 4
    assert stage.pool.statistics().active == 8
    return leader, keys


@pytest.mark.parametrize(
    ("count", "others"),
    [
        (3, [[0, 0, 33, 34], [0, 0, 43, 44]]),  # a part of the hit
        (4, [[0, 0, 0, 34], [0, 0, 43, 44]]),  # no place for a block
        (4, [[0, 0, 33, 34], [0, 42, 43, 44]]),  # one more, that would hold anything
    ],
)
def test_a_table_that_does_not_fit_the_hit_changes_nothing(
    make_stage: Make, count: int, others: list[list[int]]
) -> None:
    stage = make_stage(groups=GEMMA)
    leader, _ = _hit(stage)
    with pytest.raises(Misuse):
        leader.place("new", [31, 32, 33, 34], count, Admitted(24, 0, 16), others)
    assert stage.pool.statistics().active == 8
    leader.finish("new", [], 0)


def test_a_load_that_failed_in_part_is_found_as_far_as_it_goes(make_stage: Make) -> None:
    stage = make_stage(groups=GEMMA)
    leader, keys = _hit(stage)
    leader.place("new", [31, 32, 33, 34], 4, Admitted(24, 0, 16), [[0, 0, 33, 34], [0, 0, 43, 44]])
    (load,) = leader.seal(tokens=0).loads
    assert load.g1_slots().tolist() == [31, 32, 33, 34, 33, 34, 43, 44]
    stage.answer(load, *[DONE] * 7, FAILED)
    assert leader.match("new", 0, 5) == 3
    assert stage.pool.absent([group_key(keys[3], 2)]) == [0]
    assert leader.records["new"].outcome == "load failed, computed instead"
    leader.finish("new", [], 0)


@pytest.mark.parametrize(("share", "found"), [(1.0, 4), (0.13, 4), (0.12, 3), (0.09, 0)])
def test_holds_are_bounded_over_all_groups(make_stage: Make, share: float, found: int) -> None:
    """A hit of 4 blocks holds 8 of 64, one of 3 blocks 7; shorter ones are not possible."""
    stage = make_stage(groups=GEMMA, held_share=1.0)
    leader, keys = _hit(stage)
    leader.finish("new", [], 0)
    leader._settings = leader._settings.model_copy(update={"held_share": share})
    for name in ("one", "two"):
        leader.begin(name, keys, RequestParams(), 6 * BLOCK)
    assert leader.match("one", 0, 5) == found
    assert leader.match("two", 0, 5) == (None if 0 < share < 0.5 and found else found)
    for name in ("one", "two"):
        leader.finish(name, [], 0)


def test_nothing_is_stored_or_looked_up_while_it_is_paused(make_stage: Make) -> None:
    stage = make_stage(groups=GEMMA)
    leader, keys = _hit(stage)
    leader.pause()
    assert leader.match("new", 0, 5) == 0
    leader.place("new", [31], 0, Admitted(24, 0, 0), [[32], [33]])
    leader.reach("new", 1, 0)
    leader.resume()
    leader.reach("new", 1, 4)
    leader.reach("gone", 1, 4)
    assert not leader.seal(tokens=4).stores
    # It was preempted and ended while it waited.
    leader.finish("new", [], 0, [[], []])
    assert stage.pool.absent(keys[:4]) == []


# ---------------------------------------------------------------------- below host memory


def _read_at_arrival(stage: Stage, name: str, keys: Sequence[bytes]) -> list[tuple[bytes, int]]:
    """What is read from disk as a request with these blocks, and one of its last token, arrives."""
    stage.leader.begin(name, [*keys, b"last".ljust(32)], RequestParams(), len(keys) * BLOCK + 1)
    reads = stage.hear(Read)
    for read in reads:
        stage.moved(read)
    return [group_of(key) for read in reads for key in read.keys]


def _on_disk(stage: Stage, name: str, count: int) -> list[bytes]:
    """A prompt of whole blocks that was computed, and is on disk alone."""
    solo, tokens = Solo(stage, GEMMA), tokens_of(name, count * BLOCK)
    solo.engine.dice.choice = lambda _: DONE  # type: ignore[method-assign,assignment]
    solo.serve(name, tokens)
    keys = prompt_keys(tokens, BLOCK)
    stage.pool.discard([group_key(key, group) for key in keys for group in range(3)])
    return keys


def test_of_each_group_what_a_hit_needs_comes_from_disk(make_stage: Make) -> None:
    stage = with_disk(make_stage(200, groups=GEMMA, checkpoint_tokens=32), batch=64)
    keys = _on_disk(stage, "a", 14)
    read = _read_at_arrival(stage, "b", keys)
    assert read == [(key, 0) for key in keys] + [(key, group) for group in (1, 2) for key in keys[12:]]
    assert stage.leader.match("b", 0, 14) == 14
    stage.leader.place(
        "b", range(1, 16), 14, Admitted(57, 0, 56), [[0] * 12 + [first, first + 1, first + 2] for first in (21, 31)]
    )
    assert Admitted(57, 0, 56, 56) in stage.events
    (load,) = stage.leader.seal(tokens=0).loads
    assert len(load.g1_slots()) == 14 + 2 * 2
    stage.answer(load)


def test_what_is_in_host_memory_is_not_read(make_stage: Make) -> None:
    """Only windows are missing; each of their blocks replaces several of the prompt."""
    stage = with_disk(make_stage(200, groups=GEMMA, checkpoint_tokens=32), batch=64)
    keys = _on_disk(stage, "a", 14)
    _read_at_arrival(stage, "b", keys)
    stage.tick()
    stage.leader.finish("b", [], 0)
    stage.pool.discard([group_key(key, group) for key in keys for group in (1, 2)])
    stage.measure(computed=BLOCK_TOKENS * 40.0, read=20.0)  # 14 blocks in .35 s, 4 blocks in .2 s
    windows = [(key, group) for group in (1, 2) for key in keys[12:]]
    stage.leader.begin("c", [*keys, b"last".ljust(32)], RequestParams(), 57)
    read = []
    while (found := stage.leader.match("c", 0, 14)) is None:
        for move in stage.hear(Read):
            read += [group_of(key) for key in move.keys]
            stage.moved(move)
    assert (read, found) == (windows, 14)
    stage.leader.finish("c", [], 0)


def test_a_slow_disk_is_not_waited_for_where_its_blocks_replace_few(make_stage: Make) -> None:
    stage = with_disk(make_stage(200, groups=GEMMA, checkpoint_tokens=32), batch=64)
    keys = _on_disk(stage, "a", 14)
    stage.measure(computed=BLOCK_TOKENS * 40.0, read=45.0)  # 14 blocks computed in .35 s; 18 are read in .4 s
    stage.leader.begin("b", [*keys, b"last".ljust(32)], RequestParams(), 57)
    assert stage.leader.match("b", 0, 14) == 0
    assert any(why.startswith("gated: loading 18 blocks would take 400 ms") for why in stage.leader.records["b"].why)
    stage.leader.finish("b", [], 0)


def test_a_window_that_cannot_be_read_leaves_the_hit_before_it(make_stage: Make) -> None:
    stage = with_disk(make_stage(200, groups=GEMMA, checkpoint_tokens=32), batch=64)
    keys = _on_disk(stage, "a", 14)
    stage.leader.begin("b", [*keys, b"last".ljust(32)], RequestParams(), 57)
    (read,) = stage.hear(Read)
    bad = read.keys.index(group_key(keys[13], 2))
    stage.moved(read, *[CORRUPT if at == bad else DONE for at in range(len(read.keys))])
    assert stage.leader.match("b", 0, 14) == 0  # nothing more is read for it, and a shorter hit needs other blocks
    assert stage.disk.absent([group_key(keys[13], 2)]) == [0]
    stage.leader.finish("b", [], 0)
    assert _read_at_arrival(stage, "c", keys) == [(keys[11], group) for group in (1, 2)]  # block 12 is there by now
    assert stage.leader.match("c", 0, 14) == 13
    stage.leader.finish("c", [], 0)


def test_where_prompts_part_is_learned_from_disk_too(make_stage: Make) -> None:
    stage = with_disk(make_stage(400, groups=GEMMA, checkpoint_tokens=32), most=200, batch=64)
    solo, root = Solo(stage, GEMMA), tokens_of("root", 52)
    solo.engine.dice.choice = lambda _: DONE  # type: ignore[method-assign,assignment]
    found = []
    for name in "abc":
        found.append(solo.serve(name, root + tokens_of(name, 40)))
        stage.pool.clear()
    assert found == [0, 8, 13]
