"""The leader of a model whose layers need different blocks of a prompt: some all of them, some only the last ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

from kvbm.blocks import LayerGroup, Pinned, find_groups, match_groups
from kvbm.core.errors import Misuse
from kvbm.core.keys import group_key
from kvbm.core.region import Slots
from kvbm.leader.leader import Leader
from kvbm.leader.provenance import Provenance
from kvbm.leader.requests import Request
from kvbm.tiers.tier import Wanted

_WINDOWS = 4
"""Windows from one checkpoint to the next, where no other distance was asked for."""
_NULL = 0
"""The engine's block for what a group does not need any more."""


class HybridLeader(Leader):
    """A `Leader` for several layer groups, or one that does not need all of a prompt's blocks.

    Blocks of all groups lie in one pool, under keys of their own. Of a full group every block is stored. Of the others
    only what a hit can need that ends where one is likely to end: at the end of a prompt or of an answer, at a place
    where prompts were seen to part, and at checkpoints a fixed number of tokens apart. A block that could not be copied
    in the step that completes it is given up there: by the next step the engine may have used it for something else.

    Below host memory there is the disk; nothing is shared with other instances.
    """

    def __init__(self, *args: Any, groups: Sequence[LayerGroup], checkpoint_tokens: int | None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.provenance = Provenance(self.next_job, _NULL)
        self._groups = tuple(groups)
        self._sparse = [number for number, group in enumerate(groups) if group.kind != "full"]
        reach = _WINDOWS * max(group.reach for group in groups)
        self._every = max(1, checkpoint_tokens // groups[0].block) if checkpoint_tokens else reach
        """Blocks from one checkpoint to the next."""

    # ------------------------------------------------------------------ up

    def _asked(self, request: Request, keys: Sequence[bytes]) -> tuple[Sequence[bytes], Wanted]:
        request.plan = self._plan(request, keys, 0)
        full = [number for number, group in enumerate(self._groups) if group.kind == "full"]
        asked = dict.fromkeys(key for number in full for key in _GroupKeys(keys, number)[:])
        return [*(asked | dict.fromkeys(request.plan.keys))], self._absent_first(request.plan)

    def _plan(self, request: Request, keys: Sequence[bytes], computed: int) -> Wanted:
        """What the longest hit needs that disk and G2 could give together."""
        assert self.lower is not None
        where, room = self.lower.reachable(request.seeker), self.lower.promotion.room_for(request.id)
        found = find_groups(where, self._groups, self._views(keys), computed, room)
        if found.reach > found.longest:
            request.parts = max(request.parts, found.reach)
        needed = self._keys(request, found.blocks)
        absent = int((~self.pool.present(needed)).sum())
        if not absent:
            return Wanted([])
        alone = find_groups(self.pool, self._groups, self._views(keys), computed, room).length
        return Wanted(needed, (found.length - max(alone, computed)) / absent)

    def _absent_first(self, plan: Wanted) -> Wanted:
        """Nothing, where all of it is in G2."""
        near = self.pool.present(plan.keys)
        order = [] if near.all() else np.argsort(near, kind="stable").tolist()
        return plan._replace(keys=[plan.keys[at] for at in order])

    def _comes(self, request: Request, keys: Sequence[bytes], computed: int) -> bool:
        """Whether what a longer hit needs is on its way."""
        if self.lower is None:
            return False
        plan = request.plan
        if plan is None or not (wanted := self._absent_first(plan)).keys:
            plan = self._plan(request, keys, computed)
            wanted = self._absent_first(plan)
        comes = self.lower.waits(request.seeker, wanted, computed)
        request.plan = plan if comes else None  # asked for at every step: it is made once
        return comes

    def _hold(self, request: Request, keys: Sequence[bytes], computed: int) -> int | None:
        if self._comes(request, keys, computed):
            return None
        room = max(1, int(self.pool.total * self._settings.held_share))
        hit = match_groups(self.pool, self._groups, self._views(keys), computed, max(0, room - self._held))
        record = request.record
        record.matched = max(0, hit.longest - computed)
        if hit.reach > hit.longest:
            request.parts = max(request.parts, hit.reach)
            record.note("G2 holds more of the prompt, but not all that a hit there needs of every layer group")
        if hit.length < hit.longest:
            if self._held:
                hit.held.drop()
                record.note("waited: loads of other requests hold their share of G2")
                return None
            record.note(f"loaded not all of {record.matched} blocks: holds of G2 are bounded")
        if not len(hit.held):
            hit.held.drop()
            if not hit.longest:
                record.note("G2 did not hold what a longer prefix needs")
            return 0
        request.hold, request.needs = hit.held, hit.blocks
        self._held += len(hit.held)
        self._waiting.append(request)
        return hit.length - computed

    def _aim(self, request: Request, hold: Pinned, count: int) -> tuple[Slots, Slots]:
        end = request.record.device_blocks + count
        if max(block for _, block in request.needs) + 1 != end:
            raise Misuse("the engine takes a part of a hit; where layer groups need different blocks it cannot")
        targets = [self._tables(request)[group][block] for group, block in request.needs]
        before = [
            self._tables(request)[group][first - 1]
            for group in self._sparse
            if (first := self._groups[group].first(end)) > request.record.device_blocks
        ]
        if _NULL in targets or any(block != _NULL for block in before):
            raise Misuse("the engine's table has other blocks than its layer groups need")
        return np.asarray(targets, np.int64), np.asarray([block for _, block in request.needs], np.int64)

    # ------------------------------------------------------------------ down

    def reach(self, request_id: str, complete: int, computed: int) -> None:
        """`advance`, where before this step the request's first `computed` tokens were computed."""
        if (request := self.requests.get(request_id)) is not None:
            request.computed = computed
            self.advance(request_id, complete)

    def _offer(self, request: Request, complete: int) -> None:
        if (reason := self._no_store(request)) is not None:
            request.record.note(f"not offloaded: {reason}")
            request.offered = request.passed = complete
            return
        tables, worth = self._tables(request), self._worth(request, complete)
        # First what cannot wait.
        wanted = [(group, block) for group, block in self._ending_in(request, worth) if tables[group][block] != _NULL]
        wanted += [
            (number, block)
            for number, group in enumerate(self._groups)
            if group.kind == "full"
            for block in range(request.offered, worth)
        ]
        request.passed = complete
        keys = self._keys(request, wanted)
        self._wanted(request, complete, self._keys(request, (each for each in wanted if each[1] < request.asked)))
        slots, absent = self._room(request, keys)
        rest = absent
        if slots is not None:
            chosen, rest = absent[: len(slots)], absent[len(slots) :]
            blocks = [wanted[at] for at in chosen]
            before = self._keys(request, [(group, block - 1) for group, block in blocks if block])
            parents = iter(before)
            self._store(
                request, slots, [keys[at] for at in chosen],
                tuple(next(parents) if block else None for _, block in blocks),
                np.asarray([tables[group][block] for group, block in blocks], np.int64),
                np.asarray([block for _, block in blocks], np.int64),
            )  # fmt: skip
        request.offered = min(
            (wanted[at][1] for at in rest if self._groups[wanted[at][0]].kind == "full"), default=complete
        )

    def _offer_last(self, request: Request, complete: int) -> None:
        if complete >= request.offered:  # not where it was preempted and has no blocks
            # All that the engine still has of it may be looked at again: the table is of now.
            request.computed, request.passed, request.end = 0, 0, complete
            self._offer(request, complete)

    def _ending_in(self, request: Request, complete: int) -> Iterator[tuple[int, int]]:
        """Blocks of the sparse groups that are complete now, and that a hit needs which ends where one may end."""
        for number in self._sparse:
            group = self._groups[number]
            # What left the window before this step may be another's by now.
            least = max(request.passed, group.after(request.computed))
            blocks: set[int] = set()
            for end in self._ends(request, least, complete, group):
                blocks.update(range(max(least, group.first(end)), min(complete, end)))
            for block in sorted(blocks):
                yield number, block

    def _ends(self, request: Request, least: int, complete: int, group: LayerGroup) -> Iterator[int]:
        """Where a hit may end that needs any of the blocks from `least` to `complete`."""
        prompt = request.record.prompt_tokens
        # The same prompt again: its last token is always computed. A longer one.
        yield from {(prompt - 1) // group.block, prompt // group.block, request.parts, request.end, request.worth}
        if group.kind == "state" and complete * group.block <= prompt:
            yield complete  # in a prompt the engine keeps a state only where a step ends
        end = (least // self._every + 1) * self._every
        while group.first(end) < complete:
            yield end
            end += self._every

    def _in_order(self, request: Request) -> Sequence[bytes]:
        request.passed = request.computed = 0
        blocks = [*self._ending_in(request, request.offered)]
        for number, group in enumerate(self._groups):
            if group.kind == "full":
                blocks += [(number, block) for block in range(request.offered)]
        blocks.sort(key=lambda each: each[1])
        return self._keys(request, blocks)

    # ------------------------------------------------------------------ of a request

    def _views(self, keys: Sequence[bytes]) -> list[_GroupKeys]:
        return [_GroupKeys(keys, number) for number in range(len(self._groups))]

    @staticmethod
    def _tables(request: Request) -> list[list[int]]:
        return [request.g1, *request.others]

    @staticmethod
    def _keys(request: Request, blocks: Iterable[tuple[int, int]]) -> list[bytes]:
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
