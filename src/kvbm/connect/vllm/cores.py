"""How many cores vLLM computes on, on a CPU. It keeps some free for its own scheduler: one for each rank, with any KV
connector two; where there are not more than that, none."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

log = logging.getLogger(__name__)


def warn_if_fewer(config: VllmConfig) -> None:
    """Says what to set where vLLM computes on fewer cores than without KVBM, or on every core there is."""
    if config.parallel_config.distributed_executor_backend != "mp":
        return  # nothing is bound
    try:
        # What the executor asked, in this process, to bind its workers: it knows topology, ranks and settings. Imported
        # here, because a version that has another one is served without this warning.
        from vllm import envs
        from vllm.platforms import current_platform
        from vllm.utils.ompmultiprocessing import OMPProcessManager

        if not current_platform.is_cpu():
            return
        told = logging.getLogger(OMPProcessManager.__module__)
        told.disabled = True
        try:
            bound = OMPProcessManager(config)
        finally:
            told.disabled = False
        if not bound.auto_setup:
            return  # somebody chose the cores
        cores = sum(map(len, bound.cpu_lists)) + len(bound.reserved_cpu_list)
        sentence = remedy(cores, bound.local_world_size, bound.reserve_cpu_num, envs.VLLM_CPU_NUM_OF_RESERVED_CPU)
    except Exception:
        log.debug("cannot tell on which cores vLLM computes", exc_info=True)
        return
    if sentence is not None:
        log.warning("%s", sentence)


def computing(cores: int, reserved: int) -> int:
    """On how many of `cores` vLLM computes."""
    return cores - reserved if cores > reserved else cores


def remedy(cores: int, ranks: int, reserved: int, chosen: int | None) -> str | None:
    """What to set; None where nothing is to be gained. vLLM keeps `reserved` of `cores` free; the user set `chosen`."""
    now, alone = computing(cores, reserved), computing(cores, ranks)
    if now == cores > ranks:
        what = (
            f"vLLM computes on all {cores} cores and leaves none to its scheduler: steps can take three times as long"
        )
    elif now < alone and chosen is None:
        what = f"vLLM computes on {now} of {cores} cores, without a KV connector it would on {alone}"
    else:
        return None
    return f"{what}. Set VLLM_CPU_NUM_OF_RESERVED_CPU={ranks}, as `kvbm serve` does"
