"""Coverage of a model whose layers need different blocks of a prompt: some all of them, some only the last ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np

from kvbm.blocks import LayerGroup, Pinned, Pool, find_groups, match_groups
from kvbm.core.errors import Misuse
from kvbm.core.keys import group_key
from kvbm.core.region import Slots
from kvbm.leader.core import Outgoing, Room
from kvbm.leader.coverage import BOUNDED, NOTHING, WAITED, Complete, Match
from kvbm.leader.requests import Request
from kvbm.tiers.stack import Stack
from kvbm.tiers.tier import Wanted

_WINDOWS = 4
"""Windows from one checkpoint to the next, where no other distance was asked for."""
_NULL = 0
"""The engine's block for what a group does not need any more."""

Block = tuple[int, int]
"""A layer group, and the number of a block in it."""


@dataclass(slots=True)
class _State:
    """What is remembered of a request."""

    needs: list[Block] = field(default_factory=list)
    """Each block that it holds."""
    passed: int = 0
    """Blocks that groups which do not keep all of theirs have been asked for."""
    plan: Wanted | None = None
    """What a hit over disk and G2 needs, while that is on its way."""
    parts: int = 0
    """Block where others were seen to go on differently; 0: nowhere."""
    end: int = 0
    """Block where it ended."""


def _of(request: Request) -> _State:
    assert isinstance(request.coverage, _State)
    return request.coverage


class Groups:
    """A `Coverage` for several layer groups, or one that does not need all of a prompt's blocks.

    Blocks of all groups lie in one pool, under keys of their own. Of a full group every block is stored. Of the others
    only what a hit can need that ends where one is likely to end: at the end of a prompt or of an answer, at a place
    where prompts were seen to part, and at checkpoints a fixed number of tokens apart. A block that could not be copied
    in the step that completes it is given up there: by the next step the engine may have used it for something else.

    Below host memory there is the disk; nothing is shared with other instances.
    """

    null: int | None = _NULL

    def __init__(self, pool: Pool, groups: Sequence[LayerGroup], checkpoint_tokens: int | None) -> None:
        self._pool, self._groups = pool, tuple(groups)
        self._sparse = [number for number, group in enumerate(groups) if group.kind != "full"]
        self._full = [number for number, group in enumerate(groups) if group.kind == "full"]
        reach = _WINDOWS * max(group.reach for group in groups)
        self._every = max(1, checkpoint_tokens // groups[0].block) if checkpoint_tokens else reach
        """Blocks from one checkpoint to the next."""

    def state(self) -> object:
        """See `Coverage`, here and below."""
        return _State()

    # ------------------------------------------------------------------ up

    def wants(self, request: Request, keys: Sequence[bytes], stack: Stack) -> tuple[Sequence[bytes], Wanted]:
        plan = _of(request).plan = self._plan(request, keys, 0, stack)
        asked = dict.fromkeys(key for number in self._full for key in _GroupKeys(keys, number)[:])
        return [*(asked | dict.fromkeys(plan.keys))], self._absent_first(plan)

    def _plan(self, request: Request, keys: Sequence[bytes], computed: int, stack: Stack) -> Wanted:
        """What the longest hit needs that disk and G2 could give together."""
        where, room = stack.reachable(request.seeker), stack.promotion.room_for(request.id)
        found = find_groups(where, self._groups, self._views(keys), computed, room)
        if found.reach > found.longest:
            _of(request).parts = max(_of(request).parts, found.reach)
        needed = _keys(request, found.blocks)
        absent = int((~self._pool.present(needed)).sum())
        if not absent:
            return Wanted([])
        alone = find_groups(self._pool, self._groups, self._views(keys), computed, room).length
        return Wanted(needed, (found.length - max(alone, computed)) / absent)

    def _absent_first(self, plan: Wanted) -> Wanted:
        """Nothing, where all of it is in G2."""
        near = self._pool.present(plan.keys)
        order = [] if near.all() else np.argsort(near, kind="stable").tolist()
        return plan._replace(keys=[plan.keys[at] for at in order])

    def _comes(self, request: Request, keys: Sequence[bytes], computed: int, stack: Stack) -> bool:
        """Whether what a longer hit needs is on its way."""
        plan = _of(request).plan
        if plan is None or not (wanted := self._absent_first(plan)).keys:
            plan = self._plan(request, keys, computed, stack)
            wanted = self._absent_first(plan)
        comes = stack.waits(request.seeker, wanted, computed)
        _of(request).plan = plan if comes else None  # asked for at every step: it is made once
        return comes

    def match(
        self, request: Request, keys: Sequence[bytes], computed: int, room: Room, stack: Stack | None
    ) -> Match | None:
        if stack is not None and self._comes(request, keys, computed, stack):
            return None
        hit = match_groups(self._pool, self._groups, self._views(keys), computed, max(0, room.most - room.held))
        state, record = _of(request), request.record
        record.matched = max(0, hit.longest - computed)
        if hit.reach > hit.longest:
            state.parts = max(state.parts, hit.reach)
            record.note("G2 holds more of the prompt, but not every block that its layer groups need for a hit there")
        if hit.length < hit.longest:
            if room.held:
                hit.held.drop()
                record.note(WAITED)
                return None
            record.note(f"KVBM did not load all of {record.matched} blocks: {BOUNDED}")
        if not len(hit.held):
            hit.held.drop()
            if not hit.longest:
                record.note("G2 did not hold the blocks that a longer prefix needs")
            return NOTHING
        state.needs = hit.blocks
        return Match(hit.length - computed, hit.held)

    def aim(self, request: Request, hold: Pinned, count: int) -> tuple[Slots, Slots]:
        needs, tables = _of(request).needs, request.tables
        end = request.record.device_blocks + count
        if max(block for _, block in needs) + 1 != end:
            raise Misuse("the engine takes a part of a hit; where layer groups need different blocks it cannot")
        targets = [tables[group][block] for group, block in needs]
        before = [
            tables[group][first - 1]
            for group in self._sparse
            if (first := self._groups[group].first(end)) > request.record.device_blocks
        ]
        if _NULL in targets or any(block != _NULL for block in before):
            raise Misuse("the engine's table has other blocks than its layer groups need")
        return np.asarray(targets, np.int64), np.asarray([block for _, block in needs], np.int64)

    def tokens_each(self, request: Request, tokens: int) -> float | None:
        needs = _of(request).needs
        return tokens / len(needs) if needs else None

    # ------------------------------------------------------------------ down

    def ready(self, request: Request, complete: int, worth: int) -> Complete:
        tables = request.tables
        # First what cannot wait.
        blocks = [(group, block) for group, block in self._ending_in(request, worth) if tables[group][block] != _NULL]
        blocks += [(number, block) for number in self._full for block in range(request.offered, worth)]
        _of(request).passed = complete
        return _Chosen(request, blocks)

    def offered(
        self, request: Request, complete: int, ready: Complete, taken: Sequence[int], left: Sequence[int]
    ) -> None:
        assert isinstance(ready, _Chosen)
        rest = (ready.blocks[at] for at in left)
        request.offered = min((block for group, block in rest if group in self._full), default=complete)

    def skip(self, request: Request, complete: int) -> None:
        request.offered = _of(request).passed = complete

    def ends(self, request: Request, complete: int) -> bool:
        if complete < request.offered:  # it was preempted and has no blocks
            return False
        # All that the engine still has of it may be looked at again: the table is of now.
        state, request.computed = _of(request), 0
        state.passed, state.end = 0, complete
        return True

    def in_order(self, request: Request) -> Sequence[bytes]:
        _of(request).passed = request.computed = 0
        blocks = [*self._ending_in(request, request.offered)]
        blocks += [(number, block) for number in self._full for block in range(request.offered)]
        blocks.sort(key=lambda each: each[1])
        return _keys(request, blocks)

    def _ending_in(self, request: Request, complete: int) -> Iterator[Block]:
        """Blocks of the sparse groups that are complete now, and that a hit needs which ends where one may end."""
        for number in self._sparse:
            group = self._groups[number]
            # What left the window before this step may be another's by now.
            least = max(_of(request).passed, group.after(request.computed))
            blocks: set[int] = set()
            for end in self._ends(request, least, complete, group):
                blocks.update(range(max(least, group.first(end)), min(complete, end)))
            for block in sorted(blocks):
                yield number, block

    def _ends(self, request: Request, least: int, complete: int, group: LayerGroup) -> Iterator[int]:
        """Where a hit may end that needs any of the blocks from `least` to `complete`."""
        prompt, state = request.record.prompt_tokens, _of(request)
        # The same prompt again: its last token is always computed. A longer one.
        yield from {(prompt - 1) // group.block, prompt // group.block, state.parts, state.end, request.worth}
        if group.kind == "state" and complete * group.block <= prompt:
            yield complete  # in a prompt the engine keeps a state only where a step ends
        end = (least // self._every + 1) * self._every
        while group.first(end) < complete:
            yield end
            end += self._every

    def _views(self, keys: Sequence[bytes]) -> list[_GroupKeys]:
        return [_GroupKeys(keys, number) for number in range(len(self._groups))]


class _Chosen:
    """Blocks of several groups."""

    def __init__(self, request: Request, blocks: Sequence[Block]) -> None:
        self._request, self.blocks, self.keys = request, blocks, _keys(request, blocks)

    @property
    def prompt(self) -> Sequence[bytes]:
        return _keys(self._request, (each for each in self.blocks if each[1] < self._request.asked))

    def take(self, at: Sequence[int]) -> Outgoing:
        blocks, tables = [self.blocks[place] for place in at], self._request.tables
        before = iter(_keys(self._request, [(group, block - 1) for group, block in blocks if block]))
        return Outgoing(
            [self.keys[place] for place in at],
            tuple(next(before) if block else None for _, block in blocks),
            np.asarray([tables[group][block] for group, block in blocks], np.int64),
            np.asarray([block for _, block in blocks], np.int64),
        )


def _keys(request: Request, blocks: Iterable[Block]) -> list[bytes]:
    return [group_key(request.keys[block], group) for group, block in blocks]


class _GroupKeys(Sequence[bytes]):
    """Keys of a prompt's blocks in a layer group, made when they are looked at."""

    def __init__(self, keys: Sequence[bytes], group: int) -> None:
        self._keys, self._group = keys, group

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, int):
            return group_key(self._keys[index], self._group)
        return [group_key(key, self._group) for key in self._keys[index]]
