"""Policies by name: ours, other distributions', and what is said where there is none."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from kvbm import policy
from kvbm.abc.policy import Admission, EvictionOrder, Placement
from kvbm.core.errors import ConfigError
from kvbm.policy import ADMISSIONS, EVICTION_ORDERS, LRU, PLACEMENTS, WriteThrough, admission, eviction_order, placement

MODULE = """
from kvbm.policy import LRU, Exclusive, Presence

def admit(num_slots):
    assert num_slots == 12
    return Presence()

def fail(num_slots):
    raise OSError("no such thing")
"""


class Installer:
    """Distributions on the path."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, distribution: str, group: str, *entries: str) -> None:
        info = self._folder / f"{distribution.replace('-', '_')}-2.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.1\n")
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *entries, ""]))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installer:
    (tmp_path / "kvbm_others.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kvbm_others", raising=False)
    return Installer(tmp_path)


def test_ours() -> None:
    assert list(EVICTION_ORDERS) == ["fifo", "lru", "lfu", "multi-lru", "s3-fifo", "arc", "lineage"]
    assert list(ADMISSIONS) == ["all", "presence", "frequency"]
    assert list(PLACEMENTS) == ["write-through", "exclusive"]
    for name in EVICTION_ORDERS:
        assert isinstance(eviction_order(name, 9), EvictionOrder)
    for name in ADMISSIONS:
        assert isinstance(admission(name, 9), Admission)
    for name in PLACEMENTS:
        assert isinstance(placement(name), Placement)


def test_exported_names_are_there() -> None:
    assert all(hasattr(policy, name) for name in policy.__all__)


def test_other_distributions_provide_policies(install: Installer) -> None:
    install("others-a", "kvbm.eviction_orders", "mine = kvbm_others:LRU")
    install("others-b", "kvbm.admissions", "mine = kvbm_others:admit")
    install("others-c", "kvbm.placements", "mine = kvbm_others:Exclusive")
    assert type(eviction_order("mine", 12)) is LRU
    assert type(admission("mine", 12)).__name__ == "Presence"
    assert type(placement("mine")).__name__ == "Exclusive"


def test_ours_cannot_be_replaced(install: Installer) -> None:
    install("others", "kvbm.placements", "write-through = kvbm_others:Exclusive")
    assert type(placement("write-through")) is WriteThrough


def test_an_unknown_name_lists_the_known_ones(install: Installer) -> None:
    install("others", "kvbm.eviction_orders", "mine = kvbm_others:LRU", "lru = kvbm_others:LRU")
    with pytest.raises(ConfigError) as raised:
        eviction_order("lur", 12)
    assert str(raised.value) == (
        "setting eviction_order: there is no 'lur'; there are fifo, lru, lfu, multi-lru, s3-fifo, arc, lineage, mine. "
        "To provide one, install a distribution with an entry point of that name in the group 'kvbm.eviction_orders'."
    )
    with pytest.raises(ConfigError, match=r"there are all, presence, frequency\..*'kvbm\.admissions'"):
        admission("mine", 12)
    with pytest.raises(ConfigError, match=r"there are write-through, exclusive\..*'kvbm\.placements'"):
        placement("mine")


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("kvbm_others:fail", "OSError('no such thing')"),
        ("kvbm_nowhere:fail", "ModuleNotFoundError"),
        ("kvbm_others:nothing", "AttributeError"),
        ("builtins:range", "it made a range, not a EvictionOrder"),
    ],
)
def test_who_provided_what_cannot_be_used(install: Installer, target: str, problem: str) -> None:
    install("others", "kvbm.eviction_orders", f"mine = {target}")
    with pytest.raises(ConfigError) as raised:
        eviction_order("mine", 12)
    assert f"'mine' ({target}) of distribution others 2.1 cannot be used: {problem}" in str(raised.value)


def test_two_providers_of_one_name(install: Installer) -> None:
    install("zwei", "kvbm.placements", "mine = kvbm_others:Exclusive")
    install("eins", "kvbm.placements", "mine = kvbm_others:Exclusive")
    with pytest.raises(ConfigError, match=r"provided by distribution eins 2\.1 and distribution zwei 2\.1"):
        placement("mine")


def test_a_provider_may_be_unknown() -> None:
    assert policy._provider(EntryPoint("a", "b:c", "d")) == "an unknown distribution"
