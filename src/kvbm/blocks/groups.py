"""Layers that are cached together: hybrid models need different blocks of each group for one hit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from kvbm.abc.policy import Mask
from kvbm.blocks.leases import Pinned
from kvbm.blocks.pool import Pool
from kvbm.core.errors import Misuse
from kvbm.core.region import Slots

Kind = Literal["full", "window", "chunk", "state"]


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Which blocks of a group a hit needs, with blocks of `block` tokens.

    full: all before its end (full attention). window: those of the last `tokens - 1` tokens (sliding window). chunk:
    those of the chunk of `tokens` that the next token is in, none where it is the first of it (chunked local
    attention). state: the last one alone, which holds what is known after its last token (recurrent layers).
    """

    kind: Kind = "full"
    block: int = 1
    tokens: int = 1

    def __post_init__(self) -> None:
        if self.block < 1 or self.tokens < 1:
            raise Misuse(f"a layer group has blocks and a reach of at least one token, not {self.block}, {self.tokens}")

    def first(self, end: int) -> int:
        """The first block that a hit of `end` blocks needs; `end` where it needs none."""
        return self.after(end * self.block)

    def after(self, tokens: int) -> int:
        """The first block that is needed once so many tokens are computed."""
        return int(self.firsts(np.array([tokens]))[0])

    def firsts(self, tokens: Slots) -> Slots:
        """`after` each."""
        match self.kind:
            case "full":
                return np.zeros_like(tokens)
            case "window":
                return np.maximum(0, tokens - self.tokens + 1) // self.block
            case "chunk":
                return tokens // self.tokens * self.tokens // self.block
            case _:  # state
                return np.maximum(0, tokens - 1) // self.block

    @property
    def reach(self) -> int:
        """Most blocks that a hit needs of a group that is not full."""
        return -(-max(self.tokens - 1, 1) // self.block)


class Where(Protocol):
    """What is asked which blocks are there: a pool, say."""

    def present(self, keys: Sequence[bytes]) -> Mask:
        """Which of them are."""

    def peek(self, keys: Sequence[bytes]) -> int:
        """How many of the first are."""


@dataclass(frozen=True, slots=True)
class GroupMatch:
    """The longest hit."""

    length: int
    """Blocks from the prompt's first on that are there for every group; 0 for a miss."""
    blocks: list[tuple[int, int]]
    """Group and number in the prompt of each block that it needs."""
    longest: int
    """The length if it could need any number of blocks."""
    reach: int
    """How far the full groups alone go; where there is none, `longest`."""


@dataclass(frozen=True, slots=True)
class Hit(GroupMatch):
    """The longest hit, held."""

    held: Pinned


def prefix(mask: Mask) -> int:
    """How many of the first are true."""
    gone = np.flatnonzero(~mask)
    return int(gone[0]) if len(gone) else len(mask)


class Either:
    """What is in one pool or the other (`Where`)."""

    def __init__(self, one: Pool, other: Pool) -> None:
        self._one, self._other = one, other

    def present(self, keys: Sequence[bytes]) -> Mask:
        """See `Where`."""
        return self._one.present(keys) | self._other.present(keys)

    def peek(self, keys: Sequence[bytes]) -> int:
        """See `Where`."""
        return prefix(self.present(keys))


def find_groups(
    where: Where, groups: Sequence[LayerGroup], keys: Sequence[Sequence[bytes]], start: int = 0, most: int | None = None
) -> GroupMatch:
    """What the longest hit over all groups needs, of at most `most` blocks. Holds nothing.

    `keys[g]` are the keys of the prompt's blocks in `groups[g]`: as many in each, and no key in two. A hit of n blocks
    is possible if every group has all it needs of the blocks before n; those before `start` are there already.
    """
    if not groups or len(keys) != len(groups) or len({len(each) for each in keys}) != 1:
        raise Misuse("every layer group needs keys, and all as many")
    total = len(keys[0])
    for group, theirs in zip(groups, keys, strict=True):
        if group.kind == "full" and total > start:
            total = start + where.peek(theirs[start:total])
    full = any(group.kind == "full" for group in groups)
    ends = np.arange(start + 1, max(start, total) + 1)
    possible, needed = np.ones(len(ends), np.bool_), np.zeros(len(ends), np.int64)
    firsts = {group: np.maximum(group.firsts(ends * group.block), start) for group in groups}
    for group, theirs in zip(groups, keys, strict=True):
        count = ends - firsts[group]
        needed += count
        if group.kind != "full" and len(ends):
            there = np.concatenate(([0], np.cumsum(where.present(theirs[start:total]))))
            possible &= there[ends - start] - there[firsts[group] - start] == count
    longest = int(ends[possible][-1]) if possible.any() else 0
    if most is not None:
        possible &= needed <= most
    length = int(ends[possible][-1]) if possible.any() else 0
    at = length - start - 1
    blocks = [
        (number, block)
        for number, group in enumerate(groups)
        for block in (range(int(firsts[group][at]), length) if length else ())
    ]
    return GroupMatch(length, blocks, longest, total if full else longest)


def match_groups(
    pool: Pool, groups: Sequence[LayerGroup], keys: Sequence[Sequence[bytes]], start: int = 0, most: int | None = None
) -> Hit:
    """Hold what `find_groups` finds, and only that. Between asking and holding a block may go: then it is a miss."""
    found = find_groups(pool, groups, keys, start, most)
    held, positions = pool.scan([keys[number][block] for number, block in found.blocks])
    if len(positions) < len(found.blocks):
        return Hit(0, [], found.longest, found.reach, held.select([]))
    return Hit(found.length, found.blocks, found.longest, found.reach, held)
