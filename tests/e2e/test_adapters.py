"""Adapters that change under vLLM's hands. Each answer is compared with that of vLLM alone, which has gone through the
same: it loads an adapter when it first computes with it, keeps it under its number, and gives it up for another."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbm.core.events import Admitted
from tests.e2e.conftest import prompt_of
from tests.e2e.engine import BLOCK, Done, Engine
from tests.e2e.test_requests import adapter

LENGTH = 8 * BLOCK + 3
HIT = 8 * BLOCK
SIZES: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1, "max_cpu_loras": 2}
Files = Callable[[str, int], str]


@pytest.fixture(autouse=True)
def _always_load(always_load: None) -> None:
    """All tests here."""


@pytest.fixture(scope="module")
def alone(tiny: Path) -> Iterator[Engine]:
    engine = Engine(tiny, None, **SIZES)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[Engine]:
    engine = Engine(tiny, {}, **SIZES)
    yield engine
    engine.close()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Writes an adapter to the folder of this name, over what is there; its path."""
    return lambda name, seed: str(adapter(tmp_path / name, seed))


def lora(number: int, path: str, name: str = "one", **given: Any) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, path, **given)


def run(engine: Engine, prompt: list[int], request: Any, tokens: int = 12) -> Done:
    (done,) = engine.run([prompt], tokens, lora=request)
    if engine.core.scheduler.connector is not None:
        engine.settle()
    engine.forget_device()  # the engine's own cache knows an adapter by name and path
    return done


class Both:
    """The engine with KVBM, and vLLM alone: whatever happens happens to both."""

    def __init__(self, engine: Engine, alone: Engine) -> None:
        self.engines = engine, alone

    def run(self, prompt: list[int], request: Any, tokens: int = 12) -> Done:
        done, expected = (run(each, prompt, request, tokens) for each in self.engines)
        assert done.tokens == expected.tokens
        return done

    def clear(self) -> None:
        """No worker holds any adapter."""
        for each in self.engines:
            for number in each.vllm.list_loras():
                each.vllm.remove_lora(number)

    def why(self, request: str | None = None) -> str:
        leader = self.engines[0].leader
        return " | ".join(leader.records[request or next(reversed(leader.records))].why)


@pytest.fixture
def both(engine: Engine, alone: Engine) -> Iterator[Both]:
    both = Both(engine, alone)
    both.clear()
    engine.leader.reset()
    yield both
    assert engine.leader.problems == []


def test_files_that_change_under_a_loaded_adapter(both: Both, files: Files, dice: random.Random) -> None:
    """vLLM keeps what it has loaded, whatever lies under the path, and under another path given to the number. So does
    a hit. Once it has given the adapter up, it reads the files as they are now."""
    prompt, request = prompt_of(dice, LENGTH), lora(1, files("one", 1))
    old = both.run(prompt, request)
    assert both.run(prompt, request).cached == HIT
    files("one", 2)
    kept = both.run(prompt, request)
    assert (kept.cached, kept.tokens) == (HIT, old.tokens)
    moved = both.run(prompt, lora(1, files("two", 3)))
    assert moved.tokens == old.tokens

    both.clear()
    new = both.run(prompt, request)
    assert (new.cached, new.tokens != old.tokens) == (0, True)
    assert both.run(prompt, request).cached == HIT
    both.clear()
    files("one", 1)
    back = both.run(prompt, request)
    assert (back.cached, back.tokens) == (HIT, old.tokens)  # it is the first again, wherever it lies


def test_an_adapter_that_was_given_up_for_others_is_the_same_when_it_comes_back(
    both: Both, files: Files, dice: random.Random
) -> None:
    prompts = [prompt_of(dice, LENGTH) for _ in range(3)]
    requests = [lora(number, files(f"a{number}", number), f"a{number}") for number in (1, 2, 3)]
    for turn in range(3):
        for prompt, request in zip(prompts, requests, strict=True):
            assert both.run(prompt, request).cached == (HIT if turn else 0)
            assert both.run(prompt, None, 4).cached == (HIT if turn else 0)


def test_several_adapters_at_once_with_less_room_than_adapters(both: Both, files: Files, dice: random.Random) -> None:
    """Loads make adapters resident while others are computed with."""
    prompts = [prompt_of(dice, LENGTH) for _ in range(12)]
    requests = [lora(number, files(f"a{number}", number), f"a{number}") for number in (1, 2, 3)]
    cached = []
    for _ in range(2):
        answers = []
        for each in both.engines:
            names = [each.add(prompt, 12, lora=requests[at % 3]) for at, prompt in enumerate(prompts)]
            each.drain()
            each.forget_device()
            answers.append([each.results[name].tokens for name in names])
            cached.append(sum(each.results[name].cached for name in names))
        both.engines[0].settle()
        assert answers[0] == answers[1]
    assert cached[2] >= 6 * HIT


@pytest.mark.parametrize("checked", [True, False], ids=["", "control"])
def test_files_replaced_between_the_look_up_and_the_load(
    both: Both, files: Files, dice: random.Random, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """Without the comparison in the worker the answer is another one: the control."""
    prompt, request = prompt_of(dice, LENGTH), lora(1, files("one", 1))
    engine, alone = both.engines
    both.run(prompt, request)
    both.clear()
    place = engine.leader.place

    def replaced(*given: Any) -> Admitted:
        if given[2]:
            files("one", 2)
        return place(*given)

    monkeypatch.setattr(engine.leader, "place", replaced)
    if not checked:
        monkeypatch.setattr(engine.leader._variants, "loading", lambda *_, **__: None)
    done = run(engine, prompt, request)
    expected = run(alone, prompt, request)
    assert (done.tokens == expected.tokens) == checked
    if checked:
        assert "a worker holds another adapter" in both.why()
        assert both.run(prompt, request).cached == 0  # nothing of the new one is stored, nothing of the old is promised
        assert both.run(prompt, request).cached == HIT


@pytest.mark.parametrize("kept", [True, False], ids=["", "control"])
def test_an_adapter_that_is_given_up_between_the_load_and_the_first_step(
    both: Both, files: Files, dice: random.Random, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """What was loaded is computed on with the adapter that it was loaded for."""
    prompt, request = prompt_of(dice, LENGTH), lora(1, files("one", 1))
    engine, _ = both.engines
    old = both.run(prompt, request)
    name = engine.add(prompt, 12, lora=request)
    engine.step()
    engine.settle()
    record = next(reversed(engine.leader.records.values()))
    assert (record.loaded, record.outcome) == (8, "computing")
    assert not engine.results[name].tokens
    if not kept:
        # What is put back is said in the step.
        monkeypatch.setattr(engine.leader._variants, "_awaited", {})
    engine.vllm.remove_lora(1)
    files("one", 2)
    engine.drain()
    engine.forget_device()
    assert (engine.results[name].tokens == old.tokens) == kept
    assert engine.results[name].cached == HIT
    if kept:
        both.engines[1].vllm.remove_lora(1)
        assert both.run(prompt, request).cached == 0  # it is not put back for others


def test_an_adapter_that_changes_while_a_request_runs(both: Both, files: Files, dice: random.Random) -> None:
    """Its blocks from before are stored, those from after are not."""
    prompt, request = prompt_of(dice, LENGTH), lora(1, files("one", 1))
    answers = []
    for each in both.engines:
        files("one", 1)
        name = each.add(prompt, 3 * BLOCK, lora=request)
        while len(each.results[name].tokens) < BLOCK:
            each.step()
        each.vllm.remove_lora(1)
        files("one", 2)
        each.drain()
        answers.append(each.results[name].tokens)
    assert answers[0] == answers[1]
    engine = both.engines[0]
    engine.settle()
    engine.forget_device()
    assert "its adapter changed while it ran" in both.why()
    engine.forget_device()
    alone = both.engines[1]
    alone.forget_device()
    assert both.run([*prompt, *answers[0]], request).cached == 0  # under the second adapter nothing was stored
    both.clear()
    files("one", 1)
    before = both.run([*prompt, *answers[0]], request).cached
    assert HIT <= before <= HIT + BLOCK


def test_an_adapter_that_is_read_again_at_every_step(
    both: Both, files: Files, dice: random.Random, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of it is loaded or stored, of its number neither while such a request runs."""
    prompt, other = prompt_of(dice, LENGTH), prompt_of(dice, LENGTH)
    path = files("one", 1)
    request, again = lora(1, path), lora(1, path, load_inplace=True)
    both.run(prompt, request)
    answers, stored = [], both.engines[0].leader.pool.statistics().registered
    for each in both.engines:
        files("one", 1)
        names = [each.add(prompt, 24, lora=request), each.add(other, 24, lora=again)]  # vLLM heeds the last
        while len(each.results[names[1]].tokens) < 8:
            each.step()
        files("one", 2)
        each.drain()
        each.forget_device()
        answers.append([each.results[name].tokens for name in names])
        assert not any(each.results[name].cached for name in names)
    assert answers[0] == answers[1]
    both.engines[0].settle()
    assert both.engines[0].leader.pool.statistics().registered == stored
    new = both.run(prompt, request)
    assert new.cached == 0
    assert both.run(prompt, request).cached == HIT
    assert caplog.text.count("read again at every step") <= 1


def test_after_a_restart_the_same_adapter_is_found_under_another_number(
    tiny: Path, alone: Engine, files: Files, dice: random.Random, tmp_path: Path
) -> None:
    prompt, path = prompt_of(dice, LENGTH), files("one", 1)
    kvbm = {"g3_gb": 0.1, "g3_dir": str(tmp_path / "disk"), "g2_blocks": 64}

    def start() -> Engine:
        return Engine(tiny, kvbm, **SIZES)

    first = start()
    old = run(first, prompt, lora(3, path))
    first.side.drain(10)
    first.close()
    second = start()
    again = run(second, prompt, lora(9, path))
    assert (again.cached, again.tokens) == (HIT, old.tokens)
    files("one", 2)
    other = run(second, prompt, lora(4, path))
    second.close()
    for number in alone.vllm.list_loras():
        alone.vllm.remove_lora(number)
    assert (other.cached, other.tokens) == (0, run(alone, prompt, lora(4, path)).tokens)
    assert other.tokens != old.tokens


def test_two_ranks(tiny: Path, files: Files, dice: random.Random) -> None:
    """Each compares its own."""
    prompt, request = prompt_of(dice, LENGTH), lora(1, files("one", 1))
    engine = Engine(tiny, {}, tensor_parallel_size=2, **SIZES)
    old = run(engine, prompt, request)
    again = run(engine, prompt, request)
    assert (again.cached, again.tokens) == (HIT, old.tokens)
    engine.vllm.remove_lora(1)
    files("one", 2)
    other = run(engine, prompt, request)
    assert (other.cached, other.tokens != old.tokens) == (0, True)
    assert run(engine, prompt, request).cached == HIT
    engine.close()
