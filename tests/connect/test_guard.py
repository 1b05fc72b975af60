"""What the engine gets to hear when KVBM raises. The modules are loaded by themselves: their package needs vLLM."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import kvbm
from kvbm.worker.worker import Collected

BLOCK = 32


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"alone_{name}", Path(kvbm.__file__).parent / f"connect/vllm/{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # msgspec looks up what the annotations say
    spec.loader.exec_module(module)
    return module


guard, tables = _load("guard"), _load("tables")
harmless = _load("harmless").harmless


class Boom(Exception):
    pass


class Fake:
    """A side that raises in the call named `bad`, before it does anything or afterwards."""

    def __init__(self) -> None:
        self.bad = ""
        self.after = False
        self.error: BaseException = Boom("boom")
        self.calls: list[str] = []
        self.off: str | None = None
        self.still = 0
        """Looks after which copies have ended."""

    def _do(self, name: str, answer: Any) -> Any:
        if name == self.bad and not self.after:
            raise self.error
        self.calls.append(name)
        if name == self.bad:
            raise self.error
        return answer

    def turn_off(self, why: str) -> None:
        self.off = why
        self._do("turn_off", None)

    def close(self) -> None:
        self._do("close", None)

    def quiet(self) -> bool:
        self.still -= 1
        return bool(self._do("quiet", self.still < 0))


class Scheduler(Fake):
    def __init__(self) -> None:
        super().__init__()
        self.tables = tables.Tables(BLOCK)
        self.waits = True
        self.places = True

    def on_new_request(self, request: Any) -> None:
        self._do("on_new_request", None)

    def match(self, request: Any, computed: int) -> tuple[int | None, bool]:
        return self._do("match", (64, self.waits))  # type: ignore[no-any-return]

    def place(self, request: Any, blocks: Any, tokens: int) -> bool:
        return bool(self._do("place", self.places and tokens > 0))

    def step(self, output: Any) -> bytes:
        return self._do("step", b"step")  # type: ignore[no-any-return]

    def stepped(self) -> None:
        self._do("stepped", None)

    def bind(self, pool: Any) -> None:
        self._do("bind", None)

    def finish(self, request: Any, blocks: Any, others: Any = ()) -> None:
        self._do("finish", None)

    def not_loaded(self, stale: Any, again: Any) -> None:
        self._do("not_loaded", None)

    def take_events(self) -> Iterator[str]:
        yield "event"
        self._do("take_events", None)

    def reset(self) -> bool:
        return bool(self._do("reset", True))

    def forget(self) -> None:
        self._do("forget", None)

    def stats(self) -> str:
        return str(self._do("stats", "stats"))


class Worker(Fake):
    def __init__(self) -> None:
        super().__init__()
        self.ended = Collected()
        self.bad_ones: set[int] = set()

    def before_step(self, payload: bytes) -> None:
        self._do("before_step", None)

    def before_forward(self) -> None:
        self._do("before_forward", None)

    def after_forward(self) -> None:
        self._do("after_forward", None)

    def results(self) -> Collected:
        ended, self.ended = self.ended, Collected()
        return self._do("results", ended)  # type: ignore[no-any-return]

    def bad_blocks(self) -> set[int]:
        return self._do("bad_blocks", self.bad_ones)  # type: ignore[no-any-return]


class Ranks:
    """A scheduler's side and two ranks under their guards, stepped as vLLM does."""

    def __init__(self) -> None:
        self.upper = Scheduler()
        self.lower = [Worker(), Worker()]
        self.scheduler = guard.SchedulerGuard(self.upper)
        self.workers = [guard.WorkerGuard(side) for side in self.lower]
        self.reported: list[list[str]] = [[], []]
        """Of each rank, requests whose load it has said to have ended."""
        self.failed: set[str] = set()
        self.bad: set[int] = set()
        self.saves_last = False
        """As vLLM 0.33's second model runner: it asks for results before it waits for saves."""

    def ask(self, name: str, blocks: list[int] | None = None) -> tuple[int | None, bool]:
        """A request arrives and gets its blocks."""
        request = SimpleNamespace(request_id=name, num_computed_tokens=96)
        self.scheduler.on_new_request(request)
        found = self.scheduler.match(request, BLOCK)
        table = blocks or [5, 6, 7, 8]
        self.scheduler.place(request, SimpleNamespace(get_block_ids=lambda: (table,)), found[0] or 0)
        return found

    def finish(self, name: str) -> None:
        self.scheduler.finish(SimpleNamespace(request_id=name), [5, 6, 7, 8])

    def step(self) -> None:
        told = self.scheduler.step(SimpleNamespace())
        for rank, worker in enumerate(self.workers):
            worker.before_step(*told)
            worker.before_forward()
            if not self.saves_last:
                worker.after_forward()
            ended = worker.results()
            self.reported[rank] += sorted(ended.loaded)
            self.failed |= ended.failed
            self.bad |= worker.bad_blocks()
            if self.saves_last:
                worker.after_forward()
        self.scheduler.stepped()


@pytest.fixture
def ranks() -> Ranks:
    return Ranks()


@pytest.fixture(params=[False, True], ids=["before", "after"])
def after(request: pytest.FixtureRequest) -> bool:
    """Whether what raises has done its work."""
    return bool(request.param)


SCHEDULER: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "on_new_request": (lambda guarded: guarded.on_new_request(SimpleNamespace(request_id="x")), None),
    "match": (lambda guarded: guarded.match(SimpleNamespace(request_id="x"), 0), (0, False)),
    "place": (lambda guarded: guarded.place(SimpleNamespace(request_id="x"), None, 0), None),
    "stepped": (lambda guarded: guarded.stepped(), None),
    "bind": (lambda guarded: guarded.bind(SimpleNamespace()), None),
    "finish": (lambda guarded: guarded.finish(SimpleNamespace(request_id="x"), []), None),
    "take_events": (lambda guarded: guarded.take_events(), []),
    "reset": (lambda guarded: guarded.reset(), True),
    "stats": (lambda guarded: guarded.stats(), None),
}


@pytest.mark.parametrize("name", SCHEDULER)
def test_the_schedulers_side_answers_so_that_hits_are_lost(ranks: Ranks, name: str, after: bool) -> None:
    call, answer = SCHEDULER[name]
    assert call(ranks.scheduler) != answer or answer in (None, True)
    assert ranks.upper.calls == [name]
    ranks.upper.bad, ranks.upper.after = name, after
    assert call(ranks.scheduler) == answer
    assert ranks.upper.off is not None
    assert f"{name} raised Boom('boom')" in ranks.upper.off
    ranks.upper.bad, ranks.upper.calls = "", []
    for each, (again, otherwise) in SCHEDULER.items():
        assert again(ranks.scheduler) == otherwise, each
    payload, promises = ranks.scheduler.step(SimpleNamespace())
    assert payload == b""
    assert guard._decode(promises).off == ranks.upper.off
    assert ranks.upper.calls == ["forget"], "what is off is not called, but to forget what a reset is about"


def test_a_reset_that_cannot_forget_answers_all_the_same(ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    ranks.upper.bad = "forget"
    ranks.scheduler.off = ranks.upper.off = "something raised"
    assert ranks.scheduler.reset()
    assert "could not clear the disk tier" in caplog.text


@pytest.mark.parametrize("name", ["place", "step", "match", "on_new_request", "finish", "stepped"])
@pytest.mark.parametrize("waits", [True, False])
def test_what_was_promised_before_fails_on_every_rank(ranks: Ranks, name: str, waits: bool, after: bool) -> None:
    ranks.upper.waits = waits
    if name in ("place", "step"):
        ranks.upper.bad, ranks.upper.after = name, after
        assert ranks.ask("a") == (64, waits)
    else:
        ranks.ask("a")
        ranks.upper.bad, ranks.upper.after = name, after
        SCHEDULER[name][0](ranks.scheduler)
    ranks.step()
    assert ranks.reported == ([["a"], ["a"]] if waits else [[], []])
    assert ranks.failed == ({"a"} if waits else set())
    assert ranks.bad == (set() if waits else {6, 7}), "blocks 1 and 2 of the request: its first was there"
    assert all(side.off for side in ranks.lower)
    ranks.step()
    assert ranks.reported == ([["a"], ["a"]] if waits else [[], []]), "told once"
    assert ranks.ask("b") == (0, False)


def test_a_load_that_is_promised_later_fails_too(ranks: Ranks) -> None:
    """vLLM 0.33 may place a load some steps after it asked."""
    request = SimpleNamespace(request_id="a")
    ranks.scheduler.on_new_request(request)
    assert ranks.scheduler.match(request, 0) == (64, True)
    ranks.upper.bad = "step"
    ranks.step()
    ranks.scheduler.place(request, SimpleNamespace(get_block_ids=lambda: ([1, 2],)), 64)
    ranks.step()
    assert ranks.reported == [["a"], ["a"]]
    assert ranks.failed == {"a"}


@pytest.mark.parametrize("waits", [True, False])
def test_a_load_that_is_not_in_the_step_fails(ranks: Ranks, waits: bool) -> None:
    ranks.upper.waits, ranks.upper.places = waits, False
    ranks.ask("a")
    ranks.step()
    assert ranks.reported == ([["a"], ["a"]] if waits else [[], []])
    assert ranks.failed == ({"a"} if waits else set())
    assert ranks.bad == (set() if waits else {6, 7})
    assert ranks.upper.off is None
    ranks.step()
    assert not any(side.off for side in ranks.lower)
    assert ranks.reported == ([["a"], ["a"]] if waits else [[], []])


@pytest.mark.parametrize("name", ["before_step", "before_forward", "after_forward", "results", "bad_blocks"])
def test_a_rank_that_raised_answers_for_what_it_owes(ranks: Ranks, name: str, after: bool) -> None:
    first, second = ranks.lower
    ranks.ask("a")
    ranks.step()
    ranks.ask("b")
    # It takes the ids with it, where it raises afterwards.
    first.bad, first.after, first.ended = name, after, Collected(loaded={"a"})
    second.ended = Collected(loaded={"a", "b"})
    ranks.step()
    if name == "bad_blocks":  # its results were out before
        assert (ranks.reported, ranks.failed) == ([["a"], ["a", "b"]], set())
    elif name == "results":
        assert (ranks.reported, ranks.failed) == ([["a", "b"], ["a", "b"]], {"a", "b"})
    assert first.off is not None
    assert f"{name} raised Boom('boom')" in first.off
    ranks.ask("c")  # the leader has not heard yet
    second.ended = Collected(loaded={"c"})
    ranks.step()
    assert [sorted(each) for each in ranks.reported] == [["a", "b", "c"]] * 2, "each of them once"
    assert ranks.failed >= {"b", "c"}
    assert second.off is None
    ranks.upper.off = "rank 0: ..."  # now it has
    ranks.ask("d")
    ranks.step()
    assert second.off == "rank 0: ..."
    assert ranks.ask("e") == (0, False)
    assert [sorted(each) for each in ranks.reported] == [["a", "b", "c", "d"]] * 2
    assert ranks.bad == set()


@pytest.mark.parametrize("name", ["before_step", "before_forward", "after_forward", "results", "bad_blocks"])
def test_a_rank_that_raised_names_the_blocks_of_loads_inside_the_step(ranks: Ranks, name: str, after: bool) -> None:
    ranks.upper.waits = False
    ranks.lower[1].bad, ranks.lower[1].after = name, after
    ranks.lower[1].still = 3
    ranks.ask("a")
    ranks.ask("b", [9, 10, 11, 12])
    ranks.step()
    assert ranks.bad == {6, 7, 10, 11}
    assert ranks.lower[1].still < 0, "not before copies have ended"
    assert ranks.reported == [[], []]
    ranks.bad.clear()
    ranks.step()
    assert ranks.bad == set()


@pytest.mark.parametrize("waits", [True, False])
def test_a_save_may_raise_after_the_results_were_told(ranks: Ranks, waits: bool) -> None:
    ranks.saves_last, ranks.upper.waits = True, waits
    ranks.lower[0].bad = "after_forward"
    ranks.ask("a")
    ranks.step()
    assert (ranks.reported, ranks.bad) == ([[], []], set()), "what was loaded inside the step has been"
    ranks.lower[1].ended = Collected(loaded={"a"} if waits else set())
    ranks.step()
    assert ranks.reported == ([["a"], ["a"]] if waits else [[], []])
    assert (ranks.failed, ranks.bad) == ({"a"} if waits else set(), set())


def test_a_load_is_not_told_to_have_failed_while_it_may_still_write(ranks: Ranks) -> None:
    ranks.lower[0].bad, ranks.lower[0].still = "before_step", 2
    ranks.lower[1].ended = Collected(loaded={"a"})
    ranks.ask("a")
    for looks in range(3):
        ranks.step()
        assert ranks.reported[0] == ([] if looks < 2 else ["a"])
    ranks.step()
    assert ranks.reported == [["a"], ["a"]]


def test_whether_copies_have_ended_may_raise_too(ranks: Ranks) -> None:
    ranks.lower[0].bad = "before_step"
    ranks.ask("a")
    ranks.step()
    ranks.ask("b")
    ranks.lower[0].bad = "quiet"
    ranks.step()
    assert ranks.reported[0] == ["a"]
    ranks.lower[0].bad = ""
    ranks.step()
    assert ranks.reported[0] == ["a", "b"]


def test_a_worker_without_a_schedulers_side_is_left_alone(ranks: Ranks) -> None:
    worker, side = ranks.workers[0], ranks.lower[0]
    worker.before_step(b"", b"")
    worker.before_forward()
    worker.after_forward()
    assert worker.results() == Collected()
    assert worker.bad_blocks() == set()
    worker.before_step(b"", b"")
    worker.close()
    assert side.calls == ["close"], "its memory is given back, once"


def test_its_start_may_end_the_engines(ranks: Ranks) -> None:
    ranks.lower[0].register = lambda caches: ranks.lower[0]._do("register", None)  # type: ignore[attr-defined]
    ranks.lower[0].bad = "register"
    with pytest.raises(Boom):
        ranks.workers[0].register({})


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_what_is_no_exception_passes(ranks: Ranks, error: BaseException) -> None:
    ranks.upper.bad = ranks.lower[0].bad = "stats"
    ranks.upper.error = ranks.lower[0].error = error
    with pytest.raises(type(error)):
        ranks.scheduler.stats()
    ranks.lower[0].bad = "before_step"
    with pytest.raises(type(error)):
        ranks.workers[0].before_step(b"step", b"")
    assert ranks.upper.off is ranks.lower[0].off is None


def test_an_exception_that_cannot_be_written_down(ranks: Ranks) -> None:
    class Unspeakable(Exception):
        def __repr__(self) -> str:
            raise ValueError

    ranks.upper.bad, ranks.upper.error = "match", Unspeakable()
    assert ranks.scheduler.match(SimpleNamespace(request_id="x"), 0) == (0, False)
    assert ranks.upper.off is not None
    assert ranks.upper.off.endswith("match raised Unspeakable")


def test_turning_off_and_the_end_may_raise(ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    ranks.upper.bad = "turn_off"
    ranks.scheduler._end("something")
    assert ranks.scheduler.match(SimpleNamespace(request_id="x"), 0) == (0, False)
    ranks.upper.bad = ranks.lower[0].bad = "close"
    ranks.scheduler.close()
    ranks.workers[0].close()
    assert caplog.text.count("Boom: boom") == 3


def test_blocks_of_a_failed_load_are_forgotten_although_it_is_off(ranks: Ranks) -> None:
    """Else others would go on from them in the engine's own cache. Of requests that run, and of those that ended."""
    ranks.upper.waits, ranks.upper.bad = False, "stepped"
    ranks.ask("a")
    (request,) = ranks.upper.tables.requests.values()
    ranks.ask("b", [9, 6])
    ranks.scheduler.stepped()
    ranks.finish("b")
    evicted: list[set[int]] = []
    manager = SimpleNamespace(get_block_ids=lambda name: ([5, 6, 7, 8],), evict_blocks=evicted.append)
    ranks.scheduler.not_loaded({6}, manager)
    assert request.num_computed_tokens == BLOCK
    assert evicted == [{6, 7, 8}]


@pytest.mark.parametrize("is_off", [False, True])
@pytest.mark.parametrize("name", ["get_block_ids", "evict_blocks"])
def test_looking_for_blocks_of_a_failed_load_may_raise(ranks: Ranks, name: str, is_off: bool) -> None:
    """Which of the engine's blocks count is not known then: none does."""
    ranks.upper.waits = False
    ranks.ask("a")
    ranks.ask("b")
    if is_off:
        ranks.upper.bad = "stepped"
        ranks.scheduler.stepped()
    evicted: list[set[int]] = []

    def evict(blocks: set[int]) -> None:
        if name == "evict_blocks" and len(blocks) < 9:
            raise Boom("boom")
        evicted.append(blocks)

    manager = SimpleNamespace(
        get_block_ids=lambda _: 1 / 0 if name == "get_block_ids" else ([5, 6, 7, 8],),
        evict_blocks=evict,
        block_pool=SimpleNamespace(num_gpu_blocks=9),
    )
    ranks.scheduler.not_loaded({6}, manager)
    assert ranks.scheduler.off is not None
    assert ("stepped raised" if is_off else "not_loaded raised") in ranks.scheduler.off
    assert evicted == [set(range(9))]
    assert [each.num_computed_tokens for each in ranks.upper.tables.requests.values()] == [0, 0]
    assert "not_loaded" not in ranks.upper.calls
    ranks.scheduler.not_loaded({6}, None)  # nothing at all can be done


def test_what_runs_in_the_server_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    @harmless
    def observe(data: Any) -> None:
        raise Boom(data)

    observe({})
    observe(data={})
    assert caplog.text.count("observe went wrong") == 1


def test_a_guard_costs_next_to_nothing(ranks: Ranks) -> None:
    """Under a microsecond; with room for a machine that does other things."""
    import timeit

    side = ranks.upper
    side.stepped = lambda: None  # type: ignore[method-assign]
    rounds = 20_000
    guarded = min(timeit.repeat(ranks.scheduler.stepped, number=rounds, repeat=5))
    assert (guarded - min(timeit.repeat(side.stepped, number=rounds, repeat=5))) / rounds < 5e-6
