"""What KVBM refuses to serve, and when it stands aside. What the configuration alone says is looked at as early as vLLM
shows it to a connector; what the layers say, when vLLM constructs one."""

from __future__ import annotations

import logging
import platform
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kvbm.build import peers as build_peers
from kvbm.build import worker as build_worker
from kvbm.connect.vllm import contract
from kvbm.connect.vllm.geometry import KINDS, a_spec, layer_groups, specs_of
from kvbm.core.config import Resolved
from kvbm.core.errors import ConfigError, KvbmError, Unsupported
from kvbm.observe import last_words

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

log = logging.getLogger(__name__)

SERVED = ("cpu", "cuda")
"""What an engine may compute on."""
_HASHES = {"sha256", "sha256_cbor"}
_SPECULATION = {"ngram", "draft_model"}
"""Others keep KV that depends on the target's hidden states, and on the token after a block."""

_EARLY = (
    "layers of which vLLM's model runner V2 zeroes or copies blocks before it lets a connector wait for them "
    "(recurrent layers, KV of several precisions, matches inside blocks); VLLM_USE_V2_MODEL_RUNNER=0 helps"
)


def runs_on(config: VllmConfig) -> str:
    """What the engine computes on, as torch calls it."""
    return str(config.device_config.device_type)


def check_platform() -> None:
    """What vLLM is built for. Raises Unsupported."""
    from vllm.platforms import current_platform

    kind = current_platform.device_type  # empty where vLLM found nothing to compute on, and then it says so
    _refuse(
        (current_platform.is_rocm(), "AMD's GPUs (ROCm)"),
        (bool(kind) and kind not in SERVED, f"copies to and from {kind} memory"),
    )


def check_config(config: VllmConfig, resolved: Resolved) -> None:
    """What the configuration says, on every side the same. Raises Unsupported, with a sentence, for what the connector
    cannot serve correctly; ConfigError for settings that cannot go together."""
    parallel, device = config.parallel_config, runs_on(config)
    speculative = config.speculative_config
    method = speculative.method if speculative is not None else "ngram"
    unlike = _not_reused(config.model_config)
    _refuse(
        (unlike, unlike),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism"),
        (parallel.decode_context_parallel_size > 1, "decode context parallelism"),
        (getattr(parallel, "prefill_context_parallel_size", 1) > 1, "prefill context parallelism"),
        (getattr(parallel, "nnodes", 1) > 1, "tensor parallelism over several nodes"),
        (device not in SERVED, f"copies to and from {device} memory"),
        *(_on_a_gpu(config) if device == "cuda" else ()),
        (platform.machine().startswith("riscv"), "RISC-V, where vLLM reuses no prefixes"),
        (method not in _SPECULATION, f"speculative decoding by {method} (only by n-grams and draft models)"),
        (getattr(speculative, "parallel_drafting", False), "drafts of which all tokens are made at once"),
        (getattr(config.cache_config, "calculate_kv_scales", False), "KV scales that are computed while serving"),
    )
    if (hash_name := config.cache_config.prefix_caching_hash_algo) not in _HASHES:
        raise ConfigError(
            "prefix_caching_hash_algo",
            f"{hash_name} is not a cryptographic hash, and its seed differs between processes unless PYTHONHASHSEED is "
            "set: two prompts could share a key",
            source="the engine's --prefix-caching-hash-algo", remedy="Use sha256 or sha256_cbor.",
        )  # fmt: skip
    build_worker.check_device(resolved, device)
    if resolved.settings.onboard == "sync" and config.scheduler_config.async_scheduling:
        raise ConfigError(
            "onboard", "sync cannot be used while the engine schedules asynchronously: it cannot recover from a load "
            "that fails inside a step", source=resolved.sources["onboard"],
            remedy="Use onboard=async, or start the engine with --no-async-scheduling.",
        )  # fmt: skip


def _on_a_gpu(config: VllmConfig) -> Iterator[tuple[object, str]]:
    """What the configuration says of an engine on GPUs."""
    speculative = config.speculative_config
    draft_model = speculative is not None and speculative.method == "draft_model"
    # vLLM would unmap memory that copies may be using.
    asleep = config.model_config.enable_sleep_mode and not contract.tells_of_sleep()
    yield asleep, "sleep mode on GPUs where vLLM does not tell a connector of it (before 0.33)"
    yield draft_model and runs_v2(config), "a draft model under vLLM's model runner V2"
    yield config.model_config.has_inner_state and runs_v2(config), _EARLY


def runs_v2(config: VllmConfig) -> bool:
    """Whether the engine's model runner is V2, which zeroes and copies blocks before a connector hears of the step."""
    return bool(getattr(config, "use_v2_model_runner", False))


def _not_reused(model: ModelConfig) -> str:
    """What of a model makes it impossible to go on from the beginning of another prompt, empty where nothing does.

    Decided by the model, never by the engine's flag: that says the same where only its user switched caching off, and
    another thing in each process.
    """
    if model.is_encoder_decoder:
        return "encoder-decoder models"
    if getattr(getattr(model, "multimodal_config", None), "mm_encoder_only", False):
        return "an instance that runs a multimodal encoder alone"
    if model.pooler_config is not None and not model.is_prefix_caching_supported:
        return (
            "pooling models of which vLLM does not reuse prefixes: their attention goes both ways, or they pool by "
            "MEAN, CLS or STEP"
        )
    if getattr(model, "is_diffusion", False):
        return "diffusion models, which write tokens again after their KV was kept"
    if getattr(model, "rswa_window", None) is not None:
        return "models whose generated tokens see a window of their own (R-SWA)"
    return ""


def check(config: VllmConfig, kv: KVCacheConfig, resolved: Resolved) -> None:
    """The same, and what the layers' KV says."""
    check_config(config, resolved)
    specs = [spec for group in kv.kv_cache_groups for spec in specs_of(group)]
    names = {type(spec).__name__ for spec in specs}
    unknown = ", ".join(sorted(names - KINDS.keys()))
    speculative = config.speculative_config
    _refuse(
        (not specs, "models without a KV cache"),
        (bool(unknown), f"layers of kind {unknown} (only full, sliding-window and chunked local attention, and MLA)"),
        (
            any(getattr(spec, "non_causal", False) for spec in specs),
            "layers that see the tokens after them (a prefix-LM): vLLM reuses no prefixes there",
        ),
        (
            any(getattr(spec, "prefix_replay_tokens", 0) for spec in specs),
            "layers whose last window before a hit is computed again (bounded replay): vLLM gives up short hits there",
        ),
        (not all(getattr(spec, "prefix_cacheable", True) for spec in specs), "layers whose KV vLLM does not reuse"),
        (
            any(getattr(group, "host_resident", False) for group in kv.kv_cache_groups),
            "layers of which vLLM itself keeps the KV in host memory (HiSparse)",
        ),
        (
            not all(getattr(group, "enable_kv_transfer", True) for group in kv.kv_cache_groups),
            "layers of which vLLM makes the KV anew after a load",
        ),
        (len({group.kv_cache_spec.block_size for group in kv.kv_cache_groups}) > 1, "KV blocks of different sizes"),
    )
    unlike, finer = _states(config, kv, resolved), contract.hash_block_tokens(config, kv) < specs[0].block_size
    early = runs_on(config) == "cuda" and runs_v2(config)
    _refuse(
        (unlike, unlike),
        (early and (finer or getattr(kv, "needs_kv_cache_zeroing", True)), _EARLY),
        (
            speculative is not None and speculative.method == "draft_model" and bool(layer_groups(kv)),
            "a draft model beside sliding windows",
        ),
        (
            "MLAAttentionSpec" in names and not config.scheduler_config.enable_chunked_prefill,
            "MLA where the engine cannot go on from a cached beginning of a prompt (without chunked prefill, which "
            "vLLM switches off on a CPU without AMX)",
        ),
        (contract.hash_block_tokens(config, kv) > specs[0].block_size, "block hashes coarser than blocks"),
    )
    if groups := layer_groups(kv):
        _check_settings(resolved, len(groups))


def _refuse(*reasons: tuple[object, str]) -> None:
    for wrong, sentence in reasons:
        if wrong:
            raise Unsupported(f"KVBM does not serve {sentence}. Start the engine without KVBM's connector.")


def _states(config: VllmConfig, kv: KVCacheConfig, resolved: Resolved) -> str:
    """How recurrent layers keep their state where it cannot be found again, empty where it can be, or nobody looks."""
    specs: list[Any] = [a_spec(group) for group in kv.kv_cache_groups]
    names = {type(spec).__name__ for spec in specs}
    states = [spec for spec in specs if type(spec).__name__ == "MambaSpec"]
    if not states or only_watches(config, kv, resolved):
        return ""
    if any(spec.mamba_cache_mode != "align" or getattr(spec, "num_prefill_checkpoint_blocks", 0) for spec in states):
        return "recurrent state that is not kept at block boundaries (--mamba-cache-mode align, prefix caching)"
    if contract.hash_block_tokens(config, kv) != states[0].block_size:
        return "recurrent state with prefix matches inside blocks (--prefix-match-unit)"
    if config.speculative_config is not None:
        return "recurrent state with speculative decoding"
    beside = names & {"SlidingWindowSpec", "ChunkedLocalAttentionSpec"}
    return "recurrent state beside sliding windows" if beside else ""


def stands_aside(config: VllmConfig, resolved: Resolved) -> str | None:
    """Why the engine runs without KVBM, None where it does not. For the scheduler's side alone: a worker's copy of the
    configuration may say another thing."""
    if config.cache_config.enable_prefix_caching or resolved.settings.without_prefix_caching:
        return None
    return (
        "KVBM stands aside, and the engine runs without it: the engine's own prefix caching is switched off "
        "(--no-enable-prefix-caching). Set without_prefix_caching=true to have KVBM serve it all the same."
    )


def only_watches(config: VllmConfig, kv: KVCacheConfig, resolved: Resolved) -> bool:
    """Whether the scheduler's side is sure to stand aside, seen from a worker: without prefix caching, vLLM keeps the
    state of recurrent layers in another way, which no worker need understand then."""
    modes = {getattr(a_spec(group), "mamba_cache_mode", "align") for group in kv.kv_cache_groups}
    return "none" in modes and stands_aside(config, resolved) is not None


def _check_settings(resolved: Resolved, groups: int) -> None:
    """What cannot go with several layer groups, or one that does not need all blocks."""
    settings, sources = resolved.settings, resolved.sources
    otherwise = " Or start the engine with --disable-hybrid-kv-cache-manager: then every layer keeps all blocks."
    compared = "stored blocks are not compared with computed ones"
    for name, wrong, sentence, remedy in (
        ("onboard", settings.onboard == "sync", "sync cannot be used", "Use onboard=async."),
        ("directory", build_peers.wanted(settings), "blocks are not shared with other instances", "Leave it out."),
        ("shadow_every", bool(settings.shadow_every), compared, "Set it to 0."),
        ("prove_first", settings.prove_first, compared, "Set it to false."),
    ):
        if wrong:
            raise ConfigError(
                name, f"{sentence} for a model whose layers need different blocks of a prompt (several KV-cache groups,"
                " or sliding windows)", source=sources[name],
                remedy=remedy + (otherwise if groups > 1 else ""),
            )  # fmt: skip


def say_why(error: KvbmError, config: VllmConfig, resolved: Resolved | None, *, rank: int = 0) -> None:
    """Says once, of all processes of an engine, why its start ends, because vLLM buries it in stack traces of several;
    `kvbm serve` is told, too."""
    if rank or config.parallel_config.data_parallel_index:
        return
    log.error("KVBM ends the start: %s", error)
    transfer = config.kv_transfer_config
    if resolved is not None and transfer is not None and transfer.engine_id is not None:
        engine = re.sub(r"_dp\d+$", "", transfer.engine_id)  # vLLM's suffix
        last_words.leave(resolved.settings.run_dir, engine, str(error))
