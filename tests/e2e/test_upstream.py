"""What upstream's tests look at, as they do: an unchanged command, upstream's names of the connector, of settings and
of metrics, `/reset_prefix_cache`. One server for all of it, in float32.

Upstream's longest run compares 100 texts: `TEST_TEXTS=100 pytest tests/e2e/test_upstream.py -k before_and_after`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from rich.console import Console

from kvbm.cli import models
from kvbm.cli.demo.client import Client
from kvbm.core import config
from kvbm.testing.faults import inject
from tests.e2e.engine import BLOCK, FAST
from tests.e2e.test_serve import VLLM, Served, eventually, served
from tests.ports import free_port

TEXTS = int(os.environ.get("TEST_TEXTS", "6"))
DEVICE, HOST = 40, max(400, 20 * TEXTS)
"""Blocks. The device holds one long prompt and a half, host memory every text and its answer."""
WORDS = " ".join(topics[name] for name in sorted(topics)).split()
SPANISH = "Responde en una frase y en español: ¿por qué el mar parece azul, y qué tiene que ver el cielo con ello? ({})"


class Deployment:
    """A server that was started with upstream's names, seen as upstream's tests see it."""

    def __init__(self, server: Served, metrics: int, faults: Path) -> None:
        self.server, self.faults = server, faults
        self._metrics = Client("127.0.0.1", metrics, "")

    def ask(self, prompt: str, tokens: int = 15) -> str:
        body = {"model": "smollm2", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        return str(self.server._post("/v1/completions", body)["choices"][0]["text"])

    def ask_together(self, prompts: Sequence[str], tokens: int = 15, clients: int = 7) -> list[str]:
        with ThreadPoolExecutor(clients) as pool:
            return list(pool.map(lambda prompt: self.ask(prompt, tokens), prompts))

    def reset(self, query: str = "") -> None:
        """Of the device's cache only, unless the query says more."""
        self.server.reset(query)

    def counts(self) -> tuple[int, int]:
        """Blocks offloaded and onboarded."""
        eventually(lambda: not self.server.status()["offload"]["in_flight"])
        eventually(lambda: not self.server.status()["onboard"]["in_flight"])
        found = self._metrics.metrics()
        return int(found["kvbm_offload_blocks_d2h"]), int(found["kvbm_onboard_blocks_h2d"])


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("upstream")
    model = models.resolve("smollm2", config.load().settings.cache_dir, Console(stderr=True))
    port, metrics, faults = free_port(), free_port(), folder / "faults"
    inject(faults)
    connector = {
        "kv_connector": "DynamoConnector",
        "kv_connector_module_path": "kvbm.vllm_integration.connector",
        "kv_role": "kv_both",
    }
    command = [*VLLM, "--model", model, "--served-model-name", "smollm2", "--dtype", "float32", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--max-model-len", "1024", "--num-gpu-blocks-override", str(DEVICE)]
    command += ["--max-num-batched-tokens", "256", "--enforce-eager", "--kv-transfer-config", json.dumps(connector)]
    settings = {"CPU_CACHE_OVERRIDE_NUM_BLOCKS": str(HOST), "METRICS": "true", "METRICS_PORT": str(metrics)}
    environment = {f"DYN_KVBM_{name}": value for name, value in settings.items()}
    environment["KVBM_TRANSPORT_WRAPPER"] = f"kvbm.testing.faults:follow?{faults}"
    with served(command, port, folder, **environment, **FAST) as server:
        server.wait_for("Application startup complete")
        yield Deployment(server, metrics, faults)


def words(start: int, count: int) -> str:
    """Other ones for each start."""
    return f"{start}: " + " ".join(WORDS[start : start + count])


def test_offload_and_onboard(deployment: Deployment) -> None:
    assert deployment.server.status()["tiers"][0]["capacity"] == HOST
    prompt = words(1_000, 100)[:400]
    before = deployment.counts()
    first = deployment.ask(prompt)
    middle = deployment.counts()
    assert middle[0] > before[0]
    assert middle[1] == before[1]
    deployment.reset()  # G2 keeps what it has
    assert deployment.ask(prompt) == first
    assert deployment.counts()[1] > middle[1]
    deployment.reset("?reset_external=true")
    cleared = deployment.counts()
    assert deployment.ask(prompt) == first
    assert deployment.counts()[1] == cleared[1]


def test_the_device_evicts_a_prompt_that_comes_back(deployment: Deployment) -> None:
    one, two = words(2_000, 500)[:2_600], words(3_000, 700)[:3_600]
    before = deployment.counts()
    first = deployment.ask(one)
    after_one = deployment.counts()
    deployment.ask(two)
    after_two = deployment.counts()
    assert after_one[0] - before[0] >= 12
    assert after_two[0] - after_one[0] >= 12
    assert deployment.ask(one) == first
    assert deployment.counts()[1] > after_two[1]


def test_onboarding_is_the_same_each_time(deployment: Deployment) -> None:
    prompts = [words(4_000, 150), words(5_000, 200)]
    answers = [deployment.ask(prompt) for prompt in prompts]
    onboarded: dict[str, set[int]] = {prompt: set() for prompt in prompts}
    for _ in range(3):
        for prompt, answer in zip(prompts, answers, strict=True):
            deployment.reset()
            before = deployment.counts()[1]
            assert deployment.ask(prompt) == answer
            onboarded[prompt].add(deployment.counts()[1] - before)
    assert all(len(blocks) == 1 and 0 not in blocks for blocks in onboarded.values())


def test_prompts_in_chunks_of_256_tokens(deployment: Deployment) -> None:
    prompt = words(6_000, 420)[:2_600]
    before = deployment.counts()
    first = deployment.ask(prompt)
    middle = deployment.counts()
    assert middle[0] - before[0] >= len(prompt) / 4 / BLOCK / 2
    deployment.ask(words(7_000, 700)[:3_600])
    assert deployment.ask(prompt) == first
    assert deployment.counts()[1] > middle[1]


def test_rapid_unique_requests(deployment: Deployment) -> None:
    """Then a reset, and all of them again at once, each a hit."""
    prompts = [words(8_000 + 100 * at, 60) for at in range(20)]
    before = deployment.counts()
    first = deployment.ask_together(prompts, 4, clients=20)
    deployment.reset()
    middle = deployment.counts()
    assert middle[0] - before[0] >= 2 * len(prompts)
    assert deployment.ask_together(prompts, 4, clients=20) == first
    assert deployment.counts()[1] - middle[1] >= 2 * len(prompts)
    said = deployment.server.output()
    assert "Traceback" not in said
    assert "AssertionError" not in said


@pytest.mark.timeout(600 if TEXTS < 100 else 7200)
def test_answers_before_and_after_a_reset(deployment: Deployment) -> None:
    """Upstream has 100 texts of 200 words and 48 tokens each: all have to be the same."""
    prompts = [words(12_000 + 400 * at, 200) for at in range(TEXTS)]
    tokens = 48 if TEXTS >= 100 else 16
    first = deployment.ask_together(prompts, tokens)
    deployment.reset()
    before = deployment.counts()[1]
    again = deployment.ask_together(prompts, tokens)
    assert sum(a == b for a, b in zip(first, again, strict=True)) == len(prompts)
    assert deployment.counts()[1] > before


def test_answers_under_load(deployment: Deployment) -> None:
    """Others come all the time; upstream asks for at least 80 % of the same answers."""
    prompts = [SPANISH.format(at) for at in range(min(15, TEXTS))]
    first = [deployment.ask(prompt) for prompt in prompts]
    deployment.reset()
    before = deployment.counts()
    over = threading.Event()

    def others(client: int) -> None:
        at = 0
        while not over.is_set():
            deployment.ask(words(30_000 + 1_000 * client + 100 * (at % 3), 250), 8)
            at += 1

    with ThreadPoolExecutor(5) as pool:
        for client in range(4):
            pool.submit(others, client)
        answers = [deployment.ask(prompt) for prompt in prompts]
        over.set()
    assert answers == first
    after = deployment.counts()
    assert after[0] > before[0]
    assert after[1] > before[1]


def test_wrong_bytes_change_the_answers(deployment: Deployment) -> None:
    """The negative control of all of these."""
    prompts = [words(50_000 + 1_000 * at, 150) for at in range(3)]
    first = [deployment.ask(prompt) for prompt in prompts]
    deployment.reset()
    inject(deployment.faults, "load_garble=1")
    assert [deployment.ask(prompt) for prompt in prompts] != first
    inject(deployment.faults)
    deployment.reset("?reset_external=true")
    assert [deployment.ask(prompt) for prompt in prompts] == first
