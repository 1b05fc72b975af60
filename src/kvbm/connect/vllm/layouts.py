"""Where an engine on a GPU keeps the KV of a block: what KVBM asks for, and what it gets.

With blocks outermost all layers of a block are one piece of memory, so that a copy has long rows. vLLM asks a connector
for its wish before it knows what its backends can do: a wish that they cannot fulfil is dropped with a warning, but one
that does not go with the size of blocks, or with another connector's, ends the engine's start.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from vllm import envs
from vllm.platforms import current_platform

from kvbm.core.config import Resolved

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

log = logging.getLogger(__name__)

BLOCKS: Final = "BLNHC"
"""vLLM's name: block, layer, token, head, content. Inside a layer's part of a block this is the order that vLLM chooses
by itself, so that what is stored fits before and after."""
_BLACKWELL: Final = 10
"""Compute capability (its first number) of GPUs on which FlashInfer takes heads outside of tokens only."""


def wanted(config: VllmConfig, resolved: Resolved, *, among_others: bool) -> str | None:
    """The layout that KVBM asks for, None for no wish. `among_others`: another connector passes the question on."""
    if resolved.settings.g1_layout == "engine":
        return None
    if (reason := _unfit(config, among_others=among_others)) is None:
        return _wish()
    log.warning(
        "KVBM does not ask for KV with blocks outermost (g1_layout=blocks, from %s): %s",
        resolved.sources["g1_layout"], reason,
    )  # fmt: skip
    return None


def _wish() -> str:
    capability = current_platform.get_device_capability()
    return "BLHNC" if capability is not None and capability.major == _BLACKWELL else BLOCKS


def _unfit(config: VllmConfig, *, among_others: bool) -> str | None:
    """Why KVBM has no wish."""
    model = config.model_config
    if config.device_config.device_type != "cuda":
        return "this engine does not compute on a GPU"
    if envs.VLLM_KV_CACHE_LAYOUT is not None:
        return f"VLLM_KV_CACHE_LAYOUT is {envs.VLLM_KV_CACHE_LAYOUT}"
    if among_others:
        return "it is one of several connectors"
    # vLLM refuses kernels that work on parts of such blocks; its own choice of a size is one that kernels take whole.
    if getattr(config.cache_config, "user_specified_block_size", True):
        return "the size of blocks is given (--block-size)"
    text = model.hf_text_config
    kinds = set(getattr(text, "layer_types", None) or ())
    windows = model.get_sliding_window() is not None or getattr(text, "attention_chunk_size", None) is not None
    if model.is_hybrid or windows or len(kinds) > 1:
        return "the model's layers are of several kinds"
    if config.speculative_config is not None and config.speculative_config.method != "ngram":
        return "another model drafts tokens"
    return None


def got(config: VllmConfig, resolved: Resolved, kv: KVCacheConfig) -> None:
    """Says what became of the wish. On the scheduler's side, once."""
    if resolved.settings.g1_layout == "blocks" and config.device_config.device_type == "cuda":
        fulfilled = (
            "as KVBM asked for" if kv.kv_cache_layout == _wish() else "which is not what g1_layout=blocks asks for"
        )
        log.info("KVBM: the engine keeps its KV in layout %s, %s", kv.kv_cache_layout, fulfilled)
