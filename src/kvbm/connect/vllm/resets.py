"""Resets of the engine's own prefix cache: vLLM tells a connector nothing of them, and nothing of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvbm.core.config import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool


def changing_weights(config: VllmConfig, settings: Settings) -> str | None:
    """Why a reset may mean that the weights are others now; None: it says nothing about them."""
    if settings.reset != "auto":
        return "reset=follow" if settings.reset == "follow" else None
    if config.weight_transfer_config is not None:
        return "the engine takes weights from a trainer: weight_transfer_config"
    if config.parallel_config.worker_extension_cls:
        return "a worker extension can replace them: worker_extension_cls"
    if not str(config.parallel_config.worker_cls).startswith(("auto", "vllm.")):
        return "a worker that is not vLLM's own can replace them: worker_cls"
    if config.model_config.enable_sleep_mode:
        return "they can be replaced while the engine sleeps: enable_sleep_mode"
    if config.load_config.load_format == "dummy" and not settings.dummy_weights_fixed:
        return "it started without weights: load_format=dummy, and dummy_weights_fixed is not set"
    return None


class Resets:
    """`why`: what `changing_weights` says; where it is None, such a reset is the engine's own affair."""

    def __init__(self, why: str | None) -> None:
        self.why = why
        self._pool: BlockPool | None = None
        self._table: object = None

    def watch(self, pool: BlockPool) -> None:
        """The engine's blocks; a reset replaces their table of hashes."""
        self._pool, self._table = pool, pool.cached_block_hash_to_block

    def noticed(self) -> bool:
        """Whether there was a reset since this was asked last, and it counts."""
        if self._pool is None or self._pool.cached_block_hash_to_block is self._table:
            return False
        self._table = self._pool.cached_block_hash_to_block
        return self.why is not None
