"""The router's choice of engines, the bodies it sends, and the options it refuses."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import Result

from kvbm.cli.route import bodies, choice, command
from kvbm.cli.route.bodies import PIECE, Completion
from kvbm.cli.route.choice import IMBALANCE, Choice, Engine

# -- choice --


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def of(count: int, **options: Any) -> tuple[Choice, list[Engine]]:
    engines = [Engine(f"e{number}", f"http://e{number}") for number in range(count)]
    return Choice(engines, **options), engines


def sent(chosen: Choice, keys: list[int]) -> str:
    """The engine that gets it; it ends at once."""
    engine = chosen.begin(keys)
    assert engine is not None
    chosen.end(engine)
    return engine.name


def test_longest_prefix_wins_over_turn_and_load() -> None:
    chosen, _ = of(3)
    assert [sent(chosen, keys) for keys in ([1, 2, 3], [7], [1, 5])] == ["e0", "e1", "e0"]
    chosen.begin([1])
    assert sent(chosen, [1, 2, 3, 4]) == "e0"
    assert sent(chosen, [7, 1, 2, 3]) == "e1"  # though e0 knows more of it, but not from its beginning
    assert sent(chosen, [99]) == "e2"  # nobody knows it, and it is its turn
    assert sent(chosen, [98]) == "e1"  # nobody knows it, and e0, whose turn it is, has something to do


def test_equal_prefixes_go_to_the_less_busy_and_then_in_turn() -> None:
    chosen, engines = of(3)
    for engine in engines[:2]:
        engine.remember([1, 2])
    assert chosen.begin([1, 2, 3]) is engines[0]
    assert chosen.begin([1, 2, 9]) is engines[1]
    assert [chosen.begin([1, 2]) for _ in range(2)] == engines[:2]


def test_turns_go_round() -> None:
    chosen, engines = of(3)
    assert [sent(chosen, []) for _ in range(4)] == ["e0", "e1", "e2", "e0"]
    assert [chosen.begin() for _ in range(4)] == [engines[1], engines[2], engines[0], engines[1]]


def test_a_prefix_does_not_pile_everything_on_one_engine() -> None:
    chosen, engines = of(2)
    got = [chosen.begin([1]) for _ in range(IMBALANCE + 2)]
    assert got == [engines[0]] * (IMBALANCE + 1) + [engines[1]]
    assert chosen.begin([1]) is engines[1]  # which knows it now, too, and has less to do
    for _ in range(IMBALANCE):
        chosen.end(engines[0])
    assert engines[0].in_flight == 1


def test_an_engine_that_fails_is_left_out_for_longer_and_longer() -> None:
    clock = Clock()
    chosen, (first, second) = of(2, clock=clock)
    waits = []
    for _ in range(7):
        chosen.failed(first)
        chosen.failed(first)  # another request that failed with it
        waits.append(chosen.wait_s(first))
        assert sent(chosen, []) == second.name
        clock.now += waits[-1] - 0.01
        assert sent(chosen, []) == second.name
        clock.now += 0.01
        assert sent(chosen, []) == first.name
    assert waits == [1, 2, 4, 8, 16, 30, 30]
    chosen.reached(first)
    chosen.failed(first)
    assert chosen.wait_s(first) == 1


def test_where_all_are_down() -> None:
    clock = Clock()
    for last_resort in (False, True):
        chosen, engines = of(2, clock=clock, last_resort=last_resort)
        for engine in engines:
            chosen.failed(engine)
            clock.now += 0.1
        assert chosen.begin() is (engines[0] if last_resort else None)
        assert chosen.begin(without=engines[:1]) is (engines[1] if last_resort else None)
        assert chosen.begin(without=engines) is None


def test_what_is_remembered_is_bounded_and_ends_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "PIECES", 4)
    engine = Engine("e", "http://e")
    engine.remember([1, 2, 3])
    engine.remember([1, 8, 9])
    assert [engine.known(keys) for keys in ([1, 2, 3], [1, 8, 9])] == [2, 3]
    engine.remember([1, 2])
    engine.remember([5])
    assert [engine.known(keys) for keys in ([1, 2], [1, 8, 9], [5])] == [2, 2, 1]


# -- bodies --


def parsed(**body: Any) -> Completion:
    completion = Completion.parse(json.dumps(body).encode())
    assert completion is not None
    return completion


def test_prefill_is_asked_for_one_token_of_the_same_prompt() -> None:
    asked = {
        "model": "m", "prompt": "p", "seed": 7, "temperature": 0.5, "tools": [1], "lora": "x", "max_tokens": 99,
        "min_tokens": 9, "n": 3, "best_of": 4, "stream": True, "stream_options": {"include_usage": True}, "echo": True,
        "logprobs": 5, "top_logprobs": 2, "prompt_logprobs": 1, "use_beam_search": True,
    }  # fmt: skip
    copy = json.loads(parsed(**asked).for_prefill)
    kept = {name: asked[name] for name in ("model", "prompt", "seed", "temperature", "tools", "lora")}
    load = {"kv_transfer_params": {"kvbm": {"load": True}}}
    assert copy == kept | {"max_tokens": 1, "n": 1, "stream": False} | load
    assert json.loads(parsed(prompt="p", max_completion_tokens=9).for_prefill)["max_completion_tokens"] == 1


def test_decode_gets_the_request_as_it_came() -> None:
    raw = (
        b'{"n": 3, "logprobs": 5, "echo": true, "seed": 123456789012345678901234567890, "stream": true, "best_of": 3,'
        b' "stream_options": {"include_usage": true}, "temperature": 1e-9, "stop": ["\\ud800", "\xc3\xa4"], "x": NaN}'
    )
    completion = Completion.parse(raw)
    assert completion is not None
    copy = completion.for_decode("p1")
    added = b', "kv_transfer_params": {"kvbm": {"pull_from": "p1"}}}'
    assert copy == raw.replace(b"1e-9", b"1e-09").replace(b"\xc3\xa4", b"\\u00e4")[:-1] + added


def test_parameters_of_the_user_are_kept() -> None:
    params = {"other": 1, "kvbm": {"priority": 9, "load": False, "pull_from": "wherever"}}
    completion = parsed(prompt="p", kv_transfer_params=params)
    ours = {"priority": 9, "load": False}
    assert json.loads(completion.for_prefill)["kv_transfer_params"] == {"other": 1, "kvbm": ours}
    assert json.loads(completion.for_decode("p"))["kv_transfer_params"]["kvbm"] == ours | {"pull_from": "p"}
    empty = parsed(prompt="p", kv_transfer_params={"kvbm": None})
    assert json.loads(empty.for_decode("p"))["kv_transfer_params"] == {"kvbm": {"pull_from": "p"}}


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 5000, b'{"kv_transfer_params": 1}', b'{"kv_transfer_params": []}',
        b'{"kv_transfer_params": {"kvbm": "x"}}', b'{"kv_transfer_params": {"kvbm": false}}',
    ],
)  # fmt: skip
def test_what_cannot_be_changed_is_left_to_the_engine(raw: bytes) -> None:
    assert Completion.parse(raw) is None


def test_nesting_that_can_be_read_but_not_written_is_left_to_the_engine() -> None:
    both = set()
    for depth in range(700, 1000):
        completion = Completion.parse(b'{"messages": ' + b"[" * depth + b"]" * depth + b"}")
        both.add(completion is None)
        if completion is not None:
            completion.for_decode("p")
    assert both == {True, False}


def common(one: dict[str, Any], other: dict[str, Any]) -> tuple[int, int]:
    """The keys that both have from the first on, and how many `one` has."""
    first, second = parsed(**one).keys, parsed(**other).keys
    same = next((count for count, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
    return (min(len(first), len(second)) if same is None else same), len(first)


def test_keys_of_a_prompt() -> None:
    text = "".join(chr(65 + number % 26) for number in range(PIECE * 4 + 9))
    assert parsed(prompt=text[: PIECE - 1]).keys == []
    assert common({"prompt": text}, {"prompt": text[: PIECE * 2] + "?" + text[PIECE * 2 + 1 :]}) == (2, 4)
    assert common({"prompt": text}, {"prompt": "?" + text[1:]}) == (0, 4)
    assert common({"prompt": text}, {"prompt": text, "seed": 1, "stream": True}) == (4, 4)
    for root in ({"model": "other"}, {"cache_salt": "s"}):
        assert common({"prompt": text}, {"prompt": text} | root) == (0, 4)
    tokens = list(range(1000, 2000))
    same, count = common({"prompt": tokens}, {"prompt": [*tokens[:500], 1, *tokens[501:]]})
    assert 0 < same < count
    assert len(parsed(prompt="\ud800" * PIECE).keys) == 3  # what has no UTF-8 has keys nevertheless


def test_keys_of_a_conversation_grow_with_it() -> None:
    turns = [{"role": "user", "content": f"{number} " * 300} for number in range(3)]
    reordered = [{"content": turn["content"], "role": turn["role"]} for turn in turns]
    first = len(parsed(messages=turns[:2]).keys)
    assert first > 3
    assert common({"messages": turns[:2]}, {"messages": reordered}) == (first, first)
    assert common({"messages": turns, "tools": [{"name": "f"}]}, {"messages": turns})[0] == 0


def test_what_is_hashed_of_a_prompt_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MOST_PIECES", 3)
    assert len(parsed(prompt="x" * PIECE * 9).keys) == 3


# -- options --

P, D = "--prefill", "--decode"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "--prefill is missing"),
        ([D, "http://d:1"], "--prefill is missing"),
        ([P, "a=http://p:1"], "--decode is missing"),
        ([P, "http://p:1", D, "http://d:1"], "the name is missing"),
        ([P, "http://p:1/?a=b", D, "http://d:1"], "the name is missing"),
        ([P, "=http://p:1", D, "http://d:1"], "the name is missing"),
        ([P, "a=p:1", D, "http://d:1"], "no URL"),
        ([P, "a=http://p:1", D, "ftp://d:1"], "no URL"),
        ([P, "a=http://p:1", D, "http://d:port"], "no URL"),
        ([P, "a=http://p:1", D, "http://:1"], "no URL"),
        ([P, "a=http://p:1", D, "http://d:1 "], "no URL"),
        ([P, "a=http://p:1", D, "http://me:secret@d:1"], "no user, password, query or fragment"),
        ([P, "a=http://p:1", D, "http://d:1?x=y"], "no user, password, query or fragment"),
        ([P, "a=http://p:1", P, "a=http://p:2", D, "http://d:1"], "the name a is given twice"),
        ([P, "a=http://p:1", P, "b=http://p:1", D, "http://d:1"], "the URL http://p:1 is given twice"),
        ([P, "a=http://p:1", D, "http://d:1", D, "http://d:1/"], "the URL http://d:1 is given twice"),
        ([P, "a=http://p:1", D, "http://p:1"], "the URL http://p:1 is given twice"),
    ],
)
def test_bad_options_end_at_once(kvbm: Callable[..., Result], options: list[str], sentence: str) -> None:
    result = kvbm("route", *options)
    assert result.exit_code == 2
    assert result.stderr.startswith("kvbm: ")
    assert result.stderr.count("\n") == 1
    assert sentence in result.stderr
    assert "secret" not in result.stderr


def test_good_options() -> None:
    fillers, answerers = command.engines(["a=http://p:1/", "b=https://[::1]:2/x"], ["http://d", "http://e:9"])
    assert [(engine.name, engine.url) for engine in fillers] == [("a", "http://p:1"), ("b", "https://[::1]:2/x")]
    assert [(engine.name, engine.url) for engine in answerers] == [(url, url) for url in ("http://d", "http://e:9")]


def test_without_aiohttp(kvbm: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda _: None)
    result = kvbm("route", P, "a=http://p:1", D, "http://d:1")
    assert (result.exit_code, result.stderr) == (
        1,
        "kvbm: `kvbm route` needs aiohttp: pip install 'aiohttp>=3.9'\n",
    )


def test_a_port_that_is_taken(kvbm: Callable[..., Result]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = kvbm("route", P, "a=http://p:1", D, "http://d:1", "--port", str(port))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"kvbm: cannot listen on 127.0.0.1, port {port}: ")
