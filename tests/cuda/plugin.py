"""`pytest -p tests.cuda.plugin tests/e2e/...`: the engines of these tests count as engines on a GPU (`pretend.py`), and
a test session in which a copy and the engine's work overlapped ends with an error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qsl

import pytest

from tests.cuda import pretend
from tests.e2e import engine as e2e

PACE = "latency_us=50,delay_us=500"
OPTIONS = "PRETEND_CUDA_OPTIONS"
"""Options of `pretend`, as v2=1, for all engines of a test session."""


@contextmanager
def on_a_gpu(folder: Path, pace: str = PACE, **options: object) -> Iterator[None]:
    """Engines made in here count as engines on a GPU, and say in this folder what the fake driver saw."""
    from kvbm.connect.vllm import support

    settings = "&".join(f"{name}={value}" for name, value in options.items())
    with (
        mock.patch.dict(e2e.CONNECTOR, kv_connector_module_path="tests.cuda.connector"),
        mock.patch.multiple(support, SERVED=("cpu", "cuda"), runs_on=lambda config: "cuda"),
        e2e.environment(**{pretend.SETTINGS: settings, pretend.COUNTS: str(folder), "FAKE_CUDA": pace}),
    ):
        yield


@pytest.fixture(scope="session", autouse=True)
def all_on_a_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("counts")
    with on_a_gpu(folder, **dict(parse_qsl(os.environ.get(OPTIONS, "")))):
        yield
    seen = pretend.seen(folder)
    wrong = [each["last"] for each in seen if each["mistakes"]]
    assert not wrong, wrong
    print(
        f"\non a GPU that is simulated: {len(seen)} processes, {sum(each['calls'] for each in seen)} copies, no mistake"
    )
