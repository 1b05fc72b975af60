"""Marks that several suites use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest

Test = TypeVar("Test", bound=Callable[..., object])


def apart(test: Test) -> Test:
    """No engine, but a process that imports a lot, or seconds of waiting: not part of `make test-fast`."""
    return pytest.mark.e2e(pytest.mark.untimed(test))
