"""Two data-parallel engines behind one server, with one configuration."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kvbm.cli.control import ask_all
from tests.e2e.conftest import prompt_of
from tests.e2e.engine import CONNECTOR, FAST
from tests.ports import free_port


def _get(url: str, body: dict[str, Any] | None = None) -> bytes:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read())


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, int, Path]]:
    """Its address, the folder of its control sockets, its first metrics port, the folder of its disk tier."""
    port = free_port(3)
    metrics, disk = port + 1, tmp_path_factory.mktemp("disk")
    with tempfile.TemporaryDirectory(prefix="kvbm") as run_dir, tempfile.TemporaryFile() as log:
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny),
            "--served-model-name", "m", "--skip-tokenizer-init", "--host", "127.0.0.1", "--port", str(port),
            "--max-model-len", "1024",
            "--enforce-eager", "--dtype", "float32", "--block-size", "32", "--num-gpu-blocks-override", "40",
            "--data-parallel-size", "2", "--kv-transfer-config", json.dumps(CONNECTOR),
        ]  # fmt: skip
        environment = os.environ | FAST | {
            "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "KVBM_RUN_DIR": run_dir, "KVBM_G2_GB": "0.1",
            "KVBM_METRICS": "true", "KVBM_METRICS_PORT": str(metrics), "KVBM_G3_GB": "0.1", "KVBM_G3_DIR": str(disk),
        }  # fmt: skip
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 240
            while True:
                try:
                    _get(f"http://127.0.0.1:{port}/health")
                    break
                except OSError:
                    log.seek(0)
                    assert process.poll() is None, log.read()[-3000:]
                    assert time.monotonic() < deadline, log.read()[-3000:]
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}", Path(run_dir), metrics, disk
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            if _group_lives(process.pid):
                os.killpg(process.pid, signal.SIGKILL)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_each_engine_has_its_own(server: tuple[str, Path, int, Path], dice: random.Random) -> None:
    """Own G2, disk folder, control socket and metrics port, from its rank; the same prompts find their blocks again."""
    address, run_dir, metrics, disk = server
    prompts = [prompt_of(dice, 330) for _ in range(16)]

    def ask(prompt: list[int]) -> list[int]:
        body = {"model": "m", "prompt": prompt, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
        choice = json.loads(_get(f"{address}/v1/completions", body))["choices"][0]
        return list(choice["token_ids"])

    first = [ask(prompt) for prompt in prompts]
    for _ in range(2):  # 160 blocks of prompts, 39 on each device: what is asked again is there no more
        assert [ask(prompt) for prompt in prompts] == first
    reports = [answer.result for answer in ask_all(run_dir, "status")]
    assert len(reports) == 2
    assert sorted(report["engine"][-4:] for report in reports) == ["_dp0", "_dp1"]
    assert all(report["healthy"] and report["offload"]["blocks"] > 0 for report in reports)
    assert sum(report["onboard"]["blocks"] for report in reports) > 0
    assert all(report["demote"]["blocks"] > 0 for report in reports)
    assert sorted(path.relative_to(disk).parts[0] for path in disk.rglob("rank0.data")) == ["dp0", "dp1"]
    for rank in range(2):
        assert b"kvbm_offload_blocks_d2h" in _get(f"http://127.0.0.1:{metrics + rank}/metrics")
