from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.leader.roles import Stage

_HERE = Path(__file__).parent
_APART = {
    "build/test_g9.py", "stores/objects/test_s3.py", "tiers/objects/test_whole.py",
    "tiers/peers/test_rank.py",
    "tiers/peers/test_whole.py", "transfer/nixl/test_suites.py",
}  # fmt: skip
"""No engine, but processes that move blocks, and seconds of waiting: not part of `make test-fast`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_HERE) and item.path.relative_to(_HERE).as_posix() in _APART:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.untimed)


@pytest.fixture
def make_stage() -> Iterator[Callable[..., Stage]]:
    """Stages that are checked for leaks at the end."""
    stages: list[Stage] = []

    def make(*args: object, **kwargs: object) -> Stage:
        stages.append(Stage(*args, **kwargs))  # type: ignore[arg-type]
        return stages[-1]

    yield make
    for stage in stages:
        stage.close()


@pytest.fixture
def stage(make_stage: Callable[..., Stage]) -> Stage:
    return make_stage()
