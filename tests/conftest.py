from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.leader.roles import Stage


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
