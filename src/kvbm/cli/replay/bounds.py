"""What a policy is compared with: everything fits, and MIN."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvbm.cli.replay.trace import Prompt, Workload

Advance = Callable[[int], None]
"""Told how many more prompts are done."""

_STEP = 64


@dataclass(frozen=True, slots=True)
class Hits:
    """What was there when it was asked for, each block with every earlier block of its prompt."""

    blocks: int
    tokens: int


def stepwise(prompts: Sequence[Prompt], advance: Advance) -> Iterator[Prompt]:
    """The prompts, with now and then a word about how far it got."""
    for at, prompt in enumerate(prompts, 1):
        yield prompt
        if at % _STEP == 0:
            advance(_STEP)
    advance(len(prompts) % _STEP)


def everything_fits(workload: Workload) -> Hits:
    """Nothing is evicted: only the first reference to a block misses."""
    present, blocks, tokens = bytearray(workload.unique), 0, 0
    for prompt in workload.prompts:
        numbers = prompt.blocks.tolist()
        hits = _prefix(numbers, present)
        blocks, tokens = blocks + hits, tokens + prompt.tokens_of(0, hits)
        for number in numbers[hits:]:
            present[number] = True
    return Hits(blocks, tokens)


class Min:
    """MIN: evict the block whose next use is furthest in the future, or was the last.

    The cache takes one reference after the other. A block that is not there is stored, and if that is one too many,
    the block that is needed furthest in the future goes: this may be the one just stored, so not to store is allowed.
    How far is counted in requests, and many blocks are needed by the same request. Which of them goes first?

    - `leaf_first=False`: the one referenced longest ago, in a prompt its root before its leaf. This is MIN as it is
      published for traces of this kind, where blocks are looked at one by one. But a root's absence makes its leaves
      useless: a policy that knows prefixes may be better than this.
    - `leaf_first=True`: of the request that needs them, the last block. No policy can be better.

    Linear in the references: a block that is there waits in the bucket of the request that needs it next. That request
    empties its bucket, and victims come from the front of the last bucket that has any.
    """

    def __init__(self, workload: Workload) -> None:
        self._prompts = workload.prompts
        self._unique = workload.unique
        self._never = len(workload.prompts)
        upcoming = [self._never] * workload.unique
        self._next_uses: list[list[int]] = [[]] * self._never
        for at in range(self._never - 1, -1, -1):
            numbers = workload.prompts[at].blocks.tolist()
            self._next_uses[at] = [upcoming[number] for number in numbers]
            for number in numbers:
                upcoming[number] = at

    def hits(self, capacity: int, *, leaf_first: bool, advance: Advance) -> Hits:
        """Of a cache of `capacity` blocks."""
        present, room, blocks, tokens = bytearray(self._unique), capacity, 0, 0
        buckets: list[deque[int]] = [deque() for _ in range(self._never + 1)]
        last: list[int] = []  # negated numbers of buckets that may have something
        for at, prompt in enumerate(stepwise(self._prompts, advance)):
            numbers = prompt.blocks.tolist()
            hits = _prefix(numbers, present)
            blocks, tokens = blocks + hits, tokens + prompt.tokens_of(0, hits)
            references = list(zip(numbers, self._next_uses[at], strict=True))
            for number, use in reversed(references) if leaf_first else references:
                if not (bucket := buckets[use]):
                    heapq.heappush(last, -use)
                bucket.append(number)
                if present[number]:
                    continue
                present[number] = True
                room -= 1
                if room < 0:
                    while not (bucket := buckets[-last[0]]):
                        heapq.heappop(last)
                    present[bucket.popleft()] = False
                    room += 1
            buckets[at].clear()
        return Hits(blocks, tokens)


def _prefix(numbers: Sequence[int], present: bytearray) -> int:
    """How many blocks of a prompt are there before the first that is not."""
    for count, number in enumerate(numbers):
        if not present[number]:
            return count
    return len(numbers)
