"""The class vLLM loads. Delegates; decides nothing."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from kvbm.connect.vllm import contract, cores, layouts, support
from kvbm.connect.vllm.guard import SchedulerGuard, WorkerGuard
from kvbm.connect.vllm.stats import KvbmPromMetrics, KvbmStats
from kvbm.connect.vllm.translate import KvbmMetadata, SchedulerSide, WorkerSide
from kvbm.core.config import Resolved, load
from kvbm.core.errors import Broken, KvbmError
from kvbm.core.identity import clash
from kvbm.observe.log import configure
from kvbm.worker.worker import Collected

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

log = logging.getLogger(__name__)


@contextmanager
def _told(config: VllmConfig, *, is_worker: bool = False) -> Iterator[Resolved]:
    """With the settings; what ends the start is said once, whatever vLLM makes of it."""
    resolved = None
    try:
        resolved = load(extra=config.kv_transfer_config.kv_connector_extra_config)
        yield resolved
    except KvbmError as error:
        support.say_why(error, config, resolved, rank=get_tensor_model_parallel_rank() if is_worker else 0)
        raise


class KvbmConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """`--kv-transfer-config '{"kv_connector":"KvbmConnector","kv_connector_module_path":"kvbm.connect.vllm",
    "kv_role":"kv_both"}'`. Settings may stand in `kv_connector_extra_config`.

    Where KVBM is switched off, or something it needs at start is broken (and `strict` is not set), both sides are None
    and the engine runs as if it had no connector.
    """

    _cache_hit_source = contract.HIT_SOURCE

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        configure()
        # vLLM's default ends a request whose load failed; it reads this after constructing the connector.
        self._kv_transfer_config.kv_load_failure_policy = "recompute"
        self._scheduler: SchedulerGuard | None = None
        self._worker: WorkerGuard | None = None
        self._build(vllm_config, role, kv_cache_config)

    def _build(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        is_worker = role is KVConnectorRole.WORKER
        with _told(vllm_config, is_worker=is_worker) as resolved:
            if not resolved.settings.enabled:
                log.warning("KVBM is switched off (%s): the engine runs without it", resolved.sources["enabled"])
                return
            support.check(vllm_config, kv_cache_config, resolved)
            if not is_worker:
                self._build_scheduler(vllm_config, kv_cache_config, resolved)
            elif not support.only_watches(vllm_config, kv_cache_config, resolved):
                self._worker = WorkerGuard(WorkerSide(vllm_config, kv_cache_config, resolved))

    def _build_scheduler(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, resolved: Resolved) -> None:
        first = vllm_config.parallel_config.data_parallel_index == 0
        if (reason := support.stands_aside(vllm_config, resolved)) is not None:
            log.log(logging.WARNING if first else logging.DEBUG, "%s", reason)
            return
        if first:
            contract.warn_if_untested()
            cores.warn_if_fewer(vllm_config)
            layouts.got(vllm_config, resolved, kv_cache_config)
        if (sentence := clash()) is not None:
            log.warning("%s", sentence)
        try:
            self._scheduler = SchedulerGuard(SchedulerSide(vllm_config, kv_cache_config, resolved))
        except Broken as error:
            if resolved.settings.strict:
                raise
            log.error("KVBM cannot start, the engine runs without it: %s", error)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """None in particular, unless a setting asks for one. The first time that vLLM shows a connector the whole
        configuration: what cannot be served ends here, before memory is profiled and kernels are compiled."""
        configure()
        with _told(vllm_config) as resolved:
            if not resolved.settings.enabled:
                return None
            support.check_config(vllm_config, resolved)
            # Two connectors with different wishes end the engine's start, and this one does not know the others.
            among = sys._getframe(1).f_code.co_name == "get_required_kvcache_layout"
            return layouts.wanted(vllm_config, resolved, among_others=among)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """It does not. Where vLLM asks, a wrong setting is told before anything is loaded."""
        load(extra=extra_config)
        return False

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # ------------------------------------------------------------------ scheduler side

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        if self._scheduler is not None:
            self._scheduler.bind(gpu_block_pool)

    def on_new_request(self, request: Request) -> None:
        if self._scheduler is not None:
            self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduler.match(request, num_computed_tokens) if self._scheduler is not None else (0, False)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            self._scheduler.place(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return KvbmMetadata(*(self._scheduler.step(scheduler_output) if self._scheduler is not None else (b"",)))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if self._scheduler is not None:
            if connector_output.invalid_block_ids:
                self._scheduler.not_loaded(connector_output.invalid_block_ids, self._kv_cache_manager)
            self._scheduler.stepped()

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is not None:
            self._scheduler.finish(request, block_ids)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        first, *others = block_ids
        if self._scheduler is not None:
            self._scheduler.finish(request, first, others)
        return False, None

    def take_events(self) -> Iterable[KVCacheEvent]:
        return self._scheduler.take_events() if self._scheduler is not None else ()

    def reset_cache(self) -> bool:
        return self._scheduler.reset() if self._scheduler is not None else True

    # ------------------------------------------------------------------ worker side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._worker is not None:
            with _told(self._vllm_config, is_worker=True):
                self._worker.register(kv_caches)

    def unregister_kv_caches(self) -> None:
        """vLLM unmaps them next (sleep mode, 0.33): returns when no copy touches them any more. None begins before the
        engine's next step."""
        if self._worker is not None:
            self._worker.quiesce()

    def restore_kv_caches(self) -> None:
        """Nothing: they are at the same addresses again."""

    def handle_preemptions(self, kv_connector_metadata: KvbmMetadata) -> None:
        if self._worker is not None:
            self._worker.before_step(kv_connector_metadata.payload, kv_connector_metadata.promises)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.before_forward()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: what a forward pass needs is complete before it starts."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: blocks are offloaded after the forward pass, beside the next one."""

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.after_forward()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        ended = self._worker.results() if self._worker is not None else Collected()
        return KVConnectorTransferResults(finished_recving=ended.loaded, failed_recving=ended.failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.bad_blocks() if self._worker is not None else set()

    # ------------------------------------------------------------------ both

    def get_kv_connector_stats(self) -> KvbmStats | None:
        return self._scheduler.stats() if self._scheduler is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvbmStats:
        return KvbmStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> KvbmPromMetrics:
        return KvbmPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        for side in (self._scheduler, self._worker):
            if side is not None:
                side.close()
