"""The short form of `python -m tests.tiers.objects.damage`."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.leader.roles import keys_of
from tests.tiers.objects.damage import damaged, heal
from tests.tiers.objects.test_whole import Sharing, objects


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_damaged_no_wrong_byte_is_served(seed: int, tmp_path: Path) -> None:
    """And it is whole again once somebody has computed it, for others, too."""
    dice, kinds, shared = random.Random(seed), Counter[str](), f"file://{tmp_path}/shared"
    engines = [Sharing(tmp_path, shared).works() for _ in range(2)]
    try:
        one, other = engines
        prompts = [keys_of(f"{number}", 8) for number in range(5)]
        for keys in prompts:
            one.serve(keys)
        one.stored()
        whole = {path: path.read_bytes() for path in objects(tmp_path)}
        assert len(whole) == 10
        for keys in prompts:
            other.knows(keys, 8)
        for path in whole:
            kind, data = damaged(whole, path, dice)
            path.write_bytes(data)
            kinds[kind] += 1
        heal(other, prompts, whole)
        assert other.g4.corrupt > 0
        assert len(kinds) > 2
        third = Sharing(tmp_path, shared).works()
        engines.append(third)
        for keys in prompts:
            third.knows(keys, 8)
            assert third.serve(keys) == 8
    finally:
        for engine in engines:
            engine.close()
