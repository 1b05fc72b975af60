"""Policies by the name that settings use: ours, and those that other distributions provide as entry points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Final, TypeVar

from kvbm.abc.policy import Admission, EvictionOrder, Placement
from kvbm.core.errors import ConfigError
from kvbm.policy.admissions import All, Frequency, Presence
from kvbm.policy.arc import ARC
from kvbm.policy.fifo import FIFO
from kvbm.policy.lfu import LFU
from kvbm.policy.lineage import Lineage
from kvbm.policy.lru import LRU
from kvbm.policy.multi_lru import MultiLRU
from kvbm.policy.placements import Exclusive, WriteThrough
from kvbm.policy.s3_fifo import S3FIFO

EVICTION_ORDERS: Final[Mapping[str, Callable[[int], EvictionOrder]]] = {
    "fifo": FIFO,
    "lru": LRU,
    "lfu": LFU,
    "multi-lru": MultiLRU,
    "s3-fifo": S3FIFO,
    "arc": ARC,
    "lineage": Lineage,
}
"""Our eviction orders; each is made for a number of slots."""

ADMISSIONS: Final[Mapping[str, Callable[[int], Admission]]] = {
    "all": lambda _: All(),
    "presence": lambda _: Presence(),
    "frequency": Frequency,
}
"""Our admissions; each is made for the number of slots of the tier it guards."""

PLACEMENTS: Final[Mapping[str, Callable[[], Placement]]] = {"write-through": WriteThrough, "exclusive": Exclusive}
"""Our placements."""

Policy = TypeVar("Policy")


def eviction_order(name: str, num_slots: int, setting: str = "eviction_order") -> EvictionOrder:
    """The eviction order called `name`; others provide `name = "module:callable"` in `kvbm.eviction_orders`.

    The callable takes a number of slots. Raises ConfigError, about `setting`, for a name that nobody provides, that
    several distributions provide, or whose provider fails.
    """
    return _make(EvictionOrder, "kvbm.eviction_orders", setting, EVICTION_ORDERS, name, num_slots)


def admission(name: str, num_slots: int, setting: str = "admission") -> Admission:
    """The admission called `name` for a tier; like `eviction_order`, in `kvbm.admissions`."""
    return _make(Admission, "kvbm.admissions", setting, ADMISSIONS, name, num_slots)


def placement(name: str, setting: str = "placement") -> Placement:
    """The placement called `name`; like `eviction_order`, in `kvbm.placements`, and the callable takes nothing."""
    return _make(Placement, "kvbm.placements", setting, PLACEMENTS, name)


def _make(
    kind: type, group: str, setting: str, ours: Mapping[str, Callable[..., Policy]], name: str, *size: int
) -> Policy:
    if name in ours:
        return ours[name](*size)
    others = entry_points(group=group)
    found = list(others.select(name=name))
    if not found:
        known = ", ".join([*ours, *sorted(others.names - ours.keys())])
        raise ConfigError(
            setting,
            f"there is no {name!r}; there are {known}",
            remedy=f"To provide one, install a distribution with an entry point of that name in the group {group!r}.",
        )
    if len(found) > 1:
        providers = " and ".join(sorted(map(_provider, found)))
        raise ConfigError(setting, f"{name!r} is provided by {providers}", remedy="Uninstall one of them.")
    entry = found[0]
    try:
        policy: Policy = entry.load()(*size)
    except Exception as error:
        raise _unusable(setting, entry, repr(error)) from error
    if not isinstance(policy, kind):
        raise _unusable(setting, entry, f"it made a {type(policy).__name__}, not a {kind.__name__}")
    return policy


def _unusable(setting: str, entry: EntryPoint, problem: str) -> ConfigError:
    return ConfigError(
        setting, f"{entry.name!r} ({entry.value}) of {_provider(entry)} cannot be used: {problem}", source="entry point"
    )


def _provider(entry: EntryPoint) -> str:
    return f"distribution {entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"


__all__ = [
    "ADMISSIONS",
    "ARC",
    "EVICTION_ORDERS",
    "FIFO",
    "LFU",
    "LRU",
    "PLACEMENTS",
    "S3FIFO",
    "All",
    "Exclusive",
    "Frequency",
    "Lineage",
    "MultiLRU",
    "Presence",
    "WriteThrough",
    "admission",
    "eviction_order",
    "placement",
]
