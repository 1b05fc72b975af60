"""Blocks in shared storage: another engine finds them, and answers are what they are without KVBM."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from kvbm.stores.objects.blocks import address_of, sums_at
from kvbm.stores.objects.envelope import PLAIN_AT
from kvbm.stores.objects.names import parse
from kvbm.stores.objects.runs import parse as parse_run
from kvbm.tiers.objects.tier import SharedStorage
from tests.e2e.conftest import prompt_of
from tests.e2e.engine import Done, Engine
from tests.e2e.test_serve import eventually

Plain = Callable[..., list[Done]]
TOKENS = 560
RUN = 512
"""Tokens of a run: blocks of this model are small."""


class Shared(Engine):
    """An engine with host memory of its own, and a shared folder."""

    def __init__(self, model: Path, folder: Path, **settings: Any) -> None:
        kvbm = {"g2_blocks": 256, "g4_url": f"file://{folder}", "g4_feed_s": 0.2, **settings}
        super().__init__(model, kvbm, max_model_len=1024)
        eventually(lambda: self.leader.tick() or self.storage.problem is None)

    @property
    def storage(self) -> SharedStorage:
        tier = self.leader.core.lower.stack.tiers["g4"]
        assert isinstance(tier, SharedStorage)
        return tier

    def stored(self) -> None:
        """All that is to be written is."""
        self.settle()
        eventually(lambda: self.leader.tick() or self.storage.uploads.idle)

    def knows(self, runs: int) -> None:
        eventually(lambda: len(self.storage.runs.presence) >= runs)


def files(folder: Path) -> list[Path]:
    found = []
    for path in sorted(folder.rglob("*")):
        ours = parse(path.relative_to(folder).as_posix()) if path.is_file() else None
        if ours is not None and ours.kind == "run":
            found.append(path)
    return found


def forge(path: Path) -> None:
    """Another KV, and checksums that fit it."""
    whole = bytearray(path.read_bytes())
    plain = memoryview(whole)[PLAIN_AT:]
    shape, run, _ = parse_run(plain)
    data = len(plain) - shape.data_bytes
    floats = np.frombuffer(plain[data:], np.float32)
    floats.flags.writeable = True
    np.negative(floats, out=floats)
    sums = sums_at(address_of(plain) + data, shape.block_bytes, shape.ranks * shape.blocks)
    at = whole.index(np.ascontiguousarray(run.sums, "<u8").tobytes())
    whole[at : at + sums.nbytes] = sums.tobytes()
    end = data - 8
    plain[end:data] = xxhash.xxh3_64_digest(plain[:end])
    path.write_bytes(whole)


@pytest.fixture
def prompts(dice: random.Random) -> list[list[int]]:
    return [prompt_of(dice, TOKENS) for _ in range(4)]


@pytest.fixture
def expected(plain: Plain, prompts: list[list[int]]) -> list[list[int]]:
    return [done.tokens for done in plain(prompts, 12)]


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.usefixtures("always_load")
def test_another_engine_finds_what_one_has_computed(
    tiny: Path, tmp_path: Path, prompts: list[list[int]], expected: list[list[int]], sealed: bool
) -> None:
    folder, settings = tmp_path / "shared", {}
    if sealed:
        (tmp_path / "secret").write_text("a secret of more than sixteen bytes")
        (tmp_path / "secret").chmod(0o600)
        settings["g4_secret_file"] = str(tmp_path / "secret")
    with closing(Shared(tiny, folder, **settings)) as engine:
        for prompt, tokens in zip(prompts, expected, strict=True):
            (done,) = engine.run([prompt], 12)
            assert (done.tokens, done.cached) == (tokens, 0)
        engine.stored()
    assert len(files(folder)) == len(prompts)
    with closing(Shared(tiny, folder, **settings)) as engine:
        engine.knows(len(prompts))
        for prompt, tokens in zip(prompts, expected, strict=True):
            (done,) = engine.run([prompt], 12)
            assert (done.tokens, done.cached) == (tokens, RUN)
        status = engine.status()
        assert status["tokens"]["g4"] == RUN * len(prompts)
        assert status["g4"]["writes"]
    # The control: who may write the folder can forge blocks, and then answers differ; not where they are sealed.
    for path in files(folder):
        if sealed:
            damaged = bytearray(path.read_bytes())
            damaged[-100] ^= 1
            path.write_bytes(damaged)
        else:
            forge(path)
    with closing(Shared(tiny, folder, **settings)) as engine:
        engine.knows(len(prompts))
        same = []
        for prompt, tokens in zip(prompts, expected, strict=True):
            (done,) = engine.run([prompt], 12)
            same.append(done.tokens == tokens)
            assert done.cached == (0 if sealed else RUN)
        assert all(same) if sealed else not all(same)
