"""The life of blocks in one tier: who holds which slot, which key is where, what goes first. Logic only."""

from __future__ import annotations

from kvbm.blocks.groups import Either, LayerGroup, Where, find_groups, match_groups, prefix
from kvbm.blocks.keys import prompt_keys
from kvbm.blocks.leases import Pinned, Staged, Weak, Writable
from kvbm.blocks.pool import Pool
from kvbm.blocks.statistics import Block, PoolStatistics

__all__ = [
    "Block",
    "Either",
    "LayerGroup",
    "Pinned",
    "Pool",
    "PoolStatistics",
    "Staged",
    "Weak",
    "Where",
    "Writable",
    "find_groups",
    "match_groups",
    "prefix",
    "prompt_keys",
]
