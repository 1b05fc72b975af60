"""Blocks in shared storage: another engine finds them, and answers are what they are without KVBM."""

from __future__ import annotations

import random
import time
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
from tests.e2e.conftest import RUN_PROMPT, downloaded_elsewhere, prompt_of
from tests.e2e.engine import Engine
from tests.e2e.test_serve import eventually
from tests.tiers.objects.faulty import Faulty, Mode

RUN = 512
"""Tokens of a run: blocks of this model are small."""


class Shared(Engine):
    """An engine with host memory of its own, and shared storage."""

    def __init__(self, model: Path, where: Path | str, *, works: bool = True, **settings: Any) -> None:
        url = where if isinstance(where, str) else f"file://{where}"
        kvbm = {"g2_blocks": 256, "g4_url": url, "g4_feed_s": 0.2, "g4_warm": 0.0, **settings}
        super().__init__(model, kvbm, max_model_len=1024)
        if works:
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

    def forget(self) -> None:
        """Neither the device nor host memory has anything."""
        self.settle()
        self.forget_device()
        pool = self.leader.core.pool
        with pool.candidates(pool.statistics().total) as held:
            held.evict()

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
    shape, run, _, _ = parse_run(plain)
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
    with closing(Shared(downloaded_elsewhere(tiny, tmp_path), folder, **settings)) as engine:
        engine.knows(len(prompts))
        for prompt, tokens in zip(prompts, expected, strict=True):
            (done,) = engine.run([prompt], 12)
            assert (done.tokens, done.cached) == (tokens, RUN)
        status = engine.status()
        assert status["tokens"]["g4"] == RUN * len(prompts)
        assert status["g4"]["writes"]
    with closing(Shared(tiny, folder, **settings, g4_warm=0.25)) as engine:
        eventually(lambda: engine.leader.tick() or engine.storage.warmth.warmed == len(prompts) * RUN // 32)
        for prompt, tokens in zip(prompts, expected, strict=True):
            (done,) = engine.run([prompt], 12)
            assert (done.tokens, done.cached) == (tokens, RUN)
        assert not engine.status()["tokens"].get("g4"), "it was in host memory before anybody asked"
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


@pytest.mark.usefixtures("always_load")
def test_a_server_that_fails_costs_a_computation(
    tiny: Path, tmp_path: Path, prompts: list[list[int]], expected: list[list[int]], faulty: Faulty
) -> None:
    """It refuses, answers error pages with status 200, says nothing, and works again: answers are the engine's own."""
    settings = {"g4_endpoint": faulty.endpoint, "g4_path_style": True, "g4_deadline_s": 5.0}
    address = "s3://bucket/failing"
    with closing(Shared(tiny, address, **settings)) as engine:
        assert [done.tokens for done in engine.run(prompts, 12)] == expected
        engine.stored()
    with closing(Shared(tiny, address, **settings)) as engine:
        engine.knows(len(prompts))
        modes: tuple[Mode, ...] = ("refused", "silent", "page")
        for mode in modes:
            faulty.set(mode)
            begun = time.monotonic()
            assert [done.tokens for done in engine.run(prompts, 12)] == expected, mode
            assert time.monotonic() - begun < 20
            assert not engine.status()["tokens"].get("g4"), "nothing came"
            assert ("g4" in engine.status()["degraded"]) == (mode != "page")
            faulty.set("good")
            eventually(lambda: engine.leader.tick() or engine.storage.problem is None)
            engine.forget()

        def heals() -> bool:
            """What was an error page twice counts as damaged, was deleted, and is written again."""
            engine.stored()
            engine.forget()
            done = engine.run(prompts, 12)
            assert [each.tokens for each in done] == expected
            return all(each.cached == RUN for each in done)

        eventually(heals, 30)
        assert engine.status()["tokens"]["g4"] >= RUN * len(prompts)


@pytest.mark.parametrize("admission", ["second-use", "evicted"])
@pytest.mark.usefixtures("always_load")
def test_what_is_admitted_is_found(
    tiny: Path, tmp_path: Path, prompts: list[list[int]], expected: list[list[int]], admission: str, dice: random.Random
) -> None:
    """What was asked for twice, or what left host memory: 160 blocks, of which each prompt needs 17."""
    folder, settings = tmp_path / "shared", {"g4_admission": admission}
    with closing(Shared(tiny, folder, g2_blocks=160, **settings)) as engine:
        for prompt, tokens in zip(prompts, expected, strict=True):
            (done,) = engine.run([prompt], 12)
            assert done.tokens == tokens
            engine.stored()
        if admission == "second-use":
            assert files(folder) == []
            engine.forget_device()
            assert [done.tokens for done in engine.run(prompts, 12)] == expected
        else:
            for _ in range(9):
                engine.run([prompt_of(dice, RUN_PROMPT)], 12)
        engine.stored()
    written = len(files(folder))
    assert 0 < written <= len(prompts) + 9
    with closing(Shared(tiny, folder, **settings)) as engine:
        engine.knows(written)
        assert [done.tokens for done in engine.run(prompts, 12)] == expected
        assert engine.status()["tokens"]["g4"] == RUN * min(written, len(prompts))
