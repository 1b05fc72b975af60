"""What is remembered by tag: compared with the same in Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.native import Ghosts, Sketch

WORD = (1 << 64) - 1
HALF = (1 << 32) - 1


def mix(tag: int) -> int:
    h = (tag + 0x9E3779B97F4A7C15) & WORD
    h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & WORD
    h = (h ^ h >> 27) * 0x94D049BB133111EB & WORD
    return h ^ h >> 31


class SketchOracle:
    """`Sketch` in Python."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.additions = capacity, 0
        self.counts: dict[tuple[int, int, int], int] = {}

    def _cells(self, tag: int) -> list[tuple[int, int, int]]:
        h = mix(tag)
        line = (h >> 32) * ((self.capacity + 7) // 8) >> 32
        return [(line, row, h >> 5 * row & 31) for row in range(4)]

    def estimate(self, tag: int) -> int:
        return min(self.counts.get(cell, 0) for cell in self._cells(tag))

    def add(self, tag: int) -> None:
        lowest = self.estimate(tag)
        for cell in self._cells(tag):
            if self.counts.get(cell, 0) == lowest < 15:
                self.counts[cell] = lowest + 1
        self.additions += 1
        if self.additions >= 10 * self.capacity:
            self.counts = {cell: count // 2 for cell, count in self.counts.items()}
            self.additions //= 2


class GhostsOracle:
    """`Ghosts` in Python."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.now = capacity, 0
        self.places: dict[int, tuple[int, int, int]] = {}

    def _place(self, tag: int) -> int:
        return (mix(tag) >> 32) * 4 * self.capacity >> 32

    def add(self, tag: int, kind: int) -> None:
        if kind < 2:
            self.places[self._place(tag)] = (tag, kind, self.now)
            self.now += 1

    def take(self, tag: int) -> int:
        there, kind, when = self.places.get(self._place(tag), (None, 0, 0))
        if there != tag or self.now - when > self.capacity:
            return 0
        del self.places[self._place(tag)]
        return 1 + kind


TAGS = st.lists(st.integers(0, 30) | st.integers(-(1 << 63), (1 << 63) - 1), max_size=12)


def run(tags: list[int]) -> np.ndarray:
    return np.array(tags, np.int64)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20), st.lists(TAGS, max_size=40))
def test_sketch_is_its_python_form(capacity: int, runs: list[list[int]]) -> None:
    sketch, oracle = Sketch(capacity), SketchOracle(capacity)
    for tags in runs:
        sketch.add(run(tags))
        for tag in tags:
            oracle.add(tag)
        asked = [*tags, *range(10)]
        assert list(sketch.estimate(run(asked))) == [oracle.estimate(tag) for tag in asked]


def test_counts_are_never_too_low_and_rarely_too_high() -> None:
    sketch, random = Sketch(10_000), np.random.default_rng(1)
    once, twice = np.split(random.integers(-(1 << 62), 1 << 62, 40_000), [30_000])
    for tags in (once, twice, twice):
        sketch.add(tags)
    low, high = (np.frombuffer(sketch.estimate(tags), np.uint8) for tags in (once, twice))
    assert low.min() == 1
    assert high.min() == 2
    assert (low > 1).mean() < 0.1


def test_counts_stop_at_fifteen_and_halve() -> None:
    sketch = Sketch(4)
    sketch.add(run([7] * 39))
    assert sketch.estimate(run([7])) == bytes([15])
    sketch.add(run([7]))
    assert sketch.estimate(run([7, 8])) == bytes([7, 0])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20), st.lists(st.tuples(st.booleans(), TAGS), max_size=40))
def test_ghosts_are_their_python_form(capacity: int, steps: list[tuple[bool, list[int]]]) -> None:
    ghosts, oracle = Ghosts(capacity), GhostsOracle(capacity)
    for adds, tags in steps:
        if adds:
            kinds = bytes(abs(tag) % 3 for tag in tags)
            ghosts.add(run(tags), kinds)
            for tag, kind in zip(tags, kinds, strict=True):
                oracle.add(tag, kind)
        else:
            assert list(ghosts.take(run(tags))) == [oracle.take(tag) for tag in tags]


def test_ghosts_forget_the_oldest_and_few_of_the_others() -> None:
    ghosts = Ghosts(10_000)
    ghosts.add(np.arange(30_000), bytes(30_000))
    found = np.frombuffer(ghosts.take(np.arange(30_000)), np.uint8)
    assert not found[:20_000].any()
    assert 0.86 < found[20_000:].mean() < 0.92
    assert not any(ghosts.take(np.arange(30_000)))


def test_the_kind_is_remembered() -> None:
    ghosts = Ghosts(10)
    ghosts.add(run([5, 6, 7]), bytes([0, 1, 255]))
    assert ghosts.take(run([5, 6, 7])) == bytes([1, 2, 0])


def test_misuse_is_refused() -> None:
    sketch, ghosts = Sketch(5), Ghosts(5)
    for call in (
        lambda: Sketch(0),
        lambda: Ghosts(0),
        lambda: Ghosts(1 << 40),
        lambda: sketch.add([1]),
        lambda: sketch.estimate(b"1"),
        lambda: ghosts.take(np.zeros(3)),
        lambda: ghosts.add(None, b""),
        lambda: ghosts.add(run([1]), b""),
        lambda: ghosts.add(run([1]), [0]),
    ):
        with pytest.raises(ValueError):  # noqa: PT011  each says something else
            call()
    broken: list[Any] = [lambda: Sketch(), lambda: Ghosts("5"), lambda: ghosts.add(run([1]))]
    for call in broken:
        with pytest.raises(TypeError):
            call()
