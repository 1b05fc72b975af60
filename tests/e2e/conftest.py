"""Engines and models for the end-to-end tests."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kvbm.tiers.gate import Gate
from tests.e2e.engine import Done, Engine, minor, write_tiny

_UNTIMED = (
    "adapters", "contract", "guard", "hybrid", "identity", "identity_files", "identity_weights", "images", "keys",
    "kv_dtype", "mla", "models", "namespace", "onboard", "one_process", "prompt_embeds", "random", "refusals",
    "requests", "sessions", "speculation", "storage", "trust", "weights",
)  # fmt: skip
"""Modules that neither measure times nor have short deadlines."""
RUN_PROMPT = 560
"""Tokens: a run of shared storage has 512."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            if item.path.stem.removeprefix("test_") in _UNTIMED:
                item.add_marker(pytest.mark.untimed)
            # vLLM and what it imports warn about many things; ours are still errors in the tests without an engine.
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def plain(tiny: Path) -> Iterator[Callable[..., list[Done]]]:
    """vLLM without KVBM: the outputs that every run must have. float32, so batching changes nothing."""
    engine = Engine(tiny, num_gpu_blocks_override=256)

    def run(prompts: Sequence[Sequence[int]], tokens: int = 8, **options: object) -> list[Done]:
        results = engine.run(prompts, tokens, **options)
        engine.forget_device()
        return results

    yield run
    engine.close()


@pytest.fixture(scope="session")
def guesses() -> None:
    """Skips what speculates where vLLM cannot."""
    if minor() < 31:
        pytest.skip("vLLM 0.30 on a CPU ends at the first guess: its rejection sampler wants Triton")


@pytest.fixture
def always_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models here are so small that computing is often faster, or seems so on a busy machine."""
    monkeypatch.setattr(Gate, "computing_s", lambda *_: None)


@pytest.fixture
def dice(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.node.name)


def downloaded_elsewhere(model: Path, folder: Path) -> Path:
    """The same model as another machine has it: under another path, with other times."""
    copy = shutil.copytree(model, folder / "elsewhere", copy_function=shutil.copyfile)
    for at, path in enumerate(sorted(copy.iterdir())):
        os.utime(path, (1_600_000_000 + at, 1_600_000_000 + at))
    return copy


def prompt_of(dice: random.Random, length: int) -> list[int]:
    return [dice.randrange(3, 1000) for _ in range(length)]


@pytest.fixture
def prompts(dice: random.Random) -> list[list[int]]:
    """Each of a run of shared storage and somewhat more."""
    return [prompt_of(dice, RUN_PROMPT) for _ in range(4)]


@pytest.fixture
def expected(plain: Callable[..., list[Done]], prompts: list[list[int]]) -> list[list[int]]:
    """The engine's own answers to them."""
    return [done.tokens for done in plain(prompts, 12)]
