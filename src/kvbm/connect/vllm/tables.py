"""Which blocks of the engine requests have: what is to be done about a load inside a step that failed.

Only look-ups in dictionaries: it has to work when everything else of KVBM is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request


class Tables:
    """`block` tokens lie in a block of the first layer group."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.requests: dict[str, Request] = {}
        self._ended: list[Sequence[int]] = []
        """Device blocks of requests that ended since the last step was scheduled."""

    def begin(self, request: Request) -> None:
        """A request arrived."""
        self.requests[request.request_id] = request

    def end(self, request_id: str, blocks: Sequence[int]) -> None:
        """It is over, and had these blocks."""
        self.requests.pop(request_id, None)
        self._ended.append(blocks)

    def seal(self) -> None:
        """A step was scheduled."""
        self._ended.clear()

    def not_loaded(self, blocks: set[int], manager: KVCacheManager) -> tuple[set[int], dict[str, int]]:
        """What vLLM does about these device blocks, whose load inside the step failed, is not enough: they stay in its
        prefix cache, for others to go on from, although the request that is to compute them may be preempted or end
        first, or take several steps; and who shares them in the same step is told that they are computed. So each
        request with one of them computes it itself, and what follows it is found by nobody. Returns all blocks that
        hold nothing that counts, and from which of its blocks on each request computes again."""
        stale, again = set(blocks), dict[str, int]()
        tables = [(None, table) for table in self._ended]
        tables += [(request, manager.get_block_ids(name)[0]) for name, request in self.requests.items()]
        for request, table in tables:
            first = next((at for at, block in enumerate(table) if block in blocks), None)
            if first is None:
                continue
            stale.update(table[first:])
            if request is not None:
                request.num_computed_tokens = min(request.num_computed_tokens, first * self.block)
                again[request.request_id] = first
        manager.evict_blocks(stale)
        return stale, again

    def nothing_counts(self, manager: KVCacheManager) -> None:
        """Every request computes all of its blocks again, and nobody finds any of them."""
        for request in self.requests.values():
            request.num_computed_tokens = 0
        manager.evict_blocks(set(range(manager.block_pool.num_gpu_blocks)))
