"""vLLM's calls, turned into KVBM's. With `geometry.py` the only code that knows vLLM's types; it decides nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, overload

from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from kvbm.build.leader import build_leader
from kvbm.build.tiers import drain_s
from kvbm.build.worker import build_worker
from kvbm.connect.vllm import adapters, configured, contract, geometry, identity, weights
from kvbm.connect.vllm.ending import before_sigterm
from kvbm.connect.vllm.images import NO_ITEMS, Images, Items, embedded, starting_before
from kvbm.connect.vllm.resets import Resets, changing_weights
from kvbm.connect.vllm.sessions import Sessions
from kvbm.connect.vllm.stats import KvbmStats
from kvbm.connect.vllm.tables import Tables
from kvbm.core.config import Resolved
from kvbm.core.events import Admitted, Cleared, Event, Removed, Stored
from kvbm.core.keys import group_of, variant_keys
from kvbm.leader.requests import RequestParams
from kvbm.link.messages import Step, decode_step, encode
from kvbm.observe.log import Seldom
from kvbm.worker.worker import Collected, Worker

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

log = logging.getLogger(__name__)

MEDIUM = "CPU"
"""How vLLM's KV events call host memory."""
_GRACE = 5.0
"""Seconds past the deadline of a copy that a reset waits for it."""
_TEARDOWN_S = 5.0
"""How long an engine may take to end its workers after its last writes."""


@dataclass(slots=True)
class KvbmMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """A step, already encoded: vLLM pickles this object between its processes, our own types never are."""

    payload: bytes
    promises: bytes = b""
    """See `Promises` (`guard.py`)."""


class Keys(Sequence[bytes]):
    """A request's block keys as a view that grows with it, where the engine's list of hashes cannot serve as it is:
    several hashes per block, values that its hash does not cover, images that it knows by name. `items` are where those
    begin and what they are; a block has so many `tokens`. There are no keys with an `adapter` until it is known which
    that is."""

    def __init__(
        self, hashes: Sequence[bytes], per_block: int, variant: bytes, items: Items = NO_ITEMS, tokens: int = 0,
        *, adapter: bool = False,
    ) -> None:  # fmt: skip
        self._hashes, self._per_block, self._variant = hashes, per_block, variant
        self._items, self._tokens = items.known, tokens
        self._given, self._hidden = variant, adapter
        self._known: list[bytes] = []
        self._last = b""
        """The engine's hash that the last known key was made of."""

    def under(self, digest: bytes) -> None:
        """From now on they are those of the blocks with the adapter of this digest."""
        self._variant, self._hidden = b"adapter " + digest + self._given, False
        self._known.clear()

    def __len__(self) -> int:
        return 0 if self._hidden else len(self._hashes) // self._per_block

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        step, known = self._per_block, len(self._known)
        if known and (len(self) < known or self._hashes[known * step - 1] != self._last):
            # A streaming session takes its last sampled token back, and hashes anew what it was in.
            self._known.clear()
        if len(self._known) < len(self):
            new = self._hashes[len(self._known) * step + step - 1 :: step][: len(self) - len(self._known)]
            self._known += self._told_apart(new)
            self._last = self._hashes[len(self._known) * step - 1]
        return self._known[index]

    def _told_apart(self, new: Sequence[bytes]) -> list[bytes]:
        """The keys of the blocks behind the known ones."""
        if not self._items:
            return variant_keys(new, self._variant) if self._variant else list(new)
        first = len(self._known) + 1
        added = [self._variant + starting_before(self._items, (first + at) * self._tokens) for at in range(len(new))]
        return [variant_keys([key], more)[0] if more else key for key, more in zip(new, added, strict=True)]


def _not_cached(request: Request, tokens: int) -> None:
    """Has vLLM leave these prompt tokens out of those that it reports as cached: what an answer's usage says, and what
    providers bill. Only there: they were not computed here."""
    stats = request.prefill_stats
    if stats is not None and not request.num_preemptions:  # else they are of its first placement
        stats.num_cached_tokens = stats.num_prompt_tokens - stats.num_computed_tokens - tokens


class SchedulerSide:
    """Beside vLLM's scheduler. All methods on the engine core's thread."""

    def __init__(self, config: VllmConfig, kv: KVCacheConfig, resolved: Resolved) -> None:
        self._block = kv.kv_cache_groups[0].kv_cache_spec.block_size
        self._per_block = self._block // contract.hash_block_tokens(config, kv)
        self._async = resolved.settings.onboard == "async"
        self.tables = Tables(self._block)
        """What the guard knows of requests."""
        self._computed: dict[str, int] = {}
        """Request -> tokens that the engine itself held when it asked last."""
        self._sessions = Sessions(config, kv)
        self._images = Images(config, trust_names=resolved.settings.trust_image_names)
        self._towers = adapters.reaches_encoder(config)
        self.side = build_leader(
            resolved,
            geometry.place(config, kv),
            identity.namespace(config, kv),
            block_tokens=self._block,
            shares_device_blocks=bool(config.cache_config.enable_prefix_caching),
            groups=geometry.layer_groups(kv),
            choose=weights.chooser(config, fixed_dummies=resolved.settings.dummy_weights_fixed),
        )
        self.leader = self.side.leader
        self.control = self.side.control
        self._drain_s = drain_s(resolved.settings)
        """How long to write before the end, until that has been arranged."""
        self._quiet_s = max(resolved.settings.load_deadline_s, resolved.settings.store_deadline_s) + _GRACE
        self._resets = Resets(changing_weights(config, resolved.settings))
        self._events: list[Event] = []
        if config.kv_events_config is not None and config.kv_events_config.enable_kv_cache_events:
            self.leader.core.pool.add_observer(self)
        self._stats = KvbmStats.since(self.side.totals)
        self._wrong = Seldom(log)

    def on_event(self, event: Event) -> None:
        """Keeps the pool's events until the engine takes them."""
        self._events.append(event)

    def on_new_request(self, request: Request) -> None:
        if self._drain_s > 0:
            # Not before there is something to write: vLLM before 0.32 sets its own handler after all of this is made.
            before_sigterm(partial(self.side.drain, self._drain_s))
            self._drain_s = 0.0
        self._heed_reset()
        params, wrong = RequestParams.parse(request.kv_transfer_params)
        if not isinstance(request.kv_transfer_params, Mapping):
            request.kv_transfer_params = None  # a client may send anything (`vllm_xargs`), and vLLM looks into it next
        if wrong:
            # What clients send must not fill the log; `kvbm explain` has it of each request.
            self._wrong.warning("KVBM: request %.100s: %s", request.request_id, wrong[0])
        if request.skip_reading_prefix_cache:
            params = replace(params, load=False)
        embeds = embedded(request)
        items = self._images.begin(request)
        for spoiled in items.spoiled:
            self.leader.bar(spoiled, "an image, video or sound in it has a name that was given to another one")
        keys: Sequence[bytes] = request.block_hashes
        variant = None
        if request.lora_request is not None:
            keys = Keys(request.block_hashes, self._per_block, embeds, items, self._block, adapter=True)
            variant = adapters.variant(request, keys, towers=self._towers)
        elif self._per_block > 1 or embeds or items.known:
            keys = Keys(request.block_hashes, self._per_block, embeds, items, self._block)
        self.leader.begin(request.request_id, keys, params, request.num_prompt_tokens, variant, items.problem, wrong)

    def match(self, request: Request, computed_tokens: int) -> tuple[int | None, bool]:
        """vLLM's get_num_new_matched_tokens. The block of the last token is always left to the engine."""
        self._heed_reset()
        self._computed[request.request_id] = computed_tokens
        self._sessions.forget(request.request_id)
        if request.skip_reading_prefix_cache or computed_tokens % self._block:
            return 0, False
        blocks = self.leader.match(
            request.request_id, computed_tokens // self._block, (request.num_tokens - 1) // self._block
        )
        if blocks is None:
            return None, False
        return blocks * self._block, self._async and blocks > 0

    def place(self, request: Request, blocks: KVCacheBlocks, external_tokens: int) -> bool:
        """vLLM's update_state_after_alloc. Whether the step will contain a load for it."""
        if self._sessions.resumes(request):
            return False
        device = self._computed.get(request.request_id, 0)
        first, *others = blocks.get_block_ids()
        tokens = self.leader.place(
            request.request_id,
            first,
            external_tokens // self._block,
            Admitted(request.num_tokens, device, external_tokens),
            others,
        )
        if tokens.pulled_tokens:
            _not_cached(request, tokens.pulled_tokens)
        return external_tokens > 0 and self.leader.loads(request.request_id)

    def step(self, output: SchedulerOutput) -> bytes:
        """vLLM's build_connector_meta."""
        self._heed_reset()
        leader = self.leader
        # What the engine writes before its forward pass: mostly blocks that it has just handed out.
        early = list(getattr(output, "new_block_ids_to_zero", None) or ())
        early += [copy.dst_block_id for copy in getattr(output, "kv_cache_block_copies", None) or ()]
        if early:
            leader.reuse(early)
        computed = dict[str, int]()
        for new in output.scheduled_new_reqs:
            computed[new.req_id] = tokens = new.num_computed_tokens
            self._placed(new.req_id, new.block_ids, tokens)
        cached = output.scheduled_cached_reqs
        for request_id, groups, tokens in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            computed[request_id] = tokens
            if groups is not None and request_id in cached.resumed_req_ids:
                self._placed(request_id, groups, tokens)
            elif groups is not None:
                leader.grow(request_id, groups[0], replace=False, others=groups[1:])
                for table in groups:
                    leader.reuse(table)
        for request_id, scheduled in output.num_scheduled_tokens.items():  # in the order they were given blocks in
            self._advance(request_id, computed[request_id], scheduled)
            self._sessions.computes(request_id, computed[request_id] + scheduled)
        self._sessions.resumed.clear()
        return encode(leader.seal(tokens=output.total_num_scheduled_tokens))

    def _placed(self, request_id: str, groups: Sequence[Sequence[int]], computed: int) -> None:
        found, first = -(-computed // self._block), computed // self._block
        if request_id not in self._sessions.resumed:
            self.leader.grow(request_id, groups[0], replace=True, found=found, others=groups[1:])
        elif self._sessions.certain:
            self.leader.go_on(request_id, groups[0], first, groups[1:])
        else:  # what it has of the next block counts as found: by nobody that KVBM knows
            self.leader.grow(request_id, groups[0], replace=True, found=first + 1, others=groups[1:])
        for table in groups:
            self.leader.reuse(table[first:])

    def _advance(self, request_id: str, computed: int, scheduled: int) -> None:
        request = self.tables.requests.get(request_id)
        if request is not None:
            tokens = min(computed + scheduled, request.num_tokens)
            complete = min(tokens // self._block, len(request.block_hashes) // self._per_block)
            self.leader.advance(request_id, complete, computed)

    def not_loaded(self, stale: Iterable[int], again: Mapping[str, int]) -> None:
        """These device blocks hold nothing that counts, and these requests compute `again` from such a block on."""
        for name, first in again.items():
            self.leader.redo(name, first)
        self.leader.forget(stale)

    def stepped(self) -> None:
        """vLLM's update_connector_output."""
        self.leader.stepped()

    def finish(self, request: Request, blocks: Sequence[int], others: Sequence[Sequence[int]] = ()) -> None:
        """vLLM's request_finished, and request_finished_all_groups."""
        self._images.finish(request)
        self._computed.pop(request.request_id, None)
        self._sessions.forget(request.request_id)
        tokens = min(request.num_computed_tokens, request.num_tokens)
        complete = min(tokens // self._block, len(request.block_hashes) // self._per_block, len(blocks))
        self.leader.finish(request.request_id, blocks, complete, others)

    def take_events(self) -> Iterable[KVCacheEvent]:
        events, self._events = self._events, []
        for event in events:
            match event:
                case Stored(keys=keys, parent=parent):  # of one group: a run of blocks that follow each other
                    yield BlockStored(
                        block_hashes=_external(keys), parent_block_hash=_external([parent])[0] if parent else None,
                        token_ids=[], block_size=self._block, lora_id=None, medium=MEDIUM, lora_name=None,
                        group_idx=group_of(keys[0])[1],
                    )  # fmt: skip
                case Removed(keys=keys):
                    for group, theirs in groupby(sorted(keys, key=_group), key=_group):
                        yield BlockRemoved(block_hashes=_external(theirs), medium=MEDIUM, group_idx=group)
                case Cleared():
                    yield AllBlocksCleared()

    def stats(self) -> KvbmStats | None:
        """What was counted since the last call; None when nothing was."""
        news = self._stats.advance(self.side.totals)
        return None if news.is_empty() else news

    def bind(self, pool: BlockPool) -> None:
        """vLLM's bind_gpu_block_pool."""
        self._resets.watch(pool)

    def _heed_reset(self) -> None:
        if self._resets.noticed():
            self._new_generation("the engine's prefix cache was reset")

    def _new_generation(self, what: str) -> None:
        self.leader.reset()
        if self._resets.why is not None:
            self.leader.core.isolate(f"{what}, and its weights may be others now ({self._resets.why})")

    def reset(self) -> bool:
        """vLLM's reset_cache: an explicit reset, a pause or a sleep that clears. Returns when the copies that began
        before are over or given up; vLLM may give their memory away next."""
        self._resets.noticed()
        self._new_generation("the engine's caches were reset")
        self.leader.core.quiesce(self._quiet_s)
        return True

    def forget(self) -> None:
        """Of a reset what is left to do where this side is off."""
        self.leader.reset()
        self.leader.core.quiesce(self._quiet_s)

    @property
    def off(self) -> str | None:
        """Why it does nothing any more, if so."""
        return self.leader.core.health.off

    def turn_off(self, why: str) -> None:
        """From now on nothing is done, and nothing that is being copied is published."""
        self.leader.core.turn_off(why)

    def close(self) -> None:
        self.side.close()


def _external(keys: Iterable[bytes]) -> list[Any]:
    """Keys as vLLM writes block hashes in its events (64-bit numbers unless told otherwise)."""
    return [maybe_convert_block_hash(group_of(key)[0]) for key in keys]


def _group(key: bytes) -> int:
    return group_of(key)[1]


class WorkerSide:
    """Beside vLLM's model runner. All methods on the worker's main thread."""

    def __init__(self, config: VllmConfig, kv: KVCacheConfig, resolved: Resolved) -> None:
        self._config, self._kv, self._settings = config, kv, resolved.settings
        self._worker: Worker | None = None
        self._step = Step()
        self._after = False
        """Whether what follows this step's forward pass has begun."""

    def register(self, caches: dict[str, torch.Tensor]) -> None:
        """vLLM's register_kv_caches."""
        self._worker = build_worker(
            self._settings,
            geometry.place(self._config, self._kv),
            identity.namespace(self._config, self._kv),
            geometry.g1_region(self._kv, caches, str(self._config.cache_config.cache_dtype)),
            get_tensor_model_parallel_rank(),
            identity.layers(self._config, self._kv, caches) | identity.others(self._config),
            configured.began(self._config),
            adapters.find(self._config),
        )
        seconds = drain_s(self._settings)
        apart = self._config.parallel_config.distributed_executor_backend == "mp"
        if seconds and apart:
            # The leader is another process, and still needs this rank to write.
            before_sigterm(partial(self._worker.outlast_leader, seconds + _TEARDOWN_S))

    @property
    def worker(self) -> Worker:
        assert self._worker is not None, "vLLM stepped before it registered its KV caches"
        return self._worker

    def before_step(self, payload: bytes) -> None:
        self._step, self._after = decode_step(payload), False
        self.worker.before_step(self._step)

    def before_forward(self) -> None:
        self.worker.before_forward(self._step)

    def after_forward(self) -> None:
        if not self._after:
            self._after = True
            self.worker.after_forward(self._step)

    def results(self) -> Collected:
        if self._step.idle:  # without a forward pass vLLM 0.30 does not wait for saves
            self.after_forward()
        return self.worker.collect(idle=self._step.idle, waiting=self._step.waiting)

    def bad_blocks(self) -> set[int]:
        return self.worker.take_bad_blocks()

    def turn_off(self, why: str) -> None:
        """From now on nothing is done, and nothing that is being copied is published."""
        self.worker.turn_off(why)

    def quiet(self) -> bool:
        """Whether no copy touches the engine's blocks any more."""
        return self.worker.quiet()

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
