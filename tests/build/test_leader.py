"""Leader and workers find each other, in one process; G2 gets its size, or the start says why not."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from kvbm.build import disk as build_disk
from kvbm.build import leader as build
from kvbm.build import memory
from kvbm.build.leader import LeaderSide, build_leader
from kvbm.build.place import Place, channel_path
from kvbm.build.worker import build_worker
from kvbm.core.config import load
from kvbm.core.errors import Broken, ConfigError
from kvbm.core.keys import Namespace
from kvbm.testing.transport import HostMemory

ROWS = (4096, 4096)
NAMESPACE = Namespace({"model": "m"}, "w")


@pytest.fixture(autouse=True)
def _nobody_else_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "promised", lambda: 0)


def start(
    run_dir: Path, *, ranks: int = 1, other: int | None = None, layers: Sequence[str] = ("", ""), **settings: Any
) -> LeaderSide:
    """A leader and its workers, all closed again; rank `other` runs another configuration."""
    resolved = load(environ={}, extra={"run_dir": str(run_dir), "init_timeout_s": 30, **settings})
    place = Place("e", ranks)
    with ExitStack() as stack:
        for rank in range(ranks):
            names = Namespace({"model": "other"}, "w") if rank == other else NAMESPACE
            memory = HostMemory(ROWS, 4)
            worker = build_worker(
                resolved.settings,
                place,
                names,
                memory.region,
                rank,
                {"kv.backend": layers[rank]} if layers[rank] else {},
            )
            stack.enter_context(closing(worker))
        side = build_leader(resolved, place, NAMESPACE, block_tokens=32, shares_device_blocks=True)
        side.close()
    return side


def test_other_layers_on_a_rank_are_another_namespace(tmp_path: Path) -> None:
    seen = {
        start(tmp_path, ranks=2, g2_gb=0.001, layers=layers).control.status()["fingerprint"]
        for layers in (("", ""), ("CPU_ATTN vec", "CPU_ATTN vec"), ("CPU_ATTN vec", "CPU_ATTN amx"))
    }
    assert len(seen) == 3
    assert NAMESPACE.fingerprint in seen


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_size_is_the_total_over_ranks(tmp_path: Path, ranks: int) -> None:
    side = start(tmp_path, ranks=ranks, g2_gb=0.001)
    assert side.leader.core.pool.statistics().total == 1_000_000 // (8192 * ranks)
    assert side.leader.core.health.problems == []
    assert list(tmp_path.iterdir()) == []


def test_blocks_win(tmp_path: Path) -> None:
    assert start(tmp_path, g2_gb=0.001, g2_blocks=3).leader.core.pool.statistics().total == 3


def test_the_order_of_g2_by_name(tmp_path: Path) -> None:
    assert start(tmp_path, g2_blocks=3, g2_order="arc").leader.core.health.problems == []
    with pytest.raises(ConfigError, match=r"setting g2_order \(from extra config\): there is no 'lruu'; there are"):
        start(tmp_path, g2_blocks=3, g2_order="lruu")


def test_a_share_of_what_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: (1 << 30) + 819_200)
    assert start(tmp_path, g2_share=0.5).leader.core.pool.statistics().total == 50


def test_what_another_engine_still_touches_is_not_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: (1 << 30) + 819_200)
    monkeypatch.setattr(memory, "promised", lambda: 409_600)
    assert start(tmp_path, g2_share=0.5).leader.core.pool.statistics().total == 25
    with pytest.raises(ConfigError, match=r"G2 of 51 blocks.* 0\.00 GB for engines that are starting"):
        start(tmp_path, g2_blocks=51)


@pytest.mark.parametrize(
    ("settings", "free", "problem"),
    [
        ({"g2_gb": 1e-6}, 1 << 40, r"g2_gb \(from extra config\): G2 would be smaller than one block of 8,192 bytes"),
        ({"g2_blocks": 3}, (1 << 30) + 8192, r"g2_blocks \(from extra config\): G2 of 3 blocks, .* does not fit: only"),
    ],
)
def test_sizes_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], free: int, problem: str
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: free)
    with pytest.raises(ConfigError, match=problem):
        start(tmp_path, **settings)
    with pytest.raises(ConfigError, match=problem):
        build.check_size(load(environ={}, extra=settings), 8192)


def test_a_size_that_nobody_gave_is_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 0)
    build.check_size(load(environ={}), 8192)


@pytest.mark.parametrize(("free", "disk"), [(1 << 30, {}), ((1 << 30) + 8192 * 3, {"g3_blocks": 2})])
def test_a_machine_with_too_little_memory_is_no_wrong_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, disk: dict[str, Any]
) -> None:
    """The engine goes on without KVBM: nobody said how large G2 is to be."""
    monkeypatch.setattr(memory, "available_memory", lambda: free)
    with pytest.raises(Broken, match=r"only 0\.00 GB of memory are available for G2"):
        start(tmp_path, **disk)


@pytest.mark.parametrize(("folder", "sentence"), [(None, "no home folder"), ("\udcff", "is not UTF-8")])
def test_without_a_place_for_the_disk_tier_there_is_none(tmp_path: Path, folder: str | None, sentence: str) -> None:
    settings = load(environ={}, extra={"run_dir": str(tmp_path)}).settings
    settings = settings.model_copy(update={"cache_dir": None, "g3_dir": folder and tmp_path / folder})
    with pytest.raises(Broken, match=sentence):
        build_disk.disk_folder(settings, Place("e", 1))


def test_a_worker_of_another_configuration(tmp_path: Path) -> None:
    with pytest.raises(Broken, match="the worker of rank 0 runs another configuration than the scheduler"):
        start(tmp_path, other=0, g2_blocks=3)


def test_a_worker_that_does_not_come(tmp_path: Path) -> None:
    resolved = load(environ={}, extra={"run_dir": str(tmp_path), "init_timeout_s": 0.05})
    with pytest.raises(Broken, match="only 0 of 1 workers came"):
        build_leader(resolved, Place("e", 1), NAMESPACE, block_tokens=32, shares_device_blocks=True)


def test_a_stranger_at_the_channel_is_sent_away(tmp_path: Path) -> None:
    """Another engine with this id looks whether the socket is alive, connects and leaves."""
    path = channel_path(load(environ={}, extra={"run_dir": str(tmp_path)}).settings, "e")
    gone = threading.Event()

    def knock() -> None:
        while not gone.is_set():
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(str(path)) == 0:
                    gone.set()

    thread = threading.Thread(target=knock)
    thread.start()
    resolved = load(environ={}, extra={"run_dir": str(tmp_path), "init_timeout_s": 30, "g2_blocks": 3})
    place, sides = Place("e", 1), list[LeaderSide]()
    leader = threading.Thread(
        target=lambda: sides.append(
            build_leader(resolved, place, NAMESPACE, block_tokens=32, shares_device_blocks=True)
        )
    )
    leader.start()
    assert gone.wait(30)
    thread.join(30)
    with closing(build_worker(resolved.settings, place, NAMESPACE, HostMemory(ROWS, 4).region, 0)):
        leader.join(60)
        sides[0].close()


def test_a_wrapper_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"transport_wrapper.*cannot be used"):
        start(tmp_path, transport_wrapper="kvbm.testing.faults:nothing")
