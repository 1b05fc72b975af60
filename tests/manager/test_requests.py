"""What a request may ask for, and what is ignored."""

from __future__ import annotations

from typing import Any

import pytest

from kvbm.manager.requests import RequestParams


@pytest.mark.parametrize("params", [None, {}, {"kvbm": None}, {"kvbm": {}}, {"do_remote_prefill": True}])
def test_nothing_asked(params: dict[str, Any] | None) -> None:
    assert RequestParams.parse(params) == (RequestParams(True, True, 0, None), [])


def test_everything_asked() -> None:
    params = {"kvbm": {"load": False, "save": False, "priority": 100, "ttl": 2}, "other": 1}
    assert RequestParams.parse(params) == (RequestParams(False, False, 100, 2.0), [])
    assert RequestParams.parse({"kvbm": {"priority": 0, "ttl": 0.5}})[0] == RequestParams(ttl=0.5)


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
        ("lod", True),
        ("", 1),
    ],
)
def test_a_wrong_value_is_ignored_and_named(name: str, value: Any) -> None:
    params, wrong = RequestParams.parse({"kvbm": {name: value, **({"save": False} if name != "save" else {})}})
    assert params == RequestParams(save=name == "save")
    assert wrong == [f'kv_transfer_params["kvbm"]["{name}"] = {value!r} is not understood: ignored']


@pytest.mark.parametrize("value", [True, 1, "load", [("load", False)]])
def test_not_an_object(value: Any) -> None:
    params, (sentence,) = RequestParams.parse({"kvbm": value})
    assert params == RequestParams()
    assert sentence == f'kv_transfer_params["kvbm"] must be an object, not {value!r}: ignored'
