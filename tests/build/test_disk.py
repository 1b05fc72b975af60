"""The disk tier, put together, where something is missing."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvbm.abc.policy import Drop
from kvbm.build import disk as build_disk
from kvbm.core.config import load
from kvbm.core.errors import Broken, ConfigError
from kvbm.policy.placements import WriteThrough
from kvbm.stores.disk.folder import Folder, NamespaceFolder
from kvbm.transfer import file
from tests.build.test_leader import start


def settings(**given: Any) -> Any:
    return load(environ={}, extra=given).settings


@pytest.fixture
def no_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(depth: int) -> None:
        raise OSError(errno.EPERM, "no")

    monkeypatch.setattr(file, "Ring", refuse)


def test_without_io_uring_as_many_threads_as_it_takes(no_rings: None) -> None:
    with closing(build_disk.transport(settings())) as transport:
        assert transport.engine == "threads"
        assert len(transport._threads) == 16
    with pytest.raises(ConfigError, match=r"setting g3_engine: io_uring is refused: a seccomp filter"):
        build_disk.transport(settings(g3_engine="io_uring"))


@pytest.mark.parametrize("what", ["taken", "index", "rank"])
def test_what_is_wrong_with_the_disk_costs_the_disk_tier_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise Broken("it is broken")

    match what:
        case "taken":
            other = Folder.claim(tmp_path / "g3", "somebody")
        case "index":
            monkeypatch.setattr(NamespaceFolder, "recover", broken)
        case "rank":
            monkeypatch.setattr(build_disk, "Shard", broken)
    given = {"g2_blocks": 3, "g3_blocks": 3, "g3_dir": str(tmp_path / "g3")}
    side = start(tmp_path, **given)
    assert side.leader.core.lower.stack is None
    assert side.leader.core.lower.degraded().keys() == {"g3"}
    assert side.leader.core.health.problems == []
    with pytest.raises(Broken, match=r"engine somebody|it is broken"):
        start(tmp_path, **given, strict=True)
    if what == "taken":
        other.close()
    Folder.claim(tmp_path / "g3", "next").close()  # nobody keeps the lock


def test_a_key_that_cannot_be_used_ends_the_start(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("too short")
    key.chmod(0o600)
    with pytest.raises(ConfigError, match="setting g3_key_file"):
        start(tmp_path, g3_blocks=3, g3_key_file=str(key))


class Both(WriteThrough):
    """New blocks go to both, and none rises."""

    def promote(self, tier: str, tiers: Sequence[str]) -> Drop:
        return Drop()


def test_a_placement_that_an_engine_does_not_follow_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_disk, "placement", lambda name: Both())
    with pytest.raises(ConfigError, match="an engine follows write-through and exclusive alone"):
        start(tmp_path, g3_blocks=3)
    start(tmp_path)  # without a disk it has nothing to say


class Unfinished(WriteThrough):
    """Its author was not done."""

    def evict(self, tier: str, tiers: Sequence[str]) -> Drop:
        raise KeyError(tier)


def test_a_placement_that_raises_ends_the_start_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_disk, "placement", lambda name: Unfinished())
    with pytest.raises(ConfigError, match=r"setting placement: 'write-through' cannot be used: KeyError\('g2'\)"):
        start(tmp_path, g3_blocks=3)
