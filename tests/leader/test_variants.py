"""Requests with adapters: what is looked up, what may be loaded, what may be stored. The test plays engine and workers,
and says which adapters these hold."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import pytest

from kvbm.blocks import LayerGroup
from kvbm.core.events import Admitted
from kvbm.core.keys import group_key, variant_keys
from kvbm.leader.requests import RequestParams, Variant
from kvbm.link.messages import Adapter, Copy, Foresee, Foreseen, Step, Unlike, Used
from tests.leader.roles import BLOCK_TOKENS, DONE, FAILED, Stage, keys_of

Make = Callable[..., Stage]
BLOCKS = 4
ONE, TWO = b"1" * 32, b"2" * 32


class Keys(list[bytes]):
    """Of a request with an adapter."""

    def __init__(self, plain: Sequence[bytes]) -> None:
        super().__init__()
        self._plain = plain

    def under(self, digest: bytes) -> None:
        self[:] = variant_keys(self._plain, digest)


def keys_with(name: str, digest: bytes) -> list[bytes]:
    return variant_keys(keys_of(name, BLOCKS), digest)


def begin(
    stage: Stage, request: str, prompt: str = "p", *, number: int = 1, files: Hashable = "files", unsteady: bool = False
) -> Variant:
    keys = Keys(keys_of(prompt, BLOCKS))
    variant = Variant(Adapter(number, f"name{number}", b""), files, keys, unsteady=unsteady)
    stage.leader.begin(request, keys, RequestParams(), BLOCKS * BLOCK_TOKENS + 1, variant)
    return variant


def advance(stage: Stage, request: str, complete: int, g1: Sequence[int] | None = None) -> Step:
    if g1 is not None:
        stage.leader.grow(request, g1, replace=True)
    stage.leader.advance(request, complete)
    return stage.leader.seal(tokens=1)


def used(stage: Stage, step: Step, *digests: bytes, rank: int | None = None) -> None:
    assert step.adapters is not None
    for each in stage.workers if rank is None else [rank]:
        stage.say(Used(each, step.adapters.step, list(digests)), each)


def compute(
    stage: Stage, request: str, prompt: str = "p", digest: bytes = ONE, g1: Sequence[int] = range(BLOCKS), **given: int
) -> None:
    """A request that computes its blocks in one step, with the adapter of this digest, and ends."""
    begin(stage, request, prompt, **given)
    found = stage.leader.match(request, 0, BLOCKS)
    if found is None:
        stage.hear(Foresee)
        stage.clock.advance(10)
        found = stage.leader.match(request, 0, BLOCKS)
    assert found == 0
    stage.place(request, g1)
    step = advance(stage, request, BLOCKS, g1)
    used(stage, step, digest)
    for copy in step.stores:
        stage.answer(copy)
    finish(stage, request, g1)


def finish(stage: Stage, request: str, g1: Sequence[int] = range(BLOCKS), complete: int = BLOCKS) -> list[Copy]:
    stage.leader.finish(request, list(g1), complete)
    stores = stage.leader.seal(tokens=0).stores
    for copy in stores:
        stage.answer(copy)
    return stores


def loading(stage: Stage, request: str) -> Step:
    """Matches, is placed, and the step in which it loads."""
    found = stage.leader.match(request, 0, BLOCKS)
    assert found == BLOCKS
    stage.leader.place(request, list(range(20, 20 + BLOCKS)), found, Admitted(1, 0, 1))
    return stage.leader.seal(tokens=0)


# ---------------------------------------------------------------------- down


@pytest.mark.parametrize("ranks", [1, 2])
def test_blocks_are_offered_once_the_ranks_have_said_what_they_compute_with(make_stage: Make, ranks: int) -> None:
    stage = make_stage(ranks=ranks)
    begin(stage, "a")
    assert stage.leader.match("a", 0, BLOCKS) == 0
    stage.place("a", range(BLOCKS))
    first = advance(stage, "a", 2, range(BLOCKS))
    assert first.adapters is not None
    assert first.adapters.used == [1]
    second = advance(stage, "a", 3)
    for rank in range(ranks):
        assert not first.stores
        assert not second.stores
        used(stage, first, ONE, rank=rank)
    third = advance(stage, "a", 4)  # all of it is copied now, and published if the last steps were as the first
    assert [copy.g1_slots().tolist() for copy in third.stores] == [[0, 1, 2, 3]]
    used(stage, second, ONE)
    for rank in range(ranks):
        assert stage.matchable(keys_with("p", ONE)) == 0
        used(stage, third, ONE, rank=rank)
        stage.answer(third.stores[0], rank=rank)
    assert stage.matchable(keys_with("p", ONE)) == 4
    assert stage.pool.peek(keys_of("p", BLOCKS)) == 0
    assert not finish(stage, "a")


@pytest.mark.parametrize("say", [[ONE, TWO], [TWO, TWO], [ONE, None], [None, None], [b"", b""]])
def test_what_was_copied_is_published_only_if_all_ranks_computed_with_what_was_expected(
    make_stage: Make, say: list[bytes | None]
) -> None:
    stage = make_stage(ranks=2)
    compute(stage, "first")
    begin(stage, "a", "q")
    stage.place("a", range(BLOCKS))
    step = advance(stage, "a", BLOCKS, range(BLOCKS))
    for rank, digest in enumerate(say):
        if digest is not None:
            used(stage, step, digest, rank=rank)
        stage.answer(step.stores[0], rank=rank)
    stage.leader.core.tick()
    assert stage.pool.statistics().registered == BLOCKS
    assert not finish(stage, "a")
    assert stage.pool.statistics().staged == 0


def test_what_no_rank_has_reported_yet_at_the_end_is_not_stored(stage: Stage) -> None:
    begin(stage, "a")
    stage.place("a", range(BLOCKS))
    step = advance(stage, "a", BLOCKS, range(BLOCKS))
    assert not finish(stage, "a")
    used(stage, step, ONE)
    stage.leader.core.tick()
    assert stage.pool.peek(keys_with("p", ONE)) == 0


def test_ranks_that_disagree_store_nothing(make_stage: Make) -> None:
    stage = make_stage(ranks=2)
    begin(stage, "a")
    stage.place("a", range(BLOCKS))
    step = advance(stage, "a", BLOCKS, range(BLOCKS))
    used(stage, step, ONE, rank=0)
    used(stage, step, TWO, rank=1)
    assert not finish(stage, "a")
    assert any("hold different ones" in why for why in stage.leader.records["a"].why)


def test_a_step_that_a_rank_left_out_counts_as_unknown(make_stage: Make) -> None:
    stage = make_stage(ranks=2)
    begin(stage, "a")
    stage.place("a", range(BLOCKS))
    first, second = advance(stage, "a", 2, range(BLOCKS)), advance(stage, "a", BLOCKS)
    used(stage, first, ONE, rank=0)
    used(stage, second, ONE)
    assert not finish(stage, "a")


@pytest.mark.parametrize("then", [TWO, b""])
def test_an_adapter_that_changes_while_a_request_runs_ends_its_storing(stage: Stage, then: bytes) -> None:
    begin(stage, "a")
    stage.place("a", range(BLOCKS))
    used(stage, advance(stage, "a", 2, range(BLOCKS)), ONE)
    step = advance(stage, "a", BLOCKS)
    used(stage, step, then)
    stage.answer(step.stores[0])
    assert not finish(stage, "a")
    assert stage.matchable(keys_with("p", ONE)) == 2
    assert stage.pool.statistics().registered == 2
    assert any("KVBM loaded and stored nothing more" in why for why in stage.leader.records["a"].why)


def test_a_report_about_blocks_that_the_request_lost_says_nothing_of_its_new_ones(stage: Stage) -> None:
    begin(stage, "a")
    stage.place("a", range(BLOCKS))
    before = advance(stage, "a", BLOCKS, range(BLOCKS))
    again = advance(stage, "a", 1, range(10, 10 + BLOCKS))  # preempted, and begun anew
    used(stage, before, ONE)
    stage.leader.core.tick()
    assert stage.leader.requests["a"].proven == 0
    assert not stage.leader.provenance.words[10:14].all(axis=1).any()
    used(stage, again, ONE)
    stage.leader.core.tick()
    assert stage.leader.requests["a"].proven == 1


def test_a_request_that_loaded_stores_only_under_what_it_loaded(stage: Stage) -> None:
    compute(stage, "a")
    begin(stage, "b")
    step = loading(stage, "b")
    stage.answer(step.loads[0])
    used(stage, advance(stage, "b", BLOCKS, range(20, 24)), TWO)
    assert not finish(stage, "b", range(20, 24))
    assert stage.pool.statistics().registered == BLOCKS
    assert "KVBM loaded and stored nothing more: its adapter changed while it ran" in stage.leader.records["b"].why


def test_an_expectation_that_was_wrong_is_not_kept(stage: Stage) -> None:
    """Nothing was found under it, so no load could show that it was."""
    compute(stage, "a")
    for request, prompt, stores in (("b", "q", 0), ("c", "r", BLOCKS)):
        compute(stage, request, prompt, TWO)
        assert stage.matchable(keys_with(prompt, TWO)) == stores
    assert stage.pool.statistics().registered == 2 * BLOCKS


# ---------------------------------------------------------------------- what is expected


def test_nobody_waits_where_nothing_can_be_stored_with_an_adapter(stage: Stage) -> None:
    begin(stage, "a")
    assert stage.leader.match("a", 0, BLOCKS) == 0
    assert not stage.hear(Foresee)


def test_the_same_files_under_the_same_number_are_expected_to_be_what_was_computed_with(stage: Stage) -> None:
    compute(stage, "a")
    begin(stage, "b")
    step = loading(stage, "b")
    assert not stage.hear(Foresee)
    assert step.adapters is not None
    assert step.adapters.loads[step.loads[0].job].digest == ONE
    assert step.adapters.awaited == [(1, ONE)]


@pytest.mark.parametrize(("number", "files"), [(1, "retrained"), (2, "files")])
def test_a_worker_is_asked_about_other_files_and_other_numbers(stage: Stage, number: int, files: str) -> None:
    compute(stage, "a")
    begin(stage, "b", number=number, files=files)
    begin(stage, "c", number=number, files=files)
    (question,) = stage.hear(Foresee)
    assert question.adapter.number == number
    assert stage.leader.match("b", 0, BLOCKS) is None
    stage.say(Foreseen(question.question, ONE))
    assert stage.leader.match("b", 0, BLOCKS) == BLOCKS
    stage.say(Foreseen(question.question, TWO))  # nobody asked again
    assert stage.leader.match("c", 0, BLOCKS) == BLOCKS
    for request in "bc":
        stage.leader.finish(request, [], 0)


@pytest.mark.parametrize("answer", [TWO, b"", None])
def test_another_answer_or_none_at_all_finds_nothing(stage: Stage, answer: bytes | None) -> None:
    compute(stage, "a")
    begin(stage, "b", files="retrained")
    (question,) = stage.hear(Foresee)
    if answer is None:
        stage.clock.advance(1.9)
        assert stage.leader.match("b", 0, BLOCKS) is None
        stage.clock.advance(0.2)
    else:
        stage.say(Foreseen(question.question, answer))
    assert stage.leader.match("b", 0, BLOCKS) == 0
    if answer is None:
        begin(stage, "c", files="retrained")
        assert stage.leader.match("c", 0, BLOCKS) == 0  # who asks the same does not wait again
        stage.say(Foreseen(question.question, ONE))
        assert stage.leader.match("b", 0, BLOCKS) == 0  # too late


def test_what_nobody_answered_is_asked_again(stage: Stage) -> None:
    compute(stage, "a")
    begin(stage, "b", number=2)
    (lost,) = stage.hear(Foresee)
    stage.clock.advance(3.9)
    begin(stage, "c", number=2)
    assert stage.leader.match("c", 0, BLOCKS) == 0
    assert not stage.hear(Foresee)
    stage.clock.advance(0.2)
    begin(stage, "d", number=2)
    begin(stage, "e", number=2)
    (again,) = stage.hear(Foresee)
    assert again.adapter == lost.adapter
    assert stage.leader.match("d", 0, BLOCKS) is None
    stage.say(Foreseen(lost.question, ONE))  # late, and of the same files
    for request in "de":
        assert stage.leader.match(request, 0, BLOCKS) == BLOCKS
    assert stage.leader.match("b", 0, BLOCKS) == 0, "it asked before, and was told that nobody knows"
    stage.say(Foreseen(again.question, TWO))
    begin(stage, "f", number=2)
    assert stage.leader.match("f", 0, BLOCKS) == BLOCKS
    assert not stage.hear(Foresee)
    for request in "bcdef":
        stage.leader.finish(request, [], 0)


def test_a_worker_that_never_answers_is_asked_seldom(stage: Stage) -> None:
    stage.add_disk()
    waited = asked = 0
    for second in range(3600):
        begin(stage, f"r{second}")
        waited += stage.leader.match(f"r{second}", 0, BLOCKS) is None
        asked += len(stage.hear(Foresee))
        stage.leader.finish(f"r{second}", [], 0)
        stage.clock.advance(1)
    assert asked == 13  # after 4, 8, ... 512 seconds, then every 600
    assert waited == 2 * asked
    assert len(stage.leader.variants.outlook.asked) == 1


def test_what_a_step_was_computed_with_is_known_better_than_what_a_worker_foresaw(stage: Stage) -> None:
    compute(stage, "a")
    begin(stage, "x", number=2)
    (question,) = stage.hear(Foresee)
    stage.leader.finish("x", [], 0)
    compute(stage, "b", number=2, digest=TWO)
    stage.say(Foreseen(question.question, ONE))
    stage.leader.core.tick()
    begin(stage, "c", number=2)
    step = loading(stage, "c")
    assert step.adapters is not None
    assert step.adapters.loads[step.loads[0].job].digest == TWO
    stage.answer(step.loads[0])


def test_who_cannot_answer_is_not_asked_again_about_the_same(stage: Stage) -> None:
    stage.add_disk()
    begin(stage, "a")
    stage.say(Foreseen(stage.hear(Foresee)[0].question))
    assert stage.leader.match("a", 0, BLOCKS) == 0
    begin(stage, "b")
    assert stage.leader.match("b", 0, BLOCKS) == 0
    assert not stage.hear(Foresee)


def test_an_answer_after_the_request_ended_starts_nothing(stage: Stage) -> None:
    stage.add_disk()
    begin(stage, "a")
    (question,) = stage.hear(Foresee)
    stage.leader.finish("a", [], 0)
    begin(stage, "a", "q", files="other")  # a name may come again
    stage.say(Foreseen(question.question, ONE))
    assert stage.leader.match("a", 0, BLOCKS) is None


def test_what_is_on_disk_comes_up_once_it_is_known_which_adapter(stage: Stage) -> None:
    from kvbm.tiers.disk.orders import Read

    stage.add_disk()
    compute(stage, "a")
    stage.write_all()
    stage.pool.discard(keys_with("p", ONE))
    begin(stage, "b", number=7)
    assert not stage.hear(Read)
    (question,) = stage.hear(Foresee)
    stage.say(Foreseen(question.question, ONE))
    assert stage.leader.match("b", 0, BLOCKS) is None
    (read,) = stage.hear(Read)
    stage.moved(read)
    assert stage.leader.match("b", 0, BLOCKS) == BLOCKS
    stage.leader.finish("b", [], 0)


# ---------------------------------------------------------------------- up


def test_a_load_that_a_worker_refuses_is_not_promised_again(make_stage: Make) -> None:
    stage = make_stage(ranks=2)
    compute(stage, "a")
    begin(stage, "b")
    step = loading(stage, "b")
    stage.say(Unlike(1, "b", TWO), 1)
    stage.answer(step.loads[0], *[FAILED] * BLOCKS, rank=1)
    stage.answer(step.loads[0], *[DONE] * BLOCKS, rank=0)
    assert stage.leader.match("b", 0, BLOCKS) == 0
    record = stage.leader.records["b"]
    assert record.outcome == "load failed, computed instead"
    assert stage.matchable(keys_with("p", ONE)) == BLOCKS  # they are what their keys say
    assert stage.leader.seal(tokens=0).adapters is None  # nothing is awaited any more
    begin(stage, "c")
    assert stage.leader.match("c", 0, BLOCKS) == 0  # the same files are expected to be what the worker holds
    stage.leader.finish("b", [], 0)
    compute(stage, "d", digest=TWO, g1=range(30, 34))
    assert stage.matchable(keys_with("p", TWO)) == BLOCKS


def test_a_load_that_failed_by_itself_is_unpublished(stage: Stage) -> None:
    compute(stage, "a")
    begin(stage, "b")
    stage.answer(loading(stage, "b").loads[0], DONE, FAILED, DONE, DONE)
    assert stage.matchable(keys_with("p", ONE)) == 1


def test_what_is_awaited_is_said_until_the_request_is_computed(stage: Stage) -> None:
    compute(stage, "a")
    begin(stage, "b")
    step = loading(stage, "b")
    stage.answer(step.loads[0])
    for _ in range(2):
        again = stage.leader.seal(tokens=0)
        assert again.adapters is not None
        assert (again.adapters.used, again.adapters.awaited, again.adapters.needed) == ([], [(1, ONE)], [1])
    now = advance(stage, "b", BLOCKS, range(20, 24)).adapters
    assert now is not None
    assert (now.used, now.awaited) == ([1], [(1, ONE)])
    later = stage.leader.seal(tokens=0).adapters
    assert later is not None
    assert (later.used, later.awaited, later.needed) == ([], [], [1])
    stage.leader.finish("b", [], 0)
    assert stage.leader.seal(tokens=0).adapters is None


def test_adapters_that_are_read_at_every_step_are_left_alone(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    compute(stage, "a")
    begin(stage, "b", "q", unsteady=True)
    assert stage.leader.match("b", 0, BLOCKS) == 0
    stage.place("b", range(BLOCKS))
    unsteady = advance(stage, "b", BLOCKS, range(BLOCKS)).adapters
    assert unsteady is not None
    assert (unsteady.used, unsteady.needed, unsteady.scheduled) == ([], [1], [1])
    begin(stage, "c")
    assert stage.leader.match("c", 0, BLOCKS) == 0  # of the same number
    begin(stage, "d", number=2)
    (question,) = stage.hear(Foresee)
    stage.say(Foreseen(question.question, ONE))
    assert stage.leader.match("d", 0, BLOCKS) == BLOCKS
    assert not finish(stage, "b")
    begin(stage, "e")
    assert stage.leader.match("e", 0, BLOCKS) == BLOCKS
    begin(stage, "f", "q", unsteady=True)
    assert caplog.text.count("KVBM loads and stores nothing of adapter name1") == 1
    for request in "de":
        stage.leader.finish(request, [], 0)


def test_requests_without_adapters_find_nothing_of_them_and_the_other_way_round(stage: Stage) -> None:
    stage.keep("base", keys_of("p", BLOCKS))
    compute(stage, "a")
    begin(stage, "b", files="retrained")
    stage.say(Foreseen(stage.hear(Foresee)[0].question, TWO))
    assert stage.leader.match("b", 0, BLOCKS) == 0
    stage.begin("plain", keys_of("p", BLOCKS))
    assert stage.leader.match("plain", 0, BLOCKS) == BLOCKS
    assert stage.pool.statistics().registered == 2 * BLOCKS
    stage.leader.finish("plain", [], 0)


def test_a_window_is_copied_while_the_engine_still_has_it(make_stage: Make) -> None:
    """The step after would find its blocks handed out."""
    groups = (LayerGroup("full", BLOCK_TOKENS), LayerGroup("window", BLOCK_TOKENS, BLOCK_TOKENS + 1))
    stage = make_stage(groups=groups, checkpoint_tokens=BLOCK_TOKENS)
    leader = stage.leader
    sources = []
    for request, prompt in (("a", "p"), ("b", "q")):
        begin(stage, request, prompt)
        g1, other = [1, 2, 3, 4], [[0, 0, 13, 14]]
        leader.place(request, g1, 0, Admitted(1, 0, 0), other)
        leader.grow(request, g1, replace=True, others=other)
        leader.advance(request, BLOCKS, 0)
        step = leader.seal(tokens=1)
        used(stage, step, ONE)
        for copy in step.stores:
            stage.answer(copy)
        sources.append({block for copy in step.stores for block in copy.g1_slots().tolist()})
        leader.finish(request, g1, BLOCKS, other)
        for copy in leader.seal(tokens=0).stores:
            stage.answer(copy)
    assert sources == [set(), {1, 2, 3, 4, 13, 14}]  # which adapter it was, the first did not know
    keys = keys_with("q", ONE)
    assert stage.matchable([group_key(key, group) for key in keys[2:] for group in (0, 1)]) == 4
