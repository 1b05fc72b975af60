"""Layers that are cached together: hybrid models need different blocks of each group for one hit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvbm.blocks.leases import Pinned
from kvbm.blocks.pool import Pool
from kvbm.core.errors import Misuse


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """The pool of one group's blocks, and how many blocks before its end a hit needs of it.

    None is all of them (full attention); a sliding window of w tokens needs ceil((w - 1) / block size), chunked local
    attention at most a chunk, recurrent state the last one alone.
    """

    pool: Pool
    needs: int | None = None

    def __post_init__(self) -> None:
        if self.needs is not None and self.needs < 1:
            raise Misuse(f"a layer group needs at least one block, not {self.needs}")


def match_groups(
    groups: Sequence[LayerGroup], keys: Mapping[int, Sequence[bytes]], start: int = 0
) -> tuple[int, list[Pinned]]:
    """Hold what the longest hit over all groups needs, and only that.

    `keys[g]` are the keys of the prompt's blocks in `groups[g]`: as many in each, since blocks cover the same tokens.
    A hit of n blocks is possible if every group has all it needs of the blocks before n; blocks before `start` are
    there already. Returns n (0 or more than `start`) and for each group its blocks, the last of them being n - 1.
    Each pool is asked once, so a block may go between asking and holding: then the answer is a miss.
    """
    if not groups or len({len(keys[at]) for at in range(len(groups))}) != 1:
        raise Misuse("every layer group needs keys, and all as many")
    held = [group.pool.scan(keys[at][start:]) for at, group in enumerate(groups)]
    length = _longest(
        [group.needs for group in groups], [positions for _, positions in held], max(0, len(keys[0]) - start)
    )
    answer: list[Pinned] = []
    for group, (pinned, positions) in zip(groups, held, strict=True):
        first = 0 if group.needs is None else max(0, length - group.needs)
        answer.append(pinned.select([at for at, position in enumerate(positions) if first <= position < length]))
    return (start + length if length else 0), answer


def _longest(needs: Sequence[int | None], present: Sequence[Sequence[int]], total: int) -> int:
    """The largest n up to `total` for which each group has the last `needs` of the first n blocks."""
    possible = np.ones(total + 1, np.bool_)
    for needed, positions in zip(needs, present, strict=True):
        there = np.zeros(total + 1, np.int64)
        there[1:][np.asarray(positions, np.int64)] = 1
        before = np.cumsum(there)  # how many of the first n are there
        n = np.arange(total + 1)
        first = np.zeros_like(n) if needed is None else np.maximum(0, n - needed)
        possible &= before - before[first] == n - first
    return int(possible.nonzero()[0][-1])
