"""What a request may ask for, and what is ignored."""

from __future__ import annotations

from typing import Any

import pytest

from kvbm.core.config import Settings
from kvbm.leader.requests import RequestParams


@pytest.mark.parametrize("params", [None, {}, {"kvbm": None}, {"kvbm": {}}, {"do_remote_prefill": True}])
def test_nothing_asked(params: dict[str, Any] | None) -> None:
    assert RequestParams.parse(params) == (RequestParams(True, True, 0, None), [])


def test_everything_asked() -> None:
    params = {"kvbm": {"load": False, "save": False, "priority": 100, "ttl": 2}, "other": 1}
    assert RequestParams.parse(params) == (RequestParams(False, False, 100, 2.0), [])
    assert RequestParams.parse({"kvbm": {"priority": 0, "ttl": 0.5}})[0] == RequestParams(ttl=0.5)
    params = {"kvbm": {"save_answer": True, "save_tokens": 0}}
    assert RequestParams.parse(params) == (RequestParams(save_answer=True, save_tokens=0), [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("load", 0),
        ("load", "false"),
        ("load", None),
        ("save", 1),
        ("save", []),
        ("priority", -1),
        ("priority", 101),
        ("priority", 1.0),
        ("priority", True),
        ("priority", "high"),
        ("ttl", 0),
        ("ttl", -1.5),
        ("ttl", True),
        ("ttl", "60"),
        ("ttl", None),
        ("ttl", float("nan")),
        ("ttl", float("inf")),
        ("ttl", 10**400),
        ("save_answer", 0),
        ("save_tokens", -1),
        ("save_tokens", True),
        ("save_tokens", 1.5),
        ("save_tokens", 10**400),
        ("pull_from", ""),
        ("pull_from", "x" * 101),
        ("lod", True),
        ("", 1),
    ],
)
def test_a_wrong_value_is_ignored_and_named(name: str, value: Any) -> None:
    params, wrong = RequestParams.parse({"kvbm": {name: value, **({"save": False} if name != "save" else {})}})
    assert params == RequestParams(save=name == "save")
    (sentence,) = wrong
    assert sentence.startswith(f'kv_transfer_params["kvbm"][{name!r}] = ')
    assert sentence.endswith(" is not understood: ignored")
    if len(repr(value)) < 20:
        assert f" = {value!r} is" in sentence


def test_what_is_said_of_a_request_is_short_whatever_a_client_sends() -> None:
    deep: Any = "x"
    for _ in range(500):
        deep = [deep, "y" * 1000]
    for ours in ({"colour" * 50_000: 1, "a\nb": "x" * 300_000}, {str(i): i for i in range(300_000)}, {"ttl": deep}):
        _, wrong = RequestParams.parse({"kvbm": ours})
        assert 0 < len(wrong) <= 8
        assert all(len(sentence) < 1000 and "\n" not in sentence for sentence in wrong)
    _, (sentence,) = RequestParams.parse({"kvbm": ["x" * 300_000]})
    assert len(sentence) < 1000


@pytest.mark.parametrize(
    ("params", "settings", "kept"),
    [
        ({}, {}, 10_000),
        ({"save_answer": False}, {}, 100),
        ({}, {"save_answers": False}, 100),
        ({"save_answer": True}, {"save_answers": False}, 10_000),
        ({"save_tokens": 40}, {}, 40),
        ({"save_tokens": 140}, {}, 140),
        ({"save_tokens": 140}, {"save_answers": False}, 100),
        ({}, {"save_tokens": 0}, 0),
        ({"save_tokens": 40}, {"save_tokens": 20}, 40),
    ],
)
def test_what_is_worth_keeping(params: dict[str, Any], settings: dict[str, Any], kept: int) -> None:
    """Of a prompt of 100 tokens with an answer of 9,900."""
    assert min(RequestParams(**params).kept_tokens(Settings(**settings), 100), 10_000) == kept


@pytest.mark.parametrize("value", [True, 1, "load", ["kvbm"]])
def test_nothing_that_holds_parameters(value: Any) -> None:
    params, (sentence,) = RequestParams.parse(value)
    assert params == RequestParams()
    assert sentence == f"kv_transfer_params must be an object, not {value!r}: ignored"


@pytest.mark.parametrize("value", [True, 1, "load", [("load", False)]])
def test_not_an_object(value: Any) -> None:
    params, (sentence,) = RequestParams.parse({"kvbm": value})
    assert params == RequestParams()
    assert sentence == f'kv_transfer_params["kvbm"] must be an object, not {value!r}: ignored'
