from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kvbm.cli.demo.seaweed import Seaweed
from tests.leader.roles import Stage
from tests.seaweed import started
from tests.tiers.objects.faulty import Faulty

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


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A real S3 server with its bucket."""
    server = started(tmp_path_factory.mktemp("weed"))
    yield server
    server.kill()


@pytest.fixture
def weed_user(weed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Seaweed:
    """That server, whose user this process is."""
    for name, value in weed.credentials.items():
        monkeypatch.setenv(name, value)
    return weed


@pytest.fixture
def faulty(weed_user: Seaweed) -> Iterator[Faulty]:
    """A server in front of that one, which spoils what passes."""
    with closing(Faulty(weed_user.port)) as proxy:
        yield proxy


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    where = tmp_path / "mnt"
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", where], capture_output=True).returncode:
        pytest.skip("only root may mount")
    yield where
    subprocess.run(["umount", "-l", where], capture_output=True, check=False)


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
