"""Every policy of ours, and one of somebody else's, passes the shipped suites; and the suites can fail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings

from kvbm.abc.policy import Admission, Drop, EvictionOrder, Keep, Mask, Move, Placement, Tags
from kvbm.core.region import Slots
from kvbm.policy import EVICTION_ORDERS, FIFO, LRU, Exclusive, Frequency, admission, eviction_order, placement
from kvbm.testing.policy import AdmissionTests, EvictionOrderTests, PlacementTests

ELSEWHERE = '''
import random
import numpy as np
from kvbm.abc.policy import EvictionOrder

class Random(EvictionOrder):
    """Any idle block."""
    def __init__(self, num_slots):
        self.num_slots, self.idle = num_slots, set()
    def add(self, slots):
        self.idle.update(slots.tolist())
    def discard(self, slots):
        self.idle.difference_update(slots.tolist())
    def victims(self, n):
        chosen = random.sample(sorted(self.idle), min(n, len(self.idle)))
        self.idle.difference_update(chosen)
        return np.array(chosen, np.int64)
    def __len__(self):
        return len(self.idle)
    def fresh(self):
        return Random(self.num_slots)
    def resize(self, num_slots):
        self.num_slots = num_slots
'''


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution that provides an eviction order."""
    (tmp_path / "kvbm_elsewhere.py").write_text(ELSEWHERE)
    info = tmp_path / "kvbm_elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvbm-elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvbm.eviction_orders]\nrandom = kvbm_elsewhere:Random\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kvbm_elsewhere", raising=False)


class Ours(EvictionOrderTests):
    name: str

    def make(self, num_slots: int) -> EvictionOrder:
        return eviction_order(self.name, num_slots)


class TestFIFO(Ours):
    name = "fifo"


class TestLRU(Ours):
    name = "lru"


class TestLFU(Ours):
    name = "lfu"


class TestMultiLRU(Ours):
    name = "multi-lru"


class TestS3FIFO(Ours):
    name = "s3-fifo"


class TestARC(Ours):
    name = "arc"


class TestLineage(Ours):
    name = "lineage"
    gives_all = False


@pytest.mark.usefixtures("elsewhere")
class TestElsewhere(Ours):
    name = "random"
    leaf_first = False


def test_every_order_of_ours_is_tested() -> None:
    assert {suite.name for suite in Ours.__subclasses__()} == {*EVICTION_ORDERS, "random"}


class TestAll(AdmissionTests):
    copies_again = True

    def make(self, num_slots: int) -> Admission:
        return admission("all", num_slots)


class TestPresence(AdmissionTests):
    def make(self, num_slots: int) -> Admission:
        return admission("presence", num_slots)


class TestFrequency(AdmissionTests):
    def make(self, num_slots: int) -> Admission:
        return admission("frequency", num_slots)


class TestWriteThrough(PlacementTests):
    def make(self) -> Placement:
        return placement("write-through")


class TestExclusive(PlacementTests):
    def make(self) -> Placement:
        return placement("exclusive")


# -- the suites can fail --

DRAWN = "test_any_sequence_of_calls"


class GivesHeld(LRU):
    def discard(self, slots: Slots) -> None:
        pass


class GivesTwice(LRU):
    def victims(self, n: int) -> Slots:
        return np.repeat(super().victims(n), 2)


class GivesTooMany(LRU):
    def victims(self, n: int) -> Slots:
        return super().victims(n + 1)


class GivesForeign(LRU):
    def victims(self, n: int) -> Slots:
        return np.where(super().victims(n) > 3, 63, 62)


class Hoards(LRU):
    def victims(self, n: int) -> Slots:
        return super().victims(min(n, len(self) - 1)) if len(self) else super().victims(0)


class Miscounts(LRU):
    def __len__(self) -> int:
        return super().__len__() + 1


class RootFirst(LRU):
    def add(self, slots: Slots) -> None:
        super().add(slots[::-1].copy())


class KeepsArguments(LRU):
    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots)
        self.kept: list[Slots] = []

    def add(self, slots: Slots) -> None:
        self.kept.append(slots)

    def victims(self, n: int) -> Slots:
        for slots in self.kept:
            super().add(slots)
        self.kept.clear()
        return super().victims(n)


class WritesArguments(LRU):
    def add(self, slots: Slots) -> None:
        super().add(slots)
        slots.sort()


class WritesThroughArguments(LRU):
    def add(self, slots: Slots) -> None:
        super().add(slots)
        if slots.base is not None:
            slots.base.fill(0)


class ReusesResults(LRU):
    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots)
        self.buffer = np.zeros(num_slots, np.int64)

    def victims(self, n: int) -> Slots:
        chosen = super().victims(n)
        self.buffer[: len(chosen)] = chosen
        return self.buffer[: len(chosen)]


class Shares(LRU):
    def fresh(self) -> EvictionOrder:
        return self


class StaysSmall(LRU):
    def resize(self, num_slots: int) -> None:
        pass


class ReturnsLists(LRU):
    def victims(self, n: int) -> Any:
        return super().victims(n).astype(np.int32)


class ForgetsNothing(FIFO):
    def forget(self, slots: Slots) -> None:
        pass


class LosesWhatStays(LRU):
    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots)
        self.given: set[int] = set()

    def add(self, slots: Slots) -> None:
        super().add(np.array([slot for slot in slots.tolist() if slot not in self.given], np.int64))

    def victims(self, n: int) -> Slots:
        chosen = super().victims(n)
        self.given.update(chosen.tolist())
        return chosen

    def forget(self, slots: Slots) -> None:
        self.given.difference_update(slots.tolist())


class FailsOnNothing(LRU):
    def discard(self, slots: Slots) -> None:
        super().discard(slots[slots >= slots[0]])


class AdmitsAgain(Admission):
    def admit(self, tags: Tags, present: Mask) -> Mask:
        return np.ones(len(tags), np.bool_)


class AdmitsNothing(Admission):
    def admit(self, tags: Tags, present: Mask) -> Mask:
        return np.zeros(len(tags), np.bool_)


class AdmitsPositions(Admission):
    def admit(self, tags: Tags, present: Mask) -> Any:
        return (~present).nonzero()[0]


class AdmitsInPlace(Admission):
    def admit(self, tags: Tags, present: Mask) -> Mask:
        if present.base is None:
            return ~present
        return np.logical_not(present.base, out=present.base)


class AdmitsAView(Admission):
    def admit(self, tags: Tags, present: Mask) -> Mask:
        return ~present if present.any() else present.view()


class Nowhere(Exclusive):
    def store(self, tiers: Sequence[str]) -> Sequence[str]:
        return ()


class SomewhereElse(Exclusive):
    def store(self, tiers: Sequence[str]) -> Sequence[str]:
        return ("g1",)


class Twice(Exclusive):
    def store(self, tiers: Sequence[str]) -> Sequence[str]:
        return (tiers[0], tiers[0])


class Wanders(Exclusive):
    def promote(self, tier: str, tiers: Sequence[str]) -> Any:
        return Move(tiers[0])


class Rises(Exclusive):
    def evict(self, tier: str, tiers: Sequence[str]) -> Drop | Move:
        return Move(tiers[0])


class Stays(Exclusive):
    def evict(self, tier: str, tiers: Sequence[str]) -> Any:
        return Keep()


class TuplesOnly(Exclusive):
    def store(self, tiers: Sequence[str]) -> Sequence[str]:
        return tiers[:1] if isinstance(tiers, tuple) else ()


def failures(suite: Any, fixtures: Callable[[Any], list[dict[str, Any]]]) -> set[str]:
    """The tests of a suite that fail, without the one that draws its calls: it takes long to find the shortest."""
    failed: set[str] = set()
    for name in dir(suite):
        if name.startswith("test_") and name != DRAWN:
            wanted = getattr(type(suite), name).__code__.co_varnames[1:2]
            for values in fixtures(suite):
                try:
                    getattr(suite, name)(**{key: values[key] for key in wanted if key in values})
                except (AssertionError, ValueError, IndexError, TypeError):
                    failed.add(name.removeprefix("test_"))
    return failed


@pytest.mark.parametrize(
    ("order", "test"),
    [
        (GivesHeld, "a_held_block_is_not_given"),
        (GivesTwice, "gives_each_slot_once"),
        (GivesTooMany, "gives_each_slot_once"),
        (GivesForeign, "gives_each_slot_once"),
        (Hoards, "asked_for_more_it_gives_what_it_has"),
        (Miscounts, "a_new_order_is_empty"),
        (RootFirst, "a_leaf_goes_before_its_root"),
        (KeepsArguments, "gives_each_slot_once"),
        (WritesArguments, "gives_each_slot_once"),
        (WritesThroughArguments, "gives_each_slot_once"),
        (ReusesResults, "gives_each_slot_once"),
        (Shares, "fresh_orders_are_independent"),
        (StaysSmall, "more_slots"),
        (ReturnsLists, "a_new_order_is_empty"),
        (ForgetsNothing, "a_slot_of_a_forgotten_block_is_like_new"),
        (LosesWhatStays, "what_was_given_may_stay"),
        (FailsOnNothing, "empty_runs_change_nothing"),
    ],
)
def test_a_broken_order_fails(order: Callable[[int], EvictionOrder], test: str) -> None:
    class Suite(EvictionOrderTests):
        def make(self, num_slots: int) -> EvictionOrder:
            return order(num_slots)

    assert test in failures(Suite(), lambda suite: [{"caller": suite.call(order(suite.num_slots))}])


@pytest.mark.parametrize("order", [GivesHeld, GivesTooMany, Miscounts, ReusesResults])
def test_drawn_calls_find_a_broken_order(order: Callable[[int], EvictionOrder]) -> None:
    class Suite(EvictionOrderTests):
        def make(self, num_slots: int) -> EvictionOrder:
            return order(num_slots)

    def search() -> None:
        for _ in range(8):  # one run draws so few that it can miss the mistake
            getattr(Suite(), DRAWN)()

    before = settings.get_current_profile_name()
    settings.register_profile("no shrinking", phases=[Phase.generate])
    settings.load_profile("no shrinking")
    try:
        with pytest.raises((AssertionError, ValueError, ExceptionGroup)):
            search()
    finally:
        settings.load_profile(before)


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (AdmitsAgain, "what_is_there_already"),
        (AdmitsNothing, "a_block_that_is_asked_for_again_and_again_is_admitted"),
        (AdmitsPositions, "what_is_there_already"),
        (AdmitsInPlace, "what_is_there_already"),
        (AdmitsAView, "a_block_that_is_asked_for_again_and_again_is_admitted"),
    ],
)
def test_a_broken_admission_fails(broken: Callable[[], Admission], test: str) -> None:
    class Suite(AdmissionTests):
        def make(self, num_slots: int) -> Admission:
            return broken()

    assert test in failures(Suite(), lambda suite: [{}])


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (Nowhere, "a_new_block_goes_to_some_of_the_tiers"),
        (SomewhereElse, "a_new_block_goes_to_some_of_the_tiers"),
        (Twice, "a_new_block_goes_to_some_of_the_tiers"),
        (Wanders, "a_lower_copy_stays_or_goes"),
        (Rises, "an_evicted_block_sinks_or_goes"),
        (Stays, "an_evicted_block_sinks_or_goes"),
        (TuplesOnly, "tiers_may_be_a_list"),
    ],
)
def test_a_broken_placement_fails(broken: Callable[[], Placement], test: str) -> None:
    class Suite(PlacementTests):
        def make(self) -> Placement:
            return broken()

    assert test in failures(Suite(), lambda suite: [{"tiers": ("g2",)}, {"tiers": ("g2", "g3", "g4")}])


def test_what_is_not_broken_passes() -> None:
    """So that the tests above fail for the right reason."""

    class Orders(EvictionOrderTests):
        def make(self, num_slots: int) -> EvictionOrder:
            return LRU(num_slots)

    class Admissions(AdmissionTests):
        def make(self, num_slots: int) -> Admission:
            return Frequency(num_slots)

    class Placements(PlacementTests):
        def make(self) -> Placement:
            return Exclusive()

    assert failures(Orders(), lambda suite: [{"caller": suite.call(LRU(suite.num_slots))}]) == set()
    assert failures(Admissions(), lambda suite: [{}]) == set()
    assert failures(Placements(), lambda suite: [{"tiers": ("g2",)}, {"tiers": ("g2", "g3", "g4")}]) == set()
