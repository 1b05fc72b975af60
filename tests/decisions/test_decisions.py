"""The decision log: see decisions/README.md. What changes it on purpose is recorded anew, in a commit of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from msgspec.structs import fields

from kvbm.blocks import Pool
from kvbm.link.messages import Step
from tests.decisions.__main__ import crashing, each, recorded, run
from tests.decisions.history import History, digest
from tests.decisions.scene import PLANS
from tests.decisions.words import MESSAGES, STEP, names


def test_the_first_histories_are_as_recorded() -> None:
    assert run(0) == recorded()[0], "see tests/decisions/README.md: --against CHECKOUT shows what is new"


def test_a_history_is_the_same_in_every_process() -> None:
    """Whatever order its sets and dicts have."""
    command = [sys.executable, "-m", "tests.decisions", "--each", "--histories", str(len(PLANS))]
    done = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "1"}, check=True, capture_output=True, text=True)
    with crashing():
        assert done.stdout.split() == [each(number) for number in range(len(PLANS))]


def test_another_order_is_another_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: roots go before leaves."""
    with crashing():
        touch, before = Pool.touch, [each(number) for number in range(6)]

    def turned(pool: Pool, keys: Any) -> None:
        touch(pool, [*reversed(keys)])

    monkeypatch.setattr(Pool, "touch", turned)
    with crashing():
        assert [digest(History(number).run()) for number in range(6)] != before


@pytest.mark.parametrize("message", [*MESSAGES, Step])
def test_all_of_a_message_is_written(message: type) -> None:
    """A field that is not in its table would change unnoticed."""
    told = STEP if message is Step else MESSAGES[message][1]
    assert sorted(names(told)) == sorted(field.name for field in fields(message))
