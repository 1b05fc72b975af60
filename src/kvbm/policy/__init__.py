"""Policies by the name that settings use."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvbm.abc.policy import EvictionOrder
from kvbm.policy.lru import LRU

EVICTION_ORDERS: Mapping[str, Callable[[int], EvictionOrder]] = {"lru": LRU}
"""Eviction orders; each is made for a number of slots."""

__all__ = ["EVICTION_ORDERS", "LRU"]
