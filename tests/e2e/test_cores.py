"""As many cores compute with KVBM as without it, and one is left to the scheduler of vLLM."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvbm.cli import serve
from tests.e2e.engine import CONNECTOR, minor
from tests.e2e.test_serve import KVBM, SMALL, VLLM, model, served
from tests.ports import free_port

__all__ = ["model"]


def sentences_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("kvbm")]


def warn_if_fewer(ranks: int, backend: str = "mp") -> None:
    from kvbm.connect.vllm import cores

    cores.warn_if_fewer(config(ranks, connector=True, backend=backend))


def config(ranks: int, *, connector: bool, backend: str = "mp") -> Any:
    parallel = SimpleNamespace(
        local_world_size=ranks,
        data_parallel_rank_local=0,
        _api_process_count=1,
        distributed_executor_backend=backend,
        assigned_physical_gpu_ids=None,
    )
    return SimpleNamespace(parallel_config=parallel, kv_transfer_config=SimpleNamespace() if connector else None)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes this one look as if every rank had a memory node with so many cores of two logical CPUs each."""
    import vllm.utils.cpu_resource_utils as resources

    def become(each: int, ranks: int, own: str | None = None, bind: str | None = None) -> None:
        if ranks > 1 and minor() == 30:
            pytest.skip("vLLM 0.30 keeps one core, with a connector two, of all ranks together")
        cpus = [
            resources.LogicalCPUInfo(id=core + each * ranks * half, physical_core=core, numa_node=core // each)
            for half in range(2)
            for core in range(each * ranks)
        ]
        monkeypatch.setattr(resources, "get_allowed_cpu_list", lambda: cpus)
        monkeypatch.setattr(resources, "get_visible_memory_node", lambda *_: list(range(ranks)))
        for name, text in ((serve.RESERVED, own), ("VLLM_CPU_OMP_THREADS_BIND", bind)):
            monkeypatch.delenv(name, raising=False)
            if text is not None:
                monkeypatch.setenv(name, text)

    return become


def bound(ranks: int, *, connector: bool) -> list[list[int]]:
    """The cores that vLLM gives to each rank's threads."""
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    lists: list[list[int]] = OMPProcessManager(config(ranks, connector=connector)).cpu_lists
    return lists


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("each", [1, 2, 4, 8, 16])
def test_what_serve_sets_binds_as_many_threads_as_without_kvbm(machine: Any, each: int, ranks: int) -> None:
    machine(each, ranks)
    alone = bound(ranks, connector=False)
    machine(each, ranks, serve.reserved_cores(["-tp", str(ranks)]))
    assert min(map(len, bound(ranks, connector=True))) == min(map(len, alone)) == max(1, each - 1)


@pytest.mark.parametrize(
    ("each", "ranks", "own", "said"),
    [
        (1, 1, None, None),
        (2, 1, None, "on all 2 cores"),
        (2, 2, None, "on all 4 cores"),
        (4, 1, None, "on 2 of 4 cores, without a KV connector it would on 3"),
        (4, 2, None, "on 4 of 8 cores, without a KV connector it would on 6"),
        (16, 1, None, "on 14 of 16 cores"),
        (2, 1, "1", None),
        (16, 1, "1", None),
        (16, 1, "4", None),
        (2, 1, "2", "on all 2 cores"),
        (2, 1, "0", "on all 2 cores"),
    ],
)
def test_the_connector_says_what_to_set(
    machine: Any, caplog: pytest.LogCaptureFixture, each: int, ranks: int, own: str | None, said: str | None
) -> None:
    machine(each, ranks, own)
    with caplog.at_level(logging.WARNING):
        warn_if_fewer(ranks)
    sentences = sentences_of(caplog)
    if said is None:
        assert sentences == []
    else:
        (sentence,) = sentences
        assert said in sentence
        assert sentence.endswith(f"Set VLLM_CPU_NUM_OF_RESERVED_CPU={ranks}, as `kvbm serve` does")


def test_it_says_nothing_where_cores_were_chosen_or_cannot_be_known(
    machine: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.utils import ompmultiprocessing

    for bind in ("nobind", "0-1"):
        machine(2, 1, bind=bind)
        warn_if_fewer(1)
    machine(2, 1)
    warn_if_fewer(1, backend="uni")
    monkeypatch.delattr(ompmultiprocessing, "OMPProcessManager")
    warn_if_fewer(1)
    assert sentences_of(caplog) == []


def computes_on(command: list[str], port: int, folder: Path) -> tuple[list[int], str]:
    """The cores that the engine binds its OpenMP threads to, one each, and what it said at its start."""
    folder.mkdir()
    with served(command, port, folder, KVBM_G2_GB="0.5") as server:
        server.wait_for("Application startup complete")
        (worker,) = (pid for pid in server.living() if "VLLM::Worker" in Path(f"/proc/{pid}/cmdline").read_text())
        text = Path(f"/proc/{worker}/environ").read_text()
        variables = dict(line.partition("=")[::2] for line in text.split("\0"))
        places = next(
            variables[name] for name in ("KMP_AFFINITY", "GOMP_CPU_AFFINITY", "OMP_PLACES") if name in variables
        )
        found = sorted(map(int, re.findall(r"\d+", places)))
        assert len(found) == int(variables["OMP_NUM_THREADS"])
        return found, server.output()


@pytest.fixture(scope="module")
def alone(model: str, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """The cores that vLLM computes on without KVBM."""
    port = free_port()
    command = [*VLLM, "--model", model, "--port", str(port), *SMALL]
    return computes_on(command, port, tmp_path_factory.mktemp("plain") / "out")[0]


def test_an_engine_of_serve_computes_on_the_same_cores_as_one_without_kvbm(alone: list[int], tmp_path: Path) -> None:
    port = free_port()
    command = [*KVBM, "serve", "smollm2", "--port", str(port), *SMALL]
    computing, output = computes_on(command, port, tmp_path / "out")
    assert computing == alone
    assert "VLLM_CPU_NUM_OF_RESERVED_CPU=1: as many compute threads as without KVBM" in output
    assert "Set VLLM_CPU_NUM_OF_RESERVED_CPU" not in output
    allowed = os.sched_getaffinity(0)
    assert len(allowed) == 1 or allowed - set(computing), "no core is left to the scheduler"


def test_under_plain_vllm_the_connector_says_it_once(alone: list[int], model: str, tmp_path: Path) -> None:
    port = free_port()
    command = [*VLLM, "--model", model, "--port", str(port), *SMALL, "--kv-transfer-config", json.dumps(CONNECTOR)]
    computing, output = computes_on(command, port, tmp_path / "out")
    assert output.count("Set VLLM_CPU_NUM_OF_RESERVED_CPU=1") == int(computing != alone)
